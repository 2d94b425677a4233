"""The benchmark measures what it says; what it measured is no affair of a test."""

import dataclasses
import time

import numpy as np
import pytest

from ae_jax import records
from ae_jax.config import Config, DataConfig
from experiments import pytorch_baseline as baseline
from scripts import benchmark

pytestmark = [
    pytest.mark.usefixtures("torch_on_one_thread"),
    # torch.compile loads parts of PyTorch that PyTorch calls old.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TINY = benchmark.Sizes(
    rounds=2,
    steps=23,
    epochs=1,
    batches=(16, 64),
    widths=(1, 2),
    seeds=(1, 2),
    images=(500, 1000),
    streamed=(500, 1000),
    devices=(1, 2),
    hundredfold=(100, 1000),
    turn_s=0.01,
)


def test_products_of_a_step_are_those_of_the_tutorials_net():
    shapes = benchmark.layers(Config(), 784)
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


@pytest.fixture(scope="module")
def found():
    make = baseline.make_contenders

    def without_compiler(*args):
        return {name: way for name, way in make(*args).items() if name != "compiled"}

    with pytest.MonkeyPatch.context() as patch:  # to compile takes a minute
        patch.setattr(baseline, "make_contenders", without_compiler)
        return benchmark.measure(TINY, DataConfig(name="digits"))


def test_it_measures_all_that_the_table_and_the_headline_show(found, tmp_path):
    shown = benchmark.table(found)
    for words in ("ours, a call each step", "PyTorch, item_by_item", "the limit",
                  "first step", "whole job of 1 epochs", "seeds, µs", "streamed, µs",
                  "devices, µs", "an epoch streamed from 1,000 images"):  # fmt: skip
        assert words in shown
    assert set(found["headline"]) >= {
        "share_of_limit", "speed_ratio_best", "speed_ratio_item_by_item",
        "first_step_cold_s", "first_step_cached_s", "peak_memory_ratio",
    }  # fmt: skip
    assert all(np.isfinite(value) and value > 0 for value in found["headline"].values())
    path = benchmark.draw(found, tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    records.write_json(tmp_path / "a.json", found)


def test_the_best_of_pytorch_is_no_slower_than_the_others(found):
    head = found["headline"]
    names = [name for name in found["epoch_s"][0] if not name.startswith("ours")]
    ratios = [benchmark.ratio(found, name) for name in names]
    assert head["speed_ratio_best"] == min(ratios)
    assert {"item_by_item", "data_loader", "in_memory", "fused"} <= set(names)


def test_ideal_lines_begin_where_the_measurement_does(found):
    sizes = dataclasses.asdict(TINY)
    for name, rows in found["scaling"].items():
        field = {"batch": "batches", "width": "widths"}.get(name, name)
        assert [row["x"] for row in rows] == list(sizes[field])
        assert rows[0]["ideal"] == rows[0]["y"]
        work = [row.get("work", 1) for row in rows]
        assert rows[1]["ideal"] / rows[0]["y"] == pytest.approx(work[1] / work[0])
