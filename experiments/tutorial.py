"""The tutorial: a deep autoencoder that puts MNIST's digits into three numbers.

Its steps, in its order: look at the images, train, plot the loss, compare the
reconstructions of some epochs, score the test split and look at its reconstructions.
"""

from ae_jax import cli
from ae_jax.config import Config, DataConfig, FiguresConfig, TrainConfig

PRESETS = {
    "reference": Config(),
    "quick": Config(
        data=DataConfig(name="digits"),
        train=TrainConfig(num_epochs=3),
        figures=FiguresConfig(epochs=(1, 2, 3)),
    ),
}


def main(config: Config) -> None:
    """Run the tutorial in ``config.run_dir``, or go on with it there."""
    from ae_jax import trainer

    with trainer.start("tutorial", config, cli.STARTED) as tutorial:
        if tutorial.finished:
            return
        tutorial.draw("samples")
        tutorial.fit()
        tutorial.draw("training_loss")
        tutorial.draw("reconstructions_by_epoch")
        tutorial.draw("test_reconstructions")
        tutorial.summarise()  # at the very end: it is what makes the run finished


if __name__ == "__main__":
    cli.run_experiment("tutorial", PRESETS, __doc__, main)
