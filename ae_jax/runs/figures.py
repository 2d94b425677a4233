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
from ae_jax.files import read_bytes
from ae_jax.runs.folder import WRITE_AGAIN, loss_name_of
from ae_jax.runs.run import Run
from ae_jax.train import scale

IMAGES = ("samples", "train", "test", "encoded")


def read_images(folder: Path) -> dict[str, UInt8[np.ndarray, "n H W C"]]:
    """What the figures show: ``IMAGES``, and the ``labels`` of those encoded.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / "figures" / "images.npz"
    try:
        # From memory: NumPy does not close a file that it cannot read.
        with np.load(io.BytesIO(read_bytes(path))) as archive:
            images = {name: archive[name] for name in (*IMAGES, "labels")}
        if any(images[n].dtype != np.uint8 or images[n].ndim != 4 for n in IMAGES):
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


def latents(run: Run) -> Figure:
    """The latents of test images, a colour for each class."""
    shown = read_images(run.folder)
    return plots.latents(run.encode(shown["encoded"]), shown["labels"])


def traversal(run: Run) -> Figure:
    """Each latent unit from its 5th to its 95th percentile, the others at their median.

    Of many units the ten of the largest variance.
    """
    latents = run.encode(read_images(run.folder)["encoded"])
    units = np.sort(np.argsort(-latents.var(axis=0))[:10])
    ways = np.tile(np.median(latents, axis=0), (len(units), len(PERCENTILES), 1))
    for way, unit in zip(ways, units, strict=True):
        way[:, unit] = np.percentile(latents[:, unit], PERCENTILES)
    images = run.decode(ways.reshape(-1, latents.shape[1]))
    rows = images.reshape(len(units), len(PERCENTILES), *run.shape)
    names = [f"Latent unit {unit}" for unit in units]
    return plots.image_rows(dict(zip(names, rows, strict=True)))


def interpolation(run: Run) -> Figure:
    """From one test image to another, in equal steps of the latent."""
    shown = read_images(run.folder)
    images, labels = shown["encoded"], shown["labels"]
    other = int((labels != labels[0]).argmax())  # 0 if there is one class only
    ends = images[[0, other or len(images) - 1]]
    start, end = run.encode(ends)
    way = np.linspace(start, end, num=10, dtype=start.dtype)
    first, last = np.split(scale(ends, start.dtype), 2)
    row = np.concatenate([first, run.decode(way), last])
    return plots.image_rows({"Original, steps of the latent, original": row})


PERCENTILES = (5, 20, 35, 50, 65, 80, 95)
"""Of a unit's values on test images, in :func:`traversal`."""


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
    "latents": RunFigure(latents, ("encode",)),
    "traversal": RunFigure(traversal, ("encode", "decode")),
    "interpolation": RunFigure(interpolation, ("encode", "decode")),
}
"""The figures: the tutorial's, in its order, and those of the latent."""


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
        raise UserError(
            f"{run.folder}: its model has no {needs}, which {name} needs; it can have "
            f"{', '.join(applicable(run))}"
        )


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
