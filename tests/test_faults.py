"""Faults of every kind, on small runs: survived to the bit, or told in one line."""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from test_data import make_source
from test_trainer import TIMES, assert_same_end, finish, fit, interrupt_at, small

from ae_jax import cli, config, data, records, run, trainer
from ae_jax.checkpoint import digest_leaves
from ae_jax.cli import Diverged
from ae_jax.config import CheckpointConfig, Config, DataConfig, UserError
from scripts import compare


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finish(small(folder))
    return folder


@pytest.fixture
def broken_off(finished, tmp_path):
    """The same run, killed after its last checkpoint; a test may damage it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    return folder


def flip(path, position=None, bit=0):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


def damage(folder, step):
    """Flip a bit in the arrays of a checkpoint."""
    arrays = (
        folder / "checkpoints" / str(step) / "state" / "ocdbt.process_0" / "d"
    ).iterdir()
    flip(max(arrays, key=lambda path: path.stat().st_size))


def with_fallback(folder) -> Config:
    return dataclasses.replace(
        small(folder), checkpoint=CheckpointConfig(fallback=True)
    )


# --- Damaged checkpoints: the newest sound one, if the user asks for it ---


def test_a_damaged_newest_checkpoint_is_refused_and_the_way_out_is_named(broken_off):
    damage(broken_off, 69)
    with pytest.raises(UserError, match=r"checkpoints/69: .* --checkpoint\.fallback"):
        fit(small(broken_off))
    assert (broken_off / "checkpoints" / "69").exists()


@pytest.mark.parametrize("steps", [[69], [46, 69]])
def test_a_fallback_loses_the_damaged_steps_and_ends_in_the_same_bits(
    broken_off, finished, capsys, steps
):
    for step in steps:
        damage(broken_off, step)
    fit(with_fallback(broken_off))
    told = capsys.readouterr().err.splitlines()
    (warning,) = (line for line in told if line.startswith("warning: "))
    assert all(f"{step} (" in warning for step in steps)
    assert f"{69 - steps[0] + 23} steps are lost" in warning
    assert f"{broken_off}: going on from step {steps[0] - 23}" in told
    assert run.open_run(broken_off).steps == [23, 46, 69]
    assert_same_end(broken_off, finished)
    about = records.read_description(broken_off)
    assert about["config"]["checkpoint"]["fallback"] is False  # not for the next time


def test_without_any_sound_checkpoint_a_fallback_removes_none(broken_off):
    for step in (23, 46, 69):
        damage(broken_off, step)
    with pytest.raises(
        UserError, match=r"no checkpoint is sound, the newest \(step 69"
    ):
        fit(with_fallback(broken_off))
    assert {p.name for p in (broken_off / "checkpoints").iterdir()} == {
        "23",
        "46",
        "69",
    }


def test_a_damaged_older_checkpoint_does_not_stop_the_newest(broken_off, finished):
    damage(broken_off, 46)
    assert_same_end(broken_off, finished)
    fit(small(broken_off))
    assert_same_end(broken_off, finished)


def test_checkpoints_that_a_killed_process_had_yet_to_remove_are_removed(broken_off):
    folder = broken_off / "checkpoints"
    for step in ("10", "11"):
        shutil.copytree(folder / "23", folder / step)
    fit(dataclasses.replace(small(broken_off), checkpoint=CheckpointConfig(keep=1)))
    assert run.open_run(broken_off).steps == [23, 69]  # those that the figures show


# --- Any file damaged in any way ---


def harm(path, rng):
    """Flip some bits of a file, cut it, or remove it."""
    how, size = rng.integers(4), path.stat().st_size
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(path.read_bytes()[: rng.integers(size)])
    else:
        for _ in range(rng.integers(1, 4)):
            flip(path, rng.integers(size), rng.integers(8))


def opened(folder):
    """What a run holds, as far as it must be the same to the bit."""
    end = run.open_run(folder)
    return digest_leaves(end.state), [
        {key: row[key] for key in row if key not in TIMES} for row in end.rows
    ]


def resumed(folder):
    """The same, after the command was given again, with the run's own config."""
    own = config.load(folder / "config.json", Config)
    with trainer.start("tutorial", dataclasses.replace(own, run_dir=folder)) as begun:
        if not begun.finished:
            begun.fit()
    return opened(folder)


def scored_and_drawn(folder):
    best, dataset = run.open_run(folder, "best"), data.load(DataConfig(name="digits"))
    run.check_fingerprint(folder, dataset)
    run.FIGURES["samples"](folder)
    return run.score(best, dataset.test, "test", dataset.shape)


def compared(folder):
    """No digest covers these numbers: they are read, or told to be damaged."""
    compare.main((folder, folder))


READINGS = (opened, resumed, scored_and_drawn, compared)


def is_told(reading, folder, whole) -> bool:
    """A reading of a damaged folder gives what the whole one does, or a line."""
    try:
        found = reading(folder)
    except UserError as error:
        told = str(error)
        assert len(told.splitlines()) == 1
        assert len(told) <= 600
        assert str(folder) in told
        return True
    assert found == whole
    return False


# A load that fails leaves callbacks in Orbax's threads, which find their loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_file_is_told_in_one_line_or_loads_what_was_saved(
    broken_off, tmp_path
):
    rng, told = np.random.default_rng(0), 0
    whole = {reading: reading(broken_off) for reading in READINGS}
    files = (path.relative_to(broken_off) for path in broken_off.rglob("*"))
    for file in sorted(file for file in files if (broken_off / file).is_file()):
        if file.parts[1:2] in (("23",), ("46",)):  # as the newest one
            continue
        folder = tmp_path / "damaged"
        shutil.copytree(broken_off, folder)
        harm(folder / file, rng)
        readings = READINGS[: 2 if file.parts[0] == "checkpoints" else None]
        told += sum(is_told(reading, folder, whole[reading]) for reading in readings)
        shutil.rmtree(folder)
    assert told > 10


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("train", "seed", 1),
        ("train", "learning_rate", 0.002),
        ("train", "num_epochs", 2),
        ("model", "hidden", [16, 9]),
        ("data", "num_train", 1436),
        ("data", "fingerprint", "f00"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_refused(
    broken_off, part, field, value
):
    path = broken_off / "config.json"
    about = json.loads(path.read_text())
    (about if part == "data" else about["config"])[part][field] = value
    path.write_text(json.dumps(about))
    for reading in (opened, resumed):
        with pytest.raises(UserError, match=rf"config\.json: not the one .*{field}: "):
            reading(broken_off)


def test_what_is_free_to_differ_may_differ_from_the_checkpoints(broken_off, finished):
    path = broken_off / "config.json"
    about = json.loads(path.read_text())
    about["config"]["train"]["num_epochs"] = 4
    about["config"]["figures"]["epochs"] = [2]
    about["config"]["data"]["dir"] = "elsewhere"
    path.write_text(json.dumps(about))
    assert_same_end(broken_off, finished)


def test_an_older_run_folder_lacks_what_is_new_and_is_read(finished, tmp_path):
    about = records.read_description(finished)
    del about["config"]["checkpoint"]["fallback"], about["config"]["compilation_cache"]
    assert run.read_config(finished, about, Config) == small(finished)
    about["config"]["train"]["seed"] = 1
    run.check_description(finished, about, {"rows": []}, Config)  # no config to compare


# --- What is not finite ---


@pytest.mark.parametrize(
    ("rates", "num_validation", "what"),
    [
        ({"learning_rate": 1e30, "weight_decay": 1e30}, 0, "params not finite"),
        ({"learning_rate": 1e38}, 100, "val/mse nan"),
    ],
)
def test_what_is_not_finite_is_never_saved_nor_the_best(
    tmp_path, rates, num_validation, what
):
    # One step makes an epoch, so that no later loss tells what became of the weights.
    asked = small(tmp_path / "run", batch_size=2000, **rates)
    held_out = DataConfig(name="digits", num_validation=num_validation)
    with pytest.raises(
        Diverged, match=f"at step 1: {what}; last good .* there is none"
    ):
        fit(dataclasses.replace(asked, data=held_out))
    assert records.read_rows(asked.run_dir) == []
    with pytest.raises(UserError, match="no checkpoint"):
        run.open_run(asked.run_dir)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(
    tmp_path, monkeypatch, finished
):
    advance = trainer.Trainer._after_chunk

    def spoil(self, state, step, seconds):
        if step == 69:
            nan = state.params["encoder_0"]["bias"] * np.nan
            state.params["encoder_0"]["bias"] = nan
        return advance(self, state, step, seconds)

    monkeypatch.setattr(trainer.Trainer, "_after_chunk", spoil)
    with pytest.raises(Diverged, match=r"step 69: params not finite; .* step 46; try"):
        fit(small(tmp_path / "run"))
    for which in ("latest", "best"):
        assert run.open_run(tmp_path / "run", which).step == 46


# --- The disk, the data, other processes ---


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path, monkeypatch, finished, capsys, request
):
    asked, limit = small(tmp_path / "run"), resource.RLIMIT_FSIZE
    before = resource.getrlimit(limit)
    request.addfinalizer(lambda: resource.setrlimit(limit, before))

    def fill():
        while not (asked.run_dir / "checkpoints" / "23").exists():
            time.sleep(0.01)  # it is saved in the background
        resource.setrlimit(limit, (1000, before[1]))

    with monkeypatch.context() as patch:
        interrupt_at(patch, 46, fill)
        with pytest.raises(SystemExit) as caught:
            cli.exit_with(lambda: fit(asked))
    resource.setrlimit(limit, before)
    assert caught.value.code == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "error" in x)
    assert "File too large; make room, and give the same command again" in line
    assert run.open_run(asked.run_dir).step == 23
    finish(asked)
    assert_same_end(asked.run_dir, finished)


def test_data_that_changed_since_are_found_before_training(tmp_path):
    make_source(tmp_path / "source")
    where = DataConfig("kmnist", tmp_path / "data", tmp_path / "source")
    asked = dataclasses.replace(small(tmp_path / "run", num_epochs=1), data=where)
    fit(asked)
    more = dataclasses.replace(
        asked, train=dataclasses.replace(asked.train, num_epochs=2)
    )
    saved = opened(asked.run_dir)
    copy = tmp_path / "data" / "kmnist" / "decoded.npz"
    flip(copy)
    with pytest.raises(UserError, match="the prepared kmnist is damaged"):
        fit(more)
    shutil.rmtree(tmp_path / "data")
    flip(tmp_path / "source" / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match="trained on other data"):
        fit(more)
    assert opened(asked.run_dir) == saved


def test_the_second_process_is_refused_at_once_until_the_first_is_killed(tmp_path):
    code = (
        "import sys, pathlib\nfrom ae_jax import records\n"
        "with records.lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True), input()"
    )
    asked = small(tmp_path / "run", num_epochs=1)
    with subprocess.Popen(
        [sys.executable, "-c", code, asked.run_dir],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as first:  # fmt: skip
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="in use by another process"):
            fit(asked)
        first.kill()
    fit(asked)
