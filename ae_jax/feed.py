"""What the train chunk is fed: the whole split on the devices, or blocks from disk.

Both answer two questions: which images make up a batch, a pure function of seed and
step; and how a state goes on to a later step. Neither has anything to save.
"""

import abc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Key, UInt8

from ae_jax import hosts
from ae_jax.config import Config
from ae_jax.train import (
    Purpose,
    TrainState,
    TrainStep,
    key_for,
    make_train_chunk,
    rows_of_block,
    rows_of_split,
)

if TYPE_CHECKING:
    import grain

BLOCK_BYTES = 4 * 2**20
"""Images that are read, sent to the devices and trained on at a time; two more such
blocks wait their turn."""


class Feed(abc.ABC):
    """What both ways of feeding can do."""

    images: Any
    """The training split [N, D], read by rows; a split in memory is held but once."""
    _lowered: jax.stages.Lowered

    @abc.abstractmethod
    def rows_of(self, key: Key[Array, ""], epoch: int, batch: int) -> np.ndarray:
        """Row numbers of a batch's images, both counted from 0."""

    @abc.abstractmethod
    def lower(self, train_step: TrainStep, state: TrainState) -> None:
        """Trace the train chunk for states of this form."""

    def compile(self) -> None:
        """Compile what was traced; this may go on in another thread."""
        self._chunk = self._lowered.compile()

    @abc.abstractmethod
    def advance(self, state: TrainState, step: int, stop: int) -> TrainState:
        """Train from ``state.step``, which is ``step``, to ``stop`` in that epoch."""


class InMemory(Feed):
    """The whole split on each device, which picks the rows of its part of the batch.

    Args:
        images: the training split, brought to the devices.
        order: ``(key, epoch) -> [T, B]``, see :func:`train.epoch_order`.
        key: of the order.
        mesh: the devices.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "N D"],
        order: Callable[[Key[Array, ""], int], Int[Array, "T B"]],
        key: Key[Array, ""],
        mesh: Mesh,
    ) -> None:
        self._order_of, self._key, self._mesh = order, key, mesh
        self._images = hosts.place(images, hosts.replicated(mesh))
        # On a CPU this is the device's own memory.
        self.images = np.asarray(hosts.local(self._images))
        self._epoch = -1

    def rows_of(self, key: Key[Array, ""], epoch: int, batch: int) -> np.ndarray:
        """Row numbers of a batch's images, both counted from 0."""
        # Picked on the host: on the device it would be a program of its own.
        rows: np.ndarray = np.asarray(self._order_of(key, epoch))[batch]
        return rows[rows >= 0]

    def lower(self, train_step: TrainStep, state: TrainState) -> None:
        """Trace the train chunk for states of this form."""
        order = jax.eval_shape(self._order_of, self._key, 0)
        order = order.update(sharding=hosts.shared(self._mesh))
        chunk = make_train_chunk(train_step, rows_of_split)
        self._lowered = chunk.lower(state, self._images, order, 0)

    def advance(self, state: TrainState, step: int, stop: int) -> TrainState:
        """Train from ``state.step``, which is ``step``, to ``stop`` in that epoch."""
        epoch = step // len(state.epoch_metrics["loss"])
        if epoch != self._epoch:
            order = np.asarray(self._order_of(self._key, epoch))
            self._order = hosts.place(order, hosts.shared(self._mesh))
            self._epoch = epoch
        after: TrainState = self._chunk(state, self._images, self._order, stop)
        return after


class Stream(Feed):
    """A block of batches at a time, read ahead from disk by Grain.

    However large the split, its images are never in memory together, nor is its order:
    Grain's shuffle computes the row at each position of an epoch. It is another shuffle
    than that of a split in memory, and so another run, from the same first state.

    Args:
        images: the training split, with rows to be read in any order.
        key: of the order.
        batch_size: B.
        num_epochs: after which nothing is read ahead.
        mesh: the devices; each process reads those rows of a batch that its own take.

    Source:
        ``grain.MapDataset``: random access, shuffled by a Feistel network of the
        position (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(
        self,
        images: Any,
        key: Key[Array, ""],
        batch_size: int,
        num_epochs: int,
        mesh: Mesh,
    ) -> None:
        self.images, self._key, self._mesh = images, key, mesh
        num_images, num_pixels = images.shape
        self._per_epoch = -(-num_images // batch_size)
        fitting = max(1, BLOCK_BYTES // (batch_size * num_pixels))
        self._length = min(fitting, self._per_epoch)
        self._blocks_per_epoch = -(-self._per_epoch // self._length)
        self._num_blocks = num_epochs * self._blocks_per_epoch
        self._shape = (self._length, batch_size, num_pixels)
        share = batch_size // jax.process_count()
        first = jax.process_index() * share
        self._own = slice(first, first + share)
        self._at = -1  # the block that is on the devices

    def _shuffled(self, key: Key[Array, ""], epoch: int) -> "grain.MapDataset[int]":
        import grain

        bits = jax.random.bits(jax.random.fold_in(key, epoch), dtype=jnp.uint32)
        return grain.MapDataset.range(len(self.images)).shuffle(seed=int(bits))

    def rows_of(self, key: Key[Array, ""], epoch: int, batch: int) -> np.ndarray:
        """Row numbers of a batch's images, both counted from 0."""
        size = self._shape[1]
        positions = range(batch * size, (batch + 1) * size)
        return self._rows(self._shuffled(key, epoch), positions)

    def _rows(self, shuffled: "grain.MapDataset[int]", positions: range) -> np.ndarray:
        inside = range(positions.start, min(positions.stop, len(self.images)))
        return np.array([shuffled[i] for i in inside], np.int64)

    def _read(
        self, block: int
    ) -> tuple[UInt8[np.ndarray, "n b D"], Bool[np.ndarray, "n b"]]:
        """This process's rows of a block's batches, and which of them are images."""
        length, size, num_pixels = self._shape
        epoch, i = divmod(block, self._blocks_per_epoch)
        shuffled = self._shuffled(self._key, epoch)
        starts = range(i * length * size, (i + 1) * length * size, size)
        wanted = range(size)[self._own]
        images = np.zeros((length, len(wanted), num_pixels), np.uint8)
        counts = np.zeros((length, len(wanted)), bool)
        for j, start in enumerate(starts):
            if start >= len(self.images):
                break
            positions = range(start + wanted.start, start + wanted.stop)
            rows = self._rows(shuffled, positions)
            images[j, : len(rows)] = self.images[rows]
            counts[j, : len(rows)] = True
        return images, counts

    def lower(self, train_step: TrainStep, state: TrainState) -> None:
        """Trace the train chunk for states of this form."""
        sharding = hosts.shared(self._mesh)
        images = jax.ShapeDtypeStruct(self._shape, jnp.uint8, sharding=sharding)
        counts = jax.ShapeDtypeStruct(self._shape[:2], jnp.bool, sharding=sharding)
        chunk = make_train_chunk(train_step, rows_of_block)
        self._lowered = chunk.lower(state, images, counts, 0)

    def advance(self, state: TrainState, step: int, stop: int) -> TrainState:
        """Train from ``state.step``, which is ``step``, to ``stop`` in that epoch."""
        while step < stop:
            epoch, in_epoch = divmod(step, self._per_epoch)
            i = in_epoch // self._length
            self._go_to(epoch * self._blocks_per_epoch + i)
            # A call does not wait for its result: without this, blocks pile up.
            jax.block_until_ready(state)
            end = epoch * self._per_epoch + (i + 1) * self._length
            step = min(stop, end)
            state = self._chunk(state, *self._block, step)
        return state

    def _go_to(self, block: int) -> None:
        """Have a block on the devices: the next one is at hand, any other is sought."""
        if block == self._at:
            return
        if block != self._at + 1 or self._at < 0:
            self._ahead = self._read_ahead(block)
        sharding = hosts.shared(self._mesh)
        shapes = (self._shape, self._shape[:2])
        self._block = [
            jax.make_array_from_process_local_data(sharding, part, shape)
            for part, shape in zip(next(self._ahead), shapes, strict=True)
        ]
        self._at = block

    def _read_ahead(self, block: int) -> Iterator[Any]:
        import grain

        blocks = grain.MapDataset.range(block, self._num_blocks).map(self._read)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(blocks.to_iter_dataset(options))


def make_feed(
    settings: Config,
    images: Any,
    order: Callable[[Key[Array, ""], int], Int[Array, "T B"]],
    mesh: Mesh,
) -> Feed:
    """The feed that a config asks for; arguments as of the two classes."""
    train = settings.train
    key = key_for(train.seed, Purpose.SHUFFLE)
    if settings.data.streaming:
        return Stream(images, key, train.batch_size, train.num_epochs, mesh)
    return InMemory(images, order, key, mesh)
