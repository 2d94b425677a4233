"""The comparison with PyTorch as one page: from its files to its figures and HTML.

Everything comes from the two dictionaries that a comparison leaves as config.json and
parity.json, and the page holds its figures: nothing is loaded from elsewhere. NumPy
alone: neither JAX nor PyTorch is imported.
"""

import base64
import html
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ae_jax import figures, parity

Found = Mapping[str, Any]
"""What a comparison found, as parity.json has it."""

SIDES = {"ours": "ours", "theirs": "PyTorch"}

DRIFT = {
    "ours": "ours beside PyTorch",
    "optax": "ours with Optax's own bias correction beside PyTorch",
    "threads": "PyTorch on two threads beside PyTorch on one",
}

CONTENDERS = {
    "ours": "ours",
    "item_by_item": "PyTorch, item by item as in the tutorial",
    "data_loader": "PyTorch, a DataLoader over tensors",
    "in_memory": "PyTorch, images in memory",
    "fused": "PyTorch, in memory, fused Adam",
    "compiled": "PyTorch, in memory, fused Adam, torch.compile",
}


class Pitfall(NamedTuple):
    """A place where ports go wrong.

    Attributes:
        place: what it is about.
        danger: what happens there.
        answer: what we do.
        test: which test holds us to it, ``file::name``.
    """

    place: str
    danger: str
    answer: str
    test: str


PITFALLS = [
    Pitfall(
        "Weights' layout",
        "PyTorch stores a weight as [out, in], Linen a kernel as [in, out]; a square "
        "one fits either way.",
        "Transposed in one module, exact to the bit both ways.",
        "tests/test_interop.py::test_both_sides_compute_the_same",
    ),
    Pitfall(
        "Initialisation",
        "Flax draws kernels of three times the variance, and zero biases; the collapse "
        "of the tutorial's code then hides.",
        "Kernel and bias uniform in ±1/√fan_in.",
        "tests/test_parity.py::test_initial_weights_have_pytorchs_distribution",
    ),
    Pitfall(
        "Adam's epsilon",
        "1e-7 in Keras, inside the root in some texts.",
        "1e-8, outside the root.",
        "tests/test_train.py::test_optimiser_is_torchs",
    ),
    Pitfall(
        "Adam's bias correction",
        "Left out, counted from 0, or rounded: 1 − βᵗ in float32 is off by 1e-5 in "
        "the first steps, which is Optax's way.",
        "−expm1(t log β).",
        "tests/test_parity.py::test_bias_correction_is_exact_in_single_precision",
    ),
    Pitfall(
        "Loss reduction",
        "A sum over pixels in place of the mean: Adam hides the factor of 784, but for "
        "its epsilon.",
        "The mean over pixels, then over the batch.",
        "tests/test_losses.py::test_loss_equals_torchs",
    ),
    Pitfall(
        "Running loss",
        "The mean over images, or of the losses after the update.",
        "The mean of the batches' means from before their updates.",
        "tests/test_parity.py::test_running_loss_is_the_mean_of_the_batches_means",
    ),
    Pitfall(
        "Short last batch",
        "Dropped, or padded and divided by 64: 32 images count too little or not.",
        "Padded with images of weight 0, divided by the sum of the weights.",
        "tests/test_train.py::test_images_of_weight_zero_do_not_count",
    ),
    Pitfall(
        "Number of batches",
        "937 where the last one is dropped.",
        "938, the last of 32.",
        "tests/test_train.py::test_938_batches_the_last_of_32",
    ),
    Pitfall(
        "Reshuffling",
        "One order for all epochs.",
        "An order of its own for each epoch, from seed and epoch.",
        "tests/test_train.py::test_each_epoch_and_each_seed_has_an_order_of_its_own",
    ),
    Pitfall(
        "Input scaling",
        "0 to 255, or the tutorial's Normalize, which it defines and never uses.",
        "Divided by 255, equal to PyTorch's to one rounding.",
        "tests/test_parity.py::test_pixels_are_pytorchs_to_one_rounding",
    ),
    Pitfall(
        "ReLU at 0",
        "The gradient of jnp.maximum(x, 0) there is ½, PyTorch's is 0.",
        "nn.relu, whose gradient is 0.",
        "tests/test_losses.py::test_gradient_of_relu_at_zero_is_zero_as_in_torch",
    ),
    Pitfall(
        "Precision",
        "A float32 constant or cast inside a float64 program, which rounds silently.",
        "One number format from the parameters to the metrics.",
        "tests/test_train.py::test_double_precision_reaches_the_optimiser_and_the_metrics",
    ),
]

CATCHES = "tests/test_parity.py::test_parity_catches_the_bug"
"""The test of the tests: each of these bugs injected makes the lockstep fail."""


def draw(found: Found, folder: Path) -> None:
    """Draw the page's figures.

    Args:
        found: by the comparison.
        folder: for their PNGs.
    """
    lockstep = {
        name: (
            [row["step"] for row in found["whole"]],
            [row[key] for row in found["whole"]],
        )
        for key, name in {
            "params_nrel": "parameters",
            "mu_nrel": "Adam's first moment",
            "nu_nrel": "Adam's second moment",
            "loss_rel": "loss of a batch, the largest",
        }.items()
    }
    ends = {row["step"] for row in found["whole"]}
    limits = [
        (row["step"], row["limit"])
        for row in found["checks"]
        if row.get("step") in ends
    ]
    drift = {
        name: (
            list(range(1, len(found["drift"][key]) + 1)),
            np.maximum.accumulate(found["drift"][key]).tolist(),
        )
        for key, name in DRIFT.items()
    }
    runs = {name: _by_outcome(found[side]) for side, name in SIDES.items()}
    drawn = {
        "lockstep": figures.divergence(
            lockstep, "Relative difference in float64", limits
        ),
        "drift": figures.divergence(
            drift, "Relative difference of the loss in float32, largest so far"
        ),
        "distributions": figures.outcomes(runs, "Test MSE"),
    }
    for name, figure in drawn.items():
        figures.save(figure, folder / f"{name}.png")


def _by_outcome(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The test MSE of runs, by what became of their code."""
    outcomes: dict[str, list[float]] = {"healthy": [], "part-dead": [], "collapsed": []}
    for row in rows:
        dead = "part-dead" if row["code/dead_units"] else "healthy"
        outcomes["collapsed" if row["code/collapsed"] else dead].append(row["test/mse"])
    return outcomes


STYLE = """
body { max-width: 52rem; margin: 3rem auto; padding: 0 1.5rem; color: #222;
  font: 17px/1.55 Georgia, "Times New Roman", serif; }
h1, h2, h3, table { font-family: system-ui, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; } h2 { margin-top: 3rem; }
table { border-collapse: collapse; font-size: 0.82rem; margin: 1.2rem 0; width: 100%; }
th { text-align: left; border-bottom: 2px solid #444; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; vertical-align: top; }
td { border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
img { width: 100%; margin: 0.5rem 0; } .failed { color: #b00020; font-weight: bold; }
code { font-size: 0.9em; }
"""


def page(description: Found, found: Found, folder: Path) -> str:
    """The page, self-contained.

    Args:
        description: of the run, as config.json has it.
        found: in it.
        folder: of the figures that :func:`draw` has drawn.
    """

    def picture(name: str) -> str:
        encoded = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{name}" src="data:image/png;base64,{encoded}">'

    config = description["config"]
    parts = [
        _on_top(description, found),
        _on_layers(found),
        _on_lockstep(found) + picture("lockstep"),
        _on_drift(found) + picture("drift"),
        _on_runs(config, found) + picture("distributions"),
        _on_speed(description, found),
        _on_pitfalls(),
    ]
    title = "Our training against PyTorch's"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}'
        f"</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f"{''.join(parts)}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are HTML."""

    def line(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def _paragraphs(*texts: str) -> str:
    """Plain texts, a paragraph each."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _on_top(description: Found, found: Found) -> str:
    """What was compared, where, and what came of it."""
    config, versions = description["config"], description["versions"]
    model, train, device = config["model"], config["train"], description["device"]
    widths = "-".join(map(str, (*model["hidden"], model["code_width"])))
    text = (
        f"A deep autoencoder ({math.prod(description['data']['shape'])}-{widths} and "
        f"back) on {config['data']['name']}, trained by Adam at "
        f"{train['learning_rate']:g} in batches of {train['batch_size']}: by our train "
        f"step in JAX {versions['jax']}, and by PyTorch {versions['torch']}, on "
        f"{device['cpu_cores']} cores of {device['cpu_model']}. All numbers are in "
        "parity.json beside this page."
    )
    rows = [
        [
            html.escape(row["what"]),
            f"{row['value']:.1e}" if row["value"] else "0",
            f"{row['limit']:.0e}" if row["limit"] else "0",
            "passed" if row["passed"] else '<span class="failed">FAILED</span>',
        ]
        for row in found["checks"]
    ]
    best, item = found["ratios"]["best"], found["ratios"]["item_by_item"]
    speed = (
        f"An epoch takes PyTorch {_spread(best)} times as long as us where it is "
        f"fastest, and {_spread(item)} times written as in the tutorial."
    )
    in_words = parity.verdict(found["runs"], config["margin"])[0]
    checked = _table(["Checked", "Found", "Allowed", ""], rows)
    return _paragraphs(text) + checked + _paragraphs(in_words, speed)


def _spread(ratio: Mapping[str, float]) -> str:
    """A ratio with its range over the rounds."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _on_layers(found: Found) -> str:
    exact = all(layers["exact"] for layers in found["layers"].values())
    body = _paragraphs(
        "From the same weights, one batch goes through both sides: the output of each "
        "layer, before its activation, and the gradient of each tensor. Shown are the "
        "largest difference, and the difference's norm over the norm of PyTorch's.",
        "The weights came back from PyTorch's model "
        + ("equal in every bit." if exact else "changed: the conversion is wrong."),
    )
    double, single = (found["layers"][name] for name in ("float64", "float32"))
    for part, title in (("forward", "Output"), ("gradient", "Gradient")):
        rows = [
            [f"<code>{a['name']}</code>"]
            + [f"{row[key]:.1e}" for row in (a, b) for key in ("abs", "nrel")]
            for a, b in zip(double[part], single[part], strict=True)
        ]
        body += _table([title, "float64", "relative", "float32", "relative"], rows)
    return f"<h2>One batch, layer by layer</h2>{body}"


def _on_lockstep(found: Found) -> str:
    columns = {
        "params_abs": "Parameters",
        "params_nrel": "relative",
        "mu_abs": "First moment",
        "mu_nrel": "relative",
        "nu_abs": "Second moment",
        "nu_nrel": "relative",
        "loss_rel": "Loss, relative",
    }
    rows = [
        [
            f"{row['step']:,}",
            *(f"{row[key]:.1e}" for key in columns),
            f"{abs(row['ours/test/mse'] - row['theirs/test/mse']):.1e}",
        ]
        for row in (*found["mini"], *found["whole"])
    ]
    text = (
        "Both sides start from our weights and take our batches. In exact arithmetic "
        "they would stay equal for ever; in float64 they part by rounding alone, which "
        "grows while they train. A porting bug parts them at once. The first rows are "
        "of a mini set of three and a half batches, epoch by epoch; the others of the "
        "whole training split."
    )
    body = _paragraphs(text) + _table(["Steps", *columns.values(), "Test MSE"], rows)
    return f"<h2>Lockstep in float64</h2>{body}"


def _on_drift(found: Found) -> str:
    curves = {name: np.array(found["drift"][key]) for key, name in DRIFT.items()}
    length = min(map(len, curves.values()))
    marks = [n for n in (10, 30, 100, 300) if n < length] + [length]
    rows = [
        [html.escape(name), *(f"{curve[:n].max():.1e}" for n in marks)]
        for name, curve in curves.items()
    ]
    text = (
        "In float32 rounding is half a billion times coarser, and the same growth "
        "makes them two different trainings within an epoch or two. PyTorch parts from "
        "itself in the same way: two threads add up in another order than one. Optax's "
        "bias correction, 1 − βᵗ in float32, disturbs more than all other rounding; "
        "ours, −expm1(t log β), does not, at no cost."
    )
    header = ["Largest relative difference of a loss within steps", *map(str, marks)]
    return f"<h2>Drift in float32</h2>{_paragraphs(text)}{_table(header, rows)}"


def _on_runs(config: Found, found: Found) -> str:
    rows = []
    for side, name in SIDES.items():
        runs = found["runs"][side]
        counts = [str(runs[k]) for k in ("runs", "healthy", "part_dead", "collapsed")]
        scores = ["–" if runs[k] is None else f"{runs[k]:.5f}" for k in ("mean", "sd")]
        rows.append([name, *counts, *scores])
    header = ["", "runs", "healthy", "part-dead", "collapsed", "mean test MSE", "sd"]
    num_epochs = config["train"]["num_epochs"]
    text = (
        f"Seeds 0 to {config['num_seeds'] - 1} a side, trained for {num_epochs} "
        f"epoch{'s' * (num_epochs > 1)}, weights and order drawn by each side's own "
        "generator: single runs cannot be compared, their distributions can. A run is "
        "healthy if every unit of its code is in use on the test split; mean and sd "
        "are of healthy runs. Fixed beforehand were the seeds, of which none is left "
        "out, and the difference in mean test MSE that counts as none, "
        f"±{config['margin']:.0%}."
    )
    words = parity.verdict(found["runs"], config["margin"])
    body = _paragraphs(text) + _table(header, rows) + _paragraphs(*words)
    return f"<h2>Many seeds, each with draws of its own</h2>{body}"


def _on_speed(description: Found, found: Found) -> str:
    rounds, steps = found["speed"], description["config"]["speed_steps"]
    rows = []
    for key in rounds[0]["epoch_s"]:
        seconds = [row["epoch_s"][key] for row in rounds]
        ratio = _spread(found["ratios"][key]) if key != "ours" else ""
        times = [f"{f(seconds):.2f}" for f in (statistics.median, min, max)]
        rows.append([CONTENDERS[key], *times, ratio])
    header = ["seconds per epoch", "median", "least", "most", "times ours (range)"]
    threads = " or ".join(str(n) for n in sorted({row["threads"] for row in rounds}))
    text = (
        f"In one process, in {len(rounds)} rounds: in each, all take {steps} steps one "
        "after the other, scaled to an epoch, and the ratios are within the round. "
        f"Whatever compiles has done so before. PyTorch ran on {threads} of "
        f"{description['device']['cpu_cores']} threads, the number it was faster with."
    )
    failed = rounds[0]["failed"]
    missing = [f"torch.compile does not work here: {failed}"] if failed else []
    ours, theirs = (found["memory"][name] / 2**20 for name in SIDES)
    memory = (
        f"Peak memory: ours {ours:,.0f} MiB, PyTorch's {theirs:,.0f} MiB, of the whole "
        "command for one epoch in a process of its own, imports, scores and figures "
        "included."
    )
    body = _paragraphs(text) + _table(header, rows) + _paragraphs(*missing, memory)
    return f"<h2>Speed and memory</h2>{body}"


def _on_pitfalls() -> str:
    rows = [
        [*map(html.escape, pitfall[:3]), f"<code>{_breakable(pitfall.test)}</code>"]
        for pitfall in PITFALLS
    ]
    header = ["Where", "What goes wrong", "Here", "Held by the test"]
    text = (
        "<p>And that the lockstep notices such bugs is tested by injecting them, one "
        f"by one: <code>{_breakable(CATCHES)}</code>.</p>"
    )
    return f"<h2>Where ports go wrong</h2>{_table(header, rows)}{text}"


def _breakable(name: str) -> str:
    """A long name that may be broken at its underscores."""
    return re.sub(r"(_|::)", r"\1<wbr>", name)
