import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ae_jax.losses import LOSSES, make_reconstruction, squared_error
from ae_jax.models import Autoencoder

RECON = jax.random.uniform(jax.random.key(0), (7, 12))
TARGET = jax.random.uniform(jax.random.key(1), (7, 12))
TORCH = {"mse": torch.nn.MSELoss, "bce": torch.nn.BCELoss}


@pytest.fixture(params=LOSSES, ids=str)
def name(request):
    return request.param


def test_loss_equals_torchs(name):
    a, b = (torch.from_numpy(np.array(x)) for x in (RECON, TARGET))
    expected = TORCH[name](reduction="none")(a, b).mean(axis=1)
    np.testing.assert_allclose(LOSSES[name](RECON, TARGET), expected, rtol=1e-5)


def test_loss_never_broadcasts(name):
    with pytest.raises(Exception, match=r"not the same|Type-check"):
        LOSSES[name](RECON, TARGET[:1])


def test_loss_is_least_where_reconstruction_is_the_target(name):
    loss = LOSSES[name]
    assert (loss(TARGET, TARGET) < loss(RECON, TARGET)).all()
    gradient = jax.grad(lambda recon: loss(recon, TARGET).sum())(TARGET)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_loss_and_gradient_are_finite_at_the_ends_of_the_pixel_range(name):
    recon, target = jnp.array([[0.0, 1.0, 0.0, 1.0]]), jnp.array([[0.0, 0.0, 1.0, 1.0]])
    loss = LOSSES[name]
    assert np.isfinite(loss(recon, target)).all()
    assert np.isfinite(jax.grad(lambda r: loss(r, target).sum())(recon)).all()


def test_objective_is_the_loss_of_the_models_reconstruction(name):
    model = Autoencoder((12,), (5,), 2)
    params = jax.jit(model.init)(jax.random.key(0), TARGET)["params"]
    objective = make_reconstruction(model, LOSSES[name])
    per_example, metrics = objective(params, TARGET, jax.random.key(0))
    recon = model.apply({"params": params}, TARGET)
    np.testing.assert_array_equal(per_example, LOSSES[name](recon, TARGET))
    assert set(metrics) == (set() if name == "mse" else {"mse"})
    for value in metrics.values():
        np.testing.assert_array_equal(value, squared_error(recon, TARGET))


def test_gradient_of_relu_at_zero_is_zero_as_in_torch():
    # jnp.maximum(x, 0) would pass on half of it, and every other test. Black images
    # and zero biases bring every unit to exactly zero.
    black = jnp.zeros((7, 4))
    model = Autoencoder((4,), (3,), 2)
    params = jax.jit(model.init)(jax.random.key(0), black)["params"]
    for layer in params.values():
        layer["bias"] = jnp.zeros_like(layer["bias"])
    objective = make_reconstruction(model, squared_error)

    def loss(params):
        return objective(params, black, jax.random.key(0))[0].sum()

    grads = jax.grad(loss)(params)
    assert (grads["decoder_1"]["bias"] != 0).all()
    for name in ("encoder_0", "encoder_1", "decoder_0"):
        assert (grads[name]["bias"] == 0).all()
