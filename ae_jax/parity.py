"""Two implementations of one training, side by side: how far apart are they?

In two senses. From the same weights and batches every number of both can be compared
(:func:`differences`); with draws of their own only the distributions of their scores
can (:func:`compare_runs`). NumPy and SciPy alone: neither JAX nor PyTorch is imported.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from ae_jax.interop import StateDict

ALPHA = 0.05
"""Level of every test."""


class Snapshot(NamedTuple):
    """Where a training stands at the end of an epoch, in PyTorch's names and layout.

    Attributes:
        losses: of each batch of the epoch, before its update.
        params: weights and biases.
        mu: Adam's first moment of each (PyTorch's ``exp_avg``).
        nu: Adam's second (``exp_avg_sq``).
    """

    losses: Float[np.ndarray, " T"]
    params: StateDict
    mu: StateDict
    nu: StateDict


def largest(ours: StateDict, theirs: StateDict) -> float:
    """The largest difference of two entries, over all arrays.

    Example:
        >>> largest({"w": np.array([1.0, 2.0])}, {"w": np.array([1.0, 2.5])})
        0.5
    """
    a, b = _joined(ours, theirs)
    return float(np.abs(a - b).max())


def norm_relative(ours: StateDict, theirs: StateDict) -> float:
    """‖a − b‖₂ / ‖b‖₂, all arrays joined; 0 if nothing differs.

    Example:
        >>> norm_relative({"w": np.array([3.0, 4.0])}, {"w": np.array([3.0, 0.0])})
        1.3333333333333333
    """
    a, b = _joined(ours, theirs)
    apart = np.linalg.norm(a - b)
    return float(apart / np.linalg.norm(b)) if apart else 0.0


def _joined(ours: StateDict, theirs: StateDict) -> tuple[np.ndarray, np.ndarray]:
    """Both as one vector of float64, so that a difference is not rounded away."""
    if set(ours) != set(theirs):
        raise ValueError(f"not the same arrays: {sorted(set(ours) ^ set(theirs))}")
    vectors = [
        np.concatenate([side[name].ravel().astype(np.float64) for name in theirs])
        for side in (ours, theirs)
    ]
    return vectors[0], vectors[1]


def relative_losses(
    ours: Float[np.ndarray, " T"], theirs: Float[np.ndarray, " T"]
) -> Float[np.ndarray, " T"]:
    """|a − b| / |b| of each batch's loss."""
    return np.asarray(np.abs(ours - theirs) / np.abs(theirs))


def differences(ours: Snapshot, theirs: Snapshot) -> dict[str, float]:
    """How far apart two trainings are at the end of an epoch.

    Returns:
        Of ``params``, ``mu`` and ``nu`` the largest difference (``params_abs``) and
        the norm-relative one (``params_nrel``); ``loss_rel``, the largest relative
        difference of a batch's loss.
    """
    found = {"loss_rel": float(relative_losses(ours.losses, theirs.losses).max())}
    for name in ("params", "mu", "nu"):
        pair = getattr(ours, name), getattr(theirs, name)
        found[f"{name}_abs"] = largest(*pair)
        found[f"{name}_nrel"] = norm_relative(*pair)
    return found


def parity(ours: Iterable[Snapshot], theirs: Iterable[Snapshot]) -> float:
    """The largest difference of any parameter or moment at the end of any epoch.

    The check of a port: from the same weights and batches, in float64, a right one
    stays below 1e-10 over some short epochs, and no porting bug known to us does.
    """
    apart = [
        largest(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in ("params", "mu", "nu")
    ]
    return float(np.max(apart))  # unlike Python's max, it lets no NaN pass


# --- Runs with draws of their own ----------------------------------------------------


class Equivalence(NamedTuple):
    """What two samples say of the difference of their means, in parts of the second's.

    Attributes:
        p: of the hypothesis that the difference is as large as the margin.
        difference: seen in the samples.
        low: lower end of its 90 % confidence interval.
        high: upper end; the interval lies within the margin just where p < 0.05.
    """

    p: float
    difference: float
    low: float
    high: float


def tost(ours: Sequence[float], theirs: Sequence[float], margin: float) -> Equivalence:
    """Two one-sided t-tests: are two means equal to within a margin?

    Unlike a test for a difference, it cannot be passed by too small a sample. The
    variances may differ (Welch); the margin counts as known, its base as fixed.

    Args:
        ours: a score of each run.
        theirs: the same of each run of the other side, its mean not 0.
        margin: the largest difference that is none, in parts of their mean.

    Returns:
        p, and the difference with its interval. Fewer than two runs on a side show
        nothing: p is 1, and the interval endless.

    Source:
        Schuirmann, "A comparison of the two one-sided tests procedure and the power
        approach for assessing the equivalence of average bioavailability", Journal of
        Pharmacokinetics and Biopharmaceutics 15 (1987).

    Example:
        >>> tost([1.0, 1.01, 0.99], [1.0, 1.02, 0.98], margin=0.1).p < 0.05
        True
    """
    if min(len(ours), len(theirs)) < 2:
        return Equivalence(1.0, math.nan, -math.inf, math.inf)
    mean = float(np.mean(theirs))
    a, b = np.asarray(ours) / mean, np.asarray(theirs) / mean
    difference = float(a.mean() - b.mean())
    parts = np.array([x.var(ddof=1) / len(x) for x in (a, b)])
    error = math.sqrt(parts.sum())
    if error == 0:
        return Equivalence(float(abs(difference) >= margin), *[difference] * 3)
    freedom = parts.sum() ** 2 / (parts**2 / [len(a) - 1, len(b) - 1]).sum()
    t = stats.t(freedom)
    p = max(t.sf((difference + margin) / error), t.cdf((difference - margin) / error))
    half = float(t.ppf(1 - ALPHA)) * error
    return Equivalence(float(p), difference, difference - half, difference + half)


def runs_needed(scores: Sequence[float], margin: float, power: float = 0.8) -> int:
    """Runs a side with which :func:`tost` would find equal means equal.

    Args:
        scores: of runs, for their spread.
        margin: the test's, in parts of the mean.
        power: with this probability.

    Source:
        The normal approximation of Schuirmann's test for a true difference of 0:
        n = 2 (z₁₋α + z₍₁₊power₎⸝₂)² (sd / margin)².
    """
    spread = float(np.std(scores, ddof=1) / np.mean(scores))
    z = stats.norm.ppf(1 - ALPHA) + stats.norm.ppf((1 + power) / 2)
    return math.ceil(2 * (z * spread / margin) ** 2)


def compare_runs(
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    margin: float,
) -> dict[str, Any]:
    """The runs of two sides compared in distribution.

    Args:
        ours: of each run ``test/mse``, ``code/dead_units`` and ``code/collapsed``.
        theirs: the same of the other side.
        margin: for the mean test MSE of healthy runs, in parts of their mean.

    Returns:
        Of each side, ``ours`` and ``theirs``, the number of ``runs``, of those
        ``healthy`` (no dead unit), ``part_dead`` and ``collapsed``, and the healthy
        ones' ``mean`` and ``sd``. Of both: :class:`Equivalence` as ``tost_p``,
        ``difference``, ``low`` and ``high``; ``ks_p`` (Kolmogorov–Smirnov) of the
        healthy runs; ``collapsed_p`` and ``part_dead_p`` (Fisher's exact test) of the
        counts; ``runs_needed``, healthy ones a side, for the margin. What fewer than
        two healthy runs cannot tell is None, or a p of 1.
    """
    counts = {"ours": _count(ours), "theirs": _count(theirs)}
    healthy = [_healthy(ours), _healthy(theirs)]
    found: dict[str, Any] = {**counts, "tost_p": 1.0, "ks_p": 1.0}
    found |= dict.fromkeys(("difference", "low", "high", "runs_needed"))
    for outcome in ("collapsed", "part_dead"):
        table = np.array(
            [[side[outcome], side["runs"] - side[outcome]] for side in counts.values()]
        )
        found[f"{outcome}_p"] = float(stats.fisher_exact(table).pvalue)
    if min(map(len, healthy)) < 2:
        return found
    mean = tost(healthy[0], healthy[1], margin)
    found |= {"tost_p": mean.p, "difference": mean.difference}
    found |= {"low": mean.low, "high": mean.high}
    found["ks_p"] = float(stats.ks_2samp(np.array(healthy[0]), healthy[1]).pvalue)
    found["runs_needed"] = runs_needed(healthy[1], margin)
    return found


def _healthy(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["test/mse"] for row in rows if not row["code/dead_units"]]


def _count(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    healthy = _healthy(rows)
    collapsed = sum(row["code/collapsed"] for row in rows)
    return {
        "runs": len(rows),
        "healthy": len(healthy),
        "part_dead": len(rows) - len(healthy) - collapsed,
        "collapsed": collapsed,
        "mean": float(np.mean(healthy)) if healthy else None,
        "sd": float(np.std(healthy, ddof=1)) if len(healthy) > 1 else None,
    }


def verdict(found: Mapping[str, Any], margin: float) -> list[str]:
    """What :func:`compare_runs` found, in words, and how much it could have found.

    Args:
        found: its outcome.
        margin: the one it was given.

    Returns:
        A paragraph each on the mean, on the whole distribution, on the counts.
    """
    counts = [
        _on_count(found, "collapsed", "collapsed"),
        _on_count(found, "part_dead", "had some of their code units dead, not all"),
    ]
    if found["low"] is None:
        return ["Too few healthy runs to compare their test MSE.", *counts]
    return [_on_mean(found, margin), _on_shape(found), *counts]


def _on_mean(found: Mapping[str, Any], margin: float) -> str:
    within = f"within ±{margin:.0%}"
    seen = (
        f"The mean test MSE of our {found['ours']['healthy']} healthy runs differs "
        f"from that of PyTorch's {found['theirs']['healthy']} by "
        f"{found['difference']:+.1%} (90% interval {found['low']:+.1%} to "
        f"{found['high']:+.1%}; TOST p = {found['tost_p']:.2g})"
    )
    if found["tost_p"] < ALPHA:
        return f"{seen}: equal to {within}."
    if found["low"] > 0 or found["high"] < 0:
        return f"{seen}: they differ, and it is not shown that they do so {within}."
    return (
        f"{seen}: no difference is shown, nor that they are equal to {within}. Seeds "
        f"spread so far that it takes about {found['runs_needed']} healthy runs a side "
        "to show that four times out of five."
    )


def _on_shape(found: Mapping[str, Any]) -> str:
    n, m = found["ours"]["healthy"], found["theirs"]["healthy"]
    gap = stats.kstwobign.ppf(1 - ALPHA) * math.sqrt((n + m) / (n * m))
    outcome = "differ" if found["ks_p"] < ALPHA else "show no difference"
    return (
        f"Their whole distributions {outcome} (Kolmogorov–Smirnov, p = "
        f"{found['ks_p']:.2g}). Samples of this size show one if, at some test MSE, "
        f"the shares of the runs below it lie more than {min(gap, 1):.0%} apart."
    )


def _on_count(found: Mapping[str, Any], outcome: str, words: str) -> str:
    def share(side: str) -> str:
        count, runs = found[side][outcome], found[side]["runs"]
        interval = stats.binomtest(count, runs).proportion_ci()
        return f"{count} of {runs} ({interval.low:.0%} to {interval.high:.0%})"

    return (
        f"Of our runs {share('ours')} {words}, of PyTorch's {share('theirs')}; in "
        "brackets what the true share may be, at 95% confidence. Fisher's exact test "
        f"of the two counts: p = {found[f'{outcome}_p']:.2g}."
    )
