"""Images drawn from runs: whose they are, how likely, how good; scripts/sample.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from life import small
from PIL import Image

from ae_jax.errors import UserError
from ae_jax.keys import Purpose, fold_each, key_for
from ae_jax.models.made import Made
from ae_jax.models.residual import Residual
from ae_jax.models.variational import Variational
from ae_jax.objectives import Autoregressive, Elbo, binarise
from ae_jax.runs.trainer import train_run
from ae_jax.tasks import generation
from ae_jax.tasks.pictures import tile
from scripts import sample as script


@pytest.fixture(scope="module")
def variational(tmp_path_factory):
    """A run of a few epochs; read only."""
    fields = {"model": Variational((32,), 4), "objective": Elbo(2), "batch_size": 50}
    folder = tmp_path_factory.mktemp("variational") / "run"
    return train_run(small(folder, num_epochs=6, learning_rate=3e-3, **fields))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of a few epochs; read only."""
    fields = {"model": Made((40,)), "objective": Autoregressive(), "batch_size": 50}
    folder = tmp_path_factory.mktemp("made") / "run"
    return train_run(small(folder, num_epochs=6, learning_rate=3e-3, **fields))


@pytest.fixture(params=["variational", "made", "finished_run"])
def any_run(request):
    return request.getfixturevalue(request.param)


def keys_of(num, seed=0):
    return fold_each(key_for(seed, Purpose.GENERATE), jnp.arange(num))


# --- Drawing --------------------------------------------------------------------------


def test_an_image_depends_on_the_seed_and_its_number_alone(any_run):
    images = generation.sample(any_run, 9, seed=3)
    assert images.shape == (9, *any_run.shape)
    assert images.min() >= 0
    assert images.max() <= 1
    assert len(np.unique(images, axis=0)) == 9
    few = generation.sample(any_run, 4, seed=3)
    np.testing.assert_allclose(few, images[:4], atol=1e-6)
    assert not np.allclose(generation.sample(any_run, 4, seed=4), few, atol=1e-3)


def test_a_variational_run_decodes_the_prior(variational):
    latents = [jax.random.normal(key, (4,), "float32") for key in keys_of(5)]
    expected = variational.decode(np.stack(latents))
    found = generation.sample(variational, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_made_draws_each_pixel_by_its_odds_given_those_before_it(made):
    images = generation.sample(made, 50)
    assert set(np.unique(images)) == {0, 1}
    # Given the whole image, the odds of all its pixels come out at once.
    white = made.reconstruct(images).reshape(50, -1)
    level = np.stack([jax.random.uniform(k, (64,), "float32") for k in keys_of(50)])
    sure = np.abs(level - white) > 1e-5
    drawn = images.reshape(50, -1) > 0
    np.testing.assert_array_equal(drawn[sure], (level < white)[sure])
    assert sure.mean() > 0.99


def test_the_mixture_has_the_latents_mean_and_spread_and_so_have_its_draws():
    rng = np.random.default_rng(0)
    parts = rng.integers(0, 3, 3000)
    centres = np.array([[0, 0], [20, 0], [0, 30]])
    latents = centres[parts] + rng.normal(size=(3000, 2)) @ [[2, 1], [0, 0.5]]
    mixture = generation.fit_mixture(latents)
    assert len(mixture.weights_) == 5  # with one the three would be a blur
    drawn = generation.draw_latents(mixture, keys_of(4000))
    np.testing.assert_allclose(drawn.mean(axis=0), latents.mean(axis=0), atol=0.6)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(latents.T), rtol=0.06, atol=2)
    nearest = np.linalg.norm(drawn[:, None] - centres, axis=2).min(axis=1)
    assert np.quantile(nearest, 0.99) < 8


def test_latents_that_are_all_the_same_are_drawn_as_they_are():
    mixture = generation.fit_mixture(np.full((50, 3), 2.0, np.float32))
    drawn = generation.draw_latents(mixture, keys_of(7))
    np.testing.assert_allclose(drawn, 2, atol=0.01)


@pytest.mark.parametrize(
    ("num", "seed", "message"),
    [
        (0, 0, "num: must be from 1 to 10,000, got 0"),
        (10_001, 0, "num: must be from 1 to 10,000, got 10001"),
        (1, -1, "seed: must be from 0 to 4294967295, got -1"),
        (1, 2**32, "seed: must be"),
    ],
)
def test_numbers_out_of_range_are_refused(variational, num, seed, message):
    with pytest.raises(UserError, match=message):
        generation.sample(variational, num, seed)


def test_a_run_without_a_latent_is_told_what_it_takes(finished_run):
    net = Residual(4, 1).make(finished_run.shape, "float32")
    run = dataclasses.replace(finished_run, model=net, _functions={})
    with pytest.raises(UserError, match="run: its model, ResidualNet, has no latent"):
        generation.sample(run, 3)
    with pytest.raises(UserError, match="gives images no probability; train one with"):
        generation.nats(finished_run, np.zeros((2, 8, 8, 1), np.uint8))


# --- How likely -----------------------------------------------------------------------


def test_the_images_of_a_bound_are_fixed_by_the_seed(variational, made):
    images = made.data().test.images[:40]
    black_and_white = generation.binarised(images, seed=5)
    assert set(np.unique(black_and_white)) == {0, 1}
    one = binarise(
        jnp.asarray(images[7] / np.float32(255)),
        jax.random.fold_in(key_for(5, Purpose.SCORE), 7),
    )
    np.testing.assert_array_equal(black_and_white[7], one)
    exact = made.scores(black_and_white, Autoregressive(binarise=False))["nats"]
    np.testing.assert_allclose(generation.nats(made, images, 1, 5), exact, rtol=1e-5)
    # With many samples which ones hardly matters.
    found = generation.nats(variational, images, 1000, 5)
    other = variational.scores(black_and_white, Elbo(1000, binarise=False), 9)["nats"]
    assert np.median(np.abs(found - other)) < 0.3
    assert abs(found.mean() - other.mean()) < 0.2
    assert found.mean() < generation.nats(variational, images, 1, 5).mean()


def test_units_are_active_whose_means_vary(variational):
    params = jax.tree.map(np.array, variational.params)
    last = params["encoder_1"]
    last["kernel"][:, [1, 3]] = 0
    last["kernel"][:, 3] = 1e-4
    run = dataclasses.replace(variational, params=params, _functions={})
    found = generation.active_units(run, run.data().test.images)
    assert found.tolist() == [True, False, True, False]


# --- How good -------------------------------------------------------------------------


def test_precision_and_recall_are_of_manifolds_each_way():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(2, 400, 3))
    score = generation.precision_recall
    assert score(real, real.copy()) == (1, 1)
    assert score(real, generated + 100) == (0, 0)
    assert min(score(real, generated)) > 0.8
    left = real[real[:, 0] < 0]
    precision, recall = score(real, left)
    assert precision == 1
    assert 0.5 < recall < 0.75  # the other half is out of reach, but for its edge
    blurred = np.concatenate([generated, generated + 100])
    assert score(real, blurred)[0] == pytest.approx(score(real, generated)[0] / 2)


def test_a_point_is_on_the_manifold_within_the_kth_neighbours_distance():
    real = np.array([[0.0], [1], [3], [7]])
    # The second nearest fellows are 3, 2, 3 and 6 away.
    for x, inside in ((-3, True), (-3.1, False), (13, True), (13.1, False)):
        points = np.full((3, 1), float(x))
        precision, _ = generation.precision_recall(real, points, num_neighbours=2)
        assert precision == inside


# --- scripts/sample.py ----------------------------------------------------------------


def test_a_grid_of_samples_is_drawn(any_run, tmp_path, capsys):
    script.main(any_run.folder, tmp_path / "a.png", num=7, seed=2)
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
    with Image.open(tmp_path / "a.png") as image:
        found = np.asarray(image)
    assert found.shape == (3 * 9 - 1, 3 * 9 - 1)
    expected = np.round(generation.sample(any_run, 7, 2)[..., 0] * 255)
    np.testing.assert_allclose(found[9:17, 18:26], expected[5], atol=1)
    assert (found[8] == 128).all()
    assert not found[18:, 9:17].any()  # there are seven only


def test_a_tile_holds_the_images_row_by_row():
    images = np.random.default_rng(0).random((5, 2, 3, 3))
    found = tile(images, 2, gap=2)
    assert found.shape == (3 * 2 + 2 * 2, 2 * 3 + 2, 3)
    np.testing.assert_array_equal(found[4:6, 5:8], images[3])
    np.testing.assert_array_equal(found[8:10, :3], images[4])
    assert (found[2:4] == 0.5).all()
    np.testing.assert_array_equal(tile(images[:1], 1), images[0])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("a.xyz", r"a\.xyz: no format of pictures ends in '\.xyz'; try \.png"),
        ("none/a.png", "there is no folder .*none; make it first"),
    ],
)
def test_what_cannot_be_written_is_found_before_anything_is_drawn(
    output, message, tmp_path
):
    with pytest.raises(UserError, match=message):
        script.main(tmp_path / "no run", tmp_path / output)
