"""The user's own images: a folder of pictures, or an .npz file.

A folder of pictures is decoded once, into a stored set named after what is in it, so
that training never waits for a decoder; so is a file whose images are streamed. What
is in a picture's file counts, not its ending: PNG, JPEG or WebP.
"""

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
from jaxtyping import Integer, UInt8
from pydantic import Field

from ae_jax.data import stored
from ae_jax.data.stored import Arrays, DataOptions, ImageFile, Source, say
from ae_jax.errors import UserError
from ae_jax.options import options

if TYPE_CHECKING:
    from PIL import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
"""Files that have one of these, in whatever case, are taken for pictures."""
FORMATS = ("PNG", "JPEG", "WEBP")


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

    def _split(self, images: Any, labels: Integer[np.ndarray, "N"]) -> Arrays:
        """Shuffle by the seed; the first ones are the test split: one at least."""
        count = len(labels)
        if count < 2:
            raise UserError(
                f"data.source: {self.source} has {count} readable image{'s'[count:]}; "
                "to train and to test takes two or more"
            )
        num_test = min(max(1, round(self.test_share * count)), count - 1)
        order = np.random.default_rng(self.split_seed).permutation(count)
        parts = (
            (stored.take(images, rows), labels[rows])
            for rows in (order[num_test:], order[:num_test])
        )
        return Arrays(*next(parts), *next(parts))


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
        parts = list[Any]()
        try:
            # NumPy would leave a damaged file open, if it were to open it itself.
            with path.open("rb") as file, np.load(file) as archive:
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
        except (OSError, MemoryError, UserError):
            raise
        except Exception as error:  # zipfile, zlib and NumPy each raise their own
            raise UserError(
                f"{path}: damaged, or no .npz file ({error}); write it by np.savez"
            ) from error
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


@options
class Folder(UserImages):
    """A folder of pictures; its subfolders of the first level give the labels."""

    channels: Literal[1, 3] = 1
    """1 makes all pictures grey, 3 makes them colour."""
    image_size: Annotated[int, Field(gt=0)] | None = None
    """Pixels to a side: each picture is scaled until its shorter side has as many, and
    its middle square is taken. None: all are of one size already."""
    skip_broken: bool = field(default=False, metadata={"resume": "free"})
    """Leave out files that cannot be read, instead of ending at the first one."""

    def load(self) -> Arrays:
        """The pictures, decoded the first time that the folder is seen as it is now.

        Raises:
            UserError: no folder, no pictures, a broken one, or they differ in size.
        """
        place = self._find_source("a folder")
        pictures = list_pictures(place)
        how = self.channels, self.image_size, self.skip_broken
        folder = self._folder(how, [_describe(place, name) for name in pictures])
        pixels = folder / "incomplete.pixels.npy"

        def prepare() -> Source:
            say(f"preparing {len(pictures):,} pictures of {place} (once) …")
            names = self._decode_all(pictures, pixels)
            images = ImageFile(pixels).subset(slice(len(names)))
            stored.store(folder, self._split(images, _labels_of(names)))
            return "directory"

        source = stored.prepare_once(folder, prepare)
        return stored.read_stored(folder, source, self.streaming)

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
        from PIL import Image
        from tqdm import tqdm

        broken = list[str]()
        for name in tqdm(pictures, unit=" pictures", disable=None, leave=False):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd, but readable, pictures
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = self._read(name)
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

    def _read(self, name: str) -> UInt8[np.ndarray, "H W C"] | str:
        """The pixels of one picture, or what is wrong with it."""
        from PIL import Image, ImageOps, UnidentifiedImageError

        path, side = cast(Path, self.source) / name, self.image_size
        try:
            if path.exists() and not path.is_file():  # a pipe would wait for ever
                return "not a file"
            with Image.open(path, formats=FORMATS) as image:
                if side is not None:  # a JPEG is read at an eighth of its size, faster
                    image.draft(None, (2 * side, 2 * side))
                plain = _convert(image, "L" if self.channels == 1 else "RGB")
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


def _convert(image: "Image.Image", mode: str) -> "Image.Image":
    """A picture of any mode in this one: upright, and on white."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def list_pictures(folder: Path) -> list[str]:
    """The files under a folder that may be pictures, by their path within it, sorted.

    Hidden files and folders are passed over. A link to a folder is followed, but no
    folder is listed twice, so that links cannot make a loop.
    """

    def stop(error: OSError) -> None:
        raise error

    pictures, seen = list[str](), set[tuple[int, int]]()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures += [
            os.path.relpath(os.path.join(place, name), folder)
            for name in files
            if name.lower().endswith(ENDINGS) and not name.startswith(".")
        ]
    if not pictures:
        endings = ", ".join(ENDINGS)
        raise UserError(f"data.source: {folder} holds no picture (no {endings})")
    return sorted(pictures)


def _describe(folder: Path, name: str) -> tuple[str, int, int]:
    """What shows that a file has changed."""
    try:
        about = os.stat(folder / name)
    except OSError:  # it will be among the broken ones
        return name, 0, 0
    return name, about.st_size, about.st_mtime_ns


def _labels_of(names: list[str]) -> Integer[np.ndarray, "N"]:
    """The number of each picture's folder of the first level, in sorted order."""
    folders = [name.partition(os.sep)[0] if os.sep in name else "" for name in names]
    number = {name: i for i, name in enumerate(sorted(set(folders)))}
    labels = np.array([number[name] for name in folders])
    return labels.astype(np.min_scalar_type(max(0, len(number) - 1)))


def _show(name: str) -> str:
    return name if name.isprintable() else ascii(name)
