"""A convolutional autoencoder, of which each stage halves the image."""

import itertools
import math

import flax.linen as nn
from jaxtyping import Array, Float

from ae_jax.errors import UserError
from ae_jax.models.layers import (
    ACTIVATIONS,
    Downsample,
    Init,
    Upsample,
    make_layer,
    param_dtype,
)
from ae_jax.options import Activation, Count, options


@options
class ConvAutoencoder:
    """Convolutional autoencoder: each stage halves the image."""

    hidden: tuple[Count, ...] = (32, 64)
    """Channels after each stage of the encoder; the decoder mirrors them."""
    latent_dim: Count = 32
    """Units of the latent."""
    latent_activation: Activation = "relu"
    """Activation of the latent; units of a relu can die."""
    init: Init = "torch"
    """Initialiser: PyTorch's (all uniform in ±1/√fan_in), Flax's (LeCun), or He's."""

    def make(self, shape: tuple[int, int, int], precision: str) -> nn.Module:
        """The network for images of shape (H, W, C).

        Raises:
            UserError: the image is too small to be halved so often.
        """
        most = (max(shape[:2]) - 1).bit_length()  # then a single pixel is left
        if len(self.hidden) > most:
            raise UserError(
                f"model.hidden: {len(self.hidden)} stages, each of which halves the "
                f"image, are too many for {shape[0]}×{shape[1]} pixels; at most {most}"
            )
        return ConvNet(shape, precision, self)


class ConvNet(nn.Module):
    """What :class:`ConvAutoencoder` makes.

    The encoder's stages are 3×3 convolutions of stride 2, each followed by a ReLU, and
    a dense layer makes the latent of what is left. The decoder goes the same way back:
    a dense layer, then transposed convolutions, each cropped to the size that the
    encoder had there, with ReLU between and a sigmoid at the end.

    Attributes:
        shape: of an image, (H, W, C).
        precision: see :mod:`layers`.
        options: sizes, activation and initialiser.

    Source:
        PyTorch ``nn.Conv2d`` and ``nn.ConvTranspose2d`` for the initial weights.
    """

    shape: tuple[int, int, int]
    precision: str
    options: ConvAutoencoder

    def setup(self) -> None:
        """Name the layers encoder_0, …, decoder_0, …, each a kernel and a bias."""
        init, precision = self.options.init, self.precision
        *size, channels = self.shape
        sizes = [tuple(size)]
        for _ in self.options.hidden:
            sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
        widths = (channels, *self.options.hidden)
        self.sizes = [(*size, width) for size, width in zip(sizes, widths, strict=True)]
        features, latent_dim = math.prod(self.sizes[-1]), self.options.latent_dim
        self.encoder = [
            *(
                make_layer(Downsample, width, 9 * fan_in, init, precision)
                for fan_in, width in itertools.pairwise(widths)
            ),
            make_layer(nn.Dense, latent_dim, features, init, precision),
        ]
        # PyTorch takes the outputs of a transposed convolution for its fan_in.
        self.decoder = [
            make_layer(nn.Dense, features, latent_dim, init, precision),
            *(
                make_layer(Upsample, width, 9 * width, init, precision)
                for width in widths[-2::-1]
            ),
        ]

    def encode(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B K"]:
        """The latent of each image; non-negative if its activation is ReLU."""
        for layer in self.encoder[:-1]:
            x = nn.relu(layer(x))
        latent = self.encoder[-1](x.reshape(*x.shape[:-3], math.prod(x.shape[-3:])))
        activation = ACTIVATIONS[self.options.latent_activation]
        return activation(latent.astype(param_dtype(self.precision)))

    def logits(self, latent: Float[Array, "*B K"]) -> Float[Array, "*B H W C"]:
        """The image of each latent before the sigmoid."""
        x = self.decoder[0](latent).reshape(*latent.shape[:-1], *self.sizes[-1])
        for layer, size in zip(self.decoder[1:], self.sizes[-2::-1], strict=True):
            x = layer(nn.relu(x))[..., : size[0], : size[1], :]
        return x.astype(param_dtype(self.precision))

    def decode(self, latent: Float[Array, "*B K"]) -> Float[Array, "*B H W C"]:
        """The image of each latent, pixels in (0, 1)."""
        return nn.sigmoid(self.logits(latent))

    def __call__(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """The reconstruction: ``decode(encode(x))``."""
        return self.decode(self.encode(x))
