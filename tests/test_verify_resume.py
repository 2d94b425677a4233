"""The proof of resuming can be given, and can fail."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from ae_jax.files import read_json, write_json
from ae_jax.runs.trainer import train_run
from scripts import verify_resume

SMALL = [
    *("--preset", "quick", "--model.hidden", "16", "8", "--train.num-epochs", "4"),
    *("--objective.name", "denoising", "--checkpoint.every-steps", "10"),
]


def verify(*options):
    return subprocess.run(
        [sys.executable, "scripts/verify_resume.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_runs_end_as_an_uninterrupted_one():
    done = verify(*SMALL, "--kills", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert verdict.pop("runs") >= 1
    assert verdict.pop("wall_s") > 0
    assert verdict == {"identical": True, "kills": 2, "steps": 4 * 23}
    assert "kill 2 of 2 after " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run-dir", "runs/mine"], "error: --run-dir: "),
        (["--kills", "0"], "kills"),
        (["--train.sed", "1"], "--train.seed"),
    ],
)
def test_a_wrong_option_starts_no_run(options, message):
    done = verify(*options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "uninterrupted:" not in done.stderr


@pytest.fixture
def in_process(monkeypatch, tmp_path, finished_run):
    """The runs of a verification as calls, the killed ones with another seed."""

    def verified(seed):
        def attempt(config, run_dir, limit_s):
            if run_dir.name == "uninterrupted":
                shutil.copytree(finished_run.folder, run_dir)
                return 0
            if seed > 1:
                log = run_dir.with_suffix(".log")
                log.write_text("one line\nerror: it failed\n")
                return 2
            settings = finished_run.config
            train = dataclasses.replace(settings.train, seed=seed)
            train_run(dataclasses.replace(settings, run_dir=run_dir, train=train))
            return 0

        monkeypatch.setattr(verify_resume, "attempt", attempt)
        config = dataclasses.replace(verify_resume.PRESETS["quick"], kills=1)
        return verify_resume.verify(config, tmp_path)

    return verified


def test_another_seed_differs_from_the_uninterrupted_run(in_process):
    verdict = in_process(seed=1)
    assert verdict["identical"] is False
    shown = "\n".join(verdict["differences"])
    for part in ("params.encoder_0.kernel: ", "opt_state", "key: ", "test/mse: ",
                 "line 1, train/mse: ", "samples.png: "):  # fmt: skip
        assert part in shown
    assert "step: " not in shown
    assert "files: " not in shown


def test_a_run_that_fails_is_a_verdict_with_its_last_line(in_process):
    (shown,) = in_process(seed=2)["differences"]
    assert shown == "run 1 ended with status 2: error: it failed"


def test_one_changed_digit_and_a_leftover_are_found(finished_run, tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    for folder in (same, other):
        shutil.copytree(finished_run.folder, folder)
    assert verify_resume.compare(same, other) == []
    summary = read_json(other / "summary.json")
    write_json(other / "summary.json", {**summary, "wall_s": 1.0, "test/ssim": 0.5})
    (other / "figures" / ".samples.png.77").touch()
    shown = verify_resume.compare(same, other)
    assert [line.partition(": ")[0] for line in shown] == [
        "summary.json, test/ssim",
        "files",
        ".samples.png.77",
    ]
