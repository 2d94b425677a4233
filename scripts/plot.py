"""Draw a run's figures again, from its folder alone: ``plot.py RUN [FIGURE …]``."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ae_jax import cli


def main(
    run_dir: Positional[Path],
    figures: Positional[tuple[str, ...]] = (),
    ending: Annotated[Literal["png", "pdf", "svg"], arg(name="format")] = "png",
    show_names: Annotated[bool, arg(name="list")] = False,
) -> None:
    """Draw a run's figures again, from its folder alone.

    Args:
        run_dir: Run folder, finished or not.
        figures: Which; by default all that the run can have, see --list.
        ending: Format of the files.
        show_names: Only list the figures that the run can have.
    """
    from ae_jax.runs import figures as known
    from ae_jax.runs.run import open_run

    run = open_run(run_dir)
    if show_names:
        for name in known.applicable(run):
            doc = known.FIGURES[name].make.__doc__ or ""
            print(f"{name:26}{doc.partition(chr(10))[0]}")
        return
    for name in figures:
        known.check(run, name)  # before any is drawn
    for name in figures or known.applicable(run):
        print(known.draw(run, name, ending))


if __name__ == "__main__":
    cli.run_script(main)
