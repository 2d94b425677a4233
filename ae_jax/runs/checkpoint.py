"""Save and restore a training state, with its history and digests.

A checkpoint is one atomic step of Orbax that holds ``state`` (arrays) and ``record``
(JSON): the history of the run up to that step, and a sha256 of every leaf and of the
history, checked after loading, because Orbax does not notice flipped bits in arrays.
Which steps are kept is decided here: Orbax only saves and loads. A step that PyTorch
trained holds its state dict instead, and the same record.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from ae_jax import devices, weights
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_json

T = TypeVar("T")
History = dict[str, Any]

UNFINISHED = ".orbax-checkpoint-tmp"
"""How the folder of a step ends until all of it is written."""

STATE_DICT = "weights.safetensors"
"""The file of a step that holds a state dict, not a training state."""


class Weights(NamedTuple):
    """What PyTorch's side saves: it is opened and scored as any, but not resumed."""

    step: int
    state_dict: weights.StateDict


def digest_leaves(tree: Any) -> dict[str, str]:
    """The sha256 of each leaf of a tree of arrays, by its path: dtype, shape, bytes."""

    def digest(leaf: Any) -> str:
        if _is_key(leaf):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        what = f"{array.dtype} {array.shape}".encode()
        return hashlib.sha256(what + array.tobytes()).hexdigest()

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name_of(path): digest(leaf) for path, leaf in leaves}


def name_of(path: Any) -> str:
    """``params.encoder_0.kernel``, whether of a state or of a dictionary like it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _as_dict(step: int, params: Any = None) -> dict[str, Any]:
    """Parts of a state, with the names that they have in it."""
    return {"step": np.int32(step), **({"params": params} if params else {})}


def _digest_json(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


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


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _on_host(like: jax.ShapeDtypeStruct) -> Any:
    """What asks Orbax for an array of NumPy's; a key is always one of JAX's."""
    if _is_key(like):
        return like
    return np.broadcast_to(np.zeros((), like.dtype), like.shape)


def _on_devices(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    return leaf if _is_key(leaf) else devices.place(leaf, like.sharding)


REFUSALS = {"RESOURCE_EXHAUSTED": errno.ENOSPC, "PERMISSION_DENIED": errno.EACCES}
"""The system's refusals by TensorStore's names, which it raises as ValueError."""


def _errno(error: BaseException) -> int:
    """The system's error number in what Orbax or TensorStore raised; 0: none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    known = {f"os_error_code='{number}'": number for number in errno.errorcode}
    return next((n for k, n in (known | REFUSALS).items() if k in str(error)), 0)


@contextlib.contextmanager
def _disks_refusals(folder: Path) -> Iterator[None]:
    """Raise as OSError what the system refused, under whatever name it arrives."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        _settle()
        if not number and not folder.is_dir():  # someone has taken it away
            number = errno.ENOENT
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _settle() -> None:
    """Let what a failed call of Orbax left under way end, while nobody listens.

    Its reads and writes find their event loop closed, and coroutines of it were never
    awaited.
    """
    time.sleep(0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def _forget(error: BaseException | None) -> None:
    """Let go of the frames that an error came through, and of what they hold."""
    while error:
        error.__traceback__, error = None, error.__cause__ or error.__context__


def _is_step(name: str) -> bool:
    """Whether a folder has a name that we give; of another it is not ours."""
    ours = name.isascii() and name.isdecimal() and int(name) < 2**31
    return ours and name == str(int(name))


def _remove_folder(path: Path) -> None:
    with _disks_refusals(path):
        shutil.rmtree(path)


NO_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Refusals to read that say nothing about what the files hold."""


def damaged(place: Path, reason: str) -> UserError:
    """The error about a checkpoint that is not what was saved."""
    # TensorStore's messages end in pages of its settings.
    reason = " ".join(reason.partition("[tensorstore_spec")[0].split())
    return UserError(
        f"{place}: damaged checkpoint: {reason[:200] or 'unreadable'}; delete this "
        "folder, and the same command resumes from the newest one left"
    )


class Checkpoints:
    """The checkpoints of one run folder; as a context it waits for the last save.

    Args:
        folder: where the steps lie.
        keep: how many of the newest steps to keep; None: this one only reads, and
            leaves the unfinished step of a run that is still writing alone.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        from orbax.checkpoint import v1 as ocp

        self.folder = folder.absolute()
        self._keep, self._saving = keep or 0, None
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
        self._context = ocp.Context()
        self._context.checkpointables.registry = registry
        self._context.pytree.loading.partial_load = True
        if keep is None:  # a reader waits for no other process
            only, me = self._context.multiprocessing, jax.process_index()
            only.primary_host, only.active_processes = me, {me}
            only.barrier_sync_key_prefix = f"reader-{me}"
        else:
            self._make_folder()

    def _make_folder(self) -> None:
        if devices.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(f"*{UNFINISHED}"):
                if _is_step(path.name.removesuffix(UNFINISHED)):
                    _remove_folder(path)
        devices.wait_for_all("checkpoints")

    def __enter__(self) -> "Checkpoints":
        # Orbax talks through these; what goes wrong it also raises, which is enough.
        loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        self._levels = [(logger, logger.level) for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        self._hook = hook = sys.unraisablehook

        def quieter(unraisable: Any) -> None:
            if unraisable.object or not isinstance(unraisable.exc_value, RuntimeError):
                hook(unraisable)

        sys.unraisablehook = quieter
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:  # else it only repeats what is already on its way
                raise
        finally:
            sys.unraisablehook = self._hook
            for logger, level in self._levels:
                logger.setLevel(level)

    def wait(self) -> None:
        """Let the last save end.

        Raises:
            OSError: the disk refused it.
        """
        saving, self._saving = self._saving, None
        if saving:
            with _disks_refusals(self.folder):
                saving.result()

    @property
    def steps(self) -> list[int]:
        """The finished steps, ascending."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(int(name) for name in names if _is_step(name))

    def save(self, state: Any, history: History) -> None:
        """Save a state under its step, in the background; a step is saved once.

        Args:
            state: anything with a ``step``; copied to the host before this returns.
            history: JSON of what was logged so far.

        Raises:
            OSError: the disk refused this save, or the one before.
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        step = int(state.step)
        if step in self.steps:
            return
        record = {"history": history, "history_digest": _digest_json(history)}
        if isinstance(state, Weights):
            self._save_weights(state, record)
            return
        record["digests"] = digest_leaves(state)
        with _disks_refusals(self.folder), self._context:
            self._saving = ocp.save_checkpointables_async(
                self.folder / str(step), {"state": state, "record": record}
            )

    def _save_weights(self, state: Weights, record: dict[str, Any]) -> None:
        params = weights.to_linen(state.state_dict)
        record["digests"] = digest_leaves(_as_dict(state.step, params))
        beside = self.folder / f"{state.step}{UNFINISHED}"
        beside.mkdir()
        weights.write_safetensors(beside / STATE_DICT, state.state_dict)
        write_json(beside / "record.json", record)
        os.replace(beside, self.folder / str(state.step))

    def load(self, abstract: T, step: int) -> tuple[T, History]:
        """The state and the history of a step, checked against their digests.

        Args:
            abstract: the state's shapes, as :func:`abstract_like` gives them; or a
                dictionary of the parts of it that are wanted, such as ``params``.
            step: one of :attr:`steps`.

        Raises:
            UserError: a file of the step is missing or damaged; names what.
        """
        record = self._load_record(step)
        # As NumPy's: Orbax's threads would make no 64-bit array of JAX's.
        state = self._load(step, "state", jax.tree.map(_on_host, abstract))
        digests, leaves = digest_leaves(state), jax.tree.leaves(state)
        likes = jax.tree.leaves(abstract)
        for (name, digest), leaf, like in zip(
            digests.items(), leaves, likes, strict=True
        ):
            # A key whose type is lost comes as numbers, of the same bytes.
            same = leaf.dtype == like.dtype and record["digests"].get(name) == digest
            if not same:
                raise self._damaged(step, f"{name} is not what was saved")
        placed: T = jax.tree.map(_on_devices, state, abstract)
        return placed, record["history"]

    def load_history(self, step: int) -> History:
        """The history of a step alone, as :meth:`load` has it."""
        history: History = self._load_record(step)["history"]
        return history

    def load_digests(self, step: int) -> dict[str, str]:
        """The sha256 of each leaf of a step's state, as it was saved."""
        digests: dict[str, str] = self._load_record(step)["digests"]
        return digests

    def prune(self, pinned: set[int]) -> None:
        """Remove all finished steps but the newest ``keep`` and the pinned ones.

        Args:
            pinned: such as the best, and those that the figures show.
        """
        self._remove(set(self.steps[: -self._keep]) - pinned)

    def check_others(self, abstract: Any, step: int) -> None:
        """Look into the steps beside one, before any of them is counted on.

        Raises:
            UserError: one is damaged.
        """
        for other in set(self.steps) - {step}:
            self.load(abstract, other)

    def remove_after(self, step: int) -> None:
        """Remove the steps after one, as runs that train together return to it."""
        self._remove({later for later in self.steps if later > step})

    def _remove(self, steps: set[int]) -> None:
        devices.wait_for_all("before removal")  # none still reads them
        for step in sorted(steps) if devices.is_first() else ():
            # Under this name half of it, left by a kill, is cleared next time.
            renamed = self.folder / f"{step}{UNFINISHED}"
            os.replace(self.folder / str(step), renamed)
            _remove_folder(renamed)
        devices.wait_for_all("after removal")  # none looks before they are gone

    def _load_record(self, step: int) -> dict[str, Any]:
        record: Any = self._load(step, "record", None)
        if not isinstance(record, dict) or not {"history", "digests"} <= set(record):
            raise self._damaged(step, "the history is missing")
        if record.get("history_digest") != _digest_json(record["history"]):
            raise self._damaged(step, "the history is not what was saved")
        here = digest_leaves(_as_dict(step))["step"]
        if record["digests"].get("step") != here:
            raise self._damaged(step, "it was saved as another step")
        return record

    def _load(self, step: int, name: str, abstract: Any) -> Any:
        """One part of a step, unchecked."""
        if (self.folder / str(step) / STATE_DICT).exists():
            return self._load_weights(step, name, abstract)
        from orbax.checkpoint import v1 as ocp

        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            with self._context:
                loaded = ocp.load_checkpointables(
                    self.folder / str(step), {name: abstract}
                )
            return loaded[name]
        except Exception as error:  # Orbax has no common base for a damaged file
            cause = error.__cause__ or error
            number, reason = _errno(cause), str(cause)
            _forget(error)
            del error, cause
            _settle()
        finally:
            sys.unraisablehook = hook
        if number in NO_DAMAGE:
            raise OSError(number, os.strerror(number), str(self.folder / str(step)))
        raise self._damaged(step, reason)

    def _load_weights(self, step: int, name: str, abstract: Any) -> Any:
        place = self.folder / str(step)
        if name == "state" and (
            not isinstance(abstract, dict) or {*abstract} != {"params"}
        ):
            raise UserError(
                f"{place}: holds PyTorch's weights alone, which cannot be resumed; "
                "start another run from them with --train.init-from"
            )
        try:
            if name == "record":
                return read_json(place / "record.json")
            params = weights.to_linen(weights.read_safetensors(place / STATE_DICT))
        except (FileNotFoundError, UserError) as error:
            raise self._damaged(step, str(error)) from error
        wanted: Any = jax.tree.structure(abstract["params"])
        if jax.tree.structure(params) != wanted:
            raise self._damaged(step, "it holds another model's weights")
        return {"params": params}

    def _damaged(self, step: int, reason: str) -> UserError:
        return damaged(self.folder / str(step), reason)
