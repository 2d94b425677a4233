"""Laws of ae_jax.images: what a picture becomes, what is refused, what streams."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_commands import command

from ae_jax import data, evaluate, images, records, run
from ae_jax.config import DataConfig, UserError, check_resumable
from ae_jax.images import Rows

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def folder_config(folder, **fields):
    fields = {"max_broken": 0.0, **fields}
    return DataConfig("folder", folder.parent / "data", folder, **fields)


def npz_config(path, **fields):
    return DataConfig("npz", path.parent / "data", path, **fields)


@pytest.fixture
def folder(tmp_path):
    """An empty folder for pictures."""
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def fill(folder, count=10, shape=(4, 6), start=0):
    """Save so many grey pictures, each of one level: number i of level i."""
    folder.mkdir(exist_ok=True, parents=True)
    for level in range(start, start + count):
        Image.fromarray(np.full(shape, level, np.uint8)).save(
            folder / f"{level:03}.png"
        )


def decoded(folder, path, channels=3, **fields):
    """What becomes of one picture, set among plain ones of its size."""
    config = folder_config(folder, channels=channels, **fields)
    return images._decode(path, config)


# --- Formats


def about(path, field):
    with Image.open(path) as picture:
        return getattr(picture, field)


def png16(pixels, clear=None):
    """A PNG of 16 bits of grey, made by hand; one level may be transparent."""
    height, width = pixels.shape

    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header)
    if clear is not None:
        parts += chunk(b"tRNS", struct.pack(">H", clear))
    parts += chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def test_plain_pictures_keep_every_pixel(folder):
    colours = noise(5, 7, 3)
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True})):
        Image.fromarray(colours).save(folder / name, **options)
        np.testing.assert_array_equal(decoded(folder, folder / name), colours)
    grey = np.array(Image.fromarray(colours).convert("L"))
    np.testing.assert_array_equal(decoded(folder, folder / name, 1), grey)
    Image.fromarray(grey).save(folder / "grey.png")
    np.testing.assert_array_equal(decoded(folder, folder / "grey.png", 1), grey)
    np.testing.assert_array_equal(
        decoded(folder, folder / "grey.png"), np.stack([grey] * 3, -1)
    )


def test_sixteen_bits_are_scaled_to_eight(folder):
    deep = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]])
    (folder / "deep.png").write_bytes(png16(deep))
    found = decoded(folder, folder / "deep.png", 1)
    np.testing.assert_array_equal(found, np.round(deep / 257))
    (folder / "clear.png").write_bytes(png16(deep, clear=32768))
    found = decoded(folder, folder / "clear.png", 1)
    np.testing.assert_array_equal(
        found, np.where(deep == 32768, 255, np.round(deep / 257))
    )


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_stands_on_white(folder, mode):
    picture = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    if mode != "P":
        picture.putpixel((2, 0), (0, 0, 0, 51))
    picture.convert(mode).save(folder / "a.png")
    found = decoded(folder, folder / "a.png", 1)[0].tolist()
    assert found == [0, 255, 0 if mode == "P" else 204]


def test_palettes_become_their_colours_and_black_and_white_extremes(folder):
    colours = np.repeat(noise(4, 1, 3), 6, axis=1)
    Image.fromarray(colours).quantize(4).save(folder / "palette.png")
    assert about(folder / "palette.png", "mode") == "P"
    np.testing.assert_array_equal(decoded(folder, folder / "palette.png"), colours)
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(folder / "1.png")
    assert decoded(folder, folder / "1.png", 1).tolist() == [[0, 255]]


def test_cmyk_becomes_colour(folder):
    red = Image.new("RGB", (16, 16), "red")
    red.convert("CMYK").save(folder / "a.jpg", quality=95)
    assert about(folder / "a.jpg", "mode") == "CMYK"
    assert np.abs(decoded(folder, folder / "a.jpg") - np.array([255.0, 0, 0])).max() < 8


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
    np.testing.assert_array_equal(decoded(folder, folder / "a.png", 1), turned)


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_of_an_animation_the_first_picture_is_taken(folder, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(
        folder / f"a.{ending}", save_all=True, append_images=frames[1:], lossless=True
    )
    assert about(folder / f"a.{ending}", "n_frames") == 2
    assert (decoded(folder, folder / f"a.{ending}") == [255, 0, 0]).all()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_the_shorter_side_is_resized_and_the_middle_taken(folder, ending):
    wide = np.zeros((40, 160), np.uint8)
    wide[:, 60:100] = 200
    for name, picture in (("wide", wide), ("tall", wide.T)):
        Image.fromarray(picture).save(folder / f"{name}.{ending}", quality=95)
        found = decoded(folder, folder / f"{name}.{ending}", 1, image_size=8)
        assert found.shape == (8, 8)
        assert np.abs(found[1:-1, 1:-1].astype(int) - 200).max() <= 3
    Image.new("L", (1, 1), 77).save(folder / "dot.png")
    assert (decoded(folder, folder / "dot.png", 1, image_size=8) == 77).all()


def test_a_large_jpeg_read_at_an_eighth_is_near_the_whole_one(folder):
    smooth = Image.fromarray(noise(6, 8, 3)).resize((1600, 1200), Image.BICUBIC)
    smooth.save(folder / "a.jpg", quality=95)
    smooth.save(folder / "a.png")
    pair = (decoded(folder, folder / f"a.{e}", image_size=16) for e in ("jpg", "png"))
    assert np.abs(np.subtract(*(found.astype(int) for found in pair))).max() <= 4


# --- Folders


def levels(split):
    return split.images[:, 0].tolist()


def test_a_folder_is_shuffled_by_its_seed_and_split(folder):
    fill(folder, 30)
    config = folder_config(folder, test_share=0.2)
    dataset = data.load(config)
    assert dataset.shape == (4, 6)
    assert (len(dataset.train.images), len(dataset.test.images)) == (24, 6)
    found = levels(dataset.train) + levels(dataset.test)
    assert sorted(found) == list(range(30)) != found
    assert data.load(config).source == "prepared"
    other = data.load(folder_config(folder, test_share=0.2, split_seed=1))
    assert set(levels(other.test)) != set(levels(dataset.test))
    held = data.load(folder_config(folder, test_share=0.2, num_validation=4))
    assert levels(held.train) + levels(held.validation) == levels(dataset.train)
    assert held.fingerprint == dataset.fingerprint != other.fingerprint


def test_labels_are_the_folders_of_the_first_level(folder):
    fill(folder / "b" / "deeper", 5, start=10)
    fill(folder / "a", 5)
    dataset = data.load(folder_config(folder))
    for split in (dataset.train, dataset.test):
        assert split.labels.tolist() == [int(level >= 10) for level in levels(split)]


def test_more_than_256_classes_have_labels_of_their_own(folder):
    for i in range(300):
        fill(folder / f"{i:03}", 1, start=i % 256)
    labels = data.load(folder_config(folder)).train.labels
    assert len(set(labels.tolist())) == 270
    assert labels.max() > 255


def test_the_place_of_a_folder_and_the_times_of_its_files_do_not_matter(folder):
    fill(folder, 12)
    first = data.load(folder_config(folder))
    moved = folder.rename(folder.parent / "moved")
    os.utime(moved / "003.png", (0, 0))
    again = data.load(folder_config(moved))
    assert again.source == "directory"  # for it may have changed
    assert again.fingerprint == first.fingerprint


def test_a_folder_that_changed_is_prepared_anew(folder):
    fill(folder, 12)
    first = data.load(folder_config(folder))
    fill(folder, 1, start=12)
    again = data.load(folder_config(folder))
    assert len(again.train.images) + len(again.test.images) == 13
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
    dataset = data.load(folder_config(folder, test_share=0.3))
    assert sorted(levels(dataset.train) + levels(dataset.test)) == list(range(10))
    told = capfd.readouterr().err
    assert told == f"preparing 10 pictures of {folder} (once) …\n"


def test_a_camera_picture_of_two_views_and_garbled_exif_data_are_read(folder):
    view = Image.fromarray(noise(8, 8, 3))
    view.save(folder / "plain.jpg")
    view.save(folder / "views.jpg", "MPO", save_all=True, append_images=[view])
    view.save(folder / "exif.jpg", exif=b"Exif\0\0garbage")
    dataset = data.load(folder_config(folder, channels=3))
    found = np.concatenate([dataset.train.images, dataset.test.images])
    assert (found == found[0]).all()


def make_broken(folder):
    """Files that no one can read; returns how many there are."""
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "PNG")
    (folder / "truncated.png").write_bytes(whole.getvalue()[:2000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.webp").write_text("wrong ending")
    Image.new("L", (4, 6)).save(folder / "gif.png", "GIF")
    (folder / "dangling.png").symlink_to(folder / "nowhere")
    (folder / "round.png").symlink_to(folder / "round.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(folder / "smaller bomb.png")
    os.mkfifo(folder / "pipe.png")
    return 9


def test_broken_files_are_listed_once_and_left_out(folder, capfd):
    fill(folder, 20)
    count = make_broken(folder)
    config = folder_config(folder, max_broken=count / (20 + count))
    dataset = data.load(config)
    assert sorted(levels(dataset.train) + levels(dataset.test)) == list(range(20))
    told = capfd.readouterr().err
    assert f"left out: {count} of {20 + count} files" in told
    for line in (
        "bomb.png: 20000×20000", "smaller bomb.png: 10000×10000, taken for a bomb",
        "empty.jpg: no PNG, JPEG, WEBP", "dangling.png: No such file",
        "round.png: Too many levels", "pipe.png: not a file", "truncated.png: ",
    ):  # fmt: skip
        assert line in told or line.startswith("bomb"), line
    (listed,) = (folder.parent / "data").glob("folder-*/broken.txt")
    assert len(listed.read_text().splitlines()) == count
    data.load(config)
    assert not capfd.readouterr().err


def test_too_many_broken_files_are_fatal_until_they_are_allowed(folder, capfd):
    fill(folder, 12)
    for i in range(14):
        (folder / f"broken{i:02}.jpg").write_bytes(b"x")
    for _ in "once", "again":
        with pytest.raises(
            UserError, match=r"14 of 26 files.*broken09.*; and 4 more; "
        ):
            data.load(folder_config(folder, max_broken=0.5))
    capfd.readouterr()
    dataset = data.load(folder_config(folder, max_broken=0.6))
    assert len(dataset.train.images) == 11
    assert not capfd.readouterr().err  # they are decoded, and were told


@contextlib.contextmanager
def without_privileges():
    """Root may read everything: be somebody else for a while."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_without_permission_a_file_is_broken_and_a_folder_fatal():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        folder.mkdir()
        fill(folder, 5)
        # Another set of them: it imports what it needs, before it may not.
        data.load(folder_config(folder, split_seed=1))
        config = folder_config(folder)
        for path in (folder.parent, *folder.parent.rglob("*")):
            path.chmod(0o777)
        (folder / "000.png").chmod(0)
        refused = r"1 of 5 files.*000\.png: Permission denied"
        with without_privileges(), pytest.raises(UserError, match=refused):
            data.load(config)
        (folder / "closed").mkdir(0)
        refused = r"cannot read the folder .*closed"
        with without_privileges(), pytest.raises(UserError, match=refused):
            data.load(config)


def add_size(folder):
    fill(folder, 3)
    Image.new("L", (9, 8)).save(folder / "other.png")


def break_all(folder):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"")


BAD_FOLDERS = {
    "empty": (lambda folder: None, r"holds no picture \(no \.png, \.jpg"),
    "other endings": (lambda f: (f / "a.gif").write_bytes(b""), "holds no picture"),
    "missing": (Path.rmdir, "is not there"),
    "a file": (lambda f: (f.rmdir(), f.write_bytes(b"")), "is not a folder"),
    "none readable": (break_all, r"none of the 2 files .*: a\.png: no PNG.*; b\.png"),
    "one": (lambda f: fill(f, 1), "has 1 readable image; .*two or more"),
    "sizes": (add_size, r"differ in size, as do .*9×8.*--data\.image-size"),
}


@pytest.mark.parametrize("bad", BAD_FOLDERS)
def test_a_bad_folder_is_told_in_one_line_and_leaves_nothing(folder, bad):
    make, told = BAD_FOLDERS[bad]
    make(folder)
    with pytest.raises(UserError, match=told) as caught:
        data.load(folder_config(folder))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("data.source: ")
    assert not list((folder.parent / "data").glob("folder-*/*"))


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_a_source_must_be_given(name):
    with pytest.raises(UserError, match=f"data.name {name} needs .*--data.source"):
        data.load(DataConfig(name))


def test_mixed_sizes_become_one_that_is_asked_for(folder):
    fill(folder, 3)
    fill(folder, 3, shape=(9, 5), start=3)
    dataset = data.load(folder_config(folder, image_size=4, channels=3))
    assert dataset.shape == (4, 4, 3)
    assert sorted(levels(dataset.train) + levels(dataset.test)) == list(range(6))


def test_a_file_that_vanishes_meanwhile_is_broken(folder):
    fill(folder, 5)
    config = folder_config(folder)
    listed = images.list_pictures(folder)
    (folder / "002.png").unlink()
    place = folder.parent / "place"
    place.mkdir()
    images.prepare(listed, config, place)
    assert (place / "broken.txt").read_text() == "002.png: No such file or directory\n"


def test_what_a_killed_preparation_left_is_removed(folder):
    fill(folder, 5)
    dataset = data.load(folder_config(folder))
    (made,) = (folder.parent / "data").glob("folder-*/")
    (made / "decoded.npz").rename(made / "incomplete.decoded.npz")
    (made / "incomplete.pixels").write_bytes(b"half")
    assert data.load(folder_config(folder)).fingerprint == dataset.fingerprint
    assert {path.name for path in made.iterdir()} == {"decoded.npz", "broken.txt"}


def test_a_damaged_copy_is_refused(folder):
    fill(folder, 5)
    data.load(folder_config(folder))
    (path,) = (folder.parent / "data").glob("folder-*/decoded.npz")
    blob = bytearray(path.read_bytes())
    blob[images.read_members(path)["train_images"].offset] ^= 1
    path.write_bytes(blob)
    with pytest.raises(UserError, match="damaged; delete this folder"):
        data.load(folder_config(folder))


# --- .npz files


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_images_of_a_file_are_shuffled_by_the_seed_and_split(tmp_path):
    pixels, labels = noise(20, 3, 4), np.arange(20)
    path = save(tmp_path / "a.npz", images=pixels, labels=labels)
    dataset = data.load(npz_config(path, test_share=0.25))
    assert (len(dataset.train.images), len(dataset.test.images)) == (15, 5)
    for split in (dataset.train, dataset.test):
        np.testing.assert_array_equal(
            split.images, pixels[split.labels].reshape(-1, 12)
        )
    joined = [*dataset.train.labels, *dataset.test.labels]
    assert sorted(joined) == list(range(20)) != joined
    other = data.load(npz_config(path, test_share=0.25, split_seed=1))
    assert other.fingerprint != dataset.fingerprint


def test_splits_of_a_file_are_taken_as_they_are(tmp_path):
    train, test = noise(7, 3, 4, 3), noise(2, 3, 4, 3)
    path = save(tmp_path / "a.npz", train_images=train, test_images=test)
    dataset = data.load(npz_config(path))
    assert dataset.shape == (3, 4, 3)
    np.testing.assert_array_equal(dataset.train.images, train.reshape(7, -1))
    np.testing.assert_array_equal(dataset.test.images, test.reshape(2, -1))
    assert not dataset.train.labels.any()


def test_a_single_channel_is_grey_and_fortrans_order_is_read(tmp_path):
    pixels = np.asfortranarray(noise(4, 3, 2, 1))
    path = save(tmp_path / "a.npz", train_images=pixels, test_images=pixels)
    dataset = data.load(npz_config(path))
    assert dataset.shape == (3, 2)
    np.testing.assert_array_equal(dataset.test.images, pixels.reshape(4, 6))


IMAGES = np.zeros((5, 4, 4), np.uint8)
BAD_FILES = {
    "floats": ({"images": IMAGES / 255}, r"images is of float64, .*\(255 \* images\)"),
    "objects": ({"images": np.array([{}])}, "images is of object"),
    "flat": ({"images": IMAGES.reshape(5, 16)}, "images is 5×16, must be N×height"),
    "channels": ({"images": np.zeros((5, 4, 4, 2), np.uint8)}, "1 or 3 channels"),
    "first": ({"images": np.zeros((5, 3, 4, 4), np.uint8)}, "1 or 3 channels"),
    "none": ({"images": IMAGES[:0]}, "none of them 0"),
    "one": ({"images": IMAGES[:1]}, "two or more"),
    "other names": ({"x": IMAGES, "y": IMAGES}, "must hold images, .* it holds x, y"),
    "half": ({"train_images": IMAGES}, "it holds train_images"),
    "both": (
        {"images": IMAGES, "train_images": IMAGES, "test_images": IMAGES},
        "or else train_images",
    ),
    "sizes": ({"train_images": IMAGES, "test_images": IMAGES[:, 1:]}, "differ in size"),
    "labels": ({"images": IMAGES, "labels": np.arange(4)}, "are 4, for 5 images"),
    "float labels": ({"images": IMAGES, "labels": np.ones(5)}, "must be integers"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_file_is_told_in_one_line(tmp_path, bad, streaming):
    arrays, told = BAD_FILES[bad]
    path = save(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=told) as caught:
        data.load(npz_config(path, streaming=streaming))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no zip", "npy", "cut", "flipped"])
def test_what_is_no_file_of_arrays_or_damaged_is_told_in_one_line(tmp_path, content):
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
        data.load(npz_config(path))
    assert "\n" not in str(caught.value)


# --- Streaming


def assert_same_data(streamed, whole):
    assert streamed.fingerprint == whole.fingerprint
    assert streamed.shape == whole.shape
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(streamed, name), getattr(whole, name)
        assert isinstance(ours.images, Rows)
        assert isinstance(theirs.images, np.ndarray)
        assert ours.images.shape == theirs.images.shape
        np.testing.assert_array_equal(ours.images[:], theirs.images)
        np.testing.assert_array_equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_streamed_folder_is_that_in_memory(folder, channels):
    fill(folder / "a", 20)
    fill(folder / "b", 9, start=20)
    fields = {"channels": channels, "num_validation": 5}
    assert_same_data(
        data.load(folder_config(folder, streaming=True, **fields)),
        data.load(folder_config(folder, **fields)),
    )


@pytest.mark.parametrize("kind", ["images", "splits"])
def test_a_streamed_file_is_that_in_memory_even_if_only_that_can_be_compressed(
    tmp_path, kind
):
    pixels, labels = noise(30, 3, 4, 3), np.arange(30)
    arrays = {"images": pixels, "labels": labels}
    if kind == "splits":
        arrays = {"train_images": pixels, "test_images": pixels[:4, ...]}
    path = save(tmp_path / "a.npz", **arrays)
    whole = data.load(npz_config(path, num_validation=5))
    assert_same_data(
        data.load(npz_config(path, num_validation=5, streaming=True)), whole
    )
    np.savez_compressed(path, **arrays)
    assert (
        data.load(npz_config(path, num_validation=5)).fingerprint == whole.fingerprint
    )
    with pytest.raises(UserError, match=r"cannot be streamed; write it by np\.savez"):
        data.load(npz_config(path, streaming=True))


def test_streamed_mnist_is_that_in_memory(mnist):
    streamed = data.load(DataConfig(dir=ROOT / "data", streaming=True))
    assert_same_data(
        streamed, mnist._replace() if hasattr(mnist, "_replace") else mnist
    )


@pytest.fixture
def pair(tmp_path):
    """Rows on disk in a shuffled order, and the same in memory."""
    pixels = noise(50, 2, 3)
    rows = images.open_rows(save(tmp_path / "a.npz", images=pixels), "images")
    order = RNG.permutation(50).astype(np.int32)
    return rows.take(order), pixels.reshape(50, 6)[order]


KEYS = [
    slice(None), slice(3, 9), slice(9, 3), slice(-4, None), slice(None, None, -7), 0,
    -1, np.int32(7), [4, 4, -50, 49], [], np.arange(6).reshape(2, 3), range(5),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("part", [False, True])
def test_rows_are_indexed_as_an_array_is(tmp_path, pair, key, part):
    rows, array = pair
    plain = images.open_rows(tmp_path / "a.npz", "images")
    for ours, theirs in ((rows, array), (plain, plain[:])):
        if part:
            key = slice(2, 9) if isinstance(key, list | range) and key else key
            ours, theirs = ours.part(5, 45).part(1, 40), theirs[5:45][1:40]
        index = np.array(key, int) if isinstance(key, list | range) else key
        assert (len(ours), ours.ndim, ours.dtype) == (len(theirs), 2, np.uint8)
        found = ours[key]
        assert (found.dtype, found.flags.c_contiguous) == (np.uint8, True)
        np.testing.assert_array_equal(found, theirs[index])


def test_rows_taken_of_rows_taken_are_as_of_an_array(pair):
    rows, array = pair
    some = np.array([7, 3, 3, 40], np.int32)
    np.testing.assert_array_equal(rows.part(5, 50).take(some)[1:], array[5:][some][1:])


@pytest.mark.parametrize("key", [50, -51, [0, 50], [True] * 50, 0.5, "a"], ids=str)
def test_rows_that_are_not_there_are_refused(pair, key):
    with pytest.raises((IndexError, TypeError)):
        pair[0][key]


def test_threads_may_share_rows(pair):
    rows, array = pair
    found = {}

    def read(i):
        found[i] = all((rows[k : k + 5] == array[k : k + 5]).all() for k in range(45))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [True] * 4


def test_the_file_is_closed_with_the_last_that_refers_to_it(tmp_path):
    def handles():
        links = [
            os.path.realpath(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
        ]
        return links.count(str(tmp_path / "a.npz"))

    rows = images.open_rows(save(tmp_path / "a.npz", images=noise(9, 2, 2)), "images")
    part = rows.part(0, 3)
    del rows
    assert (handles(), part[:].shape) == (1, (3, 4))
    del part
    assert handles() == 0


def test_a_file_cut_short_while_it_is_read_is_told(tmp_path):
    path = save(tmp_path / "a.npz", images=noise(90, 20, 20))
    rows = images.open_rows(path, "images")
    os.truncate(path, 20_000)
    with pytest.raises(UserError, match="cut short"):
        rows[:]


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from ae_jax import data, evaluate
from ae_jax.config import DataConfig

config = DataConfig("npz", Path("unused"), Path(sys.argv[1]), streaming=True)
dataset = data.load(config)
evaluate.mean_image_mse(dataset.train.images, dataset.test.images)
rows = np.random.default_rng(0).integers(0, len(dataset.train.images), 2000)
for batch in rows.reshape(-1, 50):
    dataset.train.images[batch]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_as_it_is_while_the_data_grow_a_hundredfold(tmp_path):
    peaks = []
    for count in (600, 60_000):
        path = tmp_path / f"{count}.npz"
        block = noise(600, 40, 40)
        save(path, images=np.concatenate([block] * (count // 600)))
        command = [sys.executable, "-c", MEMORY, str(path)]
        peaks.append(int(subprocess.check_output(command, cwd=ROOT)))
    assert os.path.getsize(path) > 90_000_000
    assert peaks[1] - peaks[0] < 10_000  # kB; the order of the rows takes 240


def test_preparing_a_folder_does_not_hold_its_pictures(folder):
    import tracemalloc

    peaks = []
    for count in (30, 300):
        for i in range(count):
            Image.new("L", (200, 200), i % 256).save(folder / f"{i}.png")
        config = folder_config(folder)
        place = folder.parent / f"{count}"
        place.mkdir()
        images.prepare(images.list_pictures(folder)[:2], config, place)  # imports
        tracemalloc.start()
        images.prepare(images.list_pictures(folder), config, place)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 1_000_000 < 8_000_000  # all would be 12 MB


def test_baselines_are_the_same_streamed(tmp_path):
    pixels = (
        noise(700, 6, 6) // 2 + np.arange(36, dtype=np.uint8).reshape(6, 6)
    ).astype(np.uint8)
    path = save(tmp_path / "a.npz", images=pixels)
    scores = [
        (
            evaluate.mean_image_mse(found.train.images, found.test.images),
            evaluate.pca_mse(found.train.images, found.test.images, 3),
        )
        for found in (data.load(npz_config(path, streaming=s)) for s in (False, True))
    ]
    assert scores[0] == scores[1]


# --- The commands


def tutorial(place, *options):
    small = ("--train.num-epochs", "2", "--train.batch-size", "8")
    return command(
        *("-m", "experiments.tutorial", "--run-dir", place / "run", *small),
        *("--data.name", "folder", "--data.source", place / "pictures"),
        *("--data.dir", place / "data", *options),
    )


def test_a_folder_in_colour_trains_the_convolutions_and_draws_in_colour(folder):
    reddish = noise(40, 9, 12, 3) // 2 + np.array([127, 0, 0], np.uint8)
    for i, pixels in enumerate(reddish):
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    place = folder.parent
    options = (
        *("--data.channels", "3", "--data.num-validation", "4"),
        *("--model.name", "conv", "--model.hidden", "4", "8"),
    )
    done = tutorial(place, *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("preparing 40 pictures")
    summary = records.read_summary(place / "run")
    for script in ("evaluate", "plot"):
        again = command(ROOT / "scripts" / f"{script}.py", place / "run")
        assert (again.returncode, again.stderr) == (0, "")
        if script == "evaluate":
            assert f"test/mse           {summary['test/mse']:.6g}" in again.stdout
    for name in ("samples", "reconstructions_by_epoch", "test_reconstructions"):
        with Image.open(place / "run" / "figures" / f"{name}.png") as figure:
            red, _, blue = np.moveaxis(np.asarray(figure.convert("RGB"), int), 2, 0)
        assert (red - blue).max() > 50
    # Scores of images on disk are those of the same in memory, to the bit.
    opened = run.open_run(place / "run")
    streamed = replace(opened.config.data, streaming=True)
    test = data.load(streamed).test
    assert isinstance(test.images, Rows)
    scores = run.score(opened, test, "test", (9, 12, 3))
    assert scores.items() <= summary.items()

    # What decides no bit may change when a run goes on, its pictures may not.
    free = replace(opened.config.data, max_broken=1.0, source=Path("elsewhere"))
    check_resumable(opened.config, replace(opened.config, data=free))
    fill(folder, 1, shape=(9, 12))
    other = tutorial(place, *options, "--train.num-epochs", "4")
    assert other.returncode == 2
    assert "trained on other data" in other.stderr.splitlines()[-1]
    refused = command(ROOT / "scripts" / "convert.py", place / "run", place / "run.pt")
    assert refused.returncode == 2
    assert "a run of the model conv; only those of autoencoder" in refused.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--data.source", "nowhere"), "error: data.source: nowhere is not there"),
        (("--data.name", "npz"), "is not an .npz file"),
        (("--model.name", "conv"), "error: model.hidden: 3 stages"),
    ],
)
def test_the_command_ends_in_one_line_and_leaves_no_run(folder, options, told):
    fill(folder, 4, shape=(4, 4))
    done = tutorial(folder.parent, *options)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (folder.parent / "run").exists()


# --- Options


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"name": "digits", "channels": 3},
            r"data\.channels: only for data.name folder",
        ),
        ({"name": "npz", "image_size": 8}, r"data\.image_size: only for .* not npz"),
        ({"name": "mnist", "test_share": 0.2}, r"only for data\.name folder or npz"),
        (
            {"name": "folder", "test_share": 1.0},
            r"data\.test_share: must be in \(0, 1\)",
        ),
        ({"name": "folder", "test_share": float("nan")}, r"data\.test_share"),
        ({"name": "folder", "max_broken": -0.1}, r"data\.max_broken"),
        ({"name": "folder", "image_size": 0}, r"data\.image_size"),
        ({"name": "folder", "split_seed": -1}, r"data\.split_seed"),
    ],
)
def test_a_field_out_of_place_or_range_names_itself(fields, told):
    with pytest.raises(ValueError, match=told):
        DataConfig(**fields)
