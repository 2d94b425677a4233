"""Files that are whole or absent: written beside their place, then renamed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

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


def read_json(path: Path, remedy: str = "fix it, or delete the run folder") -> Any:
    """Read JSON.

    Args:
        path: the file.
        remedy: what to do if it is damaged.

    Raises:
        UserError: the file is not JSON; it says what to do.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {remedy}") from error
