"""Draw a run's figures again, from its folder alone: ``plot.py RUN [FIGURE …]``."""

import functools
from collections.abc import Callable
from pathlib import Path

from tyro.conf import Positional

from ae_jax import cli, config, records


def main(run_dir: Positional[Path], figures: Positional[tuple[str, ...]] = ()) -> None:
    """Draw a run's figures again, from its folder alone.

    Args:
        run_dir: Run folder, finished or not.
        figures: Which: samples, training_loss, reconstructions_by_epoch,
            test_reconstructions; of a run of many seeds: seeds. Default: all.
    """
    from ae_jax import ensemble, run

    known: dict[str, Callable[[Path], Path]] = {"seeds": ensemble.draw}
    if records.read_description(run_dir)["experiment"] != "seeds":
        known = {name: functools.partial(run.draw, name=name) for name in run.FIGURES}
        run.open_run(run_dir)  # says what is wrong before anything is drawn
    for name in figures:
        if name not in known:
            raise config.UserError(f"no figure {name!r}{config.suggest(name, known)}")
    for name in figures or known:
        print(known[name](run_dir))


if __name__ == "__main__":
    cli.run_script(main)
