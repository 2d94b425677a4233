"""The files of a run folder beside its checkpoints, and what computed them."""

import contextlib
import datetime
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pydantic
from typing_extensions import TypedDict

from ae_jax import __version__
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_text
from ae_jax.options import explain

FORMAT = 2
"""Version of the run folder's layout; raised when an older reader would fail."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

EpochMetrics = dict[str, Any]
"""A line of metrics.jsonl. The first ``train/…`` in it is the objective's loss."""

WRITE_AGAIN = "delete it and summary.json, and give the run's command again"
"""What to do about a damaged file that a run writes when it is resumed."""


@contextlib.contextmanager
def lock(run_dir: Path, known_by: str = "config.json") -> Iterator[None]:
    """Hold a run folder, made if absent, for this process alone.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        run_dir: the folder.
        known_by: the file that makes it ours.

    Raises:
        UserError: another process holds it, or what is there is not a run folder.
    """
    foreign = f"{run_dir}: in the way, and not a run folder; choose another --run-dir"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(foreign)
    run_dir.mkdir(parents=True, exist_ok=True)
    ours = {".lock", f".{known_by}.partial"}
    if not (run_dir / known_by).exists() and set(os.listdir(run_dir)) - ours:
        raise UserError(foreign)
    try:
        with filelock.FileLock(run_dir / ".lock", blocking=False):
            yield
    except filelock.Timeout as error:
        raise UserError(
            f"{run_dir}: in use by another process; wait for it, or choose another "
            "--run-dir"
        ) from error


# --- What computed the numbers ------------------------------------------------------


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
    """What Linux knows of the first core; elsewhere the processor's bare name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
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
    """The commit of this code, ``-dirty`` if it differs; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            [*command, "--dirty", "--abbrev=40", "--match="],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return answer.stdout.strip()
    return None


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def environment(device: dict[str, Any]) -> dict[str, Any]:
    """Versions, device and commit, as config.json has them.

    Args:
        device: ``kind`` and ``count`` of the accelerators.
    """
    return {
        "versions": versions(),
        "device": {**device, "cpu_model": cpu_model(), "cpu_cores": usable_cores()},
        "git_commit": git_commit(),
    }


def record_environment_change(
    description: dict[str, Any], now: dict[str, Any]
) -> str | None:
    """Record in a run's config.json that it is resumed in another environment.

    Args:
        description: the run's, to which an entry of ``history`` is added.
        now: what :func:`environment` says today.

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
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    description["history"].append({"date": today, **now})
    return (
        f"environment changed since the last run ({', '.join(changes)}): results may "
        "no longer be bit-identical"
    )


# --- config.json, summary.json, metrics.jsonl ---------------------------------------


class Environment(TypedDict):
    """One entry of config.json's ``history``."""

    versions: dict[str, str]
    device: dict[str, Any]


class Data(TypedDict):
    """What config.json says of the data."""

    fingerprint: str
    num_train: int
    shape: tuple[int, int, int]


class Description(Environment):
    """What config.json must hold for its readers."""

    experiment: str
    config: dict[str, Any]
    data: Data
    code: dict[str, str]
    history: list[Environment]


class Summary(TypedDict):
    """What summary.json must hold for its readers."""

    epochs: int
    stopped: bool
    steps: int
    wall_s: float
    first_step_s: float


def _validate(cls: Any, plain: Any, place: str, remedy: str) -> None:
    try:
        pydantic.TypeAdapter(cls).validate_json(json.dumps(plain), strict=True)
    except pydantic.ValidationError as error:
        raise UserError(f"{place}: damaged: {explain(error)}; {remedy}") from None


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
    _validate(Description, description, str(path), "fix it")
    return description


def read_known(run_dir: Path, experiment: str) -> dict[str, Any] | None:
    """The config.json of a folder that an experiment may resume in; None: it is new.

    Raises:
        UserError: it holds another experiment's run; see also
            :func:`read_description`.
    """
    if not (run_dir / "config.json").exists():
        return None
    description = read_description(run_dir)
    if description["experiment"] != experiment:
        raise UserError(
            f"{run_dir} holds a run of {description['experiment']}, not of "
            f"{experiment}; choose another --run-dir"
        )
    return description


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """A finished run's summary.json; None if the run is not finished.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    remedy = "delete it, and give the run's command again"
    summary: dict[str, Any] = read_json(path, remedy)
    _validate(Summary, summary, str(path), remedy)
    return summary


def write_metrics(run_dir: Path, rows: list[EpochMetrics]) -> None:
    """Write metrics.jsonl, an epoch a line."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_text(run_dir / "metrics.jsonl", text)


def read_metrics(run_dir: Path) -> list[EpochMetrics]:
    """The lines of metrics.jsonl; none if there is none yet.

    Raises:
        UserError: the file is damaged; names the line.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not (
                isinstance(row, dict)
                and "epoch" in row
                and any(name.startswith("train/") for name in row)
                and all(isinstance(value, int | float) for value in row.values())
            ):
                raise ValueError("must hold numbers, an epoch and a train/… among them")
            rows.append(row)
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} is damaged ({error}); {WRITE_AGAIN}"
            ) from error
    return rows


def loss_name_of(row: EpochMetrics) -> str:
    """The name of the objective's loss: that of the first ``train/…`` of a row."""
    return next(name for name in row if name.startswith("train/"))[len("train/") :]


class TensorBoardWriter:
    """The run's TensorBoard log: written from the start, then added to."""

    def __init__(self, run_dir: Path, rows: list[EpochMetrics]) -> None:
        """Start the log over.

        Raises:
            OSError: the disk refuses it; so do the other methods.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run_dir / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        name = f"events.out.tfevents.{time.time():010.0f}.{platform.node()}"
        self._path = folder / name
        self._writer = RecordWriter(self._path.open("wb"))
        self._add(Event(file_version="brain.Event:2", wall_time=time.time()))
        for row in rows:
            self.add_row(row)

    def add_row(self, row: EpochMetrics) -> None:
        """Log an epoch's numbers against its step."""
        numbers = {k: v for k, v in row.items() if k not in ("epoch", "step")}
        self._add_scalars(numbers, row["step"])

    def add_scores(
        self, config: dict[str, Any], scores: dict[str, float], step: int
    ) -> None:
        """Log the final scores, and the flat config as hyperparameters."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        values = {
            key: value if isinstance(value, bool | int | float) else str(value)
            for key, value in config.items()
        }
        self._add(Event(summary=hparams_pb(values), wall_time=time.time()))
        self._add_scalars(scores, step)

    def _add_scalars(self, numbers: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        summary = Summary(value=values)
        self._add(Event(step=step, summary=summary, wall_time=time.time()))

    def _add(self, event: Any) -> None:
        try:
            self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:  # which knows no name
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Close the file, of which all is written."""
        with contextlib.suppress(OSError):  # a full disk's, reported before
            self._writer.close()
