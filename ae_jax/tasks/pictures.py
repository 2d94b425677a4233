"""A user's single pictures, in and out."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from ae_jax.data.own import Folder, list_pictures, tolerant
from ae_jax.errors import UserError
from ae_jax.files import write_file


def read_picture(
    path: Path, channels: int, side: int | None = None
) -> UInt8[np.ndarray, "H W C"]:
    """A picture as the data set ``folder`` reads its own.

    Args:
        path: of the file.
        channels: 1 makes it grey, 3 makes it colour.
        side: given, its middle square is scaled to so many pixels a side.

    Raises:
        UserError: it is none, or cannot be read.
    """
    kind: Any = channels  # 1 or 3, as a run's images have
    reader = Folder(source=path.parent, channels=kind, image_size=side)
    with tolerant():
        image = reader.read_picture(path.name)
    if isinstance(image, str):
        raise UserError(f"{path}: {image}; give a picture")
    return image


def find_pictures(paths: Iterable[Path]) -> list[Path]:
    """The files given, and the pictures in the folders given.

    Raises:
        UserError: a folder holds none, or nothing was given.
    """
    found: list[Path] = []
    for path in paths:
        inside = list_pictures(path)[0] if path.is_dir() else []
        found += [path / name for name in inside] or [path]
    if not found:
        raise UserError("no pictures; give files, or folders that hold some")
    return found


def tile(
    images: Float[np.ndarray, "N H W C"], num_columns: int, gap: int = 1
) -> Float[np.ndarray, "h w C"]:
    """Images as one, row by row, with grey lines between them; the last row is filled.

    Args:
        images: pixels in [0, 1].
        num_columns: images of a row.
        gap: width of the lines, in pixels.
    """
    missing = -len(images) % num_columns
    images = np.pad(images, ((0, missing), *[(0, 0)] * 3))
    lines = (0, 0), (gap, 0), (gap, 0), (0, 0)
    framed = np.pad(images, lines, constant_values=0.5)
    _, height, width, channels = framed.shape
    rows = framed.reshape(-1, num_columns, height, width, channels).swapaxes(1, 2)
    return rows.reshape(-1, num_columns * width, channels)[gap:, gap:]


def format_of(path: Path) -> str:
    """The format of a picture that is to be written, by its ending.

    Raises:
        UserError: there is no such format, or no such folder.
    """
    from PIL import Image

    ending = path.suffix.lower()
    format_name = Image.registered_extensions().get(ending)
    if format_name not in Image.SAVE:
        raise UserError(f"{path}: no format of pictures ends in {ending!r}; try .png")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it first")
    return format_name


def write_picture(path: Path, image: Float[np.ndarray, "H W C"]) -> None:
    """Write pixels in [0, 1] as a picture; errors as of :func:`format_of`."""
    from PIL import Image

    format_name = format_of(path)
    pixels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    write_file(path, lambda file: picture.save(file, format_name))
