"""What samples of runs show: intervals, tests of equivalence and of difference.

SciPy is imported where it is used: it takes most of a second, and a run starts
without it.
"""

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

ALPHA = 0.05
"""Level of every test."""

TRIM = 0.2
"""Share of the runs that is left out at either end before means are compared."""


def median_interval(values: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Interval for the median that such values come from, at 95 % (bootstrap).

    Source:
        Efron and Tibshirani, "An introduction to the bootstrap", 1993, section 13.3
        (percentiles), as ``scipy.stats.bootstrap`` has it.
    """
    from scipy import stats

    if len(values) < 2:
        return float(values[0]), float(values[0])
    result = stats.bootstrap((values,), np.median, method="percentile", rng=0)
    low, high = result.confidence_interval
    return float(low), float(high)


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's interval for a share, at 95 %.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927).

    Example:
        >>> low, high = share_interval(19, 64)
        >>> round(low, 3), round(high, 3)
        (0.199, 0.418)
    """
    from scipy import stats

    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


class Equivalence(NamedTuple):
    """What two samples say of the difference of their trimmed means.

    All but ``p`` are in parts of the second sample's trimmed mean.

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
    """Two one-sided t-tests: are two trimmed means equal to within a margin?

    Unlike a test for a difference, it cannot be passed by too small a sample. The
    variances may differ; the margin counts as known, its base as fixed. The means are
    trimmed by :data:`TRIM`, since test losses have a long tail: one run in dozens is
    still on its way down at the end, and it alone would double the standard deviation.

    Args:
        ours: a score of each run.
        theirs: the same of each run of the other side, its trimmed mean not 0.
        margin: the largest difference that is none, in parts of their trimmed mean.

    Returns:
        p, and the difference with its interval. Fewer than two runs on a side show
        nothing: p is 1, and the interval endless.

    Source:
        Schuirmann, "A comparison of the two one-sided tests procedure and the power
        approach for assessing the equivalence of average bioavailability", Journal of
        Pharmacokinetics and Biopharmaceutics 15 (1987); Yuen, "The two-sample trimmed t
        for unequal population variances", Biometrika 61 (1974).

    Example:
        >>> tost([1.0, 1.01, 0.99], [1.0, 1.02, 0.98], margin=0.1).p < 0.05
        True
    """
    from scipy import stats

    if min(len(ours), len(theirs)) < 2:
        return Equivalence(1.0, math.nan, -math.inf, math.inf)
    base = stats.trim_mean(theirs, TRIM)
    a, b = np.asarray(ours) / base, np.asarray(theirs) / base
    difference = float(stats.trim_mean(a, TRIM) - stats.trim_mean(b, TRIM))
    if np.ptp(a) == np.ptp(b) == 0:  # no spread, so no doubt either
        return Equivalence(float(abs(difference) >= margin), *[difference] * 3)
    with warnings.catch_warnings():
        # A side whose runs are all equal is no reason to warn: the other one spreads.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        welch = functools.partial(stats.ttest_ind, equal_var=False, trim=TRIM)
        above = welch(a + margin, b, alternative="greater")
        below = welch(a - margin, b, alternative="less")
    return Equivalence(
        p=float(max(above.pvalue, below.pvalue)),
        difference=difference,
        low=float(above.confidence_interval(1 - ALPHA).low) - margin,
        high=float(below.confidence_interval(1 - ALPHA).high) + margin,
    )


def runs_needed(spread: float, margin: float, power: float = 0.8) -> int:
    """Runs a side with which :func:`tost` would find equal means equal.

    Args:
        spread: of the runs' scores, as :func:`relative_spread` has it.
        margin: the test's, in parts of the mean.
        power: with this probability.

    Source:
        The normal approximation of Schuirmann's test for a true difference of 0:
        n = 2 (z₁₋α + z₍₁₊power₎⸝₂)² (spread / margin)².
    """
    from scipy import stats

    z = stats.norm.ppf(1 - ALPHA) + stats.norm.ppf((1 + power) / 2)
    return math.ceil(2 * (z * spread / margin) ** 2)


def relative_spread(scores: Sequence[float]) -> float:
    """Standard error of the trimmed mean of n scores, times √n, in parts of it.

    Source:
        Tukey and McLaughlin, "Less vulnerable confidence and significance procedures
        for location based on a single sample", Sankhya A 25 (1963): the standard
        deviation of the winsorised scores over 1 − 2 · :data:`TRIM`.
    """
    from scipy import stats

    winsorised = stats.mstats.winsorize(np.array(scores), (TRIM, TRIM))
    deviation = np.std(np.asarray(winsorised), ddof=1) / (1 - 2 * TRIM)
    return float(deviation / stats.trim_mean(scores, TRIM))


def compare_runs(
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    margin: float,
) -> dict[str, Any]:
    """The runs of two sides compared in distribution.

    Args:
        ours: of each run ``test/mse``, ``latent/dead_units`` and ``latent/collapsed``.
        theirs: the same of the other side.
        margin: for the trimmed mean of the healthy runs' test MSE, in parts of it.

    Returns:
        Of each side, ``ours`` and ``theirs``, the number of ``runs``, of those
        ``healthy`` (no dead unit), ``part_dead`` and ``collapsed``, and the healthy
        ones' ``mean``, ``sd`` and ``trimmed_mean``. Of both: :class:`Equivalence` as
        ``tost_p``, ``difference``, ``low`` and ``high``; ``ks_p`` (Kolmogorov–Smirnov)
        of the healthy runs; ``collapsed_p`` and ``part_dead_p`` (Fisher's exact test)
        of the counts; ``runs_needed``, healthy ones a side, for the margin. What fewer
        than two healthy runs cannot show is None, or a p of 1.
    """
    from scipy import stats

    counts = {"ours": _count(ours), "theirs": _count(theirs)}
    a, b = _healthy(ours), _healthy(theirs)
    result: dict[str, Any] = {**counts, "tost_p": 1.0, "ks_p": 1.0}
    result |= dict.fromkeys(("difference", "low", "high", "runs_needed"))
    for outcome in ("collapsed", "part_dead"):
        table = np.array(
            [[side[outcome], side["runs"] - side[outcome]] for side in counts.values()]
        )
        result[f"{outcome}_p"] = float(stats.fisher_exact(table).pvalue)
    if min(len(a), len(b)) < 2:
        return result
    mean = tost(a, b, margin)
    result |= {"tost_p": mean.p, "difference": mean.difference}
    result |= {"low": mean.low, "high": mean.high}
    result["ks_p"] = float(stats.ks_2samp(np.array(a), np.array(b)).pvalue)
    spread = math.hypot(relative_spread(a), relative_spread(b)) / math.sqrt(2)
    result["runs_needed"] = runs_needed(spread, margin)
    return result


def _healthy(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["test/mse"] for row in rows if not row["latent/dead_units"]]


def _count(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from scipy import stats

    healthy = _healthy(rows)
    collapsed = sum(row["latent/collapsed"] for row in rows)
    return {
        "runs": len(rows),
        "healthy": len(healthy),
        "part_dead": len(rows) - len(healthy) - collapsed,
        "collapsed": collapsed,
        "mean": float(np.mean(healthy)) if healthy else None,
        "trimmed_mean": float(stats.trim_mean(healthy, TRIM)) if healthy else None,
        "sd": float(np.std(healthy, ddof=1)) if len(healthy) > 1 else None,
    }
