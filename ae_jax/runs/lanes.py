"""The states of runs that share a program, as one state; of a single run, its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ae_jax import devices
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
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        stacked = stacked._replace(step=states[0].step)
        sharding = devices.seed_sharding(self.mesh, devices.STATE_AXES)
        return jax.device_put(stacked, sharding)

    def state_of(self, state: TrainState, lane: int) -> TrainState:
        """The state of one lane, as that of a single run."""
        if not self._many:
            return state
        return jax.tree.map(
            lambda leaf: leaf[lane] if leaf.ndim else leaf,
            state._replace(step=jnp.asarray(np.asarray(state.step))),
        )

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
