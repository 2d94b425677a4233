"""A variational autoencoder: a distribution of latents for each image."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ae_jax.models.layers import Init, make_dense, through_dense
from ae_jax.options import Activation, Count, options

MAX_LOG_STD = 10.0
"""At most ± this: the exponential of what an untrained encoder says might overflow."""


@options
class Variational:
    """Dense variational autoencoder of binary pixels."""

    hidden: tuple[Count, ...] = (500, 500)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent_dim: Count = 50
    """Units of the latent."""
    activation: Activation = "gelu"
    """Activation of the hidden layers."""
    init: Init = "he"
    """Initialiser: PyTorch's (all uniform in ±1/√fan_in), Flax's (LeCun), or He's."""

    def make(self, shape: tuple[int, int, int], precision: str) -> nn.Module:
        """The network for images of shape (H, W, C)."""
        return VariationalAutoencoder(shape, precision, self)


class VariationalAutoencoder(nn.Module):
    """What :class:`Variational` makes.

    The prior of the latent is a standard Gaussian, its posterior given an image a
    Gaussian of diagonal covariance, and each pixel given the latent a coin flip. As any
    autoencoder's, ``encode`` gives one latent: the posterior's mean.

    Attributes:
        shape: of an image, (H, W, C).
        precision: see :mod:`layers`.
        options: sizes, activation and initialiser.

    Source:
        Kingma and Welling, "Auto-encoding variational Bayes", ICLR 2014, appendix C.
    """

    shape: tuple[int, int, int]
    precision: str
    options: Variational

    def setup(self) -> None:
        """Name the layers encoder_0, …, decoder_0, …, each a kernel and a bias."""
        pixels, latent_dim = math.prod(self.shape), self.options.latent_dim
        hidden, init = self.options.hidden, self.options.init
        down = (pixels, *hidden, 2 * latent_dim)
        self.encoder = make_dense(down, init, self.precision)
        up = (latent_dim, *hidden[::-1], pixels)
        self.decoder = make_dense(up, init, self.precision)

    def posterior(
        self, x: Float[Array, "*B H W C"]
    ) -> tuple[Float[Array, "*B K"], Float[Array, "*B K"]]:
        """Mean of the latent given each image, and the logarithm of its deviation."""
        x = x.reshape(*x.shape[:-3], math.prod(x.shape[-3:]))
        x = through_dense(self.encoder, x, self.options.activation)
        mean, log_std = jnp.split(x, 2, axis=-1)
        return mean, jnp.clip(log_std, -MAX_LOG_STD, MAX_LOG_STD)

    def encode(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B K"]:
        """The mean of the latent given each image."""
        return self.posterior(x)[0]

    def logits(self, latent: Float[Array, "*B K"]) -> Float[Array, "*B H W C"]:
        """The log odds of white of each pixel, given the latent."""
        x = through_dense(self.decoder, latent, self.options.activation)
        return x.reshape(*x.shape[:-1], *self.shape)

    def decode(self, latent: Float[Array, "*B K"]) -> Float[Array, "*B H W C"]:
        """How probably each pixel is white, given the latent."""
        return nn.sigmoid(self.logits(latent))

    def __call__(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """The reconstruction: ``decode(encode(x))``."""
        return self.decode(self.encode(x))
