"""Figures: everything is shown, in its place, whole; and files are whole or absent."""

import itertools
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from ae_jax import figures

DIGITS = np.round(load_digits().images[:30] * 255 / 16).astype(np.uint8)
LOSSES = [0.063, 0.051, 0.046, 0.042, 0.040, 0.039, 0.038, 0.038, 0.037, 0.037]
EPOCHS = list(range(1, 11))


def noisy(images, seed):
    noise = np.random.default_rng(seed).normal(0, 0.1, images.shape)
    return np.clip(images / 255 + noise, 0, 1).astype(np.float32)


def draw(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def pixels_of(figure, path):
    figures.save(figure, path)
    return np.asarray(Image.open(path).convert("L"))


def shown(figure):
    """The pictures by rows from the top, as ``[(title, image), …]`` from the left."""

    def place(axes):
        box = axes.get_position()
        return -round(box.y0, 3), round(box.x0, 3)

    rows = itertools.groupby(
        sorted(figure.axes, key=place), lambda axes: place(axes)[0]
    )
    return [
        [(axes.get_title(), np.asarray(axes.images[0].get_array())) for axes in row]
        for _, row in rows
    ]


def assert_row(row, title, images):
    assert [cell_title for cell_title, _ in row] == [title] * len(images)
    np.testing.assert_array_equal([image for _, image in row], images)


def assert_apart(boxes, figure):
    """The boxes lie in the figure, and none lies over another."""
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)


# Figures of images.

COUNTS = range(1, 11)
SIZES = [8, 28]


def example_images(num_images, side):
    images = DIGITS[:num_images]
    return images if side == 8 else np.pad(images, ((0, 0), (10, 10), (10, 10)))


@pytest.mark.parametrize("num_images", [1, 2, 4, 5, 7, 16, 24, 25, 30])
def test_samples_are_shown_row_by_row_in_the_smallest_square(num_images):
    rows = shown(figures.samples(DIGITS[:num_images]))
    cells = [cell for row in rows for cell in row]
    assert_row(cells, "", DIGITS[: min(num_images, 25)])
    side = {1: 1, 2: 2, 4: 2, 5: 3, 7: 3, 16: 4, 24: 5, 25: 5, 30: 5}[num_images]
    assert len(rows) <= side
    assert all(len(row) == side for row in rows[:-1])


@pytest.mark.parametrize("num_images", COUNTS)
def test_rows_are_the_epochs_in_order_and_then_the_originals(num_images):
    originals = DIGITS[:num_images]
    recons = {epoch: noisy(originals, epoch) for epoch in (10, 1, 5)}
    rows = shown(figures.reconstructions_by_epoch(recons, originals))
    assert len(rows) == 4
    for row, epoch in zip(rows, (1, 5, 10), strict=False):
        assert_row(row, f"Epoch = {epoch}", recons[epoch])
    assert_row(rows[3], "Original Image", originals)


@pytest.mark.parametrize("num_images", [*COUNTS, 16])
def test_at_most_ten_reconstructions_stand_over_their_originals(num_images):
    originals = DIGITS[:num_images]
    recon = noisy(originals, 0)
    above, below = shown(figures.test_reconstructions(recon, originals))
    assert_row(above, "Reconstructed image", recon[:10])
    assert_row(below, "Original Image", originals[:10])


@pytest.mark.parametrize(
    ("num_images", "side"), [*((count, 8) for count in COUNTS), (1, 28), (10, 28)]
)
def test_no_title_is_clipped_or_touches_anything(num_images, side):
    images = example_images(num_images, side)
    for figure in (
        figures.test_reconstructions(images, images),
        figures.reconstructions_by_epoch({1: images, 1000: images}, images),
    ):
        renderer = draw(figure)
        titles = [axes.title.get_window_extent(renderer) for axes in figure.axes]
        assert_apart([*titles, *(axes.bbox for axes in figure.axes)], figure)


@pytest.mark.parametrize("num_images", COUNTS)
def test_a_figure_is_as_large_as_its_cells(num_images, tmp_path):
    images = DIGITS[:num_images]
    figure = figures.test_reconstructions(images, images)
    height, width = pixels_of(figure, tmp_path / "a.png").shape
    assert width == num_images * figures.CELL
    assert height == 2 * (figures.CELL + figures.TITLE)


@pytest.mark.parametrize("side", SIZES)
def test_each_pixel_is_a_sharp_square_of_its_own_grey(side, tmp_path):
    images = example_images(9, side)
    drawn = pixels_of(figures.samples(images), tmp_path / "samples.png")
    square = np.ones((figures.SIDE // side, figures.SIDE // side))
    margin = (figures.CELL - figures.SIDE) // 2
    for index, image in enumerate(images):
        top, left = (cell * figures.CELL + margin for cell in divmod(index, 3))
        place = drawn[top : top + figures.SIDE, left : left + figures.SIDE]
        np.testing.assert_allclose(place, np.kron(image, square), atol=1)


@pytest.mark.parametrize("shape", [(8, 28), (28, 8), (1, 50), (32, 32), (200, 100)])
def test_an_image_keeps_its_proportions_in_the_middle_of_its_cell(shape, tmp_path):
    white = np.full((1, *shape), 1.0)
    figure = figures.samples(white)
    (axes,) = figure.axes
    # What is drawn is all of the image, one pixel of it as wide as high.
    assert axes.get_xlim() == (-0.5, shape[1] - 0.5)
    assert axes.get_ylim() == (shape[0] - 0.5, -0.5)
    (left, bottom), (right, top) = np.round(axes.bbox.get_points()).astype(int)
    height, width = top - bottom, right - left
    assert max(height, width) > figures.SIDE * 0.85
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.02)
    assert abs(left - (figures.CELL - right)) <= 1
    assert abs(bottom - (figures.CELL - top)) <= 1


@pytest.mark.parametrize("white", [255, 1.0])
def test_colour_is_drawn_as_colour(white, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 12, 12, 3), np.uint8)
    drawn = images if white == 255 else images / 255
    if white == 1.0:
        drawn[0, 0, 0] = [1.5, -0.5, 0.5]  # clipped, not wrapped
        images[0, 0, 0] = [255, 0, 127]
    figures.save(figures.samples(drawn), tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        found = np.asarray(picture.convert("RGB"))
    margin, factor = (figures.CELL - figures.SIDE) // 2, figures.SIDE // 12
    place = found[margin : margin + figures.SIDE, margin : margin + figures.SIDE]
    expected = images[0].repeat(factor, axis=0).repeat(factor, axis=1)
    np.testing.assert_allclose(place.astype(int), expected.astype(int), atol=1)


def test_floats_and_bytes_of_the_same_image_look_the_same(tmp_path):
    as_bytes = pixels_of(figures.samples(DIGITS[:4]), tmp_path / "bytes.png")
    as_floats = pixels_of(figures.samples(DIGITS[:4] / 255), tmp_path / "floats.png")
    np.testing.assert_array_equal(as_bytes, as_floats)


def test_a_dark_image_is_drawn_dark_and_not_stretched(tmp_path):
    dark = np.full((1, 8, 8), 0.25)
    dark[0, 0, 0] = 0
    drawn = pixels_of(figures.samples(dark), tmp_path / "dark.png")
    assert drawn[figures.CELL // 2, figures.CELL // 2] == 64


def test_no_images_make_no_figure():
    none = DIGITS[:0]
    for make in (
        lambda: figures.samples(none),
        lambda: figures.test_reconstructions(none, none),
        lambda: figures.reconstructions_by_epoch({1: none}, none),
    ):
        with pytest.raises(ValueError, match="no images"):
            make()


# Figures of curves.


def assert_well_set(figure):
    """Labels are the tutorial's, and all of them lie within the figure, apart."""
    (axes,) = figure.axes
    renderer = draw(figure)
    assert axes.get_xlabel() == "Number of epochs"
    assert axes.get_ylabel() == "Training Loss"
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)
    texts = [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]
    texts += [
        label
        for axis, (start, stop) in (
            (axes.xaxis, axes.get_xlim()),
            (axes.yaxis, axes.get_ylim()),
        )
        for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if start <= place <= stop
    ]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    assert_apart([*boxes, axes.bbox], figure)
    return axes


@pytest.mark.parametrize("num_epochs", [1, 2, 3, 10, 30, 1000])
def test_training_loss_is_drawn_against_whole_epochs(num_epochs):
    epochs = list(range(1, num_epochs + 1))
    losses = [0.03 + 0.03 / epoch for epoch in epochs]
    axes = assert_well_set(figures.training_loss(epochs, losses))
    (line,) = axes.lines
    assert list(line.get_xdata()) == epochs
    assert list(line.get_ydata()) == losses
    assert axes.get_title(loc="left") == "MSE per epoch"
    assert axes.get_legend() is None


def test_the_loss_of_a_single_epoch_can_be_seen():
    axes = assert_well_set(figures.training_loss([1], [0.06]))
    assert axes.lines[0].get_marker() == "o"


def test_validation_loss_is_a_second_line_with_a_legend():
    higher = [loss + 0.01 for loss in LOSSES]
    axes = assert_well_set(figures.training_loss(EPOCHS, LOSSES, "BCE", higher))
    assert [list(line.get_ydata()) for line in axes.lines] == [LOSSES, higher]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training", "validation"]
    assert axes.get_title(loc="left") == "BCE per epoch"


@pytest.mark.parametrize("num_runs", [2, 7, 12])
@pytest.mark.parametrize("name", ["runs/a", "runs/" + "a-rather-long-name-" * 9])
def test_runs_can_be_told_apart_below_their_curves(num_runs, name):
    curves = {f"{name}{i}": (EPOCHS[i:], LOSSES[i:]) for i in reversed(range(num_runs))}
    figure = figures.loss_curves(curves)
    axes = assert_well_set(figure)
    assert len({(to_hex(x.get_color()), x.get_linestyle()) for x in axes.lines}) == (
        num_runs
    )
    for line, (epochs, losses) in zip(axes.lines, curves.values(), strict=True):
        assert list(line.get_xdata()) == epochs
        assert list(line.get_ydata()) == losses
    (legend,) = figure.legends
    names = [text.get_text().replace("\n", "") for text in legend.get_texts()]
    assert names == list(curves)
    box = legend.get_window_extent(draw(figure))
    assert_apart([box, axes.bbox], figure)
    texts = [text.get_window_extent() for text in legend.get_texts()]
    assert_apart(texts, figure)
    assert axes.bbox.height > 3 * figures.DPI


def test_any_name_is_shown_as_it_is():
    names = ["_hidden", "$x$", "a_b^{", "\\alpha"]
    figure = figures.loss_curves({name: (EPOCHS, LOSSES) for name in names})
    draw(figure)
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == names
    assert not any(text.get_parse_math() for text in texts)


DRIFT = {
    "ours": (list(range(1, 101)), [0.0, 0.0, *(1e-8 * 1.1**i for i in range(98))]),
    "theirs": (list(range(1, 101)), [1e-9] * 100),
}


def test_differences_of_zero_are_left_out_of_a_logarithmic_axis():
    axes = figures.divergence(DRIFT, "Difference").axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    ours, theirs = axes.lines
    assert list(ours.get_xdata()) == list(range(3, 101))
    assert list(ours.get_ydata()) == DRIFT["ours"][1][2:]
    assert list(theirs.get_ydata()) == DRIFT["theirs"][1]


def test_limits_stand_at_their_steps():
    figure = figures.divergence(DRIFT, "Difference", [(10, 1e-6), (100, 1e-3)])
    limits = figure.axes[0].lines[-1]
    assert list(limits.get_xdata()) == [10, 100]
    assert list(limits.get_ydata()) == [1e-6, 1e-3]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["ours", "theirs", "limit"]


OUTCOMES = {
    "ours": {"healthy": [0.036, 0.034, 0.035], "collapsed": [0.0675] * 12},
    "theirs": {"healthy": [], "collapsed": [0.0675]},
}


def test_each_run_is_a_dot_of_its_outcomes_colour():
    (axes,) = figures.outcomes(OUTCOMES, "Test MSE").axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    drawn = [list(line.get_xdata()) for line in dots]
    assert drawn == [[0.034, 0.035, 0.036], [0.0675] * 12, [], [0.0675]]
    colours = [to_hex(line.get_color()) for line in dots]
    assert colours[0] == colours[2] != colours[1] == colours[3]
    # Each side keeps to its own height.
    heights = [line.get_ydata() for line in dots]
    assert max(heights[1]) < 0.5 < min(heights[3])
    means = [line for line in axes.lines if line.get_marker() != "o"]
    assert [list(line.get_xdata()) for line in means] == [[pytest.approx(0.035)] * 2]


SEEDS = {
    "healthy": [([1, 2], [0.06, 0.04]), ([1, 2], [0.06, 0.05])],
    "part-dead": [],
    "collapsed": [([1, 2], [0.073, 0.067])],
}


def test_each_seed_is_a_curve_of_its_outcomes_colour():
    figure = figures.seeds(SEEDS)
    (axes,) = figure.axes
    drawn = [list(line.get_ydata()) for line in axes.lines]
    assert drawn == [[0.06, 0.04], [0.06, 0.05], [0.073, 0.067]]
    first, second, third = (to_hex(line.get_color()) for line in axes.lines)
    assert first == second != third
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["healthy (2)", "collapsed (1)"]
    assert axes.get_title(loc="left") == "MSE per epoch, 3 seeds"


SHARES = {
    "tutorial": {"healthy": 3, "part-dead": 1, "collapsed": 4},
    "activation: leaky ReLU": {"healthy": 2, "part-dead": 0, "collapsed": 0},
}


def test_bars_are_the_shares_of_a_settings_runs_from_the_top():
    (axes,) = figures.shares(SHARES).axes
    bars = [
        [(bar.get_x(), bar.get_width()) for bar in of_it] for of_it in axes.containers
    ]
    assert bars == [
        [(0, 3 / 8), (0, 1)],
        [(3 / 8, 1 / 8), (1, 0)],
        [(1 / 2, 1 / 2), (1, 0)],
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(SHARES)
    assert axes.yaxis_inverted()


def test_each_panel_has_its_points_and_their_ideal():
    rows = [{"x": 1, "y": 2.0, "ideal": 2.0}, {"x": 10, "y": 3.0, "ideal": 2.5}]
    first, second, third = figures.scaling({"a": rows, "b": rows[:1], "c": rows}).axes
    assert [axes.get_title(loc="left") for axes in (first, second, third)] == list(
        "abc"
    )
    ideal, measured = first.lines
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([1, 10], [2, 3])
    assert list(ideal.get_ydata()) == [2, 2.5]
    assert ideal.get_linestyle() == "--"
    assert first.get_xscale() == first.get_yscale() == "log"


@pytest.mark.parametrize(
    "figure",
    [
        figures.seeds(SEEDS),
        figures.shares(SHARES),
        figures.divergence(DRIFT, "Difference", [(100, 1e-3)]),
        figures.divergence({"one": ([938], [1e-15])}, "Difference"),
        figures.outcomes(OUTCOMES, "Test MSE"),
    ],
)
def test_legend_stands_below_the_axes(figure):
    renderer = draw(figure)
    (axes,), (legend,) = figure.axes, figure.legends
    boxes = [legend.get_window_extent(renderer), axes.bbox]
    boxes.append(axes.xaxis.label.get_window_extent(renderer))
    assert_apart(boxes, figure)


# Files.


def example_figures():
    images = example_images(10, 28)
    return {
        "samples": figures.samples(np.resize(images, (25, 28, 28))),
        "epochs": figures.reconstructions_by_epoch(
            {epoch: noisy(images[:5], epoch) for epoch in (1, 5, 10)}, images[:5]
        ),
        "test": figures.test_reconstructions(noisy(images, 0), images),
        "loss": figures.training_loss(EPOCHS, LOSSES),
        "curves": figures.loss_curves(
            {f"runs/tutorial-seed-{seed}": (EPOCHS, LOSSES) for seed in range(12)}
        ),
        "divergence": figures.divergence(DRIFT, "Difference", [(100, 1e-3)]),
        "outcomes": figures.outcomes(OUTCOMES, "Test MSE"),
        "seeds": figures.seeds(SEEDS),
        "shares": figures.shares(SHARES),
    }


def test_the_same_arrays_give_the_same_bytes_whatever_the_users_settings(tmp_path):
    for name, figure in example_figures().items():
        figures.save(figure, tmp_path / f"{name}.png")
    settings = {"font.size": 30, "savefig.bbox": "tight", "figure.facecolor": "red"}
    with matplotlib.rc_context(settings):
        for name, figure in example_figures().items():
            again = tmp_path / "again.png"
            figures.save(figure, again)
            first = (tmp_path / f"{name}.png").read_bytes()
            assert again.read_bytes() == first
            assert len(first) <= 200_000


def test_no_setting_of_matplotlib_outlives_a_figure(tmp_path):
    before = str(matplotlib.rcParams)
    for figure in (
        figures.samples(DIGITS[:1]),
        figures.training_loss(EPOCHS, LOSSES),
        figures.loss_curves({"a": (EPOCHS, LOSSES)}),
    ):
        figures.save(figure, tmp_path / "figure.png")
    assert str(matplotlib.rcParams) == before


def test_saving_leaves_the_figure_alone_in_its_folder(tmp_path):
    figure = figures.samples(DIGITS[:1])
    for _ in range(2):  # the second time over the first
        figures.save(figure, tmp_path / "samples.png")
        assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.format == "PNG"
        assert "Software" not in picture.info


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    def fill_disk(figure, path, **options):
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_disk)
    path = tmp_path / "samples.png"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="No space"):
        figures.save(figures.samples(DIGITS[:1]), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        figures.save(figures.samples(DIGITS[:1]), tmp_path / "none" / "samples.png")


def test_neither_pyplot_nor_jax_is_imported(tmp_path):
    code = (
        "import sys, pathlib, ae_jax.figures as figures; "
        "figure = figures.training_loss([1], [0.1]); "
        "figures.save(figure, pathlib.Path(sys.argv[1])); "
        "print([m for m in ('jax', 'matplotlib.pyplot') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "loss.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
