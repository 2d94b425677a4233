"""Laws of ae_jax.data.own: what a picture becomes, what is refused, what streams."""

import io
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import life
import numpy as np
import pytest
from conftest import noise
from PIL import Image, PngImagePlugin

from ae_jax import data
from ae_jax.data import Folder, ImageFile, Npz, stored
from ae_jax.errors import UserError


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
    """Save so many grey pictures: number i of level i, but for a white last pixel."""
    folder.mkdir(exist_ok=True, parents=True)
    for level in range(start, start + count):
        pixels = np.full(shape, level, np.uint8)
        pixels[-1, -1] = 255
        Image.fromarray(pixels).save(folder / f"{level:03}.png")


def decoded(path, channels, **fields):
    """What becomes of one picture, beside which its folder holds a copy of it."""
    only = path.parent.parent / f"only {path.name}"
    only.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (only / f"{name}{path.suffix}").write_bytes(path.read_bytes())
    dataset = data.load(folder_of(only, channels=channels, **fields))
    np.testing.assert_array_equal(dataset.train.images, dataset.test.images)
    return dataset.train.images[0] if channels == 3 else dataset.train.images[0, ..., 0]


# Formats

COLOURS, GREY = noise(5, 7, 3), noise(3, 5)
BLACK_OR_WHITE = np.where(GREY > 127, 255, 0).astype(np.uint8)
DEEP = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], np.uint16)
GLASS = np.array([[[0, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
HALVES = np.zeros((8, 16, 3), np.uint8)
HALVES[:, 8:] = (255, 0, 0)
PICTURES = {
    "colours.png": (COLOURS, None, COLOURS),
    "colours.webp": (COLOURS, None, COLOURS),
    "colours made grey.png": (
        COLOURS,
        None,
        np.array(Image.fromarray(COLOURS).convert("L")),
    ),
    "grey.png": (GREY, None, GREY),
    "grey made colours.png": (GREY, None, np.stack([GREY] * 3, -1)),
    "black or white.png": (BLACK_OR_WHITE, "1", BLACK_OR_WHITE),
    "16 bits.png": (DEEP, None, np.round(DEEP / 257)),
    "glass.png": (GLASS, None, np.array([[0, 255, 204]])),
    "colours.bmp": (COLOURS, None, COLOURS),
    "palette.gif": (HALVES, "P", HALVES),
    "16 bits.tiff": (DEEP, None, np.round(DEEP / 257)),
    "grey glass.png": (GLASS, "LA", np.array([[0, 255, 204]])),
    "palette of glass.png": (GLASS, "P", np.array([[0, 255, 204]])),
    "palette.png": (HALVES, "P", HALVES),
    "CMYK.jpg": (HALVES, "CMYK", HALVES),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_becomes_what_it_shows_on_white(folder, name):
    array, mode, expected = PICTURES[name]
    picture = Image.fromarray(array)
    picture = picture.convert(mode) if mode else picture
    picture.save(folder / name, lossless=True, quality=95)
    with Image.open(folder / name) as saved:
        assert saved.mode == picture.mode
    found = decoded(folder / name, channels=1 if expected.ndim == 2 else 3)
    limit = 8 if name.endswith("jpg") else 0
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(GREY).save(folder / "a.png", exif=exif)
    turned = [
        GREY, GREY[:, ::-1], GREY[::-1, ::-1], GREY[::-1], GREY.T, np.rot90(GREY, -1),
        GREY[::-1, ::-1].T, np.rot90(GREY),
    ][orientation - 1]  # fmt: skip
    np.testing.assert_array_equal(decoded(folder / "a.png", 1), turned)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_of_an_animation_the_first_picture_is_taken(folder, name):
    red, blue = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    red.save(folder / name, save_all=True, append_images=[blue], lossless=True)
    assert (decoded(folder / name, 3) == [255, 0, 0]).all()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_the_shorter_side_is_resized_and_the_middle_taken(folder, ending):
    wide = np.zeros((40, 160), np.uint8)
    wide[:, 60:100] = 200
    for name, array in (("wide", wide), ("tall", wide.T)):
        Image.fromarray(array).save(folder / f"{name}.{ending}", quality=95)
        found = decoded(folder / f"{name}.{ending}", 1, image_size=8)
        assert found.shape == (8, 8)
        assert np.abs(found[1:-1, 1:-1].astype(int) - 200).max() <= 3
    Image.new("L", (1, 1), 77).save(folder / "dot.png")
    assert (decoded(folder / "dot.png", 1, image_size=8) == 77).all()


def test_a_picture_with_a_long_text_or_profile_is_read(folder):
    about = PngImagePlugin.PngInfo()
    about.add_text("comment", "x" * 5_000_000, zip=True)
    Image.fromarray(GREY).save(folder / "a.png", pnginfo=about)
    Image.fromarray(GREY).save(folder / "b.png", icc_profile=bytes(3_000_000))
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(decoded(folder / name, 1), GREY)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK


def test_a_large_jpeg_read_at_an_eighth_is_near_the_whole_one(folder):
    smooth = Image.fromarray(noise(6, 8, 3)).resize((800, 600), Image.BICUBIC)
    smooth.save(folder / "a.jpg", quality=95)
    smooth.save(folder / "a.png", compress_level=1)
    pair = (decoded(folder / f"a.{end}", 3, image_size=16) for end in ("jpg", "png"))
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
    other = data.load(folder_of(folder, test_share=0.2, split_seed=1))
    assert set(levels(other.test)) != set(levels(dataset.test))
    for share, num_test in ((0.01, 1), (0.99, 29)):  # neither split is ever empty
        dataset = data.load(folder_of(folder, test_share=share))
        assert len(dataset.test.labels) == num_test


def test_what_was_prepared_in_one_way_is_not_taken_for_another(folder):
    fill(folder, 12)
    ways = ({}, {"test_share": 0.4}, {"split_seed": 1}, {"channels": 3})
    for fields in (*ways, {"image_size": 5}):
        shared, alone = (
            data.load(Folder(dir=folder.parent / place, source=folder, **fields))
            for place in ("data", f"data of {fields}")
        )
        assert (shared.source, shared.fingerprint) == ("directory", alone.fingerprint)


def test_labels_are_the_folders_of_the_first_level(folder):
    fill(folder / "b" / "deeper", 3, start=10)
    fill(folder / "b", 2, start=13)
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


def test_splits_that_the_folder_makes_are_taken(folder, capfd):
    """Split again at random, nine of ten of the test pictures would be trained on."""
    for place, levels_of in {
        "Train/cat": range(3), "Train/dog": range(3, 8), "test/dog": range(8, 10),
        "test/emu": range(10, 11), "masks": range(100, 104), "validation": [105],
    }.items():  # fmt: skip
        for level in levels_of:
            fill(folder / place, 1, start=level)
    dataset = data.load(folder_of(folder))
    found = [
        sorted(zip(levels(split), split.labels.tolist(), strict=True))
        for split in (dataset.train, dataset.test)
    ]
    assert found == [
        [(level, int(level > 2)) for level in range(8)],
        [(8, 1), (9, 1), (10, 2)],
    ]
    _, passed, labels = capfd.readouterr().err.splitlines()
    assert passed == "passed over 5 files (5 .png), as masks/100.png"
    assert labels == "labels, from 0: cat (3), dog (7), emu (1)"
    shutil.rmtree(folder / "test")
    with pytest.raises(UserError, match="holds train and validation, but no test"):
        data.load(folder_of(folder))
    shutil.rmtree(
        folder / "validation"
    )  # train is a label then, as in a folder of cars
    assert len(data.load(folder_of(folder)).test.labels) == 1
    (folder / "test").mkdir()
    (folder / "test" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="train or test is empty"):
        data.load(folder_of(folder, skip_broken=True))


TWELVE_BITS = np.array([[0, 819, 1638], [2457, 3276, 4095]], np.uint16)
MASK = np.array([[0, 1, 0], [1, 1, 0]], np.uint8)


@pytest.mark.parametrize(("array", "white"), [(TWELVE_BITS, 4095), (MASK, 1)])
def test_a_range_that_is_not_used_is_reported_and_may_be_given(
    folder, capfd, array, white
):
    Image.fromarray(array).save(folder / "a.png")
    highest = 65535 if array.dtype == np.uint16 else 255
    np.testing.assert_array_equal(
        decoded(folder / "a.png", 1), np.round(array * (255 / highest))
    )
    brightest = round(int(array.max()) * 255 / highest)
    assert f"all images is {brightest}, of 255; the value" in capfd.readouterr().err
    stretched = decoded(folder / "a.png", 3, white=white)
    np.testing.assert_array_equal(stretched[..., 2], np.round(array * (255 / white)))
    assert "brightest" not in capfd.readouterr().err
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(folder / "b.png")
    with pytest.raises(UserError, match=r"pixels from 9 to 9, where data\.white is 8"):
        decoded(folder / "b.png", 1, white=8)


def test_what_is_transparent_is_reported_if_it_hides_all(folder, capfd):
    icon = np.full((4, 4, 4), 255, np.uint8)
    icon[1:3, :, 3] = 0
    Image.fromarray(icon).save(folder / "icon.png")
    assert (decoded(folder / "icon.png", 1) == 255).all()
    assert "2 of 2 pictures are of one colour, as a.png" in capfd.readouterr().err
    shown = decoded(folder / "icon.png", 1, background="black")
    np.testing.assert_array_equal(shown, icon[..., 3])
    assert "colour" not in capfd.readouterr().err


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
    said = capfd.readouterr().err.splitlines()
    assert said == [
        f"preparing 10 pictures of {folder} (once) …",
        "passed over 1 file (1 .txt), as notes.txt",
        "labels, from 0: . (8), again (1), linked (1)",
        "3 of 10 pictures are of one colour, as 'a\\nb.JPEG'; if they show more on "
        "black, give --data.background black",
    ]


def truncated(path):
    whole = io.BytesIO()
    Image.fromarray(noise(9, 10)).save(whole, "PNG")
    path.write_bytes(whole.getvalue()[:100])


GREY_PAGE = Image.new("L", (4, 6))
BROKEN = {
    "truncated": (truncated, ""),
    "empty": (lambda path: path.write_bytes(b""), "no PNG, JPEG, WEBP"),
    "ico": (lambda path: Image.new("L", (4, 6)).save(path, "ICO"), "no PNG, JPEG"),
    "pages": (
        lambda p: GREY_PAGE.save(p, "TIFF", save_all=True, append_images=[GREY_PAGE]),
        "several pages",
    ),
    "floats": (lambda p: Image.new("F", (6, 4)).save(p, "TIFF"), "pixels are floats"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "round": (lambda path: path.symlink_to(path), "Too many levels"),
    "bomb": (lambda p: Image.new("1", (10, 15)).save(p), "decompression bomb"),
    "bigger": (lambda p: Image.new("1", (20, 15)).save(p), "decompression bomb"),
    "pipe": (os.mkfifo, "not a file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_in_one_line(folder, monkeypatch, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    make, message = BROKEN[kind]
    fill(folder, 5)
    make(folder / "x\ny.png")
    expected = rf"/'x\\ny\.png': .*{message}.*skip-broken"
    with pytest.raises(UserError, match=expected) as caught:
        data.load(folder_of(folder))
    assert "\n" not in str(caught.value)
    assert [path.suffix for path in (folder.parent / "data").iterdir()] == [".lock"]


def test_broken_files_are_left_out_and_counted_if_asked(folder, monkeypatch, capfd):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    fill(folder, 20)
    for name, (make, _) in BROKEN.items():
        make(folder / f"{name}.png")
    dataset = data.load(folder_of(folder, skip_broken=True))
    assert sorted(levels(dataset.train, dataset.test)) == list(range(20))
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("left out 10 files that cannot be read, as bigger.png: ")
    again = data.load(folder_of(folder, skip_broken=True))
    assert (again.source, again.fingerprint) == ("prepared", dataset.fingerprint)
    with pytest.raises(UserError, match=r"bigger\.png"):
        data.load(folder_of(folder))


def fill_crosswise(folder):
    fill(folder, 3)
    fill(folder, 1, (6, 4), start=3)


BAD_FOLDERS = {
    "empty": (lambda folder: None, r"holds no picture \(no \.png, \.jpg"),
    "other endings": (lambda f: (f / "a.svg").write_bytes(b""), "holds no picture"),
    "missing": (Path.rmdir, "is not there"),
    "a file": (lambda f: (f.rmdir(), f.write_bytes(b"")), "is not a folder; .* npz"),
    "none readable": (lambda f: (f / "a.png").write_bytes(b""), r"a\.png: no PNG"),
    "one": (lambda f: fill(f, 1), "has 1 readable image; .*two or more"),
    "sizes": (fill_crosswise, r"differ in size, .*6×4\) and .*4×6.*--data\.image-size"),
}


@pytest.mark.parametrize("bad", BAD_FOLDERS)
@pytest.mark.parametrize("skip_broken", [False, True])
def test_a_bad_folder_is_refused_in_one_line_and_leaves_nothing(
    folder, bad, skip_broken
):
    make, message = BAD_FOLDERS[bad]
    make(folder)
    with pytest.raises(UserError, match=rf"^data\.source: .*{message}") as caught:
        data.load(folder_of(folder, skip_broken=skip_broken))
    assert "\n" not in str(caught.value)
    assert not list((folder.parent / "data").glob("folder-*[!k]"))


def test_preparing_a_folder_does_not_hold_its_pictures(folder, monkeypatch):
    import tracemalloc

    monkeypatch.setattr(stored, "BLOCK_BYTES", 2**16)
    peaks = []
    for count in (3, 20, 200):  # the first of them imports
        fill(folder, count, (60, 80))
        tracemalloc.start()
        data.load(folder_of(folder, streaming=True))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 500_000  # all would be 864 kB more


# Files


IMAGES = noise(5, 4, 6)
DAMAGED = r"a\.npz: damaged, or no \.npz file"
BAD_FILES = {
    "floats": ({"images": IMAGES / 255}, r"images: .* 5×4×6.* of float64; .*\(255"),
    "objects": ({"images": np.array([{}])}, DAMAGED),
    "none": ({"images": IMAGES[:0]}, "none of them 0"),
    "one": ({"images": IMAGES[:1]}, "two or more"),
    "other names": ({"x": IMAGES, "y": IMAGES}, "must hold images, .* it holds x, y"),
    "half": ({"train_images": IMAGES}, "it holds train_images"),
    "both": (
        {"images": IMAGES, "train_images": IMAGES, "test_images": IMAGES},
        "or else train_images",
    ),
    "labels": ({"images": IMAGES, "labels": np.arange(4)}, "5 integers, .*, not 4 of"),
    "empty": (lambda path: path.write_bytes(b""), DAMAGED),
    "no zip": (lambda path: path.write_bytes(b"no zip"), DAMAGED),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY"), DAMAGED),
    "cut": (lambda path: os.truncate(path, 300), DAMAGED),
    "flipped": (lambda path: life.flip(path, 200), DAMAGED),
    "missing": (Path.unlink, r"a\.npz is not there"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "not an .npz file; .* folder"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, streaming):
    (bad, message), path = BAD_FILES[name], tmp_path / "a.npz"
    np.savez(path, **(bad if isinstance(bad, dict) else {"images": IMAGES}))
    if callable(bad):
        bad(path)
    with pytest.raises(UserError, match=message) as caught:
        data.load(npz_of(path, streaming=streaming))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "data").glob("npz-*[!k]"))


def test_a_source_must_be_given():
    for cls in (Folder, Npz):
        with pytest.raises(UserError, match=r"data\.source: give an? .* by --data\.so"):
            data.load(cls())


# Streaming


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_a_file_is_unpacked_once_into_what_it_is_in_memory(tmp_path, capfd, write):
    pixels, named = noise(30, 3, 4), {"labels": np.arange(30), "other": np.zeros(3)}
    for name, arrays in (
        ("a.npz", {"images": pixels, **named}),
        ("a.npz", {"images": pixels[::-1], **named}),  # written again
        ("b.npz", {"images": pixels, **named}),  # of the same age and size
        ("c.npz", {"train_images": pixels, "test_images": pixels[:4, ...]}),
    ):
        path = tmp_path / name
        write(path, **arrays)
        shutil.copystat(tmp_path / "a.npz", path)
        whole = data.load(npz_of(path))
        assert (whole.source, whole.shape) == ("file", (3, 4, 1))
        if "labels" in arrays:
            assert (len(whole.train.labels), len(whole.test.labels)) == (27, 3)
            for images, rows in (whole.train, whole.test):
                np.testing.assert_array_equal(images[..., 0], arrays["images"][rows])
        capfd.readouterr()
        for unpacks in (True, False):
            streamed = data.load(npz_of(path, streaming=True))
            assert streamed.describe() == whole.describe()
            said = capfd.readouterr().err
            assert said.startswith(f"unpacking {path} (once) …\n" if unpacks else "")
            assert bool(said) == unpacks
            assert isinstance(streamed.train.images, ImageFile)
            for part in ("train", "test"):
                ours, theirs = getattr(streamed, part), getattr(whole, part)
                np.testing.assert_array_equal(ours.images[:], theirs.images)
                np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert not list((tmp_path / "data").glob("*/incomplete.*"))


def test_given_splits_are_taken_as_they_are_and_labels_may_be_absent(tmp_path, capfd):
    train, test = np.asfortranarray(noise(4, 3, 2, 3)), noise(2, 3, 2, 3)
    path = tmp_path / "a.npz"
    np.savez(path, train_images=train, test_images=test)
    dataset = data.load(npz_of(path))
    np.testing.assert_array_equal(dataset.train.images, train)
    np.testing.assert_array_equal(dataset.test.images, test)
    assert not dataset.train.labels.any()
    assert not (tmp_path / "data").exists()
    masks = {"images": train // 128, "masks": test, "train_labels": np.zeros(4)}
    np.savez(tmp_path / "b.npz", **masks)
    capfd.readouterr()
    data.load(npz_of(tmp_path / "b.npz"))
    assert capfd.readouterr().err.splitlines() == [
        f"{tmp_path / 'b.npz'}: not used: masks, train_labels",
        f"{tmp_path / 'b.npz'}: the brightest pixel of all images is 1, of 255",
    ]
    with pytest.raises(UserError, match="Fortran's order cannot be streamed"):
        data.load(npz_of(path, streaming=True))


@pytest.fixture(params=["in order", "shuffled"])
def pair(tmp_path, request):
    """Images on disk, and the same in memory."""
    pixels = noise(50, 2, 3, 1)
    np.save(tmp_path / "a.npy", pixels[..., 0])
    shuffled = np.random.default_rng(0).permutation(50)
    order = shuffled if request.param == "shuffled" else slice(None)
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

    def is_same(start):
        part = slice(start, start + 5)
        return np.array_equal(images[part], array[part])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_same, [*range(45)] * 4))


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path, pair):
    os.truncate(tmp_path / "a.npy", 200)
    with pytest.raises(UserError, match="cut short"):
        pair[0][:]


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from ae_jax import data

for path in map(Path, sys.argv[1:]):
    npz = data.Npz(source=path, dir=path.parent / "data", streaming=True)
    images = data.load(npz).train.images
    rows = np.random.default_rng(0).permutation(len(images))
    for start in range(0, len(rows), 500):
        images[rows[start : start + 500]]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_stays_as_it_is_while_the_data_grow_fortyfold(tmp_path):
    paths, block = [], noise(600, 50, 40)
    for times in (1, 40):
        paths.append(tmp_path / f"{times}.npz")
        np.savez(paths[-1], images=np.concatenate([block] * times))
    assert os.path.getsize(paths[-1]) > 45_000_000
    status, out, err = life.run("-c", MEMORY, *paths)
    assert status == 0, err
    small, large = map(int, out.split())
    assert large - small < 16_000  # kB; a block of 4 MB twice, the order 1 MB
