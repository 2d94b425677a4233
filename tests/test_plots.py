"""Figures show the arrays given, whole and apart; files are whole or absent."""

import errno
import itertools
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from ae_jax import plots
from ae_jax.errors import UserError

DIGITS = np.round(load_digits().images[:30] * 255 / 16).astype(np.uint8)[..., None]
LOSSES = [0.063, 0.051, 0.046, 0.042, 0.040, 0.039, 0.038, 0.038, 0.037, 0.037]
EPOCHS = list(range(1, 11))


def make_images(num_images, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_images, *shape), np.uint8)


def shown(figure):
    """The pictures from the top left, row by row, as ``[(row's title, image), …]``."""

    def place(axes):
        box = axes.get_position()
        return -round(box.y0, 3), round(box.x0, 3)

    rows = itertools.groupby(sorted(figure.axes, key=place), lambda ax: place(ax)[0])
    pictures = [[*row] for _, row in rows]
    return [
        (row[0].get_title("left"), np.stack([ax.images[0].get_array() for ax in row]))
        for row in pictures
    ]


def visible_texts(figure):
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes._left_title, axes.title]
        for axis, limits in (
            (axes.xaxis, axes.get_xlim()),
            (axes.yaxis, axes.get_ylim()),
        ):
            if axes.axison:
                low, high = sorted(limits)
                ticks = axis.get_major_ticks() + axis.get_minor_ticks()
                texts += [t.label1 for t in ticks if low <= t.get_loc() <= high]
                texts.append(axis.label)
    return [text for text in texts if text.get_text() and text.get_visible()]


def assert_clean(figure):
    """Everything lies in the figure, no text over another one or over an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert drawn.x0 > -0.01
    assert drawn.y0 > -0.01
    assert drawn.x1 < width + 0.01
    assert drawn.y1 < height + 0.01
    texts = [text.get_window_extent() for text in visible_texts(figure)]
    for one, other in itertools.combinations(
        [*texts, *(a.bbox for a in figure.axes)], 2
    ):
        assert not one.overlaps(other), (one, other)


# --- Images --------------------------------------------------------------------------

SHAPES = [(28, 28, 1), (8, 8, 1), (32, 48, 3), (200, 100, 1)]
COUNTS = [1, 3, 10, 25]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", COUNTS)
def test_figures_of_images_are_clean_whatever_their_shape_and_number(shape, count):
    images = make_images(count, shape)
    few = images[:5]
    for figure in (
        plots.samples(images),
        plots.test_reconstructions(images, images),
        plots.reconstructions_by_epoch({1: few, 1000: few}, few),
    ):
        assert_clean(figure)
        for axes in figure.axes:
            box = axes.get_window_extent()
            assert box.height / box.width == pytest.approx(shape[0] / shape[1])


@pytest.mark.parametrize(
    ("count", "grid"),
    [
        *((1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (1, 5)), (7, (2, 3))),
        *((10, (2, 5)), (16, (4, 4)), (24, (4, 5)), (25, (5, 5)), (30, (5, 5))),
    ],
)
def test_samples_fill_a_grid_without_an_empty_cell(count, grid):
    rows = shown(plots.samples(DIGITS[:count]))
    assert (len(rows), *{len(images) for _, images in rows}) == grid
    drawn = np.concatenate([images for _, images in rows])
    np.testing.assert_array_equal(drawn, DIGITS[: len(drawn), ..., 0])


def test_rows_are_the_epochs_in_order_and_then_the_originals():
    recons = {epoch: make_images(5, (8, 8, 1), seed=epoch) for epoch in (10, 1, 5)}
    rows = shown(plots.reconstructions_by_epoch(recons, DIGITS[:5]))
    titles = ["Epoch = 1", "Epoch = 5", "Epoch = 10", "Original Image"]
    expected = [recons[1], recons[5], recons[10], DIGITS[:5]]
    assert [title for title, _ in rows] == titles
    for (_, drawn), images in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(drawn, images[..., 0])


@pytest.mark.parametrize("count", [1, 4, 10, 16])
def test_at_most_ten_reconstructions_stand_over_their_originals(count):
    recon = make_images(count, (8, 8, 1))
    above, below = shown(plots.test_reconstructions(recon, DIGITS[:count]))
    assert (above[0], below[0]) == ("Reconstructed image", "Original Image")
    np.testing.assert_array_equal(above[1], recon[:10, ..., 0])
    np.testing.assert_array_equal(below[1], DIGITS[: min(count, 10), ..., 0])


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8, 3)])
def test_images_are_clipped_and_never_stretched(shape, tmp_path):
    images = make_images(2, shape) // 2 + 60  # the first: neither black nor white
    floats = images / 255
    floats[1, 3, 3], images[1, 3, 3] = 1.5, 255
    floats[1, 4, 4], images[1, 4, 4] = -0.5, 0
    files = [tmp_path / "bytes.png", tmp_path / "floats.png"]
    for path, some, white in zip(files, (images, floats), (255, 1), strict=True):
        figure = plots.samples(some)
        for axes, image in zip(figure.axes, some, strict=True):
            expected = np.clip(image, 0, white).squeeze()
            (drawn,) = axes.images
            np.testing.assert_array_equal(drawn.get_array(), expected)
            assert (drawn.get_clim(), drawn.get_cmap().name) == ((0, white), "gray")
        plots.save(figure, path)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_images_make_no_figure():
    none = DIGITS[:0]
    for make in (
        lambda: plots.samples(none),
        lambda: plots.test_reconstructions(none, none),
        lambda: plots.reconstructions_by_epoch({1: none}, none),
    ):
        with pytest.raises(ValueError, match="no images"):
            make()


# --- Curves, dots and bars -----------------------------------------------------------


def lines_of(figure):
    return [(list(x.get_xdata()), list(x.get_ydata())) for x in figure.axes[0].lines]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("num_epochs", [1, 2, 10, 30, 1000])
def test_training_loss_is_drawn_against_whole_epochs(num_epochs):
    epochs = list(range(1, num_epochs + 1))
    losses = [0.03 + 0.03 / epoch for epoch in epochs]
    figure = plots.training_loss(epochs, losses)
    assert_clean(figure)
    (axes,) = figure.axes
    assert lines_of(figure) == [(epochs, losses)]
    assert axes.get_xlabel() == "Number of epochs"
    assert axes.get_ylabel() == "Training Loss (MSE)"
    assert axes.get_legend() is None
    assert num_epochs > 25 or axes.lines[0].get_marker() == "o"  # one point is seen
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)


def test_validation_loss_is_a_second_line_with_a_legend():
    higher = [loss + 0.01 for loss in LOSSES]
    figure = plots.training_loss(EPOCHS, LOSSES, "BCE", higher)
    assert lines_of(figure) == [(EPOCHS, LOSSES), (EPOCHS, higher)]
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["training", "validation"]
    assert figure.axes[0].get_ylabel() == "Training Loss (BCE)"


@pytest.mark.parametrize("num_runs", [2, 12])
@pytest.mark.parametrize("name", ["runs/a", "runs/" + "a-rather-long-name-" * 9])
def test_runs_can_be_told_apart_below_their_curves(num_runs, name):
    curves = {f"{name}{i}": (EPOCHS[i:], LOSSES[i:]) for i in range(num_runs - 3)}
    curves |= {name: (EPOCHS, LOSSES) for name in ("_hidden", "$x$", "a_b^{")}
    figure = plots.loss_curves(curves)
    assert_clean(figure)
    assert lines_of(figure) == list(curves.values())
    lines = figure.axes[0].lines
    assert len({(to_hex(x.get_color()), x.get_linestyle()) for x in lines}) == len(
        lines
    )
    assert [name.replace("\n", "") for name in legend_of(figure)] == list(curves)
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())
    assert figure.axes[0].bbox.height > 3 * figure.dpi


DRIFT = {
    "ours": (list(range(1, 101)), [0.0, 0.0, *(1e-8 * 1.1**i for i in range(98))]),
    "theirs": (list(range(1, 101)), [1e-9] * 100),
}


def test_differences_are_drawn_on_logarithmic_axes_where_there_are_any():
    figure = plots.divergence(DRIFT, "Difference", [(10, 1e-6), (100, 1e-3)])
    (axes,) = figure.axes
    ours = (list(range(3, 101)), DRIFT["ours"][1][2:])
    assert lines_of(figure) == [ours, DRIFT["theirs"], ([10, 100], [1e-6, 1e-3])]
    assert legend_of(figure) == ["ours", "theirs", "limit"]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Number of steps", "Difference")


OUTCOMES = {
    "ours": {"healthy": [0.036, 0.034, 0.041], "collapsed": [0.0675] * 12},
    "theirs": {"healthy": [], "collapsed": [0.0675]},
}


def test_each_run_is_a_dot_of_its_side_and_outcome_and_the_mean_is_marked():
    figure = plots.outcomes(OUTCOMES, "Test MSE")
    healthy, collapsed, mean = lines_of(figure)
    assert healthy[0] == [0.034, 0.036, 0.041]
    assert collapsed[0] == [0.0675] * 13
    # Each side keeps to its own height, and equal scores lie beside each other.
    assert [round(height) for height in collapsed[1]] == [0] * 12 + [1]
    assert min(np.diff(sorted(collapsed[1]))) > 0.02
    assert mean == ([pytest.approx(0.037)], [0])
    assert legend_of(figure) == ["healthy", "collapsed", "mean, healthy"]
    assert figure.axes[0].yaxis_inverted()


SEEDS = {
    "healthy": [([1, 2], [0.06, 0.04]), ([1, 2], [0.06, 0.05])],
    "part-dead": [],
    "collapsed": [([1, 2], [0.073, 0.067])],
}


def test_each_seed_is_a_curve_of_its_outcomes_colour():
    figure = plots.seeds(SEEDS)
    assert lines_of(figure) == [*SEEDS["healthy"], *SEEDS["collapsed"]]
    first, second, third = (to_hex(x.get_color()) for x in figure.axes[0].lines)
    assert first == second != third
    assert legend_of(figure) == ["healthy, 2 seeds", "collapsed, 1 seed"]


SHARES = {
    "tutorial": {"healthy": 3, "part-dead": 1, "collapsed": 4},
    "activation: leaky ReLU": {"healthy": 2, "part-dead": 0, "collapsed": 0},
}


def test_bars_are_the_shares_of_a_settings_runs_from_the_top():
    figure = plots.shares(SHARES)
    (axes,) = figure.axes
    bars = [
        [(bar.get_x(), bar.get_width()) for bar in outcome]
        for outcome in axes.containers
    ]
    assert bars == [
        [(0, 3 / 8), (0, 1)],
        [(3 / 8, 1 / 8), (1, 0)],
        [(1 / 2, 1 / 2), (1, 0)],
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(SHARES)
    assert axes.yaxis_inverted()
    assert legend_of(figure) == ["healthy", "part-dead", "collapsed"]


def make_panels(count):
    """Costs of a few sizes, close together, and of many over several decades."""
    few, many = [1, 2, 4, 8], [10**power for power in range(8)]
    return [
        plots.Panel("Size", "Time (µs)", x, [13.0 + i for i in x], [13.0 for _ in x])
        for x in (few, many)
    ][:count] * math.ceil(count / 2)


def test_each_panel_has_its_points_and_their_ideal():
    panels = make_panels(2)
    for axes, panel in zip(plots.scaling(panels).axes, panels, strict=True):
        ideal, measured = axes.lines
        assert list(ideal.get_xdata()) == list(measured.get_xdata()) == panel.x
        assert list(ideal.get_ydata()) == panel.ideal
        assert list(measured.get_ydata()) == panel.y
        assert ideal.get_linestyle() == "--" != measured.get_linestyle()
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("Size", "Time (µs)")
        assert set(axes.get_xticks()) <= set(panel.x)
        assert not len(axes.get_xticks(minor=True))


@pytest.mark.parametrize(
    "figure",
    [
        plots.training_loss(EPOCHS, LOSSES, "BCE"),
        plots.loss_curves({"a": (EPOCHS, LOSSES)}, "MSE"),
        plots.seeds(SEEDS),
        plots.shares(SHARES),
        plots.divergence(DRIFT, "Difference", [(100, 1e-3)]),
        plots.divergence({"one": ([938], [1e-15])}, "Difference"),
        plots.outcomes(OUTCOMES, "Test MSE"),
        *(plots.scaling(make_panels(count)) for count in (1, 2, 4, 6)),
    ],
)
def test_figures_of_numbers_are_clean_and_their_axes_named(figure):
    assert_clean(figure)
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_yticklabels()[0].get_text()


# --- Files ---------------------------------------------------------------------------


def example_figures():
    yield plots.samples(np.resize(DIGITS, (25, 8, 8, 1)))
    yield plots.test_reconstructions(DIGITS[:3], DIGITS[:3])
    yield plots.training_loss(EPOCHS, LOSSES)
    yield plots.outcomes(OUTCOMES, "Test MSE")
    yield plots.scaling(make_panels(2))


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_arrays_give_the_same_bytes_whatever_the_users_settings(
    ending, tmp_path
):
    files = []
    settings = {"font.size": 30, "savefig.bbox": "tight", "figure.facecolor": "red"}
    for index, mine in enumerate(({}, settings)):
        with matplotlib.rc_context(mine):
            before = str(matplotlib.rcParams)
            for number, figure in enumerate(example_figures()):
                plots.save(figure, tmp_path / f"{index}-{number}.{ending}")
            assert str(matplotlib.rcParams) == before  # nor does one of ours outlive it
        files.append([p.read_bytes() for p in sorted(tmp_path.glob(f"{index}-*"))])
    assert files[0] == files[1]
    assert len(set(files[0])) == 5
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert all(file.startswith(start) and len(file) < 200_000 for file in files[0])


def test_another_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"\.png, \.pdf or \.svg"):
        plots.save(plots.samples(DIGITS[:1]), tmp_path / "samples.jpg")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    def fill_disk(figure, file, **options):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_disk)
    path = tmp_path / "samples.png"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="No space"):
        plots.save(plots.samples(DIGITS[:1]), path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    plots.save(plots.samples(DIGITS[:1]), path)
    assert path.read_bytes() != b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        plots.save(plots.samples(DIGITS[:1]), tmp_path / "none" / "samples.png")


def test_neither_pyplot_nor_jax_is_imported(tmp_path):
    code = (
        "import sys, pathlib, ae_jax.plots as plots; "
        "figure = plots.training_loss([1], [0.1]); "
        "plots.save(figure, pathlib.Path(sys.argv[1])); "
        "print([m for m in ('jax', 'scipy', 'matplotlib.pyplot') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "loss.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
