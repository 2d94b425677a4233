"""The contract of a run folder: its files, and every number in them."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from life import (
    Scripted,
    Spots,
    Thresholds,
    small,
    snapshot,
    steps_of,
    train_until,
)

from ae_jax import config, metrics, models
from ae_jax.config import CheckpointConfig
from ae_jax.errors import UserError
from ae_jax.keys import Purpose, key_for
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Reconstruction
from ae_jax.runs import environment, folder
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run
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
    }  # fmt: skip
    assert steps_of(finished_run.folder) == [21, 42, 63]


def test_config_json_says_what_computed_the_numbers(finished_run):
    about = json.loads((finished_run.folder / "config.json").read_text())
    assert about["format"] == 2
    assert about["experiment"] == "tutorial"
    assert about["config"] == config.to_json(finished_run.config)
    assert about["config"]["objective"] == {"name": "reconstruction", "loss": "mse"}
    assert set(about["versions"]) == {
        "python", "ae_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint",
        "numpy",
    }  # fmt: skip
    assert about["versions"]["jax"] == jax.__version__
    device = about["device"]
    assert {"kind", "count", "cpu_model", "cpu_cores"} <= set(device)
    assert device["cpu_cores"] == len(os.sched_getaffinity(0))
    data = finished_run.data()
    assert about["data"]["fingerprint"] == data.fingerprint
    assert about["data"]["source"] == "bundled"
    git = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert about["git_commit"].removesuffix("-dirty") == head.stdout.strip()


def test_the_figures_images_are_the_splits_own(finished_run):
    data = finished_run.data()
    with np.load(finished_run.folder / "figures" / "images.npz") as images:
        assert [images[k].shape[0] for k in ("samples", "train", "test")] == [25, 5, 10]
        np.testing.assert_array_equal(images["test"], data.test.images[320:330])
        key = key_for(0, Purpose.SHUFFLE)
        rows = batch_indices(key, 2, 1336, 64)[20][:5]
        np.testing.assert_array_equal(images["train"], data.train.images[rows])
        for name in ("samples", "train"):
            held = {image.tobytes() for image in data.train.images}
            assert {image.tobytes() for image in images[name]} <= held
        assert len({image.tobytes() for image in images["samples"]}) > 20


# --- Every number, recomputed from the parameters -----------------------------------

STEPS, BATCH, TRAIN = 5, 300, 1336


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A float64 run of 2 epochs of 5 steps, of each a checkpoint; read only."""
    return train_run(
        small(
            tmp_path_factory.mktemp("recorded") / "run",
            precision="float64",
            schedule="cosine",
            batch_size=BATCH,
            learning_rate=3e-3,
            checkpoint=CheckpointConfig(every_steps=1, keep=100),
        )
    )


@pytest.fixture(scope="module")
def params(recorded):
    """The parameters before each step, and after the last, as NumPy's."""
    with jax.enable_x64(True):
        key = key_for(0, Purpose.INIT)
        first = models.init_params(recorded.model, key, (8, 8, 1), "float64")
        first = jax.tree.map(np.asarray, first)
    later = [open_run(recorded.folder, step).params for step in range(1, 2 * STEPS + 1)]
    return [first, *[jax.tree.map(np.asarray, tree) for tree in later]]


def forward(p, x):
    """Inputs and outputs of each layer, [N, …], of the net 64-16-8-3-8-16-64."""
    names = [f"{half}_{i}" for half in ("encoder", "decoder") for i in range(3)]
    values = [x.reshape(len(x), -1) / 255]
    for name in names:
        y = values[-1] @ p[name]["kernel"] + p[name]["bias"]
        last = name == "decoder_2"
        values.append(1 / (1 + np.exp(-y)) if last else np.maximum(y, 0))
    return names, values


def loss(p, x):
    _, values = forward(p, x)
    return np.mean((values[-1] - values[0]) ** 2, axis=1)


def gradient_norm(p, x):
    """By hand: the norm of the gradient of the batch's mean loss."""
    names, values = forward(p, x)
    out = values[-1]
    delta = 2 * (out - values[0]) / out.size * out * (1 - out)
    total = 0.0
    for i in reversed(range(len(names))):
        total += np.sum((values[i].T @ delta) ** 2) + np.sum(delta.sum(axis=0) ** 2)
        delta = delta @ p[names[i]]["kernel"].T * (values[i] > 0)
    return math.sqrt(total)


def test_each_row_is_what_its_steps_were(recorded, params):
    data = recorded.data()
    for epoch, row in enumerate(folder.read_metrics(recorded.folder)):
        batches = batch_indices(key_for(0, Purpose.SHUFFLE), epoch, TRAIN, BATCH)
        batches = [rows[rows >= 0] for rows in np.asarray(batches)]
        assert [len(rows) for rows in batches] == [300] * 4 + [136]
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        seen = [
            (params[step], data.train.images[rows])
            for step, rows in zip(steps, batches, strict=True)
        ]
        after = params[(epoch + 1) * STEPS]
        _, hidden = forward(after, data.train.images)
        expected = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * STEPS,
            "train/mse": np.mean([loss(p, x).mean() for p, x in seen]),
            "train/grad_norm": np.mean([gradient_norm(p, x) for p, x in seen]),
            "train/learning_rate": 1.5e-3 * (1 + math.cos(math.pi * steps[-1] / 10)),
            "val/mse": loss(after, data.validation.images).mean(),
            "latent/dead_units": int((hidden[3] == 0).all(axis=0).sum()),
        }
        assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-9)
        assert set(row) == {*expected, "wall_s", "images_per_s"}
        assert row["images_per_s"] == pytest.approx(TRAIN / row["wall_s"])
    assert list(row)[:3] == ["epoch", "step", "train/mse"]


def test_the_summary_is_the_last_checkpoints_score(recorded, params):
    data, summary = recorded.data(), folder.read_summary(recorded.folder)
    test, train = data.test.images, data.train.images
    _, hidden = forward(params[-1], test)
    recon, target = (v.reshape(-1, 8, 8, 1) for v in (hidden[-1], hidden[0]))
    flat, points = (x.reshape(len(x), -1) / 255 for x in (train, test))
    mean = flat.mean(axis=0)
    axes = np.linalg.svd(flat - mean, full_matrices=False)[2][:3]
    centred = points - mean
    dead = int((hidden[3] == 0).all(axis=0).sum())
    expected = {
        "train/mse": folder.read_metrics(recorded.folder)[-1]["train/mse"],
        "test/mse": loss(params[-1], test).mean(),
        "test/psnr_db": (-10 * np.log10(loss(params[-1], test))).mean(),
        "test/ssim": metrics.ssim(recon, target).mean(),
        "baseline/mean_image/test/mse": np.mean(centred**2),
        "baseline/pca/test/mse": np.mean((centred - centred @ axes.T @ axes) ** 2),
        "latent/dead_units": dead,
        "latent/collapsed": dead == 3,
        "checkpoint_step": 10,
        "steps": 10,
        "epochs": 2,
        "stopped": False,
    }
    assert {k: summary[k] for k in expected} == pytest.approx(expected, rel=1e-7)
    measured = {"wall_s", "first_step_s", "peak_memory_bytes", "digest"}
    assert set(summary) - {"device_peak_bytes"} == {*expected, *measured}
    rows = folder.read_metrics(recorded.folder)
    assert 0 < summary["first_step_s"] < summary["wall_s"]
    assert sum(row["wall_s"] for row in rows) < summary["wall_s"]
    assert 2e7 < summary["peak_memory_bytes"] < 1e11


def test_dead_units_are_of_the_training_split_and_in_the_summary_of_the_test_split(
    tmp_path,
):
    """One image of 1,200 wakes two units; no test image wakes the first."""
    fields = {"data": Spots(), "model": Thresholds(), "batch_size": 700}
    run = train_run(small(tmp_path / "run", **fields))
    assert [row["latent/dead_units"] for row in run.metrics] == [0, 0]
    assert folder.read_summary(run.folder)["latent/dead_units"] == 1


def test_an_objectives_other_metrics_are_logged_beside_its_loss(tmp_path):
    run = train_run(small(tmp_path / "run", objective=Reconstruction("bce")))
    assert list(run.metrics[0])[2] == "train/bce"
    assert {"train/bce", "train/mse", "val/bce", "val/mse"} <= set(run.metrics[0])
    summary = folder.read_summary(run.folder)
    scores = run.scores(run.data().test.images)
    for name in ("bce", "mse"):
        mean = scores[name].mean(dtype=np.float64)
        assert summary[f"test/{name}"] == pytest.approx(mean, rel=1e-6)
    assert next(iter(summary)) == "train/bce"


def test_the_time_of_an_epoch_is_its_own(tmp_path, monkeypatch):
    """By a clock that only the training steps move."""
    now = iter(range(1000))
    monkeypatch.setattr("ae_jax.devices.time.perf_counter", lambda: next(now) * 1.0)
    run = train_run(small(tmp_path / "run", checkpoint=CheckpointConfig(every_steps=1)))
    assert [row["wall_s"] for row in run.metrics] == [3, 3]
    assert run.metrics[0]["images_per_s"] == pytest.approx(1336 / 3)


def test_tensorboard_holds_the_same_numbers(finished_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run.folder / "tensorboard")).Reload()
    rows = folder.read_metrics(finished_run.folder)
    for name in set(rows[0]) - {"epoch", "step"}:
        logged = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in logged] == [21, 42, 63]
        values = [row[name] for row in rows]
        np.testing.assert_allclose([v for _, v in logged], values, rtol=1e-6)
    summary = folder.read_summary(finished_run.folder)
    (score,) = events.Scalars("test/mse")
    assert score.value == pytest.approx(summary["test/mse"], rel=1e-6)


def test_a_resumed_runs_tensorboard_holds_each_epoch_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = small(tmp_path / "run", num_epochs=3)
    train_until(9, settings)
    for path in (settings.run_dir / "checkpoints").glob("[69]"):
        shutil.rmtree(path)  # the last epoch was logged, but not saved
    (first,) = (settings.run_dir / "tensorboard").iterdir()
    logged = first.read_bytes()
    run = train_run(settings)
    files = sorted((run.folder / "tensorboard").iterdir())
    assert len(files) == 2
    assert files[0].read_bytes() == logged  # it is added to, not written again
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/mse")] == [3, 6, 9]


# --- One process at a time, and nobody else's files ---------------------------------


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    hold = (
        "import sys, pathlib\nfrom ae_jax.runs import folder\n"
        "with folder.lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True), input()"
    )
    settings = small(tmp_path / "run", num_epochs=1)
    with subprocess.Popen(
        [sys.executable, "-c", hold, settings.run_dir],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as first:  # fmt: skip
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by another process"):
            train_run(settings)
        first.kill()
    assert train_run(settings).step == 3


def test_an_empty_folder_or_a_config_alone_is_a_start(tmp_path):
    (tmp_path / "empty").mkdir()
    assert train_run(small(tmp_path / "empty", num_epochs=1)).step == 3
    known = (tmp_path / "empty" / "config.json").read_text()
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "config.json").write_text(known)
    assert train_run(small(tmp_path / "known", num_epochs=1)).step == 3


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(UserError, match="not a run folder"):
            train_run(small(place))
    assert snapshot(tmp_path) == before


def test_a_users_own_files_in_a_run_folder_stay(tmp_path):
    mine = ["notes.txt", "checkpoints/notes", "checkpoints/best.1", "figures/mine.png"]
    settings = small(tmp_path / "run", checkpoint=CheckpointConfig(keep=1))
    train_until(3, settings)
    for name in (*mine, "checkpoints/1.orbax-checkpoint-tmp-mine"):
        (settings.run_dir / name).write_text(name)
    train_run(settings)
    for name in (*mine, "checkpoints/1.orbax-checkpoint-tmp-mine"):
        assert (settings.run_dir / name).read_text() == name


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


@pytest.fixture
def copy(finished_run, tmp_path):
    """A copy of the finished run that may be damaged."""
    return Path(shutil.copytree(finished_run.folder, tmp_path / "run"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


DAMAGE = {
    "config.json": [
        (lambda p: p.write_text("{"), "config.json: damaged, not JSON"),
        (lambda p: p.write_text("[]"), "not a run's config.json"),
        (lambda p: edit(p, format=1), "run folder of format 1, this version reads"),
        (lambda p: edit(p, data={}), "config.json: damaged: data.fingerprint"),
        (lambda p: edit(p, config={"train": {"sed": 1}}), "train.sed: no such field"),
        (lambda p: edit(p, config={}), "not the one that the checkpoints were saved"),
        (lambda p: p.unlink(), "not a run folder"),
    ],
    "summary.json": [
        (lambda p: p.write_text(""), "summary.json: damaged, not JSON"),
        (
            lambda p: p.write_text("{}"),
            "damaged: digest: field required; epochs",
        ),
        (lambda p: edit(p, steps="many"), "summary.json: damaged: steps"),
        (lambda p: edit(p, **{"test/mse": 0.01}), "summary.json: damaged: it or m"),
        (lambda p: cut(p.with_name("metrics.jsonl")), "metrics.jsonl is not what was"),
    ],
    "metrics.jsonl": [
        (
            lambda p: p.write_text('{"epoch": 1, "train/a": 1}\n{"epo'),
            "line 2 is damaged",
        ),
        (lambda p: p.write_bytes(b"\xff\n"), "line 1 is damaged"),
    ],
}


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [(name, *case) for name, cases in DAMAGE.items() for case in cases],
)
def test_a_damaged_file_is_told_in_one_line(name, damage, told, copy, finished_run):
    damage(copy / name)
    read = {
        "config.json": lambda: open_run(copy),
        "summary.json": lambda: train_run(replace(finished_run.config, run_dir=copy)),
        "metrics.jsonl": lambda: folder.read_metrics(copy),
    }[name]
    with pytest.raises(UserError) as caught:
        read()
    assert told in str(caught.value)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_what_is_damaged_is_written_again(name, copy, finished_run):
    whole = (copy / "metrics.jsonl").read_bytes()
    scores = json.loads((copy / "summary.json").read_text())
    (copy / name).write_text("")
    (copy / "summary.json").unlink()
    train_run(replace(finished_run.config, run_dir=copy))
    assert (copy / "metrics.jsonl").read_bytes() == whole
    again = folder.read_summary(copy)
    changing = {"wall_s", "peak_memory_bytes", "digest"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in scores.items() if k not in changing
    }


def test_a_diverged_run_saves_nothing_that_is_not_finite(tmp_path):
    from ae_jax.errors import Diverged

    settings = small(
        tmp_path / "run",
        objective=Scripted((1.0, 1.0, 1.0, 1.0, math.inf)),
        model=Autoencoder((16, 8), init="flax"),
    )
    with pytest.raises(Diverged, match=r"diverged at step 5: .*scripted inf; .*step 4"):
        train_run(settings)
    assert steps_of(settings.run_dir)[-1] == 4
    assert folder.read_summary(settings.run_dir) is None
