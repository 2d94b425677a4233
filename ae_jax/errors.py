"""What ends a command without a result, and the hint at a mistyped name."""

import contextlib
import difflib
import os
import signal
from collections.abc import Iterable
from types import FrameType
from typing import NoReturn


class UserError(Exception):
    """An error the user can fix; its message is the one line that they see."""


class Diverged(Exception):
    """The loss is not finite: nothing the user typed wrong, but no result either."""


def suggest(word: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest one, and all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"{hint}; known are: {', '.join(names)}"


def leave(status: int) -> NoReturn:
    """End the process at once, whatever its threads are doing."""
    # It may be called within a print (RuntimeError), or stdout be full or closed.
    with contextlib.suppress(RuntimeError, OSError, ValueError):
        print(end="", flush=True)
    os._exit(status)


def leave_on_signals() -> None:
    """For commands: end at once on SIGINT and SIGTERM, with the shell's status for it.

    Nothing is lost: every file is whole or absent, and what is unfinished is cleared by
    the next command.
    """

    def handle(signum: int, frame: FrameType | None) -> NoReturn:
        # Not by an exception: Python drops one raised within an import's callback.
        leave(128 + signum)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
