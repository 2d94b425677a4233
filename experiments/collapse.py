"""What makes latent units die, and what helps? One factor at a time from the tutorial.

The initialiser, the latent's activation, its size and the learning rate: 64 seeds of
each for 3 epochs, for a unit that dies does so at the start; then the tutorial's
setting and the best of those with three latent units for 10 epochs, to see what they
cost. Expect no dead unit without a ReLU on the latent, and a lower error; it took 79
minutes of processor time.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from ae_jax import cli, config
from ae_jax import collapse as outcomes
from ae_jax.config import TrainConfig
from ae_jax.data import Digits
from ae_jax.options import options
from ae_jax.runs import results, study
from ae_jax.runs.study import Cell, Rows, Study

FACTORS: dict[str, tuple[str, str, Any]] = {
    "initialiser: Flax": ("model", "init", "flax"),
    "initialiser: He": ("model", "init", "he"),
    "activation: leaky ReLU": ("model", "latent_activation", "leaky_relu"),
    "activation: none": ("model", "latent_activation", "none"),
    "latent units: 2": ("model", "latent_dim", 2),
    "latent units: 4": ("model", "latent_dim", 4),
    "latent units: 8": ("model", "latent_dim", 8),
    "learning rate: 3e-4": ("train", "learning_rate", 3e-4),
    "learning rate: 3e-3": ("train", "learning_rate", 3e-3),
    "learning rate: 1e-2": ("train", "learning_rate", 1e-2),
}
"""What differs from the tutorial's setting, and how."""


@options
class Collapse(Study):
    """The study; model and training are the setting that one factor is changed of."""

    num_best: PositiveInt = 3
    """How many settings, beside the one started from, are trained for longer."""
    long_epochs: PositiveInt = 10
    """Epochs of these."""
    long_seeds: PositiveInt = 16
    """Seeds of these."""


PRESETS = {
    "reference": Collapse(train=TrainConfig(num_epochs=3)),
    "quick": Collapse(
        data=Digits(),
        train=TrainConfig(num_epochs=2),
        num_seeds=4,
        together=4,
        num_best=1,
        long_epochs=4,
        long_seeds=4,
    ),
}


def cells(collapse: Collapse, done: Mapping[str, Rows]) -> dict[str, Cell]:
    """A setting for each factor; once they are trained, the best for longer.

    The best, among those with as many latent units, have the most healthy runs; of two
    alike, the one of lower median test MSE.
    """
    settings = {"tutorial": collapse}
    for name, (part, field, value) in FACTORS.items():
        section = dataclasses.replace(getattr(collapse, part), **{field: value})
        settings[name] = dataclasses.replace(collapse, **{part: section})
    short = {
        f"short/{name}": Cell(setting, collapse.num_seeds)
        for name, setting in settings.items()
    }
    if not set(short) <= set(done):
        return short
    latent_dim = collapse.model.latent_dim
    rivals = {
        name: outcomes.summarise_runs(done[f"short/{name}"])
        for name, setting in settings.items()
        if name != "tutorial" and setting.model.latent_dim == latent_dim
    }

    def rank(name: str) -> tuple[float, float]:
        return -rivals[name]["share_healthy"], rivals[name]["test/mse/median"]

    chosen = ["tutorial", *sorted(rivals, key=rank)[: collapse.num_best]]
    return short | {
        f"long/{name}": Cell(
            _for_epochs(settings[name], collapse.long_epochs), collapse.long_seeds
        )
        for name in chosen
    }


def _for_epochs(setting: Collapse, num_epochs: int) -> Collapse:
    train = dataclasses.replace(setting.train, num_epochs=num_epochs)
    return dataclasses.replace(setting, train=train)


def summarise(collapse: Collapse, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """The outcomes of each setting; a figure of the shares, and one of the scores."""
    from ae_jax import plots  # not before: matplotlib takes half a second

    summary = {name: outcomes.summarise_runs(of_it) for name, of_it in rows.items()}
    counts = {
        name.removeprefix("short/"): {
            outcome: of_it[outcome.replace("-", "_")] for outcome in outcomes.OUTCOMES
        }
        for name, of_it in summary.items()
        if name.startswith("short/")
    }
    plots.save(plots.shares(counts), collapse.run_dir / "collapse.png")
    scores: dict[str, dict[str, list[float]]] = {
        name.removeprefix("long/"): {
            outcome: [row["test/mse"] for row in of_it if row["outcome"] == outcome]
            for outcome in outcomes.OUTCOMES
        }
        for name, of_it in rows.items()
        if name.startswith("long/")
    }
    label = f"test MSE after {collapse.long_epochs} epochs"
    figure = plots.outcomes(scores, label)
    plots.save(figure, collapse.run_dir / "collapse_cost.png")
    return summary


def main(collapse: Collapse) -> None:
    """Run the study in ``run_dir``, or resume it there."""
    study.use_all_cores()
    summary = study.run_study("collapse", collapse, cells, summarise)
    for name, of_it in summary.items():
        shares = ", ".join(f"{row[0]} {row[2]}" for row in study.outcome_rows(of_it))
        print(f"{name}: {shares}")
    if not config.differences_that_matter(PRESETS["reference"], collapse):
        write_result(collapse, summary)


def write_result(collapse: Collapse, summary: dict[str, Any]) -> None:
    """Keep the outcome as experiments/results/collapse.json."""
    first, tutorial = collapse.train.seed, summary["short/tutorial"]
    shares = [of_it["share_healthy"] for of_it in summary.values()]
    rows = []
    for name, of_it in summary.items():
        part, _, setting = name.partition("/")
        shown = [row[2] for row in study.outcome_rows(of_it)]
        rows.append([part, setting, *shown, f"{of_it['test/mse/median']:.4f}"])
    results.write_result(
        Path(__file__).parent / "results" / "collapse.json",
        experiment="collapse",
        seeds=list(range(first, first + collapse.num_seeds)),
        headline={
            "num_seeds": collapse.num_seeds,
            "share_collapsed_tutorial": tutorial["share_collapsed"],
            "share_part_dead_tutorial": tutorial["share_part_dead"],
            "share_healthy_best": max(shares),
        },
        table={
            "title": "What makes latent units die",
            "columns": ["part", "setting", *outcomes.OUTCOMES, "median test MSE"],
            "rows": rows,
            "caption": f"{collapse.num_seeds} seeds for {collapse.train.num_epochs} "
            f"epochs, then {collapse.long_seeds} for {collapse.long_epochs}",
        },
    )


if __name__ == "__main__":
    cli.run_experiment("collapse", PRESETS, __doc__, main)
