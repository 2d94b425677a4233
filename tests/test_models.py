"""Models: any leading axes, parameters alone, PyTorch's first draws."""

import dataclasses

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
from ae_jax.keys import Purpose, key_for
from ae_jax.models import MODELS
from ae_jax.models.conv import ConvAutoencoder
from ae_jax.models.dense import Autoencoder
from ae_jax.models.layers import (
    convolve,
    downsample,
    fold,
    unfold,
    uniform_within,
    upsample,
)
from ae_jax.models.made import Made, masks
from ae_jax.models.residual import Residual
from ae_jax.models.variational import MAX_LOG_STD, Variational
from ae_jax.objectives import Reconstruction
from ae_jax.runs import program

SHAPE, LEADING = (5, 6, 3), (2, 4)
KEY = key_for(0, Purpose.INIT)
IMAGES = np.random.default_rng(0).random((*LEADING, *SHAPE))
SMALL = {
    Autoencoder: {"hidden": (11, 9)},
    ConvAutoencoder: {"hidden": (4, 7)},
    Residual: {"channels": 5, "num_blocks": 2},
    Variational: {"hidden": (11, 9), "latent_dim": 4},
    Made: {"hidden": (11, 9)},
}
"""Of models whose defaults compile slowly, or are large."""


def make(cls, shape=SHAPE, precision="float64", **options):
    """A model none of whose units is dead, and parameters for it."""
    fields = {field.name for field in dataclasses.fields(cls)}
    options = {"latent_activation": "none", **SMALL.get(cls, {}), **options}
    options = {k: v for k, v in options.items() if k in fields}
    net = cls(**options).make(shape, precision)
    with devices.numerics(precision):
        variables = jax.eval_shape(net.init, KEY, jnp.zeros(shape))
        return net, random_like(variables["params"])


def forward(net, method="__call__"):
    return jax.jit(lambda params, x: net.apply({"params": params}, x, method=method))


@pytest.fixture(params=MODELS.values(), ids=list(MODELS))
def cls(request):
    return request.param


# --- Laws of every model --------------------------------------------------------------


def test_any_leading_axes_give_the_same_values_and_each_image_is_by_itself(cls):
    net, params = make(cls)
    with devices.numerics("float64"):
        call, x = forward(net), jnp.asarray(IMAGES)
        recon = call(params, x)
        assert recon.shape == x.shape
        kinds = {leaf.dtype.name for leaf in jax.tree.leaves((params, recon))}
        assert kinds == {"float64"}
        flat = call(params, x.reshape(-1, *SHAPE))
        np.testing.assert_allclose(flat.reshape(x.shape), recon, rtol=1e-12)
        np.testing.assert_allclose(call(params, x[1, 2]), recon[1, 2], rtol=1e-12)


def test_call_is_decode_of_encode_and_decode_the_sigmoid_of_logits(cls):
    net, params = make(cls)
    if not hasattr(net, "encode"):  # it has no latent, and logits of an image
        return
    with devices.numerics("float64"):
        x = jnp.asarray(IMAGES)
        latent = forward(net, "encode")(params, x)
        assert latent.shape[:-1] == LEADING
        recon = forward(net, "decode")(params, latent)
        np.testing.assert_allclose(recon, forward(net)(params, x), rtol=1e-12)
        logits = np.asarray(forward(net, "logits")(params, latent))
        np.testing.assert_allclose(recon, 1 / (1 + np.exp(-logits)), rtol=1e-12)
        assert ((recon > 0) & (recon < 1)).all()


def test_the_gradient_reaches_every_parameter(cls):
    net, params = make(cls)
    with devices.numerics("float64"):
        x = jnp.asarray(IMAGES)

        @jax.jit
        @jax.grad
        def gradient(params):
            return jnp.square(net.apply({"params": params}, x) - x).mean()

        for path, leaf in jax.tree.leaves_with_path(gradient(params)):
            assert leaf.any(), jax.tree_util.keystr(path)


def test_precision_is_the_layers_and_latents_and_pixels_stay_fine(cls):
    net, params = make(cls)
    with devices.numerics("float64"):
        exact = np.asarray(forward(net)(params, jnp.asarray(IMAGES)))
    for precision, rtol in (("bfloat16", 0.05), ("tf32", 1e-4)):
        net, params = make(cls, precision=precision)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
        with devices.numerics(precision):
            x = jnp.asarray(IMAGES, "float32")
            recon = np.asarray(forward(net)(params, x))
            if hasattr(net, "encode"):
                assert forward(net, "encode")(params, x).dtype.name == "float32"
        assert recon.dtype.name == "float32"
        np.testing.assert_allclose(recon, exact, rtol=rtol)
        if precision == "bfloat16":
            assert np.abs(recon - exact).max() > 1e-4
            # Its own sigmoid would leave 96 grey levels between 0.38 and 0.62.
            levels = np.unique(recon[(recon > 0.38) & (recon < 0.62)])
            assert len(levels) > 96


class Normed(nn.Module):
    """Keeps running means beside its parameters."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


@dataclasses.dataclass(frozen=True)
class BatchNormed:
    def make(self, shape, precision):
        return Normed()


def test_a_model_with_state_beside_its_parameters_is_refused_by_name():
    with pytest.raises(UserError, match=r"model Normed: has state .*batch_stats") as e:
        program.build(BatchNormed(), Reconstruction(), TrainConfig(), 37, SHAPE)
    assert "\n" not in str(e.value)


# --- Each of them ---------------------------------------------------------------------


def test_the_tutorials_network_is_the_default():
    assert MODELS["autoencoder"]() == Autoencoder(
        (128, 64, 12), 3, "relu", "relu", "torch"
    )


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("cls", [Autoencoder, ConvAutoencoder])
def test_the_gradient_of_relu_at_zero_is_zero_as_in_torch(cls, activation):
    # jnp.maximum(x, 0) would pass on half of it, and every other test. Black images
    # and zero biases bring every unit to exactly zero.
    net, params = make(cls, precision="float32", latent_activation=activation)
    params = {k: {**v, "bias": jnp.zeros_like(v["bias"])} for k, v in params.items()}

    @jax.jit
    @jax.grad
    def gradient(params):
        latent = net.apply({"params": params}, jnp.zeros(SHAPE), method="encode")
        black = jax.lax.stop_gradient(latent)
        return (
            latent.sum() + net.apply({"params": params}, black, method="logits").sum()
        )

    found = {k for k, layer in gradient(params).items() if layer["bias"].any()}
    assert found == {"decoder_2"} | ({"encoder_2"} if activation == "none" else set())


# --- The convolutional one ------------------------------------------------------------


@pytest.mark.parametrize("height", range(1, 6))
def test_our_convolutions_equal_jaxs_own(height):
    rng = np.random.default_rng(height)
    x = jnp.asarray(rng.random((2, height, 6, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 5)), jnp.float32)
    same, down = (
        jax.lax.conv_general_dilated(
            x, kernel, (n, n), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        for n in (1, 2)
    )
    up = jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")
    np.testing.assert_allclose(jax.jit(convolve)(x, kernel), same, atol=1e-5)
    np.testing.assert_allclose(jax.jit(downsample)(x, kernel), down, atol=1e-5)
    np.testing.assert_allclose(jax.jit(upsample)(x, kernel), up, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "stages", "message"),
    [
        ((8, 6, 1), 4, r"model\.hidden: 4 stages.*8×6 pixels; at most 3"),
        ((9, 2, 3), 5, "9×2 pixels; at most 4"),
        ((1, 1, 1), 1, "at most 0"),
    ],
)
def test_images_too_small_for_the_stages_are_refused(shape, stages, message):
    with pytest.raises(UserError, match=message):
        ConvAutoencoder(hidden=(4,) * stages).make(shape, "float32")
    net = ConvAutoencoder(hidden=(4,) * (stages - 1)).make(shape, "float32")
    recon = jax.eval_shape(net.init_with_output, KEY, jnp.zeros(shape))[0]
    assert recon.shape == shape


# --- The residual one -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4, 3), (5, 7, 1), (1, 1, 2)])
def test_unfold_undoes_fold_and_odd_sides_are_filled_up(shape):
    x = jnp.asarray(np.random.default_rng(0).random((2, *shape)))
    folded = fold(x)
    height, width, channels = shape
    assert folded.shape == (2, -(-height // 2), -(-width // 2), 4 * channels)
    found = unfold(folded)
    np.testing.assert_array_equal(found[:, :height, :width], x)
    assert not found[:, height:].any()
    assert not found[:, :, width:].any()


def test_a_residual_net_begins_with_the_image_itself():
    net = Residual(channels=5, num_blocks=2).make(SHAPE, "float64")
    with devices.numerics("float64"):
        x = jnp.asarray(IMAGES)
        found = net.apply(net.init(KEY, x), x)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(4 - 6 * IMAGES)), rtol=1e-12)


def test_a_residual_nets_parameters_fit_images_of_any_size():
    nets = [Residual(4, 1).make(shape, "float32") for shape in (SHAPE, (9, 2, 3))]
    shapes = [
        jax.tree.map(jnp.shape, net.init(KEY, jnp.zeros(net.shape))) for net in nets
    ]
    assert shapes[0] == shapes[1]


# --- The variational one --------------------------------------------------------------


def test_the_posterior_is_the_encoders_output_in_halves_and_never_overflows():
    net, params = make(Variational, activation="tanh")
    with devices.numerics("float64"):
        x = jnp.asarray(IMAGES)
        mean, log_std = forward(net, "posterior")(params, x)
        assert mean.shape == log_std.shape == (*LEADING, 4)
        np.testing.assert_array_equal(forward(net, "encode")(params, x), mean)
        rows = IMAGES.reshape(-1, np.prod(SHAPE))
        for i in range(3):
            layer = jax.tree.map(np.asarray, params[f"encoder_{i}"])
            rows = (np.tanh(rows) if i else rows) @ layer["kernel"] + layer["bias"]
        found = np.concatenate([mean, log_std], axis=-1).reshape(-1, 8)
        np.testing.assert_allclose(found, rows, rtol=1e-12)
        extreme = jax.tree.map(lambda leaf: 1e4 * leaf, params)
        _, log_std = forward(net, "posterior")(extreme, x)
        assert np.abs(log_std).max() == MAX_LOG_STD


# --- The autoregressive one -----------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), (40,), (20, 13), (1,)])
@pytest.mark.parametrize("shape", [(2, 3, 2), (1, 1, 1)])
def test_a_pixels_odds_depend_on_those_before_it_and_on_no_other(hidden, shape):
    net, params = make(Made, shape, hidden=hidden)
    with devices.numerics("float64"):
        x = jnp.asarray(np.random.default_rng(0).random(shape))
        odds = jax.jit(jax.jacobian(forward(net, "conditionals"), argnums=1))
        found = np.asarray(odds(params, x)).reshape(x.size, x.size)
    before = np.tri(x.size, k=-1, dtype=bool)
    assert not found[~before].any()
    paths = np.linalg.multi_dot([np.eye(x.size), *masks(x.size, hidden)])
    assert not paths.T[~before].any()
    if hidden != (1,):  # too few units for all of them
        assert paths.T[before].all()


# --- First draws ----------------------------------------------------------------------


@pytest.mark.parametrize("fan_in", [1, 3, 784])
def test_torch_init_fills_its_bounds_uniformly(fan_in):
    bound = fan_in**-0.5
    draws = np.asarray(uniform_within(bound)(KEY, (20_000,), jnp.dtype("float32")))
    assert draws.min() >= -np.float32(bound)
    assert draws.max() <= np.float32(bound)
    # The share below each tenth of the range, within five standard errors.
    shares = np.histogram(draws, bins=10, range=(-bound, bound))[0] / draws.size
    np.testing.assert_allclose(shares, 0.1, atol=5 * np.sqrt(0.09 / draws.size))


@pytest.mark.parametrize(("init", "variance"), [("flax", 1), ("he", 2)])
def test_flaxs_and_hes_initialisers_have_their_variance_and_no_bias(init, variance):
    net = Autoencoder((), latent_dim=40, init=init).make((30, 20, 1), "float32")
    layer = net.init(KEY, jnp.zeros((30, 20, 1)))["params"]["encoder_0"]
    assert not layer["bias"].any()
    np.testing.assert_allclose(np.var(layer["kernel"]), variance / 600, rtol=0.05)


LAYERS = {
    "autoencoder": {
        "encoder_0": torch.nn.Linear(12 * 4 * 20, 50),
        "encoder_1": torch.nn.Linear(50, 30),
        "decoder_0": torch.nn.Linear(30, 50),
        "decoder_1": torch.nn.Linear(50, 12 * 4 * 20),
    },
    "conv": {
        "encoder_0": torch.nn.Conv2d(20, 50, 3),
        "encoder_1": torch.nn.Linear(6 * 2 * 50, 30),
        "decoder_0": torch.nn.Linear(30, 6 * 2 * 50),
        "decoder_1": torch.nn.ConvTranspose2d(50, 20, 3),
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_net_begins_within_the_bounds_of_pytorchs_layers_and_fills_them(name):
    net = MODELS[name](hidden=(50,), latent_dim=30).make((12, 4, 20), "float32")
    params = jax.jit(net.init)(KEY, jnp.zeros((12, 4, 20)))["params"]
    assert set(params) == set(LAYERS[name])
    for layer, theirs in LAYERS[name].items():
        kernel, weight = params[layer]["kernel"], theirs.weight.detach().numpy()
        assert kernel.size == weight.size
        bound = np.abs(weight).max()
        np.testing.assert_allclose(np.abs(kernel).max(), bound, rtol=0.01)
        np.testing.assert_allclose(np.std(kernel), weight.std(), rtol=0.05)
        bias = params[layer]["bias"]  # of fewer values
        assert 0.8 < np.abs(bias).max() / bound < 1.01
        np.testing.assert_allclose(np.std(bias), weight.std(), rtol=0.3)
