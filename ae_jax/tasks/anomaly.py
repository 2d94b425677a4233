"""How unlike the images that a run was trained on is another one?

An anomaly score is fitted to the run's training images, the normal ones, and gives a
number for each image: the higher, the less normal. To add one: write a function of a
run and normal images, and a line in :data:`SCORES`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float

from ae_jax import devices, metrics
from ae_jax.errors import UserError, suggest
from ae_jax.objectives import Denoising, Masking
from ae_jax.runs.inputs import as_images
from ae_jax.runs.run import Run, in_blocks
from ae_jax.train import scale

NUM_NEIGHBOURS = 5
NUM_DRAWS = 8
"""Noisy copies of an image whose errors are averaged."""

Scores: TypeAlias = Float[np.ndarray, " N"]
Fitted: TypeAlias = Callable[[Any], Scores]


def _floats(images: Any) -> Float[np.ndarray, "N H W C"]:
    return scale(images, np.float32) if images.dtype == np.uint8 else images


# --- Of the reconstruction ------------------------------------------------------------


def squared_error(run: Run, normal: Any) -> Fitted:
    """Mean squared error of the reconstruction."""
    del normal
    return lambda x: metrics.squared_error(run.reconstruct(x), _floats(x))


def dissimilarity(run: Run, normal: Any) -> Fitted:
    """One less the SSIM of the reconstruction."""
    del normal
    return lambda x: 1 - metrics.ssim(run.reconstruct(x), _floats(x))


def noisy_error(run: Run, normal: Any, objective: Any) -> Fitted:
    """Error of what the run makes of noisy copies of the image, beside the image."""
    del normal

    def score(images: Any) -> Scores:
        draws = [run.scores(images, objective, seed) for seed in range(NUM_DRAWS)]
        return np.mean([draw[objective.loss_name] for draw in draws], axis=0)

    return score


def denoising(run: Run, normal: Any) -> Fitted:
    """Mean squared error after Gaussian noise of σ 0.25."""
    return noisy_error(run, normal, Denoising(sigma=0.25))


def masking(run: Run, normal: Any) -> Fitted:
    """Mean squared error after half of the pixels were masked."""
    return noisy_error(run, normal, Masking(share=0.5))


# --- Of the latent --------------------------------------------------------------------


def nearest(
    normal: Float[np.ndarray, "M K"], points: Float[np.ndarray, "N K"]
) -> Scores:
    """Mean distance to the nearest normal points."""
    from sklearn.neighbors import NearestNeighbors

    count = min(NUM_NEIGHBOURS, len(normal))
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(normal)
    return search.kneighbors(points)[0].mean(axis=1)


def latent_neighbours(run: Run, normal: Any) -> Fitted:
    """Mean distance to the five nearest latents of normal images."""
    latents = run.encode(normal)
    return lambda x: nearest(latents, run.encode(x))


def latent_density(run: Run, normal: Any) -> Fitted:
    """Mahalanobis distance of the latent, squared, under a shrunk covariance.

    Source:
        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
        matrices", 2004.
    """
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(run.encode(normal))
    return lambda x: fitted.mahalanobis(run.encode(x))


# --- Of the hidden layers: RaPP -------------------------------------------------------


def pathway_differences(run: Run, images: Any) -> Float[np.ndarray, "N F"]:
    """What the encoder's layers make of an image, less what of its reconstruction.

    All layers side by side, the image itself the first.

    Source:
        Kim et al., "RaPP: novelty detection with reconstruction along projection
        pathway", ICLR 2020, section 3.
    """

    def of_block(params: Any, x: Array, numbers: Array) -> Array:
        del numbers
        recon = run.model.apply({"params": params}, x)
        layers = []
        for image in (x, recon):
            _, found = run.model.apply(
                {"params": params},
                image,
                method="encode",
                capture_intermediates=True,
                mutable=["intermediates"],
            )
            layers.append([image, *jax.tree.leaves(found)])
        differences = [a - b for a, b in zip(*layers, strict=True)]
        return jax.numpy.concatenate(
            [part.reshape(len(x), -1) for part in differences], axis=1
        )

    with devices.numerics(run.config.train.precision):
        images = as_images(images, run.shape)
        return np.asarray(in_blocks(jax.jit(of_block), run.params, images))


def pathway_sum(run: Run, normal: Any) -> Fitted:
    """Squared differences along the encoder, summed (RaPP's SAP)."""
    del normal
    return lambda x: np.square(pathway_differences(run, x)).sum(axis=1)


def pathway_normalised(run: Run, normal: Any) -> Fitted:
    """The same in the directions of normal images' own, each at unit variance (NAP)."""
    found = pathway_differences(run, normal)
    mean = found.mean(axis=0)
    _, values, directions = np.linalg.svd(found - mean, full_matrices=False)
    kept = values > 1e-4 * values[0]  # the others are rounding
    whiten = directions[kept].T / values[kept]
    return lambda x: np.square((pathway_differences(run, x) - mean) @ whiten).sum(1)


class AnomalyScore(NamedTuple):
    """An anomaly score.

    Attributes:
        fit: ``(run, normal images)`` to the function that scores images.
        needs: methods that the run's model must have.
    """

    fit: Callable[[Run, Any], Fitted]
    needs: tuple[str, ...] = ("__call__",)


SCORES: dict[str, AnomalyScore] = {
    "squared_error": AnomalyScore(squared_error),
    "dissimilarity": AnomalyScore(dissimilarity),
    "denoising": AnomalyScore(denoising),
    "masking": AnomalyScore(masking),
    "latent_neighbours": AnomalyScore(latent_neighbours, ("encode",)),
    "latent_density": AnomalyScore(latent_density, ("encode",)),
    "pathway_sum": AnomalyScore(pathway_sum, ("__call__", "encode")),
    "pathway_normalised": AnomalyScore(pathway_normalised, ("__call__", "encode")),
}
"""The anomaly scores by name."""


def fit_score(run: Run, name: str, normal: Any) -> Fitted:
    """An anomaly score of a run's, fitted to normal images.

    Raises:
        UserError: there is none of this name, or not for this run.
    """
    if name not in SCORES:
        raise UserError(f"no score {name!r}{suggest(name, SCORES)}")
    if not run.has(*SCORES[name].needs):
        able = [name for name, score in SCORES.items() if run.has(*score.needs)]
        raise UserError(
            f"{run.folder}: its model has no {', '.join(SCORES[name].needs)}, which "
            f"{name} needs; it can have {', '.join(able)}"
        )
    return SCORES[name].fit(run, normal)


def p_values(scores: Scores, normal: Float[np.ndarray, " M"]) -> Scores:
    """How often a normal image scores as high.

    Args:
        scores: of the images in question.
        normal: of normal images that the run was not trained on.

    Source:
        Bates et al., "Testing for outliers with conformal p-values", Annals of
        Statistics 51 (2023), equation 2: of a normal image it is at most α in α of all
        cases, at most.

    Example:
        >>> p_values(np.array([0.5, 9.0]), np.array([0.0, 1.0, 2.0])).tolist()
        [0.75, 0.25]
    """
    above = len(normal) - np.searchsorted(np.sort(normal), scores, side="left")
    return (1 + above) / (1 + len(normal))


def evaluate(
    scores: Scores, anomalous: Sequence[bool] | np.ndarray
) -> dict[str, float]:
    """How well scores tell anomalies from normal images.

    Returns:
        ``auroc``, ``average_precision``, and ``fpr95``, the share of normal images that
        score as high as all but 5 % of the anomalies.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    false, true, _ = roc_curve(anomalous, scores)
    return {
        "auroc": float(roc_auc_score(anomalous, scores)),
        "average_precision": float(average_precision_score(anomalous, scores)),
        "fpr95": float(false[np.argmax(true >= 0.95)]),
    }
