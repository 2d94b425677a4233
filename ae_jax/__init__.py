"""Autoencoders in JAX and Flax, measured against the PyTorch tutorial."""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ae_jax.config import Config
    from ae_jax.runs.run import open_run
    from ae_jax.runs.trainer import train_run as fit

__version__ = "0.2.0"
STARTED = time.monotonic()
"""When the command began, near enough: nothing of ours is imported before."""
__all__ = ["Config", "fit", "open_run"]

_PLACES = {
    "Config": ("ae_jax.config", "Config"),
    "fit": ("ae_jax.runs.trainer", "train_run"),
    "open_run": ("ae_jax.runs.run", "open_run"),
}


def __getattr__(name: str) -> Any:
    """Load JAX when it is first needed, not before."""
    if name not in _PLACES:
        raise AttributeError(f"module 'ae_jax' has no attribute {name!r}")
    import importlib

    module, attribute = _PLACES[name]
    return getattr(importlib.import_module(module), attribute)
