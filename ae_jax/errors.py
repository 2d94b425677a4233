"""What ends a command without a result, and the hint at a mistyped name."""

import difflib
from collections.abc import Iterable


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
