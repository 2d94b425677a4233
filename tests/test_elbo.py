"""The bound of the likelihood: a bound, of these very draws, that closes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_like

from ae_jax import devices, objectives
from ae_jax.models.dense import Autoencoder
from ae_jax.models.variational import Variational
from ae_jax.objectives import Elbo, batched, binarise

SHAPE, B = (3, 4, 2), 5
KEYS = jax.random.split(jax.random.key(7), B)
IMAGES = np.random.default_rng(0).integers(0, 256, (B, *SHAPE)) / 255
OPTIONS = Variational((9, 7), latent_dim=3, activation="tanh")


@pytest.fixture(autouse=True)
def _float64():
    with devices.numerics("float64"):
        yield


def make(options=OPTIONS, shape=SHAPE, bound=0.5):
    net = options.make(shape, "float64")
    with devices.numerics("float64"):
        variables = jax.eval_shape(net.init, KEYS[0], jnp.zeros(shape))
        return net, random_like(variables["params"], bound)


def scores(objective, net, params, images=IMAGES, keys=KEYS):
    found = jax.jit(batched(objective, net))(params, jnp.asarray(images), keys)
    return {name: np.asarray(values) for name, values in found.items()}


# --- In NumPy -------------------------------------------------------------------------


def dense(params, name, rows):
    """The layers of one half of the network."""
    for i in range(3):
        layer = jax.tree.map(np.asarray, params[f"{name}_{i}"])
        rows = (np.tanh(rows) if i else rows) @ layer["kernel"] + layer["bias"]
    return rows


def log_gaussian(x, mean, std):
    density = -((x - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi))
    return density.sum(axis=-1)


def bound_in_numpy(objective, params, image, key):
    """Term by term, as it is defined, from the draws that are documented."""
    x = image.reshape(-1)
    if objective.binarise:
        level = jax.random.uniform(jax.random.fold_in(key, 1), SHAPE, "float64")
        x = (np.asarray(level).reshape(-1) < x).astype(float)
    mean, log_std = np.split(dense(params, "encoder", x), 2)
    keys = [
        jax.random.fold_in(jax.random.fold_in(key, 2), i)
        for i in range(objective.num_samples)
    ]
    noise = np.array([jax.random.normal(k, mean.shape, "float64") for k in keys])
    z = mean + np.exp(log_std) * noise
    white = 1 / (1 + np.exp(-dense(params, "decoder", z)))
    given = (x * np.log(white) + (1 - x) * np.log(1 - white)).sum(axis=1)
    cost = log_gaussian(z, mean, np.exp(log_std)) - log_gaussian(z, 0, 1)
    bound = np.log(np.mean(np.exp(given - objective.beta * cost)))
    std = np.exp(log_std)
    kl = (np.log(1 / std) + (std**2 + mean**2) / 2 - 0.5).sum()
    return {"nats": -bound, "distortion": -given.mean(), "kl": kl}


@pytest.mark.parametrize(
    "objective", [Elbo(), Elbo(6), Elbo(4, 0.0), Elbo(4, 3.0, binarise=False)], ids=str
)
def test_it_is_the_definition_computed_in_numpy_from_the_same_draws(objective):
    net, params = make()
    found = scores(objective, net, params)
    for i in range(B):
        expected = bound_in_numpy(objective, params, IMAGES[i], KEYS[i])
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][i], value, rtol=1e-10)


# --- Against the likelihood itself ----------------------------------------------------


def log_likelihood(params, image):
    """By quadrature over a latent of one unit."""
    z, step = np.linspace(-9, 9, 4001, retstep=True)
    white = 1 / (1 + np.exp(-dense(params, "decoder", z[:, None])))
    x = image.reshape(-1)
    given = np.where(x > 0, white, 1 - white).prod(axis=1)
    return np.log((given * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)).sum() * step)


def test_it_bounds_the_exact_likelihood_and_closes_with_more_samples():
    net, params = make(dataclasses.replace(OPTIONS, latent_dim=1), bound=1.0)
    image = IMAGES[0] > 0.5
    exact = -log_likelihood(params, image)
    many = jax.random.split(jax.random.key(1), 2000)
    images = np.broadcast_to(image.astype(float), (len(many), *SHAPE))
    means = []
    for num_samples in (1, 5, 100):
        nats = scores(Elbo(num_samples), net, params, images, many)["nats"]
        error = nats.std() / len(nats) ** 0.5
        assert nats.mean() > exact - 4 * error
        means.append(nats.mean())
    assert means[0] > means[1] + 0.01 > means[2] + 0.02
    one = scores(Elbo(20_000), net, params, images[:1], many[:1])["nats"]
    np.testing.assert_allclose(one, exact, atol=0.02)


def test_of_one_sample_it_is_reconstruction_and_divergence_on_average():
    net, params = make()
    many = jax.random.split(jax.random.key(2), 4000)
    images = np.broadcast_to(IMAGES[0].round(), (len(many), *SHAPE))
    found = scores(Elbo(), net, params, images, many)
    difference = found["nats"] - found["distortion"] - found["kl"]
    assert difference.std() > 0.1  # for the divergence is exact, not drawn
    assert abs(difference.mean()) < 4 * difference.std() / len(many) ** 0.5


# --- In parts -------------------------------------------------------------------------


def test_in_parts_it_is_what_it_is_at_once_and_so_is_its_gradient(monkeypatch):
    net, params = make()

    @jax.jit
    def at_once(params):
        return batched(Elbo(23), net)(params, jnp.asarray(IMAGES), KEYS)["nats"].sum()

    whole, gradient = jax.value_and_grad(at_once)(params)
    for size in (1, 7):
        monkeypatch.setattr(objectives, "NUM_TOGETHER", size)

        @jax.jit
        def in_parts(params):
            losses = batched(Elbo(23), net)
            return losses(params, jnp.asarray(IMAGES), KEYS)["nats"].sum()

        part, of_parts = jax.value_and_grad(in_parts)(params)
        np.testing.assert_allclose(part, whole, rtol=1e-13)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
            of_parts,
            gradient,
        )


def test_memory_does_not_grow_with_the_number_of_samples_nor_does_its_gradients():
    net, params = make(Variational((50,), latent_dim=3), (16, 16, 1))
    x, key = jnp.zeros((16, 16, 1)), KEYS[0]

    def temporary(num_samples, of):
        loss = of(lambda params: Elbo(num_samples)(net, params, x, key)[0])
        compiled = jax.jit(loss).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for of, bytes_a_sample in ((lambda f: f, 40), (jax.grad, 80)):
        grown = temporary(10_000, of) - temporary(100, of)
        assert grown < 9900 * bytes_a_sample  # an image's logits are 2,048


# --- Gradients and the ends of the range ----------------------------------------------


@pytest.mark.parametrize("objective", [Elbo(), Elbo(5, 0.7)], ids=str)
def test_the_gradient_is_the_difference_quotients_and_reaches_every_parameter(
    objective,
):
    net, params = make()

    @jax.jit
    def loss(params):
        return objective(net, params, jnp.asarray(IMAGES[1]), KEYS[1])[0]

    gradient = jax.grad(loss)(params)
    rng = np.random.default_rng(0)
    way = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    ends = (
        jax.tree.map(lambda p, w, h=h: p + h * w, params, way) for h in (1e-6, -1e-6)
    )
    up, down = map(loss, ends)
    slope = sum(
        jnp.vdot(g, w)
        for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True)
    )
    np.testing.assert_allclose((up - down) / 2e-6, slope, rtol=1e-6)
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_float32_stays_finite_at_logits_and_deviations_of_any_size():
    with devices.numerics("float32"):
        net = OPTIONS.make(SHAPE, "float32")
        variables = jax.eval_shape(net.init, KEYS[0], jnp.zeros(SHAPE))
        params = random_like(variables["params"], 1e4)

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            x = jnp.asarray(IMAGES[0], "float32")
            return Elbo(3)(net, params, x, KEYS[0])[0]

        found = loss(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


# --- The binary image -----------------------------------------------------------------


def test_a_pixel_is_white_as_often_as_it_is_bright_and_each_by_itself():
    grey = jnp.asarray([0.0, 0.2, 0.7, 1.0])[:, None, None] * jnp.ones((1, 5, 2))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.vmap(binarise, (None, 0))(grey, keys))
    assert set(np.unique(drawn)) == {0, 1}
    for row, share in zip(drawn.swapaxes(0, 1), (0, 0.2, 0.7, 1), strict=True):
        assert row.mean() == pytest.approx(share, abs=0.01)
        assert row.mean() == share or 0 < share < 1
    pixels = drawn[:, 1:3].reshape(len(keys), -1)
    off = np.corrcoef(pixels.T) - np.eye(pixels.shape[1])
    assert np.abs(off).max() < 0.08


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 0}, "num_samples: input should be greater than 0, got 0"),
        ({"num_samples": 1.5}, "num_samples: "),
        ({"num_samples": 2**31}, "num_samples: input should be less than"),
        ({"beta": -0.1}, "beta: input should be greater than or equal to 0"),
        ({"beta": float("nan")}, "beta: "),
        ({"beta": float("inf")}, "beta: input should be a finite number"),
    ],
)
def test_what_is_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        Elbo(**fields)
    assert "\n" not in str(caught.value)


def test_of_an_autoencoder_without_a_posterior_there_is_no_bound():
    net, params = make(dataclasses.replace(Autoencoder(), latent_dim=3))
    line = r"^model DenseAutoencoder: has no posterior, which is needed here; add it"
    with pytest.raises(objectives.UserError, match=line):
        scores(Elbo(), net, params)
