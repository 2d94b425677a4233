"""Many seeds in one program: each member is its seed's single run, and goes its way."""

import dataclasses
import functools
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from test_commands import command
from test_trainer import interrupt_at, rows_without_times

from ae_jax import data, ensemble, records, run
from ae_jax.checkpoint import Checkpoints, abstract_like, digest_leaves
from ae_jax.cli import Diverged
from ae_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EnsembleConfig,
    FiguresConfig,
    ModelConfig,
    SeedsConfig,
    TrainConfig,
    UserError,
)
from ae_jax.train import Purpose, key_for, make_train_chunk

SMALL = {
    "data": DataConfig(name="digits"),
    "model": ModelConfig(hidden=(16, 8)),
    "figures": FiguresConfig(epochs=(1, 3)),
}


def small(folder, num_seeds=4, group_size=2, **train) -> EnsembleConfig:
    """Seeds 5, 6, … for 3 epochs of 23 steps on the bundled digits, in a small net."""
    return EnsembleConfig(
        run_dir=folder,
        train=TrainConfig(**{"num_epochs": 3, "seed": 5, **train}),
        num_seeds=num_seeds,
        seeds=SeedsConfig(group_size),
        **SMALL,
    )


def finish(config):
    with ensemble.start("seeds", config) as seeds:
        if not seeds.finished:
            seeds.fit()
            seeds.summarise()
        return seeds


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four seeds in two groups, trained without a break; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finish(small(folder))
    return folder


def states_of(config, seeds):
    """The newest states of a group, and its history."""
    program = run.build(config, 1437, 64)
    group = ensemble.make_group(program, len(seeds))
    init = functools.partial(group.init, jnp.asarray(seeds, jnp.uint32))
    with Checkpoints(ensemble.checkpoints_of(config.run_dir, seeds)) as checkpoints:
        return checkpoints.load(abstract_like(init), checkpoints.steps[-1])


def assert_same_end(config, other):
    for seeds in ensemble.groups(config):
        ours, theirs = (
            states_of(dataclasses.replace(config, run_dir=folder), seeds)[0]
            for folder in (config.run_dir, other)
        )
        assert digest_leaves(ours) == digest_leaves(theirs)
    assert rows_without_times(config.run_dir) == rows_without_times(other)
    ours, theirs = (
        [
            {name: value for name, value in row.items() if name != "wall_s"}
            for row in records.read_rows(folder, ensemble.RESULTS)
        ]
        for folder in (config.run_dir, other)
    )
    assert ours == theirs


# --- Members are single runs --------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_members_begin_as_their_seeds_single_runs_do(precision):
    config = small(Path("unused"), precision=precision)
    single = run.build(config, 1437, 64)
    group, seeds = ensemble.make_group(single, 2), jnp.array([7, 5], jnp.uint32)
    member = ensemble.member(group.init(seeds), 1)
    assert digest_leaves(member) == digest_leaves(single.init())
    batches = single.order(key_for(5, Purpose.SHUFFLE), 2)
    np.testing.assert_array_equal(group.order(seeds, 2)[1], batches)


def test_in_double_precision_members_stay_with_their_single_runs():
    images = data.load(DataConfig(name="digits")).train.images[:224]
    single = run.build(small(Path("unused"), precision="float64"), *images.shape)
    group, seeds = ensemble.make_group(single, 2), jnp.array([7, 5], jnp.uint32)
    states = group.init(seeds)
    state, chunk = single.init(), make_train_chunk(single.train_step)
    shuffle = key_for(5, Purpose.SHUFFLE)
    for epoch in range(3):  # of four batches, the last of 32
        stop = (epoch + 1) * 4
        states = group.advance(states, images, group.order(seeds, epoch), stop)
        state = chunk(state, images, single.order(shuffle, epoch), stop)
    member = ensemble.member(states, 1)
    for ours, theirs in zip(
        jax.tree.leaves((member.params, member.opt_state, member.epoch_metrics)),
        jax.tree.leaves((state.params, state.opt_state, state.epoch_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)
    assert int(member.step) == 12
    kernels = states.params["encoder_0"]["kernel"]  # two copies would pass as well
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


SPREAD = """
import jax, sys
jax.config.update("jax_num_cpu_devices", 4)
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from ae_jax import ensemble
from test_ensemble import finish, small, states_of
from pathlib import Path
config = small(Path(sys.argv[1]), num_seeds=2, num_epochs=1)
finish(config)
group = ensemble.make_group(ensemble.run.build(config, 1437, 64), 2)
print(len(group.put(jax.numpy.arange(2), 0).sharding.device_set))
"""


def test_members_on_devices_of_their_own_compute_the_same(finished, tmp_path):
    code = [sys.executable, "-c", SPREAD.format(root=str(ROOT)), str(tmp_path / "run")]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2"
    ours, theirs = map(records.read_rows, (tmp_path / "run", finished))
    assert [row["seed"] for row in ours] == [5, 6]
    for row, other in zip(ours, theirs, strict=False):
        # In float32, after 23 steps of which each rounds in its own way.
        np.testing.assert_allclose(row["train/mse"], other["train/mse"], rtol=1e-5)


# --- The run folder ------------------------------------------------------------------


def test_the_folder_holds_a_row_a_seed_and_epoch_and_a_result_a_seed(finished):
    rows = records.read_rows(finished)
    expected = [(s, e) for group in ((5, 6), (7, 8)) for e in (1, 2, 3) for s in group]
    assert [(row["seed"], row["epoch"]) for row in rows] == expected
    results = records.read_rows(finished, ensemble.RESULTS)
    assert [row["seed"] for row in results] == [5, 6, 7, 8]
    assert len({row["test/mse"] for row in results}) == 4
    last = {row["seed"]: row for row in rows if row["epoch"] == 3}
    for row in results:
        assert row["train/mse"] == last[row["seed"]]["train/mse"]


def test_the_summary_counts_the_results_and_its_intervals_hold_the_shares(finished):
    summary = records.read_json(finished / "summary.json")
    results = records.read_rows(finished, ensemble.RESULTS)
    assert summary["num_seeds"] == 4
    for name in ("healthy", "part_dead", "collapsed"):
        of_it = [row for row in results if row["outcome"].replace("-", "_") == name]
        assert summary[name] == len(of_it)
        assert summary[f"share_{name}"] == len(of_it) / 4
        low, high = (summary[f"share_{name}_{end}"] for end in ("low", "high"))
        assert low <= summary[f"share_{name}"] <= high
    median = np.median([row["test/mse"] for row in results])
    assert summary["test/mse/median"] == median
    assert summary["test/mse/median_low"] <= median <= summary["test/mse/median_high"]


def test_a_finished_run_says_so_and_is_left_alone(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert finish(small(finished)).finished
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


@pytest.mark.parametrize("step", [30, 69])
def test_resumed_seeds_equal_uninterrupted_ones(
    finished, tmp_path, monkeypatch, capsys, step
):
    """Within a group, and at its end, where its results are not yet written."""
    config = dataclasses.replace(
        small(tmp_path / "run"), checkpoint=CheckpointConfig(every_steps=10)
    )
    seen = itertools.count()

    def signalled():
        if next(seen) == 1:  # in the second group
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signalled, ensemble.GroupTraining)
        with pytest.raises(SystemExit) as left:
            finish(config)
    assert left.value.code == 143
    done = [row["seed"] for row in records.read_rows(config.run_dir, ensemble.RESULTS)]
    assert done == [5, 6]
    finish(config)
    assert f"seeds-7-to-8: going on from step {step}" in capsys.readouterr().err
    assert_same_end(config, finished)


@pytest.mark.parametrize("name", ["metrics.jsonl", ensemble.RESULTS])
def test_a_lost_file_of_rows_is_written_anew_and_a_damaged_one_told(
    finished, tmp_path, name
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / name
    path.write_text(path.read_text().replace('"seed": 7', '"sead": 7', 1))
    with pytest.raises(UserError, match=rf"{name}: line \d+ is damaged \(seed is miss"):
        finish(small(folder))
    path.unlink()
    (folder / "summary.json").unlink()
    finish(small(folder))
    assert_same_end(small(folder), finished)


def test_checkpoints_that_a_killed_process_had_yet_to_remove_do_not_stay(
    finished, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / ensemble.RESULTS).unlink()
    config = small(folder)
    finish(dataclasses.replace(config, checkpoint=CheckpointConfig(keep=1)))
    for seeds in ensemble.groups(config):
        with Checkpoints(ensemble.checkpoints_of(folder, seeds)) as checkpoints:
            assert checkpoints.steps == [23, 69]


def test_more_epochs_and_more_seeds_later_equal_more_at_once(finished, tmp_path):
    finish(small(tmp_path / "run", num_seeds=2, num_epochs=2))
    finish(small(tmp_path / "run", num_seeds=2, num_epochs=3))
    finish(small(tmp_path / "run", num_seeds=4, num_epochs=3))
    config = small(tmp_path / "run")
    config_before = records.read_description(finished)["config"]
    config_now = records.read_description(config.run_dir)["config"]
    assert {**config_now, "run_dir": ""} == {**config_before, "run_dir": ""}
    assert_same_end(config, finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 2}, "num_seeds: the run has 4, you asked for 2"),
        ({"group_size": 4}, "seeds.group_size: the run has 2, you asked for 4"),
        ({"seed": 6}, "train.seed: the run has 5, you asked for 6"),
    ],
)
def test_other_seeds_do_not_touch_the_run(finished, change, message):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UserError, match=message):
        finish(small(finished, **change))
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_seeds_are_not_added_to_a_group_that_is_not_whole():
    known, asked = (small(Path("unused"), num_seeds=n) for n in (3, 4))
    with pytest.raises(UserError, match="num_seeds: the run has 3, you asked for 4"):
        ensemble.check_resumable(known, asked)


def test_a_member_that_diverges_is_named(tmp_path):
    with pytest.raises(Diverged, match=r"seed 5 diverged at step 2; try a smaller"):
        finish(small(tmp_path / "run", learning_rate=1e30))


def test_the_figure_is_drawn_from_the_folder_alone(finished, tmp_path):
    for name in ("config.json", "metrics.jsonl", ensemble.RESULTS):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    path = ensemble.draw(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / ensemble.RESULTS).unlink()
    with pytest.raises(UserError, match="no finished seed to draw yet"):
        ensemble.draw(tmp_path)


# --- A member taken out --------------------------------------------------------------


@pytest.fixture(scope="module")
def taken(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("taken") / "run"
    assert ensemble.take(finished, 8, folder) == 69
    return folder


def test_a_member_taken_out_is_a_run_with_the_members_bits(finished, taken):
    opened = run.open_run(taken)
    states, _ = states_of(small(finished), range(7, 9))
    assert digest_leaves(opened.state) == digest_leaves(ensemble.member(states, 1))
    assert opened.steps == [23, 46, 69]
    assert [(row["epoch"], row["step"]) for row in opened.rows] == [
        (1, 23), (2, 46), (3, 69),
    ]  # fmt: skip
    result = records.read_rows(finished, ensemble.RESULTS)[-1]
    test = data.load(opened.config.data).test
    scores = run.score(opened, test, "test", (8, 8))
    for name in ("test/mse", "test/psnr_db"):
        np.testing.assert_allclose(result[name], scores[name], rtol=1e-6)
    assert result["code/dead_units"] == scores["code/dead_units"]


def test_a_member_taken_out_goes_on_as_a_single_run(finished, taken, tmp_path):
    from ae_jax import trainer

    folder = tmp_path / "run"
    ensemble.take(finished, 8, folder)
    config = Config(run_dir=folder, train=TrainConfig(num_epochs=4, seed=8), **SMALL)
    state = run.open_run(taken).state
    with trainer.start("tutorial", config) as tutorial:
        tutorial.fit()
        tutorial.summarise()
    program = run.build(config, 1437, 64)
    images = data.load(config.data).train.images
    order = program.order(key_for(8, Purpose.SHUFFLE), 3)
    expected = make_train_chunk(program.train_step)(state, images, order, 92)
    assert digest_leaves(run.open_run(folder).state) == digest_leaves(expected)


@pytest.mark.parametrize(
    ("seed", "message"), [(4, "no seed 4; it has 5 to 8"), (9, "it has 5 to 8")]
)
def test_a_seed_that_is_not_there_leaves_no_folder(finished, tmp_path, seed, message):
    with pytest.raises(UserError, match=message):
        ensemble.take(finished, seed, tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_damaged_group_is_not_taken_from_and_goes_back_if_asked(
    finished, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    config = small(folder, num_epochs=4)
    newest = ensemble.checkpoints_of(folder, range(5, 7)) / "69"
    (newest / "record" / "data.json").unlink()
    with pytest.raises(UserError, match="69: damaged checkpoint"):
        ensemble.take(folder, 5, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(UserError, match=r"--checkpoint\.fallback"):
        finish(config)
    asked = CheckpointConfig(fallback=True)
    finish(dataclasses.replace(config, checkpoint=asked))
    assert "23 steps are lost" in capsys.readouterr().err
    expected = [(s, e) for s in (5, 6, 7, 8) for e in (1, 2, 3, 4)]
    rows = records.read_rows(folder)
    assert sorted((row["seed"], row["epoch"]) for row in rows) == expected


def test_a_config_that_is_not_the_checkpoints_is_refused(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('rate": 0.001', 'rate": 0.003'))
    for work in (
        lambda: ensemble.take(folder, 5, tmp_path / "new"),
        lambda: finish(small(folder, num_epochs=4, learning_rate=0.003)),
    ):
        with pytest.raises(UserError, match=r"learning_rate: the run has 0\.001"):
            work()


def test_nothing_is_taken_into_or_out_of_a_single_run(finished, taken):
    with pytest.raises(UserError, match="in the way; choose another folder"):
        ensemble.take(finished, 5, taken)
    with pytest.raises(UserError, match=r"a run of experiments\.tutorial; only"):
        ensemble.take(taken, 8, taken.parent / "again")
    assert json.loads((taken / "config.json").read_text())["taken_from"]["seed"] == 8


# --- As a user types it --------------------------------------------------------------


def test_the_commands_of_many_seeds(tmp_path):
    folder, one = tmp_path / "many", tmp_path / "one"
    options = ["--preset", "quick", "--num-seeds", "2", "--model.hidden", "8"]
    done = command("-m", "experiments.seeds", *options, "--run-dir", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "median test MSE of all: 0." in done.stdout
    assert (folder / "figures" / "seeds.png").exists()
    done = command("scripts/plot.py", folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}/figures/seeds.png\n")
    done = command("scripts/take_seed.py", folder, 1, one)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{one}: seed 1 at step 69; go on with python -m" in done.stdout
    done = command("scripts/evaluate.py", one, "--json")
    (_, result) = records.read_rows(folder, ensemble.RESULTS)
    scores = json.loads(done.stdout)
    np.testing.assert_allclose(scores["test/mse"], result["test/mse"], rtol=1e-6)
    done = command("scripts/evaluate.py", folder)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {folder}: a run of many seeds; scripts/take_seed.py takes one out\n"
    )
