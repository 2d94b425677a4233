"""A residual convolutional network without a bottleneck, for denoising."""

import flax.linen as nn
from jaxtyping import Array, Float

from ae_jax.models.layers import (
    Convolve,
    Init,
    fold,
    make_layer,
    param_dtype,
    unfold,
)
from ae_jax.options import Count, options


@options
class Residual:
    """Residual convolutions at half the image's size; it has no latent."""

    channels: Count = 32
    """Features of each 2×2 block of pixels."""
    num_blocks: Count = 3
    """Residual blocks, each of two 3×3 convolutions."""
    init: Init = "he"
    """Initialiser: PyTorch's (all uniform in ±1/√fan_in), Flax's (LeCun), or He's."""

    def make(self, shape: tuple[int, int, int], precision: str) -> nn.Module:
        """The network for images of shape (H, W, C); its parameters fit any H and W."""
        return ResidualNet(shape, precision, self)


class ResidualNet(nn.Module):
    """What :class:`Residual` makes.

    The image is folded, each 2×2 pixels into one with four times the channels; there
    the blocks add up their corrections, and what comes of them is unfolded and added to
    the image itself, as logits. So nothing has to be kept but what is to be changed.

    Attributes:
        shape: of an image, (H, W, C).
        precision: see :mod:`layers`.
        options: sizes and initialiser.

    Source:
        He et al., "Identity mappings in deep residual networks", ECCV 2016, without its
        normalisation; Zhang et al., "FFDNet", IEEE TIP 27 (2018), for folding.
    """

    shape: tuple[int, int, int]
    precision: str
    options: Residual

    def setup(self) -> None:
        """Name the layers first, blocks_0_0, blocks_0_1, blocks_1_0, …, last."""
        width, folded = self.options.channels, 4 * self.shape[-1]

        def layer(features: int, channels: int, init: str) -> Convolve:
            fan_in = 9 * channels
            return make_layer(Convolve, features, fan_in, init, self.precision)

        self.first = layer(width, folded, self.options.init)
        # Each correction begins at nothing, however many there are.
        self.blocks = [
            (layer(width, width, self.options.init), layer(width, width, "zeros"))
            for _ in range(self.options.num_blocks)
        ]
        self.last = layer(folded, width, "zeros")

    def logits(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """The clean image before the sigmoid."""
        features = self.first(fold(x))
        for one, two in self.blocks:
            features = features + two(nn.silu(one(nn.silu(features))))
        change = self.last(nn.silu(features)).astype(param_dtype(self.precision))
        height, width = x.shape[-3:-1]
        return 6 * (x - 0.5) - 1 + unfold(change)[..., :height, :width, :]

    def __call__(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """The clean image of a noisy one, pixels in (0, 1)."""
        return nn.sigmoid(self.logits(x))
