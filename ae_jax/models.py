"""The networks: Linen modules whose fields are their sizes.

A model maps pixels [B, D] to a reconstruction [B, D], by way of ``encode`` and
``decode``. To add one: write the module and add a line to :data:`MODELS`.
"""

import itertools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Initializer = Callable[..., Array]

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
        num_pixels: D, the width of input and output.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        code_width: K, the units of the code.
        code_activation: a name in ``ACTIVATIONS``, applied to the code only.
        initializer: ``torch`` (see :func:`uniform_within`), or a name in ``KERNELS``.
        dtype: of the layers' arithmetic.
        param_dtype: of parameters, and of codes and pixels as they come out.
    """

    num_pixels: int
    hidden: tuple[int, ...] = (128, 64, 12)
    code_width: int = 3
    code_activation: str = "relu"
    initializer: str = "torch"
    dtype: jnp.dtype = jnp.dtype("float32")
    param_dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        """Name the layers encoder_0, …, decoder_0, …, each a kernel and a bias."""
        widths = (self.num_pixels, *self.hidden, self.code_width)
        self.encoder = self._layers(widths)
        self.decoder = self._layers(widths[::-1])

    def _layers(self, widths: tuple[int, ...]) -> list[nn.Dense]:
        return [self._dense(*pair) for pair in itertools.pairwise(widths)]

    def _dense(self, fan_in: int, width: int) -> nn.Dense:
        if self.initializer == "torch":
            kernel = bias = uniform_within(fan_in**-0.5)
        else:
            kernel, bias = KERNELS[self.initializer], nn.initializers.zeros
        return nn.Dense(
            width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=kernel,
            bias_init=bias,
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


MODELS: dict[str, type[nn.Module]] = {"autoencoder": Autoencoder}
"""The models by the name that ``--model.name`` takes."""
