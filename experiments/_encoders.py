"""Encoders that are no networks: the rivals of :mod:`experiments.deep`.

Each makes a few numbers of an image, and an image of these again; it is fitted to
training images, at whichever of its settings does best on those of them held out.
Images are rows [N, D], pixels in [0, 1].
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

Rows: TypeAlias = Float[np.ndarray, "N D"]
Reconstruct: TypeAlias = Callable[[Rows], Rows]
"""Images by way of their few numbers."""


class Rival(NamedTuple):
    """A way to make K numbers of an image.

    Attributes:
        fit: ``(training images, K, **setting)`` to the function that reconstructs.
        grid: the values of each setting that are tried.
    """

    fit: Callable[..., Reconstruct]
    grid: Mapping[str, Sequence[Any]] = {}

    def settings(self) -> Iterator[dict[str, Any]]:
        """Each combination of the values."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def fit_best(
    rival: Rival, train: Rows, num_numbers: int, num_held_out: int
) -> tuple[Reconstruct, dict[str, Any]]:
    """A rival fitted at its best setting to all training images, and that setting.

    It is chosen by the error on the last ``num_held_out`` images after a fit to the
    others.
    """
    settings = list(rival.settings())
    if len(settings) > 1:
        fitted, held_out = np.split(train, [len(train) - num_held_out])
        errors = [
            squared_error(rival.fit(fitted, num_numbers, **one)(held_out), held_out)
            for one in settings
        ]
        settings = [settings[int(np.argmin(errors))]]
    return rival.fit(train, num_numbers, **settings[0]), settings[0]


def squared_error(recon: Rows, images: Rows) -> float:
    """Squared error, summed over the pixels of an image, the mean over the images."""
    return float(np.mean(np.sum(np.square(recon - images, dtype=np.float64), axis=1)))


# --- The rivals -----------------------------------------------------------------------


class Plane(NamedTuple):
    """The K directions in which images vary most, and their mean."""

    mean: Float[np.ndarray, " D"]
    directions: Float[np.ndarray, "D K"]

    def encode(self, images: Rows) -> Float[np.ndarray, "N K"]:
        """Where images lie on it."""
        return (images - self.mean) @ self.directions

    def reconstruct(self, images: Rows) -> Rows:
        """The points of it that are nearest to images."""
        return self.encode(images) @ self.directions.T + self.mean


def fit_plane(images: Rows, num_numbers: int) -> Plane:
    """Principal components."""
    mean = images.mean(axis=0)
    centred = images - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return Plane(mean, vectors[:, : -num_numbers - 1 : -1])


def fit_pca(images: Rows, num_numbers: int) -> Reconstruct:
    """Principal components: the best linear autoencoder."""
    return fit_plane(images, num_numbers).reconstruct


def fit_local_pca(images: Rows, num_numbers: int, num_planes: int) -> Reconstruct:
    """Many planes; an image is the number of the nearest one, and K - 1 components.

    Source:
        Kambhatla and Leen, "Dimension reduction by local principal component analysis",
        Neural Computation 9 (1997), by reconstruction distance.
    """
    from sklearn.cluster import MiniBatchKMeans

    clusters = MiniBatchKMeans(num_planes, n_init=1, random_state=0)
    nearest = clusters.fit_predict(images)
    for _ in range(NUM_ROUNDS):
        # A plane that is left with too few images for its directions is given up.
        members = [images[nearest == i] for i in range(num_planes)]
        members = [x for x in members if len(x) >= num_numbers]
        planes = [fit_plane(x, num_numbers - 1) for x in members]
        num_planes = len(planes)
        nearest = _by_nearest(planes, images)[1]
    return lambda x: _by_nearest(planes, x)[0]


NUM_ROUNDS = 8
"""How often images are given to the nearest plane, and planes fitted to theirs."""


def _by_nearest(
    planes: Sequence[Plane], images: Rows
) -> tuple[Rows, Int[np.ndarray, " N"]]:
    """Images as the nearest plane reconstructs them, and which it is."""
    best, least = np.empty_like(images), np.full(len(images), np.inf)
    number = np.zeros(len(images), int)
    for i, plane in enumerate(planes):
        recon = plane.reconstruct(images)
        error = np.sum(np.square(recon - images), axis=1)
        closer = error < least
        best[closer], least[closer], number[closer] = recon[closer], error[closer], i
    return best, number


def fit_kernel_decoder(
    images: Rows, num_numbers: int, width: float, ridge: float
) -> Reconstruct:
    """Principal components, from which kernel ridge regression makes the image.

    What the components leave is predicted by Gaussian kernels at ``NUM_CENTRES`` of the
    training images; their width is in parts of the median distance between two.
    """
    plane = fit_plane(images, num_numbers)
    latents = plane.encode(images)
    chosen = np.random.default_rng(0).permutation(len(images))[:NUM_CENTRES]
    centres = latents[chosen]
    scale = width**2 * np.median(_squared_distances(centres[:200], centres[200:400]))

    def kernels(latents: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N M"]:
        return np.exp(-_squared_distances(latents, centres) / scale)

    products, targets = np.zeros((len(centres),) * 2), np.zeros_like(images[chosen])
    for start in range(0, len(images), BLOCK):
        block = slice(start, start + BLOCK)
        features = kernels(latents[block])
        products += features.T @ features
        targets += features.T @ (images[block] - plane.reconstruct(images[block]))
    products[np.diag_indices_from(products)] += ridge
    weights = np.linalg.solve(products, targets).astype(images.dtype)

    def reconstruct(images: Rows) -> Rows:
        return plane.reconstruct(images) + kernels(plane.encode(images)) @ weights

    return reconstruct


NUM_CENTRES, BLOCK = 4000, 5000


def _squared_distances(
    a: Float[np.ndarray, "N K"], b: Float[np.ndarray, "M K"]
) -> Float[np.ndarray, "N M"]:
    norms = [np.sum(np.square(x), axis=1) for x in (a, b)]
    return np.maximum(norms[0][:, None] + norms[1] - 2 * a @ b.T, 0)


RIVALS = {
    "PCA": Rival(fit_pca),
    "local PCA": Rival(fit_local_pca, {"num_planes": (10, 30, 60)}),
    "PCA, decoded by kernels": Rival(
        fit_kernel_decoder, {"width": (0.5, 1.0, 2.0), "ridge": (1e-2, 1.0)}
    ),
}
"""By the name under which each stands in the table."""
