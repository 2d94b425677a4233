"""Metrics against other people's code, hand-computed numbers and their own laws."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from skimage.metrics import structural_similarity
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from ae_jax import evaluate


def make_pair(seed, num_images, num_pixels):
    """Smooth-ish targets in [0, 1] and noisy reconstructions of them."""
    rng = np.random.default_rng(seed)
    target = rng.random((num_images, num_pixels)) ** 2
    recon = np.clip(target + 0.2 * rng.standard_normal(target.shape), 0, 1)
    return recon, target


def slow_ssim(x, y, window):
    """One image, by the definition: a loop over the places of a 2-D window."""
    offsets = np.arange(window) - window // 2
    profile = np.exp(-(offsets**2) / (2 * 1.5**2))
    weight = np.outer(profile, profile) / profile.sum() ** 2
    scores = []
    for row in range(x.shape[0] - window + 1):
        for column in range(x.shape[1] - window + 1):
            here = (slice(row, row + window), slice(column, column + window))
            mean_x, mean_y = np.sum(weight * x[here]), np.sum(weight * y[here])
            var_x = np.sum(weight * (x[here] - mean_x) ** 2)
            var_y = np.sum(weight * (y[here] - mean_y) ** 2)
            cov = np.sum(weight * (x[here] - mean_x) * (y[here] - mean_y))
            above = (2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4)
            below = (mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4)
            scores.append(above / below)
    return np.mean(scores)


# Error, PSNR and SSIM.


def test_metrics_are_the_means_that_a_hand_computes():
    target = np.zeros((2, 4))
    recon = np.array([[0.1, 0.1, 0.1, 0.1], [0.2, 0.0, 0.0, 0.0]])
    metrics = evaluate.image_metrics(recon, target, (2, 2))
    assert list(metrics) == ["mse", "psnr_db", "ssim"]
    assert metrics["mse"] == pytest.approx(0.01)
    assert metrics["psnr_db"] == pytest.approx(20.0)
    # A window of one pixel has no variance: 1e-4 / (recon² + 1e-4) at each pixel.
    per_pixel = [1 / 101] * 4 + [1 / 401, 1, 1, 1]
    assert metrics["ssim"] == pytest.approx(np.mean(per_pixel))


def test_psnr_is_the_mean_over_images_and_not_that_of_the_mean():
    target = np.zeros((2, 1))
    recon = np.array([[0.1], [0.01]])  # 20 and 40 dB
    metrics = evaluate.image_metrics(recon, target, (1, 1))
    assert metrics["psnr_db"] == pytest.approx(30.0)


def test_perfect_images_score_a_finite_psnr_and_an_ssim_of_one():
    _, target = make_pair(0, 3, 784)
    metrics = evaluate.image_metrics(target, target, (28, 28))
    assert metrics == {"mse": 0.0, "psnr_db": 100.0, "ssim": 1.0}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(28, 28), (11, 11), (12, 31)])
def test_ssim_is_that_of_scikit_image(seed, shape):
    recon, target = make_pair(seed, 3, shape[0] * shape[1])
    recon, target = recon.reshape(-1, *shape), target.reshape(-1, *shape)
    theirs = [
        structural_similarity(
            x, y, gaussian_weights=True, use_sample_covariance=False, data_range=1
        )
        for x, y in zip(recon, target, strict=True)
    ]
    np.testing.assert_allclose(evaluate.ssim(recon, target), theirs, rtol=0, atol=1e-12)


def test_ssim_in_colour_is_scikit_images_mean_over_the_channels():
    recon, target = make_pair(2, 3, 17 * 13 * 3)
    recon, target = recon.reshape(-1, 17, 13, 3), target.reshape(-1, 17, 13, 3)
    theirs = [
        structural_similarity(
            *(x, y),
            gaussian_weights=True,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=-1,
        )
        for x, y in zip(recon, target, strict=True)
    ]
    np.testing.assert_allclose(evaluate.ssim(recon, target), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "window"),
    [((28, 28), 11), ((10, 10), 9), ((8, 8), 7), ((9, 5), 5), ((2, 3), 1)],
)
def test_ssim_takes_the_largest_odd_window_that_a_small_image_holds(shape, window):
    recon, target = make_pair(1, 2, shape[0] * shape[1])
    recon, target = recon.reshape(-1, *shape), target.reshape(-1, *shape)
    by_hand = [slow_ssim(x, y, window) for x, y in zip(recon, target, strict=True)]
    np.testing.assert_allclose(
        evaluate.ssim(recon, target), by_hand, rtol=0, atol=1e-12
    )


@settings(max_examples=20, deadline=None)
@given(num_images=st.integers(1, 600), seed=st.integers(0, 2**32 - 1))
def test_metrics_do_not_depend_on_the_order_of_the_images(num_images, seed):
    recon, target = make_pair(seed, num_images, 64)
    order = np.random.default_rng(seed).permutation(num_images)
    metrics = evaluate.image_metrics(recon, target, (8, 8))
    assert evaluate.image_metrics(recon[order], target[order], (8, 8)) == metrics


@settings(max_examples=20, deadline=None)
@given(num_images=st.integers(1, 600), data=st.data())
def test_an_image_scores_the_same_alone_as_among_others(num_images, data):
    recon, target = make_pair(num_images, num_images, 64)
    one = data.draw(st.integers(0, num_images - 1))
    alone = slice(one, one + 1)
    errors = evaluate.squared_error(recon, target)
    assert evaluate.squared_error(recon[alone], target[alone]) == errors[alone]
    recon, target = recon.reshape(-1, 8, 8), target.reshape(-1, 8, 8)
    scores = evaluate.ssim(recon, target)
    assert evaluate.ssim(recon[alone], target[alone]) == scores[alone]


def test_float32_images_are_scored_in_float64():
    recon, target = (x.astype(np.float32) for x in make_pair(2, 300, 784))
    wide = evaluate.image_metrics(
        recon.astype(np.float64), target.astype(np.float64), (28, 28)
    )
    assert evaluate.image_metrics(recon, target, (28, 28)) == wide


def test_shapes_that_differ_are_refused():
    recon, target = make_pair(0, 3, 64)
    # Where annotations are checked at run time, they refuse before the function does.
    with pytest.raises((ValueError, TypeCheckError)):
        evaluate.image_metrics(recon[:1], target, (8, 8))
    with pytest.raises(ValueError, match="must be equal"):
        inspect.unwrap(evaluate.squared_error)(recon[:, :1], target)
    with pytest.raises(ValueError, match="must be equal"):
        inspect.unwrap(evaluate.ssim)(recon[:1, None], target[:, None])


def test_a_shape_that_does_not_fit_is_refused():
    recon, target = make_pair(0, 3, 64)
    with pytest.raises(ValueError, match="reshape"):
        evaluate.image_metrics(recon, target, (8, 9))


def test_no_images_have_no_score():
    none = np.empty((0, 64))
    with pytest.raises(ValueError, match="no images"):
        evaluate.image_metrics(none, none, (8, 8))


# Codes.


def test_a_unit_is_dead_only_if_it_is_zero_for_every_image():
    codes = np.zeros((1000, 4), np.float32)
    codes[:, 1] = 1
    codes[999, 2] = 1e-30
    codes[0, 3] = -1
    assert evaluate.dead_units(codes).tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("dead_counts", "code_width", "sentence"),
    [
        ([], 3, None),
        ([0, 0], 3, None),
        ([2, 0], 3, None),
        (
            [0, 1],
            3,
            "1 of 3 code units has been dead since epoch 2: "
            "try another --train.seed, or --model.code-activation leaky_relu.",
        ),
        (
            [2, 2, 2],
            3,
            "2 of 3 code units have been dead since epoch 1: "
            "try another --train.seed, or --model.code-activation leaky_relu.",
        ),
        (
            [3],
            3,
            "all 3 code units have been dead since epoch 1: "
            "the run has collapsed and predicts one image; "
            "try another --train.seed, or --model.code-activation leaky_relu.",
        ),
        (
            [0, 0, 1],
            1,
            "the only code unit has been dead since epoch 3: "
            "the run has collapsed and predicts one image; "
            "try another --train.seed, or --model.code-activation leaky_relu.",
        ),
    ],
)
def test_diagnosis_says_in_words_what_is_dead(dead_counts, code_width, sentence):
    assert evaluate.diagnose(dead_counts, code_width) == sentence


@pytest.mark.parametrize(
    ("dead_counts", "epoch"),
    [([1, 2, 2], 2), ([2, 1, 2], 3), ([3, 2, 2], 1), ([0, 5, 4, 4], 2)],
)
def test_dead_since_the_first_epoch_of_the_tail_with_as_many_dead(dead_counts, epoch):
    sentence = evaluate.diagnose(dead_counts, 12)
    assert sentence is not None
    assert f"dead since epoch {epoch}:" in sentence


# Baselines.


@pytest.fixture(scope="module")
def digits():
    pixels = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    return pixels[:1437], pixels[1437:]


def test_mean_image_is_that_of_the_training_split(digits):
    train, test = digits
    error = np.mean((test / 255 - (train / 255).mean(axis=0)) ** 2)
    assert evaluate.mean_image_mse(train, test) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("num_components", [1, 3, 12, 63])
def test_pca_is_that_of_scikit_learn(digits, num_components):
    train, test = digits
    theirs = PCA(num_components, svd_solver="full").fit(train / 255)
    recon = theirs.inverse_transform(theirs.transform(test / 255))
    error = np.mean((recon - test / 255) ** 2)
    ours = evaluate.pca_mse(train, test, num_components)
    assert ours == pytest.approx(error, rel=1e-9, abs=1e-15)


def test_second_moment_of_the_brightest_images_is_exact():
    white = np.full((1000, 8), 255, np.uint8)
    white[:500, 0] = 254  # odd and even products alike
    exact = white.astype(np.int64).T @ white.astype(np.int64) / 1000
    assert (evaluate._second_moment(white) == exact).all()


def test_pca_is_the_same_each_time_even_where_it_is_not_unique(digits):
    one_pixel_each = np.diag(np.full(64, 255, np.uint8))  # no direction varies more
    errors = {evaluate.pca_mse(one_pixel_each, digits[1], 3) for _ in range(3)}
    assert len(errors) == 1


def test_pca_with_as_many_components_as_pixels_is_perfect(digits):
    assert evaluate.pca_mse(*digits, num_components=64) == 0
    assert evaluate.pca_mse(*digits, num_components=100) == 0


@pytest.mark.parametrize("num_train", [1, 2, 4])
def test_pca_of_fewer_images_than_components_reconstructs_them(digits, num_train):
    few = digits[0][:num_train]
    assert evaluate.pca_mse(few, few, num_components=3) == pytest.approx(0, abs=1e-20)


def test_pca_of_one_image_predicts_it(digits):
    train, test = digits
    alike = train[:1].repeat(5, axis=0)
    mean = evaluate.mean_image_mse(alike, test)
    assert evaluate.pca_mse(alike, test, num_components=3) == mean


def test_pca_of_more_pixels_than_a_matrix_should_have_is_near_the_exact_one(
    digits, monkeypatch
):
    exact = [evaluate.pca_mse(*digits, num_components=k) for k in (1, 3, 12)]
    monkeypatch.setattr(evaluate, "DENSE", 63)
    near = [evaluate.pca_mse(*digits, num_components=k) for k in (1, 3, 12)]
    assert near == pytest.approx(exact, rel=1e-4)
    assert near != exact  # it took the other way
    assert evaluate.pca_mse(*digits, num_components=3) == near[1]


def test_pca_without_components_is_refused(digits):
    with pytest.raises(ValueError, match="k must be"):
        evaluate.pca_mse(*digits, num_components=0)


# Many runs.


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # By hand: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.95996.
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (64, 64, 0.943375, 1.0)],
)
def test_interval_of_a_share_is_wilsons(count, total, low, high):
    found = evaluate.share_interval(count, total)
    np.testing.assert_allclose(found, (low, high), atol=1e-6)


def test_interval_of_a_median_holds_it_about_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(200, 25))
    intervals = [evaluate.median_interval(row) for row in draws]
    held = [low <= np.log(2) <= high for low, high in intervals]
    assert 0.88 < np.mean(held) <= 0.99


def test_interval_of_a_single_median_is_itself():
    assert evaluate.median_interval(np.array([0.04])) == (0.04, 0.04)


def test_summary_of_runs_counts_and_scores_each_outcome():
    scores = {"healthy": [0.034, 0.036, 0.035], "collapsed": [0.0675]}
    rows = [
        {"outcome": outcome, "test/mse": mse}
        for outcome, of_it in scores.items()
        for mse in of_it
    ]
    found = evaluate.summarise_runs(rows)
    assert (found["healthy"], found["part_dead"], found["collapsed"]) == (3, 0, 1)
    assert found["share_healthy"] == 0.75
    assert found["test/mse/healthy"] == 0.035
    assert found["test/mse/part_dead"] is None
    assert found["test/mse/median"] == pytest.approx(0.0355)
    shares = [found["share_healthy_low"], found["share_healthy_high"]]
    assert shares == list(evaluate.share_interval(3, 4))


def test_module_needs_numpy_and_scipy_alone():
    code = (
        "import sys, ae_jax.evaluate; "
        "print([m for m in ('jax', 'flax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
