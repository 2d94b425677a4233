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

from ae_jax import metrics


def make_pair(seed, *shape):
    """Targets in [0, 1] and noisy reconstructions of them, [N, H, W, C]."""
    rng = np.random.default_rng(seed)
    target = rng.random(shape) ** 2
    recon = np.clip(target + 0.2 * rng.standard_normal(shape), 0, 1)
    return recon, target


def score(recon, target):
    return metrics.mean_metrics(metrics.per_image_metrics(recon, target))


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


def test_metrics_are_the_means_that_a_hand_computes():
    target = np.zeros((2, 2, 2, 1))
    recon = np.array([[0.1, 0.1, 0.1, 0.1], [0.2, 0.0, 0.0, 0.0]])
    means = score(recon.reshape(target.shape), target)
    assert list(means) == ["mse", "psnr_db", "ssim"]
    assert means["mse"] == pytest.approx(0.01)
    assert means["psnr_db"] == pytest.approx(20.0)
    # A window of one pixel has no variance: 1e-4 / (recon² + 1e-4) at each pixel.
    per_pixel = [1 / 101] * 4 + [1 / 401, 1, 1, 1]
    assert means["ssim"] == pytest.approx(np.mean(per_pixel))


def test_psnr_is_the_mean_over_images_and_not_that_of_the_mean():
    recon = np.array([0.1, 0.01]).reshape(2, 1, 1, 1)  # 20 and 40 dB
    assert score(recon, np.zeros_like(recon))["psnr_db"] == pytest.approx(30.0)


def test_perfect_images_score_a_finite_psnr_and_an_ssim_of_one():
    _, target = make_pair(0, 3, 28, 28, 1)
    assert score(target, target) == {"mse": 0.0, "psnr_db": 100.0, "ssim": 1.0}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(28, 28, 1), (11, 11, 1), (12, 31, 1), (17, 13, 3)])
def test_ssim_is_that_of_scikit_image(seed, shape):
    recon, target = make_pair(seed, 3, *shape)
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
    np.testing.assert_allclose(metrics.ssim(recon, target), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "window"),
    [((28, 28), 11), ((10, 10), 9), ((8, 8), 7), ((9, 5), 5), ((2, 3), 1)],
)
def test_ssim_takes_the_largest_odd_window_that_a_small_image_holds(shape, window):
    recon, target = make_pair(1, 2, *shape, 1)
    pairs = zip(recon[..., 0], target[..., 0], strict=True)
    by_hand = [slow_ssim(x, y, window) for x, y in pairs]
    np.testing.assert_allclose(metrics.ssim(recon, target), by_hand, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(num_images=st.integers(1, 600), data=st.data())
def test_an_image_scores_the_same_alone_and_in_any_order(num_images, data):
    recon, target = make_pair(num_images, num_images, 8, 8, 1)
    scores = metrics.per_image_metrics(recon, target)
    one = data.draw(st.integers(0, num_images - 1))
    alone = metrics.per_image_metrics(recon[one : one + 1], target[one : one + 1])
    assert {name: values[0] for name, values in alone.items()} == {
        name: values[one] for name, values in scores.items()
    }
    order = np.random.default_rng(one).permutation(num_images)
    assert score(recon[order], target[order]) == metrics.mean_metrics(scores)


def test_float32_images_are_scored_in_float64():
    recon, target = (x.astype(np.float32) for x in make_pair(2, 300, 28, 28, 1))
    wide = recon.astype(np.float64), target.astype(np.float64)
    assert score(recon, target) == score(*wide)
    errors = np.mean((wide[0] - wide[1]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(metrics.squared_error(recon, target), errors, rtol=1e-14)


def test_shapes_that_differ_are_refused():
    recon, target = make_pair(0, 3, 8, 8, 1)
    # Where annotations are checked at run time, they refuse before the function does.
    with pytest.raises((ValueError, TypeCheckError)):
        metrics.per_image_metrics(recon[:1], target)
    for function in (metrics.squared_error, metrics.ssim):
        with pytest.raises(ValueError, match="must be equal"):
            inspect.unwrap(function)(recon[:1], target)


def test_no_images_have_no_score():
    none = np.empty((0, 8, 8, 1))
    with pytest.raises(ValueError, match="no images"):
        score(none, none)


def test_modules_of_numbers_import_numpy_alone():
    modules = ", ".join(
        f"ae_jax.{name}" for name in ("metrics", "baselines", "collapse", "stats")
    )
    code = (
        f"import sys, {modules}; "
        "print([m for m in ('jax', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
