"""The tutorial under many seeds: how often is a run healthy, and how good is it then?

A run's outcome depends on its seed alone: the ReLU on the code may lose units, or all
of them. 64 seeds, trained as eight programs of eight, tell how often.
"""

import statistics
from pathlib import Path
from typing import Any

from ae_jax import cli, records
from ae_jax.config import (
    CheckpointConfig,
    DataConfig,
    EnsembleConfig,
    FiguresConfig,
    TrainConfig,
    clashes,
)

PRESETS = {
    # A checkpoint of eight seeds takes 21 MB: of each group the newest is enough.
    "reference": EnsembleConfig(
        checkpoint=CheckpointConfig(keep=1), figures=FiguresConfig(epochs=())
    ),
    "quick": EnsembleConfig(
        data=DataConfig(name="digits"),
        train=TrainConfig(num_epochs=3),
        checkpoint=CheckpointConfig(keep=1),
        figures=FiguresConfig(epochs=()),
        num_seeds=16,
    ),
}


def main(config: EnsembleConfig) -> None:
    """Train the seeds in ``config.run_dir``, or go on with them there."""
    from ae_jax import ensemble

    ensemble.use_all_cores()
    with ensemble.start("seeds", config, cli.STARTED) as seeds:
        if seeds.finished:
            return
        seeds.fit()
        ensemble.draw(config.run_dir)
        summary = seeds.summarise()
        print(ensemble.summary_table(summary))
        if not clashes(PRESETS["reference"], config):
            write_result(config, summary, statistics.median(seeds.time_ratios()))


def write_result(config: EnsembleConfig, summary: dict[str, Any], ratio: float) -> None:
    """Keep the outcome as experiments/results/seeds.json."""
    import jax

    first = config.train.seed
    records.write_result(
        Path(__file__).parent / "results" / "seeds.json",
        experiment="seeds",
        accelerator=jax.devices()[0].device_kind,
        seeds=list(range(first, first + config.num_seeds)),
        headline={
            "num_seeds": config.num_seeds,
            "share_collapsed": summary["share_collapsed"],
            "seed_epoch_s_ratio": ratio,
        },
        table=[summary],
    )


if __name__ == "__main__":
    cli.run_experiment("seeds", PRESETS, __doc__, main)
