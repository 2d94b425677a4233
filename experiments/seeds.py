"""The tutorial under many seeds: how often is a run healthy, and how good is it then?

A run's outcome depends on its seed alone: the ReLU on the code may lose units, or all
of them. 64 seeds, trained as eight programs of eight, tell how often.
"""

from ae_jax import cli
from ae_jax.config import (
    CheckpointConfig,
    DataConfig,
    EnsembleConfig,
    FiguresConfig,
    TrainConfig,
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
        print(ensemble.summary_table(seeds.summarise()))
        ensemble.draw(config.run_dir)


if __name__ == "__main__":
    cli.run_experiment("seeds", PRESETS, __doc__, main)
