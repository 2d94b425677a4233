"""Detectors that are no networks: the rivals of :mod:`experiments.anomaly`.

Each is fitted to normal training images alone, at a setting that is usual or was fixed
on Fashion-MNIST, and scores an image by itself: the higher, the less normal. Images are
[N, H, W, C], pixels in [0, 1].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from ae_jax.tasks.anomaly import Fitted, Scores, features, nearest

Images: TypeAlias = Float[np.ndarray, "N H W C"]
Rows: TypeAlias = Float[np.ndarray, "N D"]

CELL, ORIENTATIONS = 4, 9
"""Pixels of a cell's side, and directions, of histograms of gradients."""


class Rival(NamedTuple):
    """A way to detect anomalies.

    Attributes:
        fit: ``(normal images, **setting)`` to the function that scores images.
        setting: what else it is given.
        limit: normal images that it is fitted to at most.
    """

    fit: Callable[..., Fitted]
    setting: Mapping[str, Any] = {}
    limit: int | None = None


def score_rivals(normal: Images, held_out: Images, test: Images) -> dict[str, Scores]:
    """The scores of the test images by each rival, by its name.

    Args:
        normal: training images.
        held_out: other normal images: by their mean and spread scores that are summed
            are brought to one scale.
        test: what is scored.
    """
    found, standardised = {}, {}
    for name, rival in RIVALS.items():
        score = rival.fit(normal[: rival.limit], **rival.setting)
        found[name] = score(test)
        if any(name in parts for parts in SUMS.values()):
            standardised[name] = standardise(found[name], score(held_out))
    for name, parts in SUMS.items():
        found[name] = np.sum([standardised[part] for part in parts], axis=0)
    return found


def standardise(scores: Scores, normal: Float[np.ndarray, " M"]) -> Scores:
    """Scores less the mean of normal images', in units of their spread."""
    return (scores - normal.mean()) / (normal.std() + 1e-12)


# --- What is compared -----------------------------------------------------------------


def pixels(images: Images, sigma: float = 0, unit: bool = False) -> Rows:
    """The pixels as rows, after a Gaussian blur, scaled to unit norm if asked."""
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(images, sigma, axes=(1, 2)) if sigma else images
    rows = blurred.reshape(len(images), -1).astype(np.float32)
    if unit:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-6
    return rows


def shifted(images: Images, by: int) -> Images:
    """The images, moved by up to so many pixels each way, black coming in."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (by, by), (by, by), (0, 0)))
    steps = range(2 * by + 1)
    return np.concatenate(
        [padded[:, i : i + height, j : j + width] for i in steps for j in steps]
    )


def gradients(images: Images) -> Rows:
    """Histograms of oriented gradients: cells of 4×4 pixels, blocks of 2×2 cells.

    Source:
        Dalal and Triggs, CVPR 2005; the numbers are those of ``skimage.feature.hog``,
        which takes a hundred times as long.
    """
    grey = images.mean(axis=3)
    down, right = np.zeros_like(grey), np.zeros_like(grey)
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    right[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    angle = np.rad2deg(np.arctan2(down, right)) % 180
    which = (angle * (ORIENTATIONS / 180)).astype(np.int8) % ORIENTATIONS
    size, (height, width) = np.hypot(down, right), (x // CELL for x in grey.shape[1:])
    inside = np.s_[:, : height * CELL, : width * CELL]
    cells = [
        np.where(which == k, size, 0)[inside]
        .reshape(-1, height, CELL, width, CELL)
        .mean(axis=(2, 4))
        for k in range(ORIENTATIONS)
    ]
    each = np.stack(cells, axis=-1)
    corners = [(slice(i, height - 1 + i), slice(j, width - 1 + j)) for i, j in SQUARE]
    blocks = np.concatenate([each[:, i, j] for i, j in corners], axis=-1)
    for largest in (0.2, np.inf):
        norm = np.sqrt(np.square(blocks).sum(axis=-1, keepdims=True) + 1e-10)
        blocks = np.minimum(blocks / norm, largest)
    return blocks.reshape(len(images), -1).astype(np.float32)


SQUARE = ((0, 0), (0, 1), (1, 0), (1, 1))


# --- The rivals -----------------------------------------------------------------------


def neighbours(
    normal: Images, sigma: float = 0, unit: bool = False, shift: int = 0
) -> Fitted:
    """Mean distance to the five nearest normal images."""
    known = pixels(shifted(normal, shift), sigma, unit)
    return lambda images: nearest(known, pixels(images, sigma, unit))


def feature_neighbours(normal: Images, of: Callable[[Images], Rows]) -> Fitted:
    """The same of features of the images."""
    known = of(normal)
    return lambda images: nearest(known, of(images))


def residual(normal: Images, share: float, **of: Any) -> Fitted:
    """Squared distance to the plane of the components with this share of variance."""
    from sklearn.decomposition import PCA

    model = PCA(share, svd_solver="covariance_eigh").fit(pixels(normal, **of))

    def score(images: Images) -> Scores:
        rows = pixels(images, **of)
        recon = model.inverse_transform(model.transform(rows))
        return np.square(rows - recon).sum(axis=1)

    return score


def density(normal: Images, bandwidth: float, **of: Any) -> Fitted:
    """Less the logarithm of the density by Gaussian kernels, up to a constant."""
    from scipy.special import logsumexp
    from sklearn.metrics import pairwise_distances_chunked

    known = pixels(normal, **of)

    def of_block(distances: Any, start: int) -> Scores:
        return -logsumexp(-np.square(distances / bandwidth) / 2, axis=1)

    def score(images: Images) -> Scores:
        rows = pixels(images, **of)
        return np.concatenate(
            [*pairwise_distances_chunked(rows, known, reduce_func=of_block)]
        )

    return score


def gaussian(normal: Images, **of: Any) -> Fitted:
    """Mahalanobis distance, squared, under Ledoit and Wolf's covariance."""
    from sklearn.covariance import LedoitWolf

    model = LedoitWolf(store_precision=True).fit(pixels(normal, **of))
    return lambda images: model.mahalanobis(pixels(images, **of))


def of_sklearn(normal: Images, make: str, options: Any, **of: Any) -> Fitted:
    """A detector of scikit-learn's, by its name in that library."""
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor
    from sklearn.svm import OneClassSVM

    makers = (IsolationForest, LocalOutlierFactor, OneClassSVM)
    model = {maker.__name__: maker for maker in makers}[make](**options)
    model.fit(pixels(normal, **of))
    return lambda images: -model.score_samples(pixels(images, **of))


SMOOTH: dict[str, Any] = {"sigma": 1}
BLURRED: dict[str, Any] = {**SMOOTH, "unit": True}
BEST_NEIGHBOURS, GRADIENTS = "neighbours, blurred, unit norm", "neighbours of gradients"
ORIENTED = "neighbours of oriented gradients"
SHIFTED = "neighbours, blurred, unit norm, shifted"
SUMS = {
    "sum of blurred and gradients": (BEST_NEIGHBOURS, GRADIENTS),
    "sum of blurred, shifted and gradients": (SHIFTED, GRADIENTS),
    "sum of blurred and oriented gradients": (BEST_NEIGHBOURS, ORIENTED),
}
"""Rivals whose standardised scores are summed, by the name of the sum."""


def _of(make: str, limit: int | None = None, **options: Any) -> Rival:
    return Rival(of_sklearn, {"make": make, "options": options, **SMOOTH}, limit)


RIVALS: dict[str, Rival] = {
    "neighbours": Rival(neighbours),
    "neighbours, unit norm": Rival(neighbours, {"unit": True}),
    "neighbours, blurred": Rival(neighbours, SMOOTH),
    BEST_NEIGHBOURS: Rival(neighbours, BLURRED),
    SHIFTED: Rival(neighbours, {**BLURRED, "shift": 1}),
    GRADIENTS: Rival(feature_neighbours, {"of": gradients}),
    ORIENTED: Rival(feature_neighbours, {"of": features}),
    "PCA residual": Rival(residual, {"share": 0.95, **SMOOTH}),
    "kernel density": Rival(density, {"bandwidth": 0.1, **BLURRED}),
    "Gaussian, shrunk": Rival(gaussian, SMOOTH),
    "local outlier factor": _of("LocalOutlierFactor", n_neighbors=20, novelty=True),
    "one-class SVM": _of("OneClassSVM", 3000, nu=0.1, gamma="scale"),
    "isolation forest": _of("IsolationForest", n_estimators=200, random_state=0),
}
"""The rivals by their names."""
