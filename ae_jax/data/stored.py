"""What every data set shares: its options, its arrays, and how they are kept on disk.

A prepared set is four ``.npy`` files, images uint8 [N, H, W, C], beside the sha256 of
what is in them::

    data/NAME.lock                                  held while one process prepares
    data/NAME/{train,test}_{images,labels}.npy      what we load
    data/NAME/fingerprint.txt                       written last: the set is complete
    data/NAME/incomplete.*                          unfinished; the next one removes it
"""

import contextlib
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8
from pydantic import Field

from ae_jax.errors import UserError
from ae_jax.files import take_lock
from ae_jax.options import options

Source = Literal["prepared", "directory", "file", "download", "npm", "bundled"]
"""Where a load had its images from; ``prepared``: an earlier load left them."""

BLOCK_BYTES = 2**22
"""Images that are hashed or written at a time."""


@options
class DataOptions:
    """Which images. A data set adds its own fields, and ``load() -> Arrays``."""

    dir: Path = field(default=Path("data"), metadata={"resume": "free"})
    """Folder in which data sets are prepared, once for all runs."""
    source: Path | None = field(default=None, metadata={"resume": "free"})
    """Your images: a folder of pictures, or an .npz file. Of mnist and its
    kin: folder with the four IDX files (raw or .gz), to prepare without network."""
    classes: tuple[int, ...] = ()
    """Train on the images with these labels only; none given: on all. The test split
    keeps every label."""
    num_validation: Annotated[int, Field(ge=0)] = 0
    """Images held out of training: the last ones of the training split."""
    streaming: bool = False
    """Read images from disk as they are needed, rather than hold all in memory."""


class ImageFile:
    """Images [N, H, W, C] in an .npy file, read when they are indexed.

    It is indexed along N as an array is, by a number, a slice or an array of numbers,
    which gives an array. An image is read and not mapped: the pages of a mapping count
    as this process's memory, and random rows soon touch all of them.
    """

    def __init__(self, path: Path) -> None:
        """Take what is in ``path``; of [N, H, W] each image gets one channel.

        Raises:
            ValueError: the file is cut short, no .npy file, or not in C order.
        """
        mapped = np.load(path, mmap_mode="r")
        if not mapped.flags.c_contiguous:
            raise ValueError("an array in Fortran's order cannot be streamed")
        self._path, self._offset = path, int(mapped.offset)
        self._rows: Any = range(len(mapped))  # an array of them would be 8 bytes each
        self._item = mapped.shape[1:] if mapped.ndim != 3 else (*mapped.shape[1:], 1)
        self.dtype = mapped.dtype

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self), *self._item)

    def subset(self, rows: Any) -> "ImageFile":
        """The images that ``rows`` would index, in that order, without reading them."""
        part = object.__new__(ImageFile)
        part.__dict__ |= self.__dict__ | {"_rows": self._pick(rows)}
        return part

    def _pick(self, key: Any) -> Any:
        """The places in the file that a key means: a range, or an array of numbers."""
        if isinstance(key, slice) or isinstance(self._rows, np.ndarray):
            return self._rows[key]
        key = np.asarray(key)
        if key.dtype == bool:
            key = np.arange(len(self))[key]
        places = [self._rows[i] for i in key.reshape(-1).tolist()]
        return np.array(places, np.int64).reshape(key.shape)

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = np.asarray(self._pick(key))
        images = np.empty((*rows.shape, *self._item), self.dtype)
        places = images.reshape(rows.size, math.prod(self._item))
        size = places.shape[1] * self.dtype.itemsize
        offsets = self._offset + size * rows.reshape(-1)
        with self._path.open("rb", buffering=0) as file:
            for place, offset in zip(places, offsets.tolist(), strict=True):
                file.seek(offset)
                if file.readinto(place.data) != size:
                    raise UserError(f"{self._path}: cut short while it was read")
        return images


def take(images: Any, rows: slice | Integer[np.ndarray, "n"]) -> Any:
    """Some of the images, of which those on disk are not read."""
    return images.subset(rows) if isinstance(images, ImageFile) else images[rows]


class Arrays(NamedTuple):
    """A whole data set; what a data set class's ``load()`` returns."""

    train_images: UInt8[np.ndarray, "N H W C"] | ImageFile
    train_labels: Integer[np.ndarray, "N"]
    test_images: UInt8[np.ndarray, "M H W C"] | ImageFile
    test_labels: Integer[np.ndarray, "M"]
    source: Source = "bundled"
    fingerprint: str = ""
    """That of :func:`compute_fingerprint`; if empty, ``data.load`` computes it."""

    def named(self) -> dict[str, Any]:
        """The four arrays by their names."""
        return dict(zip(self._fields, self[:4], strict=False))


def compute_fingerprint(arrays: Arrays) -> str:
    """The sha256 of a data set's images and labels, their types and shapes included."""
    digest = hashlib.sha256()
    for array in arrays.named().values():
        digest.update(f"{array.dtype} {array.shape}".encode())
        for block in _blocks(array):
            digest.update(block)
    return digest.hexdigest()


def _blocks(array: Any) -> Iterator[memoryview]:
    """The bytes of an array or an ImageFile, some rows at a time."""
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step]).reshape(-1).data


def check_images(name: str, images: Any) -> Any:
    """Images as [N, H, W, C]; of [N, H, W] each gets one channel, else a UserError."""
    grey = len(images.shape) == 3
    shape = (*images.shape, 1) if grey else images.shape
    wrong = len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape
    if wrong or images.dtype != np.uint8:
        hint = "; of floats in [0, 1] make (255 * images).round().astype(np.uint8)"
        raise UserError(
            f"{name}: must be uint8 images [N, height, width, channels], channels 1 or "
            f"3, or [N, height, width], none of them 0, not {_form(images)}"
            f"{hint if images.dtype.kind == 'f' else ''}"
        )
    return images[..., None] if grey else images


def check_labels(name: str, labels: np.ndarray, num_images: int) -> None:
    """Labels must be integers, one for each image, else it is a UserError."""
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise UserError(
            f"{name}: must be {num_images} integers, one for each image, not "
            f"{_form(labels)}"
        )


def _form(array: Any) -> str:
    return f"{'×'.join(map(str, array.shape)) or 'a single value'} of {array.dtype}"


def is_stored(folder: Path) -> bool:
    """Whether a set is stored in a folder, whole."""
    return (folder / "fingerprint.txt").exists()


def prepare_once(folder: Path, prepare: Callable[[], Source]) -> Source:
    """Have a set stored in ``folder``, which one process alone prepares.

    Args:
        folder: where :func:`store` puts it.
        prepare: stores it, and says where it came from; may leave ``incomplete.*``.
    """
    if is_stored(folder):
        return "prepared"
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f"{folder.name}.lock")
    lock = take_lock(place, wait=False)
    if lock is None:
        say(f"waiting for another process that prepares {folder.name} …")
        lock = take_lock(place, wait=True)
    assert lock is not None  # it has waited
    try:
        folder.mkdir(exist_ok=True)
        _clear(folder)
        return "prepared" if is_stored(folder) else prepare()
    finally:
        _clear(folder)
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless there is something in it
        lock.release()


def _clear(folder: Path) -> None:
    for path in folder.glob("incomplete.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def store(folder: Path, arrays: Arrays) -> None:
    """Write a set, never more than a block of it in memory, and publish it by renames.

    The fingerprint goes last: until it is there, the set counts as not prepared.
    """
    for name, array in arrays.named().items():
        with (folder / f"incomplete.{name}.npy").open("wb") as file:
            write_header(file, array.dtype, array.shape)
            for block in _blocks(array):
                file.write(block)
    text = folder / "incomplete.fingerprint.txt"
    text.write_text(f"{compute_fingerprint(arrays)}\n")
    for name in (*(f"{name}.npy" for name in arrays.named()), "fingerprint.txt"):
        os.replace(folder / f"incomplete.{name}", folder / name)


def write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Begin an .npy file; the values are to follow, in C order."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def read_stored(
    folder: Path, source: Source, streaming: bool, known: str = ""
) -> Arrays:
    """A stored set, all of it checked against its fingerprint.

    Raises:
        UserError: it is damaged, or not the one whose fingerprint is ``known``.
    """
    read: Any = ImageFile if streaming else np.load
    try:
        recorded = (folder / "fingerprint.txt").read_text().strip()
        train, test = (
            (
                read(folder / f"{part}_images.npy"),
                np.load(folder / f"{part}_labels.npy"),
            )
            for part in ("train", "test")
        )
        arrays = Arrays(*train, *test, source, recorded)
        if compute_fingerprint(arrays) == recorded == (known or recorded):
            return arrays
    except FileNotFoundError:
        pass
    except (OSError, MemoryError):
        raise
    except Exception as error:  # flipped bits surface as almost any exception
        raise damaged(folder) from error
    raise damaged(folder)


def damaged(folder: Path) -> UserError:
    """The error about a prepared set that is not what was prepared."""
    return UserError(
        f"{folder}: the prepared {folder.name} is damaged; delete this folder and give "
        "the same command again"
    )


def say(line: str) -> None:
    """Tell the user, at once."""
    print(line, file=sys.stderr, flush=True)
