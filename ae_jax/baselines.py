"""What a reconstruction error is worth: the mean image's and PCA's on the same split.

Fitted on the training split and scored on the test split, like a model. Images are
stored pixels, uint8 [N, H, W, C], and are read block by block, so they may be on disk.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

BLOCK = 256
"""Images read at once; no more, or the sums of ``_second_moment`` are not exact."""

MAX_PIXELS = 4096
"""Most values of an image whose covariance is worth making: at twice as many it takes
0.5 GB."""

WHITE = 255
"""The largest stored pixel; divided by it, pixels lie in [0, 1]."""


@runtime_checkable
class Images(Protocol):
    """Stored pixels, uint8 [N, H, W, C]: an array, or what reads one from disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def mean_image_mse(train: Images, test: Images) -> float:
    """Error of predicting the training split's mean image for every test image.

    The score of a collapsed run, near enough: a model must beat it to have learnt
    anything about single images.

    Args:
        train: the mean is theirs.
        test: scored.

    Returns:
        Mean over all pixels of ``test``, in squared pixel units of [0, 1].

    Example:
        >>> train = np.array([[0, 255], [255, 255]], np.uint8).reshape(2, 2, 1, 1)
        >>> mean_image_mse(train, train[1:])
        0.125
    """
    mean = _mean_image(train)
    return _residual_mse(test, mean, np.empty((len(mean), 0)))


def pca_mse(train: Images, test: Images, num_components: int) -> float | None:
    """Error on the test split of PCA, the best linear autoencoder with such a latent.

    Args:
        train: mean and components are fitted on them.
        test: scored.
        num_components: at least 1; with one for each pixel nothing is lost.

    Returns:
        Mean over all pixels of ``test``, in squared pixel units of [0, 1]. None above
        ``MAX_PIXELS`` values an image.

    Raises:
        ValueError: ``num_components`` is below 1.

    Source:
        Baldi and Hornik, "Neural networks and principal component analysis: learning
        from examples without local minima", Neural Networks 2 (1989): a linear
        autoencoder can do no better on the split that it is fitted on.

    Example:
        >>> line = np.array([[0, 0], [100, 100], [200, 200]], np.uint8)
        >>> line = line.reshape(3, 2, 1, 1)
        >>> round(pca_mse(line, line, num_components=1), 12)
        0.0
    """
    from scipy.sparse.linalg import eigsh

    if num_components < 1:
        raise ValueError(f"num_components must be above 0, got {num_components}")
    mean = _mean_image(train)
    if len(mean) > MAX_PIXELS:
        return None
    if num_components >= len(mean):
        return 0.0
    covariance = _second_moment(train) - np.outer(mean, mean)
    if not covariance.any():  # all images are the same one; ARPACK refuses zeros
        return mean_image_mse(train, test)
    # The seed fixes ARPACK's starting vector, and with it the last bits.
    _, components = eigsh(covariance, num_components, which="LA", rng=0)
    return _residual_mse(test, mean, components)


def _blocks(images: Images) -> Iterator[np.ndarray]:
    """The images as rows of D = H·W·C pixels, ``BLOCK`` of them at a time."""
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK]
        yield block.reshape(len(block), -1)


def _mean_image(images: Images) -> Float[np.ndarray, "D"]:
    """The mean of the images; their sums are integers, and exact in any order."""
    total = sum(block.sum(axis=0, dtype=np.int64) for block in _blocks(images))
    return np.asarray(total / len(images))


def _second_moment(images: Images) -> Float[np.ndarray, "D D"]:
    """Mean over the images of x xᵀ, exact but for the division.

    A block's sums are integers up to 256 · 255² < 2²⁴, which float32 holds exactly:
    the fast single-precision product loses nothing, in whatever order it adds.
    """
    total: Float[np.ndarray, "D D"] = np.zeros(1)
    for block in _blocks(images):
        pixels = block.astype(np.float32)
        total = total + (pixels.T @ pixels)
    return total / len(images)


def _residual_mse(
    images: Images,
    mean: Float[np.ndarray, "D"],
    components: Float[np.ndarray, "D K"],
) -> float:
    """Mean squared part of the pixels, in [0, 1], outside ``mean + span(components)``.

    Args:
        images: scored.
        mean: a point of the subspace, in stored pixels.
        components: orthonormal columns.
    """
    total = 0.0
    for block in _blocks(images):
        centred = block - mean
        residual = centred - centred @ components @ components.T
        total += float(np.sum(residual**2))
    return total / (len(images) * len(mean) * WHITE**2)
