"""The user's own images: a folder of pictures, or an .npz file; and rows on disk.

A folder of pictures is decoded once, into a file of the form that every prepared data
set has; training then never waits for a decoder::

    data/folder-0123456789ab/decoded.npz    shuffled by the seed, and split
    data/folder-0123456789ab/broken.txt     files left out, a line each

What is in a file counts, not its ending: PNG, JPEG or WebP. A picture is turned as its
EXIF data say, what is transparent stands on white, 16 bits become 8, CMYK becomes RGB,
a palette its colours, and an animation its first frame; colour profiles are ignored.
"""

import contextlib
import hashlib
import math
import os
import struct
import warnings
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias, cast

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from ae_jax.config import DataConfig, UserError

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Files that have one of these, in whatever case, are taken for pictures."""

PIECE = 2**20
"""Bytes copied at once."""
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**28 // 3
"""A larger picture is taken for a decompression bomb; from here on Pillow warns."""
MAX_THREADS = 8
"""That decode: each may hold one picture of the largest size that Pillow allows."""
NUM_NAMED = 10
"""Broken files that a message names; the others are counted."""


# --- Images that stay on disk --------------------------------------------------------


class Rows:
    """Images [N, D] that stay on disk, and are read when they are asked for.

    They are indexed like an array of uint8, by a number, a slice or an array of
    numbers, which gives an array. Reading is by ``pread`` and not by mapping the file,
    whose pages would count as this process's memory. Threads may share them.

    Attributes:
        shape: (N, D).
        image_shape: (H, W) or (H, W, 3); D is the product.
    """

    dtype = np.dtype(np.uint8)
    ndim = 2

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]) -> None:
        """Open the file in which images of ``shape`` lie from a byte on."""
        self._file = _File(path)
        self._offset = offset
        self._order: np.ndarray | None = None
        self.image_shape = shape[1:]
        self.shape = (shape[0], math.prod(self.image_shape))

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, start: int, stop: int) -> "Rows":
        """The rows from one on up to another, without reading them."""
        if self._order is not None:
            return self._view(stop - start, self._offset, self._order[start:stop])
        return self._view(stop - start, self._offset + start * self.shape[1], None)

    def take(self, order: Int32[np.ndarray, "n"]) -> "Rows":
        """These rows in this order, without reading them."""
        order = order if self._order is None else self._order[order]
        return self._view(len(order), self._offset, order)

    def _view(
        self, size: int, offset: int, order: Int32[np.ndarray, "n"] | None
    ) -> "Rows":
        rows = object.__new__(Rows)
        rows._file, rows._offset, rows._order = self._file, offset, order
        rows.image_shape, rows.shape = self.image_shape, (size, self.shape[1])
        return rows

    def __getitem__(self, key: Any) -> UInt8[np.ndarray, "*n D"]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1 and self._order is None:  # one piece of the file
                block = np.empty((max(stop - start, 0), self.shape[1]), np.uint8)
                self._read(start, block)
                return block
            key = np.arange(start, stop, step)
        numbers = np.asarray(key)
        if numbers.size and numbers.dtype.kind not in "iu":
            raise TypeError(f"rows are numbered by integers, not by {numbers.dtype}")
        size = len(self)
        if numbers.size and not -size <= numbers.min() <= numbers.max() < size:
            raise IndexError(f"there are {size} rows, asked for was {key}")
        flat = numbers.ravel().astype(np.intp) % max(size, 1)
        block = np.empty((len(flat), self.shape[1]), np.uint8)
        for place, number in enumerate(
            flat if self._order is None else self._order[flat]
        ):
            self._read(int(number), block[place])
        return block.reshape(*numbers.shape, self.shape[1])

    def _read(self, number: int, block: UInt8[np.ndarray, "*n D"]) -> None:
        self._file.read(self._offset + number * self.shape[1], block.reshape(-1).data)


class _File:
    """A file that is open for as long as something refers to it."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, offset: int, buffer: memoryview) -> None:
        while len(buffer):
            count = os.preadv(self._handle, [buffer], offset)
            if not count:
                raise UserError(f"{self._path}: cut short while it was read; mend it")
            offset, buffer = offset + count, buffer[count:]


Images: TypeAlias = UInt8[np.ndarray, "_ D"] | Rows
"""Any number of images, in memory or on disk."""


class Member(NamedTuple):
    """An array in an .npz file, as its headers tell."""

    offset: int
    """Of its first value in the file, unless it is compressed."""
    shape: tuple[int, ...]
    dtype: np.dtype
    streamable: bool
    """Whether it lies there as it is, in C order."""
    checksum: int
    """Zip's, a CRC32."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of each image; a single channel is no axis."""
        return self.shape[1:3] if self.shape[3:] == (1,) else self.shape[1:]


def read_members(path: Path) -> dict[str, Member]:
    """What an .npz file holds, by name, from its headers alone.

    Raises:
        UserError: it is no such file, or cannot be read.
    """
    with _opened(path) as file, zipfile.ZipFile(file) as archive:
        return {
            info.filename.removesuffix(".npy"): _read_member(file, archive, info)
            for info in archive.infolist()
        }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except (MemoryError, UserError):
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}; mend it, or choose "
            "another"
        ) from error
    except Exception as error:  # zipfile, zlib, struct and NumPy each raise their own
        raise UserError(
            f"{path}: damaged, or no .npz file ({error}); write it by np.savez"
        ) from error


def _read_member(
    file: BinaryIO, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> Member:
    with archive.open(info) as member:
        old = np.lib.format.read_magic(member) == (1, 0)
        read = getattr(np.lib.format, f"read_array_header_{1 if old else 2}_0")
        shape, fortran_order, dtype = read(member)
        header_size = member.tell()
    whole = header_size + math.prod(shape) * dtype.itemsize == info.file_size
    if not whole and not dtype.hasobject:
        raise ValueError(f"{info.filename} is not as long as it says")
    file.seek(info.header_offset + 26)  # where zip keeps the lengths of two fields
    offset = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    streamable = info.compress_type == zipfile.ZIP_STORED and not fortran_order
    return Member(offset + header_size, shape, dtype, streamable, info.CRC)


def open_rows(path: Path, name: str) -> Rows:
    """The images that are a member of an .npz file, to be read as they are needed.

    Raises:
        UserError: they are compressed, or not in C order.
    """
    member = read_members(path)[name]
    if not member.streamable:
        raise UserError(
            f"{path}: {name} is compressed, or in Fortran's order, and cannot be "
            "streamed; write it by np.savez, or leave out --data.streaming"
        )
    return Rows(path, member.offset, (member.shape[0], *member.image_shape))


# --- The user's .npz file ------------------------------------------------------------


def load_npz(config: DataConfig) -> tuple[list[Any], str]:
    """The user's .npz file, read in place.

    Args:
        config: ``source`` is the file. It holds ``images`` [N, H, W] or [N, H, W, C],
            uint8, C 1 or 3, which are shuffled by the seed and split; or
            ``train_images`` and ``test_images``, which are taken as they are. Labels
            are integers [N]: ``labels``, or ``train_labels`` and ``test_labels``.

    Returns:
        Training images and labels, test images and labels; the images are arrays or,
        if streamed, rows, and labels 0 where there are none. And the fingerprint: of
        names, shapes and zip's own checksums, so that it costs no reading, and is the
        same streamed.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else.
    """
    path = find_source(config, "an .npz file")
    members = read_members(path)
    whole, pair = "images" in members, {"train_images", "test_images"} <= set(members)
    if whole == pair:
        raise UserError(
            f"{path}: must hold images, or else train_images and test_images; it holds "
            f"{', '.join(members) or 'nothing'}"
        )
    prefixes = ("",) if whole else ("train_", "test_")
    names = [f"{prefix}{kind}" for prefix in prefixes for kind in ("images", "labels")]
    found = _read_arrays(path, members, names, config.streaming)
    known: list[Any] = [
        (n, m.shape, m.checksum) for n, m in members.items() if n in names
    ]
    if whole:
        known = [*known, config.split_seed, config.test_share]
        found = _split(found[0], found[1], config)
    elif members["train_images"].image_shape != members["test_images"].image_shape:
        raise UserError(f"{path}: train_images and test_images differ in size")
    return found, hashlib.sha256(repr(sorted(known, key=repr)).encode()).hexdigest()


def _read_arrays(
    path: Path, members: Mapping[str, Member], names: list[str], streaming: bool
) -> list[Any]:
    """Images, labels, images, labels …, each checked before any is read."""
    for images, labels in zip(names[::2], names[1::2], strict=True):
        _check_images(path, images, members[images])
        if labels in members:
            _check_labels(path, labels, members[labels], len_of=members[images])
    found: list[Any] = []
    with _opened(path) as file, np.load(file) as archive:
        for name in names:
            if name not in members:
                found.append(np.zeros(len(found[-1]), np.uint8))
            elif name.endswith("labels"):
                found.append(archive[name])
            elif streaming:
                found.append(open_rows(path, name))
            else:
                shape = (-1, *members[name].image_shape)
                found.append(np.ascontiguousarray(archive[name]).reshape(shape))
    return found


def _check_images(path: Path, name: str, member: Member) -> None:
    shape = "×".join(map(str, member.shape)) or "a single number"
    if member.dtype != np.uint8:
        raise UserError(
            f"{path}: {name} is of {member.dtype}, must be uint8, 0 to 255; of floats "
            "in [0, 1] make it by (255 * images).round().astype(np.uint8)"
        )
    fits = len(member.shape) == 3 or (
        len(member.shape) == 4 and member.shape[3] in (1, 3)
    )
    if not fits or 0 in member.shape:
        raise UserError(
            f"{path}: {name} is {shape}, must be N×height×width, or "
            "N×height×width×channels with 1 or 3 channels, and none of them 0"
        )


def _check_labels(path: Path, name: str, member: Member, len_of: Member) -> None:
    if member.dtype.kind not in "iu" or len(member.shape) != 1:
        raise UserError(f"{path}: {name} must be integers, one for each image")
    if member.shape[0] != len_of.shape[0]:
        raise UserError(
            f"{path}: {name} are {member.shape[0]}, for {len_of.shape[0]} images"
        )


def _split(images: Any, labels: np.ndarray, config: DataConfig) -> list[Any]:
    """Shuffle by the seed; the first ones are the test split."""
    order = shuffled(len(images), config)
    test, train = np.split(order, [count_test(len(images), config)])
    if isinstance(images, Rows):
        return [images.take(train), labels[train], images.take(test), labels[test]]
    return [images[train], labels[train], images[test], labels[test]]


def shuffled(count: int, config: DataConfig) -> Int32[np.ndarray, "N"]:
    """The user's images in the order of the split's seed."""
    order = np.random.default_rng(config.split_seed).permutation(count)
    return order.astype(np.int32)


def count_test(count: int, config: DataConfig) -> int:
    """How many of the user's images are the test split: at least one, never all.

    Raises:
        UserError: there is but one image, or none.
    """
    if count < 2:
        raise UserError(
            f"data.source: {config.source} has {count} readable image{'s'[count:]}; to "
            "train and to test takes two or more"
        )
    return min(max(1, round(config.test_share * count)), count - 1)


def find_source(config: DataConfig, wanted: str) -> Path:
    """Where the user's images are.

    Args:
        config: the user's.
        wanted: ``a folder`` or what file.

    Raises:
        UserError: the config does not say, or there is nothing of the kind.
    """
    path = config.source
    if path is None:
        raise UserError(
            f"data.source: data.name {config.name} needs {wanted}: --data.source PATH"
        )
    if not os.path.lexists(path):
        raise UserError(f"data.source: {path} is not there; check the path")
    if path.is_dir() != (wanted == "a folder"):
        other = "folder" if path.is_dir() else "npz"
        raise UserError(
            f"data.source: {path} is not {wanted}, as data.name {config.name} takes; "
            f"choose another, or --data.name {other}"
        )
    return path


# --- A folder of pictures ------------------------------------------------------------


class Picture(NamedTuple):
    """A file that is taken for a picture, by its ending."""

    name: str
    """Its path within the folder."""
    size: int
    mtime_ns: int


def list_pictures(folder: Path) -> list[Picture]:
    """The files under a folder that may be pictures, sorted by their names.

    Hidden files and folders are passed over. A link to a folder is followed, but no
    folder is listed twice, so that links cannot make a loop.

    Raises:
        UserError: there are none, or a folder cannot be read.
    """
    pictures, seen = list[Picture](), set[tuple[int, int]]()
    folders, links = [""], list[str]()
    while folders or links:
        place = folders.pop() if folders else links.pop(0)
        for name, entry in _list_folder(folder, place, seen):
            if os.path.isdir(entry.path):
                (links if entry.is_symlink() else folders).append(name)
            elif name.lower().endswith(ENDINGS):
                pictures.append(_describe(name, entry))
    if not pictures:
        endings = ", ".join(ENDINGS)
        raise UserError(f"data.source: {folder} holds no picture (no {endings})")
    return sorted(pictures)


def _list_folder(
    folder: Path, place: str, seen: set[tuple[int, int]]
) -> list[tuple[str, os.DirEntry[str]]]:
    """What is in ``folder / place`` and not hidden; nothing if it was seen before."""
    try:
        about = os.stat(folder / place)
        if (about.st_dev, about.st_ino) in seen:
            return []
        seen.add((about.st_dev, about.st_ino))
        entries = sorted(os.scandir(folder / place), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"data.source: cannot read the folder {_show(str(folder / place))}: "
            f"{error.strerror}; mend it, or choose another"
        ) from error
    shown = [entry for entry in entries if not entry.name.startswith(".")]
    return [(os.path.join(place, entry.name), entry) for entry in shown]


def _describe(name: str, entry: os.DirEntry[str]) -> Picture:
    try:
        about = entry.stat()
    except OSError:  # it will be among the broken ones
        return Picture(name, 0, 0)
    return Picture(name, about.st_size, about.st_mtime_ns)


def digest_pictures(pictures: list[Picture], config: DataConfig) -> str:
    """A sha256 of what decides on the pixels: the files, and how they are read."""
    how = (config.channels, config.image_size, config.split_seed, config.test_share)
    digest = hashlib.sha256(repr(how).encode())
    for name, size, mtime_ns in pictures:
        digest.update(os.fsencode(name) + f"\0{size} {mtime_ns}\n".encode())
    return digest.hexdigest()


def prepare(pictures: list[Picture], config: DataConfig, folder: Path) -> None:
    """Decode a folder's pictures, once, into ``decoded.npz``.

    The memory that it takes does not grow with their number. What cannot be read is
    left out, and listed in ``broken.txt``.

    Args:
        pictures: what :func:`list_pictures` found in ``config.source``.
        config: how to read them.
        folder: where the two files shall be; whoever calls clears ``incomplete.*``.

    Raises:
        UserError: the pictures differ in size, and no size is asked for; or fewer than
            two can be read.
        OSError: the disk's refusal.
    """
    classes = sorted({_class_of(picture.name) for picture in pictures})
    labels, broken = list[int](), list[str]()
    first: tuple[str, tuple[int, ...]] | None = None
    with (folder / "incomplete.pixels").open("w+b") as pixels:
        for name, image in _decode_all(pictures, config):
            if isinstance(image, str):
                broken.append(f"{_show(name)}: {image}\n")
                continue
            first = first or (name, image.shape)
            if image.shape != first[1]:
                raise _mixed(first, (name, image.shape))
            pixels.write(np.ascontiguousarray(image).data)
            labels.append(classes.index(_class_of(name)))
        if first is None:
            raise UserError(
                f"data.source: none of the {len(pictures)} files in {config.source} "
                f"can be read: {list_broken(broken)}"
            )
        _write_decoded(
            folder / "incomplete.decoded.npz",
            pixels,
            first[1],
            np.array(labels, np.min_scalar_type(len(classes) - 1)),
            count_test(len(labels), config),
        )
    (folder / "broken.txt").write_text("".join(sorted(broken)), "utf-8")
    os.replace(folder / "incomplete.decoded.npz", folder / "decoded.npz")


def _class_of(name: str) -> str:
    """The folder of the first level that a picture lies in, or none."""
    return name.partition(os.sep)[0] if os.sep in name else ""


def _mixed(*pictures: tuple[str, tuple[int, ...]]) -> UserError:
    told = " and ".join(
        f"{_show(name)} ({shape[1]}×{shape[0]})" for name, shape in pictures
    )
    return UserError(
        f"data.source: the pictures differ in size, as do {told}; give them one by "
        "--data.image-size"
    )


def list_broken(lines: list[str]) -> str:
    """The broken files of ``broken.txt``, in one line: the first ones, and a count."""
    named = "; ".join(line.strip() for line in lines[:NUM_NAMED])
    more = len(lines) - NUM_NAMED
    return f"{named}; and {more} more" if more > 0 else named


def _show(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _write_decoded(
    path: Path,
    pixels: BinaryIO,
    shape: tuple[int, ...],
    labels: Integer[np.ndarray, "N"],
    num_test: int,
) -> None:
    """Write what ``data.Arrays`` holds, and its fingerprint, block by block.

    Args:
        path: where to.
        pixels: all images, those of the test split first.
        shape: of an image.
        labels: in the order of the images.
        num_test: how many of them are the test split.
    """
    digest, size = hashlib.sha256(), math.prod(shape)
    splits = {"train": range(num_test, len(labels)), "test": range(num_test)}
    with zipfile.ZipFile(path, "w") as archive:

        def digested(block: bytes) -> bytes:
            digest.update(block)
            return block

        def write(
            name: str, shape: tuple[int, ...], dtype: Any, blocks: Iterable[bytes]
        ) -> None:
            digest.update(repr(shape).encode())
            write_member(archive, name, shape, dtype, map(digested, blocks))

        for split, rows in splits.items():
            pixels.seek(rows.start * size)
            left = range(len(rows) * size, 0, -PIECE)
            blocks = (pixels.read(min(PIECE, count)) for count in left)
            write(f"{split}_images", (len(rows), *shape), np.uint8, blocks)
            part = labels[rows.start : rows.stop]
            write(f"{split}_labels", part.shape, part.dtype, [part.tobytes()])
        fingerprint = np.array(digest.hexdigest())
        write("fingerprint", (), fingerprint.dtype, [fingerprint.tobytes()])


def write_member(
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    blocks: Iterable[Any],
) -> None:
    """Write an array into an open .npz file, block by block, never whole in memory.

    Args:
        archive: the file.
        name: the array's.
        shape: of all of it.
        dtype: the same.
        blocks: its bytes, in C order.
    """
    # Takes no memory: all its values are one and the same.
    like = np.broadcast_to(np.zeros((), dtype), shape)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = np.lib.format.header_data_from_array_1_0(like)
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(block)


def _decode_all(
    pictures: list[Picture], config: DataConfig
) -> Iterator[tuple[str, UInt8[np.ndarray, "H W *C"] | str]]:
    """Each picture's name and pixels, or what is wrong with it, in the seed's order."""
    from PIL import Image
    from tqdm import tqdm

    Image.init()  # loads Pillow's readers, before there are threads
    order = shuffled(len(pictures), config).tolist()
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    block = 8 * num_threads  # pictures that wait in memory, perhaps at their full size

    def decode(number: int) -> tuple[str, UInt8[np.ndarray, "H W *C"] | str]:
        name = pictures[number].name
        try:
            return name, _decode(cast(Path, config.source) / name, config)
        except Exception as error:  # Pillow's readers raise anything
            return name, _reason(error)

    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(order), unit=" pictures", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(order), block):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd, but readable, pictures
                found = list(pool.map(decode, order[start : start + block]))
            yield from found
            bar.update(len(found))


def _decode(path: Path, config: DataConfig) -> UInt8[np.ndarray, "H W *C"]:
    """The pixels of one picture."""
    from PIL import Image, ImageOps

    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise ValueError("not a file")
    side = config.image_size
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}×{image.height}, taken for a bomb")
        if side is not None:  # a JPEG can be read at an eighth of its size, much faster
            image.draft(None, (2 * side, 2 * side))
        ImageOps.exif_transpose(image, in_place=True)
        plain = _flatten(image)
    if side is not None:
        plain = ImageOps.fit(plain, (side, side))
    return np.asarray(plain.convert("L") if config.channels == 1 else plain)


def _flatten(image: "Image.Image") -> "Image.Image":
    """A picture of any mode as RGB, on white."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off
        deep = np.minimum(np.asarray(image).astype(np.uint32), 65535)
        clear = deep == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(clear, 255, np.round(deep / 257)).astype("u1"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(FORMATS)}"
    told = error.strerror if isinstance(error, OSError) else None
    return _show(told or str(error) or type(error).__name__)
