"""The figures of a run, from its folder alone.

``figures/images.npz``, which the trainer writes at the start, holds the images that
they show. To add one: write a function of an open run, and a line in :data:`FIGURES`.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from ae_jax import plots
from ae_jax.errors import UserError, suggest
from ae_jax.runs.folder import WRITE_AGAIN, loss_name_of
from ae_jax.runs.run import Run


def read_images(folder: Path) -> dict[str, UInt8[np.ndarray, "n H W C"]]:
    """The images that the figures show: ``samples``, ``train`` and ``test``.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / "figures" / "images.npz"
    try:
        # From memory: NumPy does not close a file that it cannot read.
        with np.load(io.BytesIO(path.read_bytes())) as archive:
            images = {name: archive[name] for name in ("samples", "train", "test")}
        if any(a.dtype != np.uint8 or a.ndim != 4 for a in images.values()):
            raise ValueError("it holds no images")
    except Exception as error:  # NumPy, zipfile and zlib each raise their own
        raise UserError(f"{path}: cannot be read ({error}); {WRITE_AGAIN}") from error
    return images


def samples(run: Run) -> Figure:
    """A 5×5 grid of random training images."""
    return plots.samples(read_images(run.folder)["samples"])


def training_loss(run: Run) -> Figure:
    """The objective's loss against epochs."""
    if not run.metrics:
        raise UserError(f"{run.folder}: no finished epoch to draw yet")
    name = loss_name_of(run.metrics[0])
    epochs = [row["epoch"] for row in run.metrics]
    held_out = [row[f"val/{name}"] for row in run.metrics if f"val/{name}" in row]
    losses = [row[f"train/{name}"] for row in run.metrics]
    return plots.training_loss(epochs, losses, name.upper(), held_out or None)


def reconstructions_by_epoch(run: Run) -> Figure:
    """The same images as they were reconstructed after some epochs."""
    originals = read_images(run.folder)["train"]
    epochs = {row["step"]: row["epoch"] for row in run.metrics}
    finished = {epochs[step]: step for step in run.steps if step in epochs}
    if not finished:
        raise UserError(f"{run.folder}: no finished epoch to draw yet")
    shown = [e for e in finished if e in run.config.figures.epochs]
    recons = {
        epoch: run.at(finished[epoch]).reconstruct(originals)
        for epoch in sorted({*shown, max(finished)})
    }
    return plots.reconstructions_by_epoch(recons, originals)


def test_reconstructions(run: Run) -> Figure:
    """Ten test images under their reconstructions."""
    originals = read_images(run.folder)["test"]
    return plots.test_reconstructions(run.reconstruct(originals), originals)


class RunFigure(NamedTuple):
    """A figure of a run.

    Attributes:
        make: draws it.
        needs: methods that the run's model must have.
    """

    make: Callable[[Run], Figure]
    needs: tuple[str, ...] = ()


FIGURES: dict[str, RunFigure] = {
    "samples": RunFigure(samples),
    "training_loss": RunFigure(training_loss),
    "reconstructions_by_epoch": RunFigure(reconstructions_by_epoch, ("__call__",)),
    "test_reconstructions": RunFigure(test_reconstructions, ("__call__",)),
}
"""The figures, in the tutorial's order."""


def applicable(run: Run) -> list[str]:
    """The names of the figures that a run's model can have."""
    return [name for name, figure in FIGURES.items() if run.has(*figure.needs)]


def check(run: Run, name: str) -> None:
    """Refuse a figure that a run cannot have.

    Raises:
        UserError: there is none of this name, or not for this run.
    """
    if name not in FIGURES:
        raise UserError(f"no figure {name!r}{suggest(name, FIGURES)}")
    if not run.has(*FIGURES[name].needs):
        needs = ", ".join(FIGURES[name].needs)
        raise UserError(f"{run.folder}: its model has no {needs}, which {name} needs")


def make(run: Run, name: str) -> Figure:
    """A figure of a run; errors as of :func:`check`."""
    check(run, name)
    return FIGURES[name].make(run)


def draw(run: Run, name: str, ending: str = "png") -> Path:
    """Draw a figure into the run folder; its path."""
    path = run.folder / "figures" / f"{name}.{ending}"
    path.parent.mkdir(exist_ok=True)
    plots.save(make(run, name), path)
    return path
