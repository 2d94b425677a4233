"""Baselines against scikit-learn, hand-computed numbers and their own laws."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from ae_jax.baselines import mean_image_mse, pca_mse

PIXELS = np.round(load_digits().images * 255 / 16).astype(np.uint8)[..., None]
TRAIN, TEST = PIXELS[:1437], PIXELS[1437:]


class OnDisk:
    """Images of which only a few can be had at once."""

    def __init__(self, images):
        self._images, self.shape = images, images.shape

    def __len__(self):
        return len(self._images)

    def __getitem__(self, rows):
        assert len(self._images[rows]) <= 256
        return self._images[rows]


def test_mean_image_is_that_of_the_training_split():
    error = np.mean((TEST / 255 - (TRAIN / 255).mean(axis=0)) ** 2)
    assert mean_image_mse(TRAIN, TEST) == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("num_components", [1, 3, 12, 63])
def test_pca_is_scikit_learns_fitted_on_the_training_split(num_components):
    train, test = (images.reshape(-1, 64) / 255 for images in (TRAIN, TEST))
    theirs = PCA(num_components, svd_solver="full").fit(train)
    error = np.mean((theirs.inverse_transform(theirs.transform(test)) - test) ** 2)
    ours = pca_mse(TRAIN, TEST, num_components)
    assert ours == pytest.approx(error, rel=1e-9, abs=1e-15)


def test_images_on_disk_are_read_block_by_block_and_score_the_same():
    assert pca_mse(OnDisk(TRAIN), OnDisk(TEST), 3) == pca_mse(TRAIN, TEST, 3)
    assert mean_image_mse(OnDisk(TRAIN), OnDisk(TEST)) == mean_image_mse(TRAIN, TEST)


def test_the_sums_are_exact_so_no_order_of_the_brightest_images_changes_a_bit():
    # In float32, a block's sum of 255² passes 2²⁴ with one image more than 256.
    bright = np.random.default_rng(0).integers(253, 256, (2000, 4, 2, 1), np.uint8)
    first = pca_mse(bright, TEST[:, :4, :2], 3)
    assert pca_mse(bright[::-1], TEST[:, :4, :2], 3) == first
    exact = np.cov(bright.reshape(2000, 8).astype(np.float64).T, bias=True)
    lost = np.linalg.eigvalsh(exact)[:-3].sum() / 8 / 255**2
    assert pca_mse(bright, bright, 3) == pytest.approx(lost, rel=1e-9)


def test_pca_is_the_same_each_time_even_where_it_is_not_unique():
    one_pixel_each = np.diag(np.full(64, 255, np.uint8)).reshape(-1, 8, 8, 1)
    assert len({pca_mse(one_pixel_each, TEST, 3) for _ in range(3)}) == 1


def test_pca_in_colour_is_that_of_all_its_values():
    as_colour, as_grey = TRAIN[:, :6].reshape(-1, 4, 4, 3), TRAIN[:, :6]
    assert pca_mse(as_colour, as_colour, 5) == pca_mse(as_grey, as_grey, 5)


@pytest.mark.parametrize("num_components", [64, 100])
def test_pca_with_as_many_components_as_pixels_is_perfect(num_components):
    assert pca_mse(TRAIN, TEST, num_components) == 0


@pytest.mark.parametrize("num_train", [1, 2, 4])
def test_pca_of_fewer_images_than_components_reconstructs_them(num_train):
    few = TRAIN[:num_train]
    assert pca_mse(few, few, num_components=3) == pytest.approx(0, abs=1e-20)


def test_pca_of_one_image_predicts_it():
    alike = TRAIN[:1].repeat(5, axis=0)
    assert pca_mse(alike, TEST, num_components=3) == mean_image_mse(alike, TEST)


def test_images_too_large_for_a_covariance_have_no_pca():
    large = np.zeros((2, 37, 37, 3), np.uint8)  # 4,107 values each
    assert pca_mse(large, large, num_components=3) is None
    assert mean_image_mse(large, large) == 0


def test_pca_without_components_is_refused():
    with pytest.raises(ValueError, match="num_components must be above 0"):
        pca_mse(TRAIN, TEST, num_components=0)
