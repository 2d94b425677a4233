import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ae_jax.config import UserError
from ae_jax.models import (
    ACTIVATIONS,
    MODELS,
    Autoencoder,
    ConvAutoencoder,
    double,
    draw_together,
    halve,
    uniform_within,
)

KEY = jax.random.key(0)


def params_of(model, num_pixels):
    return jax.jit(model.init)(KEY, jnp.zeros((1, num_pixels), model.dtype))["params"]


def images(count, num_pixels):
    return jax.random.uniform(jax.random.key(1), (count, num_pixels))


@pytest.fixture(params=MODELS, ids=str)
def model(request):
    return MODELS[request.param](shape=(5, 4), hidden=(8, 6), code_width=4)


def test_encode_then_decode_equals_call(model):
    params, x = params_of(model, 20), images(5, 20)
    code = model.apply({"params": params}, x, method="encode")
    recon = model.apply({"params": params}, code, method="decode")
    assert code.shape == (5, 4)
    np.testing.assert_array_equal(recon, model.apply({"params": params}, x))


def test_reconstructions_are_pixels(model):
    recon = model.apply({"params": params_of(model, 20)}, images(5, 20))
    assert recon.shape == (5, 20)
    assert ((recon >= 0) & (recon <= 1)).all()


def test_each_example_is_reconstructed_by_itself(model):
    params, x = params_of(model, 20), images(5, 20)
    whole = model.apply({"params": params}, x)
    one = model.apply({"params": params}, x[2:3])
    np.testing.assert_allclose(whole[2:3], one, rtol=1e-6)


def test_jit_changes_nothing_but_rounding(model):
    params, x = params_of(model, 20), images(5, 20)
    plain = model.apply({"params": params}, x)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, x), plain, 1e-6)


def test_the_tutorials_network_is_the_default():
    params = params_of(Autoencoder(shape=(784,)), 784)
    shapes = {name: layer["kernel"].shape for name, layer in params.items()}
    assert shapes == {
        "encoder_0": (784, 128),
        "encoder_1": (128, 64),
        "encoder_2": (64, 12),
        "encoder_3": (12, 3),
        "decoder_0": (3, 12),
        "decoder_1": (12, 64),
        "decoder_2": (64, 128),
        "decoder_3": (128, 784),
    }


def test_forward_pass_equals_a_numpy_rewrite():
    model = Autoencoder(shape=(20,), hidden=(8, 6), code_width=4)
    params, x = params_of(model, 20), images(5, 20)
    h = np.asarray(x, np.float64)
    for half in ("encoder", "decoder"):
        for i in range(3):
            layer = params[f"{half}_{i}"]
            h = h @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
            h = h if (half, i) == ("decoder", 2) else np.maximum(h, 0)
    np.testing.assert_allclose(
        model.apply({"params": params}, x), 1 / (1 + np.exp(-h)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("relu", [0.0, 2.0]), ("leaky_relu", [-0.01, 2.0]), ("none", [-1.0, 2.0])],
)
def test_code_activation_is_the_one_asked_for(activation, expected):
    x = jnp.array([-1.0, 2.0])
    np.testing.assert_allclose(ACTIVATIONS[activation](x), expected)
    model = Autoencoder((20,), (8,), 4, code_activation=activation)
    codes = model.apply(
        {"params": params_of(model, 20)}, images(50, 20), method="encode"
    )
    assert bool((codes < 0).any()) == (activation != "relu")


@settings(max_examples=20, deadline=None)
@given(fan_in=st.integers(1, 500))
def test_torch_init_fills_its_bounds_uniformly(fan_in):
    bound = fan_in**-0.5
    draws = np.asarray(uniform_within(bound)(KEY, (20_000,), jnp.dtype("float32")))
    assert np.abs(draws).max() <= bound
    # Mean and variance of a uniform draw, each within five standard errors.
    assert abs(draws.mean()) < 5 * bound / np.sqrt(3 * draws.size)
    np.testing.assert_allclose(draws.var(), bound**2 / 3, rtol=0.05)


@pytest.mark.parametrize("initializer", ["torch", "he"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_drawn_together_are_those_drawn_apart(initializer, dtype):
    jax.config.update("jax_enable_x64", dtype == "float64")
    param_dtype = jnp.dtype(dtype)
    model = Autoencoder((64,), (9,), initializer=initializer, param_dtype=param_dtype)

    def init(key):
        return model.init(key, jnp.zeros((1, 64), dtype))["params"]

    keys = jax.random.split(jax.random.key(2), 2)
    apart = jax.jit(jax.vmap(init))(keys)
    together = jax.jit(jax.vmap(draw_together(init)))(keys)
    assert jax.tree.leaves(together)[0].dtype == dtype
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    # What is noted within is made outside again.
    assert uniform_within(1.0)(KEY, (3,), param_dtype).any()


@pytest.mark.parametrize(
    ("initializer", "zero_bias", "variance"),
    [("torch", False, 1 / 3), ("flax", True, 1), ("he", True, 2)],
)
def test_initialiser_is_the_one_asked_for(initializer, zero_bias, variance):
    params = params_of(Autoencoder((784,), initializer=initializer), 784)
    kernel, bias = params["encoder_0"]["kernel"], params["encoder_0"]["bias"]
    assert bool((bias == 0).all()) == zero_bias
    np.testing.assert_allclose(np.var(kernel), variance / 784, rtol=0.05)


def test_a_convolution_halves_and_its_transpose_doubles_as_jaxs_own_do():
    rng = np.random.default_rng(0)
    for height in range(1, 8):
        x = jnp.asarray(rng.random((2, height, 6, 3)), jnp.float32)
        kernel = jnp.asarray(rng.random((3, 3, 3, 5)), jnp.float32)
        down = jax.lax.conv_general_dilated(
            *(x, kernel, (2, 2), "SAME"), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(halve(x, kernel), down, rtol=1e-5)
        up = jax.lax.conv_transpose(x, kernel, (2, 2), "SAME")
        np.testing.assert_allclose(double(x, kernel), up, rtol=1e-5)


SHAPES = [(7, 5, 3), (1, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv_takes_images_of_any_size_and_equals_flaxs_own_layers(shape):
    model = ConvAutoencoder(shape, (4, 6, 5), 7, code_activation="none")
    num_pixels = int(np.prod(shape))
    params, x = params_of(model, num_pixels), images(3, num_pixels)

    def by_flax(params, x):
        def apply(layer, name, x):
            return layer.apply({"params": params[name]}, x)

        h, sizes = x.reshape(3, *(*shape, 1)[:3]), []
        for i, width in enumerate((4, 6, 5)):
            sizes.append(h.shape)
            h = nn.relu(apply(nn.Conv(width, (3, 3), (2, 2)), f"encoder_{i}", h))
        left = h.shape
        code = apply(nn.Dense(7), "encoder_3", h.reshape(3, -1))
        h = apply(nn.Dense(np.prod(left[1:])), "decoder_0", code).reshape(left)
        for i, size in enumerate(reversed(sizes), start=1):
            layer = nn.ConvTranspose(size[3], (3, 3), (2, 2))
            h = apply(layer, f"decoder_{i}", nn.relu(h))[:, : size[1], : size[2]]
        return code, nn.sigmoid(h).reshape(3, num_pixels)

    def ours(params, x):
        code = model.apply({"params": params}, x, method="encode")
        return code, model.apply({"params": params}, code, method="decode")

    for found, expected in zip(
        jax.jit(ours)(params, x), jax.jit(by_flax)(params, x), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_conv_begins_within_the_bounds_of_pytorchs_layers():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    params = params_of(ConvAutoencoder((16, 16, 3), (8, 32), 9), 16 * 16 * 3)
    theirs = {
        "encoder_0": torch.nn.Conv2d(3, 8, 3),
        "encoder_1": torch.nn.Conv2d(8, 32, 3),
        "encoder_2": torch.nn.Linear(512, 9),
        "decoder_0": torch.nn.Linear(9, 512),
        "decoder_1": torch.nn.ConvTranspose2d(32, 8, 3),
        "decoder_2": torch.nn.ConvTranspose2d(8, 3, 3),
    }
    assert set(params) == set(theirs)
    for name, layer in theirs.items():
        ours = params[name]["kernel"]
        weight = layer.weight.detach().numpy()
        assert ours.size == weight.size
        np.testing.assert_allclose(np.abs(ours).max(), np.abs(weight).max(), rtol=0.05)
        np.testing.assert_allclose(np.std(ours), weight.std(), rtol=0.15)
        # The bias has few values: they lie within the kernel's bound, and fill it.
        most = np.abs(params[name]["bias"]).max() / np.abs(weight).max()
        assert 0.2 < most < 1.02


@pytest.mark.parametrize(
    ("shape", "hidden", "told"),
    [
        ((64,), (4,), r"model\.name: conv needs images of a height and a width"),
        ((8, 8), (4,) * 4, r"model\.hidden: 4 stages.*8×8 pixels; at most 3"),
        ((9, 2, 3), (4,) * 5, "9×2 pixels; at most 4"),
        ((1, 1), (4,), "at most 0"),
    ],
)
def test_images_too_small_for_the_stages_are_refused(shape, hidden, told):
    with pytest.raises(UserError, match=told):
        ConvAutoencoder(shape, hidden)
    fitting = hidden[: (max(shape[:2]) - 1).bit_length()]
    if len(shape) > 1:
        num_pixels = int(np.prod(shape))
        params_of(ConvAutoencoder(shape, fitting, 2), num_pixels)


@pytest.mark.parametrize("kind", MODELS)
def test_in_bfloat16_codes_and_pixels_come_out_in_float32_and_near(kind):
    fine, coarse = (
        MODELS[kind]((5, 4), (8,), 4, code_activation="none", dtype=jnp.dtype(dtype))
        for dtype in ("float32", "bfloat16")
    )
    params, x = params_of(fine, 20), jax.random.uniform(KEY, (64, 20))
    outputs = [model.apply({"params": params}, x) for model in (fine, coarse)]
    assert {output.dtype.name for output in outputs} == {"float32"}
    np.testing.assert_allclose(*outputs, atol=0.01)
    assert len(np.unique(outputs[1])) > 200  # bfloat16 has 96 between 0.38 and 0.62
    code = coarse.apply({"params": params}, x, method="encode")
    assert code.dtype == jnp.float32


@pytest.mark.parametrize("kind", MODELS)
def test_double_precision_reaches_every_parameter(kind):
    jax.config.update("jax_enable_x64", True)
    double = jnp.dtype("float64")
    model = MODELS[kind]((5, 4), (8,), 4, dtype=double, param_dtype=double)
    params = params_of(model, 20)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float64"}
    recon = model.apply({"params": params}, jnp.zeros((1, 20)))
    assert recon.dtype == jnp.float64
