"""A generator that is no network, and what judges samples, for experiments.generate.

Images are rows of binary pixels, 0 and 1.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

MAX_ROUNDS, LEAST_GAIN = 100, 0.01
"""Of EM, which ends when held-out images gain less than so many nats."""


class Mixture(NamedTuple):
    """A mixture of images whose pixels are independent.

    Attributes:
        weights: of its parts, [K]; they sum to one.
        white: how probably each pixel is white, [K, D].
    """

    weights: Float[np.ndarray, " K"]
    white: Float[np.ndarray, "K D"]

    @property
    def num_params(self) -> int:
        """How many numbers it is."""
        return self.weights.size - 1 + self.white.size

    def log_joint(self, rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N K"]:
        """Logarithm of the probability of each image and part."""
        black = np.log1p(-self.white)
        found = rows @ (np.log(self.white) - black).T
        return found + (black.sum(axis=1) + np.log(self.weights))

    def nats(self, rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
        """−log p of each image."""
        from scipy.special import logsumexp

        return -logsumexp(self.log_joint(rows), axis=1)

    def sample(self, num: int, seed: int) -> Float[np.ndarray, "N D"]:
        """How probably each pixel is white, of a part that is drawn."""
        rng = np.random.default_rng(seed)
        share = self.weights.astype(np.float64)
        return self.white[rng.choice(len(share), num, p=share / share.sum())]


def maximise(mixture: Mixture, rows: Float[np.ndarray, "N D"]) -> Mixture:
    """One round of EM, each part beginning with one mean image beside its own."""
    from scipy.special import softmax

    share = softmax(mixture.log_joint(rows), axis=1)
    size = share.sum(axis=0)
    mean = rows.mean(axis=0).clip(1e-3, 1 - 1e-3)
    white = (share.T @ rows + mean) / (size + 1)[:, None]
    weights = (size + 1) / (size + 1).sum()
    return Mixture(weights.astype(np.float32), white.astype(np.float32))


def fit_mixture(
    rows: Float[np.ndarray, "N D"],
    held_out: Float[np.ndarray, "M D"],
    num_parts: int,
    seed: int,
) -> tuple[Mixture, float]:
    """EM from random images, as far as it helps images held out; and their nats."""
    rng = np.random.default_rng(seed)
    first = rows[rng.choice(len(rows), num_parts, replace=False)]
    weights = np.full(num_parts, 1 / num_parts, np.float32)
    mixture, best = Mixture(weights, (0.25 + 0.5 * first).astype(np.float32)), np.inf
    for _ in range(MAX_ROUNDS):
        new = maximise(mixture, rows)
        nats = float(new.nats(held_out).mean())
        if nats > best - LEAST_GAIN:
            break
        mixture, best = new, nats
    return mixture, best


def fit_best_mixture(
    rows: Float[np.ndarray, "N D"],
    held_out: Float[np.ndarray, "M D"],
    sizes: Sequence[int],
    seed: int,
) -> Mixture:
    """Of the number of parts that does best on images held out."""
    fitted = [
        fit_mixture(rows, held_out, size, seed) for size in sizes if size <= len(rows)
    ]
    return min(fitted, key=lambda found: found[1])[0]


class Features(NamedTuple):
    """The hidden layer of a classifier, by which samples are judged.

    Attributes:
        kernel: [D, F].
        bias: [F].
    """

    kernel: Float[np.ndarray, "D F"]
    bias: Float[np.ndarray, " F"]

    def __call__(self, rows: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N F"]:
        """What its units make of images."""
        return np.maximum(rows @ self.kernel + self.bias, 0)


def fit_features(
    rows: Float[np.ndarray, "N D"], labels: Integer[np.ndarray, " N"], num_epochs: int
) -> Features:
    """Those of a classifier of the training images, with a hidden layer of 100."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    net: Any = MLPClassifier(max_iter=num_epochs, random_state=0)
    with warnings.catch_warnings():  # so many epochs are enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        net.fit(rows, labels)
    kernel, bias = (
        layers[0].astype(np.float32) for layers in (net.coefs_, net.intercepts_)
    )
    return Features(kernel, bias)


def nearest(
    rows: Float[np.ndarray, "N D"], known: Float[np.ndarray, "M D"]
) -> Integer[np.ndarray, " N"]:
    """Which of the known images is nearest to each, by its pixels."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(known)
    return search.kneighbors(rows)[1][:, 0]
