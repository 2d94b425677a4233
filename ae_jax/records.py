"""What a run leaves on disk beside its checkpoints, and what a result file holds.

Every file is whole or absent: it is written beside its place, then renamed. Imports no
JAX, so that a command can look at a run folder before it decides to load anything.
"""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ae_jax import __version__
from ae_jax.config import RunConfig, UserError, to_json

FORMAT = 1
"""Version of the run folder's layout; raised when an older reader would fail."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

Row = dict[str, Any]

WRITE_ANEW = "delete it and summary.json, and give the run's command again"
"""What to do about a damaged file that a run writes when it goes on."""


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file, or, if that fails, leave what was there.

    Args:
        path: where it shall be.
        write: writes the content to the open file that it is given.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, as :func:`write_file` does."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, plain: Any) -> None:
    """Write JSON, indented, with a newline at the end."""
    write_text(path, json.dumps(plain, indent=2) + "\n")


def read_json(path: Path, remedy: str = "delete the run folder, or mend it") -> Any:
    """Read JSON.

    Args:
        path: the file.
        remedy: what to do if it is damaged.

    Raises:
        UserError: the file is not JSON; it says what to do.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {remedy}") from error


def versions() -> dict[str, str]:
    """What computed the numbers: Python, this project, the packages under it."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "ae_jax": __version__, **packages}


def usable_cores() -> int:
    """Cores that this process may use; bits differ between one core and two."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(field: str) -> str:
    """What Linux tells of the first core; elsewhere the processor's bare name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    return _cpuinfo("model name")


def compilation_cache_dir() -> Path:
    """The user's folder of compiled programs, for this jaxlib on this processor.

    Machine code for another processor's flags may not run, or round otherwise.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    flags = hashlib.sha256(_cpuinfo("flags").encode()).hexdigest()[:12]
    jaxlib = importlib.metadata.version("jaxlib")
    return Path(home) / "ae_jax" / f"xla-{jaxlib}-{flags}"


def git_commit() -> str | None:
    """The commit that this code stands at; None outside a checkout."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return answer.stdout.strip()
    return None


def describe(
    experiment: str, config: RunConfig, device: dict[str, Any], data: dict[str, Any]
) -> dict[str, Any]:
    """A new run's config.json.

    Args:
        experiment: its name, as in ``python -m experiments.NAME``.
        config: the run's.
        device: ``kind`` and ``count`` of the accelerators.
        data: what the data set tells of itself.
    """
    return {
        "format": FORMAT,
        "experiment": experiment,
        "config": to_json(config),
        "versions": versions(),
        "device": {**device, "cpu_model": cpu_model(), "cpu_cores": usable_cores()},
        "git_commit": git_commit(),
        "data": data,
        "history": [],
    }


DESCRIPTION: dict[str, Any] = {
    "experiment": str,
    "config": dict,
    "versions": dict,
    "device": {"kind": str},
    "data": {"fingerprint": str, "num_train": int, "shape": list},
    "history": list,
}
"""What config.json must hold for its readers, and of which types."""

SUMMARY: dict[str, Any] = {
    "epochs": int,
    "stopped": bool,
    "test/mse": float,
    "test/psnr_db": float,
    "test/ssim": float,
    "code/dead_units": int,
    "wall_s": float,
    "first_step_s": float,
}
"""The same of summary.json."""


def _check_types(plain: Any, types: Any, name: str) -> None:
    """Compare JSON with a table of types.

    Raises:
        ValueError: a key is missing, or its value of another type; names it.
    """
    kind = dict if isinstance(types, dict) else types
    if type(plain) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}")
    for key in types if isinstance(types, dict) else ():
        if key not in plain:
            raise ValueError(f"{key} is missing")
        _check_types(plain[key], types[key], key)


def read_description(run_dir: Path) -> dict[str, Any]:
    """A run folder's config.json.

    Raises:
        UserError: there is no run, one of a format that this version cannot read, or
            the file is damaged.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir}: not a run folder (no config.json); check the path")
    description = read_json(path)
    if not isinstance(description, dict) or "config" not in description:
        raise UserError(f"{path}: not a run's config.json; choose another folder")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{path}: run folder of format {description.get('format')}, this version "
            f"reads format {FORMAT}; use the ae_jax that wrote it"
        )
    try:
        _check_types(description, DESCRIPTION, "it")
        for entry in description["history"]:
            _check_types(entry, {"versions": dict, "device": dict}, "history")
    except ValueError as error:
        raise UserError(f"{path}: damaged, {error}; mend it") from error
    return description


def read_summary(run_dir: Path) -> Row | None:
    """A finished run's summary.json; None if the run is not finished.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    remedy = "delete it, and give the run's command again"
    summary: Row = read_json(path, remedy)
    try:
        _check_types(summary, SUMMARY, "it")
    except ValueError as error:
        raise UserError(f"{path}: damaged, {error}; {remedy}") from error
    return summary


def read_known(run_dir: Path, experiment: str) -> dict[str, Any] | None:
    """The config.json of a folder that an experiment may go on in; None: it is new.

    Raises:
        UserError: it holds another experiment's run; see also
            :func:`read_description`.
    """
    if not (run_dir / "config.json").exists():
        return None
    description = read_description(run_dir)
    if description["experiment"] != experiment:
        raise UserError(
            f"{run_dir} holds a run of experiments.{description['experiment']}; choose "
            "another --run-dir"
        )
    return description


def note_surroundings(description: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Record in a run's description that it goes on in other surroundings.

    Args:
        description: the run's, to which an entry of ``history`` is added.
        now: what :func:`describe` says today.

    Returns:
        One line that names the differences, or None if there are none.
    """
    last = description["history"][-1] if description["history"] else description
    changes = [
        f"{part}.{name} {last[part].get(name)} → {value}"
        for part in ("versions", "device")
        for name, value in now[part].items()
        if last[part].get(name, value) != value  # an older version recorded less
    ]
    if not changes:
        return None
    entry = {key: now[key] for key in ("versions", "device", "git_commit")}
    description["history"].append({"date": _today(), **entry})
    return f"resumed with other {', '.join(changes)}: the bits may differ from here on"


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold a run folder, made if absent, for this process alone.

    The lock is the operating system's: it ends with the process, however that ends.
    A folder that is still empty in the end is removed again.

    Raises:
        UserError: another process holds it, or what is there is not a run folder.
    """
    foreign = f"{run_dir}: in the way, and not a run folder; choose another --run-dir"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(foreign)
    run_dir.mkdir(parents=True, exist_ok=True)
    # What a killed process was writing; see write_file.
    unfinished = {*run_dir.glob(".*.*.[0-9]*"), *run_dir.glob("figures/.*.*.[0-9]*")}
    known = (run_dir / "config.json").exists()
    if not known and any(path not in unfinished for path in run_dir.iterdir()):
        raise UserError(foreign)
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        _lock_at_once(handle, run_dir)
        for path in unfinished:
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            run_dir.rmdir()


def _lock_at_once(handle: int, run_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{run_dir}: in use by another process; wait for it, or choose another "
            "--run-dir"
        ) from error


def write_rows(run_dir: Path, rows: list[Row], name: str = "metrics.jsonl") -> None:
    """Write metrics.jsonl, an epoch a line, or another file of rows."""
    write_text(run_dir / name, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(
    run_dir: Path, name: str = "metrics.jsonl", types: dict[str, Any] | None = None
) -> list[Row]:
    """The rows of metrics.jsonl, or of another such file; none if there is none yet.

    Args:
        run_dir: the run folder.
        name: of the file.
        types: what each row must hold.

    Raises:
        UserError: the file is damaged; names the line.
    """
    path = run_dir / name
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
            _check_types(rows[-1], types or {}, "it")
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is damaged ({error}); {WRITE_ANEW}"
            ) from error
    return rows


class Board:
    """The run's TensorBoard log: written anew, then added to."""

    def __init__(self, run_dir: Path, rows: list[Row]) -> None:
        # Where PyTorch is installed, tensorboardX loads it, for a type that we never
        # give it: two seconds and 170 MB. What is None in sys.modules is not found.
        hidden = {"torch"} - sys.modules.keys()
        sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
        try:
            from tensorboardX import SummaryWriter
        finally:
            for name in hidden:
                del sys.modules[name]

        folder = run_dir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), flush_secs=5)
        for row in rows:
            self.add_row(row)
        for path in (run_dir / "figures").glob("*.png"):
            # A damaged picture may raise anything; the end of the run draws it anew.
            with contextlib.suppress(Exception):
                self.add_figure(path)

    def add_row(self, row: Row) -> None:
        """Log an epoch's numbers against its step."""
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, row["step"])

    def add_figure(self, path: Path) -> None:
        """Log a figure's PNG."""
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def epoch_line(row: Row, num_epochs: int, loss: str, code_width: int) -> str:
    """A row of metrics.jsonl as one line for people."""
    keys = [f"{part}/{loss}" for part in ("train", "val")]
    scores = "  ".join(f"{key} {row[key]:.5f}" for key in keys if key in row)
    return (
        f"epoch {row['epoch']}/{num_epochs}  {scores}  dead units "
        f"{row['code/dead_units']}/{code_width}  "
        f"{row['images_per_s']:,.0f} images/s  {row['wall_s']:.1f} s"
    )


def score_table(summary: Row, code_width: int) -> str:
    """The scores of a summary.json as a table, beside those of the baselines."""
    loss = summary.get("train/mse")  # trained with another loss, it has another name
    scores = [("training, mean of its batches", loss, "")] if loss is not None else []
    scores += [
        (
            "test",
            summary["test/mse"],
            f"{summary['test/psnr_db']:.2f} dB   {summary['test/ssim']:.3f}",
        ),
        (f"test, PCA of {code_width} components", summary["baseline/pca/test/mse"], ""),
        ("test, mean training image", summary["baseline/mean_image/test/mse"], ""),
    ]
    lines = [f"{'':32}{'MSE':>8}   {'PSNR':>8}    SSIM"]
    lines += [f"{name:32}{mse:8.5f}   {rest}".rstrip() for name, mse, rest in scores]
    lines.append(f"dead code units: {summary['code/dead_units']} of {code_width}")
    return "\n".join(lines)


def stopwatch(work: Callable[[int], object], num_steps: int) -> float:
    """Seconds that something takes for so many steps."""
    start = time.perf_counter()
    work(num_steps)
    return time.perf_counter() - start


def measure_gflops(size: int = 2048, rounds: int = 5) -> float:
    """GF/s of a large float32 matrix product by NumPy's BLAS: the best of some."""
    a = np.random.default_rng(0).random((size, size), np.float32)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def machine(accelerator: str) -> dict[str, Any]:
    """The machine a result was measured on.

    Args:
        accelerator: JAX's name of the device, ``cpu`` if there is none.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": usable_cores(),
        "cpu": cpu_model(),
        "accelerator": accelerator,
        "memory_gib": round(memory / 2**30, 1),
        "gflops": round(measure_gflops(), 1),
    }


def write_result(
    path: Path,
    experiment: str,
    accelerator: str,
    seeds: list[int],
    headline: dict[str, int | float],
    table: list[dict[str, Any]],
) -> None:
    """Write an experiment's result: where it came from, its numbers, its table.

    Args:
        path: ``experiments/results/NAME.json``.
        experiment: the experiment's name.
        accelerator: as for :func:`machine`.
        seeds: the seeds it ran.
        headline: name to number, flat.
        table: rows as README and docs show them.
    """
    result = {
        "experiment": experiment,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": _today(),
        "machine": machine(accelerator),
        "versions": versions(),
        "seeds": seeds,
        "headline": headline,
        "table": table,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
