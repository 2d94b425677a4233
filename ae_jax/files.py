"""Files that are whole or absent: written beside their place, then renamed."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import numpy as np

from ae_jax.errors import UserError


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a whole file, or, if that fails, leave what was there.

    Args:
        path: where it shall be.
        write: writes the content to the open file that it is given.

    Raises:
        OSError: the disk refused it; names the file.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as file:
            write(file)
        os.replace(beside, path)
    except OSError as error:  # of a write the system names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, as :func:`write_file` does."""
    write_file(path, lambda file: file.write(text.encode()))


def write_json(path: Path, plain: Any) -> None:
    """Write JSON, indented, with a newline at the end."""
    write_text(path, json.dumps(plain, indent=2) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by their names, as ``np.load`` reads them: an .npz."""
    write_file(path, lambda file: np.savez_compressed(file, **dict(arrays)))


def keep_arrays(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays that a file keeps, by their names; if there is none, it is made.

    Args:
        path: of the .npz; its folder is made too.
        make: computes the arrays.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, make())
    with np.load(path) as file:
        return dict(file)


def take_lock(path: Path, wait: bool) -> filelock.BaseFileLock | None:
    """Lock a file for this process; the system unlocks it, however the process ends.

    Args:
        path: the file; it is made, and stays.
        wait: for another process that holds it; else None is returned.

    Raises:
        UserError: its file system keeps no locks.
        OSError: it cannot be made.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        return None
    except OSError as error:
        if error.filename:
            raise
        raise UserError(  # of a network's file system, some of which refuse
            f"{path}: its file system keeps no locks ({error.strerror}); choose a "
            "folder on another"
        ) from error
    return lock


def open_file(path: Path) -> BinaryIO:
    """Open a file that someone has named, to read it.

    Raises:
        UserError: it is a pipe or a device, which might never end.
        OSError: it cannot be read.
    """

    def at_once(name: str, flags: int) -> int:  # to open a pipe would wait for a writer
        return os.open(name, flags | os.O_NONBLOCK)

    file = open(path, "rb", opener=at_once)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: not a regular file; give another")
    return file


def read_bytes(path: Path) -> bytes:
    """The content of a file that :func:`open_file` opens."""
    with open_file(path) as file:
        return file.read()


def read_json(path: Path, remedy: str = "fix it, or delete the run folder") -> Any:
    """Read JSON.

    Args:
        path: the file.
        remedy: what to do if it is damaged.

    Raises:
        UserError: the file is not JSON; it says what to do.
        OSError: it cannot be read.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {remedy}") from error
