"""Whole runs, small: what a run folder holds, and that resuming changes nothing."""

import dataclasses
import itertools
import json
import signal

import numpy as np
import pytest

from ae_jax import records, run, trainer
from ae_jax.checkpoint import digest_leaves
from ae_jax.cli import Diverged
from ae_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    FiguresConfig,
    ModelConfig,
    TrainConfig,
    UserError,
)

TIMES = ("wall_s", "images_per_s")


def small(folder, **train) -> Config:
    """A run of 3 epochs of 23 steps on the bundled digits, in a small net."""
    return Config(
        run_dir=folder,
        data=DataConfig(name="digits"),
        model=ModelConfig(hidden=(16, 8), code_activation="leaky_relu"),
        train=TrainConfig(**{"num_epochs": 3, "seed": 0, **train}),
        figures=FiguresConfig(epochs=(1, 3)),
    )


def fit(config):
    with trainer.start("tutorial", config) as begun:
        begun.fit()


def finish(config):
    with trainer.start("tutorial", config) as begun:
        if not begun.finished:
            begun.draw("samples")
            begun.fit()
            begun.draw("training_loss")
            begun.summarise()
        return begun.finished


def rows_without_times(folder):
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in records.read_rows(folder)
    ]


def assert_same_end(folder, other):
    assert digest_leaves(run.open_run(folder).state) == digest_leaves(
        run.open_run(other).state
    )
    assert rows_without_times(folder) == rows_without_times(other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run from start to finish; read only."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(small(folder))
    return folder


def interrupt_at(monkeypatch, step, how, kind=trainer.Trainer):
    """Have the trainer disturbed after the chunk that ends at ``step``."""
    after_chunk = kind._after_chunk

    def disturbed(self, state, now, seconds):
        if now == step:
            how()
        return after_chunk(self, state, now, seconds)

    monkeypatch.setattr(kind, "_after_chunk", disturbed)


def test_a_run_folder_holds_what_the_contract_says(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "summary.json", "checkpoints", "figures",
        "tensorboard",
    }  # fmt: skip
    about = records.read_description(undisturbed)
    assert set(about) == {
        "format", "experiment", "config", "versions", "device", "git_commit", "data",
        "history",
    }  # fmt: skip
    assert {"fingerprint", "source"} <= set(about["data"])
    rows = records.read_rows(undisturbed)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 23), (2, 46), (3, 69)]
    assert set(rows[0]) == {
        "epoch", "step", "train/mse", "train/grad_norm", "train/learning_rate",
        "code/dead_units", "wall_s", "images_per_s",
    }  # fmt: skip
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert {
        "train/mse", "test/mse", "test/psnr_db", "test/ssim", "code/dead_units",
        "code/collapsed", "baseline/mean_image/test/mse", "baseline/pca/test/mse",
        "checkpoint_step", "steps", "wall_s", "first_step_s", "peak_memory_bytes",
    } <= set(summary)  # fmt: skip
    assert summary["steps"] == summary["checkpoint_step"] == 69
    assert summary["train/mse"] == rows[-1]["train/mse"]


def test_training_loss_is_the_mean_of_the_batch_means(undisturbed):
    opened = run.open_run(undisturbed)
    losses = np.asarray(opened.state.epoch_metrics["loss"], np.float64)
    assert opened.rows[-1]["train/mse"] == losses.mean()


def test_tensorboard_holds_the_same_numbers(undisturbed):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    (path,) = (undisturbed / "tensorboard").iterdir()
    content, logged = path.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        logged += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        content = content[16 + length :]
    for row in records.read_rows(undisturbed):
        for name in set(row) - {"epoch", "step"}:
            (value,) = (v for s, tag, v in logged if (s, tag) == (row["step"], name))
            np.testing.assert_allclose(value, row[name], rtol=1e-6)
    assert "figures/samples" in {tag for _, tag, _ in logged}


def test_a_finished_run_says_so_and_is_left_alone(undisturbed, capsys):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    assert finish(small(undisturbed))
    assert "is finished after 3 epochs" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_resumed_run_equals_uninterrupted_run(
    signum, tmp_path, monkeypatch, undisturbed, capsys
):
    config = small(tmp_path / "run")
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=10))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 30, lambda: signal.raise_signal(signum))
        with pytest.raises(SystemExit) as caught:
            fit(config)
    assert caught.value.code == 128 + signum
    assert "interrupted: step 30 is saved" in capsys.readouterr().err
    assert run.open_run(config.run_dir).step == 30
    finish(config)
    assert_same_end(config.run_dir, undisturbed)


def test_a_run_that_dies_goes_on_from_its_newest_checkpoint(
    tmp_path, monkeypatch, undisturbed
):
    config = small(tmp_path / "run")

    def die():
        raise RuntimeError("as by a kill")

    with monkeypatch.context() as patch:
        interrupt_at(patch, 46, die)
        with pytest.raises(RuntimeError):
            fit(config)
    assert run.open_run(config.run_dir).step == 23
    finish(config)
    assert_same_end(config.run_dir, undisturbed)


def test_more_epochs_later_equal_more_epochs_at_once(tmp_path, undisturbed):
    finish(small(tmp_path / "run", num_epochs=2))
    assert not finish(small(tmp_path / "run", num_epochs=3))
    assert_same_end(tmp_path / "run", undisturbed)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 69
    for name in ("samples", "train", "test"):
        np.testing.assert_array_equal(
            np.load(tmp_path / "run" / "figures" / "images.npz")[name],
            np.load(undisturbed / "figures" / "images.npz")[name],
        )


def test_another_config_does_not_touch_the_run(undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    with pytest.raises(UserError, match=r"train\.seed: the run has 0, you asked for 1"):
        fit(small(undisturbed, seed=1))
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}


def test_another_seed_gives_another_run(tmp_path, undisturbed):
    fit(small(tmp_path / "run", seed=1))
    ours, theirs = records.read_rows(tmp_path / "run"), records.read_rows(undisturbed)
    assert ours[-1]["train/mse"] != theirs[-1]["train/mse"]


def test_other_surroundings_are_told_and_recorded(tmp_path, capsys, monkeypatch):
    config = small(tmp_path / "run", num_epochs=1)
    fit(config)
    monkeypatch.setattr(records, "cpu_model", lambda: "Another CPU")
    fit(small(tmp_path / "run", num_epochs=2))
    assert "warning: " in (shown := capsys.readouterr().err)
    assert "→ Another CPU" in shown
    (entry,) = records.read_description(config.run_dir)["history"]
    assert entry["device"]["cpu_model"] == "Another CPU"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(Diverged, match=r"diverged at step 2: .*nan.*last good check"):
        fit(small(tmp_path / "run", learning_rate=1e30))


def test_held_out_images_choose_the_best_and_end_the_patience(tmp_path):
    config = small(tmp_path / "run", num_epochs=40, learning_rate=0.05)
    config = dataclasses.replace(
        config,
        data=DataConfig(name="digits", num_validation=200),
        train=dataclasses.replace(config.train, patience=1),
    )
    finish(config)
    rows = records.read_rows(config.run_dir)
    losses = [row["val/mse"] for row in rows]
    assert len(rows) < 40
    assert losses[-1] >= losses[-2]  # one epoch without a better one, and it ended
    assert all(b < a for a, b in itertools.pairwise(losses[:-1]))
    best = run.open_run(config.run_dir, "best")
    assert best.step == rows[int(np.argmin(losses))]["step"]
    assert finish(config)


def test_best_is_the_earlier_of_two_equals():
    rows = [{"step": s, "train/mse": v} for s, v in ((1, 3.0), (2, 1.0), (3, 1.0))]
    assert run.best_step(rows, "mse") == 2


def test_dead_units_are_told_when_they_die(tmp_path, capsys):
    # Biases this far down leave no unit of a ReLU code alive: the trap itself.
    config = small(tmp_path / "run", num_epochs=1, learning_rate=1.0)
    config = dataclasses.replace(config, model=ModelConfig(hidden=(16, 8)))
    finish(config)
    (row,) = records.read_rows(config.run_dir)
    assert row["code/dead_units"] == 3
    assert "all 3 code units" in capsys.readouterr().err
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert summary["code/collapsed"] is True


def test_a_folder_in_use_is_refused(tmp_path):
    config = small(tmp_path / "run")
    with (
        records.lock(config.run_dir),
        pytest.raises(UserError, match="in use by another process"),
        trainer.start("tutorial", config),
    ):
        pass


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_no_run_folder_is_left_alone(tmp_path, what):
    path = tmp_path / "run"
    if what == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="in the way, and not a run folder"):
        fit(small(path))
    assert what == "file" or [p.name for p in path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ModelConfig(name="autoencode")}, "did you mean autoencoder"),
        ({"train": TrainConfig(loss="mes")}, "did you mean mse"),
        ({"data": DataConfig(name="digit")}, "did you mean digits"),
        ({"data": DataConfig(name="digits", num_validation=1437)}, "num.validation"),
    ],
)
def test_an_unknown_name_leaves_no_folder_behind(tmp_path, change, message):
    config = dataclasses.replace(small(tmp_path / "run"), **change)
    with pytest.raises(UserError, match=message):
        fit(config)
    assert not (tmp_path / "run").exists()


def test_double_precision_reaches_the_checkpoint(tmp_path):
    fit(small(tmp_path / "run", num_epochs=1, precision="float64"))
    opened = run.open_run(tmp_path / "run")
    assert opened.state.params["encoder_0"]["kernel"].dtype == np.float64
    assert opened.encode(np.zeros((2, 64), np.uint8)).dtype == np.float64
