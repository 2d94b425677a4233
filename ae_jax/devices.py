"""Devices and processes: where arrays lie, and what several processes agree on.

Every process runs the same program on its own devices and makes the same calls in the
same order. A process that is alone makes them too, and they cost it nothing.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from ae_jax.errors import UserError
from ae_jax.train import Block, TrainState

CONNECT_S = 50
"""Longest wait for the other processes at the start."""
SHUTDOWN_S = 24 * 3600
"""Longest wait at the end, while process 0 still scores and draws."""

GPU_OPTIONS = {
    "xla_gpu_deterministic_ops": True,
    # Loops as command buffers too: a tenth off a small step, and a quicker start.
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,"
        "WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}
"""How the train chunk is compiled for a GPU: the same bits every time."""

MATMUL_PRECISIONS = {"tf32": "tensorfloat32", "bfloat16": "default"}
"""By ``train.precision``; any other multiplies in full precision on every device."""


@contextlib.contextmanager
def numerics(precision: str) -> Iterator[None]:
    """JAX's numbers as a run asks for them, in this thread and for this block.

    Whatever the user's own switches are: those of random bits would give others, those
    of implicit promotion and of transfers refuse what the libraries below us do.

    Args:
        precision: ``train.precision``.
    """
    products = MATMUL_PRECISIONS.get(precision, "highest")
    with (
        jax.enable_x64(precision == "float64"),
        jax.default_matmul_precision(products),
        jax.threefry_partitionable(True),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
    ):
        yield


def jit_chunk(chunk: Callable[..., TrainState], **options: Any) -> Any:
    """A train chunk as a compiled program that takes its state over."""
    return jit_loop(chunk, donate_argnums=0, **options)


def jit_loop(loop: Callable[..., Any], **options: Any) -> Any:
    """A loop on the device as a compiled program, on a GPU by ``GPU_OPTIONS``."""
    gpu = jax.default_backend() == "gpu"
    return jax.jit(loop, compiler_options=GPU_OPTIONS if gpu else None, **options)


# --- Processes ----------------------------------------------------------------------


def join(config: Any) -> None:
    """Become one of the processes that train a run together, if the config says so.

    Nothing may have touched a device before.

    Args:
        config: has distributed, coordinator, num_processes and process_id.

    Raises:
        UserError: no cluster was found to join.
    """
    if not config.distributed or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=CONNECT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: no cluster found here ({error}); give --coordinator "
            "HOST:PORT, --num-processes and --process-id"
        ) from error


def check_all_agree(what: Any, name: str) -> None:
    """Refuse a job whose processes were given different things.

    Args:
        what: JSON that must be the same in all of them.
        name: what to call it.

    Raises:
        UserError: in all of them.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    different = [i for i, row in enumerate(digests) if (row != digests[0]).any()]
    if different:
        raise UserError(
            f"processes 0 and {different[0]} were started with different {name}; "
            "give all the same"
        )


def is_first() -> bool:
    """Whether this is the process that writes files and reports."""
    return jax.process_index() == 0


def broadcast_from_process0(value: float) -> float:
    """Process 0's number, with which all continue."""
    if jax.process_count() == 1:
        return value
    # As bytes: without 64-bit floats in JAX, a number would come rounded.
    sent = np.array([value], np.float64).view(np.uint8)
    received = multihost_utils.broadcast_one_to_all(sent)
    return float(np.asarray(received, np.uint8).view(np.float64)[0])


def clock() -> float:
    """Seconds by process 0's clock, with which all plan alike."""
    return broadcast_from_process0(time.perf_counter())


def max_over_processes(value: int) -> int:
    """The largest of the numbers that the processes have."""
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def wait_for_all(name: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def process0_first(name: str) -> Iterator[None]:
    """Process 0 does it, then the others do, and find it done."""
    if not is_first():
        wait_for_all(name)
    yield
    if is_first():
        wait_for_all(name)


# --- Devices ------------------------------------------------------------------------


def make_mesh(num_devices: int | None, batch_size: int) -> Mesh:
    """The devices that share each batch, as many of each process, in its order.

    Args:
        num_devices: how many; None: one, or, of several processes, all there are.
        batch_size: B, which they must divide.

    Raises:
        UserError: there are fewer, or they cannot share the batch evenly.
    """
    num_processes = jax.process_count()
    least = min(len(jax.devices()) // num_processes, jax.local_device_count())
    count = num_devices or (1 if num_processes == 1 else least * num_processes)
    if count % num_processes or count > least * num_processes:
        there = f"{num_processes} × {least}" if num_processes > 1 else f"{least}"
        raise UserError(
            f"mesh.data: {count} devices asked for, there are {there} of kind "
            f"{jax.devices()[0].device_kind}; ask for fewer, as many of each process "
            "(on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N)"
        )
    if batch_size % count:
        raise UserError(
            f"mesh.data: {count} devices cannot share a batch of {batch_size} evenly; "
            "change --train.batch-size or --mesh.data"
        )
    each = count // num_processes
    chosen = [
        device
        for i in range(num_processes)
        for device in [d for d in jax.devices() if d.process_index == i][:each]
    ]
    return Mesh(np.array(chosen), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 1 of a block's rows, the images of each batch, split over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def local(tree: Any) -> Any:
    """Of replicated arrays the copy on this process's first device."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds whole, on each device."""

    def put(leaf: Any) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return place(np.asarray(leaf), replicated(mesh))

    return jax.tree.map(put, tree)


def machine_memory_bytes() -> int:
    """What this machine's own memory holds."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_bytes() -> int:
    """What a device of ours can hold, or, where it does not say, this machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", machine_memory_bytes()))


def peak_memory() -> dict[str, int]:
    """``device_peak_bytes``, where the device counts them."""
    stats = jax.local_devices()[0].memory_stats()
    return {"device_peak_bytes": stats["peak_bytes_in_use"]} if stats else {}


def place(array: Shaped[np.ndarray, "..."], sharding: jax.sharding.Sharding) -> Array:
    """An array that every process holds whole, where the sharding wants it."""
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )


# --- Many seeds in one program -------------------------------------------------------

STATE_AXES = TrainState(step=None, params=0, opt_state=0, key=0, epoch_metrics=0)  # type: ignore[arg-type]
"""vmap axes of the states of many seeds: they share the step, and nothing else."""
BLOCK_AXES = Block(images=None, rows=0, first_step=None, end_step=None)  # type: ignore[arg-type]
"""vmap axes of their blocks: they share the images, each in an order of its own."""


def seed_mesh(num_seeds: int) -> Mesh:
    """The devices over which seeds are split: the most that divide their number."""
    devices = jax.local_devices()
    even = [n for n in range(1, len(devices) + 1) if num_seeds % n == 0]
    return Mesh(np.array(devices[: even[-1]]), ("seed",))


def seed_sharding(mesh: Mesh, axes: Any) -> Any:
    """Where arrays with such vmap axes lie: 0 split over the devices, None on each."""

    def sharding(axis: int | None) -> NamedSharding:
        spec = PartitionSpec() if axis is None else PartitionSpec("seed")
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, axes, is_leaf=lambda axis: axis is None)


def take_turns(mesh: Mesh) -> bool:
    """Whether the seeds on a device take turns, rather than to be one by vmap."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def vmap_over_seeds(
    function: Callable[..., Any], mesh: Mesh, in_axes: Any, out_axes: Any = 0
) -> Callable[..., Any]:
    """What a function does for one seed, for many side by side, in one program.

    Over the devices they are apart by shard_map, so that none waits for another. Within
    an accelerator they are one by vmap. Within a CPU's core they take turns, each for a
    whole call, and compute what one seed alone does, to the bit: its state stays in the
    core's cache, and no product is batched, which XLA's CPU code does slowly.

    Args:
        function: of one seed.
        mesh: see :func:`seed_mesh`; the devices divide the seeds evenly.
        in_axes: of each argument, or of parts of it, 0 where each seed has its own,
            None where they share it; as for ``jax.vmap``.
        out_axes: the same, of what is returned.
    """
    specs = [
        jax.tree.map(lambda sharding: sharding.spec, seed_sharding(mesh, axes))
        for axes in (in_axes, out_axes)
    ]
    if take_turns(mesh):
        together = _in_turn(function, in_axes, out_axes)
    else:
        together = jax.vmap(function, in_axes, out_axes)
    return jax.shard_map(together, mesh=mesh, in_specs=specs[0], out_specs=specs[1])


def _in_turn(
    function: Callable[..., Any], in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    """``jax.vmap`` as a loop; what the seeds share is the first one's."""
    looped = jax.vmap(jax.custom_batching.sequential_vmap(function), in_axes)

    def together(*args: Any) -> Any:
        return jax.tree.map(
            lambda axis, part: (
                part if axis == 0 else jax.tree.map(lambda x: x[0], part)
            ),
            out_axes,
            looped(*args),
            is_leaf=lambda axis: axis is None,
        )

    return together
