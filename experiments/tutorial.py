"""The tutorial: a deep autoencoder that puts MNIST's digits into three numbers.

Its steps, in its order: look at the images, train, plot the loss, compare the
reconstructions of some epochs, score the test split and look at its reconstructions.
"""

from ae_jax import STARTED, cli
from ae_jax.config import Config, FiguresConfig, TrainConfig
from ae_jax.data import Digits

PRESETS = {
    # The lowest seed whose run ends healthy, on the machine of the README's table.
    "reference": Config(train=TrainConfig(seed=3)),
    "quick": Config(
        data=Digits(),
        train=TrainConfig(num_epochs=3),
        figures=FiguresConfig(epochs=(1, 2, 3)),
    ),
}


def main(config: Config) -> None:
    """Run the tutorial in ``config.run_dir``, or resume it there."""
    from ae_jax.runs.trainer import train_run

    train_run(config, "tutorial", STARTED)


if __name__ == "__main__":
    cli.run_experiment("tutorial", PRESETS, __doc__, main)
