"""The comparison with PyTorch: its report is whole, and it resumes where it was."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from ae_jax import data, files
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
    seeds_at_once=2,
    speed_rounds=2,
    speed_steps=3,
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


def fail(model):
    def forward(x):
        raise RuntimeError("no working C++ compiler")

    return forward


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison's config; read only."""
    config = dataclasses.replace(TINY, run_dir=tmp_path_factory.mktemp("done") / "run")
    with pytest.MonkeyPatch.context() as patch:
        # Without its compiler, torch.compile fails as it does where there is none.
        patch.setattr(torch, "compile", fail)
        compare.main(config)
    return config


def test_a_comparison_leaves_report_numbers_figures_and_runs(finished):
    folder = finished.run_dir
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {"lockstep.png", "drift.png", "distributions.png"}
    found = files.read_json(folder / "parity.json")
    json.dumps(found, allow_nan=False)
    steps = [row["step"] for row in found["mini"] + found["whole"]]
    assert steps == [4, 8, 12, 23]
    assert all(row["passed"] for row in found["checks"])
    assert found["drift"].keys() == report.DRIFT.keys()
    assert set(found["headline"]) == {
        "lockstep_f64_12_abs", "lockstep_f64_23_nrel", "tost_p", "ks_p",
        "collapse_fisher_p",
    }  # fmt: skip
    for side in ("ours", "theirs"):
        assert [row["seed"] for row in found[side]] == [0, 1]
    test = data.load(finished.data).test.images
    for row in found["ours"]:
        run = open_run(folder / "ours" / str(row["seed"]))
        assert run.score_split(test)["mse"] == row["test/mse"]
    assert "no working C++ compiler" in (folder / "report.html").read_text()
    versions = files.read_json(folder / "config.json")["versions"]
    assert versions["torch"] == torch.__version__


def test_a_finished_comparison_is_left_and_says_so(finished, capsys):
    before = (finished.run_dir / "report.html").stat().st_mtime_ns
    compare.main(finished)
    assert "is finished" in capsys.readouterr().out
    assert (finished.run_dir / "report.html").stat().st_mtime_ns == before


def test_only_what_is_not_finished_is_done_again(finished, tmp_path, capsys):
    config, lines = dataclasses.replace(finished, run_dir=tmp_path / "run"), []
    compare.describe(
        dataclasses.replace(config, run_dir=tmp_path), data.load(config.data)
    )
    config.run_dir.mkdir()
    (tmp_path / "config.json").rename(config.run_dir / "config.json")
    lines = (finished.run_dir / "finished.jsonl").read_text().splitlines(keepends=True)
    (config.run_dir / "finished.jsonl").write_text("".join(lines[:-1]))
    compare.main(config)
    done = [line for line in capsys.readouterr().out.splitlines() if " … " in line]
    assert [line.partition(" …")[0] for line in done] == ["PyTorch's seed 1"]
    # The same seeds come to the same end.
    one, other = (
        files.read_json(path / "parity.json")
        for path in (finished.run_dir, config.run_dir)
    )
    assert one["theirs"] == other["theirs"]
    assert one["headline"] == other["headline"]


def test_a_piece_that_fails_leaves_those_before_it(tmp_path):
    path = tmp_path / "finished.jsonl"
    ledger = compare.Ledger(path)
    assert ledger.once("one", lambda: {"a": (1, 2)}) == {"a": [1, 2]}
    with pytest.raises(ZeroDivisionError):
        ledger.once("two", lambda: 1 / 0)
    again = compare.Ledger(path)
    assert again.once("one", lambda: 1 / 0) == {"a": [1, 2]}
    assert again.once("two", lambda: 2) == 2
    path.write_text('{"piece": "one"')
    with pytest.raises(UserError, match=r"finished.jsonl: damaged"):
        compare.Ledger(path)


def test_a_signal_ends_the_command_and_what_is_finished_is_kept(tmp_path):
    folder = tmp_path / "run"
    options = ["--preset", "quick", "--data.name", "digits", "--run-dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.compare_pytorch", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / "finished.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (143, "")
    ledger = compare.Ledger(folder / "finished.jsonl")
    assert ledger.once("layers in float32", lambda: 1 / 0)["exact"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 4}, "num_seeds: the run has 2, you asked for 4"),
        ({"train": TrainConfig(num_epochs=2)}, "train.num_epochs: the run has 1, you"),
    ],
)
def test_another_comparison_in_the_folder_is_refused(finished, change, message):
    with pytest.raises(UserError, match=message):
        compare.main(dataclasses.replace(finished, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": Autoencoder(latent_activation="none")},
            "model.latent_activation: m",
        ),
        ({"train": TrainConfig(weight_decay=0.1)}, "train.weight_decay: must be 0.0"),
        ({"data": data.Digits(num_validation=10)}, "data.num_validation: must be 0"),
        ({"num_seeds": 0}, "num_seeds: "),
    ],
)
def test_what_the_pytorch_side_does_not_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_a_check_that_fails_is_status_1(tmp_path, capsys):
    check = {"what": "float64", "value": float("nan"), "limit": 1e-10, "passed": False}
    with pytest.raises(SystemExit) as end:
        compare.say([check], tmp_path / "report.html")
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


def test_only_the_reference_becomes_the_result(finished, tmp_path, monkeypatch):
    moved = dataclasses.replace(TINY, run_dir=tmp_path, data=data.Digits(dir=tmp_path))
    assert not compare.differ(TINY, moved)
    assert compare.differ(TINY, dataclasses.replace(TINY, num_seeds=3))
    assert compare.differ(*compare.PRESETS.values())
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setitem(compare.PRESETS, "reference", TINY)
    description, found = (
        files.read_json(finished.run_dir / name)
        for name in ("config.json", "parity.json")
    )
    compare.write_report(moved, description, found)
    path = tmp_path / "experiments" / "results" / "compare_pytorch.json"
    result = files.read_json(path)
    assert result["seeds"] == [0, 1]
    assert result["headline"] == found["headline"]


def test_ratios_are_of_times_within_a_round():
    rounds = [
        {"epoch_s": {"ours": 1.0, "item_by_item": 8.0, "fused": 2.0}},
        {"epoch_s": {"ours": 2.0, "item_by_item": 20.0, "fused": 4.0}},
    ]
    ratios = compare.speed_ratios(rounds)
    assert ratios["item_by_item"] == {"median": 9.0, "low": 8.0, "high": 10.0}
    assert ratios["best"] == ratios["fused"] == {"median": 2.0, "low": 2.0, "high": 2.0}
