import numpy as np
import pytest
from PIL import Image
from test_trainer import fit, small

from ae_jax import data, run
from ae_jax.config import DataConfig, UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(small(folder))
    return folder


@pytest.fixture(scope="module")
def digits():
    return data.load(DataConfig(name="digits"))


def test_open_run_reconstructs_what_encode_and_decode_do(trained, digits):
    opened = run.open_run(trained)
    images = digits.test.images[:10]
    codes = opened.encode(images)
    assert codes.shape == (10, 3)
    np.testing.assert_allclose(
        opened.decode(codes), opened.reconstruct(images), rtol=1e-6
    )


def test_bytes_and_floats_squares_and_rows_are_the_same_images(trained, digits):
    opened, images = run.open_run(trained), digits.test.images[:10]
    expected = opened.encode(images)
    np.testing.assert_array_equal(opened.encode(images / np.float32(255)), expected)
    np.testing.assert_array_equal(opened.encode(images.reshape(10, 8, 8)), expected)
    assert opened.encode(images[:0]).shape == (0, 3)


def test_scores_do_not_depend_on_the_block_size(trained, digits, monkeypatch):
    opened = run.open_run(trained)
    whole = run.score(opened, digits.test, "test", digits.shape)
    monkeypatch.setattr(run, "BLOCK", 7)
    parts = run.score(opened, digits.test, "test", digits.shape)
    assert whole.keys() == parts.keys()
    np.testing.assert_allclose(list(whole.values()), list(parts.values()), rtol=1e-6)


def test_any_kept_step_can_be_opened(trained):
    assert run.open_run(trained).steps == [23, 46, 69]
    assert run.open_run(trained, 46).step == 46
    assert run.open_run(trained, "46").step == 46
    assert len(run.open_run(trained, 46).rows) == 2


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (50, "no checkpoint of step 50; choose latest, best or one of 23, 46, 69"),
        ("newest", "must be latest, best or a step, got 'newest'"),
    ],
)
def test_a_step_that_is_not_kept_is_answered_with_those_that_are(
    trained, which, message
):
    with pytest.raises(UserError, match=message):
        run.open_run(trained, which)


def test_a_moved_run_opens_where_it_lies_now(trained, tmp_path):
    moved = tmp_path / "moved"
    trained.rename(moved)
    assert run.open_run(moved).folder == moved
    assert run.open_run(moved).config.run_dir == moved
    moved.rename(trained)


def test_a_folder_without_run_or_checkpoint_says_so(tmp_path, trained):
    with pytest.raises(UserError, match="not a run folder"):
        run.open_run(tmp_path)
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(UserError, match="no checkpoint; give"):
        run.open_run(tmp_path)


@pytest.mark.parametrize("number", [0, 2, None])
def test_a_run_of_another_format_is_refused(trained, tmp_path, number):
    text = (trained / "config.json").read_text()
    changed = text.replace('"format": 1', f'"format": {number or "null"}')
    (tmp_path / "config.json").write_text(changed)
    with pytest.raises(UserError, match=f"run folder of format {number or 'None'}"):
        run.open_run(tmp_path)


def test_a_run_is_not_scored_on_other_data(trained, digits):
    run.check_fingerprint(trained, digits)
    import dataclasses

    with pytest.raises(UserError, match="trained on other data"):
        run.check_fingerprint(trained, dataclasses.replace(digits, fingerprint="f00"))


@pytest.mark.parametrize("name", run.FIGURES)
def test_each_figure_is_drawn_from_the_run_folder_alone(trained, name):
    path = run.draw(trained, name)
    first = path.read_bytes()
    with Image.open(path) as image:
        assert min(image.size) > 100
    assert run.draw(trained, name).read_bytes() == first


def test_figures_show_the_last_batch_of_the_last_epoch(trained, digits):
    program = run.open_run(trained).program
    from ae_jax.train import Purpose, key_for

    order = program.order(key_for(0, Purpose.SHUFFLE), 2)
    pictures = np.load(trained / "figures" / "images.npz")
    rows = np.asarray(order)[-1][:5]
    np.testing.assert_array_equal(
        pictures["train"].reshape(5, 64), digits.train.images[rows]
    )
    # 360 test images in batches of 64: the last holds 40, of which ten are shown.
    np.testing.assert_array_equal(
        pictures["test"].reshape(10, 64), digits.test.images[320:330]
    )
    assert len(pictures["samples"]) == 25
