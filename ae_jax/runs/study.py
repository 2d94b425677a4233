"""A study: a folder of ordinary runs, and a summary of them.

``RUN_DIR/study.json`` holds its options, ``RUN_DIR/CELL/SEED/`` its runs, and
``RUN_DIR/summary.json`` its result. An experiment says which cells there are, each the
config of a run, and summarises them; the rest is done here.
"""

import dataclasses
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import jax
import pydantic

from ae_jax import collapse, config, files
from ae_jax.config import CheckpointConfig, Config, FiguresConfig
from ae_jax.errors import UserError
from ae_jax.options import Count, options, validate
from ae_jax.runs import environment, folder, results
from ae_jax.runs.member import Shared
from ae_jax.runs.results import Table
from ae_jax.runs.trainer import train_in_folders

NumSeeds = Annotated[int, pydantic.Field(gt=0, le=2**16)]
"""Each is a run folder."""


@options
class Study(Config):
    """A run's options, and how many seeds of it; ``train.seed`` is the first.

    By default each run keeps its newest checkpoint only, and draws no figures.
    """

    num_seeds: NumSeeds = dataclasses.field(default=64, metadata={"resume": "raise"})
    """How many seeds; may be raised later."""
    together: Count = 8
    """Seeds that share a program; on an accelerator another number is other bits."""
    checkpoint: CheckpointConfig = config.section(
        lambda: CheckpointConfig(keep=1), resume="free"
    )
    figures: FiguresConfig = config.section(
        lambda: FiguresConfig(epochs=(), draw=False), resume="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.seed + self.num_seeds > 2**32:
            raise ValueError(
                f"num_seeds: {self.num_seeds} from {self.train.seed} on pass the last "
                f"seed, {2**32 - 1}"
            )


MAX_FILES = 10_000
"""Open files that a study may have."""


class StudyFile(pydantic.BaseModel):
    """study.json: which study it is."""

    format: Literal[2] = folder.FORMAT
    experiment: str
    study: dict[str, Any]


class Cell(NamedTuple):
    """A setting of a study.

    Attributes:
        config: of its runs, but for their folder and seed.
        num_seeds: how many of them.
        train: trains them: ``(configs, experiment, together, shared=…)``.
    """

    config: Config
    num_seeds: int
    train: Callable[..., None] = train_in_folders


Rows = list[dict[str, Any]]
"""The summary.json of each run of a cell, with its ``seed`` and its ``run_dir``."""
S = TypeVar("S", bound=Study)


def run_study(
    name: str,
    study: S,
    cells: Callable[[S, Mapping[str, Rows]], Mapping[str, Cell]],
    summarise: Callable[[S, Mapping[str, Rows]], dict[str, Any]],
) -> dict[str, Any]:
    """Train the runs of a study, resume them, or find them finished.

    Args:
        name: the experiment's.
        study: its options.
        cells: ``(study, rows so far)`` to its settings by name; asked again until none
            is new, so that later ones may depend on what the first came to.
        summarise: ``(study, rows by cell)`` to the content of summary.json.

    Returns:
        The summary.

    Raises:
        UserError: the folder is in use or holds another study; see also
            :func:`trainer.train_runs`.
    """
    with folder.lock(study.run_dir, "study.json"):
        saved = _check_known(name, study)
        found = folder.read_summary(study.run_dir, folder.Outcome)
        if found and saved == study:
            print(f"{study.run_dir} is finished: see summary.json there")
            return found
        (study.run_dir / "summary.json").unlink(missing_ok=True)
        about = StudyFile(experiment=name, study=config.to_json(study))
        files.write_json(study.run_dir / "study.json", about.model_dump())
        rows: dict[str, Rows] = {}
        shared = Shared()
        while new := {k: v for k, v in cells(study, rows).items() if k not in rows}:
            for cell_name, cell in new.items():
                configs = member_configs(study, cell_name, cell)
                cell.train(configs, name, study.together, shared=shared)
                rows[cell_name] = [_row_of(one) for one in configs]
        summary = summarise(study, rows)
        folder.write_summary(study.run_dir, summary)
    return folder.read_summary(study.run_dir, folder.Outcome) or summary


def _check_known(name: str, study: S) -> S | None:
    path = study.run_dir / "study.json"
    if not path.exists():
        return None
    plain = files.read_json(path)
    try:
        about: StudyFile = validate(StudyFile, plain)
    except ValueError as error:
        raise UserError(
            f"{path}: not a study of this version: {error}; choose another --run-dir"
        ) from None
    if about.experiment != name:
        raise UserError(
            f"{study.run_dir} holds a study of experiments.{about.experiment}; choose "
            "another --run-dir"
        )
    values = {**about.study, "run_dir": str(study.run_dir)}
    saved = config.from_json(type(study), values, str(path), unknown=True)
    config.check_same_run(saved, study)
    return saved


def member_configs(study: Study, cell_name: str, cell: Cell) -> list[Config]:
    """The configs of a cell's runs, each in a folder of its own."""
    fields = {field.name for field in dataclasses.fields(Config)}
    values = {name: getattr(cell.config, name) for name in fields}
    first = cell.config.train.seed
    return [
        Config(
            **{
                **values,
                "run_dir": study.run_dir / slug(cell_name) / str(seed),
                "train": dataclasses.replace(cell.config.train, seed=seed),
            }
        )
        for seed in range(first, first + cell.num_seeds)
    ]


def slug(name: str) -> Path:
    """A cell's name as that of its folder; a slash in it makes a folder above.

    Example:
        >>> str(slug("long/learning rate: 3e-4"))
        'long/learning-rate-3e-4'
    """
    words = "".join(c if c.isalnum() or c in "-./" else " " for c in name).split()
    return Path("-".join(words).lower())


def _row_of(settings: Config) -> dict[str, Any]:
    summary = folder.read_summary(settings.run_dir) or {}
    row = {"seed": settings.train.seed, "run_dir": str(settings.run_dir), **summary}
    dead = summary.get("latent/dead_units", 0)  # none where none can die
    latent_dim = getattr(settings.model, "latent_dim", 1)
    return {**row, "outcome": collapse.outcome(dead, latent_dim)}


def curves_by_outcome(rows: Rows) -> dict[str, list[tuple[list[int], list[float]]]]:
    """Epochs and training losses of runs, by outcome."""
    curves: dict[str, Any] = {name: [] for name in collapse.OUTCOMES}
    for row in rows:
        epochs = folder.read_metrics(Path(row["run_dir"]))
        loss = f"train/{folder.loss_name_of(epochs[0])}"
        curve = [e["epoch"] for e in epochs], [e[loss] for e in epochs]
        curves[row["outcome"]].append(curve)
    return curves


def outcome_table(title: str, summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """How the seeds of each setting ended, and what they scored.

    Args:
        title: of the table.
        summaries: by setting, of :func:`collapse.summarise_runs`.
    """

    def cells(summary: Mapping[str, Any]) -> Iterator[str]:
        yield str(summary["num_seeds"])
        for outcome in collapse.OUTCOMES:
            name = f"share_{outcome.replace('-', '_')}"
            share, low, high = (summary[f"{name}{e}"] for e in ("", "_low", "_high"))
            yield f"{share:.0%} ({low:.0%} to {high:.0%})"
        score, low, high = (
            summary[f"test/mse/median{e}"] for e in ("", "_low", "_high")
        )
        yield f"{score:.4f} ({low:.4f} to {high:.4f})"

    return {
        "title": title,
        "columns": ["setting", "seeds", *collapse.OUTCOMES, "median test MSE"],
        "rows": [[name, *cells(summary)] for name, summary in summaries.items()],
        "caption": "In brackets: 95 % intervals.",
    }


def is_reference(study: Study, presets: Mapping[str, Study]) -> bool:
    """Whether a study is the one whose result is kept in the repository."""
    return not config.differences_that_matter(presets["reference"], study)


def keep_result(
    name: str,
    study: Study,
    headline: Mapping[str, int | float],
    table: Table | Sequence[Table],
) -> None:
    """Keep an outcome as experiments/results/NAME.json; see :func:`write_result`."""
    first = study.train.seed
    results.write_result(
        Path("experiments") / "results" / f"{name}.json",
        experiment=name,
        seeds=list(range(first, first + study.num_seeds)),
        headline=headline,
        table=table,
    )


def use_all_cores() -> None:
    """Have JAX see each core as a device, so that seeds are split over them.

    One seed alone cannot keep two cores busy, two seeds on one core each do. For
    commands: it must come before anything asks for JAX's devices. Where there is an
    accelerator, it changes nothing. The lock of each run is an open file, of which a
    process has most often 1,024 unless it asks for more.
    """
    jax.config.update("jax_num_cpu_devices", environment.usable_cores())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MAX_FILES and (hard < 0 or hard >= MAX_FILES):  # -1: no limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, hard))
