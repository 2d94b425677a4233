"""When does the code die? One factor at a time from the tutorial's setting.

The initialiser, the code's activation, its width and the learning rate: 64 seeds of
each for 3 epochs, for a unit that dies does so at the start; then the tutorial's
setting and the best of those with three code units for 10 epochs, to see what they
cost. It took 79 minutes of processor time.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ae_jax import cli, records
from ae_jax.config import (
    FREE,
    CheckpointConfig,
    DataConfig,
    EnsembleConfig,
    FiguresConfig,
    SeedsConfig,
    TrainConfig,
    clashes,
    refuse_clashes,
)

NAME = "dead_code"
ROOT = Path(__file__).resolve().parent.parent

CELLS: dict[str, tuple[str, str, Any]] = {
    "initialiser: Flax": ("model", "init", "flax"),
    "initialiser: He": ("model", "init", "he"),
    "activation: leaky ReLU": ("model", "code_activation", "leaky_relu"),
    "activation: none": ("model", "code_activation", "none"),
    "width: 2": ("model", "code_width", 2),
    "width: 4": ("model", "code_width", 4),
    "width: 8": ("model", "code_width", 8),
    "learning rate: 3e-4": ("train", "learning_rate", 3e-4),
    "learning rate: 3e-3": ("train", "learning_rate", 3e-3),
    "learning rate: 1e-2": ("train", "learning_rate", 1e-2),
}
"""What differs from the tutorial's setting, and how."""


@dataclass(frozen=True)
class DeadCode(EnsembleConfig):
    """The study; model and training are the setting that one factor is changed of."""

    num_best: int = 3
    """How many settings, beside the one started from, are trained for longer."""
    long_epochs: int = 10
    """Epochs of these."""
    long_seeds: int = 16
    """Seeds of these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_best", "long_epochs", "long_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be above 0, got {getattr(self, name)}")


PRESETS = {
    "reference": DeadCode(
        train=TrainConfig(num_epochs=3),
        checkpoint=CheckpointConfig(keep=1),
        figures=FiguresConfig(epochs=()),
    ),
    "quick": DeadCode(
        data=DataConfig(name="digits"),
        train=TrainConfig(num_epochs=2),
        checkpoint=CheckpointConfig(keep=1),
        figures=FiguresConfig(epochs=()),
        num_seeds=4,
        seeds=SeedsConfig(group_size=4),
        num_best=1,
        long_epochs=4,
        long_seeds=4,
    ),
}


def main(config: DeadCode) -> None:
    """Run the study in ``config.run_dir``, or go on with it there."""
    from ae_jax import data, ensemble, run

    ensemble.use_all_cores()
    with records.lock(config.run_dir):
        known = records.read_known(config.run_dir, NAME)
        if known:
            was = run.read_config(config.run_dir, known, DeadCode)
            refuse_clashes(was, config, FREE)
        if (config.run_dir / "summary.json").exists():
            print(f"{config.run_dir} is finished: see summary.json there")
            return
        run.write_description(NAME, config, data.load(config.data), known)
        short = {name: train(cell) for name, cell in cells(config).items()}
        long = {name: train(cell) for name, cell in longer(config, short).items()}
        draw(config, short)
        if not clashes(PRESETS["reference"], config):
            write_result(config, short, long)
        summary = {"short": short, "long": long}
        records.write_json(config.run_dir / "summary.json", summary)


def cells(config: DeadCode) -> dict[str, EnsembleConfig]:
    """The settings, each a run of many seeds in a folder of its own."""
    fields = {field.name for field in dataclasses.fields(EnsembleConfig)}
    plain = {name: getattr(config, name) for name in fields}
    base = EnsembleConfig(**plain)
    changed = {"tutorial": base}
    for name, (part, field, value) in CELLS.items():
        section = dataclasses.replace(getattr(base, part), **{field: value})
        changed[name] = dataclasses.replace(base, **{part: section})
    return {
        name: dataclasses.replace(cell, run_dir=folder_of(config, "short", name))
        for name, cell in changed.items()
    }


def folder_of(config: DeadCode, part: str, name: str) -> Path:
    """Where a setting is trained."""
    words = "".join(c if c.isalnum() or c in "-." else " " for c in name).split()
    return config.run_dir / part / "-".join(words).lower()


def longer(config: DeadCode, short: dict[str, Any]) -> dict[str, EnsembleConfig]:
    """The settings to train for longer: the first, and the best with its code width.

    The best have the most healthy runs; of two alike, the one of lower median test MSE.
    """
    all_cells = cells(config)
    first, *others = all_cells
    width = all_cells[first].model.code_width
    others = [name for name in others if all_cells[name].model.code_width == width]
    others.sort(
        key=lambda name: (-short[name]["share_healthy"], short[name]["test/mse/median"])
    )
    return {
        name: dataclasses.replace(
            all_cells[name],
            run_dir=folder_of(config, "long", name),
            num_seeds=config.long_seeds,
            train=dataclasses.replace(
                all_cells[name].train, num_epochs=config.long_epochs
            ),
        )
        for name in [first, *others[: config.num_best]]
    }


def train(cell: EnsembleConfig) -> dict[str, Any]:
    """Train a setting under all its seeds, or go on with it; its summary."""
    from ae_jax import ensemble

    with ensemble.start("seeds", cell) as seeds:
        if not seeds.finished:
            print(cell.run_dir)
            seeds.fit()
            print(ensemble.summary_table(seeds.summarise()))
    summary: dict[str, Any] = records.read_json(cell.run_dir / "summary.json")
    return summary


def draw(config: DeadCode, short: dict[str, Any]) -> None:
    """The shares of the outcomes, and the scores of the longer runs."""
    from ae_jax import ensemble, evaluate, figures

    folder = config.run_dir / "figures"
    folder.mkdir(exist_ok=True)
    counts = {
        name: {key: summary[key.replace("-", "_")] for key in evaluate.OUTCOMES}
        for name, summary in short.items()
    }
    figures.save(figures.shares(counts), folder / "dead_code.png")
    scores: dict[str, dict[str, list[float]]] = {}
    for name, cell in longer(config, short).items():
        scores[name] = {outcome: [] for outcome in evaluate.OUTCOMES}
        for row in records.read_rows(cell.run_dir, ensemble.RESULTS):
            scores[name][row["outcome"]].append(row["test/mse"])
    xlabel = f"test MSE after {config.long_epochs} epochs"
    figures.save(figures.outcomes(scores, xlabel), folder / "dead_code_cost.png")


def write_result(config: DeadCode, short: dict[str, Any], long: dict[str, Any]) -> None:
    """Keep the outcome as experiments/results/dead_code.json."""
    import jax

    first, *others = short
    rows = [
        {"part": part, "setting": name, **summary}
        for part, summaries in (("short", short), ("long", long))
        for name, summary in summaries.items()
    ]
    records.write_result(
        ROOT / "experiments" / "results" / f"{NAME}.json",
        experiment=NAME,
        accelerator=jax.devices()[0].device_kind,
        seeds=list(range(config.train.seed, config.train.seed + config.num_seeds)),
        headline={
            "settings": len(short),
            "num_seeds": config.num_seeds,
            "share_collapsed_tutorial": short[first]["share_collapsed"],
            "share_part_dead_tutorial": short[first]["share_part_dead"],
            "share_healthy_best": max(short[name]["share_healthy"] for name in others),
            "wall_s": sum(row["wall_s"] for row in rows),
        },
        table=rows,
    )


if __name__ == "__main__":
    cli.run_experiment(NAME, PRESETS, __doc__, main)
