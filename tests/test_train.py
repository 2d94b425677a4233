"""The update rule, the order of the images, the loop: what makes a run repeatable."""

import functools
import importlib.util
import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, random_like
from hypothesis import given
from hypothesis import strategies as st

from ae_jax import devices
from ae_jax.config import TrainConfig
from ae_jax.keys import Purpose, key_for
from ae_jax.models import MODELS
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Denoising, Reconstruction
from ae_jax.runs import program
from ae_jax.train import (
    CHUNK_S,
    Block,
    Plan,
    TrainState,
    batch_indices,
    fit,
    init_state,
    make_train_chunk,
    make_train_step,
)

# No two sizes are the same, and the batch does not divide the images: the last of the
# T = 4 batches of an epoch holds seven.
SHAPE, N, B, T, EPOCHS = (6, 5, 3), 37, 10, 4, 2
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), np.uint8)
SHUFFLE = key_for(0, Purpose.SHUFFLE)
DENSE = Autoencoder(hidden=(11, 9), latent_dim=8, latent_activation="none")
DENOISING = Denoising(sigma=0.1)  # which draws


@functools.cache
def build(model=DENSE, objective=DENOISING, **train):
    options = TrainConfig(batch_size=B, num_epochs=EPOCHS, **train)
    with devices.numerics(options.precision):
        return program.build(model, objective, options, N, SHAPE)


@functools.cache
def chunk_of(made):
    return devices.jit_chunk(made.chunk)


@functools.cache
def block_of(epoch):
    rows = np.asarray(batch_indices(SHUFFLE, epoch, N, B))
    return Block(jnp.asarray(IMAGES), rows, epoch * T, (epoch + 1) * T)


@functools.cache
def first_state(made):
    """Of parameters that are the same in every precision."""
    params = random_like(jax.eval_shape(made.init, np.uint32(0)).params)
    return made.start_from(params, 0)


def initial(made):
    """A state for the caller to give away."""
    return jax.tree.map(jnp.copy, first_state(made))


def train(made, stops, state=None):
    """The state at the last of ``stops``, each of which ends a chunk."""
    state = initial(made) if state is None else state
    for stop in stops:
        state = chunk_of(made)(state, block_of(int(state.step) // T), stop)
    return state


def leaves(state):
    parts = (state.step, state.params, state.opt_state, state.epoch_metrics)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(parts)]


def assert_same_bits(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


# --- Keys and order -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_images", "batch_size"),
    [(1, 1), (1, 5), (N, B), (60, 60), (61, 60), (60_000, 64)],
)
def test_the_batches_of_an_epoch_hold_each_image_once(num_images, batch_size):
    rows = np.asarray(batch_indices(SHUFFLE, 3, num_images, batch_size))
    assert rows.shape == (math.ceil(num_images / batch_size), batch_size)
    order = rows.ravel()
    assert sorted(order[:num_images]) == list(range(num_images))
    assert (order[num_images:] == -1).all()  # only the last batch is short


def test_the_order_is_the_documented_function_of_seed_and_epoch():
    for seed, epoch in [(0, 0), (0, 1), (2**32 - 1, 0)]:
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
        order = batch_indices(key_for(seed, Purpose.SHUFFLE), epoch, N, B).ravel()[:N]
        np.testing.assert_array_equal(order, jax.random.permutation(key, N))
        with jax.enable_x64(True), jax.default_prng_impl("rbg"):
            again = batch_indices(key_for(seed, Purpose.SHUFFLE), epoch, N, B)
        np.testing.assert_array_equal(again.ravel()[:N], order)


def test_no_two_purposes_share_a_key():
    keys = {jax.random.key_data(key_for(0, p)).tobytes() for p in Purpose}
    assert len(keys) == len(Purpose)


# --- The update rule ------------------------------------------------------------------


def test_images_of_weight_zero_do_not_count():
    made, block = build(), block_of(0)
    other = block._replace(rows=np.where(block.rows < 0, -5, block.rows))
    again = chunk_of(made)(initial(made), other, T)
    assert_same_bits(train(made, [T]), again)


def test_each_position_of_each_step_draws_from_its_own_key():
    def losses(params, x, keys):
        return {"draw": params * jax.vmap(jax.random.uniform)(keys)}

    tx = optax.sgd(0.0)
    step = jax.jit(make_train_step(losses, "draw", tx))
    state = init_state(jnp.ones(()), tx, key_for(7, Purpose.STEP), ["draw"], T)
    draws = []
    for t in range(3):
        for b in range(B):
            # Weights that count one image alone make the mean its own draw.
            after, metrics = step(state, jnp.zeros((B, *SHAPE)), jnp.eye(B)[b])
            key = jax.random.fold_in(jax.random.fold_in(state.key, t), b)
            assert metrics["draw"] == jax.random.uniform(key)
            draws.append(float(metrics["draw"]))
        state = after
    assert len(set(draws)) == 3 * B


def test_each_image_is_shifted_at_random_and_what_comes_in_repeats_the_edge():
    most, tx, size = 2, optax.sgd(0.0), 200
    image = np.arange(1.0, 31.0).reshape(6, 5, 1)
    padded = np.pad(image, ((most, most), (most, most), (0, 0)), mode="edge")
    sides = range(2 * most + 1)
    shifted = jnp.array([padded[i : i + 6, j : j + 5] for i in sides for j in sides])

    def losses(params, x, keys):
        fits = (x[:, None] == shifted[None]).all((2, 3, 4))
        number = jnp.where(fits.sum(1) == 1, fits.argmax(1), -1)
        return {"draw": jax.vmap(jax.random.uniform)(keys), "number": params * number}

    x = jnp.tile(jnp.asarray(image), (size, 1, 1, 1))
    state = init_state(jnp.ones(()), tx, key_for(7, Purpose.STEP), [], T)
    step = jax.jit(make_train_step(losses, "number", tx, most))
    still = jax.jit(make_train_step(losses, "number", tx))
    where = [int(step(state, x, weight)[1]["number"]) for weight in jnp.eye(size)]
    assert set(where) == set(range(len(shifted)))
    assert where[:3] != [step(state, x, w)[1]["number"] for w in jnp.eye(size)[3:6]]
    one = jnp.eye(size)[0]
    assert int(still(state, x, one)[1]["number"]) == len(shifted) // 2
    assert step(state, x, one)[1]["draw"] == still(state, x, one)[1]["draw"]


def test_same_seed_gives_the_same_bits_and_another_seed_others():
    init = jax.jit(build().init)
    one, again, other = (init(np.uint32(seed)) for seed in (0, 0, 2**32 - 1))
    assert_same_bits(one, again)
    assert one.key == again.key == key_for(0, Purpose.STEP) != other.key
    differ = jax.tree.map(lambda a, b: (a != b).all(), one.params, other.params)
    assert all(jax.tree.leaves(differ))


def test_precision_reaches_what_it_should_and_no_more():
    states = {}
    for precision in ("bfloat16", "float64"):
        made = build(objective=Reconstruction(), precision=precision)
        with devices.numerics(precision):
            states[precision] = jax.device_get(train(made, [T])._replace(key=()))
    coarse, fine = states.values()
    assert {leaf.dtype.name for leaf in leaves(fine)} == {"float64", "int32"}
    # bfloat16 is the arithmetic of the layers alone.
    assert {leaf.dtype.name for leaf in leaves(coarse)} == {"float32", "int32"}
    losses = [state.epoch_metrics["mse"] for state in states.values()]
    np.testing.assert_allclose(*losses, rtol=0.01)
    assert np.abs(losses[0] - losses[1]).max() > 1e-6


# --- The chunk ------------------------------------------------------------------------


@pytest.mark.parametrize("model", [cls() for cls in MODELS.values()], ids=list(MODELS))
def test_any_cut_of_an_epoch_gives_the_same_bits(model):
    made = build(model)
    whole = train(made, [T, 2 * T])
    assert_same_bits(whole, train(made, [1, 2, 3, T, T + 3, 2 * T]))
    # The block may be longer than what is left of the epoch, and begin within it.
    state = train(made, [3])
    last = block_of(0)._replace(first_step=3, rows=np.roll(block_of(0).rows, 1, axis=0))
    assert_same_bits(train(made, [2 * T], chunk_of(made)(state, last, T)), whole)


def test_chunks_of_every_length_and_epoch_share_one_trace():
    made, traces = build(), []

    def counted(state, x, weight):
        traces.append(x.shape)
        return made.train_step(state, x, weight)

    chunk = jax.jit(make_train_chunk(counted, T, np.float32), donate_argnums=0)
    state = initial(made)
    for stop in (1, 2, T, T + 3, 2 * T):
        state = chunk(state, block_of(int(state.step) // T), stop)
    assert traces == [(B, *SHAPE)]


def test_the_chunk_takes_its_state_over():
    state = initial(build())
    before = jax.tree.leaves((state.params, state.opt_state, state.epoch_metrics))
    train(build(), [1], state)
    assert all(leaf.is_deleted() for leaf in before)


def test_within_a_chunk_nothing_goes_to_or_from_the_host():
    made = build()
    block, stop = jax.device_put((block_of(0), T))
    state = train(made, [1])
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(chunk_of(made)(state, block, stop))


# --- The loop -------------------------------------------------------------------------


class Clock:
    """Time that passes while a device works, and only once somebody waits for it."""

    def __init__(self, step_s):
        self.now, self.step_s, self._pending = 0.0, step_s, 0.0

    def chunk(self, state, block, stop):
        assert block.first_step <= state.step < stop <= block.end_step
        self._pending += (stop - state.step) * self.step_s
        return TrainState(stop, self, (), (), {})

    def block_until_ready(self):
        self.now, self._pending = self.now + self._pending, 0.0
        return self


@given(
    *(st.integers(0, 40), st.integers(1, 90), st.integers(0, 12), st.integers(1, 15)),
    st.integers(1, 40),
)
def test_fit_pauses_at_block_ends_and_save_steps_and_after_two_seconds(
    start, more, save_every, length, in_time
):
    step_s = 0.999 * CHUNK_S / in_time
    clock, until, stops = Clock(step_s), start + more, [start]

    def block_at(step):
        return Block((), (), step // length * length, (step // length + 1) * length)

    def on_chunk(state, step, seconds):
        assert state.step == step > stops[-1]
        np.testing.assert_allclose(seconds, (step - stops[-1]) * step_s)
        stops.append(step)
        return True

    plan = Plan(until, save_every, lambda: clock.now)
    state = TrainState(start, clock, (), (), {})
    assert fit(state, clock.chunk, block_at, plan, on_chunk).step == until
    forced = {t for t in range(start + 1, until) if t % length == 0}
    if save_every:
        forced |= {t for t in range(start + 1, until) if t % save_every == 0}
    assert stops[-1] == until
    assert forced <= set(stops)
    planned = 1
    for a, b in itertools.pairwise(stops):
        assert b - a <= planned
        assert b - a == planned or b in forced | {until}
        planned = in_time


def test_fit_ends_when_it_is_asked_to_and_resumes_from_there():
    made = build()

    def go(state, until, on_chunk=lambda *_: True, save_every=0):
        plan = Plan(until, save_every)
        return fit(state, chunk_of(made), lambda t: block_of(t // T), plan, on_chunk)

    whole = go(initial(made), EPOCHS * T)
    early = go(initial(made), EPOCHS * T, lambda state, step, s: step < 3, 1)
    assert int(early.step) == 3
    assert_same_bits(go(early, EPOCHS * T, save_every=3), whole)
    assert_same_bits(whole, train(made, [T, 2 * T]))
    assert go(whole, EPOCHS * T) is whole  # nothing is left to do


# --- Copied out -----------------------------------------------------------------------


def test_train_copied_out_alone_trains_what_a_stranger_gives_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ae_jax", None)  # whoever imports it fails
    source = ROOT / "ae_jax" / "train.py"
    spec = importlib.util.spec_from_file_location("copied_out", source)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    options = TrainConfig(learning_rate=0.1, schedule="cosine")
    tx, _ = alone.make_optimizer(options, 20 * T)

    def mean_image(params, x, keys):
        return {"mse": ((params[None] - x) ** 2).mean((1, 2, 3))}

    def block_at(step):
        rows = alone.batch_indices(jax.random.key(1), step // T, N, B)
        return alone.Block(IMAGES, rows, step // T * T, step // T * T + T)

    key = jax.random.key(0)
    state = alone.init_state(jnp.zeros(SHAPE), tx, key, ["mse"], T)
    step = alone.make_train_step(mean_image, "mse", tx)
    chunk = jax.jit(alone.make_train_chunk(step, T, np.float32))
    state = alone.fit(state, chunk, block_at, alone.Plan(20 * T), lambda *_: True)
    np.testing.assert_allclose(state.params, IMAGES.mean(axis=0) / 255, atol=0.05)
