"""Several devices, and several real processes on this machine, as one run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from ae_jax import hosts
from ae_jax.config import Config, MeshConfig, TrainConfig, UserError

DOUBLE = ("--preset", "quick", "--train.precision", "float64")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(*options, devices=1, **more):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.tutorial", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_job(*options, own=((), ()), **more):
    """Two processes of one job; `own`: options of each alone."""
    job = ("--distributed", "--coordinator", f"127.0.0.1:{free_port()}")
    job += ("--num-processes", 2)
    return [
        start(*job, "--process-id", i, *options, *alone, **more)
        for i, alone in enumerate(own)
    ]


def run(*options, devices=1):
    process = start(*options, devices=devices)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    return told


def run_job(*options, **more):
    processes = start_job(*options, **more)
    told = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    return told


def losses(folder):
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["train/mse"] for row in rows]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run on one device of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(*DOUBLE, "--run-dir", folder)
    return folder


def same_run(folder, alone):
    """Both have the same losses and files; sums in another order round otherwise."""
    np.testing.assert_allclose(losses(folder), losses(alone), rtol=1e-12)
    names = [
        {str(path.relative_to(f)) for path in f.glob("*") if path.name != "tensorboard"}
        | {path.name for path in f.glob("figures/*")}
        for f in (folder, alone)
    ]
    assert names[0] == names[1]


def test_two_processes_then_one_then_two_stream_one_run(tmp_path):
    options = (*DOUBLE, "--data.streaming", "--run-dir")
    run(*options, tmp_path / "alone")
    options += (tmp_path / "run", "--train.num-epochs")
    first, second = run_job(*options, 1)
    assert "epoch 1/1" in first
    assert "epoch" not in second  # one of them tells
    assert "device.processes 2 → 1" in run(*options, 2)
    told, _ = run_job(*options, 3)
    assert "going on from step 46" in told
    same_run(tmp_path / "run", tmp_path / "alone")


def test_four_devices_then_one_then_four_are_one_run(tmp_path, alone):
    options = (*DOUBLE, "--run-dir", tmp_path / "run")
    run(*options, "--mesh.data", 4, "--train.num-epochs", 1, devices=4)
    run(*options, "--train.num-epochs", 2)
    run(*options, "--mesh.data", 4, devices=4)
    same_run(tmp_path / "run", alone)


def wait_for(process, text):
    told = ""
    while text not in told:
        line = process.stdout.readline()
        assert line, f"it ended before {text!r}: {told}"
        told += line
    return told


def test_a_signal_to_one_saves_all_and_a_death_ends_all(tmp_path):
    options = ("--preset", "quick", "--run-dir", tmp_path / "run")
    options += ("--train.batch-size", 512, "--train.num-epochs", 100_000)
    processes = start_job(*options)
    wait_for(processes[0], "epoch 3/")
    processes[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    saved = int(re.search("step ([0-9]+) is saved", told[0])[1])

    processes = start_job(*options)
    wait_for(processes[0], f"going on from step {saved}\n")
    wait_for(processes[0], "epoch ")
    processes[1].kill()
    began = time.monotonic()
    told = processes[0].communicate(timeout=60)[0]
    assert processes[0].wait() not in (0, None)
    assert time.monotonic() - began < 60
    if processes[0].returncode == 1:  # 134: the runtime was the first to notice
        assert "error: process 0 lost another one" in told
        assert "Traceback" not in told
    processes[1].communicate()


def test_processes_with_other_options_are_refused_by_name(tmp_path):
    own = ((), ("--train.seed", 5))
    options = ("--preset", "quick", "--run-dir", tmp_path / "run")
    processes = start_job(*options, own=own)
    for process in processes:
        told, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "error: processes 0 and 1 were started with different" in told
        assert "train.seed: 0 and 5" in told
    assert not (tmp_path / "run").exists()


def test_an_unreachable_coordinator_is_given_up_on(tmp_path):
    code = (
        "import sys; sys.argv = ['x', '--preset', 'quick', '--distributed', "
        "'--coordinator', '127.0.0.1:{}', '--num-processes', '2', '--process-id', '1', "
        "'--run-dir', '{}']\n"
        "from ae_jax import hosts; hosts.CONNECT_S = 3\n"
        "import runpy; runpy.run_module('experiments.tutorial', run_name='__main__')"
    )
    assert hosts.CONNECT_S < 60
    done = subprocess.run(
        [sys.executable, "-c", code.format(free_port(), tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "error: 3 s went by and not all processes came together" in done.stderr
    assert "Traceback" not in done.stderr


def test_slurm_tells_who_the_others_are(tmp_path, alone):
    """JAX finds the coordinator in the surroundings that SLURM makes."""
    options = (*DOUBLE, "--run-dir", tmp_path / "run", "--distributed")
    slurm = {
        "SLURM_JOB_ID": str(free_port()),  # of which JAX makes the port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "JAX_LOCAL_DEVICE_IDS": "0",
    }
    processes = [
        start(*options, SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **slurm)
        for i in range(2)
    ]
    told = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    description = json.loads((tmp_path / "run" / "config.json").read_text())
    assert description["device"]["processes"] == 2
    same_run(tmp_path / "run", alone)


def test_without_a_cluster_it_asks_for_the_coordinator(tmp_path):
    process = start("--preset", "quick", "--distributed", "--run-dir", tmp_path / "run")
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: --distributed: no cluster to be found here" in told
    assert "give --coordinator HOST:PORT" in told


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        job = Config(
            distributed=True,
            coordinator=f"127.0.0.1:{port}",
            num_processes=2,
            process_id=0,
        )
        with pytest.raises(UserError, match=f"port {port} of this machine is not free"):
            hosts.join(job)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(UserError, match=r"mesh\.data: 2 devices asked for, there are"):
        hosts.make_mesh(2, 64)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mesh": MeshConfig(3)}, r"mesh\.data: 3 devices cannot share a batch of 64"),
        ({"coordinator": "a:1"}, "coordinator: only with --distributed"),
        ({"distributed": True, "coordinator": "here"}, "must be HOST:PORT, got here"),
        ({"distributed": True, "num_processes": 0}, "num_processes: must be above 0"),
        (
            {"distributed": True, "num_processes": 2, "process_id": 2},
            "process_id: must be at least 0 and below num_processes",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Config(**options)


def test_one_process_agrees_with_itself():
    assert hosts.gather("a") == ["a"]
    assert hosts.from_first(0.1) == 0.1
    assert hosts.largest(15) == 15
    assert Config(mesh=MeshConfig(4), train=TrainConfig(batch_size=32))


def test_more_processes_than_images_is_refused_by_all(tmp_path):
    images = np.zeros((1, 8, 8), np.uint8)
    np.savez(tmp_path / "one.npz", train_images=images, test_images=images)
    options = ("--data.name", "npz", "--data.source", tmp_path / "one.npz")
    processes = start_job(*options, "--run-dir", tmp_path / "run")
    for process in processes:
        told, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "error: npz: 1 training images are too few for 2 processes" in told
    assert not (tmp_path / "run" / "config.json").exists()
