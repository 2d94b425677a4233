"""The proof of resuming can be given, and can fail."""

import dataclasses
import json
import subprocess
import sys

import pytest
from conftest import ROOT
from test_trainer import fit, small

from scripts import verify_resume

SMALL = ["--preset", "quick", "--model.hidden", "16", "8", "--train.num-epochs", "5"]


def verify(*options):
    return subprocess.run(
        [sys.executable, "scripts/verify_resume.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_runs_end_as_an_undisturbed_one():
    done = verify(*SMALL, "--kills", "3")
    verdict = json.loads(done.stdout)
    assert (done.returncode, verdict.pop("identical")) == (0, True), done.stdout
    assert verdict.pop("runs") >= 1
    assert verdict.pop("wall_s") > 0
    assert verdict == {"kills": 3, "steps": 5 * 23}
    assert "kill 3 of 3 after " in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run-dir", "runs/mine"], "error: --run-dir: "),
        (["--kills", "0"], "kills: must be above 0"),
        (["--train.sed", "1"], "--train.seed"),
    ],
)
def test_a_wrong_option_starts_no_run(options, message):
    done = verify(*options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "undisturbed" not in done.stderr


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """The runs of a verification as calls; a run is "killed" if it has a limit."""

    def verified(disturb):
        def attempt(config, run_dir, limit_s):
            seed = config.train.seed + (disturb if run_dir.name[0] == "d" else 0)
            if seed > 1:
                verify_resume.log_of(run_dir).write_text("one line\nerror: it failed\n")
                return 2
            fit(small(run_dir, num_epochs=1, seed=seed))
            return 0

        monkeypatch.setattr(verify_resume, "attempt", attempt)
        config = dataclasses.replace(verify_resume.PRESETS["quick"], kills=1)
        return verify_resume.verify(config, tmp_path)

    return verified


def test_another_seed_is_told_from_the_undisturbed_run(in_process):
    verdict = in_process(disturb=1)
    assert verdict["identical"] is False
    told = "\n".join(verdict["differences"])
    for part in (".params['encoder_0']['kernel']: ", ".opt_state", ".key", "line 1: "):
        assert part in told
    assert ".step" not in told


def test_a_run_that_fails_is_a_verdict_with_its_last_words(in_process):
    (told,) = in_process(disturb=2)["differences"]
    assert told == "run 1 ended with status 2: error: it failed"


def test_a_leftover_is_told(tmp_path):
    for name in ("a", "b"):
        fit(small(tmp_path / name, num_epochs=1))
    assert verify_resume.compare(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / "figures" / ".samples.png.77").touch()
    (told,) = verify_resume.compare(tmp_path / "a", tmp_path / "b")
    assert told.startswith("files: ")
    assert "figures/.samples.png.77" in told
