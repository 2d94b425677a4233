"""The figures of a run show the arrays that they say they show."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import shown

from ae_jax.config import FiguresConfig
from ae_jax.errors import UserError
from ae_jax.runs import figures
from ae_jax.runs.figures import FIGURES


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_and_not_empty(name, finished_run):
    from matplotlib.image import imread

    pixels = imread(finished_run.folder / "figures" / f"{name}.png")[..., :3]
    assert (pixels < 0.9).mean() > 0.01
    assert (pixels > 0.9).mean() > 0.01


@pytest.mark.parametrize(
    ("asked", "step", "epochs"),
    [((1, 3), 63, [1, 3]), ((2,), 63, [2, 3]), ((1, 3), 42, [1, 2]), ((), 21, [1])],
)
def test_each_row_is_from_that_epochs_own_checkpoint(asked, step, epochs, finished_run):
    """Those asked for, and the last that was known then."""
    config = replace(finished_run.config, figures=FiguresConfig(epochs=asked))
    run = replace(finished_run.at(step), config=config)
    rows = shown(run.figure("reconstructions_by_epoch"))
    titles = [f"Epoch = {epoch}" for epoch in epochs]
    assert [title for title, _ in rows] == [*titles, "Original Image"]
    originals = figures.read_images(run.folder)["train"]
    recons = [run.at(21 * epoch).reconstruct(originals) for epoch in epochs]
    for (_, drawn), expected in zip(rows, [*recons, originals], strict=True):
        np.testing.assert_array_equal(drawn, expected[..., 0])
    if len(recons) > 1:
        assert np.abs(recons[0] - recons[1]).max() > 1e-3  # they differ


def test_images_are_those_that_were_chosen(finished_run):
    images = figures.read_images(finished_run.folder)
    samples = [drawn for _, drawn in shown(finished_run.figure("samples"))]
    np.testing.assert_array_equal(np.concatenate(samples), images["samples"][..., 0])
    (_, recon), (_, below) = shown(finished_run.figure("test_reconstructions"))
    np.testing.assert_array_equal(below, images["test"][..., 0])
    theirs = finished_run.reconstruct(images["test"])[..., 0]
    np.testing.assert_array_equal(recon, theirs)


@pytest.mark.parametrize("step", [42, 63])
def test_the_loss_is_the_objectives_of_each_epoch_known_then(step, finished_run):
    (axes,) = finished_run.at(step).figure("training_loss").axes
    for name, line in zip(("train/mse", "val/mse"), axes.lines, strict=True):
        rows = finished_run.metrics[: step // 21]
        assert list(line.get_ydata()) == [row[name] for row in rows]
        assert list(line.get_xdata()) == [row["epoch"] for row in rows]
    assert "MSE" in axes.get_ylabel()


def test_an_unknown_figure_is_answered_with_the_nearest(finished_run):
    with pytest.raises(UserError, match=r"no figure 'sample' .did you mean samples"):
        finished_run.figure("sample")
