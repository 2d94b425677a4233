"""The contract of a run folder: its files, who may use it, what is said of damage."""

import errno
import json
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest
from conftest import ROOT
from life import assert_same_end, flip, small, snapshot, steps_of, train_until

from ae_jax import config
from ae_jax.config import CheckpointConfig
from ae_jax.errors import UserError
from ae_jax.keys import Purpose, key_for
from ae_jax.runs import environment, folder
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run, train_runs
from ae_jax.train import batch_indices

# --- Files and keys -----------------------------------------------------------------


def test_the_folder_holds_what_the_contract_says(finished_run):
    names = {path.name for path in finished_run.folder.iterdir()}
    assert names == {
        ".lock", "config.json", "metrics.jsonl", "summary.json", "checkpoints",
        "figures", "tensorboard",
    }  # fmt: skip
    assert {path.name for path in (finished_run.folder / "figures").iterdir()} == {
        "images.npz", "samples.png", "training_loss.png",
        "reconstructions_by_epoch.png", "test_reconstructions.png",
        "latents.png", "traversal.png", "interpolation.png",
    }  # fmt: skip
    assert steps_of(finished_run.folder) == [21, 42, 63]


def test_config_json_says_what_computed_the_numbers(finished_run):
    about = json.loads((finished_run.folder / "config.json").read_text())
    assert (about["format"], about["experiment"]) == (2, "tutorial")
    assert about["config"] == config.to_json(finished_run.config)
    assert about["config"]["objective"] == {"name": "reconstruction", "loss": "mse"}
    assert set(about["versions"]) == {
        "python", "ae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint",
        "numpy",
    }  # fmt: skip
    assert about["versions"]["jax"] == jax.__version__
    assert {"kind", "count", "cpu_model", "cpu_cores"} <= set(about["device"])
    assert about["device"]["cpu_cores"] == len(os.sched_getaffinity(0))
    data = finished_run.data()
    assert about["data"]["fingerprint"] == data.fingerprint
    assert about["data"]["source"] == "bundled"
    git = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert about["git_commit"].removesuffix("-dirty") == head.stdout.strip()


def test_the_figures_images_are_the_splits_own(finished_run):
    data = finished_run.data()
    held = {image.tobytes() for image in data.train.images}
    with np.load(finished_run.folder / "figures" / "images.npz") as images:
        assert [len(images[k]) for k in ("samples", "train", "test")] == [25, 5, 10]
        np.testing.assert_array_equal(images["test"], data.test.images[320:330])
        rows = batch_indices(key_for(0, Purpose.SHUFFLE), 2, 1336, 64)[20][:5]
        np.testing.assert_array_equal(images["train"], data.train.images[rows])
        samples = {image.tobytes() for image in images["samples"]}
    assert samples <= held
    assert len(samples) > 20


def scalars_of(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return lambda name: [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_holds_the_same_numbers(finished_run):
    scalars, rows = scalars_of(finished_run.folder), finished_run.metrics
    for name in set(rows[0]) - {"epoch", "step"}:
        expected = [(row["step"], row[name]) for row in rows]
        np.testing.assert_allclose(scalars(name), expected, rtol=1e-6)
    score = folder.read_summary(finished_run.folder)["test/mse"]
    np.testing.assert_allclose(scalars("test/mse"), [(63, score)], rtol=1e-6)


def test_a_resumed_runs_tensorboard_holds_each_epoch_once(tmp_path):
    settings = small(tmp_path / "run")
    train_until(6, settings)
    shutil.rmtree(settings.run_dir / "checkpoints" / "6")  # logged, but not saved
    (first,) = (settings.run_dir / "tensorboard").iterdir()
    logged = first.read_bytes()
    train_run(settings)
    files = sorted((settings.run_dir / "tensorboard").iterdir())
    assert len(files) == 2
    assert files[0].read_bytes() == logged  # it is added to, not written again
    assert [step for step, _ in scalars_of(settings.run_dir)("train/mse")] == [3, 6]


# --- One process at a time, and nobody else's files ---------------------------------


def test_a_run_that_is_in_use_is_refused_and_a_lock_left_behind_is_not(copy, short_run):
    """As by a second process: the lock is the system's, not the file that is there."""
    refused = []

    def on_chunk(step):
        with pytest.raises(UserError, match="in use by another process"):
            train_run(copy)
        refused.append(step)

    assert (copy.run_dir / ".lock").exists()
    remove(copy.run_dir / LAST)
    train_runs([copy], on_chunk=on_chunk)
    assert refused[-1] == 6
    assert_same_end(copy.run_dir, short_run.folder)


@pytest.mark.parametrize("there", [[], ["config.json"], [".DS_Store"]])
def test_an_empty_folder_or_a_config_alone_is_a_start(there, tmp_path, short_run):
    settings = small(tmp_path / "run")
    settings.run_dir.mkdir()
    for name in there:
        hidden = name.startswith(".")  # a file manager's
        source = __file__ if hidden else short_run.folder / name
        shutil.copy(source, settings.run_dir / name)
    train_run(settings)
    assert_same_end(settings.run_dir, short_run.folder)
    assert all((settings.run_dir / name).exists() for name in there)


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    """As NFS and Lustre may be."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    expected = rf"\.lock: its file system keeps no locks \({os.strerror(number)}\)"
    with pytest.raises(UserError, match=expected):
        train_run(small(tmp_path / "run"))


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="not a run folder"):
            train_run(small(place))
    assert snapshot(tmp_path) == before


def test_a_users_own_files_in_a_run_folder_stay(tmp_path, short_run):
    mine = [
        *("notes.txt", "figures/mine.png", "checkpoints/notes", "checkpoints/best.1"),
        *("checkpoints/²", "checkpoints/99999999999", "checkpoints/7.old"),
        *("checkpoints/1.orbax-checkpoint-tmp-1", "checkpoints/a.orbax-checkpoint-tmp"),
    ]
    shutil.copytree(short_run.folder, tmp_path / "run")
    settings = small(tmp_path / "run", checkpoint=CheckpointConfig(keep=1))
    for name in mine:
        (settings.run_dir / name).write_text(name)
    resume(settings)
    assert [(settings.run_dir / name).read_text() for name in mine] == mine
    for name in mine:
        (settings.run_dir / name).unlink()
    assert steps_of(settings.run_dir) == [3, 6]  # 4 was removed: keep is 1
    assert_same_end(settings.run_dir, short_run.folder)


# --- Another environment ------------------------------------------------------------


def test_another_environment_is_recorded_and_reported(tmp_path, monkeypatch, capsys):
    settings = small(tmp_path / "run")
    train_until(3, settings)
    monkeypatch.setattr(environment, "usable_cores", lambda: 99)
    version = "ae_jax.runs.environment.importlib.metadata.version"
    monkeypatch.setattr(version, lambda name: f"{name} 9")
    train_until(4, settings)
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert f"device.cpu_cores {len(os.sched_getaffinity(0))} → 99" in warning
    assert f"versions.jax {jax.__version__} → jax 9" in warning
    assert warning.endswith("results may no longer be bit-identical")
    (entry,) = folder.read_description(settings.run_dir).history
    assert entry.device["cpu_cores"] == 99
    assert entry.versions["numpy"] == "numpy 9"
    train_run(settings)  # no change since
    assert "warning" not in capsys.readouterr().err
    assert len(folder.read_description(settings.run_dir).history) == 1


# --- Damage -------------------------------------------------------------------------


def write(content):
    return lambda path: path.write_bytes(content)


def edit(**changes):
    return lambda path: path.write_text(
        json.dumps(json.loads(path.read_text()) | changes)
    )


def edit_record(part, **changes):
    """Change the history of a checkpoint, or the digests of its arrays."""

    def change(step):
        record = step / "record" / "data.json"
        known = json.loads(record.read_text())
        edit(**{part: known[part] | changes})(record)

    return change


def rename(name):
    return lambda path: path.rename(path.with_name(name))


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_within(part):
    return lambda path: remove(path / part)


def flip_largest(step):
    arrays = step.glob("state/ocdbt.process_0/d/*")
    flip(max(arrays, key=lambda path: path.stat().st_size))


def empty_all(step):
    for path in [path for path in step.rglob("*") if path.is_file()]:
        path.write_bytes(b"")


def cut_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def read_metrics(config):
    return folder.read_metrics(config.run_dir)


def open_last(config):
    return open_run(config.run_dir)


def open_first(config):
    return open_run(config.run_dir, steps_of(config.run_dir)[0])


def draw(config):
    return open_run(config.run_dir).figure("samples")


def resume(config):
    """The command given again, to a run that was killed before its end."""
    (config.run_dir / "summary.json").unlink(missing_ok=True)
    return train_run(config)


CONFIG, SUMMARY, METRICS = "config.json", "summary.json", "metrics.jsonl"
KERNEL, MOMENT = "params.encoder_0.kernel", "opt_state.0.mu.encoder_0.bias"
IMAGES, FIRST, LAST = "figures/images.npz", "checkpoints/3", "checkpoints/6"
HEAD = b'{"epoch": 1, "train/a": 1}\n'

DAMAGE = [
    (CONFIG, write(b"{"), "config.json: damaged, not JSON", open_last),
    (CONFIG, write(b"[]"), "not a run's config.json", open_last),
    (CONFIG, edit(format=1), "run folder of format 1, this version reads", open_last),
    (CONFIG, edit(data={}), "config.json: damaged: data.fingerprint", open_last),
    (CONFIG, edit(config={"train": {"sed": 1}}), "train.sed: no such", open_last),
    (CONFIG, edit(config={}), "not the one that the checkpoints were", open_last),
    (CONFIG, remove, "not a run folder", open_last),
    (SUMMARY, write(b""), "summary.json: damaged, not JSON", train_run),
    (SUMMARY, write(b"{}"), "damaged: digest: field required; epochs", train_run),
    (SUMMARY, edit(steps="many"), "summary.json: damaged: steps", train_run),
    (SUMMARY, edit(**{"test/mse": 0.01}), "summary.json: damaged: it or m", train_run),
    (METRICS, cut_last_line, "metrics.jsonl is not what was", train_run),
    (METRICS, write(HEAD + b'{"epo'), "line 2 is damaged", read_metrics),
    (METRICS, write(HEAD + HEAD.replace(b"a", b"b")), "line 2 is", read_metrics),
    (METRICS, write(b"\xff\n"), "line 1 is damaged", read_metrics),
    (IMAGES, remove, "images.npz: cannot be read", draw),
    (IMAGES, write(b"x"), "images.npz: cannot be read", draw),
    *(
        (LAST, damage, f"6: damaged checkpoint: {says}", use)
        for damage, says in [
            (remove_within("state"), ""),
            (remove_within("record"), ""),
            (empty_all, ""),
            (edit_record("history", rows=[]), "the history is not what was saved"),
            (edit_record("history", wall_s=1.0), "the history is not what was"),
            (edit_record("digests", **{KERNEL: "0"}), f"{KERNEL} is not what was"),
        ]
        for use in (resume, open_last)
    ),
    *(
        (LAST, edit_record("digests", **{name: "0"}), f"{name} is not what", resume)
        for name in (MOMENT, "key", "epoch_metrics.grad_norm")
    ),
    (LAST, flip_largest, "6: damaged checkpoint: ", resume),
    (LAST, rename("7"), "7: damaged checkpoint: it was saved as another", open_last),
    (LAST, rename("7"), "7: damaged checkpoint: it was saved as another", resume),
    # In the end the figures would ask for it: it is looked into before the training.
    (FIRST, remove_within("state"), "3: damaged checkpoint: ", resume),
    (FIRST, remove_within("state"), "3: damaged checkpoint: ", open_first),
]


@pytest.fixture
def copy(short_run, tmp_path):
    """The config of a copy of the short run, which may be damaged."""
    shutil.copytree(short_run.folder, tmp_path / "run")
    return small(tmp_path / "run")


@pytest.mark.parametrize(("name", "damage", "says", "use"), DAMAGE)
def test_damage_is_refused_in_one_line(name, damage, says, use, copy):
    damage(copy.run_dir / name)
    before = snapshot(copy.run_dir / "checkpoints")
    with pytest.raises(UserError) as caught:
        use(copy)
    message = str(caught.value)
    assert says in message
    assert str(copy.run_dir) in message
    assert "\n" not in message
    assert snapshot(copy.run_dir / "checkpoints") == before


@pytest.mark.parametrize("name", [LAST, FIRST, METRICS, SUMMARY, IMAGES, "tensorboard"])
def test_to_delete_what_is_damaged_is_enough(name, copy, short_run):
    path = copy.run_dir / name
    images = (short_run.folder / IMAGES).read_bytes()
    remove(path)
    (copy.run_dir / SUMMARY).unlink(missing_ok=True)
    resume(copy)
    assert path.exists() or name == FIRST
    assert_same_end(copy.run_dir, short_run.folder)
    assert (copy.run_dir / IMAGES).read_bytes() == images
    mine, other = map(folder.read_summary, (copy.run_dir, short_run.folder))
    changing = {"wall_s", "first_step_s", "peak_memory_bytes", "digest"}
    assert {k: v for k, v in mine.items() if k not in changing} == {
        k: v for k, v in other.items() if k not in changing
    }
