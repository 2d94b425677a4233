"""Oriented gradients: which way brightness rises, and about where.

Two strokes a little apart share few pixels, but most of these. They are the features of
an anomaly score and of the objective that goes with it.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NUM_DIRECTIONS = 8
BLUR = 1.5
"""σ of the blur by which places are forgotten, in pixels; every second one is kept."""


def oriented_gradients(x: Float[Array, "*B H W C"]) -> Float[Array, "*B F"]:
    """How steeply brightness rises in each of eight directions, around each place.

    Half-wave rectified directional derivatives, blurred, as square roots, at unit norm.

    Args:
        x: images; the scale of their pixels does not matter.

    Returns:
        F = 8 · C · ⌈H/2⌉ · ⌈W/2⌉ features, none negative.

    Source:
        Dalal and Triggs, "Histograms of oriented gradients for human detection", CVPR
        2005, with derivatives for bins; the root is Arandjelović and Zisserman's,
        "Three things everyone should know to improve object retrieval", CVPR 2012.
    """
    images = jnp.moveaxis(x, -1, -3)
    height, width = images.shape[-2:]
    around = jnp.pad(images, [(0, 0)] * (images.ndim - 2) + [(1, 1), (1, 1)])
    right = (around[..., 1:-1, 2:] - around[..., 1:-1, :-2]) / 2
    down = (around[..., 2:, 1:-1] - around[..., :-2, 1:-1]) / 2
    angles = 2 * np.pi * np.arange(NUM_DIRECTIONS) / NUM_DIRECTIONS
    slopes = jnp.stack([right, down])
    along = np.array([np.cos(angles), np.sin(angles)], x.dtype)
    rises = jnp.maximum(jnp.einsum("ad,a...hw->...dhw", along, slopes), 0)
    rows, columns = (_blur(size).astype(x.dtype) for size in (height, width))
    cells = jnp.einsum("ih,...hw,jw->...ij", rows, rises, columns)
    # A root has no slope at 0.
    features = jnp.sqrt(cells.reshape(*x.shape[:-3], -1) + 1e-6)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


@functools.cache
def _blur(size: int) -> Float[np.ndarray, "half size"]:
    """Every second row of a Gaussian blur of so many pixels, as a matrix."""
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(np.eye(size), BLUR, axis=0)[::2]
