"""The comparison with PyTorch: a study of two sides, and a page about it."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from conftest import ROOT
from life import snapshot

from ae_jax import collapse, data, files
from ae_jax.config import TrainConfig
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder
from ae_jax.parity import report
from ae_jax.runs.run import open_run
from experiments import compare_pytorch as compare

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

TINY = compare.Comparison(
    data=data.Digits(),
    model=Autoencoder(hidden=(16, 8)),
    train=TrainConfig(num_epochs=1),
    lockstep_epochs=1,
    drift_steps=5,
    num_seeds=2,
    together=2,
)

# Runs the command without PyTorch.
NO_TORCH = """
import runpy, sys
sys.argv[0] = "compare_pytorch"
class NoTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
sys.meta_path.insert(0, NoTorch())
runpy.run_module("experiments.compare_pytorch", run_name="__main__")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison's config; read only."""
    config = replace(TINY, run_dir=tmp_path_factory.mktemp("done") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.study, "use_all_cores", lambda: None)  # JAX has started
        compare.main(config)
    return config


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(compare.study, "use_all_cores", lambda: None)


def test_a_comparison_leaves_report_numbers_figures_and_runs(finished):
    drawn = {path.name for path in finished.run_dir.glob("*.*")} - {".lock"}
    assert drawn == {
        "lockstep.png", "drift.png", "distributions.png", "report.html", "study.json",
        "summary.json",
    }  # fmt: skip
    found = files.read_json(finished.run_dir / "summary.json")
    json.dumps(found, allow_nan=False)
    steps = [row["step"] for row in found["mini"] + found["whole"]]
    assert steps == [4, 8, 12, 23]
    assert all(row["passed"] for row in found["checks"])
    assert found["drift"].keys() == report.DRIFT.keys()
    test = data.load(finished.data).test.images
    for side, place in (("ours", "ours"), ("theirs", "pytorch")):
        assert [row["seed"] for row in found[side]] == [0, 1]
        for row in found[side]:
            run = open_run(finished.run_dir / place / str(row["seed"]))
            assert run.score_split(test)["mse"] == row["test/mse"]
    page = (finished.run_dir / "report.html").read_text()
    assert "2 seeds a side" in page


def test_a_finished_comparison_is_left_and_says_so(finished, capsys):
    before = snapshot(finished.run_dir)
    compare.main(finished)
    assert "is finished" in capsys.readouterr().out
    assert snapshot(finished.run_dir) == before


def test_an_interrupted_comparison_keeps_its_finished_runs(tmp_path):
    folder = tmp_path / "run"
    options = ["--preset", "quick", "--data.name", "digits", "--run-dir", str(folder)]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.compare_pytorch", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (folder / "pytorch" / "0" / "summary.json").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert (process.wait(), process.stderr.read()) == (143, "")
    before = snapshot(folder / "ours") | snapshot(folder / "pytorch" / "0")
    small = replace(compare.PRESETS["quick"], data=data.Digits(), drift_steps=5)
    with pytest.raises(UserError, match="drift_steps: the run has 200, you asked"):
        compare.main(replace(small, run_dir=folder))
    compare.main(replace(small, run_dir=folder, drift_steps=200))
    after = snapshot(folder / "ours") | snapshot(folder / "pytorch" / "0")
    assert before == after


def test_what_the_pytorch_side_does_not_do_is_refused(tmp_path):
    other = replace(TINY, model=Autoencoder(init="flax"), run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.init: must be torch"):
        compare.main(other)
    assert not (tmp_path / "run").exists()


def test_a_check_that_fails_is_status_1(finished, monkeypatch, capsys):
    summary = files.read_json(finished.run_dir / "summary.json")
    summary["checks"][1] |= {"value": float("nan"), "passed": False}
    monkeypatch.setattr(compare.study, "run_study", lambda *args: summary)
    with pytest.raises(SystemExit) as end:
        compare.main(finished)
    assert end.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_without_pytorch_one_line_says_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, "--run-dir", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: PyTorch is not installed; ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_only_the_reference_becomes_the_result(finished, monkeypatch):
    kept = []
    results = compare.study.results
    monkeypatch.setattr(results, "write_result", lambda *a, **k: kept.append(k))
    compare.main(finished)
    assert kept == []
    moved = replace(TINY, data=data.Digits(dir=finished.run_dir))
    monkeypatch.setitem(compare.PRESETS, "reference", moved)
    compare.main(finished)
    found = files.read_json(finished.run_dir / "summary.json")
    values = {row["name"]: row["value"] for row in found["checks"][1:]}
    assert kept[0]["seeds"] == [0, 1]
    assert kept[0]["headline"] == {
        "lockstep_f64_12_abs": values["lockstep_f64_12_abs"],
        "lockstep_f64_23_nrel": values["lockstep_f64_23_nrel"],
        "tost_p": found["runs"]["tost_p"],
        "ks_p": found["runs"]["ks_p"],
        "collapse_fisher_p": found["runs"]["collapsed_p"],
    }
    _, seeds = kept[0]["table"]
    shown = [dict(zip(seeds["columns"], row, strict=True)) for row in seeds["rows"]]
    assert [row[""] for row in shown] == ["ours", "PyTorch"]
    for row, side in zip(shown, ("ours", "theirs"), strict=True):
        count = Counter(row["outcome"] for row in found[side])
        assert {k: int(row[k]) for k in collapse.OUTCOMES} == {
            **dict.fromkeys(collapse.OUTCOMES, 0), **count
        }  # fmt: skip
        assert row["runs"] == "2"
