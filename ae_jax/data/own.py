"""The user's own images: a folder of pictures, or an .npz file.

A folder of pictures is decoded once, into a stored set named after what is in it, so
that training never waits for a decoder; so is a file whose images are streamed. What
is in a picture's file counts, not its ending.

What would train without a word and mean nothing is reported: images that are all dark,
or of one colour, and files and arrays that nothing is done with.
"""

import collections
import contextlib
import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from pydantic import Field

from ae_jax.data import stored
from ae_jax.data.stored import Arrays, DataOptions, ImageFile, Source, say
from ae_jax.errors import UserError
from ae_jax.files import open_file
from ae_jax.options import options

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files that have one of these, in whatever case, are taken for pictures."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
TEXT_BYTES = 2**26
"""Of a picture's texts and colour profile, which are unpacked, and not used."""
DARK = 64
"""Of 255; if no pixel of any image is as bright, their range is another, it seems."""
HELD_OUT = {"val", "valid", "validation", "dev", "eval"}
"""Folders beside train/ that no one means as a label."""


@options
class UserImages(DataOptions):
    """Images at ``source``, which are shuffled by a seed and split."""

    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of your images that are the test split, where the file does not say."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of your images, which decides on the test split."""

    def _find_source(self, wanted: Literal["a folder", "an .npz file"]) -> Path:
        path = self.source
        if path is None:
            raise UserError(f"data.source: give {wanted} by --data.source PATH")
        if not os.path.lexists(path):
            raise UserError(f"data.source: {path} is not there; check the path")
        if path.is_dir() != (wanted == "a folder"):
            name = "folder" if path.is_dir() else "npz"
            raise UserError(
                f"data.source: {path} is not {wanted}; choose another, or --data.name "
                f"{name}"
            )
        return path

    def _folder(self, *content: object) -> Path:
        """Where to store what these things decide on."""
        digest = hashlib.sha256(repr((self.test_share, self.split_seed)).encode())
        digest.update(repr(content).encode())
        return self.dir / f"{type(self).__name__.lower()}-{digest.hexdigest()[:12]}"

    def _split(
        self,
        images: Any,
        labels: Integer[np.ndarray, "N"],
        is_test: Bool[np.ndarray, "N"] | None = None,
    ) -> Arrays:
        """Shuffle by the seed; the first ones are the test split: one at least.

        ``is_test`` says which they are, where that is known.
        """
        count = len(labels)
        if count < 2:
            raise UserError(
                f"data.source: {self.source} has {count} readable image{'s'[count:]}; "
                "to train and to test takes two or more"
            )
        order = np.random.default_rng(self.split_seed).permutation(count)
        if is_test is None:
            num_test = min(max(1, round(self.test_share * count)), count - 1)
            parts = order[num_test:], order[:num_test]
        else:
            parts = order[~is_test[order]], order[is_test[order]]
            if not (len(parts[0]) and len(parts[1])):
                raise UserError(f"data.source: {self.source}: train or test is empty")
        train, test = ((stored.take(images, rows), labels[rows]) for rows in parts)
        return Arrays(*train, *test)


@options
class Npz(UserImages):
    """An .npz file of images, uint8 [N, H, W] or [N, H, W, C], C 1 or 3.

    It holds ``images``, which are shuffled and split, or ``train_images`` and
    ``test_images``, which are taken as they are. Labels are integers [N]: ``labels``,
    or ``train_labels`` and ``test_labels``; 0 where there are none.
    """

    def load(self) -> Arrays:
        """The images, read where they are or, streamed, unpacked once.

        Raises:
            UserError: the file is missing, cannot be read, or holds something else.
        """
        path = self._find_source("an .npz file")
        if not self.streaming:
            return self._read(path)
        about = path.stat()
        folder = self._folder(path.resolve(), about.st_size, about.st_mtime_ns)

        def prepare() -> Source:
            say(f"unpacking {path} (once) …")
            stored.store(folder, self._read(path, unpack_to=folder))
            return "file"

        stored.prepare_once(folder, prepare)
        return stored.read_stored(folder, "file", streaming=True)

    def _read(self, path: Path, unpack_to: Path | None = None) -> Arrays:
        parts, used = list[Any](), set[str]()
        try:
            # NumPy would leave a damaged file open, if it were to open it itself.
            with open_file(path) as file, np.load(file) as archive:
                names = archive.files
                pair = {"train_images", "test_images"} <= set(names)
                if pair == ("images" in names):
                    raise UserError(
                        f"{path}: must hold images, or else train_images and "
                        f"test_images; it holds {', '.join(names) or 'nothing'}"
                    )
                for prefix in ("train_", "test_") if pair else ("",):
                    name = f"{prefix}images"
                    images = _read_images(archive, name, unpack_to)
                    images = stored.check_images(f"{path}: {name}", images)
                    labels = archive.get(f"{prefix}labels", np.zeros(len(images), "u1"))
                    stored.check_labels(f"{path}: {prefix}labels", labels, len(images))
                    parts += [images, labels]
                    used |= {name, f"{prefix}labels"}
        except (OSError, MemoryError, UserError):
            raise
        except Exception as error:  # zipfile, zlib and NumPy each raise their own
            raise UserError(
                f"{path}: damaged, or no .npz file ({error}); write it by np.savez"
            ) from error
        if unused := sorted(set(names) - used):
            say(f"{path}: not used: {', '.join(map(_show, unused))}")
        if (brightest := _look_at(parts[0])[0]) < DARK:
            say(f"{path}: {_dark(brightest)}")
        arrays = Arrays(*parts) if len(parts) == 4 else self._split(*parts)
        return arrays._replace(source="file")


def _read_images(archive: Any, name: str, unpack_to: Path | None) -> Any:
    if unpack_to is None:
        return archive[name]
    # An .npz file is an archive of .npy files.
    place = unpack_to / f"incomplete.unpacked.{name}.npy"
    with archive.zip.open(f"{name}.npy") as packed, place.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return ImageFile(place)


def _look_at(images: Any) -> tuple[int, list[int]]:
    """The brightest pixel of images, and which of them are of one colour."""
    brightest, plain = 0, list[int]()
    step = max(1, stored.BLOCK_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(images), step):
        block = images[start : start + step]
        brightest = max(brightest, int(block.max()))
        alike = (block == block[:, :1, :1]).all((1, 2, 3))
        plain += (start + np.flatnonzero(alike)).tolist()
    return brightest, plain


def _dark(brightest: int) -> str:
    return f"the brightest pixel of all images is {brightest}, of 255"


@options
class Folder(UserImages):
    """A folder of pictures; its subfolders of the first level give the labels.

    Where these are ``train`` and ``test``, they are the splits, and their own
    subfolders give the labels.
    """

    channels: Literal[1, 3] = 1
    """1 makes all pictures grey, 3 makes them colour."""
    image_size: Annotated[int, Field(gt=0, lt=2**14)] | None = None
    """Pixels to a side: each picture is scaled until its shorter side has as many, and
    its middle square is taken. None: all are of one size already."""
    white: Annotated[int, Field(gt=0, lt=2**16)] | None = None
    """The pixel value that is white: 4095 where 12 bits are kept in 16. None: the
    highest there can be, 255 or, of 16 bits, 65535."""
    background: Literal["white", "black"] = "white"
    """What is behind pictures that are transparent."""
    skip_broken: bool = field(default=False, metadata={"resume": "free"})
    """Leave out files that cannot be read, instead of ending at the first one."""

    def load(self) -> Arrays:
        """The pictures, decoded the first time that the folder is seen as it is now.

        Raises:
            UserError: no folder, no pictures, a broken one, or they differ in size.
        """
        place = self._find_source("a folder")
        pictures, others = list_pictures(place)
        pictures, beside = _of_the_splits(place, pictures)
        others = sorted([*others, *beside])
        has_splits = {"train", "test"} <= set(map(_split_of, pictures))
        how = self.channels, self.image_size, self.white, self.background
        seen = [_describe(place, name) for name in pictures]
        folder = self._folder(how, self.skip_broken, seen)
        pixels = folder / "incomplete.pixels.npy"

        def prepare() -> Source:
            say(f"preparing {len(pictures):,} pictures of {place} (once) …")
            names = self._decode_all(pictures, pixels)
            images = ImageFile(pixels).subset(slice(len(names)))
            labels = [_label_of(name, has_splits) for name in names]
            self._report(images, names, labels, others)
            test = [_split_of(name) == "test" for name in names]
            is_test = np.array(test) if has_splits else None
            stored.store(folder, self._split(images, _number(labels), is_test))
            return "directory"

        source = stored.prepare_once(folder, prepare)
        return stored.read_stored(folder, source, self.streaming)

    def _report(
        self, images: Any, names: list[str], labels: list[str], others: list[str]
    ) -> None:
        """Say what would go unnoticed."""
        if others:
            endings = collections.Counter(Path(n).suffix.lower() or n for n in others)
            kinds = ", ".join(f"{n:,} {_show(e)}" for e, n in endings.most_common(5))
            files = "1 file" if len(others) == 1 else f"{len(others):,} files"
            say(f"passed over {files} ({kinds}), as {_show(others[0])}")
        if len(counts := collections.Counter(labels)) > 1:
            shown = [f"{_show(n or '.')} ({c:,})" for n, c in sorted(counts.items())]
            more = ", …" if len(shown) > 10 else ""
            say(f"labels, from 0: {', '.join(shown[:10])}{more}")
        brightest, plain = _look_at(images)
        if brightest < DARK:
            say(f"{_dark(brightest)}; the value that is white may be --data.white 4095")
        if plain:
            say(
                f"{len(plain):,} of {len(names):,} pictures are of one colour, as "
                f"{_show(names[plain[0]])}; if they show more on black, give "
                "--data.background black"
            )

    def _decode_all(self, pictures: list[str], pixels: Path) -> list[str]:
        """Write the readable pictures into an .npy file, one by one.

        The file has room for all of them; returned are the names of those in it.
        """
        names, shape = list[str](), (0, 0, 0)
        with pixels.open("wb") as file:
            for name, image in self._read_all(pictures):
                shape = shape if names else image.shape
                if image.shape != shape:
                    raise UserError(
                        f"data.source: the pictures differ in size, as do "
                        f"{_show(names[0])} ({shape[1]}×{shape[0]}) and {_show(name)} "
                        f"({image.shape[1]}×{image.shape[0]}); give them one by "
                        "--data.image-size"
                    )
                if not names:
                    stored.write_header(file, image.dtype, (len(pictures), *shape))
                file.write(np.ascontiguousarray(image).data)
                names.append(name)
            missing = len(pictures) - len(names)
            file.truncate(file.tell() + missing * math.prod(shape))
        return names

    def _read_all(
        self, pictures: list[str]
    ) -> Iterator[tuple[str, UInt8[np.ndarray, "H W C"]]]:
        """The readable pictures in their order; how many are not is reported.

        Raises:
            UserError: one cannot be read and may not be skipped, or none can be.
        """
        from tqdm import tqdm

        broken = list[str]()
        for name in tqdm(pictures, unit=" pictures", disable=None, leave=False):
            with tolerant():
                image = self.read_picture(name)
            if not isinstance(image, str):
                yield name, image
                continue
            broken.append(f"{_show(name)}: {image}")
            if not self.skip_broken or len(broken) == len(pictures):
                way = ", or leave such files out by --data.skip-broken"
                way = ": no other can be read" if self.skip_broken else way
                raise UserError(
                    f"data.source: cannot read {self.source}/{broken[0]}; fix it{way}"
                )
        if broken:
            say(f"left out {len(broken):,} files that cannot be read, as {broken[0]}")

    def read_picture(self, name: str) -> UInt8[np.ndarray, "H W C"] | str:
        """The pixels of one picture, or what is wrong with it."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        path, side = cast(Path, self.source) / name, self.image_size
        try:
            if path.exists() and not path.is_file():  # a pipe would wait for ever
                return "not a file"
            with Image.open(path, formats=FORMATS) as image:
                if side is not None:  # a JPEG is read at an eighth of its size, faster
                    image.draft(None, (2 * side, 2 * side))
                plain = self._convert(image)
        except MemoryError:
            raise
        except UnidentifiedImageError:
            return f"no {', '.join(FORMATS)}"
        except Exception as error:  # Pillow's readers raise anything
            message = error.strerror if isinstance(error, OSError) else None
            return _show(message or str(error) or type(error).__name__)
        if side is not None:
            plain = ImageOps.fit(plain, (side, side))
        return np.asarray(plain).reshape(plain.height, plain.width, self.channels)

    def _convert(self, image: "Image.Image") -> "Image.Image":
        """A picture of any mode in ours: upright, and on the background.

        Raises:
            ValueError: it has no such pixels, or several pages.
        """
        from PIL import Image, ImageOps

        if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
            raise ValueError("several pages; save each as a file of its own")
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("pixels are floats; save it with 8 or 16 bits")
        deep = image.mode.startswith("I")  # which Pillow would clip at 255
        if deep:
            image = Image.fromarray(self._stretch(np.asarray(image), 65535))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, self.background)
            image = Image.alpha_composite(behind, image)
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.white is not None and not deep:
            image = Image.fromarray(self._stretch(np.asarray(image), 255))
        return image

    def _stretch(self, values: np.ndarray, highest: int) -> UInt8[np.ndarray, "..."]:
        """Pixels from 0 to white as bytes."""
        white = highest if self.white is None else self.white
        if values.max() > white or values.min() < 0:
            raise ValueError(
                f"pixels from {values.min()} to {values.max()}, where data.white is "
                f"{white}"
            )
        return np.round(values * (255 / white)).astype(np.uint8)


@contextlib.contextmanager
def tolerant() -> Iterator[None]:
    """Have Pillow, here, read odd pictures, with long texts and colour profiles too."""
    from PIL import Image, PngImagePlugin

    names = ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY")
    limits = {name: getattr(PngImagePlugin, name) for name in names}
    try:
        for name in names:
            setattr(PngImagePlugin, name, TEXT_BYTES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        for name, limit in limits.items():
            setattr(PngImagePlugin, name, limit)


def _split_of(name: str) -> str | None:
    """The split that a picture's path says it belongs to."""
    top = name.partition(os.sep)[0].lower() if os.sep in name else ""
    return top if top in ("train", "test") else None


def _of_the_splits(place: Path, pictures: list[str]) -> tuple[list[str], list[str]]:
    """The pictures to take, and those that are in neither ``train`` nor ``test``.

    Raises:
        UserError: there is a ``train`` and, by another name, a part held out of it.
    """
    splits = {_split_of(name) for name in pictures}
    if {"train", "test"} <= splits:
        beside = [name for name in pictures if _split_of(name) is None]
        return [name for name in pictures if _split_of(name)], beside
    tops = {name.partition(os.sep)[0] for name in pictures if os.sep in name}
    held_out = sorted(top for top in tops if top.lower() in HELD_OUT)
    if "train" in splits and held_out:
        raise UserError(
            f"data.source: {place} holds train and {held_out[0]}, but no test: name "
            "the folder to test on test, or give the one to split"
        )
    return pictures, []


def list_pictures(folder: Path) -> tuple[list[str], list[str]]:
    """The files under a folder, by their path within it, sorted: pictures, and others.

    Hidden files and folders are passed over. A link to a folder is followed, but no
    folder is listed twice, so that links cannot make a loop.
    """

    def stop(error: OSError) -> None:
        raise error

    found, seen = list[str](), set[tuple[int, int]]()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.relpath(os.path.join(place, name), folder)
            for name in files
            if not name.startswith(".")
        ]
    found.sort()
    pictures = [name for name in found if name.lower().endswith(ENDINGS)]
    if not pictures:
        endings = ", ".join(ENDINGS)
        raise UserError(f"data.source: {folder} holds no picture (no {endings})")
    return pictures, [name for name in found if not name.lower().endswith(ENDINGS)]


def _describe(folder: Path, name: str) -> tuple[str, int, int]:
    """What shows that a file has changed."""
    try:
        about = os.stat(folder / name)
    except OSError:  # it will be among the broken ones
        return name, 0, 0
    return name, about.st_size, about.st_mtime_ns


def _label_of(name: str, has_splits: bool) -> str:
    """A picture's folder of the first level, or of the second below the splits."""
    parts = name.split(os.sep)[has_splits:]
    return parts[0] if len(parts) > 1 else ""


def _number(labels: list[str]) -> Integer[np.ndarray, "N"]:
    """Labels by their number in sorted order."""
    number = {label: i for i, label in enumerate(sorted(set(labels)))}
    numbers = np.array([number[label] for label in labels])
    return numbers.astype(np.min_scalar_type(max(0, len(number) - 1)))


def _show(name: str) -> str:
    return name if name.isprintable() else ascii(name)
