"""Losses of each example, and the objectives that training minimises.

A loss compares reconstruction and target, [B, D] × [B, D] → [B]. An objective is what
the train step differentiates: ``objective(params, x, key) -> (per_example, metrics)``,
both of each example, so that the step alone decides how a batch is averaged.
To add a loss: write it and add a line to :data:`LOSSES`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Params = Any
Loss = Callable[[Float[Array, "B D"], Float[Array, "B D"]], Float[Array, " B"]]
Objective = Callable[
    [Params, Float[Array, "B D"], Key[Array, ""]],
    tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]],
]


def _check_shapes(recon: Array, target: Array) -> None:
    if recon.shape != target.shape:
        raise ValueError(f"recon is {recon.shape}, target {target.shape}: not the same")


def squared_error(
    recon: Float[Array, "B D"], target: Float[Array, "B D"]
) -> Float[Array, " B"]:
    """Mean squared pixel error of each example.

    Args:
        recon: reconstruction, in the pixel scale of ``target``.
        target: pixels in [0, 1].

    Returns:
        Mean over D (not the sum), in squared pixel units.

    Raises:
        ValueError: the two shapes differ; broadcasting is never wanted here.

    Source:
        PyTorch ``nn.MSELoss(reduction="none")`` averaged over axis 1.

    Example:
        >>> squared_error(jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 1.0]])).tolist()
        [0.125]
    """
    _check_shapes(recon, target)
    return jnp.mean(jnp.square(recon - target), axis=1)


def binary_cross_entropy(
    recon: Float[Array, "B D"], target: Float[Array, "B D"]
) -> Float[Array, " B"]:
    """Cross-entropy of each example's pixels, as coin flips with bias ``recon``.

    Args:
        recon: probabilities in [0, 1].
        target: pixels in [0, 1].

    Returns:
        Mean over D, in nats per pixel.

    Raises:
        ValueError: the two shapes differ.

    Source:
        PyTorch ``nn.BCELoss``. It bounds the logarithms at −100; we keep ``recon`` one
        float32 rounding away from 0 and 1 instead, so that the gradient stays finite.

    Example:
        >>> half = jnp.array([[0.5, 0.5]])
        >>> round(float(binary_cross_entropy(half, jnp.array([[0.0, 1.0]]))[0]), 4)
        0.6931
    """
    _check_shapes(recon, target)
    tiny = jnp.finfo(jnp.float32).eps
    p = jnp.clip(recon, tiny, 1 - tiny)
    return -jnp.mean(target * jnp.log(p) + (1 - target) * jnp.log1p(-p), axis=1)


LOSSES: dict[str, Loss] = {"mse": squared_error, "bce": binary_cross_entropy}
"""The losses by the name that ``--train.loss`` takes and the metrics carry."""


def make_reconstruction(model: nn.Module, loss: Loss) -> Objective:
    """The plain autoencoder's objective: the loss of the reconstruction.

    It draws nothing. Where the loss is not the squared error, that is reported as the
    metric ``mse``, so that runs with different losses can be compared.
    """

    def objective(
        params: Params, x: Float[Array, "B D"], key: Key[Array, ""]
    ) -> tuple[Float[Array, " B"], dict[str, Float[Array, " B"]]]:
        del key
        recon: Array = model.apply({"params": params}, x)  # type: ignore[assignment]
        metrics = {} if loss is squared_error else {"mse": squared_error(recon, x)}
        return loss(recon, x), metrics

    return objective
