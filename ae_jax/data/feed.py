"""What the train chunk is fed: a whole split in memory, or blocks read from disk.

Both answer one question: which block is a step in? The answer is a pure function of the
seed and the step, so neither has anything to save.
"""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, Key, UInt8

from ae_jax.devices import place
from ae_jax.train import Block, batch_indices

if TYPE_CHECKING:
    import grain

BLOCK_BYTES = 4 * 2**20
"""Images that are read, sent to the devices and trained on at a time; two more such
blocks wait their turn."""


class InMemory:
    """The whole split on each device, which picks the rows of its part of the batch.

    Args:
        images: the training split, brought to the devices.
        key: ``key_for(seed, Purpose.SHUFFLE)``.
        batch_size: B.
        sharding: where the images shall lie.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "N H W C"],
        key: Key[Array, ""],
        batch_size: int,
        sharding: NamedSharding,
    ) -> None:
        num_images, self._key = len(images), key
        self._steps_per_epoch = -(-num_images // batch_size)
        self._indices = jax.jit(
            lambda key, epoch: batch_indices(key, epoch, num_images, batch_size)
        )
        self._images = place(images, sharding)

    def with_key(self, key: Key[Array, ""]) -> "InMemory":
        """The same images in another order."""
        other = copy.copy(self)
        other._key = key
        return other

    def rows_at(self, key: Key[Array, ""], step: int) -> Int[np.ndarray, " b"]:
        """Which images make up the batch of a step, in an order of any key."""
        epoch, batch = divmod(step, self._steps_per_epoch)
        # Picked on the host: on the device it would be a program of its own.
        rows: np.ndarray = np.asarray(self._indices(key, epoch))[batch]
        return rows[rows >= 0]

    def block_at(self, step: int) -> Block:
        """The epoch that a step is in."""
        epoch = step // self._steps_per_epoch
        first_step = epoch * self._steps_per_epoch
        end_step = first_step + self._steps_per_epoch
        rows = np.asarray(self._indices(self._key, epoch))
        return Block(self._images, rows, first_step, end_step)


class Stream:
    """A block of batches at a time, read ahead from disk by Grain.

    However large the split, its images are never in memory together, nor is its order:
    Grain's shuffle computes the row at each position of an epoch. It is another shuffle
    than that of a split in memory, and so another run, from the same first state.

    Args:
        images: the training split, with rows to be read in any order.
        key: ``key_for(seed, Purpose.SHUFFLE)``.
        batch_size: B.
        sharding: where the images of a block shall lie.
        until_step: after which nothing is read ahead.

    Source:
        ``grain.MapDataset``: random access, shuffled by a Feistel network of the
        position (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(
        self,
        images: Any,
        key: Key[Array, ""],
        batch_size: int,
        sharding: NamedSharding,
        until_step: int,
    ) -> None:
        self._images, self._batch_size = images, batch_size
        self._key, self._sharding = key, sharding
        self._steps_per_epoch = -(-len(images) // batch_size)
        fitting = max(1, BLOCK_BYTES // (batch_size * int(np.prod(images.shape[1:]))))
        self._length = min(fitting, self._steps_per_epoch)
        self._blocks_per_epoch = -(-self._steps_per_epoch // self._length)
        self._num_blocks = -(-until_step // self._steps_per_epoch)
        self._num_blocks *= self._blocks_per_epoch
        self._number = -1  # of the current block
        self._block: Block

    def rows_at(self, key: Key[Array, ""], step: int) -> Int[np.ndarray, " b"]:
        """Which images make up the batch of a step, in an order of any key."""
        epoch, batch = divmod(step, self._steps_per_epoch)
        return self._rows(self._shuffled(_seeds_of(key, epoch + 1)[epoch]), batch)

    def _shuffled(self, seed: int) -> "grain.MapDataset[int]":
        import grain

        return grain.MapDataset.range(len(self._images)).shuffle(seed=seed)

    def _rows(
        self, shuffled: "grain.MapDataset[int]", batch: int
    ) -> Int[np.ndarray, " b"]:
        start = batch * self._batch_size
        stop = min(start + self._batch_size, len(self._images))
        return np.array([shuffled[i] for i in range(start, stop)], np.int64)

    def block_at(self, step: int) -> Block:
        """Make a block current; the next one is prefetched, any other restarts that."""
        epoch, in_epoch = divmod(step, self._steps_per_epoch)
        number = epoch * self._blocks_per_epoch + in_epoch // self._length
        if number == self._number:
            return self._block
        if number != self._number + 1 or self._number < 0:
            self._ahead = self._read_ahead(number)
        images, rows = next(self._ahead)
        first = in_epoch // self._length * self._length
        end = min(first + self._length, self._steps_per_epoch)
        self._block = Block(
            place(images, self._sharding),
            rows,
            epoch * self._steps_per_epoch + first,
            epoch * self._steps_per_epoch + end,
        )
        self._number = number
        return self._block

    def _read_ahead(self, number: int) -> Iterator[Any]:
        """The blocks from one on, read by Grain's thread, which handles NumPy only."""
        import grain

        seeds = _seeds_of(self._key, self._num_blocks // self._blocks_per_epoch)
        blocks = grain.MapDataset.range(number, self._num_blocks).map(
            lambda number: self._read(number, seeds)
        )
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(blocks.to_iter_dataset(options))

    def _read(
        self, number: int, seeds: list[int]
    ) -> tuple[UInt8[np.ndarray, "M H W C"], Int[np.ndarray, "n B"]]:
        """A block's images, one after the other, and which make up each batch."""
        epoch, i = divmod(number, self._blocks_per_epoch)
        shuffled, first = self._shuffled(seeds[epoch]), i * self._length
        last = min(first + self._length, self._steps_per_epoch)
        wanted = np.concatenate([self._rows(shuffled, b) for b in range(first, last)])
        size = self._length * self._batch_size
        images = np.zeros((size, *self._images.shape[1:]), np.uint8)
        images[: len(wanted)] = self._images[wanted]
        rows = np.arange(size, dtype=np.int32)
        rows[len(wanted) :] = -1
        return images, rows.reshape(self._length, self._batch_size)


def _seeds_of(key: Key[Array, ""], num_epochs: int) -> list[int]:
    """Grain's seed of each of the first epochs."""

    def seed(epoch: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(key, epoch), dtype=jnp.uint32)

    seeds: list[int] = jax.vmap(seed)(jnp.arange(num_epochs)).tolist()
    return seeds
