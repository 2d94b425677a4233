"""The comparison with PyTorch as one page: from its files to its figures and HTML.

Everything comes from what a comparison leaves as summary.json; the page,
``report.html.j2``, holds its figures and loads nothing from elsewhere.
"""

import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ae_jax import collapse, plots
from ae_jax.runs.folder import Description
from ae_jax.stats import ALPHA, TRIM, share_interval

Found = Mapping[str, Any]
"""What a comparison found, as its summary.json has it."""

SIDES = {"ours": "ours", "theirs": "PyTorch"}

DRIFT = {
    "ours": "ours beside PyTorch",
    "threads": "PyTorch on two threads beside PyTorch on one",
}

CURVES = {
    "params_nrel": "parameters",
    "mu_nrel": "Adam's first moment",
    "nu_nrel": "Adam's second moment",
    "loss_rel": "loss of a batch, the largest",
}


def draw(found: Found, folder: Path) -> None:
    """Draw the page's figures.

    Args:
        found: by the comparison.
        folder: for their PNGs.
    """
    whole = found["whole"]
    steps = [row["step"] for row in whole]
    lockstep = {name: (steps, [r[key] for r in whole]) for key, name in CURVES.items()}
    limits = [
        (row["step"], row["limit"]) for row in found["checks"] if row["step"] in steps
    ]
    drift = {}
    for key, name in DRIFT.items():
        largest = np.maximum.accumulate(found["drift"][key]).tolist()
        drift[name] = (list(range(1, len(largest) + 1)), largest)
    by_outcome = collapse.scores_by_outcome
    runs = {name: by_outcome(found[side]) for side, name in SIDES.items()}
    of_loss = "Relative difference of the loss in float32, largest so far"
    drawn = {
        "lockstep": plots.divergence(
            lockstep, "Relative difference in float64", limits
        ),
        "drift": plots.divergence(drift, of_loss),
        "distributions": plots.outcomes(runs, "Test MSE"),
    }
    for name, figure in drawn.items():
        plots.save(figure, folder / f"{name}.png")


def page(
    description: Description, options: Mapping[str, Any], found: Found, folder: Path
) -> str:
    """The page, self-contained.

    Args:
        description: of one of PyTorch's runs.
        options: the comparison's, as study.json has them.
        found: in it.
        folder: of the figures that :func:`draw` has drawn.
    """
    pictures = {
        path.stem: base64.b64encode(path.read_bytes()).decode()
        for path in folder.glob("*.png")
    }
    drift = {name: np.array(found["drift"][key]) for key, name in DRIFT.items()}
    length = min(map(len, drift.values()))
    marks = [n for n in (10, 30, 100, 300) if n < length] + [length]
    template = _environment().get_template("report.html.j2")
    return template.render(
        description=description,
        config=options,
        found=found,
        pictures=pictures,
        sides=SIDES,
        marks=marks,
        drift={name: [curve[:n].max() for n in marks] for name, curve in drift.items()},
        mean_verdict=mean_verdict(found["runs"], options["margin"]),
        alpha=ALPHA,
        trim=TRIM,
    )


def _environment() -> jinja2.Environment:
    """Jinja, strict about what it is given, and how the page writes its numbers."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "small": lambda value: f"{value:.1e}" if value else "0",
        "percent": lambda value: f"{value:.0%}",
        "share_interval": lambda counts: share_interval(*counts),
    }
    environment.filters.update(filters)
    return environment


def mean_verdict(runs: Found, margin: float) -> str:
    """What :func:`ae_jax.stats.compare_runs` says of the runs' test MSE, in words.

    Args:
        runs: its outcome.
        margin: the one it was given.
    """
    if runs["low"] is None:
        return "Too few healthy runs to compare their test MSE."
    within = f"within ±{margin:.0%}"
    seen = (
        f"The trimmed mean test MSE of our {runs['ours']['healthy']} healthy runs "
        f"differs from that of PyTorch's {runs['theirs']['healthy']} by "
        f"{runs['difference']:+.1%} "
        f"(90% interval {runs['low']:+.1%} to {runs['high']:+.1%}; TOST p = "
        f"{runs['tost_p']:.2g})"
    )
    if runs["tost_p"] < ALPHA:
        return f"{seen}: equal to {within}."
    if runs["low"] > 0 or runs["high"] < 0:
        return f"{seen}: they differ, and it is not shown that they do so {within}."
    return (
        f"{seen}: no difference is shown, nor that they are equal to {within}. Seeds "
        f"spread so far that it takes about {runs['runs_needed']} healthy runs a side "
        "to show that four times out of five."
    )
