"""The benchmark measures what it says; what it measured is no affair of a test."""

import itertools
import time

import numpy as np
import pytest

from ae_jax import cli
from ae_jax.files import read_json
from ae_jax.models.dense import Autoencoder
from ae_jax.runs import results
from experiments import tutorial
from scripts import benchmark

# torch.compile loads parts of PyTorch that PyTorch calls old.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

TINY = benchmark.Sizes(
    rounds=2,
    steps=5,
    epochs=1,
    compiled=False,  # to compile takes a minute
    batches=(16, 64),
    widths=(1, 2),
    seeds=(1, 2),
    devices=(2,),
    streams=(100, 200),
    turn_s=0.01,
)


def test_products_of_a_step_are_those_of_the_tutorials_net():
    shapes = benchmark.layers(784, Autoencoder())
    assert shapes[:4] == [(784, 128), (128, 64), (64, 12), (12, 3)]
    assert shapes[4:] == [(3, 12), (12, 64), (64, 128), (128, 784)]
    found = benchmark.products(shapes, 64)
    assert (128, 64, 784) in found  # a kernel's gradient
    assert (64, 784, 128) in found  # forward, and the last layer's input gradient
    weights = sum(fan_in * width for fan_in, width in shapes)
    flops = 2 * sum(m * k * n for m, k, n in found)
    assert flops == 2 * 64 * (3 * weights - 784 * 128)


def test_the_best_time_is_that_of_the_work():
    assert 0.02 <= benchmark.best_of(lambda: time.sleep(0.02), rounds=2) < 0.1


def test_ratios_are_of_times_within_a_round():
    rounds = [{"ours": 1.0, "fused": 3.0}, {"ours": 2.0, "fused": 6.0}]
    assert benchmark.ratio({"epoch_s": rounds}, "fused") == 3.0


def test_streams_repeat_the_images(tmp_path):
    images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2, 1)
    benchmark.write_npz(images, 7, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as stored:
        np.testing.assert_array_equal(stored["train_images"], images[np.arange(7) % 3])
        assert len(stored["test_images"]) == 1000


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    """All that one run of the script leaves, its result apart from the project's.

    Of our commands one is given; the others have their options checked.
    """
    root = tmp_path_factory.mktemp("benchmark")
    real, rows = benchmark.run_command, []

    def run_command(experiment, run_dir, *options, **env):
        cli.parse(experiment, tutorial.PRESETS, "", list(options))
        if not rows:
            rows.append(real(experiment, run_dir, *options, **env))
        return rows[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "run_command", run_command)
        patch.setitem(benchmark.PRESETS, "full", TINY)
        patch.setattr(benchmark, "RESULTS", root / "results")
        benchmark.main("full", root / "a.json", "digits", root / "data")
    return root


def test_the_headline_has_all_its_names(main):
    head = read_json(main / "results" / "benchmark.json")["headline"]
    assert set(head) == {
        "share_of_limit", "speed_ratio_best", "speed_ratio_item_by_item",
        "first_step_cold_s", "first_step_cached_s", "peak_memory_ratio",
        "whole_job_ratio",
    }  # fmt: skip
    assert all(np.isfinite(value) and value > 0 for value in head.values())


def test_the_headline_is_that_of_the_rounds(main):
    found = read_json(main / "a.json")
    rounds, head = found["epoch_s"], found["headline"]
    theirs = [name for name in rounds[0] if not name.startswith("ours")]
    assert set(theirs) == {"item_by_item", "data_loader", "in_memory", "fused"}
    ratios = [np.median([row[name] / row["ours"] for row in rounds]) for name in theirs]
    assert head["speed_ratio_best"] == pytest.approx(min(ratios))
    memory = [found[side]["peak_memory_bytes"] for side in ("cached", "pytorch")]
    assert head["peak_memory_ratio"] == pytest.approx(memory[0] / memory[1])
    limits = np.mean([limit["step_s"] for limit in found["limit"]])
    step_s = np.median([row["ours"] for row in rounds]) / 23
    assert head["share_of_limit"] == pytest.approx(limits / step_s)


def test_the_tables_show_every_contender_and_command(main):
    (speed,) = results.read_tables(main / "results" / "benchmark.json")
    ours = [float(row[3]) for row in speed["rows"] if row[0] == "**ours**"]
    assert ours == [1.0]
    assert [float(row[3]) for row in speed["rows"]] == sorted(
        float(row[3]) for row in speed["rows"]
    )
    (scaling,) = results.read_tables(main / "results" / "scaling.json")
    assert [row[0] for row in scaling["rows"]] == [
        "2 devices, batches of 8,192",
        "100 images streamed",
        "200 images streamed",
    ]


def test_ideal_lines_begin_where_the_measurement_does(main):
    assert (main / "a.png").read_bytes().startswith(b"\x89PNG")
    growth = {row["xlabel"]: row for row in read_json(main / "a.json")["growth"]}
    assert list(growth) == ["batch size", "times the width", "seeds in one program"]
    for row in growth.values():
        assert row["ideal"][0] == row["y"][0]
        assert min(row["y"]) > 0
    flat = [growth["batch size"]["ideal"], growth["seeds in one program"]["ideal"]]
    assert all(first == last for first, last in flat)
    work = []
    for times in (1, 2):
        widths = (64, *(times * n for n in (128, 64, 12)), 3)
        weights = 2 * sum(a * b for a, b in itertools.pairwise(widths))
        work.append(3 * weights - widths[0] * widths[1])
    first, last = growth["times the width"]["ideal"]
    assert last / first == pytest.approx(work[1] / work[0])
