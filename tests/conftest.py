"""What every test needs: the CPU, strict broadcasting, shapes checked at run time."""

import os

collect_ignore = []
if "AE_JAX_TEST_GPU" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    collect_ignore.append("test_gpu.py")

import itertools
import sys
import tempfile
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Every shape and type in a signature of ours is checked at each call.
install_import_hook("ae_jax", "beartype.beartype")

import jax
import jax.numpy as jnp
import numpy as np

# The user's cache of compiled programs is none of the tests' business.
_cache = tempfile.TemporaryDirectory(prefix="ae_jax-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
jax.config.update("jax_compilation_cache_dir", _cache.name)

# Every test compiles the same small programs: each is compiled once in a session.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

from ae_jax import cli, data
from ae_jax.config import Config, FiguresConfig, TrainConfig
from ae_jax.models.dense import Autoencoder
from ae_jax.runs.run import Run
from ae_jax.runs.trainer import train_run

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _commands_do_not_end_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails within a test raises SystemExit, as any other does."""
    monkeypatch.setattr(cli, "leave", sys.exit)


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
    return data.load(data.Mnist(dir=ROOT / "data"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of the digits, 16-8-3, 3 epochs of 21 steps; read only."""
    config = Config(
        run_dir=tmp_path_factory.mktemp("finished") / "run",
        data=data.Digits(num_validation=101),
        model=Autoencoder(hidden=(16, 8)),
        train=TrainConfig(num_epochs=3),
        figures=FiguresConfig(epochs=(1, 3)),
    )
    return train_run(config, "tutorial")


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 6 steps, saved at 3, 4 and 6, nothing drawn; read only."""
    from life import small  # which imports this module

    return train_run(small(tmp_path_factory.mktemp("short") / "run"))


def random_like(tree, bound=0.3):
    """Arrays of such shapes and types: what a model draws itself takes seconds."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(-bound, bound, leaf.shape), leaf.dtype),
        tree,
    )


_RNG = np.random.default_rng(0)


def noise(*shape):
    """Images, or what becomes some, in which no pixel can stand for another."""
    return _RNG.integers(0, 256, shape, np.uint8)


def shown(figure):
    """The pictures from the top left, row by row, as ``[(row's title, image), …]``."""

    def place(axes):
        box = axes.get_position()
        return -round(box.y0, 3), round(box.x0, 3)

    rows = itertools.groupby(sorted(figure.axes, key=place), lambda ax: place(ax)[0])
    pictures = [[*row] for _, row in rows]
    return [
        (row[0].get_title("left"), np.stack([ax.images[0].get_array() for ax in row]))
        for row in pictures
    ]
