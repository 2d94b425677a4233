"""A run that is stopped, however and wherever, ends as if it never had been."""

import os
import shutil
import signal
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from life import (
    TWO_STEPS,
    Scripted,
    Stop,
    assert_same_end,
    small,
    snapshot,
    steps_of,
    train_until,
    train_with_stops,
)

from ae_jax import train, weights
from ae_jax.config import CheckpointConfig, FiguresConfig
from ae_jax.data import Digits, Npz
from ae_jax.errors import UserError
from ae_jax.models.conv import ConvAutoencoder
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Denoising, Reconstruction
from ae_jax.runs import folder, trainer
from ae_jax.runs.trainer import train_run, train_runs
from ae_jax.runs.weights import load_weights

CONV = ConvAutoencoder(hidden=(3,), latent_dim=2, latent_activation="none")


@pytest.fixture
def one_step_chunks(monkeypatch):
    """Pause after every step, as on a machine where each takes seconds."""
    monkeypatch.setattr(train, "CHUNK_S", 0.0)


@pytest.fixture
def npz(tmp_path):
    """The digits as a file of one's own, and the options that read it."""
    np.savez(tmp_path / "digits.npz", **Digits().load().named())
    return Npz(tmp_path / "data", tmp_path / "digits.npz", num_validation=101)


# --- Stopped by an exception --------------------------------------------------------


def test_stopped_at_every_chunk_it_ends_in_the_same_bits(
    short_run, tmp_path, one_step_chunks
):
    _, stops = train_with_stops([small(tmp_path / "run")])
    assert stops == 6
    assert_same_end(tmp_path / "run", short_run.folder)


KINDS = {
    "conv": {"model": CONV},
    "bfloat16": {"precision": "bfloat16"},
    "float64": {
        "precision": "float64",
        "schedule": "cosine",
        "objective": Reconstruction("bce"),
    },
    "denoising": {"objective": Denoising(0.1), "clip_norm": 0.1, "warmup_steps": 3},
    "streamed": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_does(kind, npz, tmp_path):
    """Stopped within its second epoch."""
    fields = {**TWO_STEPS, **KINDS[kind]}
    if kind == "streamed":
        fields["data"] = replace(npz, streaming=True)
    train_until(3, small(tmp_path / "stopped", **fields))
    train_run(small(tmp_path / "stopped", **fields))
    train_run(small(tmp_path / "run", **fields))
    assert_same_end(tmp_path / "stopped", tmp_path / "run")


def patient(run_dir):
    """A run whose third of nine epochs is the best; each is one step."""
    return small(
        run_dir,
        model=Autoencoder(hidden=(16, 8), init="flax"),
        objective=Scripted((9.0, 5.0, 4.0, 3.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0)),
        checkpoint=CheckpointConfig(keep=1),
        figures=FiguresConfig(epochs=(), draw=False),
        batch_size=1336,
        num_epochs=9,
        patience=3,
    )


def test_a_run_that_loses_patience_is_finished_and_keeps_its_best(tmp_path, capsys):
    config = patient(tmp_path / "run")
    train_until(5, config)
    run = train_run(config)
    assert [row["val/scripted"] for row in run.metrics] == [5, 4, 3, 6, 7, 8]
    assert [row["train/scripted"] for row in run.metrics] == [9, 5, 4, 3, 6, 7]
    assert steps_of(run.folder) == [3, 6]  # with keep=1
    assert (run.at("best").step, run.at("latest").step) == (3, 6)
    assert folder.read_summary(run.folder)["stopped"] is True
    train_run(patient(tmp_path / "other"))
    assert_same_end(run.folder, tmp_path / "other")
    capsys.readouterr()
    train_run(replace(config, train=replace(config.train, num_epochs=12)))
    assert "is finished" in capsys.readouterr().out


# --- Stopped by a signal ------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)],
)
def test_a_signal_is_obeyed_at_the_next_chunk_with_all_saved(
    signum, error, tmp_path, short_run, one_step_chunks, capsys
):
    config, before = small(tmp_path / "run"), signal.getsignal(signum)

    def on_chunk(step):
        if step == 4:
            os.kill(os.getpid(), signum)

    with pytest.raises(error) as caught:
        train_runs([config], started=time.monotonic() - 1000, on_chunk=on_chunk)
    assert getattr(caught.value, "code", 143) == 143
    assert "interrupted: step 5 is saved" in capsys.readouterr().err
    assert steps_of(config.run_dir)[-1] == 5
    assert signal.getsignal(signum) is before
    train_run(config)
    assert_same_end(config.run_dir, short_run.folder)
    assert 1000 < folder.read_summary(config.run_dir)["wall_s"] < 2000


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    ended = []

    def end(status):
        ended.append(status)
        raise Stop

    def on_chunk(step):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.os, "_exit", end)
    with pytest.raises(Stop):
        train_runs([small(tmp_path / "run")], on_chunk=on_chunk)
    assert ended == [130]


# --- What may change, and what may not ----------------------------------------------


def test_more_epochs_later_are_as_many_at_once(tmp_path, short_run):
    shutil.copytree(short_run.folder, tmp_path / "run")
    train_run(small(tmp_path / "run", num_epochs=3))
    train_run(small(tmp_path / "at_once", num_epochs=3))
    assert_same_end(tmp_path / "run", tmp_path / "at_once")
    images, again, at_once = (
        (path / "figures" / "images.npz").read_bytes()
        for path in (short_run.folder, tmp_path / "run", tmp_path / "at_once")
    )
    assert again == at_once != images
    assert folder.read_description(tmp_path / "run").config["train"]["num_epochs"] == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"learning_rate": 2e-3}, "train.learning_rate: the run has 0.001, you asked"),
        ({"seed": 1, "num_epochs": 5}, "train.seed: the run has 0, you asked for 1"),
        ({"num_epochs": 1}, "train.num_epochs: the run has 2, you asked for 1"),
        (
            {"num_epochs": 3, "schedule": "cosine"},
            "train.num_epochs: the run has 2, you asked for 3; train.schedule",
        ),
        ({"objective": Denoising()}, "objective.name: the run has reconstruction"),
        ({"data": Digits(num_validation=100)}, "data.num_validation: the run has 101"),
    ],
)
def test_another_config_is_refused_and_touches_nothing(fields, says, short_run):
    before = snapshot(short_run.folder)
    with pytest.raises(UserError, match="holds another run") as caught:
        train_run(small(short_run.folder, **fields))
    assert says in str(caught.value)
    assert snapshot(short_run.folder) == before


def test_a_finished_run_says_so_and_is_not_touched(short_run, capsys):
    before = snapshot(short_run.folder)
    free = {
        "checkpoint": CheckpointConfig(keep=1),
        "figures": FiguresConfig(epochs=(2,)),
        "data": Digits(dir=short_run.folder / "elsewhere", num_validation=101),
    }
    assert train_run(small(short_run.folder, **free)).step == 6
    assert "is finished" in capsys.readouterr().out
    assert snapshot(short_run.folder) == before


def test_data_that_changed_since_are_refused(npz, tmp_path):
    config = small(tmp_path / "run", data=npz)
    train_until(3, config)
    arrays = Digits().load().named()
    arrays["test_images"][0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    other = replace(npz, source=tmp_path / "other.npz")
    before = snapshot(config.run_dir)
    with pytest.raises(UserError, match="trained on other data"):
        train_run(replace(config, data=other))
    assert snapshot(config.run_dir) == before


# --- From other parameters ----------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".safetensors"])
def test_a_run_starts_from_other_parameters_and_resumes_without_them(
    ending, finished_run, tmp_path
):
    source = tmp_path / f"source{ending}"
    if ending:
        params = jax.tree.map(np.asarray, finished_run.params)
        weights.write_safetensors(source, weights.to_torch(params))
    else:
        shutil.copytree(finished_run.folder, source)
    config = small(tmp_path / "run", init_from=source, learning_rate=1e-30)
    train_until(3, config)
    digest = folder.read_description(config.run_dir).init_from_digest
    assert digest == load_weights(source, finished_run.params)[1]
    source.rename(tmp_path / "elsewhere")
    run = train_run(config)
    jax.tree.map(np.testing.assert_array_equal, run.params, finished_run.params)
    assert folder.read_description(run.folder).init_from_digest == digest


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Autoencoder((16, 9)), r"decoder_0\.bias is \[8\], this one's \[9\]"),
        (Autoencoder((8,)), r"decoder_1\.bias is \[16\], this one's \[64\]"),
        (
            Autoencoder((16, 8), 4),
            r"decoder_0\.kernel is \[3, 8\], this one's \[4, 8\]",
        ),
    ],
)
def test_those_of_another_model_are_named_before_anything_is_written(
    model, says, finished_run, tmp_path
):
    config = small(tmp_path / "run", init_from=finished_run.folder, model=model)
    with pytest.raises(UserError, match=f"holds another model's parameters: .*{says}"):
        train_run(config)
    assert not config.run_dir.exists()
