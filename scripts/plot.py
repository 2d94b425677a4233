"""Draw a run's figures again, from its folder alone: ``plot.py RUN [FIGURE …]``."""

from pathlib import Path

from tyro.conf import Positional

from ae_jax import cli, config


def main(run_dir: Positional[Path], figures: Positional[tuple[str, ...]] = ()) -> None:
    """Draw a run's figures again, from its folder alone.

    Args:
        run_dir: Run folder, finished or not.
        figures: Which: samples, training_loss, reconstructions_by_epoch,
            test_reconstructions. Default: all.
    """
    from ae_jax import run

    for name in figures:
        if name not in run.FIGURES:
            hint = config.suggest(name, run.FIGURES)
            raise config.UserError(f"no figure {name!r}{hint}")
    run.open_run(run_dir)  # says what is wrong with the folder before anything is drawn
    for name in figures or run.FIGURES:
        print(run.draw(run_dir, name))


if __name__ == "__main__":
    cli.run_script(main)
