"""What a user gives to an open run, as arrays that it takes, or a line why not.

A wrong scale is the mistake to fear: the numbers come out wrong, and nothing else does.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ae_jax.data import ImageFile
from ae_jax.errors import UserError

ROUNDING = 1e-5
"""By how much floats may leave [0, 1]: resizing and averaging do so."""


def as_images(images: Any, shape: tuple[int, int, int]) -> Any:
    """Images [N, H, W, C], uint8 or floats in [0, 1]; those on disk stay there.

    Args:
        images: whatever ``np.asarray`` takes, [N, H, W, C] or [N, D], of grey ones
            [N, H, W] too. Integers are bytes, of whatever type.
        shape: of the images wanted, (H, W, C).

    Raises:
        UserError: another shape or type; floats outside [0, 1]; integers that are no
            bytes, or that are 0 and 1 alone, which might be meant as floats.
    """
    if isinstance(images, ImageFile) and images.shape[1:] == shape:
        return images
    array = _as_array("images", images)
    height, width, channels = shape
    pixels = height * width * channels
    shapes = [shape, (pixels,), *[(height, width)] * (channels == 1)]
    wanted = (
        f"this run takes [N, {height}, {width}, {channels}] or [N, {pixels}], uint8 or "
        "floats in [0, 1]"
    )
    if array.shape[1:] not in shapes or array.dtype.kind not in "uif":
        one = "; of one image give image[None]" if array.shape in shapes else ""
        raise UserError(
            f"images are {list(array.shape)} of {array.dtype}; {wanted}{one}"
        )
    array = array.reshape(-1, *shape)
    if array.dtype == np.uint8 or not array.size:
        return array
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # so NaN is found too
            raise UserError(f"images are floats from {low:.4g} to {high:.4g}; {wanted}")
        return array
    if low < 0 or high > 255 or high == 1:
        raise UserError(
            f"images are integers from {low} to {high}, and not bytes; {wanted}"
        )
    return array.astype(np.uint8)


def as_latents(latents: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Latents [N, K], floats.

    Args:
        latents: whatever ``np.asarray`` takes.
        shape: of one latent, (K,).

    Raises:
        UserError: another shape, no numbers, or some that are not finite.
    """
    array = _as_array("latents", latents)
    if array.shape[1:] != shape or array.dtype.kind not in "uif":
        one = "; of one latent give latent[None]" if array.shape == shape else ""
        wanted = ", ".join(map(str, ("N", *shape)))
        raise UserError(
            f"latents are {list(array.shape)} of {array.dtype}; this run takes "
            f"[{wanted}], floats{one}"
        )
    if not np.isfinite(array).all():
        raise UserError("latents are not finite; this run takes finite floats")
    return array if array.dtype.kind == "f" else array.astype(float)


def _as_array(name: str, values: Any) -> np.ndarray:
    try:
        array = np.asarray(values)
    except Exception as error:  # each library has its own
        reason = str(error).partition("\n")[0]
        raise UserError(f"{name}: NumPy cannot take them: {reason}") from error
    # NumPy knows no bfloat16.
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float32) if is_float and array.dtype.kind != "f" else array
