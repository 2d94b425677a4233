"""The tutorial's network: dense layers from the pixels to the latent and back."""

import math

import flax.linen as nn
from jaxtyping import Array, Float

from ae_jax.models.layers import ACTIVATIONS, Init, make_dense, through_dense
from ae_jax.options import Activation, Count, options


@options
class Autoencoder:
    """Dense autoencoder with a sigmoid at the end."""

    hidden: tuple[Count, ...] = (128, 64, 12)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent_dim: Count = 3
    """Units of the latent."""
    activation: Activation = "relu"
    """Activation of the hidden layers."""
    latent_activation: Activation = "relu"
    """Activation of the latent. The tutorial's is relu, whose units can die."""
    init: Init = "torch"
    """Initialiser: PyTorch's (all uniform in ±1/√fan_in), Flax's (LeCun), or He's."""

    def make(self, shape: tuple[int, int, int], precision: str) -> nn.Module:
        """The network for images of shape (H, W, C)."""
        return DenseAutoencoder(shape, precision, self)


class DenseAutoencoder(nn.Module):
    """What :class:`Autoencoder` makes.

    With the default sizes and 28×28 pixels it is the tutorial's network,
    784-128-64-12-3-12-64-128-784. The latent's own activation is ReLU there too, which
    is its trap: a unit whose input is negative for every image gets no gradient any
    more. It is dead, and if all are, the decoder can only learn the mean image.

    Attributes:
        shape: of an image, (H, W, C).
        precision: see :mod:`layers`.
        options: sizes, activations and initialiser.
    """

    shape: tuple[int, int, int]
    precision: str
    options: Autoencoder

    def setup(self) -> None:
        """Name the layers encoder_0, …, decoder_0, …, each a kernel and a bias."""
        widths = (math.prod(self.shape), *self.options.hidden, self.options.latent_dim)
        self.encoder, self.decoder = (
            make_dense(chain, self.options.init, self.precision)
            for chain in (widths, widths[::-1])
        )

    def encode(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B K"]:
        """The latent of each image; non-negative if its activation is ReLU."""
        x = x.reshape(*x.shape[:-3], math.prod(x.shape[-3:]))
        latent = through_dense(self.encoder, x, self.options.activation)
        return ACTIVATIONS[self.options.latent_activation](latent)

    def logits(self, latent: Float[Array, "*B K"]) -> Float[Array, "*B H W C"]:
        """The image of each latent before the sigmoid."""
        x = through_dense(self.decoder, latent, self.options.activation)
        return x.reshape(*x.shape[:-1], *self.shape)

    def decode(self, latent: Float[Array, "*B K"]) -> Float[Array, "*B H W C"]:
        """The image of each latent, pixels in (0, 1)."""
        return nn.sigmoid(self.logits(latent))

    def __call__(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """The reconstruction: ``decode(encode(x))``."""
        return self.decode(self.encode(x))
