"""The states of runs that share a program, as one state; of a single run, its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ae_jax import data, devices
from ae_jax.data.feed import InMemory, Stream
from ae_jax.keys import Purpose, key_for
from ae_jax.train import Block, TrainState


class Lanes:
    """One lane for each run; a single run's arrays have no axis for it.

    Args:
        num_lanes: S.
        num_devices: that share each batch of a single run; None: see
            :func:`devices.make_mesh`.
        batch_size: B.

    Attributes:
        mesh: the devices; of a single run they share its batches, else its lanes.
    """

    def __init__(self, num_lanes: int, num_devices: int | None, batch_size: int):
        self._many = num_lanes > 1
        if self._many:
            self.mesh = devices.seed_mesh(num_lanes)
        else:
            self.mesh = devices.make_mesh(num_devices, batch_size)

    def join(self, states: Sequence[TrainState]) -> TrainState:
        """States, all at one step, as one on the devices."""
        if not self._many:
            return devices.replicate(states[0], self.mesh)
        # On the host: a program with each leaf as an operand would compile for minutes.
        numbers = [_on_host(state) for state in states]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *numbers)
        stacked = _with_key(stacked._replace(step=numbers[0].step), states[0])
        sharding = devices.seed_sharding(self.mesh, devices.STATE_AXES)
        return jax.device_put(stacked, sharding)

    def split(self, state: TrainState, lanes: Sequence[int]) -> Iterator[TrainState]:
        """The states of some lanes, each as that of a single run."""
        if not self._many:
            yield state
            return
        # By way of the host: a slice of each leaf on the device is a program each.
        numbers = _on_host(state)

        def pick(lane: int) -> TrainState:
            return jax.tree.map(lambda x: x[lane, ...] if x.ndim else x, numbers)

        yield from (_with_key(pick(lane), state) for lane in lanes)

    def join_blocks(self, blocks: Sequence[Block]) -> Block:
        """The same block of each lane, as one; they share the images."""
        if not self._many:
            sharding = devices.batch_sharding(self.mesh)
            return blocks[0]._replace(rows=devices.place(blocks[0].rows, sharding))
        rows = np.stack([block.rows for block in blocks])
        sharding = devices.seed_sharding(self.mesh, 0)
        return blocks[0]._replace(rows=jax.device_put(rows, sharding))

    def jit_chunk(self, chunk: Callable[..., TrainState]) -> Any:
        """The train chunk of all lanes, jitted."""
        if not self._many:
            where = devices.replicated(self.mesh)
            return devices.jit_chunk(chunk, out_shardings=where)
        axes = devices.STATE_AXES
        together = devices.vmap_over_seeds(
            chunk, self.mesh, (axes, devices.BLOCK_AXES, None), axes
        )
        # Pinned: an equivalent but differently spelled sharding would recompile.
        where = devices.seed_sharding(self.mesh, axes)
        return devices.jit_chunk(together, out_shardings=where)

    def jit(self, function: Callable[..., Any]) -> Any:
        """A function ``(params, x, numbers)`` of all lanes' params, jitted."""
        if not self._many:
            return jax.jit(function)
        return jax.jit(devices.vmap_over_seeds(function, self.mesh, (0, None, None), 0))

    def local(self, params: Any) -> Any:
        """Parameters for functions of :meth:`jit`, on this process's devices."""
        return params if self._many else devices.local(params)

    def per_lane(self, outputs: np.ndarray) -> np.ndarray:
        """What a function of :meth:`jit` returned, with an axis for the lanes."""
        return outputs if self._many else outputs[None]

    def on_host(self, leaf: Any) -> np.ndarray:
        """An array of the state on the host, with an axis for the lanes."""
        return np.asarray(leaf) if self._many else np.asarray(leaf)[None]


class Feeds:
    """What the lanes are fed: each the images in an order of its own.

    Args:
        images: the training split; an ``ImageFile`` is streamed, to a single run.
        seeds: of each lane.
        batch_size: B.
        lanes: of the runs.
        until_step: after which no images are read ahead.
    """

    def __init__(
        self,
        images: Any,
        seeds: Sequence[int],
        batch_size: int,
        lanes: Lanes,
        until_step: int,
    ) -> None:
        where, self._lanes = devices.replicated(lanes.mesh), lanes
        keys = [key_for(seed, Purpose.SHUFFLE) for seed in seeds]
        self._feeds: list[Any]
        if isinstance(images, data.ImageFile):
            self._feeds = [Stream(images, keys[0], batch_size, where, until_step)]
        else:
            feed = InMemory(images, keys[0], batch_size, where)
            self._feeds = [feed.with_key(key) for key in keys]
        self._block = Block((), (), 0, 0)

    def __getitem__(self, lane: int) -> Any:
        return self._feeds[lane]

    def block_at(self, step: int) -> Block:
        """The block of all lanes that a step is in."""
        if not self._block.first_step <= step < self._block.end_step:
            blocks = [feed.block_at(step) for feed in self._feeds]
            self._block = self._lanes.join_blocks(blocks)
        return self._block


def _on_host(state: TrainState) -> Any:
    """A state as NumPy's arrays, its key as numbers."""
    state = state._replace(key=jax.random.key_data(state.key))
    return jax.tree.map(np.asarray, state)


def _with_key(numbers: Any, like: TrainState) -> TrainState:
    """What :func:`_on_host` gave, its key again one of JAX's, as in a state like it."""
    impl = jax.random.key_impl(like.key)
    state: TrainState = numbers
    return state._replace(key=jax.random.wrap_key_data(numbers.key, impl=impl))
