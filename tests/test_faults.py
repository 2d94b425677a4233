"""Faults of every kind, on small runs: survived to the bit, or told in one line."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from test_trainer import assert_same_end, finish, fit, rows_without_times, small

from ae_jax import config, data, records, run, trainer
from ae_jax.checkpoint import digest_leaves
from ae_jax.cli import Diverged
from ae_jax.config import CheckpointConfig, Config, DataConfig, UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs, all its figures drawn; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finish(small(folder))
    for name in run.FIGURES:
        run.draw(folder, name)
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
