"""Objectives: of one image each, whatever else is in the batch."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import random_like

from ae_jax import devices
from ae_jax.config import TrainConfig
from ae_jax.errors import UserError
from ae_jax.models import MODELS
from ae_jax.models.dense import Autoencoder
from ae_jax.models.made import Made
from ae_jax.models.variational import Variational
from ae_jax.objectives import (
    OBJECTIVES,
    RESERVED,
    AnyNoise,
    Autoregressive,
    Denoising,
    Elbo,
    Masking,
    Reconstruction,
    SaltAndPepper,
    batched,
    binary_cross_entropy,
    squared_error,
)
from ae_jax.runs import program

SHAPE, B = (5, 6, 3), 7
KEYS = jax.random.split(jax.random.key(3), B)
ALL = [
    *(cls() for cls in OBJECTIVES.values()),
    Reconstruction(loss="bce"),
    Elbo(num_samples=3, beta=0.5, binarise=False),
]
MODEL_OF = {Elbo: Variational((11, 9), latent_dim=4), Autoregressive: Made((11,))}
"""Of objectives that not any autoencoder will do for."""
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (B, *SHAPE)) / 255
IMAGES[0], IMAGES[1] = 0, 1  # black and white, the ends of the range


def make(options):
    """A model and parameters, in float64."""
    net = options.make(SHAPE, "float64")
    with devices.numerics("float64"):
        variables = jax.eval_shape(net.init, KEYS[0], jnp.zeros(SHAPE))
        return net, random_like(variables["params"])


PLAIN = Autoencoder(hidden=(11, 9), latent_dim=4, latent_activation="none")


@pytest.fixture(scope="module")
def model():
    return make(PLAIN)


@pytest.fixture
def fitting(objective):
    """A model that the objective is for."""
    return make(MODEL_OF.get(type(objective), PLAIN))


def draws(objective):
    """Whether it asks for the key."""
    return hasattr(objective, "corrupt") or isinstance(objective, tuple(MODEL_OF))


def needs(objective):
    """The method that the model must have beside the call."""
    if objective.loss_name == "bce":
        return "encode"
    found = {Elbo: "posterior", Autoregressive: "conditionals"}
    return found.get(type(objective), "__call__")


@functools.cache
def losses_of(objective, net):
    return jax.jit(batched(objective, net))


@pytest.fixture(params=ALL, ids=str)
def objective(request):
    return request.param


@pytest.fixture(autouse=True)
def _float64():
    with devices.numerics("float64"):
        yield


@pytest.mark.parametrize("name", MODELS)
def test_an_images_value_is_its_row_of_any_batch(objective, name):
    net, params = make(MODELS[name]())
    losses = losses_of(objective, net)
    if not hasattr(net, method := needs(objective)):
        line = rf"^model \w+: has no {method}, which is needed here; add it"
        with pytest.raises(UserError, match=line):
            losses(params, jnp.asarray(IMAGES), KEYS)
        return
    whole = losses(params, jnp.asarray(IMAGES), KEYS)
    assert set(whole) >= {objective.loss_name}
    of_one = jax.jit(functools.partial(objective, net))
    for i in (0, 3, B - 1):
        loss, metrics = of_one(params, jnp.asarray(IMAGES[i]), KEYS[i])
        alone = {objective.loss_name: loss, **metrics}
        assert set(alone) == set(whole)
        for name, values in whole.items():
            assert values.shape == (B,)
            np.testing.assert_allclose(values[i], alone[name], rtol=1e-12)
    # Among other images and at another place it is the same.
    turned = losses(params, jnp.roll(jnp.asarray(IMAGES), 2, axis=0), jnp.roll(KEYS, 2))
    for name, values in whole.items():
        np.testing.assert_allclose(jnp.roll(values, 2), turned[name], rtol=1e-12)
    others = losses(params, jnp.asarray(IMAGES).at[1:].set(0.5), KEYS)
    assert all(others[name][0] == values[0] for name, values in whole.items())


def test_loss_and_gradient_are_finite_at_the_ends_of_the_range(objective, fitting):
    net, params = fitting
    loss = batched(objective, net)

    @jax.jit
    @jax.value_and_grad
    def total(params):
        return loss(params, jnp.asarray(IMAGES), KEYS)[objective.loss_name].sum()

    for scale in (1, 1000):  # the second saturates every sigmoid
        found = total(jax.tree.map(lambda leaf, scale=scale: scale * leaf, params))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_draws_depend_on_the_key_and_on_nothing_else(objective, fitting):
    net, params = fitting
    losses = losses_of(objective, net)
    same = jnp.broadcast_to(jnp.asarray(IMAGES[3]), IMAGES.shape)
    values = losses(params, same, jnp.broadcast_to(KEYS[2], KEYS.shape))
    for column in values.values():
        np.testing.assert_allclose(column, column[0], rtol=1e-12)
    drawn = losses(params, same, KEYS)[objective.loss_name]
    distinct = len({round(float(value), 12) for value in drawn})
    assert distinct == (B if draws(objective) else 1)


def test_mse_is_the_error_of_the_models_reconstruction(objective, fitting):
    net, params = fitting
    found = losses_of(objective, net)(params, jnp.asarray(IMAGES), KEYS)
    if "mse" in found:
        recon = net.apply({"params": params}, jnp.asarray(IMAGES))
        expected = np.square(np.asarray(recon) - IMAGES).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(found["mse"], expected, rtol=1e-12)


def test_names_are_plain_and_of_one_metric_each(objective, fitting):
    found = losses_of(objective, fitting[0])(fitting[1], jnp.asarray(IMAGES), KEYS)
    assert not set(found) & {*RESERVED, "epoch", "step", "wall_s"}
    assert all(name.isidentifier() for name in found)


# --- Against PyTorch ------------------------------------------------------------------

LOGITS = (
    RNG.normal(size=(B, *SHAPE))
    * np.array([0.1, 1, 5, 20, 40, 100, 700])[:, None, None, None]
)
LOGITS[0, 0] = 0  # as an output of zeros begins
TORCH = {
    "squared_error": (squared_error, torch.nn.MSELoss()),
    "binary_cross_entropy": (binary_cross_entropy, torch.nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_loss_and_its_gradient_equal_torchs(name):
    ours, theirs = TORCH[name]
    both = jax.jit(jax.value_and_grad(ours))
    for output, target in zip(LOGITS, IMAGES, strict=True):
        loss, gradient = both(jnp.asarray(output), jnp.asarray(target))
        leaf = torch.tensor(output, requires_grad=True)
        expected = theirs(leaf, torch.tensor(target))
        expected.backward()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-12)
        np.testing.assert_allclose(gradient, leaf.grad, rtol=1e-11, atol=1e-17)


@pytest.mark.parametrize("name", TORCH)
def test_a_loss_never_broadcasts(name):
    with pytest.raises(Exception, match=r"not the same|Type-check"):
        TORCH[name][0](jnp.asarray(IMAGES[0]), jnp.asarray(IMAGES[0][:1]))


class Passing(nn.Module):
    """Gives back what it is given."""

    look: Callable

    def __call__(self, x):
        self.look(x)
        return x


def test_the_noise_is_gaussian_of_the_sigma_asked_for_and_the_target_clean():
    grey, seen = jnp.full((40, 30, 3), 0.5), []
    loss, metrics = Denoising(sigma=0.1)(Passing(seen.append), {}, grey, KEYS[0])
    noise = np.asarray(seen[0] - grey)
    assert metrics == {}
    np.testing.assert_allclose(loss, np.square(noise).mean(), rtol=1e-12)
    np.testing.assert_allclose(noise.std(), 0.1, rtol=0.05)
    assert abs(noise.mean()) < 0.01
    np.testing.assert_allclose(np.mean(np.abs(noise) < 0.1), 0.6827, atol=0.03)
    Denoising(sigma=1.0)(Passing(seen.append), {}, grey, KEYS[0])
    assert (seen[1].min(), seen[1].max()) == (0, 1)  # pixels still


def test_without_noise_denoising_is_reconstruction(model):
    net, params = model
    losses = [
        losses_of(one, net)(params, jnp.asarray(IMAGES), KEYS)[one.loss_name]
        for one in (Denoising(sigma=0.0), Reconstruction())
    ]
    np.testing.assert_allclose(*losses, rtol=1e-12)


def corrupted(objective, image, num_keys=40):
    keys = jax.random.split(KEYS[0], num_keys)
    return np.asarray(jax.vmap(objective.corrupt, (None, 0))(image, keys))


GREY = jnp.full((20, 30, 3), 0.5)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_salt_and_pepper_turn_a_share_black_or_white_and_leave_the_rest(share):
    found = corrupted(SaltAndPepper(share), GREY)
    for value, expected in ((0, share / 2), (1, share / 2), (0.5, 1 - share)):
        assert np.mean(found == value) == pytest.approx(expected, abs=0.01)
    # Each channel by itself.
    both = ((found[..., 0] != 0.5) & (found[..., 1] != 0.5)).mean()
    assert both == pytest.approx(share**2, abs=0.015)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_masking_blackens_whole_pixels(share):
    found = corrupted(Masking(share), GREY)
    assert set(np.unique(found)) <= {0, 0.5}
    assert (found == found[..., :1]).all()
    assert np.mean(found == 0) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("objective", "measure", "low", "high"),
    [
        (Denoising(0.1, 0.05), lambda x: (x - 0.5).std(axis=(1, 2, 3)), 0.05, 0.1),
        (SaltAndPepper(0.4, 0.2), lambda x: (x != 0.5).mean(axis=(1, 2, 3)), 0.2, 0.4),
        (Masking(0.4, 0.2), lambda x: (x == 0).mean(axis=(1, 2, 3)), 0.2, 0.4),
    ],
)
def test_of_a_range_each_image_has_a_level_of_its_own(objective, measure, low, high):
    levels = np.sort(measure(corrupted(objective, GREY, 200)))
    expected = np.linspace(low, high, 200)
    np.testing.assert_allclose(levels, expected, atol=0.12 * high)
    assert levels[0] < low * 1.1
    assert levels[-1] > high * 0.95


def test_any_noise_is_one_of_the_three_kinds_as_often_as_another():
    found = corrupted(AnyNoise(0.4, 1.0, 0.9), GREY, 600)
    kinds = [
        "gaussian"
        if len(np.unique(x)) > 3
        else "masking"
        if (x == x[..., :1]).all()
        else "salt and pepper"
        for x in found
    ]
    for kind in ("gaussian", "masking", "salt and pepper"):
        assert kinds.count(kind) / 600 == pytest.approx(1 / 3, abs=0.07)


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Denoising, {"sigma": -0.1}, "sigma: input should be greater than or equal"),
        (Denoising, {"sigma": float("nan")}, "sigma: "),
        (SaltAndPepper, {"share": 1.1}, "share: input should be less than or equal"),
        (Masking, {"share_min": 2}, "share_min: input should be less"),
        (AnyNoise, {"masked": -1}, "masked: input should be greater"),
    ],
)
def test_noise_out_of_range_is_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        cls(**fields)
    assert "\n" not in str(caught.value)


def test_the_likelihoods_of_all_images_there_are_sum_to_one():
    shape = (2, 2, 2)
    net = Made((9,)).make(shape, "float64")
    variables = jax.eval_shape(net.init, KEYS[0], jnp.zeros(shape))
    params = random_like(variables["params"], 2.0)
    pixels = np.indices((2,) * 8).reshape(8, -1).T
    images = jnp.asarray(pixels.reshape(-1, *shape), "float64")
    keys = jax.random.split(KEYS[0], len(images))
    nats = batched(Autoregressive(), net)(params, images, keys)["nats"]
    assert np.exp(-nats).sum() == pytest.approx(1, rel=1e-10)
    assert np.std(nats) > 1


# --- What is no objective -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mine:
    """Gives what the test wants."""

    given: str
    loss_name = "mine"

    def __call__(self, model, params, x, key):
        loss = x.mean()
        return {
            "the loss twice": (loss, {"mine": loss}),
            "a reserved name": (loss, {"grad_norm": loss}),
            "another reserved name": (loss, {"learning_rate": loss}),
            "a loss per row": (x.mean(axis=(1, 2)), {}),
            "a metric per channel": (loss, {"extra": x.mean(axis=(0, 1))}),
            "numbers": (loss, {"one": 1, "two": 2.5}),
        }[self.given]


REFUSED = {
    "the loss twice": r"objective Mine: mine names two metrics; rename it",
    "a reserved name": r"objective Mine: grad_norm names two metrics",
    "another reserved name": r"objective Mine: learning_rate names two metrics",
    "a loss per row": r"objective Mine: mine has shape \(5,\); it must be a scalar",
    "a metric per channel": r"objective Mine: extra has shape \(3,\)",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_is_no_objective_is_refused_in_one_line_before_anything_runs(given):
    net = MODELS["autoencoder"]()
    with pytest.raises(UserError, match=REFUSED[given]) as caught:
        program.build(net, Mine(given), TrainConfig(), 37, SHAPE)
    assert "\n" not in str(caught.value)


def test_a_metric_may_be_a_plain_number(model):
    found = batched(Mine("numbers"), model[0])(model[1], jnp.asarray(IMAGES), KEYS)
    np.testing.assert_array_equal(found["two"], [2.5] * B)
