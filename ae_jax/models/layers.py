"""What the models are made of: number formats, initialisers, layers."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ae_jax.options import Activation

Initializer = Callable[..., Array]
Layer = TypeVar("Layer", bound=nn.Module)
Precision = Literal["float32", "float64", "bfloat16", "tf32"]
Init = Literal["torch", "flax", "he"]

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "gelu": functools.partial(nn.gelu, approximate=False),  # as PyTorch's nn.GELU
    "tanh": nn.tanh,
    "none": lambda x: x,
}

KERNELS: dict[str, Initializer] = {
    "flax": nn.initializers.lecun_normal(),
    "he": nn.initializers.he_normal(),
    "zeros": nn.initializers.zeros,
}
"""Initialisers of kernels whose biases begin at 0: truncated normal, of variance
1/fan_in (Flax's default) and 2/fan_in (He et al. 2015, "Delving deep into rectifiers",
equation 10); and nothing, for what is to be added to something else."""


def layer_dtype(precision: str) -> jnp.dtype:
    """What the layers compute in; ``tf32`` is a way to multiply float32."""
    return jnp.dtype({"tf32": "float32"}.get(precision, precision))


def param_dtype(precision: str) -> jnp.dtype:
    """What parameters, optimiser, losses, latents and pixels are kept in."""
    return jnp.dtype("float64" if precision == "float64" else "float32")


def uniform_within(bound: float) -> Initializer:
    """Initialiser: uniform in [−bound, bound).

    Source:
        PyTorch ``nn.Linear.reset_parameters``, which uses bound = 1/√fan_in for the
        kernel **and** the bias. (Its ``kaiming_uniform_(a=√5)`` comes to just that.)
    """

    def init(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def make_layer(
    layer: Callable[..., Layer],
    width: int,
    fan_in: int,
    init: str,
    precision: str,
) -> Layer:
    """A layer with a kernel and a bias.

    Args:
        layer: ``nn.Dense`` or one of those below.
        width: features that come out.
        fan_in: what PyTorch takes for it, which bounds its initial weights.
        init: ``torch`` (see :func:`uniform_within`), or a name in :data:`KERNELS`.
        precision: see :func:`layer_dtype` and :func:`param_dtype`.
    """
    if init == "torch":
        kernel = bias = uniform_within(fan_in**-0.5)
    else:
        kernel, bias = KERNELS[init], nn.initializers.zeros
    return layer(
        width,
        dtype=layer_dtype(precision),
        param_dtype=param_dtype(precision),
        kernel_init=kernel,
        bias_init=bias,
    )


def make_dense(widths: Sequence[int], init: str, precision: str) -> list[nn.Dense]:
    """Dense layers between each width and the next; see :func:`make_layer`."""
    return [
        make_layer(nn.Dense, width, fan_in, init, precision)
        for fan_in, width in itertools.pairwise(widths)
    ]


def through_dense(
    layers: Sequence[nn.Module], x: Float[Array, "*B D"], activation: Activation
) -> Float[Array, "*B F"]:
    """What layers make of x one after the other, the last without an activation.

    It comes out in the parameters' number format: a sigmoid in bfloat16 would leave
    fewer grey levels than images have.
    """
    for layer in layers[:-1]:
        x = ACTIVATIONS[activation](layer(x))
    return layers[-1](x).astype(layers[-1].param_dtype)


def _patches(
    x: Float[Array, "*B H W C"], height: int, width: int, stride: int
) -> Float[Array, "*B h w 9*C"]:
    """Each 3×3 pixels, of a padded image, as the channels of one."""
    rows, columns = stride * height, stride * width
    return jnp.concatenate(
        [
            x[..., i : i + rows : stride, j : j + columns : stride, :]
            for i in range(3)
            for j in range(3)
        ],
        axis=-1,
    )


def convolve(
    x: Float[Array, "*B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "*B H W F"]:
    """Convolution of stride 1, as one matrix product, see :func:`downsample`.

    Source:
        ``jax.lax.conv_general_dilated`` with padding SAME, which it equals.
    """
    (height, width), batch = x.shape[-3:-1], [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, (*batch, (1, 1), (1, 1), (0, 0)))
    patches = _patches(x, height, width, stride=1)
    return patches @ kernel.reshape(patches.shape[-1], -1)


def downsample(
    x: Float[Array, "*B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "*B h w F"]:
    """Convolution of stride 2: a size of H becomes ⌈H/2⌉.

    As one matrix product. In a loop on CPU, XLA's own convolutions take twenty times as
    long as that.

    Source:
        ``jax.lax.conv_general_dilated`` with padding SAME, which it equals.
    """
    (height, width), batch = x.shape[-3:-1], [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, (*batch, (height % 2, 1), (width % 2, 1), (0, 0)))
    height, width = -(-height // 2), -(-width // 2)
    patches = _patches(x, height, width, stride=2)
    return patches @ kernel.reshape(patches.shape[-1], -1)


def upsample(
    x: Float[Array, "*B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "*B 2*H 2*W F"]:
    """Transposed convolution of stride 2, as one product, see :func:`downsample`.

    Source:
        ``jax.lax.conv_transpose`` with padding SAME, which it equals.
    """
    (*batch, height, width, _), features = x.shape, kernel.shape[-1]
    # Along an axis the pixels 2i and 2i + 1 come from the inputs i - 1 and i, and this
    # is which row of the kernel takes part; the fourth is zero.
    rows = np.array([[0, 3], [2, 1]])
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = kernel[rows[:, None, :, None], rows[None, :, None, :]]
    matrix = kernel.transpose(0, 1, 4, 2, 3, 5).reshape(-1, 4 * features)
    x = jnp.pad(x, (*[(0, 0)] * len(batch), (1, 0), (1, 0), (0, 0)))
    patches = jnp.concatenate(
        [x[..., i : i + height, j : j + width, :] for i in (0, 1) for j in (0, 1)],
        axis=-1,
    )
    y = (patches @ matrix).reshape(*batch, height, width, 2, 2, features)
    return jnp.swapaxes(y, -4, -3).reshape(*batch, 2 * height, 2 * width, features)


class _Convolution(nn.Module):
    """A layer with a 3×3 kernel and a bias; arguments as of ``nn.Dense``."""

    features: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer

    def convolve(self, x: Array, kernel: Array) -> Array:
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Float[Array, "*B H W C"]) -> Float[Array, "*B h w F"]:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        return self.convolve(x, kernel) + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class Convolve(_Convolution):
    """:func:`convolve` with a bias."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The convolution alone."""
        return convolve(x, kernel)


class Downsample(_Convolution):
    """:func:`downsample` with a bias."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The convolution alone."""
        return downsample(x, kernel)


class Upsample(_Convolution):
    """:func:`upsample` with a bias."""

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The convolution alone."""
        return upsample(x, kernel)


def fold(x: Float[Array, "*B H W C"]) -> Float[Array, "*B h w 4*C"]:
    """Each 2×2 pixels as one, of four times the channels; odd sides are filled up."""
    (height, width), batch = x.shape[-3:-1], [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, (*batch, (0, height % 2), (0, width % 2), (0, 0)))
    parts = [x[..., i::2, j::2, :] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(parts, axis=-1)


def unfold(x: Float[Array, "*B h w K"]) -> Float[Array, "*B 2*h 2*w K//4"]:
    """The image that :func:`fold` made ``x`` of, its odd sides still filled up."""
    *batch, height, width, channels = x.shape
    x = x.reshape(*batch, height, width, 2, 2, channels // 4)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*batch, 2 * height, 2 * width, channels // 4)
