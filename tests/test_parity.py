"""Ours is PyTorch's training; and a port that were not would be found out."""

import contextlib
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import random_like
from torch.nn.functional import pad

from ae_jax import data, weights
from ae_jax.config import TrainConfig
from ae_jax.models import init_params, layers
from ae_jax.models.conv import ConvAutoencoder, ConvNet
from ae_jax.models.dense import Autoencoder
from ae_jax.models.layers import downsample, upsample
from ae_jax.objectives import Reconstruction, apply, batched, squared_error
from ae_jax.parity import lockstep
from ae_jax.train import make_optimizer, make_train_step, scale
from experiments import _pair as sides
from experiments import pytorch_baseline as baseline

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

ATOL = lockstep.LIMITS["mini"]
RATE = TrainConfig().learning_rate
KEY = jax.random.key(0)


class Lockstep:
    """Three epochs of four batches, the last one short, in float64."""

    def __init__(self, pair):
        self.pair, self.images = pair, sides.mini_images(pair)
        with sides.precision("float64"):
            self.side = pair.ours(self.images, "float64")
            shapes = jax.eval_shape(lambda: self.side.init(0)).params
            self.state = self.side.start_from(random_like(shapes), 0)
            self.orders = pair.orders(self.images, 3)
            model = pair.theirs(self.state.params)
            training = model, pair.adam(model), self.images, self.orders
            self.theirs = list(sides.their_epochs(*training))

    def ours(self, train_step=None, state=None, orders=None):
        train_step = train_step or self.side.train_step
        training = train_step, state or self.state, self.images, orders or self.orders
        with sides.precision("float64"):
            return list(self.pair.our_epochs(*training))

    def apart(self, **changed):
        return lockstep.max_difference(self.ours(**changed), self.theirs)


def assert_same(both):
    """They are as equal as float64 can be; only the bugs below need the limit."""
    assert [len(order) for order in both.orders] == [4, 4, 4]
    size = both.pair.train.batch_size
    assert (both.orders[0][-1] >= 0).sum() == size // 2
    ours = both.ours()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(both.state))
    assert lockstep.max_difference(ours, both.theirs) < ATOL / 10_000
    for a, b in zip(ours, both.theirs, strict=True):
        assert lockstep.differences(a, b)["loss_rel"] < 1e-13


# --- The dense net -------------------------------------------------------------------


@pytest.fixture(scope="module")
def both():
    dataset = data.load(data.Digits())
    return Lockstep(sides.Pair(Autoencoder(hidden=(16,)), TrainConfig(), dataset))


def test_training_is_pytorchs_to_rounding(both):
    assert_same(both)


# Each bug changes what the lockstep runs: its train step, its state, its orders.


def with_tx(tx):
    """A bug in the optimiser."""

    def bug(both):
        losses = batched(Reconstruction(), both.side.model)
        opt_state = tx.init(both.state.params)
        state = both.state._replace(opt_state=opt_state)
        return {"train_step": make_train_step(losses, "mse", tx), "state": state}

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
    options = Autoencoder(hidden=net.options.hidden, latent_activation="none")
    return batched(Reconstruction(), options.make(net.shape, "float64"))


def in_single_precision(net):
    def of_one(model, params, x, key):
        params = jax.tree.map(lambda leaf: leaf.astype("float32"), params)
        recon = apply(model, params, x.astype("float32"))
        return squared_error(recon.astype("float64"), x), {}

    of_one.loss_name = "mse"
    return batched(of_one, net.options.make(net.shape, "float32"))


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
    "sum instead of mean": with_losses(times(64)),
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
    apart = both.apart(**changed)
    assert math.isfinite(apart)
    assert apart > 10 * ATOL, apart


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


ACTIVATIONS = {
    "relu": torch.nn.ReLU(),
    "leaky_relu": torch.nn.LeakyReLU(),
    "gelu": torch.nn.GELU(),
    "tanh": torch.nn.Tanh(),
    "none": torch.nn.Identity(),
}


@pytest.mark.parametrize(
    ("options", "name", "atol"),
    [
        (Autoencoder(), "float32", 1e-6),
        (Autoencoder((5, 5), 2, latent_activation="leaky_relu"), "float64", 1e-12),
        (Autoencoder((), latent_activation="none"), "float64", 1e-12),
        (Autoencoder((5, 5), 4, "gelu", "tanh"), "float64", 1e-12),
        (Autoencoder((5, 5), 4, "tanh", "none"), "float64", 1e-12),
    ],
    ids=str,
)
def test_with_pytorchs_weights_the_model_is_pytorchs(options, name, atol):
    shape, sizes = (6, 5, 1), (options.hidden, options.latent_dim)
    x = np.random.default_rng(0).random((20, *shape)).astype(name)
    with sides.precision(name), torch.inference_mode():
        torch.manual_seed(1)
        theirs = baseline.Autoencoder(30, *sizes)
        for part in (theirs.encoder, theirs.decoder):
            for i in range(1, len(part) - 1, 2):
                part[i] = ACTIVATIONS[options.activation]
        theirs.encoder[-1] = ACTIVATIONS[options.latent_activation]
        params = weights.to_linen(baseline.to_numpy(theirs.state_dict().items()))
        net = options.make(shape, name)
        made = jax.eval_shape(lambda: init_params(net, KEY, shape, name))
        assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)
        recon = np.asarray(jax.jit(functools.partial(apply, net))(params, x))
        pixels = torch.tensor(x).flatten(1)
        target = theirs(pixels).numpy()
        negative = (theirs.encoder[:-1](pixels) < 0).any()
    assert negative  # where the activations differ
    assert recon.dtype == target.dtype == name
    np.testing.assert_allclose(recon.reshape(20, -1), target, rtol=0, atol=atol)


def test_both_sides_are_in_double_precision_and_as_before_after_an_error():
    def formats():
        return str(jnp.ones(1).dtype), torch.ones(1).dtype

    with contextlib.suppress(ZeroDivisionError), sides.precision("float64"):
        assert formats() == ("float64", torch.float64)
        raise ZeroDivisionError
    assert formats() == ("float32", torch.float32)


# --- The convolutional net -----------------------------------------------------------


class ConvInTorch(torch.nn.Module):
    """For 7×10 pixels of two channels; as in ours, an odd side is padded at both ends.

    An even one is padded at its end alone, and what a transposed convolution makes
    beyond the size that the encoder had there is cut off at the end.
    """

    def __init__(self, *sizes):
        super().__init__()
        self.encoder_0 = torch.nn.Conv2d(2, 4, 3, stride=2)
        self.encoder_1 = torch.nn.Conv2d(4, 6, 3, stride=2)
        self.encoder_2 = torch.nn.Linear(2 * 3 * 6, 5)
        self.decoder_0 = torch.nn.Linear(5, 2 * 3 * 6)
        self.decoder_1 = torch.nn.ConvTranspose2d(6, 4, 3, stride=2)
        self.decoder_2 = torch.nn.ConvTranspose2d(4, 2, 3, stride=2)

    def forward(self, x):
        x = x.unflatten(1, (7, 10, 2)).movedim(-1, 1)
        x = self.encoder_0(pad(x, (0, 1, 1, 1))).relu()
        x = self.encoder_1(pad(x, (1, 1, 0, 1))).relu()
        latent = self.encoder_2(x.movedim(1, -1).flatten(1)).relu()
        x = self.decoder_0(latent).unflatten(1, (2, 3, 6)).movedim(-1, 1)
        x = self.decoder_1(x.relu())[..., :4, :5]
        x = self.decoder_2(x.relu())[..., :7, :10]
        return x.sigmoid().movedim(1, -1).flatten(1)


def conv_to_torch(params):
    """Kernels [row, column, in, out] as PyTorch has them; it turns the decoder's."""
    state_dict = {}
    for name, layer in params.items():
        weight = np.asarray(layer["kernel"]).T
        if weight.ndim == 4:
            weight = weight.swapaxes(2, 3)
            if name.startswith("decoder"):
                weight = weight.swapaxes(0, 1)[..., ::-1, ::-1]
        state_dict[f"{name}.weight"] = np.array(weight, order="C")
        state_dict[f"{name}.bias"] = np.array(layer["bias"])
    return state_dict


@pytest.fixture(scope="module")
def conv():
    images = np.random.default_rng(0).integers(0, 256, (28, 7, 10, 2), np.uint8)
    split = data.Split(images, np.zeros(28, np.int64))
    dataset = data.Dataset(split, split, split, "", "bundled")
    options, train = ConvAutoencoder((4, 6), latent_dim=5), TrainConfig(batch_size=8)
    return Lockstep(sides.Pair(options, train, dataset, ConvInTorch, conv_to_torch))


def test_the_convolutional_nets_images_and_gradients_are_pytorchs(conv):
    net, params = conv.side.model, conv.state.params
    with sides.precision("float64"):
        x = jnp.asarray(scale(conv.images, "float64"))
        model, pixels = conv.pair.theirs(params), torch.tensor(np.asarray(x)).flatten(1)
        target = model(pixels)
        torch.nn.MSELoss()(target, pixels).backward()
        recon = jax.jit(functools.partial(apply, net))(params, x)

        def loss(params):
            return jnp.square(apply(net, params, x) - x).mean()

        gradient = conv_to_torch(jax.jit(jax.grad(loss))(params))
    target = target.detach().numpy().reshape(x.shape)
    np.testing.assert_allclose(recon, target, rtol=0, atol=1e-12)
    assert len(gradient) == 12
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        np.testing.assert_allclose(gradient[name], parameter.grad, rtol=0, atol=1e-12)


def test_the_convolutional_nets_training_is_pytorchs_to_rounding(conv):
    assert_same(conv)


def without_relu(net, latent):
    x = net.decoder[0](latent).reshape(*latent.shape[:-1], 2, 3, 6)
    x = net.decoder[1](nn.relu(x))[..., :4, :5, :]
    return net.decoder[2](x)[..., :7, :10, :]


CONV_BUGS = {
    "kernel's rows are columns": (
        *(layers, "downsample"),
        lambda x, kernel: downsample(x, kernel.swapaxes(0, 1)),
    ),
    "stride begins a pixel later": (
        *(layers, "upsample"),
        lambda x, kernel: jnp.roll(upsample(x, kernel), 1, axis=-3),
    ),
    "no ReLU after a stage of the decoder": (ConvNet, "logits", without_relu),
}


@pytest.mark.parametrize("name", CONV_BUGS)
def test_lockstep_catches_the_bug_in_the_convolutional_net(conv, monkeypatch, name):
    monkeypatch.setattr(*CONV_BUGS[name])
    with sides.precision("float64"):
        wrong = conv.pair.ours(conv.images, "float64")
    assert conv.apart(train_step=wrong.train_step) > 10 * ATOL
