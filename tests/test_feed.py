"""What the train chunk is fed: each image once an epoch, the same from any start."""

import itertools

import jax
import numpy as np
import pytest

from ae_jax import devices
from ae_jax.data import ImageFile, feed
from ae_jax.keys import Purpose, key_for
from ae_jax.train import batch_indices

# The last of T = 19 batches holds six images.
SHAPE, N, B, T, EPOCHS = (5, 4, 3), 150, 8, 19, 3
IMAGES = np.random.default_rng(0).integers(0, 256, (N, *SHAPE), np.uint8)
WHERE = devices.replicated(devices.make_mesh(1, B))


@pytest.fixture(params=[10**9, 5 * B * 60, 1], ids=["epoch", "5 batches", "1 batch"])
def block_bytes(request, monkeypatch):
    """A block holds an epoch, or does not divide one, or is a single batch."""
    monkeypatch.setattr(feed, "BLOCK_BYTES", request.param)
    return request.param


@pytest.fixture(params=["memory", "stream", "stream of a file"])
def make(request, tmp_path):
    images = IMAGES
    if request.param == "stream of a file":
        np.save(tmp_path / "images.npy", IMAGES)
        images = ImageFile(tmp_path / "images.npy")

    def made(seed=0):
        key = key_for(seed, Purpose.SHUFFLE)
        if request.param == "memory":
            return feed.InMemory(images, key, B, WHERE)
        return feed.Stream(images, key, B, WHERE, EPOCHS * T)

    return made


def batch(made, step):
    """The images of a step, as the train chunk picks them, and which count."""
    block = made.block_at(step)
    assert block.first_step <= step < block.end_step
    assert block.first_step // T == (block.end_step - 1) // T  # of one epoch
    assert block.images.dtype == np.uint8
    rows = np.asarray(block.rows)[step - block.first_step]
    assert rows.shape == (B,)
    return np.asarray(block.images)[rows], rows >= 0


def rows_of(made, epoch, seed=0):
    key = key_for(seed, Purpose.SHUFFLE)
    return [made.rows_at(key, epoch * T + i).tolist() for i in range(T)]


def test_each_epoch_is_a_permutation_of_its_own(make):
    made = make()
    epochs = [rows_of(made, 0), rows_of(made, 1), rows_of(made, 0, seed=1)]
    for batches in epochs:
        assert [len(rows) for rows in batches] == [B] * (T - 1) + [N % B]
        assert sorted(itertools.chain(*batches)) == list(range(N))
    assert len({str(batches) for batches in epochs}) == 3
    assert rows_of(make(), 0) == epochs[0]  # of the seed alone
    assert rows_of(make(seed=1), 0, seed=1) == epochs[2]


def test_a_step_is_fed_the_rows_that_are_told_and_no_padding(make, block_bytes):
    made = make()
    for step in (*range(2 * T), 3 * T - 1):
        rows = made.rows_at(key_for(0, Purpose.SHUFFLE), step)
        images, counts = batch(made, step)
        assert counts.sum() == len(rows) == (N % B if step % T == T - 1 else B)
        np.testing.assert_array_equal(images[counts], IMAGES[rows])


def test_a_step_is_fed_the_same_wherever_one_starts_or_returns(make, block_bytes):
    whole, resumed = make(), make()
    for step in (T + 7, T + 8, 2 * T, 3, 4, T - 1, T, 0):
        for one, other in zip(batch(whole, step), batch(resumed, step), strict=True):
            np.testing.assert_array_equal(one, other)
        resumed = make()  # a new process seeks its place


def test_blocks_have_one_shape_and_cover_each_step_once(make, block_bytes):
    made, step, shapes = make(), 0, set()
    while step < EPOCHS * T:
        block = made.block_at(step)
        assert block.first_step == step
        shapes.add((block.images.shape, np.shape(block.rows)))
        step = block.end_step
    assert step == EPOCHS * T
    assert len(shapes) == 1  # so one program trains on all of them


def test_the_order_in_memory_is_batch_indices():
    key = key_for(4, Purpose.SHUFFLE)
    made = feed.InMemory(IMAGES, key_for(0, Purpose.SHUFFLE), B, WHERE).with_key(key)
    for epoch in range(2):
        expected = batch_indices(key, epoch, N, B)
        np.testing.assert_array_equal(made.block_at(epoch * T + 3).rows, expected)
    assert made.block_at(0).images is made.block_at(T).images  # brought there once


def test_a_stream_holds_a_few_blocks_of_images_at_most(monkeypatch):
    monkeypatch.setattr(feed, "BLOCK_BYTES", 5 * B * 60)
    read = []

    class Images:
        shape = IMAGES.shape

        def __len__(self):
            return N

        def __getitem__(self, rows):
            read.append(len(rows))
            return IMAGES[rows]

    made = feed.Stream(Images(), key_for(0, Purpose.SHUFFLE), B, WHERE, EPOCHS * T)
    made.block_at(0)
    assert max(read) <= 5 * B
    assert made.block_at(1) is made.block_at(4)
    before = sum(read)
    jax.block_until_ready(made.block_at(5).images)
    assert before <= 4 * 5 * B  # this one, two ahead, and one being read
