"""What every test needs: the CPU, strict broadcasting, shapes checked at run time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Every shape and type in a signature of ours is checked at each call.
install_import_hook("ae_jax", "beartype.beartype")

import jax

# The user's cache of compiled programs is none of the tests' business.
_cache = tempfile.TemporaryDirectory(prefix="ae_jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
jax.config.update("jax_compilation_cache_dir", _cache.name)

from ae_jax import data
from ae_jax.config import DataConfig

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _single_precision():
    """Leave no test the 64-bit floats of another one's run."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def torch_on_one_thread():
    """PyTorch and JAX would fight for the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mnist() -> data.Dataset:
    """The real MNIST, prepared once in the project's own data folder."""
    return data.load(DataConfig(dir=ROOT / "data"))
