"""Runs that differ in their seed train side by side, and each is an ordinary run."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from life import (
    Stop,
    assert_same_end,
    digests_of,
    small,
    snapshot,
    steps_of,
    train_until,
    train_with_stops,
)

from ae_jax import devices, train
from ae_jax.config import CheckpointConfig, FiguresConfig, MeshConfig
from ae_jax.data import Digits
from ae_jax.errors import UserError
from ae_jax.objectives import Denoising
from ae_jax.runs import figures, folder
from ae_jax.runs.checkpoint import Checkpoints
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run, train_runs


def group(parent, size=3, **fields):
    """Configs of the seeds from 5 on."""
    return [small(parent / str(s), seed=s, **fields) for s in range(5, 5 + size)]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The folders of three seeds that trained together; read only."""
    configs = group(tmp_path_factory.mktemp("seeds"))
    return [run.folder for run in train_runs(configs, together=3)]


def test_each_is_an_ordinary_run(seeds):
    for number, path in enumerate(seeds):
        run = open_run(path)
        assert run.config.train.seed == 5 + number
        assert (run.step, run.steps) == (6, [3, 4, 6])
        assert [row["step"] for row in folder.read_metrics(path)] == [3, 6]
        test = run.data().test.images
        summary = folder.read_summary(path)
        assert summary["test/mse"] == run.score_split(test)["mse"]
        for name in figures.applicable(run):
            assert run.figure(name).axes
    losses = [folder.read_summary(path)["train/mse"] for path in seeds]
    assert len(set(losses)) == 3


def test_each_is_its_single_run_to_the_bit(seeds, tmp_path, capsys):
    for path, config in zip(seeds, group(tmp_path), strict=True):
        train_run(config)
        assert_same_end(path, config.run_dir)
        mine, other = map(folder.read_summary, (path, config.run_dir))
        assert all(mine[name] == other[name] for name in mine if "test/" in name)
    train_until(3, *group(tmp_path / "more"), together=3)
    train_run(group(tmp_path / "more")[1])  # goes on alone
    assert_same_end(seeds[1], tmp_path / "more" / "6")
    assert "warning" not in capsys.readouterr().err


def test_stopped_at_every_chunk_they_end_in_the_same_bits(seeds, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHUNK_S", 0.0)
    _, stops = train_with_stops(group(tmp_path), together=3)
    assert stops == 6
    for path in seeds:
        assert_same_end(tmp_path / path.name, path)


def test_a_finished_member_keeps_its_lane(seeds, tmp_path):
    """Its folder is not touched, and the others' bits are what they were."""
    shutil.copytree(seeds[1], tmp_path / "6")
    before = snapshot(tmp_path / "6")
    train_until(3, *group(tmp_path), together=3)
    shutil.rmtree(tmp_path / "7")
    train_runs(group(tmp_path), together=3)
    assert snapshot(tmp_path / "6") == before
    for path in seeds:
        assert_same_end(tmp_path / path.name, path)


@pytest.mark.parametrize("lost", [1, 3])
def test_members_return_to_their_newest_common_step(lost, seeds, tmp_path, capsys):
    """One of them had not saved, or, long ago, lost checkpoints."""
    train_until(6, *group(tmp_path), together=3)
    for step in steps_of(tmp_path / "6")[-lost:]:
        shutil.rmtree(tmp_path / "6" / "checkpoints" / str(step))
    common = steps_of(tmp_path / "6")[-1] if lost < 3 else 0
    seen = []
    with pytest.raises(Stop):
        train_runs(group(tmp_path), together=3, on_chunk=stop_and_see(tmp_path, seen))
    assert f"resumed at step {common}" in capsys.readouterr().err or not common
    assert seen == [[step for step in (3, 4) if step <= common]] * 3
    train_runs(group(tmp_path), together=3)
    for path in seeds:
        assert_same_end(tmp_path / path.name, path)


def stop_and_see(parent, seen):
    """Stop after the first chunk; note the older checkpoints of all members."""

    def on_chunk(step):
        seen.extend([s for s in steps_of(parent / name) if s < step] for name in "567")
        raise Stop

    return on_chunk


@pytest.mark.parametrize("member", [1, 2])
def test_all_have_saved_before_any_prunes(member, seeds, tmp_path, monkeypatch):
    """With one checkpoint kept, a death among the saves leaves a common step."""
    keep = {
        "checkpoint": CheckpointConfig(every_steps=2, keep=1),
        "figures": FiguresConfig(epochs=(), draw=False),
    }
    configs, save, saves = group(tmp_path, **keep), Checkpoints.save, []

    def dies(self, state, history):
        saves.append(int(state.step))
        if saves.count(4) == member + 1:
            raise Stop
        save(self, state, history)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dies)
        with pytest.raises(Stop):
            train_runs(configs, together=3)
    steps = [set(steps_of(config.run_dir)) for config in configs]
    assert 3 in set.intersection(*steps)
    train_runs(configs, together=3)
    for path in seeds:
        assert_same_end(tmp_path / path.name, path)
        assert steps_of(tmp_path / path.name) == [6]


# --- As on an accelerator, where they are one by vmap -------------------------------


@pytest.fixture
def batched(monkeypatch):
    monkeypatch.setattr(devices, "take_turns", lambda mesh: False)


def test_batched_they_start_as_the_single_run_and_stay_close(batched, seeds, tmp_path):
    started = {"learning_rate": 1e-30}
    together, alone = group(tmp_path / "a", **started), group(tmp_path / "b", **started)
    train_runs(together, together=3)
    train_run(alone[1])
    mine, other = (digests_of(c.run_dir) for c in (together[1], alone[1]))
    params = {name for name in mine if name.startswith(("params", "key"))}
    assert len(params) > 12
    assert {n: mine[n] for n in params} == {n: other[n] for n in params}
    for run, path in zip(train_runs(group(tmp_path), together=3), seeds, strict=True):
        for ours, its in zip(run.metrics, folder.read_metrics(path), strict=True):
            for name in ("train/mse", "train/grad_norm", "val/mse"):
                np.testing.assert_allclose(ours[name], its[name], rtol=1e-4)


def test_batched_they_resume_to_the_bit(batched, tmp_path, monkeypatch):
    train_runs(group(tmp_path / "a"), together=3)
    monkeypatch.setattr(train, "CHUNK_S", 0.0)
    train_with_stops(group(tmp_path / "b"), together=3)
    for name in "567":
        assert_same_end(tmp_path / "a" / name, tmp_path / "b" / name)


def test_batched_another_group_is_warned_of(batched, tmp_path, capsys):
    configs = group(tmp_path)
    train_until(2, configs[1])
    train_until(2, *configs, together=3)
    assert "seeds_together [6] → [5, 6, 7]" in capsys.readouterr().err
    train_run(configs[1])
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert "seeds_together [5, 6, 7] → [6]" in warning
    assert "results may no longer be bit-identical" in warning
    *_, entry = folder.read_description(configs[1].run_dir).history
    assert entry.device["seeds_together"] == [6]
    assert open_run(configs[1].run_dir).step == 6


def test_batched_two_groups_follow_each_other(batched, tmp_path):
    runs = train_runs(group(tmp_path, 4), together=3)
    groups = [
        folder.read_description(run.folder).device["seeds_together"] for run in runs
    ]
    assert groups == [[5, 6, 7]] * 3 + [[8]]


# --- What starts, and what cannot ---------------------------------------------------


def test_without_a_common_step_they_start_from_the_parameters_asked_for(tmp_path):
    source = train_run(small(tmp_path / "source"))
    more = {"init_from": source.folder, "learning_rate": 1e-30}
    configs = group(tmp_path, **more)
    train_until(6, *configs, together=3)
    for config, lost in zip(configs, ((3, 4), (6,), ()), strict=True):
        for step in lost:
            shutil.rmtree(config.run_dir / "checkpoints" / str(step))
    runs = train_runs(configs, together=3)
    for run in runs:
        kernels = (r.params["encoder_0"]["kernel"] for r in (run, source))
        np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"learning_rate": 1e-2}, "differ in train.learning_rate"),
        ({"objective": Denoising(0.2)}, "differ in objective.name"),
        ({"data": Digits(num_validation=50)}, "differ in data.num_validation"),
    ],
)
@pytest.mark.parametrize("together", [1, 2])
def test_others_than_seeds_are_refused(fields, told, together, tmp_path):
    configs = group(tmp_path, 2)
    configs[1] = group(tmp_path, 2, **fields)[1]
    with pytest.raises(UserError, match=told):
        train_runs(configs, together=together)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"patience": 2}, "train.patience"),
        ({"mesh": MeshConfig(1)}, "mesh.data"),
        ({"data": Digits(streaming=True)}, "data.streaming"),
    ],
)
def test_what_each_would_need_alone_is_refused(fields, name, tmp_path):
    with pytest.raises(UserError, match=f"{name}: not for runs that train together"):
        train_runs(group(tmp_path, 2, **fields), together=2)
    assert not list(tmp_path.iterdir())


def test_two_in_one_folder_are_refused(tmp_path):
    configs = group(tmp_path, 2)
    configs[1] = replace(configs[1], run_dir=configs[0].run_dir)
    with pytest.raises(UserError, match="in use by another process"):
        train_runs(configs, together=2)
