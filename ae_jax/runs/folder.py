"""The files of a run folder beside its checkpoints: written here, read here.

config.json says what the run is, metrics.jsonl holds the numbers of each epoch,
summary.json the scores of a finished run; tensorboard/ holds the same numbers.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

from ae_jax.errors import UserError
from ae_jax.files import read_bytes, read_json, take_lock, write_json, write_text
from ae_jax.options import validate
from ae_jax.runs.environment import Environment

FORMAT: Literal[2] = 2
"""Version of the run folder's layout; raised when an older reader would fail."""

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
    foreign = f"{run_dir}: exists and is not a run folder; choose another --run-dir"
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(foreign)
    run_dir.mkdir(parents=True, exist_ok=True)
    # Hidden names count for nothing: our lock, and what file managers leave.
    content = [name for name in os.listdir(run_dir) if not name.startswith(".")]
    if content and known_by not in content:
        raise UserError(foreign)
    held = take_lock(run_dir / ".lock", wait=False)
    if held is None:
        raise UserError(
            f"{run_dir}: in use by another process; wait for it, or choose another "
            "--run-dir"
        )
    try:
        yield
    finally:
        held.release()


# --- config.json --------------------------------------------------------------------


class Data(pydantic.BaseModel):
    """The data of a run."""

    fingerprint: str
    source: str
    num_train: int
    shape: tuple[int, int, int]
    dir: str | None = None
    """Where it lay, as seen from anywhere; None: the data set lies in no folder."""


class Description(pydantic.BaseModel):
    """config.json: what a run is, and what computed it."""

    model_config = pydantic.ConfigDict(extra="allow")

    format: Literal[2] = FORMAT
    experiment: str
    config: dict[str, Any]
    framework: Literal["jax", "pytorch"] = "jax"
    """What trains it."""
    versions: dict[str, str]
    device: dict[str, Any]
    git_commit: str | None
    data: Data
    code: dict[str, str] = {}
    """By section, a digest of the code of a class that is not ours."""
    init_from_digest: str | None = None
    history: list[Environment] = []
    """The environments of later sessions, where they differed from the one before."""

    @property
    def environment(self) -> Environment:
        """Of the last session."""
        if self.history:
            return self.history[-1]
        return Environment(**self.model_dump(include={"versions", "device"}))


def write_description(run_dir: Path, description: Description) -> None:
    """Write config.json."""
    write_json(run_dir / "config.json", description.model_dump())


def _runs_near(path: Path) -> str:
    """Which run folders there are in, or else beside, a path that is none."""
    for place in (path, path.parent):
        found = sorted(place.glob("*/config.json")) or sorted(
            place.glob("*/*/config.json")
        )
        if found:
            names = [str(config.parent) for config in found[:5]]
            more = f", and {len(found) - 5} more" if len(found) > 5 else ""
            return f"there are {', '.join(names)}{more}"
    return "check the path"


def read_description(run_dir: Path) -> Description:
    """A run folder's config.json.

    Raises:
        UserError: there is no run, one of a format that this version cannot read, or
            the file is damaged.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(
            f"{run_dir}: not a run folder (no config.json); {_runs_near(run_dir)}"
        )
    plain = read_json(path)
    if not isinstance(plain, dict) or "config" not in plain:
        raise UserError(f"{path}: not a run's config.json; choose another folder")
    if plain.get("format") != FORMAT:
        raise UserError(
            f"{path}: run folder of format {plain.get('format')!r}, this version reads "
            f"format {FORMAT}; use the ae_jax that wrote it"
        )
    try:
        description: Description = validate(Description, plain)
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; fix it") from None
    return description


# --- summary.json, metrics.jsonl ----------------------------------------------------


class Outcome(pydantic.BaseModel):
    """summary.json, of a run or a study; its numbers are extra fields."""

    model_config = pydantic.ConfigDict(extra="allow")

    digest: str
    """Of all else in it, and of metrics.jsonl if there is one."""


class Summary(Outcome):
    """A finished run's: its scores, which are extra fields, and these."""

    epochs: int
    stopped: bool
    steps: int
    wall_s: float
    first_step_s: float


def _digest(run_dir: Path, summary: dict[str, Any]) -> str:
    scores = {name: value for name, value in summary.items() if name != "digest"}
    path = run_dir / "metrics.jsonl"
    rows = read_bytes(path) if path.exists() else b""
    return hashlib.sha256(json.dumps(scores).encode() + rows).hexdigest()


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, with which a run or study is finished."""
    digest = _digest(run_dir, summary)
    write_json(run_dir / "summary.json", {**summary, "digest": digest})


def read_summary(
    run_dir: Path, model: type[Outcome] = Summary
) -> dict[str, Any] | None:
    """What :func:`write_summary` wrote; None if the run or study is not finished.

    Args:
        run_dir: its folder.
        model: what it must hold.

    Raises:
        UserError: it, or metrics.jsonl, is not what was written.
    """
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    remedy = "delete summary.json, and give the same command again"
    summary: dict[str, Any] = read_json(path, remedy)
    try:
        validate(model, summary)
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}; {remedy}") from None
    if summary.pop("digest") != _digest(run_dir, summary):
        raise UserError(
            f"{path}: damaged: it or metrics.jsonl is not what was written; {remedy}"
        )
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
    lines = read_bytes(path).splitlines() if path.exists() else []
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
            if loss_name_of(row) != loss_name_of(rows[0]):
                raise ValueError("another loss than in line 1")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: line {number} is damaged ({error}); {WRITE_AGAIN}"
            ) from error
    return rows


def loss_name_of(row: EpochMetrics) -> str:
    """The name of the objective's loss: that of the first ``train/…`` of a row."""
    return next(name for name in row if name.startswith("train/"))[len("train/") :]


# --- tensorboard/ -------------------------------------------------------------------


class TensorBoardWriter:
    """The run's TensorBoard log: each session adds a file of its own.

    No file stays open: many runs may train together.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        """Begin a session at a step; what was logged of later ones no longer counts.

        Raises:
            OSError: the disk refuses it; so do the other methods.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder = run_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a run in the order of their names.
        name = f"events.out.tfevents.{time.time_ns():020}.{platform.node()}"
        self._path = folder / name
        start = SessionLog(status=SessionLog.START)
        self._add(
            Event(file_version="brain.Event:2", wall_time=time.time()),
            Event(step=step + 1, session_log=start, wall_time=time.time()),
        )

    def add_row(self, row: EpochMetrics) -> None:
        """Log an epoch's numbers against its step."""
        numbers = {k: v for k, v in row.items() if k not in ("epoch", "step")}
        self._add(self._scalars(numbers, row["step"]))

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
        params = Event(summary=hparams_pb(values), wall_time=time.time())
        self._add(params, self._scalars(scores, step))

    @staticmethod
    def _scalars(numbers: dict[str, float], step: int) -> Any:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()]
        summary = Summary(value=values)
        return Event(step=step, summary=summary, wall_time=time.time())

    def _add(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            with self._path.open("ab") as file:
                writer = RecordWriter(file)
                for event in events:
                    writer.write(event.SerializeToString())
        except OSError as error:  # which knows no name
            raise OSError(error.errno, error.strerror, str(self._path)) from error
