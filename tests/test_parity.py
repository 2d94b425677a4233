"""Ours is PyTorch's training; and a port that were not would be found out."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from scipy import stats

from ae_jax import data, weights
from ae_jax.config import TrainConfig
from ae_jax.devices import numerics
from ae_jax.keys import Purpose, key_for
from ae_jax.models import init_params
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Reconstruction, apply, batched, squared_error
from ae_jax.parity import lockstep
from ae_jax.train import make_optimizer, make_train_step, scale
from experiments import _pair as sides
from experiments import pytorch_baseline as baseline

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

ATOL = lockstep.LIMITS["mini"]
RATE = TrainConfig().learning_rate


# --- The same numbers ----------------------------------------------------------------


class Lockstep:
    """224 images of MNIST, three epochs of four batches, the last of 32, in float64."""

    def __init__(self, mnist):
        self.pair = sides.Pair(Autoencoder(), TrainConfig(), mnist)
        self.images = sides.mini_images(self.pair)
        with sides.precision("float64"):
            self.side = self.pair.ours(self.images, "float64")
            self.state = self.pair.first_state(self.side)
            self.orders = self.pair.orders(self.images, 3)
            model = self.pair.theirs(weights.to_torch(self.state.params))
            adam = self.pair.adam(model)
            self.theirs = list(
                sides.their_epochs(model, adam, self.images, self.orders)
            )

    def ours(self, train_step=None, state=None, orders=None):
        with sides.precision("float64"):
            return list(
                sides.our_epochs(
                    train_step or self.side.train_step,
                    state or self.state,
                    self.images,
                    orders or self.orders,
                )
            )


@pytest.fixture(scope="module")
def both(mnist):
    return Lockstep(mnist)


def test_training_is_pytorchs_to_rounding(both):
    assert [len(order) for order in both.orders] == [4, 4, 4]
    assert (both.orders[0][-1] >= 0).sum() == 32
    ours = both.ours()
    # Only the mutants below need the limit; the truth is far under it.
    assert lockstep.max_difference(ours, both.theirs) < ATOL / 10_000
    for a, b in zip(ours, both.theirs, strict=True):
        assert lockstep.differences(a, b)["loss_rel"] < 1e-13
    # The running loss is the mean of the batches' means from before their updates.
    with sides.precision("float64"):
        model = both.pair.theirs(weights.to_torch(both.state.params))
        rows = [torch.from_numpy(row[row >= 0]) for row in both.orders[0]]
        batches = baseline.scaled_batches(torch.from_numpy(both.images), rows)
        running, _ = baseline.train_epoch(model, both.pair.adam(model), batches)
    np.testing.assert_allclose(ours[0].losses.mean(), running, rtol=1e-13)


# Each bug changes what the lockstep runs: its train step, its state, its orders.


def with_tx(tx):
    """A bug in the optimiser."""

    def bug(both):
        train_step = make_train_step(
            batched(Reconstruction(), both.side.model), "mse", tx
        )
        opt_state = tx.init(both.state.params)
        state = both.state._replace(opt_state=opt_state)
        return {"train_step": train_step, "state": state}

    return bug


def with_count(count):
    """Adam counts its updates from elsewhere: the bias correction is another."""

    def bug(both):
        adam, *rest = both.state.opt_state
        adam = adam._replace(count=jnp.asarray(count, jnp.int32))
        return {"state": both.state._replace(opt_state=(adam, *rest))}

    return bug


def with_losses(make):
    """A bug in the model or in the loss: ``make(net) -> losses``."""

    def bug(both):
        tx, _ = make_optimizer(TrainConfig(), 12)
        return {"train_step": make_train_step(make(both.side.model), "mse", tx)}

    return bug


def times(factor):
    def make(net):
        losses = batched(Reconstruction(), net)
        return lambda *args: {"mse": factor * losses(*args)["mse"]}

    return make


def no_relu_on_latent(net):
    return batched(
        Reconstruction(),
        Autoencoder(latent_activation="none").make(net.shape, "float64"),
    )


def in_single_precision(net):
    def of_one(model, params, x, key):
        params = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
        recon = apply(model, params, x.astype("float32"))
        return squared_error(recon.astype("float64"), x), {}

    of_one.loss_name = "mse"
    return batched(of_one, Autoencoder().make(net.shape, "float32"))


def padding_counts(both):
    step = both.side.train_step
    return {"train_step": lambda state, x, w: step(state, x, jnp.ones_like(w))}


def short_batch_over_64(both):
    step, half = both.side.train_step, with_losses(times(0.5))(both)["train_step"]
    return {
        "train_step": lambda state, x, w: jax.lax.cond(w.all(), step, half, state, x, w)
    }


BUGS = {
    "epsilon 1e-7": with_tx(optax.adam(RATE, eps=1e-7)),
    "epsilon inside the root": with_tx(optax.adam(RATE, eps=0.0, eps_root=1e-8)),
    "beta2 0.99": with_tx(optax.adam(RATE, b2=0.99)),
    "bias correction missing": with_count(10**6),
    "bias correction off by one": with_count(1),
    "weight decay 1e-4": with_tx(make_optimizer(TrainConfig(weight_decay=1e-4), 12)[0]),
    "learning rate 1 % off": with_tx(optax.adam(1.01 * RATE)),
    "no ReLU on the latent": with_losses(no_relu_on_latent),
    "sum instead of mean": with_losses(times(784)),
    "float32 inside": with_losses(in_single_precision),
    "short batch dropped": lambda both: {"orders": [o[:-1] for o in both.orders]},
    "short batch divided by 64": short_batch_over_64,
    "padding counted": padding_counts,
    "one shuffle for all epochs": lambda both: {"orders": [both.orders[0]] * 3},
}


@pytest.mark.parametrize("name", BUGS)
def test_lockstep_catches_the_bug(both, name):
    with sides.precision("float64"):
        changed = BUGS[name](both)
    apart = lockstep.max_difference(both.ours(**changed), both.theirs)
    assert math.isfinite(apart)
    assert apart > 100 * ATOL, apart


def test_pixels_are_pytorchs_to_one_rounding():
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for name in ("float32", "float64"):
        with sides.precision(name):
            stored, row = torch.from_numpy(grey), [torch.tensor([0])]
            (theirs,) = baseline.scaled_batches(stored, row)
            # Compiled, as in the train chunk, it is a product with 1/255.
            ours = jax.jit(scale, static_argnums=1)(grey, name)
        np.testing.assert_array_equal(scale(grey, name).ravel(), theirs[0])
        np.testing.assert_array_max_ulp(np.ravel(ours), theirs[0].numpy(), maxulp=1)


@pytest.mark.parametrize(
    "options",
    [Autoencoder(), Autoencoder(hidden=(5, 4), latent_dim=2), Autoencoder(hidden=())],
    ids=lambda options: str(options.hidden),
)
@pytest.mark.parametrize(("name", "atol"), [("float32", 1e-6), ("float64", 1e-12)])
def test_with_pytorchs_weights_the_model_is_pytorchs(options, name, atol):
    shape, sizes = (6, 5, 1), (options.hidden, options.latent_dim)
    x = np.random.default_rng(0).random((20, *shape)).astype(name)
    with sides.precision(name), torch.inference_mode():
        torch.manual_seed(0)
        theirs = baseline.Autoencoder(30, *sizes)
        params = weights.to_linen(baseline.to_numpy(theirs.state_dict().items()))
        net = options.make(shape, name)
        made = init_params(net, jax.random.key(0), shape, name)
        assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
        recon = np.asarray(jax.jit(functools.partial(apply, net))(params, x))
        target = theirs(torch.tensor(x).flatten(1)).numpy()
    assert recon.dtype == target.dtype == name
    np.testing.assert_allclose(recon.reshape(20, -1), target, rtol=0, atol=atol)


def test_layers_and_gradients_are_pytorchs(both):
    for name, limit in (("float64", 1e-13), ("float32", 1e-4)):
        layers = sides.compare_layers(both.pair, name)
        assert layers["exact"]
        assert len(layers["forward"]) == 8
        assert len(layers["gradient"]) == 16
        for row in layers["forward"] + layers["gradient"]:
            assert 0 <= row["nrel"] < limit, row


# --- The same draws ------------------------------------------------------------------


def initial_weights(init, num_seeds=12):
    """Initial weights of one side, all seeds', by PyTorch's names, over 1/√fan_in."""
    net = (
        None
        if init == "pytorch"
        else Autoencoder(init=init).make((28, 28, 1), "float32")
    )
    ours = jax.jit(lambda key: init_params(net, key, (28, 28, 1), "float32"))
    drawn = {}
    for seed in range(num_seeds):
        torch.manual_seed(seed)
        if net:
            tree = weights.to_torch(ours(key_for(seed, Purpose.INIT)))
        else:
            tree = baseline.to_numpy(baseline.Autoencoder().state_dict().items())
        for name, array in tree.items():
            fan_in = tree[f"{name.rpartition('.')[0]}.weight"].shape[1]
            some = array.ravel()[:500]  # of each seed's: enough, and quick to sort
            drawn.setdefault(name, []).append(some * fan_in**0.5)
    return {name: np.concatenate(arrays) for name, arrays in drawn.items()}


def test_initial_weights_have_pytorchs_distribution():
    with numerics("float32"):
        ours, theirs, flax = map(initial_weights, ("torch", "pytorch", "flax"))
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        assert np.abs(ours[name]).max() <= 1
        assert stats.ks_2samp(ours[name], expected).pvalue > 1e-3, name
        # Flax's own are told apart, in every kernel and every bias.
        assert stats.ks_2samp(flax[name], expected).pvalue < 1e-4, name


# --- The sides -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    dataset = data.load(data.Digits())
    return sides.Pair(Autoencoder(hidden=(16,)), TrainConfig(num_epochs=1), dataset)


def test_our_side_leaves_the_state_that_it_starts_from(small):
    images = small.dataset.train.images
    side = small.ours(images)
    state = small.first_state(side)
    list(sides.our_epochs(side.train_step, state, images, small.orders(images, 1)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(state.step) == 0


def test_drift_starts_at_rounding(small):
    drift = sides.measure_drift(small, 5)
    assert all(len(values) == 5 for values in drift.values())
    assert max(drift["ours"] + drift["threads"]) < 1e-4


def test_both_sides_are_in_double_precision_and_as_before_after_an_error():
    def formats():
        return str(jnp.ones(1).dtype), torch.ones(1).dtype

    before = formats()
    with contextlib.suppress(ZeroDivisionError), sides.precision("float64"):
        assert formats() == ("float64", torch.float64)
        raise ZeroDivisionError
    assert formats() == before
