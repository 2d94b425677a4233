"""The experiments as a user types them, each in a process of its own."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from life import (
    assert_same_end,
    error_line,
    rows_of,
    run,
    snapshot,
    start,
    steps_of,
)

from ae_jax.runs.figures import FIGURES
from ae_jax.runs.run import open_run

SMALL = ("--preset", "quick", "--model.hidden", 16, 8, "--train.batch-size", 450)
DENOISE = ("--objective.name", "denoising", "--objective.sigma", 0.1)


def tutorial(run_dir, *options):
    return ("-m", "experiments.tutorial", *SMALL, "--run-dir", run_dir, *options)


@pytest.fixture(scope="module")
def denoised(tmp_path_factory):
    """A finished run of 60 epochs of 4 steps, and what its command printed."""
    run_dir = tmp_path_factory.mktemp("denoised") / "run"
    status, out, err = run(*tutorial(run_dir, *DENOISE, "--train.num-epochs", 60))
    assert status == 0, err
    return run_dir, out


def test_the_tutorial_denoises_and_ends_in_scores_and_figures(denoised):
    run_dir, out = denoised
    assert {p.stem for p in (run_dir / "figures").glob("*.png")} == set(FIGURES)
    lines = out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 60
    assert epochs[-1].startswith("epoch 60/60  train/denoising_mse 0.0")
    summary = json.loads((run_dir / "summary.json").read_text())
    for name, key in {
        "train/denoising_mse": "train/denoising_mse",
        "test, reconstructed": "test/mse",
        "test, PCA of 3 components": "baseline/pca/test/mse",
        "test, mean training image": "baseline/mean_image/test/mse",
    }.items():
        (line,) = [line for line in lines if line.startswith(name)]
        assert float(line.removeprefix(name).split()[0]) == round(summary[key], 5)


def test_the_same_command_again_says_finished_and_touches_nothing(denoised):
    before = snapshot(denoised[0])
    options = tutorial(denoised[0], *DENOISE, "--train.num-epochs", 60)
    status, out, err = run(*options)
    assert (status, err) == (0, "")
    assert out == (
        f"{denoised[0]} is finished. A larger --train.num-epochs continues it.\n"
    )
    assert snapshot(denoised[0]) == before


def test_killed_and_interrupted_it_ends_in_the_same_bits(denoised, tmp_path):
    """By SIGKILL, SIGTERM and SIGINT, one after the other."""
    options = tutorial(tmp_path / "run", *DENOISE, "--train.num-epochs", 60)
    saved = 0
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(*options, "--checkpoint.every-steps", 3)
        while not (steps := newer(tmp_path / "run", saved)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signum)
        err = process.communicate(timeout=60)[1]
        kill = signum == signal.SIGKILL
        assert process.returncode == (-9 if kill else 128 + signum), err
        assert "Traceback" not in err
        if saved:
            assert f"resumed at step {saved}" in err
        saved = open_run(tmp_path / "run").step
        assert steps[-1] <= saved < 240
        if not kill:
            assert f"interrupted: step {saved} is saved" in err
    status, _, err = run(*options)
    assert status == 0, err
    assert f"resumed at step {saved}" in err
    assert_same_end(tmp_path / "run", denoised[0])


def newer(run_dir, saved):
    """The checkpoints after a step that there are by now."""
    if not (run_dir / "checkpoints").exists():
        return []
    return [step for step in steps_of(run_dir) if step > saved]


def test_a_runs_own_config_starts_it_again_elsewhere(denoised, tmp_path):
    config = ("--config", denoised[0] / "config.json", "--run-dir", tmp_path / "run")
    status, _, err = run("-m", "experiments.tutorial", *config)
    assert status == 0, err
    assert_same_end(tmp_path / "run", denoised[0])


def test_a_run_that_diverges_ends_with_status_1(tmp_path):
    options = ("--train.learning-rate", "1e30", "--model.latent-activation", "none")
    status, _, err = run(*tutorial(tmp_path / "run", *options))
    assert status == 1
    line = error_line(err)
    assert "diverged at step" in line
    assert "try a smaller --train.learning-rate" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--run-dir", "README.md/run"), "README.md"),
        (("--run-dir", "docs"), "docs: exists and is not a run folder"),
        (("--train.init-from", "nowhere"), "nowhere"),
        (("--model.name", "conv", "--model.hidden", 1, 1, 1, 1), "model.hidden: 4 st"),
        (("--data.num-validation", 5000), "data.num_validation: must be below 1437"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(options, message, tmp_path):
    place = () if "--run-dir" in options else ("--run-dir", tmp_path / "run")
    preset = ("--preset", "quick")
    status, out, err = run("-m", "experiments.tutorial", *preset, *place, *options)
    assert (status, out) == (2, "")
    assert message in error_line(err)
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_seeds_of_the_study_are_runs_that_every_command_takes(tmp_path):
    options = (*("--num-seeds", 4, "--together", 4), *SMALL)
    command = ("-m", "experiments.seeds", "--run-dir", tmp_path / "study", *options)
    status, out, err = run(*command, "--train.num-epochs", 1)
    assert status == 0, err
    assert "**How the seeds end**" in out
    members = sorted((tmp_path / "study").glob("*/*/config.json"))
    assert [path.parent.name for path in members] == ["0", "1", "2", "3"]
    losses = {rows_of(path.parent)[0]["train/mse"] for path in members}
    assert len(losses) == 4
    assert open_run(members[2].parent).config.train.seed == 2
    before = snapshot(tmp_path / "study")
    status, out, _ = run(*command, "--train.num-epochs", 1)
    assert (status, "is finished" in out) == (0, True)
    assert snapshot(tmp_path / "study") == before


def test_python_m_experiments_lists_them_a_line_each():
    status, out, _ = run("-m", "experiments")
    assert status == 0
    names = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    listed = {
        line.split()[2].removeprefix("experiments."): line for line in out.splitlines()
    }
    assert set(listed) == names
    for name, line in listed.items():
        text = (ROOT / "experiments" / f"{name}.py").read_text()
        assert line.endswith(ast.get_docstring(ast.parse(text)).splitlines()[0])


@pytest.mark.parametrize("seconds", [0.2, 0.7])
def test_a_signal_while_the_command_still_imports_ends_it(seconds, tmp_path):
    process = start(*tutorial(tmp_path / "run"))
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


INLINE = "module://matplotlib_inline.backend_inline"  # of Jupyter's, for all commands
ENVIRONMENTS = {
    "no such device": (
        ["scripts/evaluate.py", "RUN"],
        {"JAX_PLATFORMS": "cuda"},
        (
            2,
            r"error: JAX finds no device \(JAX_PLATFORMS=cuda\); set JAX_PLATFORMS=cpu",
        ),
    ),
    "no cache": (
        ["scripts/evaluate.py", "RUN"],
        {"JAX_COMPILATION_CACHE_DIR": "/proc/none"},
        (
            0,
            "warning: programs are compiled each time, .*set JAX_COMPILATION_CACHE_DIR",
        ),
    ),
    "a notebook's backend": (
        ["scripts/plot.py", "RUN", "samples"],
        {"MPLBACKEND": INLINE},
        (0, ""),
    ),
    "no jit, to look into a step": (
        [
            "-m",
            "experiments.tutorial",
            *SMALL,
            "--figures.no-draw",
            "--train.num-epochs",
            1,
            *("--run-dir", "NEW"),
        ],
        {"JAX_DISABLE_JIT": "1"},
        (0, ""),
    ),
    "ASCII": (
        ["-m", "experiments.tutorial", "--help"],
        {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        (0, ""),
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_the_environment_asks_for_is_done_or_refused_in_a_line(
    name, short_run, tmp_path
):
    args, env, (expected, message) = ENVIRONMENTS[name]
    places = {"RUN": short_run.folder, "NEW": tmp_path / "run"}
    args = [places.get(arg, arg) for arg in args]
    status, _, err = run(*args, **env)
    assert (status, len(err.splitlines())) == (expected, bool(message)), err
    assert re.match(message, err)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's")
@pytest.mark.parametrize("module", ["experiments", "experiments.tutorial"])
def test_output_that_does_not_fit_is_one_line(module):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&- <&-"])
def test_it_trains_with_nothing_to_write_to(tmp_path, closed):
    command = [sys.executable, "-m", "experiments.tutorial", *SMALL]
    command += ["--train.num-epochs", 1, "--run-dir", tmp_path / "run"]
    line = f"{shlex.join(map(str, command))} {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_script_notices_that_it_runs_another_clones_code(tmp_path, short_run):
    for name in ("scripts", "ae_jax"):
        shutil.copytree(ROOT / name, tmp_path / name)
    script = tmp_path / "scripts" / "evaluate.py"
    status, _, err = run(script, short_run.folder)
    assert status == 2
    assert f"has ae_jax from {ROOT / 'ae_jax'}; give scripts/reproduce" in err


def test_set_up_installs_once_and_again_when_what_decides_it_changes(tmp_path):
    """In a project whose Python only notes what it is asked for."""
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    python, calls = tmp_path / ".venv" / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    python.chmod(0o755)

    def installs(extras):
        calls.write_text("")
        subprocess.run(
            ["sh", "-euc", f"extras={extras}; . scripts/setup.sh"],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            check=True,
        )
        return [
            "--constraint constraints.txt" in line
            for line in calls.read_text().splitlines()
        ]

    assert installs("") == [True]
    assert installs("") == []
    assert installs("test") == [True]
    for name in ("pyproject.toml", "constraints.txt"):
        with (tmp_path / name).open("a") as file:
            file.write("# another\n")
        assert installs("test") == [True]
        assert installs("test") == []
    tmp_path = shutil.copytree(tmp_path, tmp_path / "copy")
    assert installs("test") == [True]
