"""An autoregressive network without a latent: each pixel from those before it."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ae_jax.models.layers import Init, make_layer, through_dense
from ae_jax.options import Activation, Count, options


@options
class Made:
    """Each pixel given those before it, row by row, by dense layers with masks."""

    hidden: tuple[Count, ...] = (1000,)
    """Widths of the hidden layers."""
    activation: Activation = "gelu"
    """Activation of the hidden layers."""
    init: Init = "he"
    """Initialiser: PyTorch's (all uniform in ±1/√fan_in), Flax's (LeCun), or He's."""

    def make(self, shape: tuple[int, int, int], precision: str) -> nn.Module:
        """The network for images of shape (H, W, C)."""
        return MadeNet(shape, precision, self)


def masks(num_pixels: int, hidden: tuple[int, ...]) -> list[Bool[np.ndarray, "I O"]]:
    """Which inputs each unit of a layer sees, a mask for each kernel.

    A unit of degree d sees, through all layers, the first d pixels; the degrees of a
    layer are spread evenly.

    Example:
        >>> first, last = masks(3, (2,))
        >>> (first.astype(int) @ last).tolist()  # ways from pixel to pixel
        [[0, 1, 2], [0, 0, 1], [0, 0, 0]]
    """
    degrees: list[Int[np.ndarray, " I"]] = [np.arange(1, num_pixels + 1)]
    for width in hidden:
        degrees.append(1 + np.arange(width) * (num_pixels - 1) // width)
    inner = [b >= a[:, None] for a, b in itertools.pairwise(degrees)]
    return [*inner, degrees[0] > degrees[-1][:, None]]


def _masked(mask: Bool[np.ndarray, "I O"]) -> Callable[..., Array]:
    """A product with the kernel that leaves out what the mask hides."""

    def product(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        return jax.lax.dot_general(x, kernel * mask, *args, **kwargs)

    return product


class MadeNet(nn.Module):
    """What :class:`Made` makes.

    Attributes:
        shape: of an image, (H, W, C).
        precision: see :mod:`layers`.
        options: sizes, activation and initialiser.

    Source:
        Germain et al., "MADE: masked autoencoder for distribution estimation", ICML
        2015, in one order of the pixels.
    """

    shape: tuple[int, int, int]
    precision: str
    options: Made

    def setup(self) -> None:
        """Name the layers layers_0, layers_1, …, each a kernel and a bias."""
        self.layers = [
            make_layer(
                functools.partial(nn.Dense, dot_general=_masked(mask)),
                mask.shape[1],
                mask.shape[0],
                self.options.init,
                self.precision,
            )
            for mask in masks(math.prod(self.shape), self.options.hidden)
        ]

    def conditionals(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """The log odds of white of each pixel, given those before it alone."""
        rows = x.reshape(*x.shape[:-3], math.prod(x.shape[-3:]))
        odds = through_dense(self.layers, rows, self.options.activation)
        return odds.reshape(x.shape)

    def __call__(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
        """How probably each pixel is white, given those before it."""
        return nn.sigmoid(self.conditionals(x))
