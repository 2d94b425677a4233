"""The update rule, the order of the images, the loop: what makes a run repeatable."""

import dataclasses
import functools
import itertools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
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
    make_optimizer,
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
    ("num_images", "batch_size"), [(1, 1), (1, 5), (N, B), (50, 7), (60, 60), (61, 60)]
)
def test_the_batches_of_an_epoch_hold_each_image_once(num_images, batch_size):
    rows = np.asarray(batch_indices(SHUFFLE, 3, num_images, batch_size))
    assert rows.shape == (math.ceil(num_images / batch_size), batch_size)
    order = rows.ravel()
    assert sorted(order[:num_images]) == list(range(num_images))
    assert (order[num_images:] == -1).all()  # only the last batch is short


def test_mnist_has_938_batches_the_last_of_32():
    rows = batch_indices(SHUFFLE, 0, 60_000, 64)
    assert rows.shape == (938, 64)
    assert int((rows[-1] >= 0).sum()) == 32


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


def images_of(rows):
    return jnp.asarray(IMAGES[rows[rows >= 0]] / np.float32(255))


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_epoch_metrics_are_each_batchs_own_means_and_the_norm_of_its_gradient(loss):
    # A learning rate this small leaves the parameters where they are.
    made = build(objective=Reconstruction(loss), learning_rate=1e-30)
    params, metrics = first_state(made).params, train(made, [T]).epoch_metrics

    def losses(params, x):
        recon = made.model.apply({"params": params}, x)
        cross = x * jnp.log(recon) + (1 - x) * jnp.log1p(-recon)
        return {"mse": jnp.mean((recon - x) ** 2), "bce": -jnp.mean(cross)}

    gradient = jax.jit(jax.grad(lambda params, x: losses(params, x)[loss]))
    assert set(metrics) == {"mse", loss, "grad_norm"}
    assert {values.dtype.name for values in metrics.values()} == {"float32"}
    for i, rows in enumerate(block_of(0).rows):
        x = images_of(rows)
        for name in {"mse", loss}:
            expected = losses(params, x)[name]
            np.testing.assert_allclose(metrics[name][i], expected, rtol=1e-5)
        squares = [np.square(g).sum() for g in jax.tree.leaves(gradient(params, x))]
        norm = np.sqrt(np.sum(squares))
        np.testing.assert_allclose(metrics["grad_norm"][i], norm, rtol=1e-4)
        assert abs(norm - norm**2) > 0.01 * norm


def test_images_of_weight_zero_do_not_count():
    made = build(objective=Reconstruction())
    step = jax.jit(made.train_step)
    x, weight = images_of(np.arange(B)), jnp.float32(jnp.arange(B) < 7)
    other = x.at[7:].set(0.5)
    one, metrics = step(initial(made), x, weight)
    two, same = step(initial(made), other, weight)
    assert_same_bits(one, two)
    assert metrics == same


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


# --- The optimiser --------------------------------------------------------------------

TORCH_OPTIMISERS = {
    "adam": ({}, lambda p: torch.optim.Adam(p, lr=1e-2)),
    "adamw": (
        {"weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
    "clipped": ({"clip_norm": 0.5}, lambda p: torch.optim.Adam(p, lr=1e-2)),
}


@pytest.mark.parametrize("name", TORCH_OPTIMISERS)
def test_the_optimiser_is_torchs(name):
    options, make = TORCH_OPTIMISERS[name]
    start = np.random.default_rng(0).normal(size=5)
    gradients = [np.sin(start + t) * 3.0 ** (t % 5 - 3) for t in range(20)]
    norms = [np.linalg.norm(gradient) for gradient in gradients]
    assert min(norms) < 0.5 < max(norms)  # some are clipped
    theirs = torch.tensor(start, requires_grad=True)
    optimiser = make([theirs])
    with devices.numerics("float64"):
        tx, _ = make_optimizer(TrainConfig(learning_rate=1e-2, **options), 100)
        ours = jnp.asarray(start)
        state = tx.init(ours)
        for gradient in gradients:
            updates, state = tx.update(jnp.asarray(gradient), state, ours)
            ours = optax.apply_updates(ours, updates)
            theirs.grad = torch.tensor(gradient)
            if name == "clipped":
                torch.nn.utils.clip_grad_norm_([theirs], 0.5)
            optimiser.step()
        # Torch's clip adds 1e-6 to the norm that it divides by.
        rtol = 1e-5 if name == "clipped" else 1e-13
        np.testing.assert_allclose(ours, theirs.detach(), rtol=rtol)


SCHEDULES = [
    ({}, {0: 1.0, 50: 1.0, 100: 1.0}),
    ({"warmup_steps": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 100: 1.0}),
    ({"schedule": "cosine"}, {0: 1.0, 25: 0.8535534, 50: 0.5, 100: 0.0}),
    (
        {"schedule": "cosine", "warmup_steps": 20},
        {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0},
    ),
]


@pytest.mark.parametrize(("options", "expected"), SCHEDULES)
def test_step_t_moves_at_the_rate_that_the_schedule_has_for_t(options, expected):
    tx, schedule = make_optimizer(TrainConfig(learning_rate=1.0, **options), 100)
    for t, rate in expected.items():
        np.testing.assert_allclose(schedule(t), rate, atol=1e-6)
    # Under a constant gradient Adam moves by just its rate.
    update, state = jax.jit(tx.update), tx.init(jnp.zeros(()))
    for t in range(101):
        moved, state = update(jnp.ones(()), state)
        np.testing.assert_allclose(-moved, schedule(t), atol=5e-5)


def test_a_cosine_ends_with_the_last_step_of_the_last_epoch():
    made = build(schedule="cosine", learning_rate=0.5)
    rates = [float(made.schedule(t)) for t in range(EPOCHS * T + 1)]
    assert rates == sorted(rates, reverse=True)
    np.testing.assert_allclose(rates[:: EPOCHS * T // 2], [0.5, 0.25, 0], atol=1e-6)


def test_more_epochs_leave_a_constant_rate_as_it_is():
    longer = dataclasses.replace(TrainConfig(), num_epochs=20)
    rates = [
        make_optimizer(c, c.num_epochs * 938)[1](5000) for c in (TrainConfig(), longer)
    ]
    assert rates[0] == rates[1]


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


def test_fit_ends_when_it_is_told_to_and_resumes_from_there():
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

TOY = """
import sys
sys.modules["ae_jax"] = None  # whoever imports it fails
from types import SimpleNamespace as Options
import jax, jax.numpy as jnp, numpy as np
from train import Block, Plan, batch_indices, fit, init_state  # all that it takes
from train import make_optimizer, make_train_chunk, make_train_step

images = np.random.default_rng(0).integers(0, 256, (37, 6, 5, 1), np.uint8)
tx, schedule = make_optimizer(Options(learning_rate=0.1, schedule="constant",
                              warmup_steps=0, weight_decay=0, clip_norm=None), 20)
mean_image = lambda p, x, keys: {"mse": ((p - x) ** 2).mean((1, 2, 3))}
state = init_state(jnp.zeros((6, 5, 1)), tx, jax.random.key(0), ["mse"], 4)
chunk = jax.jit(make_train_chunk(make_train_step(mean_image, "mse", tx), 4, np.float32))
def block_at(step):
    rows = batch_indices(jax.random.key(1), step // 4, 37, 10)
    return Block(images, rows, step // 4 * 4, step // 4 * 4 + 4)
losses = []
def on_chunk(state, step, seconds):
    losses.append(float(state.epoch_metrics["mse"][(step - 1) % 4]))
    return True
state = fit(state, chunk, block_at, Plan(80), on_chunk)
assert int(state.step) == 80 and losses[-1] < losses[0] / 2, losses
"""


def test_train_copied_out_alone_trains_what_a_stranger_gives_it(tmp_path):
    (tmp_path / "train.py").write_text((ROOT / "ae_jax" / "train.py").read_text())
    subprocess.run([sys.executable, "-c", TOY], cwd=tmp_path, check=True)
