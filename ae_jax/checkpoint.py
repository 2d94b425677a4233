"""Save and restore a training state, with its history and digests.

A checkpoint is one atomic step of Orbax that holds ``state`` (arrays) and ``record``
(JSON): the history of the run up to that step, and a sha256 of every leaf and of the
history, checked after loading, because Orbax does not notice flipped bits in arrays.
"""

import contextlib
import gc
import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

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


def abstract_like(make: Any) -> Any:
    """Shapes, dtypes and placement of what ``make()`` would return, unmade."""
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(make),
    )


@contextlib.contextmanager
def _disks_refusals(folder: Path) -> Iterator[None]:
    """Raise as OSError what TensorStore raises as ValueError: a full disk, say."""
    try:
        yield
    except Exception as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if not code:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(folder)) from error


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
        context = ocp.Context()
        context.checkpointables.registry = registry
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            context=context,
            preservation_policy=self,
            cleanup_tmp_directories=keep is not None,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

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
            UserError: a file of the step is missing or damaged; names what.
        """
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        loaded, why = None, ""
        try:
            loaded = self._checkpointer.load_checkpointables(
                step, {"state": abstract, "record": None}
            )
        except Exception as error:  # Orbax has no common base for a damaged file
            why = str(error.__cause__ or error)
        if loaded is None:
            # A load that fails leaves coroutines that nobody awaits, and callbacks that
            # find their loop closed, even later; one error is enough, so we keep the
            # hook silent, and collect the coroutines while nobody listens.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                gc.collect()
            raise self._damaged(step, why)
        sys.unraisablehook = hook
        state, record = loaded["state"], loaded["record"]
        for path, digest in digest_leaves(state).items():
            if record["digests"].get(path) != digest:
                raise self._damaged(step, f"{path} is not what was saved")
        if record["history_digest"] != _digest_history(record["history"]):
            raise self._damaged(step, "the history is not what was saved")
        return state, record["history"]

    def _damaged(self, step: int, why: str) -> UserError:
        # TensorStore's messages go on with pages of its settings.
        reason = " ".join(why.partition("[tensorstore_spec")[0].split())[:300]
        return UserError(
            f"{self.folder / str(step)}: damaged checkpoint: {reason or 'unreadable'}; "
            "delete this folder and give the same command again, to go on from the one "
            "before"
        )
