"""On a GPU: float32 is PyTorch's, a resumed run the same bits, seeds the same runs.

Collected only where AE_JAX_TEST_GPU=1 asks for it; see CONTRIBUTING.md.
"""

import jax
import numpy as np
import pytest
from life import assert_same_end, digests_of, rows_of, small, train_until

from ae_jax import data, devices
from ae_jax.config import TrainConfig
from ae_jax.models.dense import Autoencoder
from ae_jax.parity import lockstep
from ae_jax.runs.trainer import train_run, train_runs
from experiments import _pair as sides

LIMIT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.fail("AE_JAX_TEST_GPU=1, but JAX finds no GPU")


@pytest.fixture(scope="module")
def pair():
    dataset = data.load(data.Digits())
    return sides.Pair(Autoencoder(hidden=(16, 8)), TrainConfig(), dataset)


def differences(pair):
    """The norm-relative one of each layer's output and of each gradient."""
    found = sides.compare_layers(pair, "float32")
    assert found["exact"]
    return [row["nrel"] for row in (*found["forward"], *found["gradient"])]


def test_float32_is_pytorchs(pair):
    assert max(differences(pair)) < LIMIT


def test_tf32_would_be_noticed(pair, monkeypatch):
    monkeypatch.setitem(devices.MATMUL_PRECISIONS, "float32", "tensorfloat32")
    assert max(differences(pair)) > LIMIT


def test_twelve_steps_of_adam_are_pytorchs(pair):
    images = sides.mini_images(pair)
    with sides.precision("float32"):
        ours = pair.ours(images)
        state, orders = pair.first_state(ours), pair.orders(images, 3)
        model = pair.theirs(jax.device_get(state.params))
        theirs = sides.their_epochs(model, pair.adam(model), images, orders)
        mine = pair.our_epochs(ours.train_step, state, images, orders)
        for a, b in zip(mine, theirs, strict=True):
            assert lockstep.differences(a, b)["params_nrel"] < LIMIT


def test_a_resumed_run_has_the_same_bits(tmp_path):
    train_run(small(tmp_path / "whole"))
    train_until(4, small(tmp_path / "parts"))
    train_run(small(tmp_path / "parts"))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_seeds_side_by_side_are_the_single_runs(tmp_path):
    group = [small(tmp_path / str(seed), seed=seed) for seed in range(3)]
    train_runs(group, together=3)
    train_run(small(tmp_path / "alone", seed=1))
    mine, alone = rows_of(group[1].run_dir), rows_of(tmp_path / "alone")
    for a, b in zip(mine, alone, strict=True):
        np.testing.assert_allclose(a["train/mse"], b["train/mse"], rtol=1e-4)
    assert digests_of(group[0].run_dir) != digests_of(group[1].run_dir)
