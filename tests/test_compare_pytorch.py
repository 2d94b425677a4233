"""The comparison with PyTorch: its report is whole, and it goes on where it was."""

import ast
import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import torch
from conftest import ROOT

from ae_jax import data, interop, records, report, run
from ae_jax.config import DataConfig, TrainConfig, UserError
from experiments import compare_pytorch as compare

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

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


def tiny(folder, **fields):
    sizes = {
        "lockstep_epochs": 1,
        "drift_steps": 5,
        "num_seeds": 2,
        "seeds_at_once": 1,
        "speed_rounds": 2,
        "speed_steps": 3,
    }
    return compare.Comparison(
        run_dir=folder,
        data=DataConfig(name="digits"),
        train=TrainConfig(num_epochs=1),
        **{**sizes, **fields},
    )


@pytest.fixture(scope="module")
def digits():
    return data.load(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison's config; read only."""
    config = tiny(tmp_path_factory.mktemp("finished") / "run")
    with pytest.MonkeyPatch.context() as patch:
        # Without its compiler, torch.compile fails as it does where there is none.
        patch.setattr(torch, "compile", fail)
        compare.compare(config)
    return config


def fail(model):
    def forward(x):
        raise RuntimeError("no working C++ compiler")

    return forward


# --- The run folder ---


def test_a_comparison_leaves_report_numbers_and_figures(finished):
    folder = finished.run_dir
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {"lockstep.png", "drift.png", "distributions.png"}
    found = records.read_json(folder / "parity.json")
    steps = [row["step"] for row in found["mini"] + found["whole"]]
    assert steps == [4, 8, 12, 23]
    assert [row["seed"] for row in found["ours"]] == [0, 1]
    assert [row["seed"] for row in found["theirs"]] == [0, 1]
    assert all(row["passed"] for row in found["checks"])
    assert set(found["drift"]) == set(report.DRIFT)
    assert set(found["headline"]) == {
        "lockstep_f64_12_abs", "lockstep_f64_23_nrel", "tost_p", "ks_p",
        "collapse_fisher_p", "speed_ratio_best", "speed_ratio_item_by_item",
    }  # fmt: skip
    json.dumps(found, allow_nan=False)
    versions = records.read_description(folder)["versions"]
    assert versions["torch"] == torch.__version__


def test_report_is_self_contained_and_whole(finished):
    page = (finished.run_dir / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(.{10})', page) == ["data:image"] * 3
    assert not re.search(r"url\(|@import|<script|<link", page)
    for words in (
        "layer by layer", "Lockstep in float64", "Drift in float32", "Many seeds",
        "Speed and memory", "Where ports go wrong", "no working C++ compiler",
    ):  # fmt: skip
        assert words in page
    opened = re.findall(r"<(\w+)[^>]*>", page.partition("<style>")[0])
    assert "html" in opened
    for tag in ("table", "tr", "td", "th", "p", "h2", "code"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>")


def test_a_finished_comparison_is_left_and_says_so(finished, capsys):
    before = (finished.run_dir / "report.html").stat().st_mtime_ns
    compare.compare(finished)
    assert "is finished" in capsys.readouterr().out
    assert (finished.run_dir / "report.html").stat().st_mtime_ns == before


def test_only_what_is_not_finished_is_done_again(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (finished.run_dir / "finished.jsonl").read_text().splitlines(keepends=True)
    (folder / "finished.jsonl").write_text("".join(lines[:-1]))
    config = dataclasses.replace(finished, run_dir=folder)
    description = records.read_description(finished.run_dir)
    records.write_json(folder / "config.json", description)
    compare.compare(config)
    done = [line for line in capsys.readouterr().out.splitlines() if " … " in line]
    assert [line.partition(" …")[0] for line in done] == ["PyTorch's seed 1"]
    # The same seed comes to the same end.
    one, other = (
        records.read_json(path / "parity.json") for path in (finished.run_dir, folder)
    )
    assert one["theirs"] == other["theirs"]
    assert one["headline"] == other["headline"]


def test_a_piece_that_fails_leaves_those_before_it(tmp_path):
    ledger = compare.Ledger(tmp_path / "finished.jsonl")
    assert ledger.once("one", lambda: {"a": (1, 2)}) == {"a": [1, 2]}
    with pytest.raises(ZeroDivisionError):
        ledger.once("two", lambda: 1 / 0)
    again = compare.Ledger(tmp_path / "finished.jsonl")
    assert again.once("one", lambda: 1 / 0) == {"a": [1, 2]}
    assert again.once("two", lambda: 2) == 2


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
    _, told = process.communicate()
    assert (process.returncode, told) == (143, "")
    ledger = compare.Ledger(folder / "finished.jsonl")
    assert ledger.once("layers in float32", lambda: 1 / 0)["exact"]


def test_another_comparison_in_the_folder_is_refused(finished):
    for other, message in (
        (dataclasses.replace(finished, num_seeds=4), "num_seeds: the run has 2"),
        (
            dataclasses.replace(finished, train=TrainConfig(num_epochs=2)),
            "train.num_epochs: the run has 1, you asked for 2",
        ),
    ):
        with pytest.raises(UserError, match=message):
            compare.compare(other)


def test_a_damaged_ledger_is_told_in_one_line(tmp_path):
    (tmp_path / "finished.jsonl").write_text('{"piece": "one"')
    with pytest.raises(UserError, match=r"finished.jsonl: damaged"):
        compare.Ledger(tmp_path / "finished.jsonl")


def test_a_lockstep_that_fails_is_status_1(finished, capsys):
    found = records.read_json(finished.run_dir / "parity.json")
    worse = [{**row, "mu_abs": float("nan")} for row in found["mini"]]
    checks = compare.check_lockstep(worse, found["whole"])
    assert [row["passed"] for row in checks] == [False, True]
    with pytest.raises(SystemExit) as end:
        compare.tell(checks, finished.run_dir / "report.html")
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
    assert "-c constraints.txt -e '.[torch]'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", "code_activation", "leaky_relu"),
        ("train", "weight_decay", 0.1),
        ("train", "precision", "float64"),
        ("data", "num_validation", 10),
    ],
)
def test_what_the_pytorch_side_does_not_do_is_refused(part, field, value):
    config = compare.Comparison()
    changed = dataclasses.replace(getattr(config, part), **{field: value})
    with pytest.raises(ValueError, match=f"{part}.{field}: must be "):
        dataclasses.replace(config, **{part: changed})


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="num_seeds: must be above 0, got 0"):
        compare.Comparison(num_seeds=0)


def test_only_the_reference_measures_what_the_result_shows(tmp_path):
    reference = compare.PRESETS["reference"]
    elsewhere = DataConfig(dir=tmp_path)
    moved = dataclasses.replace(reference, run_dir=tmp_path, data=elsewhere)
    assert compare.is_reference(moved)
    assert not compare.is_reference(compare.PRESETS["quick"])
    assert not compare.is_reference(dataclasses.replace(reference, num_seeds=33))


def test_the_result_has_flat_numbers_and_rows(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    found = records.read_json(finished.run_dir / "parity.json")
    compare.write_result(found, finished)
    result = records.read_json(
        tmp_path / "experiments" / "results" / "compare_pytorch.json"
    )
    assert result["seeds"] == [0, 1]
    assert all(isinstance(value, float) for value in result["headline"].values())
    assert {row["part"] for row in result["table"]} == {"check", "runs", "speed"}


# --- What is measured ---


def test_each_test_that_the_report_names_exists():
    named = [pitfall.test for pitfall in report.PITFALLS] + [report.CATCHES]
    for name in named:
        path, _, test = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert test in {node.name for node in tree.body if hasattr(node, "name")}, name


def test_members_of_a_group_are_single_runs(digits, tmp_path):
    config = tiny(tmp_path)
    rows = compare.train_ours(compare.Pair(config, digits), [0, config.train.seed])
    assert [row["seed"] for row in rows] == [0, config.train.seed]
    pair = compare.Pair(config, digits)
    program = pair.ours()
    (alone,) = compare.our_epochs(
        program.train_step,
        program.init(),
        digits.train.images,
        [pair.shuffle(program, 0)],
    )
    weights, test = interop.to_linen(alone.params), digits.test.images
    recon = run.in_blocks(program.reconstruct, weights, test)
    np.testing.assert_allclose(rows[1]["test/mse"], compare.mse(recon, test), rtol=1e-5)


def test_our_side_leaves_the_state_it_starts_from(digits, tmp_path):
    pair = compare.Pair(tiny(tmp_path), digits)
    program = pair.ours()
    state = program.init()
    orders = [pair.shuffle(program, 0)] * 2
    for _ in compare.our_epochs(program.train_step, state, digits.train.images, orders):
        pass
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(state.step) == 0


def test_both_sides_are_single_again_after_an_error():
    seen = []

    def look():
        seen.append((str(jax.numpy.ones(1).dtype), torch.ones(1).dtype))

    with contextlib.suppress(ZeroDivisionError), compare.precision("float64"):
        look()
        raise ZeroDivisionError
    look()
    assert seen == [("float64", torch.float64), ("float32", torch.float32)]


def test_ratios_are_of_times_within_a_round():
    rounds = [
        {"epoch_s": {"ours": 1.0, "item_by_item": 8.0, "fused": 2.0}},
        {"epoch_s": {"ours": 2.0, "item_by_item": 20.0, "fused": 4.0}},
    ]
    ratios = compare.speed_ratios(rounds)
    assert ratios["item_by_item"] == {"median": 9.0, "low": 8.0, "high": 10.0}
    assert ratios["best"] == ratios["fused"] == {"median": 2.0, "low": 2.0, "high": 2.0}
