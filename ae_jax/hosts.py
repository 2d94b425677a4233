"""Several processes as one job, by JAX's own runtime, and the devices they share.

Every process runs the same program on its own devices and says the same things in the
same order; what they must agree on goes through the functions here. A process that is
alone calls them too, and they cost it nothing.
"""

import contextlib
import errno
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from ae_jax import config as configs
from ae_jax.config import Config, UserError

CONNECT_S = 50
"""Longest wait for the other processes at the start."""
HEARTBEAT_S = 30
"""A process that has not been heard of for so long is dead, and ends the others."""
SHUTDOWN_S = 24 * 3600
"""Longest wait at the end, while the first process still scores and draws."""

OWN = ("process_id", "compilation_cache", "data.dir", "data.source")
"""Fields in which the processes of one job may differ."""


def join(config: Config) -> None:
    """Become one of the processes that train a run together, if the config says so.

    Nothing may have touched a device before.

    Raises:
        UserError: there is no telling who the others are, the coordinator's port is
            taken, or the configs of the processes differ.
        SystemExit: the others did not come within ``CONNECT_S`` seconds; status 2.
    """
    if not config.distributed or jax.distributed.is_initialized():
        return
    if config.process_id == 0 and config.coordinator:
        _check_port(config.coordinator)
    # The runtime ends a process that waits in vain with pages of its innards.
    timer = threading.Timer(CONNECT_S, _give_up, [config])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=2 * CONNECT_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: no cluster to be found here ({error}); give --coordinator "
            "HOST:PORT, --num-processes and --process-id"
        ) from error
    finally:
        timer.cancel()
    _compare_configs(config)


def _check_port(coordinator: str) -> None:
    """Refuse a port that is taken, over which the runtime would crash."""
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"coordinator: port {port} of this machine is not free "
            f"({error.strerror}); choose another one for all processes"
        ) from error


def _give_up(config: Config) -> None:
    who = config.coordinator or "the coordinator"
    _leave(
        2,
        f"{CONNECT_S} s went by and not all processes came together at {who}; check "
        "--coordinator, --num-processes, the --process-id of each, and the network "
        "between them",
    )


def _compare_configs(config: Config) -> None:
    """Refuse a job whose processes were started with different options.

    Raises:
        UserError: in all of them; names the fields.
    """
    import json

    texts = gather(json.dumps(configs.to_json(config)))
    first = configs.from_json(type(config), json.loads(texts[0]))
    for i, text in enumerate(texts):
        other = configs.from_json(type(config), json.loads(text))
        fields = configs.clashes(first, other, OWN)
        if fields:
            told = "; ".join(f"{k}: {a} and {b}" for k, (a, b) in fields.items())
            raise UserError(
                f"processes 0 and {i} were started with different options: {told}; "
                "give all the same"
            )


def is_first() -> bool:
    """Whether this is the process that writes logs, figures and scores."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """What each process says here, in their order."""
    if jax.process_count() == 1:
        return [text]
    said = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(said)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(said)] = said
    rows = multihost_utils.process_allgather(padded)
    return [
        row[:length].tobytes().decode()
        for row, length in zip(rows, lengths, strict=True)
    ]


def from_first(value: float) -> float:
    """The first process's number, with which all go on."""
    if jax.process_count() == 1:
        return value
    # As bytes: without 64-bit floats in JAX, a number would come rounded.
    sent = np.array([value], np.float64).view(np.uint8)
    told = multihost_utils.broadcast_one_to_all(sent)
    return float(np.asarray(told, np.uint8).view(np.float64)[0])


def largest(value: int) -> int:
    """The largest of the numbers that the processes have."""
    return int(multihost_utils.process_allgather(np.int32(value)).max())


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process does it, then the others do, and find it done."""
    if not is_first():
        gather("")
    yield
    if is_first():
        gather("")


LOSS = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|oordination service")
"""What the runtime's errors say when another process does not answer any more."""


@contextlib.contextmanager
def others_alive() -> Iterator[None]:
    """End this process, with status 1 and one line, when another one is gone.

    At once: whatever would be closed in good order waits for the one that is gone.
    Where the runtime notices the loss before a computation does, it ends the process
    itself, with status 134 and pages of its innards.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if jax.process_count() == 1 or not LOSS.search(str(error)):
            raise
        reason = str(error).partition("\n")[0][:120]
        _leave(
            1,
            f"process {jax.process_index()} lost another one ({reason}); start all "
            "again with the same command: the run goes on from its newest checkpoint",
        )


def _leave(status: int, message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(status)


# --- Devices ------------------------------------------------------------------------


def make_mesh(num_devices: int | None, batch_size: int) -> Mesh:
    """The devices that share each batch, as many of each process, in its order.

    Args:
        num_devices: how many; None: one, or, of several processes, all there are.
        batch_size: B, which they must divide.

    Raises:
        UserError: there are not so many, or they cannot share the batch evenly.
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


def shared(mesh: Mesh) -> NamedSharding:
    """Axis 1, the rows of each batch, spread over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def local(tree: Any) -> Any:
    """Of replicated arrays the copy on this process's first device."""
    return jax.tree.map(lambda array: array.addressable_data(0), tree)


def place(array: Shaped[np.ndarray, "..."], sharding: NamedSharding) -> Array:
    """An array that every process holds whole, where the sharding wants it."""
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )
