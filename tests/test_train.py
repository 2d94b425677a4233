import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ae_jax import run
from ae_jax.config import Config, ModelConfig, TrainConfig
from ae_jax.train import (
    Purpose,
    epoch_order,
    fit,
    key_for,
    make_schedule,
    make_train_chunk,
    make_train_step,
    make_tx,
)

D = 20
IMAGES = np.random.default_rng(0).integers(0, 256, (27, D), np.uint8)


SHUFFLE = key_for(0, Purpose.SHUFFLE)


def program_of(**train):
    config = Config(
        model=ModelConfig(hidden=(8, 6), code_width=4, code_activation="none"),
        train=TrainConfig(batch_size=8, num_epochs=3, seed=0, **train),
    )
    return run.build(config, len(IMAGES), D)


@functools.cache
def chunk_of(program):
    return make_train_chunk(program.train_step)


@functools.cache
def _initial(program):
    return jax.device_get(program.init()._replace(key=()))


def initial(program):
    """A state of its own for each caller, who may give it away; compiled once."""
    state = jax.tree.map(jnp.array, _initial(program))
    return state._replace(key=key_for(0, Purpose.STEP))


def train(program, stops):
    """Train with forced ends of chunks at ``stops``; the state at the last of them."""
    state = initial(program)
    for stop in stops:
        epoch = int(state.step) // program.steps_per_epoch
        state = chunk_of(program)(state, IMAGES, program.order(SHUFFLE, epoch), stop)
    return state


def leaves(state):
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.opt_state))
    ]


def assert_same_bits(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=12, deadline=None)  # each size compiles anew
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
def test_an_epochs_batches_hold_each_image_once(num_images, batch_size, epoch):
    key = key_for(0, Purpose.SHUFFLE)
    order = np.asarray(epoch_order(key, epoch, num_images, batch_size))
    assert order.shape == (math.ceil(num_images / batch_size), batch_size)
    filled = order.ravel() < 0
    assert sorted(order.ravel()[~filled]) == list(range(num_images))
    assert not filled[:num_images].any()  # only the last batch is short


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = [
        np.asarray(
            epoch_order(key_for(seed, Purpose.SHUFFLE), epoch, 100, 100)
        ).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_order_does_not_depend_on_the_precision():
    single = np.asarray(epoch_order(key_for(3, Purpose.SHUFFLE), 2, 100, 8))
    jax.config.update("jax_enable_x64", True)
    double = np.asarray(epoch_order(key_for(3, Purpose.SHUFFLE), 2, 100, 8))
    np.testing.assert_array_equal(single, double)


def test_no_two_purposes_share_a_key():
    keys = {jax.random.key_data(key_for(0, p)).tobytes() for p in Purpose}
    assert len(keys) == len(Purpose)


def test_938_batches_the_last_of_32():
    order = epoch_order(key_for(0, Purpose.SHUFFLE), 0, 60_000, 64)
    assert order.shape == (938, 64)
    assert int((order[-1] >= 0).sum()) == 32


def test_same_seed_gives_the_same_bits():
    program = program_of()
    assert_same_bits(program.init(), program.init())
    assert_same_bits(train(program, [4]), train(program, [4]))


@pytest.mark.parametrize("stops", [[1, 2, 3, 4], [3, 4], [1, 4]])
def test_any_split_of_an_epoch_gives_the_same_bits(stops):
    program = program_of()
    one, other = train(program, [4]), train(program, stops)
    assert_same_bits(one, other)
    assert_same_bits(
        one._replace(params=one.epoch_metrics, opt_state=()),
        other._replace(params=other.epoch_metrics, opt_state=()),
    )


def test_chunks_of_every_length_share_one_compilation():
    program, traces = program_of(), []

    def counted(state, x, weight):
        traces.append(x.shape)
        return program.train_step(state, x, weight)

    chunk, state = make_train_chunk(counted), initial(program)
    order = program.order(SHUFFLE, 0)
    for stop in (1, 2, 4):
        state = chunk(state, IMAGES, order, np.int32(stop))
    assert traces == [(8, D)]


def test_chunk_gives_its_state_away():
    program = program_of()
    state = initial(program)
    before = jax.tree.leaves(state.params)
    chunk_of(program)(state, IMAGES, program.order(SHUFFLE, 0), 1)
    assert all(leaf.is_deleted() for leaf in before)


def test_images_of_weight_zero_do_not_count():
    program = program_of()
    x = jnp.asarray(IMAGES[:8] / np.float32(255))
    weight = jnp.array([1.0] * 5 + [0.0] * 3)
    other = x.at[5:].set(0.5)
    step = jax.jit(program.train_step)
    one, metrics = step(initial(program), x, weight)
    two, same = step(initial(program), other, weight)
    np.testing.assert_allclose(metrics["loss"], same["loss"], rtol=1e-6)
    for a, b in zip(leaves(one), leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_epoch_metrics_are_each_batchs_own_mean():
    # A learning rate this small leaves the parameters where they are.
    program = program_of(learning_rate=1e-30)
    params = initial(program).params
    state = train(program, [4])
    order = np.asarray(program.order(SHUFFLE, 0))
    for i, rows in enumerate(order):
        x = IMAGES[rows[rows >= 0]] / np.float32(255)
        recon = program.reconstruct(params, x)
        np.testing.assert_allclose(
            state.epoch_metrics["loss"][i], np.square(recon - x).mean(), rtol=1e-5
        )


def test_gradient_reaches_every_parameter():
    program = program_of()
    before, after = initial(program).params, train(program, [1]).params
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved))


def test_each_step_draws_from_a_key_of_its_own():
    def noise(params, x, key):
        return params["w"] * jax.random.normal(key, (len(x),)), {}

    step = make_train_step(noise, optax.sgd(0.0))
    state = initial(program_of())._replace(params={"w": jnp.ones(())}, opt_state=())
    state = state._replace(opt_state=optax.sgd(0.0).init(state.params))
    x, weight = jnp.zeros((8, D)), jnp.ones(8)
    draws = []
    for _ in range(3):
        state, metrics = step(state, x, weight)
        draws.append(float(metrics["loss"]))
    assert len(set(draws)) == 3


TORCH_OPTIMISERS = {
    "adam": ({}, lambda p: torch.optim.Adam(p, lr=1e-2)),
    "adamw": (
        {"weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
    "clipped": ({"clip_norm": 0.5}, lambda p: torch.optim.Adam(p, lr=1e-2)),
}


@pytest.mark.parametrize("name", TORCH_OPTIMISERS)
def test_optimiser_is_torchs(name):
    jax.config.update("jax_enable_x64", True)
    options, make = TORCH_OPTIMISERS[name]
    config = TrainConfig(learning_rate=1e-2, **options)
    tx = make_tx(config, make_schedule(config, 100))
    start = np.random.default_rng(0).normal(size=5)
    ours, theirs = jnp.asarray(start), torch.tensor(start, requires_grad=True)
    state, optimiser = tx.init(ours), make([theirs])
    for step in range(20):
        gradient = np.sin(start + step) * 2
        updates, state = tx.update(jnp.asarray(gradient), state, ours)
        ours = optax.apply_updates(ours, updates)
        theirs.grad = torch.tensor(gradient)
        if name == "clipped":
            torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        optimiser.step()
    # Torch's clip adds 1e-6 to the norm that it divides by.
    rtol = 1e-5 if name == "clipped" else 1e-13
    np.testing.assert_allclose(ours, theirs.detach(), rtol=rtol)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 1.0, 50: 1.0, 100: 1.0}),
        ({"warmup_steps": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 100: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        (
            {"schedule": "cosine", "warmup_steps": 20},
            {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0},
        ),
    ],
)
def test_schedule_passes_through_its_points(options, expected):
    schedule = make_schedule(TrainConfig(learning_rate=1.0, **options), 100)
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, atol=1e-6)


def test_double_precision_reaches_the_optimiser_and_the_metrics():
    state = train(program_of(precision="float64"), [1])
    floats = jax.tree.leaves((state.params, state.opt_state[0].mu, state.epoch_metrics))
    assert {leaf.dtype.name for leaf in floats} == {"float64"}


def test_bfloat16_is_the_arithmetic_of_the_layers_alone():
    states = [train(program_of(precision=p), [12]) for p in ("bfloat16", "float32")]
    floats = jax.tree.leaves(states[0]._replace(step=(), key=()))
    assert {leaf.dtype.name for leaf in floats} == {"float32", "int32"}
    coarse, fine = (state.epoch_metrics["loss"] for state in states)
    np.testing.assert_allclose(coarse, fine, rtol=0.01)
    assert np.abs(coarse - fine).max() > 1e-6


def fit_and_record(save_every, until, on_chunk=lambda *_: True):
    program, stops = program_of(), []

    def record(state, step, seconds):
        stops.append(step)
        assert int(state.step) == step
        assert seconds > 0
        return on_chunk(state, step, seconds)

    def advance(state, step, stop):
        assert int(state.step) == step < stop <= (step // 4 + 1) * 4  # of one epoch
        order = program.order(SHUFFLE, step // 4)
        return chunk_of(program)(state, IMAGES, order, stop)

    state = fit(initial(program), advance, until, save_every, record)
    return state, stops


def test_fit_stops_at_each_epochs_end_and_each_save_step():
    state, stops = fit_and_record(save_every=3, until=12)
    assert int(state.step) == 12
    assert {3, 4, 6, 8, 9, 12} <= set(stops)


def test_fit_gives_the_same_bits_wherever_it_is_told_to_save():
    assert_same_bits(fit_and_record(0, 12)[0], fit_and_record(1, 12)[0])


def test_fit_ends_when_it_is_told_to():
    state, stops = fit_and_record(0, 12, lambda state, step, seconds: step < 4)
    assert int(state.step) == stops[-1] == 4


def test_an_option_for_more_epochs_leaves_the_schedule_of_a_constant_rate_alone():
    config = TrainConfig()
    longer = dataclasses.replace(config, num_epochs=20)
    rates = [make_schedule(c, c.num_epochs * 938)(5000) for c in (config, longer)]
    assert rates[0] == rates[1]
