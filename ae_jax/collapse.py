"""Latent units that have died, and runs that have collapsed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ae_jax.stats import median_interval, relative_spread, share_interval

OUTCOMES = ("healthy", "part-dead", "collapsed")
"""Of a run: no latent unit is dead, some are, all are."""


def dead_units(latents: Float[np.ndarray, "N K"]) -> Bool[np.ndarray, "K"]:
    """Which latent units are dead: zero for every image of the split.

    Example:
        >>> dead_units(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])).tolist()
        [True, False, False]
    """
    return np.logical_not(latents.any(axis=0))


def outcome(dead: int, latent_dim: int) -> str:
    """One of ``OUTCOMES``, by the number of dead units.

    Example:
        >>> [outcome(dead, latent_dim=3) for dead in range(4)]
        ['healthy', 'part-dead', 'part-dead', 'collapsed']
    """
    return OUTCOMES[(dead > 0) + (dead == latent_dim)]


def diagnose(dead_counts: Sequence[int], latent_dim: int) -> str | None:
    """One sentence about the dead units of a run, and what to try; None if all live.

    A ReLU whose input is negative for every image has no gradient, so a unit seldom
    comes back once it is dead. Most die within the first epoch, so it is mainly the
    initial weights that decide, and another seed that helps.

    Args:
        dead_counts: dead units at the end of each epoch so far, the first epoch first.
        latent_dim: units of the latent.

    Example:
        >>> diagnose([1, 2, 2], latent_dim=3)  # doctest: +ELLIPSIS
        '2 of 3 latent units have been dead since epoch 2: try another --train.seed, ...
        >>> diagnose([1, 0], latent_dim=3)
    """
    dead = dead_counts[-1] if dead_counts else 0
    if dead == 0:
        return None
    fewer = [epoch for epoch, count in enumerate(dead_counts, start=1) if count < dead]
    since = f"dead since epoch {max(fewer, default=0) + 1}"
    remedy = "try another --train.seed, or --model.latent-activation leaky_relu."
    if dead < latent_dim:
        have = "has" if dead == 1 else "have"
        return f"{dead} of {latent_dim} latent units {have} been {since}: {remedy}"
    units = "the only latent unit has" if dead == 1 else f"all {dead} latent units have"
    collapse = "the run has collapsed and predicts one image"
    return f"{units} been {since}: {collapse}; {remedy}"


def scores_by_outcome(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The ``test/mse`` of runs, by their ``outcome``; each of ``OUTCOMES`` is there."""
    scores: dict[str, list[float]] = {name: [] for name in OUTCOMES}
    for row in rows:
        scores[row["outcome"]].append(row["test/mse"])
    return scores


def summarise_runs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outcomes and scores of runs that differ in their seed only.

    Args:
        rows: of each run ``outcome``, see :func:`outcome`, and ``test/mse``.

    Returns:
        ``num_seeds``; ``test/mse/median`` of all of them; of each outcome, ``healthy``
        say, its number, ``share_healthy``, and ``test/mse/healthy``, the median of
        those runs, or None. ``…_low`` and ``…_high`` are the ends of 95 % intervals.
        ``test/mse/spread`` of the healthy runs, see :func:`relative_spread`, or None.
    """
    scores = np.array([row["test/mse"] for row in rows], np.float64)
    low, high = median_interval(scores)
    summary: dict[str, Any] = {
        "num_seeds": len(rows),
        "test/mse/median": float(np.median(scores)),
        "test/mse/median_low": low,
        "test/mse/median_high": high,
    }
    by_outcome = scores_by_outcome(rows)
    healthy = by_outcome["healthy"]
    spread = relative_spread(healthy) if len(healthy) > 1 else None
    summary["test/mse/spread"] = spread
    for name, chosen in by_outcome.items():
        low, high = share_interval(len(chosen), len(rows))
        key = name.replace("-", "_")
        summary |= {key: len(chosen), f"share_{key}": len(chosen) / len(rows)}
        summary |= {f"share_{key}_low": low, f"share_{key}_high": high}
        summary[f"test/mse/{key}"] = float(np.median(chosen)) if len(chosen) else None
    return summary
