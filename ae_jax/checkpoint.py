"""Save and restore a training state, with its history and digests.

A checkpoint is one atomic step of Orbax that holds ``state`` (arrays) and ``record``
(JSON): the history of the run up to that step, and a sha256 of every leaf and of the
history, checked after loading, because Orbax does not notice flipped bits in arrays.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from ae_jax import hosts
from ae_jax.config import UserError

T = TypeVar("T")
History = dict[str, Any]


def digest_leaves(tree: Any) -> dict[str, str]:
    """The sha256 of each leaf of a tree of arrays, by its path: dtype, shape, bytes."""

    def digest(leaf: jax.Array) -> str:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        what = f"{array.dtype} {array.shape}".encode()
        return hashlib.sha256(what + array.tobytes()).hexdigest()

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): digest(leaf) for path, leaf in leaves}


def _digest_history(history: History) -> str:
    return hashlib.sha256(json.dumps(history, sort_keys=True).encode()).hexdigest()


def abstract_like(make: Any, sharding: Sharding | None = None) -> Any:
    """Shapes, dtypes and placement of what ``make()`` would return, unmade.

    Args:
        make: of no arguments.
        sharding: where it shall lie; None: on this process's first device.
    """
    place = sharding or SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(make),
    )


def _errno(error: BaseException) -> int:
    """The system's error number in what Orbax or TensorStore raised; 0: none."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:  # TensorStore raises a full disk, say, as ValueError
        return int(code[1])
    return (isinstance(error, OSError) and error.errno) or 0


@contextlib.contextmanager
def _disks_refusals(folder: Path) -> Iterator[None]:
    """Raise as OSError what the system refused, under whatever name it arrives."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


NO_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Refusals to read that say nothing about what the files hold."""


class DamagedError(UserError):
    """A checkpoint is not what was saved.

    Attributes:
        reason: what is wrong with it, in half a line.
    """

    def __init__(self, place: Path, reason: str) -> None:
        # TensorStore's messages go on with pages of its settings.
        reason = " ".join(reason.partition("[tensorstore_spec")[0].split())
        self.reason = reason[:200] or "unreadable"
        super().__init__(
            f"{place}: damaged checkpoint: {self.reason}; delete this folder, or give "
            "the run's command with --checkpoint.fallback, to go on from the newest "
            "sound one"
        )


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: where the steps lie.
        keep: how many of the newest steps to keep; None: this one only reads, and
            leaves the unfinished step of a run that is still writing alone.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        from orbax.checkpoint import v1 as ocp

        # Orbax talks through these; what goes wrong it also raises, which is enough.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder = folder
        self._keep = keep or 0
        self._pinned: set[int] = set()
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
        self._context = ocp.Context()
        self._context.checkpointables.registry = registry
        self._checkpointer: Any = None
        if keep is None:  # a reader waits for no other process
            only, me = self._context.multiprocessing, jax.process_index()
            only.primary_host, only.active_processes = me, {me}
            only.barrier_sync_key_prefix = f"reader-{me}"
        else:
            self._checkpointer = ocp.training.Checkpointer(
                folder.absolute(),
                context=self._context,
                preservation_policy=self,
                cleanup_tmp_directories=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._checkpointer:
            return
        with _disks_refusals(self.folder):
            try:
                self._checkpointer.close()
            except Exception:
                if error is None:  # else it only repeats what is already on its way
                    raise

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """Orbax's question, after each save, about all steps from old to new."""
        del context
        oldest = len(checkpoints) - self._keep
        return [
            i >= oldest or checkpoint.step in self._pinned
            for i, checkpoint in enumerate(checkpoints)
        ]

    @property
    def steps(self) -> list[int]:
        """The steps at hand, ascending."""
        if self._checkpointer:
            return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        names = (path.name for path in self.folder.iterdir())
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, state: Any, history: History, pinned: set[int]) -> None:
        """Save a state under its step, in the background; a step is saved once.

        Args:
            state: anything with a ``step``; copied to the host before this returns.
            history: JSON of what was logged so far.
            pinned: steps to keep beside the newest: the best, those of the figures.

        Raises:
            OSError: the disk refused this save, or the one before.
        """
        step = int(state.step)
        if step in self.steps:
            return
        self._pinned = pinned
        record = {
            "history": history,
            "digests": digest_leaves(state),
            "history_digest": _digest_history(history),
        }
        with _disks_refusals(self.folder):
            self._checkpointer.save_checkpointables_async(
                step, {"state": state, "record": record}, force=True
            )

    def load(self, abstract: T, step: int) -> tuple[T, History]:
        """The state and the history of a step, checked against their digests.

        Args:
            abstract: the state's shapes, as :func:`abstract_like` gives them.
            step: one of :attr:`steps`.

        Raises:
            DamagedError: a file of the step is missing or damaged; names what.
        """
        record = self._load_record(step)
        state: T = self._load(step, "state", abstract)
        # A key whose type is lost comes as numbers, of the same bytes.
        same_types = (
            leaf.dtype == like.dtype
            for leaf, like in zip(*map(jax.tree.leaves, (state, abstract)), strict=True)
        )
        digests = digest_leaves(state).items()
        for (path, digest), same_type in zip(digests, same_types, strict=True):
            if not same_type or record.get("digests", {}).get(path) != digest:
                raise self._damaged(step, f"{path} is not what was saved")
        return state, record["history"]

    def load_history(self, step: int) -> History:
        """The history of a step alone, as :meth:`load` has it."""
        history: History = self._load_record(step)["history"]
        return history

    def load_newest(
        self, abstract: T, fallback: bool
    ) -> tuple[T, History, dict[int, str]]:
        """The newest step, or the newest sound one, and why those after it are not.

        Args:
            abstract: as for :meth:`load`.
            fallback: remove damaged steps, once an older one has proved sound.

        Raises:
            DamagedError: the newest step, without ``fallback``.
            UserError: no step is sound; none was removed.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                state, history = self.load(abstract, step)
            except DamagedError as error:
                if not fallback:
                    raise
                damaged[step] = error.reason
            else:
                self._remove(damaged)
                return state, history, damaged
        newest = max(damaged)
        raise UserError(
            f"{self.folder}: no checkpoint is sound, the newest (step {newest}): "
            f"{damaged[newest]}; delete this folder to begin anew"
        )

    def prune(self, pinned: set[int]) -> None:
        """Remove what a process was killed over before it could: see :meth:`save`."""
        self._pinned = pinned
        found = self._checkpointer.checkpoints
        kept = self.should_preserve(found, context=None)
        self._remove(c.step for c, keep in zip(found, kept, strict=True) if not keep)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps if hosts.is_first() else ():
            # Under this name a half of it, left by a kill, is cleared by the next run.
            doomed = self.folder / f"{step}.orbax-checkpoint-tmp"
            os.replace(self.folder / str(step), doomed)
            shutil.rmtree(doomed)
        hosts.gather("")  # none looks before they are gone
        self._checkpointer.reload()

    def _load_record(self, step: int) -> dict[str, Any]:
        record: Any = self._load(step, "record", None)
        if not isinstance(record, dict) or "history" not in record:
            raise self._damaged(step, "the history is missing")
        if record.get("history_digest") != _digest_history(record["history"]):
            raise self._damaged(step, "the history is not what was saved")
        return record

    def _load(self, step: int, name: str, abstract: Any) -> Any:
        """One part of a step, unchecked."""
        from orbax.checkpoint import v1 as ocp

        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            with self._context:
                place = self.folder.absolute() / str(step)
                loaded = ocp.load_checkpointables(place, {name: abstract})
        except Exception as error:  # Orbax has no common base for a damaged file
            cause = error.__cause__ or error
            number, why = _errno(cause), str(cause)
        else:
            sys.unraisablehook = hook
            return loaded[name]
        # A load that fails leaves coroutines that nobody awaits, and callbacks that
        # find their loop closed, even later; one error is enough, so we keep the hook
        # silent, and collect the coroutines while nobody listens.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.collect()
        if number in NO_DAMAGE:
            raise OSError(number, os.strerror(number), str(self.folder / str(step)))
        raise self._damaged(step, why)

    def _damaged(self, step: int, reason: str) -> DamagedError:
        return DamagedError(self.folder / str(step), reason)
