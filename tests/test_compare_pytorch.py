"""The comparison with PyTorch: a study of two sides, and a page about it."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from life import make_runs, snapshot

from ae_jax import data, files, stats
from ae_jax.config import TrainConfig
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder
from ae_jax.parity import report
from ae_jax.runs.run import open_run
from ae_jax.stats import compare_runs
from experiments import compare_pytorch as compare
from experiments import pytorch_baseline as baseline

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

TINY = compare.Comparison(
    data=data.Digits(),
    model=Autoencoder(hidden=(8,)),
    train=TrainConfig(num_epochs=1),
    lockstep_epochs=1,
    drift_steps=5,
    num_seeds=2,
    together=2,
)


@pytest.fixture(autouse=True, scope="module")
def _one_device():
    with pytest.MonkeyPatch.context() as patch:  # JAX has started
        patch.setattr(compare.study, "use_all_cores", lambda: None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison's config; read only.

    It was interrupted once: all of our runs were finished, and the first of PyTorch's.
    """
    config = replace(TINY, run_dir=tmp_path_factory.mktemp("done") / "run")
    epochs = iter([baseline.train_epoch])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "train_epoch", lambda *args: next(epochs)(*args))
        with pytest.raises(StopIteration):
            compare.main(config)
    runs = [config.run_dir / "ours", config.run_dir / "pytorch" / "0"]
    before = [snapshot(run) for run in runs]
    assert all(before)
    compare.main(config)
    assert [snapshot(run) for run in runs] == before
    return config


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
    for apart in found["drift"].values():
        assert len(apart) == 5
        assert max(apart) < 1e-4
    test = data.load(finished.data).test.images
    for side, place in (("ours", "ours"), ("theirs", "pytorch")):
        assert [row["seed"] for row in found[side]] == [0, 1]
        for row in found[side]:
            run = open_run(finished.run_dir / place / str(row["seed"]))
            assert run.score_split(test)["mse"] == row["test/mse"]
    page = (finished.run_dir / "report.html").read_text()
    assert "2 seeds a side" in page


@pytest.mark.parametrize(("name", "limit"), [("float64", 1e-13), ("float32", 1e-4)])
def test_layers_and_gradients_are_pytorchs(finished, name, limit):
    found = files.read_json(finished.run_dir / "summary.json")["layers"][name]
    assert found["exact"]
    assert len(found["forward"]) == 4
    assert len(found["gradient"]) == 8
    for row in found["forward"] + found["gradient"]:
        assert 0 <= row["nrel"] < limit, row


def test_a_finished_comparison_is_left_and_says_so(finished, capsys):
    before = snapshot(finished.run_dir)
    compare.main(finished)
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="drift_steps: the run has 5, you asked"):
        compare.main(replace(finished, drift_steps=6))
    assert snapshot(finished.run_dir) == before


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
    assert not compare.check_weights([{"exact": True}, {"exact": False}])["passed"]


class NoTorch:
    """Finds every module but PyTorch, which is not installed."""

    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")


def test_without_pytorch_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "meta_path", [NoTorch(), *sys.meta_path])
    monkeypatch.delattr("experiments.pytorch_baseline")
    for name in ("torch", baseline.__name__, compare.__name__):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("ae_jax.cli.leave_on_signals", lambda: None)
    monkeypatch.setattr(sys, "argv", ["", "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(compare.__name__, run_name="__main__")
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: PyTorch is not installed; ")
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_only_the_reference_becomes_the_result(finished, monkeypatch):
    summary = files.read_json(finished.run_dir / "summary.json")
    ours, theirs = make_runs(7, 3, 4), make_runs(20, 1, 5, mean=0.035)
    ours[0]["test/mse"] = theirs[0]["test/mse"] = 0.03  # a mean that trimming changes
    summary["runs"] = found = compare_runs(ours, theirs, margin=0.03)
    monkeypatch.setattr(compare.study, "run_study", lambda *args: summary)
    kept = []
    results = compare.study.results
    monkeypatch.setattr(results, "write_result", lambda *a, **k: kept.append(k))
    compare.main(finished)
    assert kept == []
    moved = replace(TINY, data=data.Digits(dir=finished.run_dir))
    monkeypatch.setitem(compare.PRESETS, "reference", moved)
    compare.main(finished)
    values = {row["name"]: row["value"] for row in summary["checks"]}
    assert kept[0]["seeds"] == [0, 1]
    assert kept[0]["headline"] == {
        "lockstep_f64_12_abs": values["lockstep_f64_12_abs"],
        "lockstep_f64_23_nrel": values["lockstep_f64_23_nrel"],
        "tost_p": found["tost_p"],
        "ks_p": found["ks_p"],
        "collapse_fisher_p": found["collapsed_p"],
    }
    numbers, seeds = kept[0]["table"]
    for row, check in zip(numbers["rows"], summary["checks"], strict=True):
        shown = [f"{check['value']:.1e}", f"{check['limit']:.0e}"]
        assert row == [check["what"], *shown]
    for row, side in zip(seeds["rows"], ("ours", "theirs"), strict=True):
        of = found[side]
        assert dict(zip(seeds["columns"], row, strict=True)) == {
            "": report.SIDES[side],
            "runs": str(of["runs"]),
            "healthy": str(of["healthy"]),
            "part-dead": str(of["part_dead"]),
            "collapsed": str(of["collapsed"]),
            "trimmed mean test MSE, healthy": f"{of['trimmed_mean']:.4f}",
            "mean ± sd": f"{of['mean']:.4f} ± {of['sd']:.4f}",
        }


def test_the_seeds_of_the_reference_are_enough_by_what_was_known_before():
    known = files.read_json(ROOT / "experiments" / "results" / "seeds.json")
    headline, reference = known["headline"], compare.PRESETS["reference"]
    needed = stats.runs_needed(headline["test/mse/spread"], reference.margin)
    assert reference.num_seeds * headline["share_healthy"] > 1.5 * needed
    assert reference.train.seed > max(known["seeds"])
