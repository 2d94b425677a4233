"""Figures from arrays: what was learnt, as pictures and as curves.

The only importer of matplotlib. Each function returns a ``Figure`` of its own: there is
no pyplot, and so no global state, no window system and nothing to close. A user's
matplotlibrc has no say: the same arrays give the same picture.

Images are [n, H, W, C]; drawn on a grey map from black (0) to white (1) if C is 1, in
colour if it is 3; uint8, or floats in [0, 1]; what lies outside is clipped. Titles and
axis labels are the tutorial's.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib.style
import numpy as np
from jaxtyping import Float, Integer, UInt8
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from ae_jax.errors import UserError
from ae_jax.files import write_file

Images: TypeAlias = UInt8[np.ndarray, "n H W C"] | Float[np.ndarray, "n H W C"]
Curve: TypeAlias = tuple[Sequence[int], Sequence[float]]
"""Numbers of the epochs or steps, and a value for each."""

DPI = 150

# Blue, orange and red first: they are those of the outcomes, and the colour-blind can
# tell them apart.
COLOURS = ("#0072b2", "#e69f00", "#c1272d", "#009e73", "#cc79a7", "#56b4e9")
STYLE = (
    "default",
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "figure.constrained_layout.h_pad": 0.12,
        "figure.constrained_layout.w_pad": 0.12,
        "figure.dpi": DPI,
        "font.size": 11,
        "grid.color": "0.9",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.markersize": 5,
    },
)
SIDE = 112 / DPI
"""The longer side of an image, in inches: in pixels a multiple of 28 and of 8."""

MAX_LEGEND = 20
"""Classes that a legend has room for."""

METADATA: dict[str, dict[str, str | None]] = {
    "pdf": {"CreationDate": None},
    "png": {"Software": "ae_jax"},
    "svg": {"Date": None},
}
"""The formats; None leaves out what would differ from one day or version to another."""


@matplotlib.style.context(STYLE)
def samples(images: Images) -> Figure:
    """Training images in the largest full grid that they fill, at most 5×5.

    Args:
        images: drawn in their order, row by row; those left over are not.

    Raises:
        ValueError: there are none.
    """
    sizes = [(m, n) for n in range(1, 6) for m in range(1, n + 1)]
    full = [size for size in sizes if math.prod(size) <= len(images)]
    rows, columns = max(full, key=math.prod, default=(1, 0))
    return _draw_rows(
        [("", images[row * columns : (row + 1) * columns]) for row in range(rows)]
    )


@matplotlib.style.context(STYLE)
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


@matplotlib.style.context(STYLE)
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


@matplotlib.style.context(STYLE)
def image_rows(rows: Mapping[str, Images]) -> Figure:
    """Rows of equally many images, each under its title.

    Raises:
        ValueError: there are no images.
    """
    return _draw_rows([*rows.items()])


@matplotlib.style.context(STYLE)
def latents(
    latents: Float[np.ndarray, "N K"], labels: Integer[np.ndarray, "N"]
) -> Figure:
    """Latents as dots, a colour and a marker for each class.

    One unit is drawn against the class, two and three are the axes; of more, the axes
    are the two directions in which they vary most (principal components).

    Args:
        latents: of N images.
        labels: their classes.
    """
    names = [f"Latent unit {i}" for i in range(latents.shape[1])]
    if len(names) == 1:
        latents, names = np.stack([latents[:, 0], labels], axis=1), [*names, "Class"]
    elif len(names) > 3:
        centred = latents - latents.mean(axis=0)
        latents = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        names = [f"Principal component {i} of the latents" for i in (1, 2)]
    figure = Figure((8, 6), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d" if len(names) == 3 else None)
    classes = _draw_classes(axes, latents, labels, size=5)
    for axis, name in zip("xyz", names, strict=False):
        axes.set(**{f"{axis}label": name})
    if len(classes) <= MAX_LEGEND:
        figure.legend(title="Class", loc="outside right upper")
    return figure


@matplotlib.style.context(STYLE)
def planes(
    latents: Mapping[str, Float[np.ndarray, "N 2"]], labels: Integer[np.ndarray, "N"]
) -> Figure:
    """The same images in several planes, side by side, a colour for each class.

    Each class is named where the median of its images lies.

    Args:
        latents: where they lie in each plane, by its name.
        labels: their classes.
    """
    figure = Figure((4.5 * len(latents), 4.8), layout="constrained")
    panels = figure.subplots(1, len(latents), squeeze=False)[0]
    outline = [patheffects.withStroke(linewidth=3, foreground="white")]
    style: Any = {"ha": "center", "va": "center", "path_effects": outline}
    for (name, dots), axes in zip(latents.items(), panels, strict=True):
        for label in _draw_classes(axes, dots, labels, size=2):
            place = np.median(dots[labels == label], axis=0)
            axes.text(*place, str(label), **style)
        axes.set(title=name, xticks=[], yticks=[])
    return figure


def _draw_classes(
    axes: Any,
    latents: Float[np.ndarray, "N K"],
    labels: Integer[np.ndarray, "N"],
    size: int,
) -> Integer[np.ndarray, "M"]:
    """Dots of each class in turn; which classes there are."""
    classes = np.unique(labels)
    for number, label in enumerate(classes):
        style = "os^D"[number // len(COLOURS) % 4]
        dots = latents[labels == label].T
        axes.plot(*dots, style, alpha=0.6, mew=0, ms=size, label=str(label))
    return classes


# By its name pytest would take it for a test.
test_reconstructions.__test__ = False  # type: ignore[attr-defined]


def _draw_rows(rows: Sequence[tuple[str, Images]]) -> Figure:
    """Rows of equally many images, from the top, each under its title if it has one."""
    num_columns = len(rows[0][1])
    if num_columns == 0:
        raise ValueError("there are no images to draw")
    scale = SIDE / max(rows[0][1].shape[1:3])
    height, width = (scale * length for length in rows[0][1].shape[1:3])
    gap, head = 0.1, 0.25 if any(title for title, _ in rows) else 0.0
    right, down = num_columns * (width + gap), len(rows) * (head + height + gap)
    across = max(right, 1.6 if head else 0)  # a title may be wider than a lone image
    figure = Figure((across, down))
    figure.subplots_adjust(
        left=gap / 2 / across,
        right=(right - gap / 2) / across,
        bottom=gap / 2 / down,
        top=1 - (gap / 2 + head) / down,
        wspace=gap / width,
        hspace=(gap + head) / height,
    )
    grid = figure.subplots(len(rows), num_columns, squeeze=False)
    for (title, images), row in zip(rows, grid, strict=True):
        for image, axes in zip(images, row, strict=True):
            white = 255 if image.dtype == np.uint8 else 1
            shown = np.clip(image, 0, white)
            shown = shown[..., 0] if shown.shape[-1] == 1 else shown
            axes.imshow(shown, cmap="gray", vmin=0, vmax=white)
            axes.set_axis_off()
        row[0].set_title(title, fontsize=10)
    return figure


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
        loss_name: what the loss is.
        validation: loss of each on the held-out images, if some are.
    """
    figure = Figure((8, 5), layout="constrained")
    axes = _loss_axes(figure, loss_name)
    _draw_curve(axes, (epochs, losses), label="training")
    if validation is not None:
        _draw_curve(axes, (epochs, validation), label="validation")
        axes.legend()
    return figure


@matplotlib.style.context(STYLE)
def loss_curves(curves: Mapping[str, Curve], loss_name: str = "") -> Figure:
    """The training losses of several runs over each other.

    Args:
        curves: for each run, by name, its epochs and their losses. Colours and
            dashes repeat after twelve.
        loss_name: what the loss is, if it is one and the same.
    """
    labels = [textwrap.fill(name, width=80) for name in curves]
    num_lines = sum(label.count("\n") + 1 for label in labels)
    # The curves keep their size, and each line of the legend adds to the height.
    figure = Figure((8, 5 + 0.25 * num_lines), layout="constrained")
    axes = _loss_axes(figure, loss_name)
    lines = [
        _draw_curve(axes, curve, linestyle=("-", "--")[index // len(COLOURS) % 2])
        for index, curve in enumerate(curves.values())
    ]
    # Below the axes there is room for long names, and no curve to hide.
    legend = figure.legend(lines, labels, loc="outside lower left", handlelength=4)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold dollar signs
    return figure


@matplotlib.style.context(STYLE)
def seeds(curves: Mapping[str, Sequence[Curve]], loss_name: str = "MSE") -> Figure:
    """The training losses of many seeds, a thin line each, in their outcome's colour.

    Args:
        curves: by outcome, such as ``healthy``, the epochs and losses of its seeds.
        loss_name: what the loss is.
    """
    figure = Figure((7, 4.5), layout="constrained")
    axes = _loss_axes(figure, loss_name)
    for colour, (outcome, chosen) in zip(COLOURS, curves.items(), strict=False):
        number = len(chosen)
        label: str | None = f"{outcome}, {number} seed{'s' * (number != 1)}"
        for epochs, losses in chosen:
            mark = "o-" if len(epochs) == 1 else "-"  # a single epoch has no line
            (line,) = axes.plot(epochs, losses, mark, color=colour, label=label)
            line.set(linewidth=1, markersize=2, alpha=0.6)
            label = None
    legend = figure.legend(loc="outside lower left", ncols=len(curves))
    for line in legend.get_lines():
        line.set(linewidth=3, alpha=1)
    return figure


def _loss_axes(figure: Figure, loss_name: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_xlabel("Number of epochs")
    axes.set_ylabel(f"Training Loss ({loss_name})" if loss_name else "Training Loss")
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
    curves: Mapping[str, Curve], ylabel: str, limits: Sequence[tuple[int, float]] = ()
) -> Figure:
    """How two trainings drift apart, on logarithmic axes.

    Args:
        curves: by name, steps from 1 on and the difference after each; a difference of
            0, which has no logarithm, is left out.
        ylabel: what differs.
        limits: step and largest difference allowed there.
    """
    figure = Figure((8, 5.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_xlabel("Number of steps")
    axes.set_ylabel(ylabel)
    for name, (steps, values) in curves.items():
        kept = [i for i, value in enumerate(values) if value > 0]
        curve = [steps[i] for i in kept], [values[i] for i in kept]
        _draw_curve(axes, curve, label=name)
    if limits:
        axes.plot(*zip(*limits, strict=True), "_k", ms=24, mew=2, label="limit")
    figure.legend(loc="outside lower left", ncols=2)
    return figure


@matplotlib.style.context(STYLE)
def outcomes(sides: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str) -> Figure:
    """The scores of many runs of some sides, a dot each.

    Args:
        sides: by side, from the top, its scores by outcome, such as ``healthy``; the
            first outcome's mean is marked.
        xlabel: what the scores are.
    """
    figure = Figure((8, 1.5 + 1.2 * len(sides)), layout="constrained")
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for side in sides.values() for name in side))
    for name, colour in zip(names, COLOURS, strict=False):
        dots = [
            (score, row + _spread(place))
            for row, side in enumerate(sides.values())
            for place, score in enumerate(sorted(side.get(name, ())))
        ]
        x, y = zip(*dots, strict=True) if dots else ((), ())
        axes.plot(x, y, "o", color=colour, alpha=0.7, mew=0, label=name)
    means = [
        (float(np.mean(side[names[0]])), row)
        for row, side in enumerate(sides.values())
        if side.get(names[0])
    ]
    if means:
        label = f"mean, {names[0]}"
        axes.plot(*zip(*means, strict=True), "Dk", ms=8, mec="white", label=label)
    axes.set_yticks(range(len(sides)), list(sides))
    axes.set_ylim(len(sides) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=len(names) + 1)
    return figure


def _spread(place: int) -> float:
    """A height in ±0.3, neighbours' far apart, so that few dots overlap."""
    golden = (math.sqrt(5) - 1) / 2
    return 0.6 * ((0.5 + place * golden) % 1 - 0.5)


@matplotlib.style.context(STYLE)
def shares(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """How often the runs of some settings ended in each outcome, a bar a setting.

    Args:
        counts: by setting, from the top, the number of runs of each outcome.
    """
    figure = Figure((8, 1.5 + 0.4 * len(counts)), layout="constrained")
    axes = figure.add_subplot()
    totals = np.array([sum(setting.values()) for setting in counts.values()])
    left = np.zeros(len(counts))
    for index, outcome in enumerate(next(iter(counts.values()))):
        width = np.array([setting[outcome] for setting in counts.values()]) / totals
        axes.barh(list(counts), width, left=left, label=outcome, color=COLOURS[index])
        left += width
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("Share of runs")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=len(COLOURS))
    return figure


@matplotlib.style.context(STYLE)
def bars(values: Mapping[str, float], xlabel: str, limit: tuple[str, float]) -> Figure:
    """One number of each contender, the first one's in a colour of its own.

    Args:
        values: by contender, from the top.
        xlabel: what they are, with the unit.
        limit: a name, and the least that is possible; a line across all bars.
    """
    figure = Figure((8, 1.4 + 0.4 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    colours = [COLOURS[0], *["0.7"] * (len(values) - 1)]
    drawn = axes.barh(list(values), list(values.values()), color=colours)
    axes.bar_label(drawn, fmt="{:.3g}", padding=4)
    axes.axvline(
        limit[1], color="k", ls="--", lw=1.5, label=f"{limit[0]}, {limit[1]:.3g}"
    )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper right")
    return figure


@matplotlib.style.context(STYLE)
def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Curves over one axis, each with a marker of its own.

    Args:
        curves: x and y of each, by its name.
        xlabel: what they are over.
        ylabel: what they are of, with its unit.
    """
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    for number, (name, curve) in enumerate(curves.items()):
        axes.plot(*curve, marker="os^Dv"[number % 5], label=name)
    axes.legend()
    return figure


class Panel(NamedTuple):
    """How a cost grows, for :func:`scaling`.

    Attributes:
        xlabel: what grows.
        ylabel: the cost, with its unit.
        x: sizes.
        y: the cost of each.
        ideal: what it would be if it grew as the work does.
    """

    xlabel: str
    ylabel: str
    x: Sequence[float]
    y: Sequence[float]
    ideal: Sequence[float]


@matplotlib.style.context(STYLE)
def scaling(panels: Sequence[Panel]) -> Figure:
    """How costs grow, on logarithmic axes, each beside its ideal as a dashed line.

    Args:
        panels: one for each cost.
    """
    num_columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure((4.2 * num_columns, 3.2 * num_rows + 0.4), layout="constrained")
    for index, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, index)
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel(panel.ylabel)
        axes.plot(panel.x, panel.ideal, "--", color="0.5", lw=1.5, label="ideal")
        axes.plot(panel.x, panel.y, marker="o", label="measured")
        axes.set_xticks(panel.x[:: 1 + len(panel.x) // 5])  # few enough for labels
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        if high < 4 * low:  # what is flat shall look flat
            middle = math.sqrt(low * high)
            axes.set_ylim(middle / 2, 2 * middle)
        subs = (1, 2, 5) if high < 100 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(NullFormatter())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.10g}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


@matplotlib.style.context(("default", {"svg.hashsalt": "ae_jax"}))
def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its path's ending; equal figures, equal bytes.

    Written beside its place and then renamed, so at ``path`` there is never half a
    file, and after a failure the file that was there before.

    Args:
        figure: what the functions above return.
        path: where to, ending in .png, .pdf or .svg; its folder exists.

    Raises:
        UserError: another ending.
        OSError: the folder is missing, full or closed to us.
    """
    ending = path.suffix.removeprefix(".").lower()
    if ending not in METADATA:
        raise UserError(f"{path}: a figure's name ends in .png, .pdf or .svg")
    metadata = METADATA[ending]
    write_file(path, lambda f: figure.savefig(f, format=ending, metadata=metadata))
