"""Figures show the arrays given, whole and apart; files are whole or absent."""

import errno
import itertools

import matplotlib
import numpy as np
import pytest
from conftest import shown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ae_jax import plots
from ae_jax.errors import UserError

LOSSES = [0.063, 0.051, 0.046, 0.042, 0.040, 0.039, 0.038, 0.038, 0.037, 0.037]
HIGHER = [loss + 0.01 for loss in LOSSES]
EPOCHS = list(range(1, 11))


def make_images(num_images, shape=(8, 9, 1), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_images, *shape), np.uint8)


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
    assert min(drawn.x0, drawn.y0) > -0.01
    assert drawn.x1 < width + 0.01
    assert drawn.y1 < height + 0.01
    texts = [text.get_window_extent() for text in visible_texts(figure)]
    boxes = [*texts, *(axes.bbox for axes in figure.axes)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)


# --- Images --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "shape"),
    [
        *((1, (28, 28, 1)), (10, (28, 28, 1)), (25, (8, 8, 1)), (3, (32, 48, 3))),
        *((1, (200, 100, 1)), (10, (200, 100, 1)), (25, (32, 48, 3))),
    ],
)
def test_figures_of_images_are_clean_whatever_their_shape_and_number(count, shape):
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
        *((1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (5, (1, 5)), (7, (2, 3))),
        *((10, (2, 5)), (24, (4, 5)), (25, (5, 5)), (30, (5, 5))),
    ],
)
def test_samples_fill_a_grid_without_an_empty_cell(count, grid):
    images = make_images(count)
    rows = [drawn for _, drawn in shown(plots.samples(images))]
    assert (len(rows), *{len(drawn) for drawn in rows}) == grid
    drawn = np.concatenate(rows)
    np.testing.assert_array_equal(drawn, images[: len(drawn), ..., 0])


def test_rows_are_reconstructions_in_order_and_then_their_originals():
    originals = make_images(16)
    recons = {epoch: make_images(16, seed=epoch) for epoch in (10, 1, 5)}
    by_epoch = shown(plots.reconstructions_by_epoch(recons, originals))
    expected = [(f"Epoch = {epoch}", recons[epoch]) for epoch in (1, 5, 10)]
    expected += [("Original Image", originals)]
    by_epoch += shown(plots.test_reconstructions(recons[1], originals))
    expected += [("Reconstructed image", recons[1][:10])]  # at most ten
    expected += [("Original Image", originals[:10])]
    for (title, drawn), (words, images) in zip(by_epoch, expected, strict=True):
        assert title == words
        np.testing.assert_array_equal(drawn, images[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_clipped_and_never_stretched(channels, tmp_path):
    images = make_images(2, (8, 9, channels)) // 2 + 60  # neither black nor white
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
    none = make_images(0)
    for make in (
        lambda: plots.samples(none),
        lambda: plots.test_reconstructions(none, none),
        lambda: plots.reconstructions_by_epoch({1: none}, none),
    ):
        with pytest.raises(ValueError, match="no images"):
            make()


# --- Curves, dots and bars -----------------------------------------------------------

DRIFT = {
    "ours": (list(range(1, 101)), [0.0, 0.0, *(1e-8 * 1.1**i for i in range(98))]),
    "theirs": (list(range(1, 101)), [1e-9] * 100),
}
OUTCOMES = {
    "ours": {"healthy": [0.036, 0.034, 0.041], "collapsed": [0.0675] * 12},
    "theirs": {"healthy": [], "collapsed": [0.0675]},
}
SEEDS = {
    "healthy": [([1, 2], [0.06, 0.04]), ([1, 2], [0.06, 0.05])],
    "part-dead": [],
    "collapsed": [([1, 2], [0.073, 0.067])],
}
SHARES = {
    "tutorial": {"healthy": 3, "part-dead": 1, "collapsed": 4},
    "activation: leaky ReLU": {"healthy": 2, "part-dead": 0, "collapsed": 0},
}
SIZES = ([1, 2, 4, 8], [10**power for power in range(8)])  # few; many, over decades
PANELS = [
    plots.Panel("Size", "Time (µs)", x, [13.0 + i for i in x], [13.0 for _ in x])
    for x in SIZES
]


def make_runs(count, name="runs/a"):
    """Curves by name, of which three would mean something to matplotlib."""
    curves = {f"{name}{i}": (EPOCHS[i:], LOSSES[i:]) for i in range(count)}
    return curves | {name: (EPOCHS, LOSSES) for name in ("_hidden", "$x$", "a_b^{")}


RUNS = {
    "3 runs": make_runs(0),
    "12 runs": make_runs(9),
    "long names": make_runs(9, "runs/" + "a-rather-long-name-" * 9),
}


def losses(num_epochs):
    epochs = list(range(1, num_epochs + 1))
    return epochs, [0.03 + 0.03 / epoch for epoch in epochs]


COSTS = {"ours": 0.861, "PyTorch, item by item": 4.96, "PyTorch": 2.1}

LINES = {"blind": ([0.1, 0.5], [30.0, 20.0]), "trained": ([0.1, 0.5], [31.0, 19.5])}
NUMBERS = {
    **{f"{n} epochs": plots.training_loss(*losses(n)) for n in (1, 2, 30, 1000)},
    "validation": plots.training_loss(EPOCHS, LOSSES, "BCE", HIGHER),
    **{name: plots.loss_curves(curves) for name, curves in RUNS.items()},
    "seeds": plots.seeds(SEEDS),
    "shares": plots.shares(SHARES),
    "drift": plots.divergence(DRIFT, "Difference", [(10, 1e-6), (100, 1e-3)]),
    "one step": plots.divergence({"one": ([938], [1e-15])}, "Difference"),
    "outcomes": plots.outcomes(OUTCOMES, "Test MSE"),
    **{f"{2 * n} panels": plots.scaling(PANELS * n) for n in (1, 3)},
    "1 panel": plots.scaling(PANELS[:1]),
    "bars": plots.bars(COSTS, "time (s)", ("the limit", 0.5)),
    "lines": plots.lines(LINES, "σ", "PSNR (dB)"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_figures_of_numbers_are_clean_and_their_axes_named(name):
    assert_clean(NUMBERS[name])
    for axes in NUMBERS[name].axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_yticklabels()[0].get_text()


TIMES = ("Number of epochs", "Training Loss (MSE)")

SHOWN = {
    **{f"{n} epochs": ([losses(n)], [], TIMES) for n in (1, 2, 30, 1000)},
    "validation": (
        [(EPOCHS, LOSSES), (EPOCHS, HIGHER)],
        ["training", "validation"],
        (TIMES[0], "Training Loss (BCE)"),
    ),
    **{
        name: (list(curves.values()), list(curves), (TIMES[0], "Training Loss"))
        for name, curves in RUNS.items()
    },
    "seeds": (
        [*SEEDS["healthy"], *SEEDS["collapsed"]],
        ["healthy, 2 seeds", "collapsed, 1 seed"],
        TIMES,
    ),
    "drift": (
        [
            (list(range(3, 101)), DRIFT["ours"][1][2:]),  # 0 has no logarithm
            DRIFT["theirs"],
            ([10, 100], [1e-6, 1e-3]),
        ],
        ["ours", "theirs", "limit"],
        ("Number of steps", "Difference"),
    ),
    "lines": (list(LINES.values()), list(LINES), ("σ", "PSNR (dB)")),
}
"""The lines of each figure, the words of its legend, and what its axes are called."""


@pytest.mark.parametrize("name", SHOWN)
def test_curves_are_drawn_whole_under_their_names(name):
    (axes,) = NUMBERS[name].axes
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    labels = (axes.get_xlabel(), axes.get_ylabel())
    assert (drawn, legend_of(name), labels) == SHOWN[name]


def legend_of(name):
    figure = NUMBERS[name]
    legends = [*figure.legends, *filter(None, [figure.axes[0].get_legend()])]
    texts = [text for legend in legends for text in legend.get_texts()]
    return [text.get_text().replace("\n", "") for text in texts]


@pytest.mark.parametrize("num_epochs", [1, 2, 30, 1000])
def test_ticks_are_whole_epochs_and_a_single_one_is_seen(num_epochs):
    (axes,) = NUMBERS[f"{num_epochs} epochs"].axes
    assert num_epochs > 25 or axes.lines[0].get_marker() == "o"
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks == [round(tick) for tick in ticks] != []


@pytest.mark.parametrize("name", RUNS)
def test_runs_look_different_and_are_named_below_their_curves(name):
    (axes,), (legend,) = NUMBERS[name].axes, NUMBERS[name].legends
    looks = {(to_hex(x.get_color()), x.get_linestyle()) for x in axes.lines}
    assert len(looks) == len(axes.lines)
    assert not any(text.get_parse_math() for text in legend.get_texts())
    assert axes.bbox.height > 3 * NUMBERS[name].dpi


def test_seeds_have_their_outcomes_colour_and_drift_logarithmic_axes():
    lines = NUMBERS["seeds"].axes[0].lines
    first, second, third = (to_hex(line.get_color()) for line in lines)
    assert first == second != third
    (axes,) = NUMBERS["drift"].axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_each_run_is_a_dot_of_its_side_and_outcome_and_the_mean_is_marked():
    (axes,) = NUMBERS["outcomes"].axes
    healthy, collapsed, mean = ([*x.get_xydata().T.tolist()] for x in axes.lines)
    assert healthy[0] == [0.034, 0.036, 0.041]
    assert collapsed[0] == [0.0675] * 13
    # Each side keeps to its own height, and equal scores lie beside each other.
    assert [round(height) for height in collapsed[1]] == [0] * 12 + [1]
    assert min(np.diff(sorted(collapsed[1]))) > 0.02
    assert mean == [[pytest.approx(0.037)], [0]]
    assert legend_of("outcomes") == ["healthy", "collapsed", "mean, healthy"]
    assert axes.yaxis_inverted()


def test_bars_are_the_shares_of_a_settings_runs_from_the_top():
    (axes,) = NUMBERS["shares"].axes
    bars = [[(bar.get_x(), bar.get_width()) for bar in of] for of in axes.containers]
    healthy, part_dead = [(0, 3 / 8), (0, 1)], [(3 / 8, 1 / 8), (1, 0)]
    assert bars == [healthy, part_dead, [(1 / 2, 1 / 2), (1, 0)]]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(SHARES)
    assert axes.yaxis_inverted()
    assert legend_of("shares") == ["healthy", "part-dead", "collapsed"]


def test_bars_are_the_numbers_beside_the_limit():
    (axes,) = NUMBERS["bars"].axes
    assert [bar.get_width() for bar in axes.containers[0]] == list(COSTS.values())
    assert [text.get_text() for text in axes.get_yticklabels()] == list(COSTS)
    assert [text.get_text() for text in axes.texts] == ["0.861", "4.96", "2.1"]
    assert axes.yaxis_inverted()
    (limit,) = axes.lines
    assert set(limit.get_xdata()) == {0.5}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["the limit, 0.5"]


def test_each_panel_has_its_points_and_their_ideal():
    for axes, panel in zip(NUMBERS["2 panels"].axes, PANELS, strict=True):
        ideal, measured = axes.lines
        assert ideal.get_xydata().T.tolist() == [panel.x, panel.ideal]
        assert measured.get_xydata().T.tolist() == [panel.x, panel.y]
        assert ideal.get_linestyle() == "--" != measured.get_linestyle()
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert set(axes.get_xticks()) <= set(panel.x)
        assert not len(axes.get_xticks(minor=True))


# --- Files ---------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_arrays_give_the_same_bytes_whatever_the_users_settings(
    ending, tmp_path
):
    files = []
    settings = {"font.size": 30, "savefig.bbox": "tight", "figure.facecolor": "red"}
    for index, mine in enumerate(({}, settings)):
        with matplotlib.rc_context(mine):
            before = str(matplotlib.rcParams)
            for number, figure in enumerate(
                (
                    plots.samples(make_images(4)),
                    plots.training_loss(EPOCHS, LOSSES),
                    plots.outcomes(OUTCOMES, "Test MSE"),
                )
            ):
                plots.save(figure, tmp_path / f"{index}-{number}.{ending}")
            assert str(matplotlib.rcParams) == before  # nor does one of ours outlive it
        files.append([p.read_bytes() for p in sorted(tmp_path.glob(f"{index}-*"))])
    assert files[0] == files[1]
    assert len(set(files[0])) == 3
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert all(file.startswith(start) and len(file) < 200_000 for file in files[0])


def test_another_ending_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"\.png, \.pdf or \.svg"):
        plots.save(NUMBERS["seeds"], tmp_path / "samples.jpg")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    def fill_disk(figure, file, **options):
        file.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "seeds.png"
    path.write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fill_disk)
        with pytest.raises(OSError, match="No space"):
            plots.save(NUMBERS["seeds"], path)
    assert path.read_bytes() == b"before"
    plots.save(NUMBERS["seeds"], path)
    assert path.read_bytes() != b"before"
    assert list(tmp_path.iterdir()) == [path]
