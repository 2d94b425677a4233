"""The tutorial under many seeds: how often is a run healthy, and how good is it then?

A run's outcome depends on its seed alone: the ReLU on the latent may lose units, or all
of them. 64 seeds, trained as eight programs of eight, show how often. Expect 30 to 45 %
healthy, about as many collapsed; 11 minutes on two cores.
"""

from collections.abc import Mapping
from typing import Any

from ae_jax import cli, collapse
from ae_jax.config import TrainConfig
from ae_jax.data import Digits
from ae_jax.runs import results, study, timing
from ae_jax.runs.study import Cell, Rows, Study

PRESETS = {
    "reference": Study(),
    "quick": Study(data=Digits(), train=TrainConfig(num_epochs=3), num_seeds=16),
}


def cells(seeds: Study, done: Mapping[str, Rows]) -> dict[str, Cell]:
    """The one setting there is."""
    return {"tutorial": Cell(seeds, seeds.num_seeds)}


def summarise(seeds: Study, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Shares and scores of the outcomes; all curves in one figure."""
    from ae_jax import plots  # not before: matplotlib takes half a second

    curves = study.curves_by_outcome(rows["tutorial"])
    name = seeds.objective.loss_name.upper()
    plots.save(plots.seeds(curves, name), seeds.run_dir / "seeds.png")
    return collapse.summarise_runs(rows["tutorial"])


def main(seeds: Study) -> None:
    """Train the seeds in ``run_dir``, or resume them there."""
    study.use_all_cores()
    summary = study.run_study("seeds", seeds, cells, summarise)
    table = study.outcome_table("How the seeds end", {"tutorial": summary})
    print(results.to_markdown(table))
    if study.is_reference(seeds, PRESETS):
        ratio = timing.seed_time_ratio(seeds, seeds.together)
        names = ("num_seeds", "share_healthy", "share_collapsed", "test/mse/spread")
        headline = {name: summary[name] for name in names}
        headline["seed_epoch_s_ratio"] = ratio
        table["caption"] += f" A seed takes {ratio:.2f} of a single run's time."
        study.keep_result("seeds", seeds, headline, table)


if __name__ == "__main__":
    cli.run_experiment("seeds", PRESETS, __doc__, main)
