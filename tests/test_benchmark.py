"""The benchmark measures what it says; what it measured is no affair of a test."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from ae_jax import cli
from ae_jax.config import Config
from ae_jax.data import Digits
from ae_jax.files import read_json
from ae_jax.models.dense import Autoencoder
from ae_jax.runs import results, timing
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


def test_the_seconds_of_some_steps_are_scaled_to_an_epoch(monkeypatch):
    from experiments import _contenders

    rounds = [{"ours": 2.0, "fused": 3.0}, {"ours": 2.2, "fused": 3.6}]
    raced = {"rounds": rounds, "failed": ""}
    monkeypatch.setattr(_contenders, "race", lambda *args: raced)
    sizes = dataclasses.replace(TINY, steps=5)
    images = np.zeros((23 * 64 - 7, 8, 8, 1), np.uint8)
    found = benchmark.measure_epochs(sizes, images)
    assert found["steps_per_epoch"] == 23
    for row, measured in zip(found["epoch_s"], rounds, strict=True):
        assert row == pytest.approx({k: 23 / 5 * s for k, s in measured.items()})


def test_what_grows_is_the_time_of_an_image_and_of_a_seed(monkeypatch):
    """Where a step takes as many microseconds as it has images, or seeds."""
    sizes = dataclasses.replace(TINY, batches=(16, 64), widths=(), seeds=(1, 3))
    monkeypatch.setattr(
        "ae_jax.runs.timing.make_runner",
        lambda config, images, seeds=1: config.train.batch_size * seeds / 64,
    )
    monkeypatch.setattr(
        benchmark, "in_turns", lambda runners, *_: [64 * n for n in runners]
    )
    of_images, of_seeds = benchmark.measure_growth(sizes, np.zeros((64, 8, 8, 1)))
    assert of_images["y"] == [1, 1]
    assert of_seeds["y"] == [64, 64]


# --- On a GPU -----------------------------------------------------------------------


def test_steps_that_nobody_watches_are_the_tutorials(torch_on_one_thread):
    import torch

    from experiments import _contenders, pytorch_baseline

    torch.manual_seed(0)
    made = [pytorch_baseline.Autoencoder(64, (8,), 3) for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    adams = [torch.optim.Adam(model.parameters(), 1e-3) for model in made]
    batches = list(torch.rand(4, 16, 64))
    mean, _ = pytorch_baseline.train_epoch(made[0], adams[0], batches)
    total = _contenders.train_unwatched(made[1], adams[1], batches)
    assert total / 4 == pytest.approx(mean)
    for a, b in zip(*(model.parameters() for model in made), strict=True):
        assert torch.equal(a, b)


def test_a_contender_that_lacks_a_gpu_is_left_out_with_its_reason(torch_on_one_thread):
    from experiments import _contenders, pytorch_baseline

    def make_model():
        made.append(pytorch_baseline.Autoencoder(64, (8,), 3))
        return made[-1]

    made, images = [], np.full((150, 8, 8, 1), 9, np.uint8)
    found = _contenders.make_contenders(images, make_model, 64, 1e-3, "cpu:0")
    del found["compiled"]  # it takes a minute
    before = [model.encoder[0].bias.tolist() for model in made]
    failed = _contenders.warm_up(found)
    assert list(found) == ["item_by_item", "in_memory", "fused"]
    assert failed.startswith("graph: ")
    after = [model.encoder[0].bias.tolist() for model in made]
    changed = [a != b for a, b in zip(before, after, strict=True)]
    assert changed == [True, True, True, False, False]


def test_the_products_in_the_limit_of_a_card_are_those_of_a_step():
    import jax

    shapes = benchmark.layers(64, Autoencoder())
    operands = [(np.zeros((64, a)), np.zeros((a, b))) for a, b in shapes]
    program = jax.make_jaxpr(benchmark.products_of_step)(operands)
    found = []
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            a, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            found.append((out[0], a[left[0]], out[1]))
    assert sorted(found) == sorted(benchmark.products(shapes, 64))
    limit = benchmark.measure_card_limit(np.zeros((1, 8, 8, 1)), repeats=4)
    assert all(value > 0 for value in limit.values())
    assert limit["step_s"] == limit["products_s"] + limit["adam_s"]


def test_the_result_of_a_gpu_is_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    rounds = [{"ours": 0.06, "graph": 0.3, "item_by_item": 3.0}]
    command = {"first_step_s": 3.0, "peak_memory_bytes": 10**9, "command_s": 5.0}
    seeds = {"xlabel": "seeds in one program", "x": [1, 1024], "y": [64.0, 2.0]}
    found = {
        "gpu": True,
        "epoch_s": rounds,
        "steps_per_epoch": 1000,
        "missing": "compiled: no compiler",
        "limit": [{"step_s": 3e-5, "many_seeds_s": 1e-6}],
        "growth": [seeds],
        "cold": command,
        "cached": {**command, "device_peak_bytes": 2 * 10**8},
        "pytorch": command,
        "scaling": [],
    }
    found["headline"] = head = benchmark.conclude(found)
    assert head["cuda_graph_ratio"] == head["speed_ratio_best"] == pytest.approx(5)
    assert head["seed_epoch_ms"] == pytest.approx(2)
    assert head["many_seeds_share_of_limit"] == pytest.approx(0.5)
    assert head["share_of_limit"] == pytest.approx(0.5)
    tables = [benchmark.speed_table(found), benchmark.scaling_table(found)]
    benchmark.write_results(found, tables)
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark_gpu.json"]
    (table,) = results.read_tables(tmp_path / "benchmark_gpu.json")
    assert table["rows"][0][1] == "0.060 s"
    assert "Of 1,024 seeds in one program each takes 2.00 ms" in table["caption"]


def test_without_a_preset_the_device_decides(monkeypatch, tmp_path):
    asked = []

    def measure(sizes, *_):
        asked.append(sizes)
        raise InterruptedError

    monkeypatch.setattr(benchmark, "measure", measure)
    for backend in ("gpu", "cpu"):
        monkeypatch.setattr(benchmark, "default_backend", lambda: backend)  # noqa: B023
        with pytest.raises(InterruptedError):
            benchmark.main(None, tmp_path / "a.json", "digits")
    assert asked == [benchmark.PRESETS["gpu"], benchmark.PRESETS["full"]]


def test_a_seeds_share_of_the_time_is_that_of_one_among_all(monkeypatch):
    """Together five take three times as long as one: three fifths each."""
    seconds = {1: 0.5, 5: 1.5}
    monkeypatch.setattr(
        timing, "make_runner", lambda config, images, num=1: seconds[num]
    )
    monkeypatch.setattr(
        timing, "stopwatch", lambda runner, num_steps: runner * num_steps
    )
    config = Config(data=Digits())
    assert timing.seed_time_ratio(config, 5) == pytest.approx(3 / 5)


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
    for name in ("a.png", "a_speed.png"):
        assert (main / name).read_bytes().startswith(b"\x89PNG")
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
