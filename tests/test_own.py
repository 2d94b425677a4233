"""Laws of ae_jax.data.own: what a picture becomes, what is refused, what streams."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from ae_jax import data
from ae_jax.data import Folder, ImageFile, Npz
from ae_jax.errors import UserError

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def folder_of(folder, **fields):
    return Folder(dir=folder.parent / "data", source=folder, **fields)


def npz_of(path, **fields):
    return Npz(dir=path.parent / "data", source=path, **fields)


@pytest.fixture
def folder(tmp_path):
    """An empty folder for pictures."""
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def fill(folder, count=10, shape=(4, 6), start=0):
    """Save so many grey pictures, each of one level: number i of level i."""
    folder.mkdir(exist_ok=True, parents=True)
    for level in range(start, start + count):
        picture = Image.fromarray(np.full(shape, level, np.uint8))
        picture.save(folder / f"{level:03}.png")


def decoded(path, channels=3, **fields):
    """What becomes of one picture, beside which its folder holds a copy of it."""
    only = path.parent.parent / f"only {path.name}"
    only.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (only / f"{name}{path.suffix}").write_bytes(path.read_bytes())
    dataset = data.load(folder_of(only, channels=channels, **fields))
    np.testing.assert_array_equal(dataset.train.images, dataset.test.images)
    return dataset.train.images[0] if channels == 3 else dataset.train.images[0, ..., 0]


# Formats


def test_plain_pictures_keep_every_pixel(folder):
    colours = noise(5, 7, 3)
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True})):
        Image.fromarray(colours).save(folder / name, **options)
        np.testing.assert_array_equal(decoded(folder / name), colours)
    grey = np.array(Image.fromarray(colours).convert("L"))
    np.testing.assert_array_equal(decoded(folder / "a.png", 1), grey)
    Image.fromarray(grey).save(folder / "grey.png")
    np.testing.assert_array_equal(decoded(folder / "grey.png", 1), grey)
    threefold = np.stack([grey] * 3, -1)
    np.testing.assert_array_equal(decoded(folder / "grey.png"), threefold)


def test_sixteen_bits_are_scaled_to_eight(folder):
    deep = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    found = decoded(folder / "deep.png", 1)
    np.testing.assert_array_equal(found, np.round(deep / 257))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_stands_on_white(folder, mode):
    picture = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    if mode != "P":
        picture.putpixel((2, 0), (0, 0, 0, 51))
    picture.convert(mode).save(folder / "a.png")
    found = decoded(folder / "a.png", 1)[0].tolist()
    assert found == [0, 255, 0 if mode == "P" else 204]


@pytest.mark.parametrize("mode", ["P", "1", "CMYK"])
def test_palettes_black_and_white_and_cmyk_become_their_colours(folder, mode):
    halves = np.zeros((8, 16, 3), np.uint8)
    halves[:, 8:] = 255 if mode == "1" else (255, 0, 0)
    path = folder / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(halves).convert(mode).save(path, quality=95)
    with Image.open(path) as picture:
        assert picture.mode == mode
    assert np.abs(decoded(path) - halves.astype(float)).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(folder, orientation):
    grey = noise(3, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(grey).save(folder / "a.png", exif=exif)
    turned = [
        grey, grey[:, ::-1], grey[::-1, ::-1], grey[::-1], grey.T, np.rot90(grey, -1),
        grey[::-1, ::-1].T, np.rot90(grey),
    ][orientation - 1]  # fmt: skip
    np.testing.assert_array_equal(decoded(folder / "a.png", 1), turned)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_of_an_animation_the_first_picture_is_taken(folder, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(
        folder / f"a.{ending}", save_all=True, append_images=frames[1:], lossless=True
    )
    assert (decoded(folder / f"a.{ending}") == [255, 0, 0]).all()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_the_shorter_side_is_resized_and_the_middle_taken(folder, ending):
    wide = np.zeros((40, 160), np.uint8)
    wide[:, 60:100] = 200
    for name, picture in (("wide", wide), ("tall", wide.T)):
        Image.fromarray(picture).save(folder / f"{name}.{ending}", quality=95)
        found = decoded(folder / f"{name}.{ending}", 1, image_size=8)
        assert found.shape == (8, 8)
        assert np.abs(found[1:-1, 1:-1].astype(int) - 200).max() <= 3
    Image.new("L", (1, 1), 77).save(folder / "dot.png")
    assert (decoded(folder / "dot.png", 1, image_size=8) == 77).all()


def test_a_large_jpeg_read_at_an_eighth_is_near_the_whole_one(folder):
    smooth = Image.fromarray(noise(6, 8, 3)).resize((1600, 1200), Image.BICUBIC)
    smooth.save(folder / "a.jpg", quality=95)
    smooth.save(folder / "a.png")
    pair = (decoded(folder / f"a.{end}", image_size=16) for end in ("jpg", "png"))
    assert np.abs(np.subtract(*(found.astype(int) for found in pair))).max() <= 4


# Folders


def levels(*splits):
    return [level for split in splits for level in split.images[:, 0, 0, 0].tolist()]


def test_a_folder_is_shuffled_by_its_seed_and_split(folder):
    fill(folder, 30)
    dataset = data.load(folder_of(folder, test_share=0.2))
    assert (dataset.source, dataset.shape) == ("directory", (4, 6, 1))
    assert (len(dataset.train.images), len(dataset.test.images)) == (24, 6)
    found = levels(dataset.train, dataset.test)
    assert sorted(found) == list(range(30)) != found
    assert data.load(folder_of(folder, test_share=0.2)).source == "prepared"
    other = data.load(folder_of(folder, test_share=0.2, split_seed=1))
    assert set(levels(other.test)) != set(levels(dataset.test))
    assert other.fingerprint != dataset.fingerprint


def test_labels_are_the_folders_of_the_first_level(folder):
    fill(folder / "b" / "deeper", 5, start=10)
    fill(folder / "a", 5)
    for i in range(300):
        fill(folder / f"c{i:03}", 1, start=i % 200 + 20)
    dataset = data.load(folder_of(folder))
    for split in (dataset.train, dataset.test):
        for level, label in zip(levels(split), split.labels.tolist(), strict=True):
            assert min(label, 2) == (level >= 10) + (level >= 20)
    assert dataset.train.labels.max() > 255


def test_the_place_of_a_folder_does_not_matter_but_its_content_does(folder):
    fill(folder, 12)
    first = data.load(folder_of(folder))
    moved = folder.rename(folder.parent / "moved")
    assert data.load(folder_of(moved)).source == "prepared"
    os.utime(moved / "003.png", (0, 0))
    again = data.load(folder_of(moved))
    assert again.source == "directory"  # for it may have changed
    assert again.fingerprint == first.fingerprint
    fill(moved, 1, start=12)
    again = data.load(folder_of(moved))
    assert sorted(levels(again.train, again.test)) == list(range(13))
    assert again.fingerprint != first.fingerprint


def test_odd_files_are_passed_over_and_odd_names_are_not(folder, capfd):
    fill(folder, 5)
    fill(folder / ".hidden", 1, start=100)
    fill(folder / "trap.png", 1, start=5)  # a folder, by its name a picture
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    (folder / "loop").symlink_to(folder)
    (folder / "again").symlink_to(folder / "trap.png")  # its pictures are listed once
    elsewhere = folder.parent / "elsewhere"
    fill(elsewhere, 1, start=6)
    (elsewhere / "back").symlink_to(folder)
    (folder / "linked").symlink_to(elsewhere)
    for level, name in enumerate(["ö 画 🎨.PNG", "a\nb.JPEG", b"\xff.webp"], start=7):
        path = os.fsencode(folder) + b"/" + os.fsencode(name)
        with open(path, "wb") as file:
            Image.new("L", (6, 4), level).save(file, "PNG")  # the content counts
    dataset = data.load(folder_of(folder, test_share=0.3))
    assert sorted(levels(dataset.train, dataset.test)) == list(range(10))
    message = capfd.readouterr().err
    assert message == f"preparing 10 pictures of {folder} (once) …\n"


def truncated(path):
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "PNG")
    path.write_bytes(whole.getvalue()[:2000])


BROKEN = {
    "truncated": (truncated, ""),
    "empty": (lambda path: path.write_bytes(b""), "no PNG, JPEG, WEBP"),
    "gif": (lambda path: Image.new("L", (4, 6)).save(path, "GIF"), "no PNG, JPEG"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "round": (lambda path: path.symlink_to(path), "Too many levels"),
    "bomb": (lambda p: Image.new("1", (10_000, 10_000)).save(p), "decompression bomb"),
    "bigger": (lambda p: Image.new("1", (20_000, 20_000)).save(p), "decompression b"),
    "pipe": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(folder, kind):
    make, message = BROKEN[kind]
    fill(folder, 5)
    make(folder / "x.png")
    with pytest.raises(UserError, match=rf"x\.png: .*{message}.*skip-broken") as caught:
        data.load(folder_of(folder))
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in (folder.parent / "data").iterdir()] == [".lock"]


def test_broken_files_are_left_out_and_counted_if_so_asked(folder, capfd):
    fill(folder, 20)
    for name, (make, _) in BROKEN.items():
        make(folder / f"{name}.png")
    dataset = data.load(folder_of(folder, skip_broken=True))
    assert sorted(levels(dataset.train, dataset.test)) == list(range(20))
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("left out 8 files that cannot be read, as bigger.png: ")
    again = data.load(folder_of(folder, skip_broken=True))
    assert (again.source, again.fingerprint) == ("prepared", dataset.fingerprint)
    with pytest.raises(UserError, match=r"bigger\.png"):
        data.load(folder_of(folder))


def add_size(folder):
    fill(folder, 3)
    Image.new("L", (9, 8)).save(folder / "other.png")


BAD_FOLDERS = {
    "empty": (lambda folder: None, r"holds no picture \(no \.png, \.jpg"),
    "other endings": (lambda f: (f / "a.gif").write_bytes(b""), "holds no picture"),
    "missing": (Path.rmdir, "is not there"),
    "a file": (lambda f: (f.rmdir(), f.write_bytes(b"")), "is not a folder; .* npz"),
    "none readable": (lambda f: (f / "a.png").write_bytes(b""), r"a\.png: no PNG"),
    "one": (lambda f: fill(f, 1), "has 1 readable image; .*two or more"),
    "sizes": (add_size, r"differ in size, as do .*9×8.*--data\.image-size"),
}


@pytest.mark.parametrize("bad", BAD_FOLDERS)
@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_bad_folder_is_told_in_one_line_and_leaves_nothing(folder, bad, skip_broken):
    make, message = BAD_FOLDERS[bad]
    make(folder)
    with pytest.raises(UserError, match=message) as caught:
        data.load(folder_of(folder, skip_broken=skip_broken))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.source: ")
    assert not list((folder.parent / "data").glob("folder-*[!k]"))


def test_preparing_a_folder_does_not_hold_its_pictures(folder):
    import tracemalloc

    peaks = []
    for count in (3, 30, 300):  # the first of them imports
        for i in range(count):
            Image.new("L", (200, 200), i % 256).save(folder / f"{i}.png")
        tracemalloc.start()
        data.load(folder_of(folder, streaming=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 9_000_000  # all would be 12 MB, and 4 are a block


# Files


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_file_is_shuffled_and_split_with_its_labels(tmp_path):
    pixels, labels = noise(30, 3, 4, 3), np.arange(30)
    path = save(tmp_path / "a.npz", images=pixels, labels=labels, other=labels)
    dataset = data.load(npz_of(path))
    assert (dataset.source, dataset.shape) == ("file", (3, 4, 3))
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (27, 3)
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(split.images, pixels[split.labels])
    other = data.load(npz_of(path, split_seed=1))
    assert set(other.test.labels) != set(dataset.test.labels)
    assert other.fingerprint != dataset.fingerprint
    assert not (tmp_path / "data").exists()


def test_given_splits_are_taken_as_they_are_and_labels_may_be_absent(tmp_path):
    train, test = np.asfortranarray(noise(4, 3, 2, 1)), noise(2, 3, 2)
    path = save(tmp_path / "a.npz", train_images=train, test_images=test)
    dataset = data.load(npz_of(path))
    np.testing.assert_array_equal(dataset.train.images, train)
    np.testing.assert_array_equal(dataset.test.images[..., 0], test)
    assert not dataset.train.labels.any()


IMAGES = np.zeros((5, 4, 4), np.uint8)
BAD_FILES = {
    "floats": (
        {"images": IMAGES / 255},
        r"images: .* 5×4×4.* of float64; .*\(255 \* i",
    ),
    "objects": ({"images": np.array([{}])}, "damaged, or no .npz file"),
    "flat": ({"images": IMAGES.reshape(5, 16)}, "height, width.*, not 5×16"),
    "channels": ({"images": np.zeros((5, 4, 4, 2), np.uint8)}, "channels 1 or 3"),
    "none": ({"images": IMAGES[:0]}, "none of them 0"),
    "one": ({"images": IMAGES[:1]}, "two or more"),
    "other names": ({"x": IMAGES, "y": IMAGES}, "must hold images, .* it holds x, y"),
    "half": ({"train_images": IMAGES}, "it holds train_images"),
    "both": (
        {"images": IMAGES, "train_images": IMAGES, "test_images": IMAGES},
        "or else train_images",
    ),
    "sizes": ({"train_images": IMAGES, "test_images": IMAGES[:, 1:]}, "differ in size"),
    "labels": ({"images": IMAGES, "labels": np.arange(4)}, "5 integers, .*, not 4 of"),
    "float labels": ({"images": IMAGES, "labels": np.ones(5)}, "labels: must be 5 int"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_file_is_told_in_one_line(tmp_path, bad, streaming):
    arrays, message = BAD_FILES[bad]
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        data.load(npz_of(path, streaming=streaming))
    assert "\n" not in str(caught.value)
    if bad != "sizes":
        assert not list((tmp_path / "data").glob("npz-*[!k]"))


@pytest.mark.parametrize("content", [b"", b"no zip", "npy", "cut", "flipped"])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_file_of_arrays_or_damaged_is_told_in_one_line(
    tmp_path, content, streaming
):
    path = save(tmp_path / "a.npz", images=noise(50, 8, 8))
    blob = bytearray(path.read_bytes())
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, IMAGES)
    elif content == "cut":
        path.write_bytes(blob[:-50])
    elif content == "flipped":
        blob[1000] ^= 1
        path.write_bytes(blob)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: damaged, or no \.npz file") as caught:
        data.load(npz_of(path, streaming=streaming))
    assert "\n" not in str(caught.value)


# Streaming


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_file_is_unpacked_once_into_what_it_is_in_memory(tmp_path, capfd, write):
    pixels = noise(30, 3, 4)
    for arrays in (
        {"images": pixels, "labels": np.arange(30)},
        {"train_images": pixels, "test_images": pixels[:4, ...]},
    ):
        write(tmp_path / "a.npz", **arrays)
        whole = data.load(npz_of(tmp_path / "a.npz"))
        for message in ("unpacking", ""):
            streamed = data.load(npz_of(tmp_path / "a.npz", streaming=True))
            assert streamed.describe() == whole.describe()
            assert capfd.readouterr().err.startswith(message)
            assert isinstance(streamed.train.images, ImageFile)
            for part in ("train", "test"):
                ours, theirs = getattr(streamed, part), getattr(whole, part)
                np.testing.assert_array_equal(ours.images[:], theirs.images)
                np.testing.assert_array_equal(ours.labels, theirs.labels)
        assert not capfd.readouterr().err
    assert not list((tmp_path / "data").glob("*/incomplete.*"))


def test_flipped_bits_of_what_is_streamed_are_noticed_at_the_start(tmp_path):
    path = save(tmp_path / "a.npz", images=noise(30, 3, 4))
    data.load(npz_of(path, streaming=True))
    [stored] = (tmp_path / "data").glob("*/train_images.npy")
    blob = bytearray(stored.read_bytes())
    blob[-5] ^= 4
    stored.write_bytes(blob)
    with pytest.raises(UserError, match="damaged; delete this folder"):
        data.load(npz_of(path, streaming=True))


@pytest.fixture(params=["in order", "shuffled"])
def pair(tmp_path, request):
    """Images on disk, and the same in memory."""
    pixels = noise(50, 2, 3, 1)
    np.save(tmp_path / "a.npy", pixels[..., 0])
    order = RNG.permutation(50) if request.param == "shuffled" else slice(None)
    return ImageFile(tmp_path / "a.npy").subset(order), pixels[order]


KEYS = [
    slice(None), slice(3, 9), slice(9, 3), slice(-4, None), slice(None, None, -7), 0,
    -1, np.int32(7), [4, 4, -30, 29], np.zeros(0, int), np.arange(6).reshape(2, 3),
    np.arange(34) % 3 == 0,
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_an_image_file_is_indexed_as_an_array_is(pair, key):
    ours, theirs = pair[0].subset(slice(5, 45)).subset(slice(1, 35)), pair[1][6:40]
    assert (len(ours), ours.shape, ours.dtype) == (34, theirs.shape, np.uint8)
    found = pickle.loads(pickle.dumps(ours))[key]
    assert (type(found), found.dtype) == (np.ndarray, np.uint8)
    np.testing.assert_array_equal(found, theirs[key])
    if np.ndim(theirs[key]) == 4:
        np.testing.assert_array_equal(ours.subset(key)[::-1], theirs[key][::-1])


@pytest.mark.parametrize("key", [50, -51, [0, 50], [True] * 49, 0.5, "a"], ids=str)
def test_images_that_are_not_there_are_refused(pair, key):
    with pytest.raises((IndexError, TypeError)):
        pair[0][key]


def test_threads_may_share_an_image_file(pair):
    images, array = pair
    found = {}

    def read(i):
        found[i] = all((images[k : k + 5] == array[k : k + 5]).all() for k in range(45))

    threads = [Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [True] * 4


def test_a_file_cut_short_while_it_is_read_is_told(tmp_path, pair):
    os.truncate(tmp_path / "a.npy", 200)
    with pytest.raises(UserError, match="cut short"):
        pair[0][:]


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from ae_jax import data

path, dir = map(Path, sys.argv[1:])
images = data.load(data.Npz(source=path, dir=dir, streaming=True)).train.images
rows = np.random.default_rng(0).integers(0, len(images), 20_000)
for batch in rows.reshape(-1, 500):
    images[batch]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_as_it_is_while_the_data_grow_a_hundredfold(tmp_path):
    peaks = []
    for count in (600, 60_000):
        path = tmp_path / f"{count}.npz"
        block = noise(600, 40, 40)
        save(path, images=np.concatenate([block] * (count // 600)))
        command = [sys.executable, "-c", MEMORY, path, tmp_path / "data"]
        peaks.append(int(subprocess.check_output(command, cwd=ROOT)))
    assert os.path.getsize(path) > 90_000_000
    assert peaks[1] - peaks[0] < 16_000  # kB; a block of 4 MB twice, the order 1 MB


# Options


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Folder, {"test_share": 1.0}, "test_share: .*less than 1, got 1.0"),
        (Npz, {"test_share": float("nan")}, "test_share"),
        (Folder, {"image_size": 0}, "image_size: .*greater than 0"),
        (Folder, {"channels": 2}, "channels: .*1 or 3"),
        (Npz, {"split_seed": -1}, "split_seed"),
        (data.Mnist, {"num_validation": -1}, "num_validation: .*equal to 0, got -1"),
    ],
)
def test_a_field_out_of_range_names_itself(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)


def test_a_source_must_be_given():
    for cls in (Folder, Npz):
        with pytest.raises(UserError, match=r"data\.source: give an? .* by --data\.so"):
            data.load(cls())
