"""The networks, by name: a class whose fields are the options, and which makes one.

``make(shape, precision)`` gives a Linen module that maps images ``[*B, H, W, C]``,
pixels in [0, 1], to a reconstruction of the same shape; one with a latent ``[*B, K]``
has the methods ``encode``, ``decode`` and ``logits`` (``decode`` before the sigmoid),
and one with a distribution of it for each image has ``posterior``, which gives the mean
and the logarithm of the deviation of a diagonal Gaussian. One that gives each pixel's
log odds from the pixels before it alone has ``conditionals``.
All its state is in its parameters. To add one: write the two classes and add a line to
:data:`MODELS`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Key

from ae_jax.errors import UserError
from ae_jax.models.conv import ConvAutoencoder
from ae_jax.models.dense import Autoencoder
from ae_jax.models.layers import param_dtype
from ae_jax.models.made import Made
from ae_jax.models.residual import Residual
from ae_jax.models.variational import Variational
from ae_jax.train import Params

MODELS: dict[str, type[Any]] = {
    "autoencoder": Autoencoder,
    "conv": ConvAutoencoder,
    "residual": Residual,
    "variational": Variational,
    "made": Made,
}
"""The models by the name that ``--model.name`` takes."""


def init_params(
    model: nn.Module, key: Key[Array, ""], shape: tuple[int, int, int], precision: str
) -> Params:
    """The model's first parameters.

    Raises:
        UserError: it keeps other state too, which no checkpoint would hold.
    """
    variables = model.init(key, jnp.zeros((1, *shape), param_dtype(precision)))
    others = sorted(set(variables) - {"params"})
    if others:
        raise UserError(
            f"model {type(model).__name__}: has state beside its parameters "
            f"({', '.join(others)}); use layers without, such as GroupNorm or LayerNorm"
        )
    return variables["params"]
