"""The commands as a user types them, each in a process of its own."""

import ast
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_trainer import assert_same_end

from ae_jax import records, run

SMALL = [
    *("--preset", "quick", "--train.seed", "0", "--train.num-epochs", "15"),
    *("--model.hidden", "16", "8"),
]


def command(*args, cwd=ROOT):
    """Run ``python ARGS`` as from a shell; paths in ARGS may lie under ROOT."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def tutorial(folder, *options):
    return ["-m", "experiments.tutorial", *SMALL, "--run-dir", str(folder), *options]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tutorial and what its command printed; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = command(*tutorial(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_tutorial_ends_in_scores_and_figures(finished):
    folder, shown = finished
    drawn = {path.stem for path in (folder / "figures").glob("*.png")}
    assert drawn == set(run.FIGURES)
    assert "test, PCA of 3 components" in shown
    assert "dead code units: " in shown
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 15
    assert lines[-1].startswith("epoch 15/15  train/mse 0.0")


@pytest.mark.parametrize(
    ("signum", "status"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)],
    ids=str,
)
def test_a_disturbed_run_ends_as_an_undisturbed_one(finished, tmp_path, signum, status):
    args = tutorial(tmp_path / "run", "--checkpoint.every-steps", "7")
    process = subprocess.Popen(
        [sys.executable, *args], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while not list((tmp_path / "run" / "checkpoints").glob("[0-9]*[0-9]")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signum)
    _, told = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in told
    step = run.open_run(tmp_path / "run").step
    assert 0 < step < 15 * 23
    again = command(*args)
    assert again.returncode == 0, again.stderr
    assert f"going on from step {step}" in again.stderr
    assert_same_end(tmp_path / "run", finished[0])


def test_a_finished_command_says_so(finished):
    again = command(*tutorial(finished[0]))
    assert (again.returncode, again.stderr) == (0, "")
    assert "is finished after 15 epochs" in again.stdout


def test_the_runs_own_config_starts_it_again_elsewhere(finished, tmp_path):
    folder = tmp_path / "run"
    config = ["--config", finished[0] / "config.json", "--run-dir", folder]
    done = command("-m", "experiments.tutorial", *config)
    assert done.returncode == 0, done.stderr
    assert_same_end(folder, finished[0])


def test_python_m_experiments_lists_them_a_line_each():
    shown = command("-m", "experiments").stdout.splitlines()
    names = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    assert {line.split()[2] for line in shown} == {f"experiments.{n}" for n in names}
    for line in shown:
        path = ROOT / "experiments" / f"{line.split()[2].split('.')[1]}.py"
        assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] in line


def test_plot_draws_all_figures_or_those_named(finished):
    done = command("scripts/plot.py", finished[0])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(run.FIGURES)
    one = command("scripts/plot.py", finished[0], "samples")
    assert one.stdout == f"{finished[0]}/figures/samples.png\n"


def test_evaluate_gives_the_numbers_of_the_summary(finished):
    done = command("scripts/evaluate.py", finished[0], "--json")
    scores = json.loads(done.stdout)
    summary = records.read_json(finished[0] / "summary.json")
    for name in ("test/mse", "test/psnr_db", "test/ssim", "code/dead_units"):
        assert scores[name] == summary[name]
    shown = command("scripts/evaluate.py", finished[0], "--checkpoint", "best").stdout
    assert "test/mse" in shown


def test_compare_shows_differences_scores_and_curves_and_keeps_a_result(
    finished, tmp_path
):
    other = tmp_path / "other"
    config = ["--config", finished[0] / "config.json", "--run-dir", other]
    command("-m", "experiments.tutorial", *config, "--train.seed", "1")
    done = command(
        ROOT / "scripts" / "compare.py", finished[0], other, "--result", "two",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train.seed: 0, 1" in done.stdout
    assert str(finished[0].parent / "compare.png") in done.stdout
    result = records.read_json(tmp_path / "experiments" / "results" / "two.json")
    assert set(result) == {
        "experiment", "command", "date", "machine", "versions", "seeds", "headline",
        "table",
    }  # fmt: skip
    assert result["seeds"] == [0, 1]
    head = result["headline"]
    assert head["healthy"] + head["part_dead"] + head["collapsed"] == 2
    summary = records.read_json(other / "summary.json")
    assert result["table"][1]["test/mse"] == summary["test/mse"]


def test_tables_in_readme_and_docs_are_up_to_date():
    done = command("scripts/tables.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["scripts/plot.py", "nowhere"], "nowhere: not a run folder"),
        (["scripts/evaluate.py", "nowhere"], "nowhere: not a run folder"),
        (["scripts/compare.py", "nowhere"], "compare needs two runs or more, got 1"),
        (["scripts/compare.py", "a", "b"], "a: not a run folder"),
        (
            ["-m", "experiments.tutorial", "--config", "nowhere.json"],
            "--config: cannot read nowhere.json",
        ),
        (
            ["-m", "experiments.tutorial", "--run-dir", "README.md/run"],
            "README.md/run: ",
        ),
    ],
)
def test_a_users_mistake_gets_one_line_and_status_2(args, message):
    done = command(*args)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_wrong_figure_name_is_answered_with_the_nearest(finished):
    done = command("scripts/plot.py", finished[0], "sample")
    assert done.returncode == 2
    assert "did you mean samples?" in done.stderr
