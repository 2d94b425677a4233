"""Objectives: what training minimises, of one image.

An objective is a frozen dataclass whose fields are its options. Called with a model,
its parameters, one image and a key for its draws, it gives the image's loss and other
metrics. It knows of no batch: :func:`batched` maps it over one, so that no draw and no
score depends on the other images. To add one: write it and add a line to
:data:`OBJECTIVES`.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from pydantic import Field, FiniteFloat

from ae_jax.errors import UserError
from ae_jax.gradients import oriented_gradients
from ae_jax.options import Count, options
from ae_jax.train import Params

Loss = Float[Array, ""]


@runtime_checkable
class Objective(Protocol):
    """What the trunk asks of an objective."""

    @property
    def loss_name(self) -> str:
        """Names the loss where it is logged: ``train/mse``, ``val/mse``."""

    def __call__(
        self,
        model: nn.Module,
        params: Params,
        x: Float[Array, "H W C"],
        key: Key[Array, ""],
    ) -> tuple[Loss, dict[str, Float[Array, ""]]]:
        """The loss of one image, pixels in [0, 1], and other metrics by name."""


def apply(model: nn.Module, params: Params, x: Array, method: str = "__call__") -> Any:
    """What a method of the model gives for some input.

    Raises:
        UserError: the model has none of this name.
    """
    if not hasattr(model, method):
        name = type(model).__name__
        raise UserError(f"model {name}: has no {method}, which is needed here; add it")
    return model.apply({"params": params}, x, method=method)


def squared_error(
    recon: Float[Array, "H W C"], target: Float[Array, "H W C"]
) -> Float[Array, ""]:
    """Mean squared pixel error of one image.

    Args:
        recon: reconstruction, in the pixel scale of ``target``.
        target: pixels in [0, 1].

    Returns:
        Mean over the pixels (not their sum), in squared pixel units.

    Raises:
        ValueError: the two shapes differ; broadcasting is never wanted here.

    Source:
        PyTorch ``nn.MSELoss()`` of one image.

    Example:
        >>> grey, target = jnp.full((1, 2, 1), 0.5), jnp.array([[[0.5], [1.0]]])
        >>> float(squared_error(grey, target))
        0.125
    """
    if recon.shape != target.shape:
        raise ValueError(f"recon is {recon.shape}, target {target.shape}: not the same")
    return jnp.mean(jnp.square(recon - target))


def binary_cross_entropy(
    logits: Float[Array, "H W C"], target: Float[Array, "H W C"]
) -> Float[Array, ""]:
    """Cross-entropy of one image's pixels, as coin flips with bias sigmoid(logits).

    Args:
        logits: log odds of white, of each pixel.
        target: pixels in [0, 1].

    Returns:
        Mean over the pixels, in nats per pixel.

    Raises:
        ValueError: the two shapes differ.

    Source:
        PyTorch ``nn.BCEWithLogitsLoss()`` of one image.

    Example:
        >>> even = jnp.zeros((1, 2, 1))
        >>> round(float(binary_cross_entropy(even, jnp.array([[[0.0], [1.0]]]))), 4)
        0.6931
    """
    if logits.shape != target.shape:
        raise ValueError(
            f"logits are {logits.shape}, target {target.shape}: not the same"
        )
    # As rows: sums along short axes take XLA up to six times as long on a CPU.
    logits, target = logits.reshape(-1), target.reshape(-1)
    # log(1 + exp(logits)) - target * logits, of an exponential that cannot overflow; by
    # where, since at 0 the slopes of abs and maximum would cancel out.
    white = logits > 0
    rest = jnp.log1p(jnp.exp(jnp.where(white, -logits, logits)))
    return jnp.mean(jnp.where(white, logits, 0) - target * logits + rest)


@options
class Reconstruction:
    """The image itself, by way of the latent."""

    loss: Literal["mse", "bce"] = "mse"
    """Mean squared error, or binary cross-entropy in nats per pixel."""

    @property
    def loss_name(self) -> str:
        """The loss's name."""
        return self.loss

    def __call__(
        self,
        model: nn.Module,
        params: Params,
        x: Float[Array, "H W C"],
        key: Key[Array, ""],
    ) -> tuple[Loss, dict[str, Float[Array, ""]]]:
        """It draws nothing. Beside the cross-entropy ``mse`` is reported."""
        del key
        if self.loss == "mse":
            return squared_error(apply(model, params, x), x), {}
        latent = apply(model, params, x, "encode")
        logits = apply(model, params, latent, "logits")
        mse = squared_error(jax.nn.sigmoid(logits), x)
        return binary_cross_entropy(logits, x), {"mse": mse}


@options
class Gradients:
    """The image's oriented gradients, not its pixels, by way of the latent."""

    loss_name: ClassVar[str] = "gradient_error"

    def __call__(
        self,
        model: nn.Module,
        params: Params,
        x: Float[Array, "H W C"],
        key: Key[Array, ""],
    ) -> tuple[Loss, dict[str, Float[Array, ""]]]:
        """Squared distance, 0 to 2, of the features of the reconstruction; ``mse``.

        See :func:`gradients.oriented_gradients`.
        """
        del key
        recon = apply(model, params, x)
        difference = oriented_gradients(recon) - oriented_gradients(x)
        return jnp.sum(jnp.square(difference)), {"mse": squared_error(recon, x)}


class _FromNoisy:
    """The clean image, from one that ``corrupt`` has made noisy."""

    loss_name: ClassVar[str] = "denoising_mse"

    def corrupt(
        self, x: Float[Array, "H W C"], key: Key[Array, ""]
    ) -> Float[Array, "H W C"]:
        """An image with fresh noise, pixels in [0, 1]."""
        raise NotImplementedError

    def __call__(
        self,
        model: nn.Module,
        params: Params,
        x: Float[Array, "H W C"],
        key: Key[Array, ""],
    ) -> tuple[Loss, dict[str, Float[Array, ""]]]:
        """The squared error of what the model makes of the noisy image."""
        return squared_error(apply(model, params, self.corrupt(x, key)), x), {}


def _draw_level(
    level: float, other: float | None, key: Key[Array, ""], dtype: Any
) -> float | Float[Array, ""]:
    """An image's noise level: the one, or uniform between it and the other."""
    if other is None:
        return level
    # Another key than that of the noise itself.
    share = jax.random.uniform(jax.random.fold_in(key, 1), (), dtype)
    return other + share * (level - other)


Sigma = Annotated[FiniteFloat, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@options
class Denoising(_FromNoisy):
    """The clean image, from one with Gaussian noise, clipped to [0, 1]."""

    sigma: Sigma = 0.25
    """Standard deviation of the Gaussian noise; white is 1."""
    sigma_min: Sigma | None = None
    """Given, each image draws its own, uniform between this and sigma."""

    def corrupt(self, x: Any, key: Any) -> Any:
        """See :class:`_FromNoisy`."""
        sigma = _draw_level(self.sigma, self.sigma_min, key, x.dtype)
        return jnp.clip(x + sigma * jax.random.normal(key, x.shape, x.dtype), 0, 1)


@options
class SaltAndPepper(_FromNoisy):
    """The clean image, from one of whose pixels a share is black or white."""

    share: Share = 0.1
    """The share of the pixels, half of which turn white and half black."""
    share_min: Share | None = None
    """Given, each image draws its own, uniform between this and share."""

    def corrupt(self, x: Any, key: Any) -> Any:
        """See :class:`_FromNoisy`; the channels of a pixel each draw their own."""
        share = _draw_level(self.share, self.share_min, key, x.dtype)
        draw = jax.random.uniform(key, x.shape, x.dtype)
        return jnp.where(draw < share / 2, 0, jnp.where(draw < share, 1, x))


@options
class Masking(_FromNoisy):
    """The clean image, from one of whose pixels a share is black.

    Source:
        Vincent et al., "Extracting and composing robust features with denoising
        autoencoders", ICML 2008.
    """

    share: Share = 0.5
    """The share of the pixels that are masked."""
    share_min: Share | None = None
    """Given, each image draws its own, uniform between this and share."""

    def corrupt(self, x: Any, key: Any) -> Any:
        """See :class:`_FromNoisy`; all channels of a pixel are masked."""
        share = _draw_level(self.share, self.share_min, key, x.dtype)
        return x * (jax.random.uniform(key, (*x.shape[:-1], 1), x.dtype) >= share)


@options
class AnyNoise(_FromNoisy):
    """The clean image, from one with noise of any kind and level up to these."""

    sigma: Sigma = 0.5
    """Highest standard deviation of Gaussian noise."""
    flipped: Share = 0.3
    """Highest share of pixels that turn black or white."""
    masked: Share = 0.5
    """Highest share of pixels that are masked."""

    def corrupt(self, x: Any, key: Any) -> Any:
        """See :class:`_FromNoisy`; the three kinds are equally likely."""
        kinds = (
            Denoising(self.sigma, 0),
            SaltAndPepper(self.flipped, 0),
            Masking(self.masked, 0),
        )
        noisy = jnp.stack([kind.corrupt(x, key) for kind in kinds])
        return noisy[jax.random.randint(jax.random.fold_in(key, 2), (), 0, len(kinds))]


def binarise(x: Float[Array, "H W C"], key: Key[Array, ""]) -> Float[Array, "H W C"]:
    """An image of black and white alone: each pixel white as probably as it is bright.

    The same for every objective that is given this key.

    Source:
        Salakhutdinov and Murray, "On the quantitative analysis of deep belief
        networks", ICML 2008, who drew MNIST's digits so.
    """
    level = jax.random.uniform(jax.random.fold_in(key, 1), x.shape, x.dtype)
    return (level < x).astype(x.dtype)


NUM_TOGETHER = 50
"""Samples of an image's latent that are decoded at a time; the rest waits."""


@options
class Elbo:
    """The binarised image's likelihood, bounded through samples of its latent."""

    num_samples: Count = 1
    """Samples of the latent: 1 is the evidence lower bound; with more it is tighter."""
    beta: Annotated[FiniteFloat, Field(ge=0)] = 1.0
    """Weight of what the latent costs, log q(z|x) − log p(z); 1 bounds the likelihood.
    """
    binarise: bool = True
    """Draw each pixel black or white, afresh each time; else grey is a probability."""

    loss_name: ClassVar[str] = "nats"

    def __call__(
        self,
        model: nn.Module,
        params: Params,
        x: Float[Array, "H W C"],
        key: Key[Array, ""],
    ) -> tuple[Loss, dict[str, Float[Array, ""]]]:
        """The bound of −log p(x), in nats an image.

        Sample i depends on the key and on i alone, not on how many there are. Beside
        the bound: ``distortion``, the mean of −log p(x|z), and ``kl``, the divergence
        of the posterior from the prior.

        Source:
            Burda et al., "Importance weighted autoencoders", ICLR 2016, equation 8;
            β as in Higgins et al., "β-VAE", ICLR 2017.
        """
        if self.binarise:
            x = binarise(x, key)
        mean, log_std = apply(model, params, x, "posterior")
        draws = jax.random.fold_in(key, 2)

        def of_sample(number: Array) -> tuple[Array, Array]:
            own = jax.random.fold_in(draws, number)
            noise = jax.random.normal(own, mean.shape, mean.dtype)
            latent = mean + jnp.exp(log_std) * noise
            logits = apply(model, params, latent, "logits")
            distortion = x.size * binary_cross_entropy(logits, x)
            cost = jnp.sum((latent**2 - noise**2) / 2 - log_std)
            return -distortion - self.beta * cost, distortion

        if self.num_samples > NUM_TOGETHER:  # or a gradient would keep all of them
            of_sample = jax.checkpoint(of_sample)
        log_weights, distortion = jax.lax.map(
            of_sample, jnp.arange(self.num_samples), batch_size=NUM_TOGETHER
        )
        bound = jax.nn.logsumexp(log_weights) - math.log(self.num_samples)
        kl = jnp.sum((mean**2 + jnp.exp(2 * log_std) - 1) / 2 - log_std)
        return -bound, {"distortion": jnp.mean(distortion), "kl": kl}


@options
class Autoregressive:
    """The binarised image's likelihood, each pixel given those before it."""

    binarise: bool = True
    """Draw each pixel black or white, afresh each time; else grey is a probability."""

    loss_name: ClassVar[str] = "nats"

    def __call__(
        self,
        model: nn.Module,
        params: Params,
        x: Float[Array, "H W C"],
        key: Key[Array, ""],
    ) -> tuple[Loss, dict[str, Float[Array, ""]]]:
        """−log p(x), in nats an image, of the image that :class:`Elbo` draws too."""
        if self.binarise:
            x = binarise(x, key)
        logits = apply(model, params, x, "conditionals")
        return x.size * binary_cross_entropy(logits, x), {}


OBJECTIVES: dict[str, type[Any]] = {
    "reconstruction": Reconstruction,
    "denoising": Denoising,
    "salt_and_pepper": SaltAndPepper,
    "masking": Masking,
    "any_noise": AnyNoise,
    "gradients": Gradients,
    "elbo": Elbo,
    "autoregressive": Autoregressive,
}
"""The objectives by the name that ``--objective.name`` takes."""

RESERVED = ("grad_norm", "learning_rate")
"""Names under which the train step and the schedule are logged."""


def batched(
    objective: Objective, model: nn.Module
) -> Callable[..., dict[str, Float[Array, " B"]]]:
    """An objective over a batch: what is minimised, validated and scored.

    Returns:
        ``losses(params, x [B, H, W, C], keys [B])`` to the loss, under its own name,
        and the metrics of each image, by name.

    Raises:
        UserError: when it is traced: a name is used twice, or a value is no scalar.
    """
    who = type(objective).__name__

    def of_one(
        params: Params, x: Float[Array, "H W C"], key: Key[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        loss, metrics = objective(model, params, x, key)
        for name in (objective.loss_name, *RESERVED):
            if name in metrics:
                raise UserError(f"objective {who}: {name} names two metrics; rename it")
        named = {objective.loss_name: loss, **metrics}
        for name, value in named.items():
            if jnp.shape(value) != ():
                raise UserError(
                    f"objective {who}: {name} has shape {jnp.shape(value)}; it must be "
                    "a scalar, of one image"
                )
        return {name: jnp.asarray(value) for name, value in named.items()}

    return jax.vmap(of_one, (None, 0, 0))
