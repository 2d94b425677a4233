"""Images that never were: drawn from a run, and how likely a run finds real ones."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from ae_jax import devices
from ae_jax.errors import UserError
from ae_jax.keys import Purpose, fold_each, key_for
from ae_jax.objectives import Autoregressive, Elbo, apply, binarise
from ae_jax.runs.run import Run, draw_each

MAX_IMAGES = 10_000
"""That are drawn at once."""
NUM_FITTED, COMPONENTS = 10_000, (1, 5, 20, 80)
"""Training images whose latents a mixture of Gaussians is fitted to, at most, and how
many Gaussians it may have: as the Bayesian information criterion chooses."""
ACTIVE_VARIANCE = 0.01

Images: TypeAlias = Float[np.ndarray, "N H W C"]


def binarised(images: Any, seed: int = 0) -> Images:
    """Black and white images: the very ones that a run's bound is of.

    Args:
        images: [N, H, W, C], uint8 or floats in [0, 1].
        seed: of the draws, see :func:`ae_jax.runs.run.draw_each`.

    Returns:
        float32, 0 and 1.
    """
    return draw_each(binarise, images, seed)


def nats(
    run: Run, images: Any, num_samples: int = 5000, seed: int = 0
) -> Float[np.ndarray, " N"]:
    """−log p of each binarised image, in nats; bounded from above if there is a latent.

    Args:
        run: of a model with ``posterior``, or with ``conditionals``, which is exact.
        images: any number of them.
        num_samples: of each image's latent; the more, the tighter.
        seed: of the binarisation and of the samples.

    Raises:
        UserError: the run's model has neither.
    """
    if run.has("conditionals"):
        objective: Any = Autoregressive()
    elif run.has("posterior"):
        objective = Elbo(num_samples=num_samples)
    else:
        raise UserError(
            f"{run.folder}: its model gives images no probability; train one with "
            "posterior or conditionals, such as --model.name variational"
        )
    return run.scores(images, objective, seed)["nats"]


def active_units(run: Run, images: Any) -> Bool[np.ndarray, " K"]:
    """Which latent units vary from image to image: in their mean, by more than 0.01.

    Source:
        Burda et al., "Importance weighted autoencoders", ICLR 2016, section 5.
    """
    return run.encode(images).var(axis=0, dtype=np.float64) > ACTIVE_VARIANCE


# --- Images that never were -----------------------------------------------------------


def sample(run: Run, num: int, seed: int = 0) -> Images:
    """Draw images from a run.

    Args:
        run: of a model in one of :data:`WAYS`.
        num: how many; the first ones do not depend on it.
        seed: image i draws from ``fold_in(key_for(seed, GENERATE), i)``.

    Returns:
        Pixels in [0, 1]: of a latent that was drawn, how probably each is white; of a
        model without, 0 and 1.

    Raises:
        UserError: the run cannot be sampled from; num or seed is out of range.
    """
    if not 0 < num <= MAX_IMAGES:
        raise UserError(f"num: must be from 1 to {MAX_IMAGES:,}, got {num}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed: must be from 0 to {2**32 - 1}, got {seed}")
    for way in WAYS:
        if run.has(*way.needs):
            with devices.numerics("float32"):
                keys = fold_each(key_for(seed, Purpose.GENERATE), jnp.arange(num))
            return way.draw(run, keys)
    able = "; ".join(", ".join(way.needs) for way in WAYS)
    raise UserError(
        f"{run.folder}: its model, {type(run.model).__name__}, has no latent to draw "
        f"and so cannot be sampled from; it takes one with all of: {able}"
    )


def from_prior(run: Run, keys: Key[Array, " N"]) -> Images:
    """Decode latents of the standard Gaussian that the posterior is held to."""
    latent_dim = run.encode(np.zeros((1, *run.shape), np.uint8)).shape[1]
    return run.decode(_gaussian(keys, latent_dim))


def from_mixture(run: Run, keys: Key[Array, " N"]) -> Images:
    """Decode latents of a mixture of Gaussians fitted to training images' latents."""
    mixture = fit_mixture(run.encode(run.data().train.images[:NUM_FITTED]))
    return run.decode(draw_latents(mixture, keys))


def pixel_by_pixel(run: Run, keys: Key[Array, " N"]) -> Images:
    """Draw each pixel given those that were drawn before it."""
    size = int(np.prod(run.shape))

    def of_one(params: Any, key: Key[Array, ""]) -> Array:
        level = jax.random.uniform(key, (size,), "float32")

        def draw(i: Array, pixels: Array) -> Array:
            x = pixels.reshape(run.shape)
            odds = apply(run.model, params, x, "conditionals").reshape(-1)[i]
            white = level[i] < jax.nn.sigmoid(odds)
            return pixels.at[i].set(white.astype(pixels.dtype))

        empty = jnp.zeros(size, jax.tree.leaves(params)[0].dtype)
        return jax.lax.fori_loop(0, size, draw, empty).reshape(run.shape)

    with devices.numerics(run.config.train.precision):
        return np.asarray(jax.jit(jax.vmap(of_one, (None, 0)))(run.params, keys))


class Way(NamedTuple):
    """How images are drawn.

    Attributes:
        needs: methods that the run's model must have.
        draw: ``(run, keys [N])`` to images.
    """

    needs: tuple[str, ...]
    draw: Callable[[Run, Any], Images]


WAYS = (
    Way(("posterior", "decode"), from_prior),
    Way(("conditionals",), pixel_by_pixel),
    Way(("encode", "decode"), from_mixture),
)
"""The first that a run's model can have is taken."""


def fit_mixture(latents: Float[np.ndarray, "N K"]) -> Any:
    """scikit-learn's mixture of Gaussians, with as many as suit the latents."""
    from sklearn.mixture import GaussianMixture

    latents = latents.astype(np.float64)
    distinct = len(np.unique(latents, axis=0))
    fitted = [
        GaussianMixture(count, max_iter=1000, random_state=0).fit(latents)
        for count in COMPONENTS
        if count <= distinct
    ]
    return min(fitted, key=lambda mixture: mixture.bic(latents))


def draw_latents(mixture: Any, keys: Key[Array, " N"]) -> Float[np.ndarray, "N K"]:
    """A latent of a mixture from each key: which Gaussian, and where in it."""
    with devices.numerics("float32"):
        choose = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))
        level = np.asarray(choose(keys))
    ends = np.cumsum(mixture.weights_)
    part: Int[np.ndarray, " N"] = np.searchsorted(ends, level * ends[-1], "right")
    spread = np.linalg.cholesky(mixture.covariances_)[part]
    noise = _gaussian(keys, spread.shape[-1])
    return mixture.means_[part] + np.einsum("nij,nj->ni", spread, noise)


def _gaussian(keys: Key[Array, " N"], size: int) -> Float[np.ndarray, "N K"]:
    """A vector of independent standard Gaussians from each key."""
    with devices.numerics("float32"):
        draw = jax.vmap(lambda key: jax.random.normal(key, (size,), "float32"))
        return np.asarray(draw(keys))


# --- Their quality --------------------------------------------------------------------


def precision_recall(
    real: Float[np.ndarray, "M F"],
    generated: Float[np.ndarray, "N F"],
    num_neighbours: int = 3,
) -> tuple[float, float]:
    """How much of what is generated seems real, and how much of what is real it covers.

    A feature vector lies on the manifold of others if it is as near to one of them as
    that one's k-th nearest fellow. Precision is the share of generated ones on the
    manifold of real ones, recall the reverse.

    Args:
        real: features of real images.
        generated: of generated ones; best as many.
        num_neighbours: k.

    Source:
        Kynkäänniemi et al., "Improved precision and recall metric for assessing
        generative models", NeurIPS 2019, equations 1 and 2.
    """
    precision = _on_manifold(generated, real, num_neighbours)
    recall = _on_manifold(real, generated, num_neighbours)
    return float(precision.mean()), float(recall.mean())


def _on_manifold(
    points: Float[np.ndarray, "N F"], of: Float[np.ndarray, "M F"], num_neighbours: int
) -> Bool[np.ndarray, " N"]:
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=num_neighbours, algorithm="brute").fit(of)
    radius = search.kneighbors()[0][:, -1]  # each is no neighbour of itself

    def inside(distances: Any, start: int) -> Any:
        return (distances <= radius).any(axis=1)

    return np.concatenate([*pairwise_distances_chunked(points, of, reduce_func=inside)])
