"""Several devices, and several processes, are one run."""

import re
import signal
import time

import numpy as np
import pytest
from life import (
    TWO_STEPS,
    assert_same_end,
    error_line,
    free_port,
    rows_of,
    run,
    small,
    start,
)

from ae_jax import devices
from ae_jax.config import MeshConfig
from ae_jax.data import Digits
from ae_jax.errors import UserError
from ae_jax.runs import folder
from ae_jax.runs.trainer import train_run

TWO_DEVICES = """
import sys
from dataclasses import replace
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
import life
from ae_jax import train
from ae_jax.config import MeshConfig
from ae_jax.runs.trainer import train_run, train_runs
train.CHUNK_S = 0.0
place = Path(sys.argv[1])
more = {"precision": "float64", "mesh": MeshConfig(2), **life.TWO_STEPS}
_, stops = life.train_with_stops([life.small(place / "stopped", **more)])
assert stops == 4
train_run(life.small(place / "run", **more))
life.assert_same_end(place / "stopped", place / "run")
seeds = [life.small(place / str(s), seed=s, **life.TWO_STEPS) for s in range(4)]
_, stops = life.train_with_stops(seeds, together=4)
assert stops == 4
others = [replace(one, run_dir=place / f"{s} again") for s, one in enumerate(seeds)]
for one in train_runs(others, together=4):
    life.assert_same_end(one.folder, place / one.folder.name.removesuffix(" again"))
"""


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """Runs of a process that sees two devices; read only."""
    place = tmp_path_factory.mktemp("two")
    status, _, err = run("-c", TWO_DEVICES, place)
    assert status == 0, err
    return place


def assert_close(run_dir, other):
    """The same rows but for rounding, which an order of summation makes."""
    for ours, theirs in zip(rows_of(run_dir), rows_of(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_two_devices_train_as_one(two_devices, tmp_path):
    """Stopped at every chunk they end in the same bits; one device sums otherwise."""
    train_run(small(tmp_path / "one", precision="float64", **TWO_STEPS))
    assert_close(two_devices / "run", tmp_path / "one")
    device = folder.read_description(two_devices / "run").device
    assert device["count"] == 2


def test_seeds_are_split_over_the_devices(two_devices, tmp_path):
    train_run(small(tmp_path / "3", seed=3, **TWO_STEPS))
    assert_same_end(two_devices / "3", tmp_path / "3")


def test_a_run_resumes_on_fewer_devices_with_a_warning(two_devices, capsys):
    more = {"precision": "float64", "num_epochs": 3}
    train_run(small(two_devices / "stopped", **more, **TWO_STEPS))
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert "device.count 2 → 1" in warning


# --- Processes ----------------------------------------------------------------------


def start_job(*options, own=((), ())):
    """Two processes of one job; ``own``: options of each alone."""
    job = ("--distributed", "--coordinator", f"127.0.0.1:{free_port()}")
    job = ("-m", "experiments.tutorial", *job, "--num-processes", 2, "--process-id")
    return [start(*job, i, *options, *alone) for i, alone in enumerate(own)]


def end_job(processes):
    """Status and what was written, of each."""
    ends = [process.communicate(timeout=100) for process in processes]
    return [p.returncode for p in processes], [o for o, _ in ends], [e for _, e in ends]


def test_two_processes_stream_are_killed_resume_and_equal_one(tmp_path):
    np.savez(tmp_path / "digits.npz", **Digits().load().named())
    options = (
        *("--data.name", "npz", "--data.source", tmp_path / "digits.npz"),
        *("--data.dir", tmp_path / "data", "--data.streaming"),
        *("--data.num-validation", 101, "--model.hidden", 16, 8),
        *("--train.precision", "float64", "--train.batch-size", 150),
        *("--train.num-epochs", 30, "--checkpoint.keep", 2, "--figures.no-draw"),
    )
    command = ("-m", "experiments.tutorial", "--run-dir")
    alone = start(*command, tmp_path / "alone", *options)
    processes = start_job("--run-dir", tmp_path / "run", *options)
    try:
        steps = tmp_path / "run" / "checkpoints"
        while not list(steps.glob("[1-9]*[0-9]")):
            assert all(p.poll() is None for p in processes), end_job(processes)
            time.sleep(0.01)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    assert end_job(processes)[0] == [-9, -9]
    processes = start_job("--run-dir", tmp_path / "run", *options)
    status, out, err = end_job(processes)
    assert status == [0, 0], err
    step = int(re.search(r"resumed at step (\d+)", err[0])[1])
    assert 0 < step < 30 * 9
    assert "epoch 30/30" in out[0]
    assert "epoch" not in out[1]  # one of them reports
    assert end_job([alone])[0] == [0]
    about = folder.read_description(tmp_path / "run")
    assert about.device["processes"] == 2
    losses = [
        [row["val/mse"] for row in rows_of(tmp_path / name)]
        for name in ("run", "alone")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-9)


def test_different_options_are_refused_by_both(tmp_path):
    options = ("--preset", "quick", "--run-dir", tmp_path / "run")
    processes = start_job(*options, own=((), ("--train.seed", 5)))
    status, _, err = end_job(processes)
    assert status == [2, 2]
    for text in err:
        line = error_line(text)
        assert "processes 0 and 1 were started with different options" in line
    assert not (tmp_path / "run").exists()


def test_without_a_cluster_it_asks_for_the_coordinator(tmp_path):
    options = ("--preset", "quick", "--run-dir", tmp_path / "run", "--distributed")
    status, _, err = run("-m", "experiments.tutorial", *options)
    assert status == 2
    line = error_line(err)
    assert "--distributed: no cluster found here" in line
    assert "give --coordinator HOST:PORT" in line


def test_more_devices_than_there_are_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"mesh\.data: 2 devices asked for"):
        train_run(small(tmp_path / "run", mesh=MeshConfig(2)))
    assert not (tmp_path / "run").exists()


def test_one_process_agrees_with_itself():
    assert devices.broadcast_from_process0(0.1) == 0.1
    assert devices.max_over_processes(15) == 15
    assert devices.is_first()
    devices.check_all_agree({"a": 1}, "options")
    with devices.process0_first("data"):
        devices.wait_for_all("anything")
