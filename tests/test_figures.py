"""The figures of a run show the arrays that they say they show."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from ae_jax.config import FiguresConfig
from ae_jax.errors import UserError
from ae_jax.runs import figures
from ae_jax.runs.figures import FIGURES
from ae_jax.runs.run import open_run


def rows_of(figure):
    """The pictures from the top left, row by row, and the title of each row."""
    rows = {}
    for axes in figure.axes:
        box = axes.get_position()
        rows.setdefault(-round(box.y0, 3), []).append((box.x0, axes))
    for place in sorted(rows):
        in_order = [axes for _, axes in sorted(rows[place], key=lambda pair: pair[0])]
        pictures = np.stack([axes.images[0].get_array() for axes in in_order])
        yield in_order[0].get_title("left"), pictures


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_and_not_empty(name, finished_run, tmp_path):
    figure = finished_run.figure(name)
    figure.savefig(tmp_path / "drawn.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "drawn.png")[..., :3]
    assert (pixels < 0.9).mean() > 0.01
    assert (pixels > 0.9).mean() > 0.01
    assert (finished_run.folder / "figures" / f"{name}.png").stat().st_size > 1000


def test_each_row_is_from_that_epochs_own_checkpoint(finished_run):
    """Of three epochs the first and the last were asked for."""
    originals = figures.read_images(finished_run.folder)["train"]
    rows = dict(rows_of(finished_run.figure("reconstructions_by_epoch")))
    assert list(rows) == ["Epoch = 1", "Epoch = 3", "Original Image"]
    recons = {
        epoch: finished_run.at(21 * epoch).reconstruct(originals)[..., 0]
        for epoch in (1, 2, 3)
    }
    assert np.abs(recons[1] - recons[3]).max() > 1e-3  # they can be told apart
    np.testing.assert_array_equal(rows["Epoch = 1"], recons[1])
    np.testing.assert_array_equal(rows["Epoch = 3"], recons[3])
    np.testing.assert_array_equal(rows["Original Image"], originals[..., 0])


def test_other_epochs_may_be_asked_for_later(finished_run):
    config = replace(finished_run.config, figures=FiguresConfig(epochs=(2,)))
    run = replace(finished_run, config=config)
    titles = [title for title, _ in rows_of(run.figure("reconstructions_by_epoch"))]
    assert titles == ["Epoch = 2", "Epoch = 3", "Original Image"]


def test_test_images_stand_under_their_reconstructions(finished_run):
    originals = figures.read_images(finished_run.folder)["test"]
    rows = [
        images for _, images in rows_of(finished_run.figure("test_reconstructions"))
    ]
    recon = finished_run.reconstruct(originals)[..., 0]
    np.testing.assert_array_equal(rows[0], recon)
    np.testing.assert_array_equal(rows[1], originals[..., 0])


def test_samples_are_those_that_were_chosen(finished_run):
    images = figures.read_images(finished_run.folder)["samples"]
    rows = [images for _, images in rows_of(finished_run.figure("samples"))]
    np.testing.assert_array_equal(np.concatenate(rows), images[..., 0])


def test_the_loss_is_the_objectives_of_each_epoch(finished_run):
    (axes,) = finished_run.figure("training_loss").axes
    drawn = {tuple(np.round(line.get_ydata(), 12)) for line in axes.lines}
    for name in ("train/mse", "val/mse"):
        values = tuple(np.round([row[name] for row in finished_run.metrics], 12))
        assert values in drawn
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    assert "MSE" in axes.get_ylabel()


def test_an_earlier_checkpoint_draws_what_was_known_then(finished_run):
    earlier = finished_run.at(42)
    (axes,) = earlier.figure("training_loss").axes
    assert list(axes.lines[0].get_xdata()) == [1, 2]
    titles = [title for title, _ in rows_of(earlier.figure("reconstructions_by_epoch"))]
    assert titles == ["Epoch = 1", "Epoch = 2", "Original Image"]


def test_the_folder_alone_is_enough(finished_run, tmp_path):
    """It has moved, and its data are gone."""
    moved = shutil.copytree(finished_run.folder, tmp_path / "moved")
    for path in (moved / "figures").glob("*.png"):
        path.unlink()
    run = open_run(moved)
    for name in figures.applicable(run):
        drawn = figures.draw(run, name)
        theirs = finished_run.folder / "figures" / drawn.name
        assert drawn.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(b"x")]
)
def test_images_that_cannot_be_read_are_told_in_a_line(damage, finished_run, tmp_path):
    copy = shutil.copytree(finished_run.folder, tmp_path / "copy")
    damage(copy / "figures" / "images.npz")
    with pytest.raises(UserError, match=r"images\.npz: cannot be read .*; delete it"):
        open_run(copy).figure("samples")


def test_an_unknown_figure_is_answered_with_the_nearest(finished_run):
    with pytest.raises(UserError, match=r"no figure 'sample' .did you mean samples"):
        finished_run.figure("sample")
