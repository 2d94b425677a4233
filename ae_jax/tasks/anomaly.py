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
from ae_jax.gradients import oriented_gradients
from ae_jax.keys import Purpose, fold_each, key_for
from ae_jax.objectives import Denoising, Masking, batched
from ae_jax.runs.inputs import as_images
from ae_jax.runs.run import Run, in_blocks
from ae_jax.train import scale

NUM_NEIGHBOURS = 5
NUM_STANDARD = 1000
"""Normal images by whose scores others are brought to one scale."""
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
    losses, seeds = batched(objective, run.model), np.arange(NUM_DRAWS, dtype=np.uint32)

    @jax.jit
    def of_block(params: Any, x: Array, numbers: Array) -> Array:
        def of_draw(seed: Array) -> Array:
            keys = fold_each(key_for(seed, Purpose.SCORE), numbers)
            return losses(params, x, keys)[objective.loss_name]

        return jax.numpy.mean(jax.lax.map(of_draw, seeds), axis=0)

    def score(images: Any) -> Scores:
        with devices.numerics(run.config.train.precision):
            return in_blocks(of_block, run.params, as_images(images, run.shape))

    return score


def denoising(run: Run, normal: Any) -> Fitted:
    """Mean squared error after Gaussian noise of σ 0.25."""
    return noisy_error(run, normal, Denoising(sigma=0.25))


def masking(run: Run, normal: Any) -> Fitted:
    """Mean squared error after half of the pixels were masked."""
    return noisy_error(run, normal, Masking(share=0.5))


# --- Of the latent --------------------------------------------------------------------


def nearest(
    normal: Float[np.ndarray, "M K"], points: Float[np.ndarray, "N K"], skip: int = 0
) -> Scores:
    """Mean distance to the nearest normal points, but for so many nearer ones."""
    from sklearn.neighbors import NearestNeighbors

    count = min(NUM_NEIGHBOURS + skip, len(normal))
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(normal)
    return search.kneighbors(points)[0][:, skip:].mean(axis=1)


def whitening(latents: Float[np.ndarray, "M K"]) -> Callable[[Any], Any]:
    """The linear map that makes latents uncorrelated, each of unit variance.

    Of a direction that hardly varies the variance is taken for a thousandth of the
    others' mean: what it adds is mostly rounding.
    """
    mean = latents.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(latents.T, ddof=0).reshape(2 * mean.shape))
    spread = np.sqrt(np.maximum(values, 1e-3 * values.mean()) + 1e-12)
    return lambda points: ((points - mean) @ (vectors / spread)).astype(np.float32)


def latent_neighbours(run: Run, normal: Any, skip: int = 0) -> Fitted:
    """Mean distance to the five nearest latents of normal images, whitened."""
    latents = run.encode(normal)
    whiten = whitening(latents)
    known = whiten(latents)
    return lambda x: nearest(known, whiten(run.encode(x)), skip)


def latent_density(run: Run, normal: Any) -> Fitted:
    """Mahalanobis distance of the latent, squared, under a shrunk covariance.

    Source:
        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance
        matrices", 2004.
    """
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(run.encode(normal))
    return lambda x: fitted.mahalanobis(run.encode(x))


# --- Of oriented gradients ------------------------------------------------------------


def features(images: Any) -> Float[np.ndarray, "N F"]:
    """Their oriented gradients; see :func:`gradients.oriented_gradients`."""
    blocks = np.array_split(_floats(images), max(1, len(images) // 500))
    with devices.numerics("float32"):
        return np.concatenate([_oriented_gradients(block) for block in blocks])


_oriented_gradients = jax.jit(oriented_gradients)


def gradient_error(run: Run, normal: Any) -> Fitted:
    """Squared distance of the reconstruction's oriented gradients from the image's."""
    del normal
    return lambda x: np.square(features(run.reconstruct(x)) - features(x)).sum(axis=1)


def gradient_neighbours(run: Run, normal: Any, skip: int = 0) -> Fitted:
    """Mean distance to the five nearest normal images by their oriented gradients."""
    del run
    known = features(normal)
    return lambda x: nearest(known, features(x), skip)


def gradients(run: Run, normal: Any) -> Fitted:
    """What the run makes of an image, and how near normal ones are, in one number.

    The logarithms of the error of its oriented gradients and of the distances of its
    latent and of its gradients to normal ones', each in units of its spread over
    normal images.
    """
    parts = (
        lambda skip: gradient_error(run, normal),
        lambda skip: latent_neighbours(run, normal, skip),
        lambda skip: gradient_neighbours(run, normal, skip),
    )
    some, total = normal[:NUM_STANDARD], list[Fitted]()
    for part in parts:
        known = np.log(part(1)(some) + 1e-9)  # each is itself its nearest
        spread = float(known.mean()), float(known.std())
        total.append(_standardised_log(part(0), *spread))
    return lambda x: np.sum([score(x) for score in total], axis=0)


def _standardised_log(score: Fitted, mean: float, std: float) -> Fitted:
    return lambda x: (np.log(score(x) + 1e-9) - mean) / (std + 1e-9)


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
    centred = (found - mean).astype(np.float64)
    squares, directions = np.linalg.eigh(centred.T @ centred)  # faster than an SVD
    kept = squares > 1e-8 * squares[-1]  # the others are rounding
    whiten = directions[:, kept] / np.sqrt(squares[kept])
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
    "gradient_error": AnomalyScore(gradient_error),
    "gradient_neighbours": AnomalyScore(gradient_neighbours, ()),
    "gradients": AnomalyScore(gradients, ("__call__", "encode")),
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
    """How well scores separate anomalies from normal images.

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
