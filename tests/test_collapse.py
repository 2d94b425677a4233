"""Dead units, what is said of them, and what became of many runs."""

import numpy as np
import pytest

from ae_jax import collapse, stats


def test_a_unit_is_dead_only_if_it_is_zero_for_every_image():
    latents = np.zeros((1000, 4), np.float32)
    latents[:, 1] = 1
    latents[999, 2] = 1e-30
    latents[0, 3] = -1
    assert collapse.dead_units(latents).tolist() == [True, False, False, False]


@pytest.mark.parametrize("latent_dim", [1, 2, 12])
def test_a_run_is_healthy_without_and_collapsed_with_nothing_but_dead_units(latent_dim):
    names = [collapse.outcome(dead, latent_dim) for dead in range(latent_dim + 1)]
    assert names == ["healthy", *["part-dead"] * (latent_dim - 1), "collapsed"]
    assert set(names) <= set(collapse.OUTCOMES)


REMEDY = "try another --train.seed, or --model.latent-activation leaky_relu."
COLLAPSED = f"the run has collapsed and predicts one image; {REMEDY}"


@pytest.mark.parametrize(
    ("dead_counts", "latent_dim", "sentence"),
    [
        ([], 3, None),
        ([0, 0], 3, None),
        ([2, 0], 3, None),
        ([0, 1], 3, f"1 of 3 latent units has been dead since epoch 2: {REMEDY}"),
        ([2, 2, 2], 3, f"2 of 3 latent units have been dead since epoch 1: {REMEDY}"),
        ([3], 3, f"all 3 latent units have been dead since epoch 1: {COLLAPSED}"),
        ([0, 1], 1, f"the only latent unit has been dead since epoch 2: {COLLAPSED}"),
    ],
)
def test_diagnosis_says_in_words_what_is_dead(dead_counts, latent_dim, sentence):
    assert collapse.diagnose(dead_counts, latent_dim) == sentence


@pytest.mark.parametrize(
    ("dead_counts", "epoch"),
    [([1, 2, 2], 2), ([2, 1, 2], 3), ([3, 2, 2], 1), ([0, 5, 4, 4], 2)],
)
def test_dead_since_the_first_epoch_of_the_tail_with_as_many_dead(dead_counts, epoch):
    assert f"dead since epoch {epoch}:" in collapse.diagnose(dead_counts, 12)


def test_summary_of_runs_counts_and_scores_each_outcome():
    scores = {"healthy": [0.034, 0.039, 0.035], "collapsed": [0.0675]}
    rows = [
        {"outcome": name, "test/mse": mse}
        for name, values in scores.items()
        for mse in values
    ]
    summary = collapse.summarise_runs(rows)
    assert summary["num_seeds"] == 4
    assert [summary[name] for name in ("healthy", "part_dead", "collapsed")] == [
        3,
        0,
        1,
    ]
    assert summary["share_healthy"] == 0.75
    assert summary["test/mse/healthy"] == 0.035  # the median, not the mean
    assert summary["test/mse/part_dead"] is None
    assert summary["test/mse/collapsed"] == 0.0675
    assert summary["test/mse/median"] == pytest.approx(0.037)
    ends = [summary["share_healthy_low"], summary["share_healthy_high"]]
    assert ends == list(stats.share_interval(3, 4))
    ends = (summary["test/mse/median_low"], summary["test/mse/median_high"])
    expected = stats.median_interval(np.array([0.034, 0.039, 0.035, 0.0675]))
    assert ends == expected
