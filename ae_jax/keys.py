"""Every random draw comes from one of these keys: same seed, same bits."""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32


class Purpose(enum.IntEnum):
    """What a draw is for; folded into the seed's key, so that no two draws share."""

    INIT = 0
    SHUFFLE = 1
    STEP = 2
    SAMPLES = 3
    SCORE = 4
    GENERATE = 5


def key_for(
    seed: int | np.uint32 | UInt32[Array, ""], purpose: Purpose
) -> Key[Array, ""]:
    """The key of all draws of one purpose under one seed, whatever the defaults."""
    # jax.random.key(seed, impl=…), but that it adds JAX_RANDOM_SEED_OFFSET.
    bits = jnp.stack([jnp.uint32(0), jnp.uint32(seed)])
    key = jax.random.wrap_key_data(bits, impl="threefry2x32")
    return jax.random.fold_in(key, purpose)


def fold_each(key: Key[Array, ""], numbers: Int[Array, " B"]) -> Key[Array, " B"]:
    """A key for each numbered image, whatever other images are drawn for beside it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
