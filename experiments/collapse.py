"""What makes latent units die, and what helps? One factor at a time from the tutorial.

The initialiser, the latent's activation, its size and the learning rate: 64 seeds of
each for 3 epochs, for a unit that dies does so at the start; then the tutorial's
setting and the best of those with three latent units for 10 epochs, to see what they
cost. Expect no dead unit without a ReLU on the latent, and a lower error; it took 73
minutes of processor time.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ae_jax import cli, collapse
from ae_jax.config import TrainConfig
from ae_jax.data import Digits
from ae_jax.options import Count, options
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

    num_best: Count = 3
    """How many settings, beside the one started from, are trained for longer."""
    long_epochs: Count = 10
    """Epochs of these."""
    long_seeds: Count = 16
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


def cells(base: Collapse, done: Mapping[str, Rows]) -> dict[str, Cell]:
    """A setting for each factor; once they are trained, the best for longer.

    The best, among those with as many latent units, have the most healthy runs; of two
    alike, the one of lower median test MSE.
    """
    settings = {"tutorial": base}
    for name, (part, field, value) in FACTORS.items():
        section = replace(getattr(base, part), **{field: value})
        settings[name] = replace(base, **{part: section})
    cells = {f"short/{k}": Cell(of, base.num_seeds) for k, of in settings.items()}
    if not set(cells) <= set(done):
        return cells

    def rank(name: str) -> tuple[float, float]:
        summary = collapse.summarise_runs(done[f"short/{name}"])
        return -summary["share_healthy"], summary["test/mse/median"]

    latent_dim = base.model.latent_dim
    rivals = [k for k, of in settings.items() if of.model.latent_dim == latent_dim]
    chosen = ["tutorial", *sorted(set(rivals) - {"tutorial"}, key=rank)]
    for name in chosen[: base.num_best + 1]:
        train = replace(settings[name].train, num_epochs=base.long_epochs)
        longer = replace(settings[name], train=train)
        cells[f"long/{name}"] = Cell(longer, base.long_seeds)
    return cells


def summarise(base: Collapse, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """The outcomes of each setting; a figure of the shares, and one of the scores."""
    from ae_jax import plots  # not before: matplotlib takes half a second

    def part(prefix: str) -> dict[str, dict[str, list[float]]]:
        of_part = {k: v for k, v in rows.items() if k.startswith(prefix)}
        scores = collapse.scores_by_outcome
        return {k.removeprefix(prefix): scores(v) for k, v in of_part.items()}

    counts = {
        name: {outcome: len(scores) for outcome, scores in of_it.items()}
        for name, of_it in part("short/").items()
    }
    label = f"test MSE after {base.long_epochs} epochs"
    cost = plots.outcomes(part("long/"), label)
    plots.save(plots.shares(counts), base.run_dir / "collapse.png")
    plots.save(cost, base.run_dir / "collapse_cost.png")
    return {cell: collapse.summarise_runs(of_it) for cell, of_it in rows.items()}


def main(base: Collapse) -> None:
    """Run the study in ``run_dir``, or resume it there."""
    study.use_all_cores()
    summary = study.run_study("collapse", base, cells, summarise)
    epochs = {"short": base.train.num_epochs, "long": base.long_epochs}
    shown = {
        f"{setting}, {epochs[part]} epochs": found
        for cell, found in summary.items()
        for part, _, setting in [cell.partition("/")]
    }
    table = study.outcome_table("What makes latent units die", shown)
    print(results.to_markdown(table))
    if study.is_reference(base, PRESETS):
        tutorial = summary["short/tutorial"]
        headline = {
            "num_seeds": base.num_seeds,
            "share_collapsed_tutorial": tutorial["share_collapsed"],
            "share_part_dead_tutorial": tutorial["share_part_dead"],
            "share_healthy_best": max(of["share_healthy"] for of in summary.values()),
        }
        study.keep_result("collapse", base, headline, table)


if __name__ == "__main__":
    cli.run_experiment("collapse", PRESETS, __doc__, main)
