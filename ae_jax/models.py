"""The networks: Linen modules whose fields are their sizes.

A model maps pixels [B, D] to a reconstruction [B, D], by way of ``encode`` and
``decode``; the first field is the shape of an image, of which D is the product. To add
one: write the module and add a line to :data:`MODELS`.
"""

import itertools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ae_jax.config import UserError

Initializer = Callable[..., Array]
Layer = TypeVar("Layer", bound=nn.Module)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "leaky_relu": nn.leaky_relu,
    "none": lambda x: x,
}

KERNELS: dict[str, Initializer] = {
    "flax": nn.initializers.lecun_normal(),
    "he": nn.initializers.he_normal(),
}
"""Initialisers of kernels whose biases begin at 0: truncated normal, of variance
1/fan_in (Flax's default) and 2/fan_in (He et al. 2015, "Delving deep into rectifiers",
equation 10)."""


def uniform_within(bound: float) -> Initializer:
    """Initialiser: uniform in [−bound, bound).

    Source:
        PyTorch ``nn.Linear.reset_parameters``, which uses bound = 1/√fan_in for the
        kernel **and** the bias. (Its ``kaiming_uniform_(a=√5)`` comes to just that.)
    """

    def init(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        noted = _noted.get()
        if noted is None:
            return jax.random.uniform(key, shape, dtype, -bound, bound)
        noted.append(_Draw(jnp.zeros(shape, dtype), key, bound))
        return noted[-1].place

    return init


class _Draw(NamedTuple):
    """A draw of :func:`uniform_within` that is yet to be made."""

    place: Array
    """Holds its place among the parameters, and has its shape and type."""
    key: Key[Array, ""]
    bound: float


_noted: ContextVar[list[_Draw] | None] = ContextVar("_noted", default=None)
"""Where draws are noted instead of made, within :func:`draw_together`."""


def draw_together(
    init: Callable[[Key[Array, ""]], Any],
) -> Callable[[Key[Array, ""]], Any]:
    """The same parameters, to the bit, their uniform draws made as two.

    XLA takes a quarter of a second for the random bits of each shape; for sixteen draws
    that is most of a cold start. But bit i of a draw follows from its key and i alone
    (JAX's default, ``jax_threefry_partitionable``), so a small draw is the beginning of
    a large one: here each is the beginning of a row as long as the longest. Those above
    the mean size have rows of their own, lest a bias take the room of a kernel.

    Args:
        init: a key to parameters, drawn by :func:`uniform_within` or as they please.
    """

    def init_together(key: Key[Array, ""]) -> Any:
        before = _noted.set([])
        try:
            params, draws = init(key), _noted.get() or []
        finally:
            _noted.reset(before)
        mean = sum(draw.place.size for draw in draws) / max(1, len(draws))
        alike: dict[Any, list[_Draw]] = {}
        for draw in draws:
            kind = (draw.place.dtype, draw.place.size > mean)
            alike.setdefault(kind, []).append(draw)
        drawn: dict[int, Array] = {}
        for group in alike.values():
            drawn |= _draw_rows(group)
        return jax.tree.map(lambda leaf: drawn.get(id(leaf), leaf), params)

    return init_together


def _draw_rows(draws: list[_Draw]) -> dict[int, Array]:
    """Draws of one type by the identity of their places."""
    width, dtype = max(draw.place.size for draw in draws), draws[0].place.dtype

    def draw_row(key: Key[Array, ""], bound: Float[Array, ""]) -> Float[Array, " W"]:
        return jax.random.uniform(key, (width,), dtype, -bound, bound)

    keys = jnp.stack([draw.key for draw in draws])
    rows = jax.vmap(draw_row)(keys, jnp.array([draw.bound for draw in draws], dtype))
    return {
        id(place): row[: place.size].reshape(place.shape)
        for row, (place, _, _) in zip(rows, draws, strict=True)
    }


class Autoencoder(nn.Module):
    """Dense autoencoder: ReLU between the layers, a sigmoid at the end.

    With the default sizes and 784 pixels it is the tutorial's network,
    784-128-64-12-3-12-64-128-784. The code's own activation is ReLU there too, which
    is its trap: a code unit whose input is negative for every image gets no gradient
    any more. It is dead, and if all are, the decoder can only learn the mean image.

    Attributes:
        shape: of an image, or (D,); D is the width of input and output.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        code_width: K, the units of the code.
        code_activation: a name in ``ACTIVATIONS``, applied to the code only.
        initializer: ``torch`` (see :func:`uniform_within`), or a name in ``KERNELS``.
        dtype: of the layers' arithmetic.
        param_dtype: of parameters, and of codes and pixels as they come out.
    """

    shape: tuple[int, ...]
    hidden: tuple[int, ...] = (128, 64, 12)
    code_width: int = 3
    code_activation: str = "relu"
    initializer: str = "torch"
    dtype: jnp.dtype = jnp.dtype("float32")
    param_dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        """Name the layers encoder_0, …, decoder_0, …, each a kernel and a bias."""
        widths = (math.prod(self.shape), *self.hidden, self.code_width)
        self.encoder = self._layers(widths)
        self.decoder = self._layers(widths[::-1])

    def _layers(self, widths: tuple[int, ...]) -> list[nn.Dense]:
        return [self._dense(*pair) for pair in itertools.pairwise(widths)]

    def _dense(self, fan_in: int, width: int) -> nn.Dense:
        return self._layer(nn.Dense, fan_in, width)

    def _layer(
        self, kind: Callable[..., Layer], fan_in: int, width: int, **options: Any
    ) -> Layer:
        if self.initializer == "torch":
            kernel = bias = uniform_within(fan_in**-0.5)
        else:
            kernel, bias = KERNELS[self.initializer], nn.initializers.zeros
        return kind(
            width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel,
            bias_init=bias,
            **options,
        )

    def encode(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        """The code of each image; non-negative if its activation is ReLU."""
        for layer in self.encoder[:-1]:
            x = nn.relu(layer(x))
        code = self.encoder[-1](x).astype(self.param_dtype)
        return ACTIVATIONS[self.code_activation](code)

    def decode(self, code: Float[Array, "B K"]) -> Float[Array, "B D"]:
        """The image of each code, pixels in (0, 1)."""
        for layer in self.decoder[:-1]:
            code = nn.relu(layer(code))
        # A sigmoid in bfloat16 would leave fewer grey levels than the images have.
        return nn.sigmoid(self.decoder[-1](code).astype(self.param_dtype))

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """The reconstruction: ``decode(encode(x))``."""
        return self.decode(self.encode(x))


def halve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B h w F"]:
    """Convolution of stride 2: a size of H becomes ⌈H/2⌉.

    As one matrix product. In a loop on CPU, XLA's own convolutions take twenty times as
    long as that.

    Source:
        ``jax.lax.conv_general_dilated`` with padding SAME, which it equals.
    """
    height, width = (-(-size // 2) for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (x.shape[1] % 2, 1), (x.shape[2] % 2, 1), (0, 0)))
    patches = jnp.concatenate(
        [
            x[:, i : i + 2 * height : 2, j : j + 2 * width : 2]
            for i in range(3)
            for j in range(3)
        ],
        axis=-1,
    )
    return patches @ kernel.reshape(patches.shape[-1], -1)


def double(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C F"]
) -> Float[Array, "B 2*H 2*W F"]:
    """Transposed convolution of stride 2, as one matrix product, see :func:`halve`.

    Source:
        ``jax.lax.conv_transpose`` with padding SAME, which it equals.
    """
    (batch, height, width, _), features = x.shape, kernel.shape[-1]
    # Along an axis the pixels 2i and 2i + 1 come from the inputs i - 1 and i, and this
    # is which row of the kernel takes part; the fourth is zero.
    rows = np.array([[0, 3], [2, 1]])
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = kernel[rows[:, None, :, None], rows[None, :, None, :]]
    matrix = kernel.transpose(0, 1, 4, 2, 3, 5).reshape(-1, 4 * features)
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
    patches = jnp.concatenate(
        [x[:, i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)], axis=-1
    )
    y = (patches @ matrix).reshape(batch, height, width, 2, 2, features)
    y = y.transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, 2 * height, 2 * width, features)


class Convolution(nn.Module):
    """A layer with a 3×3 kernel and a bias.

    Attributes:
        features: F, the channels that come out.
        convolve: :func:`halve` or :func:`double`.
        dtype: of the arithmetic.
        param_dtype: of the parameters.
        kernel_init: initialiser of the kernel [3, 3, C, F].
        bias_init: initialiser of the bias [F].
    """

    features: int
    convolve: Callable[[Array, Array], Array]
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """The convolution of images, and the bias."""
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype)
        x, kernel, bias = (value.astype(self.dtype) for value in (x, kernel, bias))
        return self.convolve(x, kernel) + bias.reshape(1, 1, 1, -1)


class ConvAutoencoder(Autoencoder):
    """Convolutional autoencoder: each stage halves the image.

    The encoder's stages are 3×3 convolutions of stride 2, each followed by a ReLU, and
    a dense layer makes the code of what is left. The decoder goes the same way back: a
    dense layer, then transposed convolutions, each cropped to the size that the encoder
    had there, with ReLU between and a sigmoid at the end.

    Attributes:
        shape: of an image, (H, W) or (H, W, C); D is the product.
        hidden: channels after each stage of the encoder; the decoder mirrors them.

    Raises:
        UserError: the shape is none of an image, or too small to be halved so often.

    Source:
        PyTorch ``nn.Conv2d`` and ``nn.ConvTranspose2d`` for the initial weights.
    """

    hidden: tuple[int, ...] = (32, 64)
    code_width: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shape) < 2:
            raise UserError("model.name: conv needs images of a height and a width")
        height, width = self.shape[:2]
        most = (max(height, width) - 1).bit_length()  # then a single pixel is left
        if len(self.hidden) > most:
            raise UserError(
                f"model.hidden: {len(self.hidden)} stages, each of which halves the "
                f"image, are too many for {height}×{width} pixels; at most {most}"
            )

    def setup(self) -> None:
        """Name the layers encoder_0, …, decoder_0, …, each a kernel and a bias."""
        widths = (math.prod(self.shape[2:]), *self.hidden)
        sizes = [self.shape[:2]]
        for _ in self.hidden:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        self.sizes = [(*size, w) for size, w in zip(sizes, widths, strict=True)]
        features = math.prod(self.sizes[-1])
        down, up = itertools.pairwise(widths), itertools.pairwise(widths[::-1])
        self.encoder: list[Any] = [
            *(self._conv(halve, 9 * fan_in, width) for fan_in, width in down),
            self._dense(features, self.code_width),
        ]
        # PyTorch takes the outputs of a transposed convolution for its fan_in.
        self.decoder: list[Any] = [
            self._dense(self.code_width, features),
            *(self._conv(double, 9 * width, width) for _, width in up),
        ]

    def _conv(
        self, convolve: Callable[[Array, Array], Array], fan_in: int, width: int
    ) -> Convolution:
        return self._layer(Convolution, fan_in, width, convolve=convolve)

    def encode(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        """The code of each image; non-negative if its activation is ReLU."""
        x = x.reshape(-1, *self.sizes[0])
        for layer in self.encoder[:-1]:
            x = nn.relu(layer(x))
        code = self.encoder[-1](x.reshape(len(x), -1)).astype(self.param_dtype)
        return ACTIVATIONS[self.code_activation](code)

    def decode(self, code: Float[Array, "B K"]) -> Float[Array, "B D"]:
        """The image of each code, pixels in (0, 1)."""
        x = self.decoder[0](code).reshape(-1, *self.sizes[-1])
        for layer, size in zip(self.decoder[1:], self.sizes[-2::-1], strict=True):
            x = layer(nn.relu(x))[:, : size[0], : size[1]]
        return nn.sigmoid(x.reshape(len(x), -1).astype(self.param_dtype))


MODELS: dict[str, type[nn.Module]] = {
    "autoencoder": Autoencoder,
    "conv": ConvAutoencoder,
}
"""The models by the name that ``--model.name`` takes."""
