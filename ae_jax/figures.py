"""Figures of a run, from arrays: what was learnt, as pictures and as curves.

The only importer of matplotlib. Each function returns a ``Figure`` of its own: there is
no pyplot, and so no global state, no window system and nothing to close. A user's
matplotlibrc has no say: the same arrays give the same picture.

Images are [n, H, W], drawn on a grey map from black (0) to white (1), or [n, H, W, 3],
drawn in colour; uint8, or floats in [0, 1]; what lies outside is clipped. Titles and
axis labels are the tutorial's.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import matplotlib.style
import numpy as np
from jaxtyping import Float, Shaped, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

Images: TypeAlias = UInt8[np.ndarray, "n H W *C"] | Float[np.ndarray, "n H W *C"]
Row: TypeAlias = tuple[str, Shaped[np.ndarray, "_ H W *C"]]  # of any length
Curve: TypeAlias = tuple[Sequence[int], Sequence[float]]

DPI = 120

# Figures of images are measured in pixels. The longer side of an image is at most SIDE,
# a multiple of 28 and of 8; the cell around it is wider than the longest title,
# "Reconstructed image".
SIDE = 168
CELL = 200
TITLE = 30  # height
TITLE_PT = 10  # size of the type, in points

# The tutorial's style, with finer lines and type, and some air at the figure's edge.
STYLE = (
    "default",
    "fivethirtyeight",
    {
        "axes.titlesize": "large",
        "figure.constrained_layout.h_pad": 0.15,
        "figure.constrained_layout.w_pad": 0.15,
        "font.size": 11,
        "lines.linewidth": 2.5,
    },
)
NUM_COLOURS = 6  # of that style


def samples(images: Images) -> Figure:
    """Training images in the smallest square grid that holds them, at most 5×5.

    Args:
        images: drawn in their order, row by row; of more than 25, the first 25.

    Raises:
        ValueError: there are none.
    """
    shown = images[:25]
    num_columns = max(1, math.ceil(math.sqrt(len(shown))))
    starts = range(0, len(shown), num_columns)
    return _draw_rows([("", shown[start : start + num_columns]) for start in starts])


def reconstructions_by_epoch(recons: Mapping[int, Images], originals: Images) -> Figure:
    """The same images as they were reconstructed after each epoch, over the originals.

    Args:
        recons: reconstructions of ``originals`` by epoch; the rows are in its order.
        originals: the bottom row.

    Raises:
        ValueError: there are no images.
    """
    rows = [(f"Epoch = {epoch}", recons[epoch]) for epoch in sorted(recons)]
    return _draw_rows([*rows, ("Original Image", originals)])


def test_reconstructions(recon: Images, originals: Images) -> Figure:
    """A row of reconstructions over their originals: the first ten, if there are more.

    Args:
        recon: reconstructions of ``originals``.
        originals: the bottom row.

    Raises:
        ValueError: there are no images.
    """
    return _draw_rows(
        [("Reconstructed image", recon[:10]), ("Original Image", originals[:10])]
    )


# By its name pytest would take it for a test.
test_reconstructions.__test__ = False  # type: ignore[attr-defined]


@matplotlib.style.context("default")
def _draw_rows(rows: Sequence[Row]) -> Figure:
    """Rows of images, from the top, each image under its row's title if it has one."""
    num_columns = max((len(images) for _, images in rows), default=0)
    if num_columns == 0:
        raise ValueError("there are no images to draw")
    # Everything is placed by hand, in whole pixels: sharp, and nothing can overlap.
    margin = (CELL - SIDE) // 2
    heights = [(TITLE if title else 0) + CELL for title, _ in rows]
    width, bottom = num_columns * CELL, sum(heights)
    tall, wide = _drawn_size(*rows[0][1].shape[1:3])
    figure = Figure(figsize=(width / DPI, bottom / DPI), dpi=DPI)
    scale = np.array([width, bottom, width, bottom])  # matplotlib wants fractions
    for (title, images), height in zip(rows, heights, strict=True):
        bottom -= height
        for column, image in enumerate(images):
            # All images stand in the middle of their cells, and under their titles.
            left, low = (margin + (SIDE - length) // 2 for length in (wide, tall))
            box = (column * CELL + left, bottom + low, wide, tall)
            axes = figure.add_axes(tuple(box / scale))
            white = 255 if image.dtype == np.uint8 else 1
            axes.imshow(
                np.clip(image, 0, white), cmap="gray", vmin=0, vmax=white, aspect="auto"
            )
            axes.set_axis_off()
            axes.set_title(title, fontsize=TITLE_PT)
    return figure


def _drawn_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of an image in the figure.

    Where it can, each of its pixels becomes a square of one size; else it is fitted.
    """
    factor = SIDE / max(height, width)
    factor = int(factor) if factor >= 2 else factor
    return max(1, round(height * factor)), max(1, round(width * factor))


@matplotlib.style.context(STYLE)
def training_loss(
    epochs: Sequence[int],
    losses: Sequence[float],
    loss_name: str = "MSE",
    validation: Sequence[float] | None = None,
) -> Figure:
    """The loss against epochs.

    Args:
        epochs: number of each finished epoch, from 1.
        losses: training loss of each.
        loss_name: what the loss is; shown as the title.
        validation: loss of each on the held-out images, if some are.
    """
    figure = Figure((8, 5), dpi=DPI, layout="constrained")
    axes = _loss_axes(figure)
    axes.set_title(f"{loss_name} per epoch", loc="left")
    _draw_curve(axes, (epochs, losses), label="training")
    if validation is not None:
        _draw_curve(axes, (epochs, validation), label="validation")
        axes.legend()
    return figure


@matplotlib.style.context(STYLE)
def loss_curves(curves: Mapping[str, Curve]) -> Figure:
    """The training losses of several runs over each other.

    Args:
        curves: for each run, by name, its epochs and their losses. Twelve runs can be
            told apart; after that, colours and dashes repeat.
    """
    labels = [textwrap.fill(name, width=80) for name in curves]
    num_lines = sum(label.count("\n") + 1 for label in labels)
    # The curves keep their size, and each line of the legend adds to the height.
    figure = Figure((8, 5 + 0.25 * num_lines), dpi=DPI, layout="constrained")
    axes = _loss_axes(figure)
    lines = [
        _draw_curve(axes, curve, linestyle=("-", "--")[index // NUM_COLOURS % 2])
        for index, curve in enumerate(curves.values())
    ]
    # Below the axes there is room for long names, and no curve to hide.
    legend = figure.legend(
        lines, labels, loc="outside lower left", frameon=False, handlelength=4
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollar signs
    return figure


def _loss_axes(figure: Figure) -> Axes:
    axes = figure.add_subplot()
    axes.set_xlabel("Number of epochs")
    axes.set_ylabel("Training Loss")
    axes.xaxis.set_major_locator(
        MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    return axes


def _draw_curve(
    axes: Axes, curve: Curve, label: str | None = None, linestyle: str = "-"
) -> Line2D:
    epochs, losses = curve
    # A marker shows the single point of a first epoch; many of them would blur.
    marker = "o" if len(epochs) <= 25 else ""
    (line,) = axes.plot(epochs, losses, linestyle, marker=marker, label=label)
    return line


@matplotlib.style.context(STYLE)
def divergence(
    curves: Mapping[str, Curve], title: str, limits: Sequence[tuple[int, float]] = ()
) -> Figure:
    """How two trainings drift apart, on logarithmic axes.

    Args:
        curves: by name, steps from 1 on and the difference after each; a difference of
            0, which has no logarithm, is left out.
        title: what differs.
        limits: step and largest difference allowed there.
    """
    figure = Figure((8, 5.5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel("Number of steps")
    axes.set(xscale="log", yscale="log")
    for name, (steps, values) in curves.items():
        kept = [i for i, value in enumerate(values) if value > 0]
        curve = [steps[i] for i in kept], [values[i] for i in kept]
        _draw_curve(axes, curve, label=name)
    if limits:
        axes.plot(*zip(*limits, strict=True), "_k", ms=24, mew=2, label="limit")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", frameon=False)
    return figure


@matplotlib.style.context(STYLE)
def outcomes(sides: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> Figure:
    """The scores of many runs of some sides, a dot each.

    Args:
        sides: by side, from the top, its scores by outcome, such as ``healthy``; the
            first outcome's mean is marked.
        xlabel: what the scores are.
    """
    figure = Figure((8, 1.5 + 1.5 * len(sides)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for side in sides.values() for name in side))
    for row, side in enumerate(sides.values()):
        for index, name in enumerate(side):
            scores = np.sort(side[name])
            # Neighbours in score stand one over the other, so that few dots overlap.
            place = np.arange(len(scores)) % 9 - min(len(scores) - 1, 8) / 2
            # Named "C0", a colour would be looked up when drawn, in another style.
            colour, label = to_hex(f"C{names.index(name)}"), None if row else name
            axes.plot(
                scores, row + 0.08 * place, "o", color=colour, alpha=0.7, label=label
            )
            if index == 0 and len(scores):
                axes.plot([scores.mean()] * 2, [row - 0.4, row + 0.4], "k", lw=1.5)
    axes.set_yticks(range(len(sides)), list(sides))
    axes.set_ylim(len(sides) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", visible=False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower left", frameon=False, ncols=len(names)
    )
    return figure


@matplotlib.style.context(STYLE)
def seeds(curves: Mapping[str, Sequence[Curve]], loss_name: str = "MSE") -> Figure:
    """The training losses of many seeds, a thin line each, in their outcome's colour.

    Args:
        curves: by outcome, such as ``healthy``, the epochs and losses of its seeds.
        loss_name: what the loss is; shown in the title.
    """
    figure = Figure((8, 5.5), dpi=DPI, layout="constrained")
    axes = _loss_axes(figure)
    num_seeds = sum(map(len, curves.values()))
    axes.set_title(f"{loss_name} per epoch, {num_seeds} seeds", loc="left")
    for index, (outcome, of_it) in enumerate(curves.items()):
        for epochs, losses in of_it:
            colour = to_hex(f"C{index}")
            (line,) = axes.plot(
                epochs, losses, color=colour, lw=1, alpha=0.6, marker="o", ms=2
            )
        if of_it:
            line.set_label(f"{outcome} ({len(of_it)})")
    figure.legend(loc="outside lower left", frameon=False, ncols=len(curves))
    return figure


@matplotlib.style.context(STYLE)
def shares(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """How often the runs of some settings ended in each outcome, a bar a setting.

    Args:
        counts: by setting, from the top, the number of runs of each outcome.
    """
    figure = Figure((8, 1.5 + 0.4 * len(counts)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    totals = np.array([sum(of_it.values()) for of_it in counts.values()])
    left = np.zeros(len(counts))
    for index, outcome in enumerate(next(iter(counts.values()))):
        width = np.array([of_it[outcome] for of_it in counts.values()]) / totals
        colour = to_hex(f"C{index}")
        axes.barh(list(counts), width, left=left, color=colour, label=outcome)
        left += width
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of runs")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", frameon=False, ncols=NUM_COLOURS)
    return figure


@matplotlib.style.context(STYLE)
def scaling(panels: Mapping[str, Sequence[Mapping[str, int | float]]]) -> Figure:
    """How a cost grows, on logarithmic axes, each beside its ideal as a dashed line.

    Args:
        panels: by title, points with ``x``, ``y`` and ``ideal``.
    """
    num_rows = math.ceil(len(panels) / 2)
    figure = Figure((10, 4 * num_rows), dpi=DPI, layout="constrained")
    for index, (title, points) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, 2, index)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set(xscale="log", yscale="log")
        x = [point["x"] for point in points]
        axes.plot(x, [point["ideal"] for point in points], "--", color="0.5", lw=1.5)
        axes.plot(x, [point["y"] for point in points], marker="o")
        low, high = axes.get_ylim()
        if high < 4 * low:  # what is flat shall look flat
            middle = math.sqrt(low * high)
            axes.set_ylim(middle / 2, 2 * middle)
    return figure


@matplotlib.style.context("default")
def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; the same figure gives the same bytes.

    Written beside its place and then renamed, so at ``path`` there is never half a
    file, and after a failure the file that was there before.

    Args:
        figure: what the functions above return.
        path: where to; its folder exists.

    Raises:
        OSError: the folder is missing, full or closed to us.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(beside, format="png", metadata={"Software": None})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
