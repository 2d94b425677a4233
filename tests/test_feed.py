import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ae_jax import checkpoint, feed, hosts, run
from ae_jax.config import Config, TrainConfig
from ae_jax.train import Purpose, key_for

N, D, B, T = 150, 16, 8, 19  # the last batch is short
EPOCHS = 3
IMAGES = np.random.default_rng(0).integers(0, 256, (N, D)).astype(np.uint8)
MESH = hosts.make_mesh(1, B)
PROGRAM = run.build(Config(train=TrainConfig(batch_size=B)), N, D)


def make_feed(kind, seed=0):
    key = key_for(seed, Purpose.SHUFFLE)
    if kind == "stream":
        made = feed.Stream(IMAGES, key, B, EPOCHS, MESH)
    else:
        made = feed.InMemory(IMAGES, PROGRAM.order, key, MESH)
    where = hosts.replicated(MESH)
    made.lower(PROGRAM.train_step, checkpoint.abstract_like(PROGRAM.init, where))
    made.compile()
    return made


@pytest.fixture(params=[10**9, 4 * B * D], ids=["epoch", "4 batches"])
def block(request, monkeypatch):
    """A block holds an epoch, or does not divide one."""
    monkeypatch.setattr(feed, "BLOCK_BYTES", request.param)


def train(made, stops, state=None):
    """Losses of each step, and the state at the end."""
    state = jax.device_put(state or PROGRAM.init(), hosts.replicated(MESH))
    losses, step = [], int(state.step)
    for stop in stops:
        state = made.advance(state, step, stop)
        losses += np.asarray(state.epoch_metrics["loss"])[
            step % T : (stop - 1) % T + 1
        ].tolist()
        step = stop
    return losses, state


def rows(made, epoch, seed=0):
    key = key_for(seed, Purpose.SHUFFLE)
    return [made.rows_of(key, epoch, i).tolist() for i in range(T)]


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_each_epoch_is_a_permutation_of_its_own(kind):
    made = make_feed(kind)
    epochs = [rows(made, 0), rows(made, 1), rows(made, 0, seed=1)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [B] * (T - 1) + [N % B]
        assert sorted(itertools.chain(*batches)) == list(range(N))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert rows(make_feed(kind), 0) == epochs[0]  # of the seed alone


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_the_steps_train_on_the_rows_that_are_told(kind, block):
    made = make_feed(kind)
    losses, _ = train(made, [T, 2 * T])
    state, step_fn = PROGRAM.init(), jax.jit(PROGRAM.train_step)
    expected = []
    for epoch in range(2):
        for batch in rows(made, epoch):
            x = np.zeros((B, D), np.float32)
            x[: len(batch)] = IMAGES[batch] / np.float32(255)
            weight = (jnp.arange(B) < len(batch)).astype(jnp.float32)
            state, metrics = step_fn(state, x, weight)
            expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_any_split_of_a_stream_gives_the_same_bits(block):
    whole, end = train(make_feed("stream"), [T, 2 * T, 3 * T])
    made = make_feed("stream")
    first, state = train(made, [1, 3, 4, 5, 11, T, T + 1, T + 6])
    # Saved here, and gone on with by a new process that seeks its place.
    rest, resumed = train(make_feed("stream"), [T + 7, 2 * T, 3 * T], state)
    assert first + rest == whole
    same = checkpoint.digest_leaves(resumed) == checkpoint.digest_leaves(end)
    assert same


def test_a_stream_goes_back_where_it_is_asked_to(block):
    made = make_feed("stream")
    first, _ = train(made, [T, T + 5])
    again, _ = train(made, [T, T + 5])
    assert first == again
