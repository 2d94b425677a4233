"""The form of every command: presets, options, exit status, signals.

:mod:`config`, and so JAX, is imported where it is used: not every command needs it.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from ae_jax import registry
from ae_jax.errors import Diverged, UserError, leave, leave_on_signals

C = TypeVar("C")


def exit_with(
    action: Callable[[], None], has_peers: Callable[[], bool] = lambda: False
) -> NoReturn:
    """Do it, and end the process with the status that its outcome calls for.

    0: done. 2: the user can fix it (:class:`UserError`, or the system's refusal). 1:
    diverged. Anything else is our bug and keeps its traceback (Python's status 1).
    SIGINT and SIGTERM: 130 and 143.

    Args:
        action: what to do.
        has_peers: whether this is one of several processes of a run.
    """
    leave_on_signals()
    _write_any_text()
    status, message = 0, ""
    try:
        action()
        print(end="", flush=True)  # a full disk may show here only
    except (UserError, OSError, Diverged, KeyboardInterrupt) as error:
        status, message = _outcome(error)
    except Exception:
        if has_peers():
            traceback.print_exc()
            status = 1
        elif message := _why_no_device():
            status = 2
        else:
            raise
    if message:
        with contextlib.suppress(OSError):  # the status says it too
            print(f"error: {message}", file=sys.stderr, flush=True)
    if status:
        # An orderly end would wait for Orbax's threads, whose save may have failed,
        # or for the other processes of a run, which wait for this one.
        leave(status)
    sys.exit(0)


def _write_any_text() -> None:
    """Have characters that a terminal does not know shown by their number.

    What is closed (``2>&-``) is written to all the same, into nothing.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):  # and not replaced
            stream.reconfigure(errors="backslashreplace")


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit status, and what to say."""
    if isinstance(error, KeyboardInterrupt):  # the trainer's, after it has saved
        return 128 + signal.SIGINT, ""
    if isinstance(error, BrokenPipeError):  # our output's reader went away: `… | head`
        sys.stderr.close()
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return 2, f"{place}{error.strerror or error}"
    return (1 if isinstance(error, Diverged) else 2), str(error)


def _why_no_device() -> str:
    """What is wrong if JAX has none, which it says by errors of many kinds."""
    if "jax" in sys.modules:
        import jax

        try:
            jax.devices()
        except Exception:  # as said
            asked = os.environ.get("JAX_PLATFORMS", "")
            return (
                f"JAX finds no device (JAX_PLATFORMS={asked}); set JAX_PLATFORMS=cpu, "
                "or install JAX for the device"
            )
    return ""


def set_up_jax() -> None:
    """Keep compiled programs in the user's cache folder, for a faster next start.

    ``JAX_COMPILATION_CACHE_DIR`` names another one, and
    ``JAX_ENABLE_COMPILATION_CACHE=0`` turns it off. So does a folder that cannot be
    written to, which is reported.

    And take a GPU's memory as it is needed: to take most of it at the start costs 3.4
    GB of the host's, on a card of 139 GiB, and leaves none to others. What
    ``XLA_PYTHON_CLIENT_PREALLOCATE`` says goes before.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from ae_jax.runs.environment import compilation_cache_dir

    switches: Any = jax.config
    if switches.jax_enable_compilation_cache:
        try:
            folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
            folder = folder or str(compilation_cache_dir())
            if "://" not in folder:  # JAX takes those of clouds too
                Path(folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except (OSError, RuntimeError) as error:  # this one: the user has no home
            reason = getattr(error, "strerror", None) or error
            print(
                f"warning: programs are compiled each time, for their cache cannot be "
                f"written ({reason}); set JAX_COMPILATION_CACHE_DIR",
                file=sys.stderr,
            )
            jax.config.update("jax_enable_compilation_cache", False)
        else:
            jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _check_clone() -> None:
    """Refuse to run a script of one clone on the code of another.

    A clone that is copied with its .venv would.

    Raises:
        UserError: the package is not the one beside the script's folder.
    """
    script, package = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent
    beside = script.parent.parent / "ae_jax"
    if beside.is_dir() and beside != package:
        raise UserError(
            f"{script}: its Python has ae_jax from {package}; give scripts/reproduce "
            f"or scripts/test in {beside.parent}, which install it there"
        )


def parse(
    name: str,
    presets: Mapping[str, C],
    description: str,
    args: list[str],
    prog: str | None = None,
    registries: Mapping[str, registry.Registry] | None = None,
) -> C:
    """One experiment's config from its command line.

    Args:
        name: the experiment's, as in ``python -m experiments.NAME``.
        presets: configs to start from; the first is the default.
        description: shown by ``--help``.
        args: the command line without the program's name.
        prog: how the program is called; None: ``python -m experiments.NAME``.
        registries: the sections whose class a name chooses; None: those of a run.

    Returns:
        The preset or the file's config, its classes chosen by the names, overridden by
        the options; without a ``run_dir`` of its own it runs in ``runs/NAME`` or
        ``runs/NAME-PRESET``.

    Raises:
        UserError: a name that is not known, or a file that holds no config.
        SystemExit: 0 after ``--help``, 2 after an error, which has been shown.
    """
    default = next(iter(presets))
    prog = prog or f"python -m experiments.{name}"
    if registries is None:
        from ae_jax.config import REGISTRIES

        registries = REGISTRIES
    start, rest = _read_start(args, prog, presets, registries)
    preset = start.preset or default
    folder = Path("runs") / (name if preset == default else f"{name}-{preset}")
    base: Any = presets[preset]
    if start.config:
        from ae_jax.config import load

        base = load(start.config, type(base))
    if base.run_dir == type(base)().run_dir:  # neither the preset's nor the file's own
        base = dataclasses.replace(base, run_dir=folder)
    base = _choose_classes(base, registries, vars(start))
    start_options = _start_options(base, registries, presets)
    chosen: C = tyro.cli(
        type(base),
        default=base,
        prog=prog,
        description=f"{description.strip()}\n\n{start_options}",
        args=rest,
    )
    return chosen


def _read_start(
    args: list[str],
    prog: str,
    presets: Mapping[str, Any],
    registries: Mapping[str, registry.Registry],
) -> tuple[argparse.Namespace, list[str]]:
    """What decides on the options that there are, and the rest of the command line."""
    first = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(presets))
    first.add_argument("--config", type=Path)
    for section in registries:
        first.add_argument(f"--{section}.name", dest=section)
    start, rest = first.parse_known_args(args)
    if start.config and start.preset:
        first.error("--preset and --config: give one of them")
    return start, rest


def _choose_classes(
    base: Any, registries: Mapping[str, registry.Registry], names: Mapping[str, Any]
) -> Any:
    """The config with another class, at its defaults, where a name asks for one."""
    for section, known in registries.items():
        name = names[section]
        if name is None or name == registry.name_of(known, getattr(base, section)):
            continue
        cls = registry.find_class(section, known, name)
        try:
            base = dataclasses.replace(base, **{section: cls()})
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{section}.name: {name}: {error}; give each of its fields a default"
            ) from error
    return base


def _start_options(
    base: Any,
    registries: Mapping[str, registry.Registry],
    presets: Mapping[str, Any],
) -> str:
    """What of the command line is read before the options, explained."""
    lines = [
        f"--preset {{{','.join(presets)}}} chooses the values that the options below "
        f"start from (default: {next(iter(presets))}); --config FILE.json takes them "
        "from a file, which may be a run's config.json.",
        "A name chooses a class, whose fields, at its defaults, are then the options "
        "below. One of your own is module:Class.",
    ]
    for section, known in registries.items():
        chosen = registry.name_of(known, getattr(base, section))
        lines.append(f"--{section}.name {{{','.join(known)}}} (now: {chosen})")
    return "\n\n".join(lines)


def run_experiment(
    name: str, presets: Mapping[str, C], doc: str | None, run: Callable[[C], Any]
) -> NoReturn:
    """``main`` of an experiment: parse, run, and leave with the right status."""
    distributed = False

    def action() -> None:
        nonlocal distributed
        config = parse(name, presets, doc or "", sys.argv[1:])
        distributed = getattr(config, "distributed", False)
        set_up_jax()
        run(config)

    exit_with(action, lambda: distributed)


def run_script(main: Callable[..., None]) -> NoReturn:
    """``main`` of a script: its parameters are the options, its docstring the help."""

    def action() -> None:
        _check_clone()
        set_up_jax()
        tyro.cli(main, config=(tyro.conf.FlagCreatePairsOff,))

    exit_with(action)
