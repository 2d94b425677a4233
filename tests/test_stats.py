"""Intervals hold what they promise; tests err as often as they say."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from life import make_runs
from scipy import stats as scipy_stats

from ae_jax import stats

scores = st.integers(900, 1100).map(lambda i: i / 1000)
samples = st.lists(scores, min_size=2, max_size=20)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # By hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.95996.
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (64, 64, 0.943375, 1.0)],
)
def test_interval_of_a_share_is_wilsons(count, total, low, high):
    interval = stats.share_interval(count, total)
    np.testing.assert_allclose(interval, (low, high), atol=1e-6)


def test_interval_of_a_median_holds_it_about_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(200, 25))
    intervals = [stats.median_interval(row) for row in draws]
    held = [low <= np.log(2) <= high for low, high in intervals]
    assert 0.88 < np.mean(held) <= 0.99
    assert stats.median_interval(draws[0]) == intervals[0]  # its draws have a seed


def test_interval_of_a_single_median_is_itself():
    assert stats.median_interval(np.array([0.04])) == (0.04, 0.04)


def trimmed(scores):
    """Yuen's trimmed mean, its squared standard error, and its degrees of freedom."""
    cut, ordered = int(stats.TRIM * len(scores)), np.sort(scores)
    kept = ordered[cut : len(scores) - cut]
    ends = kept[0], kept[-1]
    around = np.sum((np.clip(ordered, *ends) - np.clip(ordered, *ends).mean()) ** 2)
    return kept.mean(), around / (len(kept) * (len(kept) - 1)), len(kept) - 1


@settings(deadline=None)
@given(samples, samples, st.floats(0.01, 0.2))
def test_tost_is_schuirmanns_two_tests_of_yuens(ours, theirs, margin):
    (a, *of_a), (b, *of_b) = map(trimmed, (ours, theirs))
    assume(of_a[0] > 0 < of_b[0])
    found = stats.tost(ours, theirs, margin)
    parts, kept = np.array([of_a, of_b]).T
    error = np.sqrt(parts.sum())
    t = scipy_stats.t(parts.sum() ** 2 / (parts**2 / kept).sum())
    above = t.sf((a - b + margin * b) / error)
    below = t.cdf((a - b - margin * b) / error)
    half = t.ppf(0.95) * error
    expected = np.array([a - b, a - b - half, a - b + half])
    np.testing.assert_allclose(found.p, max(above, below), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found[1:], expected / b, rtol=1e-6, atol=1e-9)
    assert (-margin < found.low and found.high < margin) == (found.p < stats.ALPHA)


def test_one_run_that_is_still_on_its_way_does_not_decide():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0.035, 0.001, (2, 27)).tolist()
    before = stats.tost(ours, theirs, 0.03).p
    ours[ours.index(max(ours))] = 0.06
    assert stats.tost(ours, theirs, 0.03).p == pytest.approx(before)
    assert before < stats.ALPHA


@pytest.mark.parametrize(("true", "expected"), [(0.03, 0.05), (0.0, 0.8)])
def test_tost_errs_as_often_as_it_says_and_finds_what_runs_needed_says(true, expected):
    # At the margin it may call them equal in 5 of 100 samples; where they are equal,
    # and as many as needed, it does so in 80.
    rng = np.random.default_rng(0)
    spread = stats.relative_spread(rng.normal(1, 0.06, 100_000).tolist())
    needed = stats.runs_needed(spread, margin=0.03)
    draws = rng.normal(1, 0.06, (600, 2, needed)) + np.array([true, 0])[None, :, None]
    passed = [stats.tost(a, b, 0.03).p < 0.05 for a, b in draws.tolist()]
    np.testing.assert_allclose(np.mean(passed), expected, atol=0.03)


def test_samples_without_spread_or_too_small_show_what_they_can():
    assert stats.tost([1.0], [1.0, 1.0], 0.03).p == 1
    assert stats.tost([], [1.0, 1.1], 0.03).p == 1
    assert stats.tost([1.0, 1.0], [1.0, 1.0], 0.03) == (0, 0, 0, 0)
    assert stats.tost([1.02, 1.02], [1.0, 1.0], 0.03).p == 0
    assert stats.tost([1.04, 1.04], [1.0, 1.0], 0.03).p == 1
    assert stats.tost([1.0] * 3, [0.99, 1.0, 1.01], 0.1).p < 0.05  # without a warning


def test_runs_are_counted_by_their_outcome_and_compared_by_those_that_are_healthy():
    ours, theirs = make_runs(20, 4, 8), make_runs(10, 1, 21, mean=0.0361)
    found = stats.compare_runs(ours, theirs, 0.03)
    a, b = (
        [row["test/mse"] for row in rows[:n]] for rows, n in ((ours, 20), (theirs, 10))
    )
    assert found["ours"] == {
        **{"runs": 32, "healthy": 20, "part_dead": 4, "collapsed": 8},
        "mean": pytest.approx(0.036),
        "trimmed_mean": pytest.approx(trimmed(a)[0]),
        "sd": pytest.approx(np.sqrt(np.sum((np.array(a) - np.mean(a)) ** 2) / 19)),
    }
    assert (found["theirs"]["healthy"], found["theirs"]["part_dead"]) == (10, 1)
    for name, table in (
        ("collapsed_p", [[8, 24], [21, 11]]),
        ("part_dead_p", [[4, 28], [1, 31]]),
    ):
        assert found[name] == scipy_stats.fisher_exact(np.array(table)).pvalue
    mean = stats.tost(a, b, 0.03)
    assert [found[k] for k in ("tost_p", "difference", "low", "high")] == [*mean]
    squares = [stats.relative_spread(side) ** 2 for side in (a, b)]
    spread = np.sqrt(np.mean(squares))
    assert found["runs_needed"] == stats.runs_needed(float(spread), 0.03)


@pytest.mark.parametrize("shift", [-0.03, 0.03])
def test_distributions_that_differ_to_either_side_are_told_apart(shift):
    found = stats.compare_runs(
        make_runs(12, mean=0.036 * (1 + shift)), make_runs(12), 0.06
    )
    # No overlap at all: two of the ways to deal 24 runs into two sides of 12.
    assert found["ks_p"] == pytest.approx(2 / 2704156)
    assert found["tost_p"] < 0.05


@pytest.mark.parametrize("healthy", [0, 1])
def test_too_few_healthy_runs_leave_their_scores_uncompared(healthy):
    found = stats.compare_runs(make_runs(healthy, 1), make_runs(0, 0, 2), 0.03)
    assert (found["tost_p"], found["ks_p"]) == (1, 1)
    empty = [found[k] for k in ("difference", "low", "high", "runs_needed")]
    assert empty == [None] * 4
    assert found["theirs"]["mean"] is found["theirs"]["sd"] is None
