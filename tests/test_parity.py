"""Ours is PyTorch's training; and a port that were not would be found out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from ae_jax import interop, parity, run
from ae_jax.config import TrainConfig
from ae_jax.losses import make_reconstruction, squared_error
from ae_jax.models import Autoencoder
from ae_jax.train import (
    Purpose,
    key_for,
    make_train_step,
    make_tx,
    scale_by_adam,
)
from experiments import compare_pytorch as compare
from experiments import pytorch_baseline as baseline

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

ATOL = compare.LIMITS["mini"]


# --- The same numbers ----------------------------------------------------------------


class Lockstep:
    """224 images of MNIST, three epochs of four batches, the last of 32, in float64."""

    def __init__(self, mnist):
        self.pair = compare.Pair(compare.Comparison(), mnist)
        self.images = compare.mini_images(self.pair)
        with compare.precision("float64"):
            self.program = self.pair.ours("float64", self.images)
            self.state = self.program.init()
            self.orders = [self.pair.shuffle(self.program, epoch) for epoch in range(3)]
            model = self.pair.theirs(interop.to_torch(self.state.params))
            optimiser = self.pair.adam(model)
            self.theirs = list(
                compare.their_epochs(model, optimiser, self.images, self.orders)
            )

    def ours(self, train_step=None, state=None, orders=None):
        with compare.precision("float64"):
            return list(
                compare.our_epochs(
                    train_step or self.program.train_step,
                    state or self.state,
                    self.images,
                    orders or self.orders,
                )
            )


@pytest.fixture(scope="module")
def lockstep(mnist):
    return Lockstep(mnist)


@pytest.fixture(scope="module")
def ours(lockstep):
    return lockstep.ours()


def test_training_is_pytorchs_to_rounding(lockstep, ours):
    assert [len(order) for order in lockstep.orders] == [4, 4, 4]
    assert (lockstep.orders[0][-1] >= 0).sum() == 32
    # Only the mutants below need the limit; the truth is far under it.
    assert parity.parity(ours, lockstep.theirs) < ATOL / 10_000
    for a, b in zip(ours, lockstep.theirs, strict=True):
        assert parity.differences(a, b)["loss_rel"] < 1e-13


def test_running_loss_is_the_mean_of_the_batches_means(lockstep, ours):
    with compare.precision("float64"):
        model = lockstep.pair.theirs(interop.to_torch(lockstep.state.params))
        rows = [torch.from_numpy(row[row >= 0]) for row in lockstep.orders[0]]
        batches = baseline.scaled_batches(torch.from_numpy(lockstep.images), rows)
        optimiser, criterion = lockstep.pair.adam(model), torch.nn.MSELoss()
        running, *_ = baseline.train_epoch(model, optimiser, batches, criterion)
    np.testing.assert_allclose(ours[0].losses.mean(), running, rtol=1e-13)


# Each bug changes what the lockstep runs: its train step, its state, its orders.


def with_tx(make):
    """A bug in the optimiser."""

    def bug(lockstep):
        tx, model = make(), lockstep.program.model
        step = make_train_step(make_reconstruction(model, squared_error), tx)
        params = lockstep.state.params
        return {
            "train_step": step,
            "state": lockstep.state._replace(opt_state=tx.init(params)),
        }

    return bug


def with_count(count):
    """Adam counts its updates from elsewhere: the bias correction is another."""

    def bug(lockstep):
        adam, *rest = lockstep.state.opt_state
        adam = adam._replace(count=jnp.asarray(count, jnp.int32))
        return {"state": lockstep.state._replace(opt_state=(adam, *rest))}

    return bug


def with_objective(make):
    """A bug in the model or in the loss."""

    def bug(lockstep):
        tx = make_tx(TrainConfig(), lockstep.program.schedule)
        return {"train_step": make_train_step(make(lockstep.program.model), tx)}

    return bug


def summed(model):
    mean = make_reconstruction(model, squared_error)
    return lambda *args: (784 * mean(*args)[0], {})


def no_relu_on_code(model):
    linear = model.clone(code_activation="none")
    return make_reconstruction(linear, squared_error)


def in_single_precision(model):
    return make_reconstruction(model.clone(dtype=jnp.dtype("float32")), squared_error)


def padding_counts(lockstep):
    step = lockstep.program.train_step
    return {"train_step": lambda state, x, w: step(state, x, jnp.ones_like(w))}


def short_batch_over_64(lockstep):
    step = lockstep.program.train_step
    half = with_objective(
        lambda model: (
            lambda *args: (
                make_reconstruction(model, squared_error)(*args)[0] / 2,
                {},
            )
        )
    )(lockstep)["train_step"]
    return {
        "train_step": lambda state, x, w: jax.lax.cond(w.all(), step, half, state, x, w)
    }


BUGS = {
    "epsilon 1e-7": with_tx(lambda: optax.adam(1e-3, eps=1e-7)),
    "epsilon inside the root": with_tx(
        lambda: optax.adam(1e-3, eps=0.0, eps_root=1e-8)
    ),
    "beta2 0.99": with_tx(lambda: optax.adam(1e-3, b2=0.99)),
    "bias correction missing": with_count(10**6),
    "bias correction off by one": with_count(1),
    "weight decay 1e-4": with_tx(
        lambda: make_tx(TrainConfig(weight_decay=1e-4), lambda _: 1e-3)
    ),
    "learning rate 1 % off": with_tx(lambda: optax.adam(1.01e-3)),
    "no ReLU on the code": with_objective(no_relu_on_code),
    "sum instead of mean": with_objective(summed),
    "float32 inside": with_objective(in_single_precision),
    "short batch dropped": lambda lockstep: {
        "orders": [order[:-1] for order in lockstep.orders]
    },
    "short batch divided by 64": short_batch_over_64,
    "padding counted": padding_counts,
    "one shuffle for all epochs": lambda lockstep: {"orders": [lockstep.orders[0]] * 3},
}


@pytest.mark.parametrize("name", BUGS)
def test_parity_catches_the_bug(lockstep, name):
    with compare.precision("float64"):
        changed = BUGS[name](lockstep)
    apart = parity.parity(lockstep.ours(**changed), lockstep.theirs)
    assert apart > 100 * ATOL, apart
    assert math.isfinite(apart)


def test_pixels_are_pytorchs_to_one_rounding():
    grey = np.arange(256, dtype=np.uint8)[None]
    for name in ("float32", "float64"):
        with compare.precision(name):
            (theirs,) = baseline.scaled_batches(
                torch.from_numpy(grey), [torch.tensor([0])]
            )
            # What the train chunk does; compiled, it is a product with 1/255.
            ours = jax.jit(lambda x, name=name: x.astype(name) / 255)(grey)
        np.testing.assert_array_equal(run.scale(grey, np.dtype(name)), theirs)
        np.testing.assert_array_max_ulp(np.asarray(ours), theirs.numpy(), maxulp=1)


# --- The same draws ------------------------------------------------------------------


def initial_weights(initializer, num_seeds):
    """Initial weights of one side, all seeds', by PyTorch's names, over 1/√fan_in."""
    drawn = {}
    for seed in range(num_seeds):
        if initializer == "pytorch":
            torch.manual_seed(seed)
            tensors = baseline.Autoencoder().state_dict()
            tree = {name: tensor.numpy() for name, tensor in tensors.items()}
        else:
            init = jitted_init(initializer)
            params = init(key_for(seed, Purpose.INIT))["params"]
            tree = interop.to_torch(params)
        fan_in = {
            name: tree[f"{name.rpartition('.')[0]}.weight"].shape[1] for name in tree
        }
        for name, array in tree.items():
            some = array.ravel()[:500]  # of each seed's: enough, and quick to sort
            drawn.setdefault(name, []).append(some * fan_in[name] ** 0.5)
    return {name: np.concatenate(arrays) for name, arrays in drawn.items()}


@functools.cache
def jitted_init(initializer):
    model = Autoencoder((784,), initializer=initializer)
    return jax.jit(lambda key: model.init(key, jnp.zeros((1, 784))))


def test_initial_weights_have_pytorchs_distribution():
    ours, theirs, flax = (
        initial_weights(name, num_seeds=12) for name in ("torch", "pytorch", "flax")
    )
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert np.abs(ours[name]).max() <= 1
        assert stats.ks_2samp(ours[name], expected).pvalue > 1e-3, name
        # Flax's own are told apart, in every kernel and every bias.
        assert stats.ks_2samp(flax[name], expected).pvalue < 1e-4, name


def test_bias_correction_is_exact_in_single_precision():
    # A gradient of 1 for ever: corrected, both moments are 1, and so is the direction.
    ones = jnp.ones(3)

    def largest_error(tx):
        state, errors = tx.init(ones), []
        update = jax.jit(tx.update)
        for _ in range(100):
            direction, state = update(ones, state)
            errors.append(float(jnp.abs(direction - 1).max()))
        return max(errors)

    assert largest_error(scale_by_adam()) < 1e-6
    assert largest_error(optax.scale_by_adam()) > 5e-6


def test_adam_has_the_state_of_optaxs():
    params = {"w": jnp.ones((2, 3))}
    for options in ({}, {"weight_decay": 0.1}, {"clip_norm": 1.0}):
        config = TrainConfig(**options)
        theirs = optax.adamw(lambda _: 1.0) if config.weight_decay else None
        theirs = theirs or optax.adam(lambda _: 1.0)
        if config.clip_norm:
            theirs = optax.chain(optax.clip_by_global_norm(1.0), theirs)
        ours = make_tx(config, lambda _: 1.0).init(params)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs.init(params))


# --- Differences ---------------------------------------------------------------------


def snapshot(value, losses=(1.0, 2.0)):
    arrays = {"w": np.full((2, 2), value), "b": np.zeros(2)}
    return parity.Snapshot(np.array(losses), arrays, arrays, arrays)


def test_differences_are_those_of_the_joined_arrays():
    found = parity.differences(snapshot(1.5), snapshot(1.0, losses=(1.0, 4.0)))
    assert found["params_abs"] == 0.5
    assert found["mu_nrel"] == 0.5
    assert found["loss_rel"] == 0.5


def test_parity_is_the_largest_and_lets_no_nan_pass():
    good = [snapshot(1.0)] * 3
    assert parity.parity(good, good) == 0
    assert parity.parity([good[0], snapshot(1.25), good[0]], good) == 0.25
    for place in range(3):
        bad = [*good]
        bad[place] = snapshot(math.nan)
        assert math.isnan(parity.parity(bad, good))


def test_other_names_or_another_number_of_epochs_are_no_parity():
    one = {"w": np.zeros(2)}
    with pytest.raises(ValueError, match="not the same arrays"):
        parity.largest(one, {**one, "b": np.zeros(2)})
    with pytest.raises(ValueError, match="zip"):
        parity.parity([snapshot(1.0)], [snapshot(1.0)] * 2)


def test_equal_arrays_of_zeros_differ_by_nothing():
    zeros = {"w": np.zeros(3)}
    assert parity.norm_relative(zeros, zeros) == 0


# --- Distributions -------------------------------------------------------------------

scores = st.integers(900, 1100).map(lambda i: i / 1000)
samples = st.lists(scores, min_size=2, max_size=20)


@settings(deadline=None)
@given(samples, samples, st.floats(0.01, 0.2))
def test_tost_is_two_welch_tests(ours, theirs, margin):
    assume(np.ptp(ours) > 0 < np.ptp(theirs))
    found = parity.tost(ours, theirs, margin)
    shift = margin * np.mean(theirs)
    shifted = [
        stats.ttest_ind(
            np.array(ours) + sign * shift, theirs, equal_var=False, alternative=side
        ).pvalue
        for sign, side in ((1, "greater"), (-1, "less"))
    ]
    np.testing.assert_allclose(found.p, max(shifted), rtol=1e-6, atol=1e-12)
    within = -margin < found.low and found.high < margin
    assert within == (found.p < parity.ALPHA)


@pytest.mark.parametrize(("true", "expected"), [(0.03, 0.05), (0.0, 0.8)])
def test_tost_errs_as_often_as_it_says_and_finds_what_runs_needed_says(true, expected):
    # At the margin it may call them equal in 5 of 100 samples; where they are equal,
    # and as many as needed, it does so in 80.
    rng = np.random.default_rng(0)
    needed = parity.runs_needed(rng.normal(1, 0.06, 100_000).tolist(), margin=0.03)
    shape = (1000, 2, needed)
    draws = rng.normal(1, 0.06, shape) + np.array([true, 0])[None, :, None]
    passed = [parity.tost(a, b, 0.03).p < 0.05 for a, b in draws.tolist()]
    np.testing.assert_allclose(np.mean(passed), expected, atol=0.03)


def test_samples_too_small_to_show_anything_show_nothing():
    assert parity.tost([1.0], [1.0, 1.0], 0.03).p == 1
    assert parity.tost([], [1.0, 1.1], 0.03).p == 1
    assert parity.tost([1.0, 1.0], [1.0, 1.0], 0.03).p == 0
    assert parity.tost([1.1, 1.1], [1.0, 1.0], 0.03).p == 1


def runs(healthy, part_dead=0, collapsed=0, mean=0.036):
    scores = mean * (1 + np.linspace(-0.01, 0.01, healthy))
    rows = [(float(score), 0) for score in scores]
    rows += [(0.045, 1)] * part_dead + [(0.0675, 3)] * collapsed
    return [
        {"test/mse": score, "code/dead_units": dead, "code/collapsed": dead == 3}
        for score, dead in rows
    ]


def test_runs_are_counted_by_what_became_of_their_code():
    found = parity.compare_runs(runs(20, 4, 8), runs(10, 1, 21), 0.03)
    counts = {
        k: found["ours"][k] for k in ("runs", "healthy", "part_dead", "collapsed")
    }
    assert counts == {"runs": 32, "healthy": 20, "part_dead": 4, "collapsed": 8}
    np.testing.assert_allclose(found["ours"]["mean"], 0.036)
    expected = stats.fisher_exact(np.array([[8, 24], [21, 11]])).pvalue
    assert found["collapsed_p"] == expected


VERDICTS = {
    "equal": (runs(20), runs(20), "equal to within ±3%"),
    "apart": (runs(20, mean=0.04), runs(20), "they differ"),
    "open": (runs(3, mean=0.0365), runs(3, mean=0.036), "healthy runs a side"),
    "few": (runs(1, 1), runs(0, 0, 2), "Too few healthy runs"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict_says_what_was_shown_and_what_was_not(name):
    ours, theirs, words = VERDICTS[name]
    margin = 0.005 if name == "open" else 0.03
    found = parity.compare_runs(ours, theirs, margin)
    mean, *others = parity.verdict(found, margin)
    assert words in mean.replace("±1%", "±3%")
    assert f"{found['ours']['collapsed']} of {len(ours)}" in " ".join(others)
