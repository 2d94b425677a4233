"""Noisy images made clean, by a run that was trained for it."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from ae_jax import devices
from ae_jax.errors import UserError
from ae_jax.runs.run import Run, draw_each


def corrupt(objective: Any, images: Any, seed: int = 0) -> Float[np.ndarray, "N H W C"]:
    """Images with the very noise that they have when a run is scored.

    Args:
        objective: one with ``corrupt(x, key)``, such as :class:`objectives.Denoising`.
        images: [N, H, W, C], uint8 or floats in [0, 1].
        seed: of the draws, see :func:`ae_jax.runs.run.draw_each`.

    Returns:
        float32, pixels in [0, 1].
    """
    return draw_each(objective.corrupt, images, seed)


def denoise(run: Run, images: Any) -> Float[np.ndarray, "N H W C"]:
    """What a run makes of noisy images.

    Args:
        run: trained by an objective with ``corrupt``.
        images: [N, H, W, C], uint8 or floats in [0, 1], of any size if the model's
            parameters fit it, as those of ``residual`` do.

    Raises:
        UserError: the run was trained for something else, or its model takes no images
            of this size.
    """
    if not hasattr(run.config.objective, "corrupt"):
        raise UserError(
            f"{run.folder}: its objective adds no noise, so it was not trained to "
            "remove any; give a run of experiments.denoise"
        )
    images = np.asarray(images)
    of_size = run.for_shape(images.shape[1:])
    if of_size is not run:
        _check_memory(of_size)
    return of_size.reconstruct(images)


def _check_memory(run: Run) -> None:
    """Refuse an image so large that the system would end the process."""
    with devices.numerics(run.config.train.precision):
        x = jax.ShapeDtypeStruct((1, *run.shape), np.float32)
        compiled = jax.jit(run.model.apply).lower({"params": run.params}, x).compile()
    needed, there = compiled.memory_analysis(), devices.memory_bytes()
    if needed and needed.temp_size_in_bytes > there:
        size = "×".join(map(str, run.shape[:2]))
        raise UserError(
            f"an image of {size} pixels takes {needed.temp_size_in_bytes / 2**30:,.1f} "
            f"GiB, and there are {there / 2**30:,.1f} GiB; make it smaller"
        )
