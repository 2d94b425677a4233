"""The form of every command: presets, options, exit status, signals.

Imports no JAX, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import contextlib
import dataclasses
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro

from ae_jax import config as configs
from ae_jax.config import RunConfig, UserError

C = TypeVar("C", bound=RunConfig)

STARTED = time.monotonic()
"""When the command began, near enough: this module is the first that it imports."""


class Diverged(Exception):
    """The loss is not finite: nothing the user typed wrong, but no result either."""


def leave(signum: int, frame: FrameType | None) -> NoReturn:
    """Signal handler: end the command at once, with the shell's status for the signal.

    Not by an exception: Python drops one that is raised within an import's callback,
    and to unwind while XLA compiles in another thread can crash. Nothing is lost: every
    file is whole or absent, and what is unfinished is cleared by the next command.
    """
    with contextlib.suppress(RuntimeError, OSError):  # the signal fell into a print
        sys.stdout.flush()
    os._exit(128 + signum)


def exit_with(action: Callable[[], None]) -> NoReturn:
    """Do it, and end the process with the status that its outcome calls for.

    0: done. 2: the user can mend it (:class:`UserError`, or the disk's or the
    network's refusal). 1: diverged. Anything else is our bug and keeps its traceback
    (Python's status 1). SIGINT and SIGTERM: 130 and 143.
    """
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    try:
        action()
    except UserError as error:
        status, message = 2, str(error)
    except Diverged as error:
        status, message = 1, str(error)
    except BrokenPipeError:  # the reader of our output went away: `… | head`
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        status, message = 2, _explain(error)
    else:
        sys.exit(0)
    print(f"error: {message}", file=sys.stderr, flush=True)
    jax = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        # An orderly end would wait for the other processes, which wait for this one.
        sys.stdout.flush()
        if jax.process_index() == 0:  # its end aborts those that are still speaking
            time.sleep(1)
        os._exit(status)
    sys.exit(status)


def _explain(error: OSError) -> str:
    remedy = {
        errno.ENOSPC: "make room, and give the same command again",
        errno.EFBIG: "make room, and give the same command again",
        errno.EDQUOT: "make room, and give the same command again",
        errno.EACCES: "choose a place that you may write to",
        errno.EPERM: "choose a place that you may write to",
        errno.EROFS: "choose a place that you may write to",
        errno.EEXIST: "a file is in the way; choose another path",
        errno.ENOTDIR: "a file is in the way; choose another path",
    }.get(error.errno or 0, "check the path, and try again")
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; {remedy}"


def parse(
    name: str,
    presets: Mapping[str, C],
    description: str,
    args: list[str],
    prog: str | None = None,
) -> C:
    """One experiment's config from its command line.

    Args:
        name: the experiment's, as in ``python -m experiments.NAME``.
        presets: configs to start from; the first is the default.
        description: shown by ``--help``.
        args: the command line without the program's name.
        prog: how the program is called; None: ``python -m experiments.NAME``.

    Returns:
        The preset or the file's config, overridden by the options; without a
        ``run_dir`` of its own it runs in ``runs/NAME`` or ``runs/NAME-PRESET``.

    Raises:
        SystemExit: 0 after ``--help``, 2 after an error, which has been shown.
    """
    default = next(iter(presets))
    prog = prog or f"python -m experiments.{name}"
    first = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(presets))
    first.add_argument("--config", type=Path)
    start, rest = first.parse_known_args(args)
    if start.config and start.preset:
        first.error("--preset and --config: give one of them")
    preset = start.preset or default
    folder = Path("runs") / (name if preset == default else f"{name}-{preset}")
    base = presets[preset]
    if start.config:
        base = configs.load(start.config, type(base))
    if base.run_dir == type(base)().run_dir:  # neither the preset's nor the file's own
        base = dataclasses.replace(base, run_dir=folder)
    start_options = (
        f"--preset {{{','.join(presets)}}} chooses the values that the options below "
        f"start from (default: {default}); --config FILE.json takes them from a file, "
        "which may be a run's config.json."
    )
    return tyro.cli(
        type(base),
        default=base,
        prog=prog,
        description=f"{description.strip()}\n\n{start_options}",
        args=rest,
    )


def run_experiment(
    name: str, presets: Mapping[str, C], doc: str | None, run: Callable[[C], Any]
) -> NoReturn:
    """``main`` of an experiment: parse, run, and leave with the right status."""
    exit_with(lambda: run(parse(name, presets, doc or "", sys.argv[1:])))


def run_script(main: Callable[..., None]) -> NoReturn:
    """``main`` of a script: its parameters are the options, its docstring the help."""
    exit_with(lambda: tyro.cli(main, config=(tyro.conf.FlagCreatePairsOff,)))
