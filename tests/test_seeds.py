"""Runs that differ in their seed train side by side, and each is an ordinary run."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from life import (
    Stop,
    assert_same_end,
    count_seconds,
    digests_of,
    small,
    snapshot,
    steps_of,
    train_until,
)

from ae_jax import devices, train
from ae_jax.config import CheckpointConfig, FiguresConfig, MeshConfig
from ae_jax.data import Digits
from ae_jax.errors import UserError
from ae_jax.objectives import Denoising
from ae_jax.runs import figures, folder, report
from ae_jax.runs.checkpoint import Checkpoints
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run, train_runs


def group(parent, size=3, **fields):
    """Configs of the seeds from 0 on."""
    return [small(parent / str(s), seed=s, **fields) for s in range(size)]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """The folders of three seeds that trained together, a second a step; read only."""
    configs = group(tmp_path_factory.mktemp("seeds"))
    with pytest.MonkeyPatch.context() as patch:
        count_seconds(patch)
        return [run.folder for run in train_runs(configs, together=3)]


def stopped(seeds, parent, step=6):
    """Copies of runs as if they had been killed after that step was saved."""
    for path in seeds:
        copy = shutil.copytree(path, parent / path.name)
        (copy / "summary.json").unlink()
        for later in [later for later in steps_of(copy) if later > step]:
            shutil.rmtree(copy / "checkpoints" / str(later))


def assert_same_ends(seeds, parent):
    for path in seeds:
        assert_same_end(parent / path.name, path)


def test_each_is_an_ordinary_run(seeds):
    for number, path in enumerate(seeds):
        run, summary = open_run(path), folder.read_summary(path)
        assert run.config.train.seed == number
        assert (run.step, run.steps) == (6, [3, 4, 6])
        test = run.data().test.images
        assert summary["test/mse"] == run.score_split(test)["mse"]
        assert figures.applicable(run) == list(figures.FIGURES)
        assert run.figure("reconstructions_by_epoch").axes
    losses = [folder.read_summary(path)["train/mse"] for path in seeds]
    assert len(set(losses)) == 3


def test_a_seeds_time_is_its_share_of_the_groups(seeds):
    for path in seeds:
        times = [(r["wall_s"], r["images_per_s"]) for r in folder.read_metrics(path)]
        assert times == [pytest.approx((1, 1336))] * 2  # three steps for three seeds


def test_a_group_shows_the_median_loss_and_how_many_have_dead_units():
    rows = [
        {"epoch": 2, "train/mse": loss, "latent/dead_units": dead, "wall_s": 0.5}
        for loss, dead in [(0.5, 0), (0.1, 3), (0.2, 1)]
    ]
    line = report.group_line(rows, [4, 5, 6], 9)
    words = (
        "seeds 4 to 6",
        "epoch 2/9",
        "median train/mse 0.20000",
        "2 of 3 with dead",
    )
    assert all(word in line for word in (*words, "0.50 s each"))


def test_each_is_its_single_run_to_the_bit(seeds, short_run, tmp_path, capsys):
    single = train_run(group(tmp_path)[1])
    for path, run in [(seeds[0], short_run), (seeds[1], single)]:
        assert_same_end(path, run.folder)
        mine, other = map(folder.read_summary, (path, run.folder))
        assert all(mine[name] == other[name] for name in mine if "test/" in name)
    stopped(seeds, tmp_path / "more", 3)
    train_run(group(tmp_path / "more")[1])  # continues alone
    assert_same_end(seeds[1], tmp_path / "more" / "1")
    assert "warning" not in capsys.readouterr().err


def test_stopped_in_either_epoch_they_end_in_the_same_bits(
    seeds, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "CHUNK_S", 0.0)
    for step in (2, 5):
        train_until(step, *group(tmp_path), together=3)
    train_runs(group(tmp_path), together=3)
    assert_same_ends(seeds, tmp_path)


def test_a_finished_member_keeps_its_lane(seeds, tmp_path):
    """Its folder is not touched, and the others' bits are what they were."""
    stopped(seeds[:1], tmp_path, 3)
    shutil.copytree(seeds[1], tmp_path / "1")
    before = snapshot(tmp_path / "1")
    train_runs(group(tmp_path), together=3)
    assert snapshot(tmp_path / "1") == before
    assert_same_ends(seeds, tmp_path)


@pytest.mark.parametrize("common", [4, 0])
def test_members_return_to_their_newest_common_step(common, seeds, tmp_path, capsys):
    """One of them had not saved, or, long ago, lost checkpoints."""
    stopped(seeds[::2], tmp_path)
    stopped(seeds[1:2], tmp_path, common)
    seen = []

    def on_chunk(step):
        if not seen:
            seen.extend(steps_of(tmp_path / name) for name in "012")

    train_runs(group(tmp_path), together=3, on_chunk=on_chunk)
    assert f"resumed at step {common}" in capsys.readouterr().err or not common
    assert seen == [[3, 4] if common else []] * 3  # what is later is gone
    assert_same_ends(seeds, tmp_path)


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
    assert_same_ends(seeds, tmp_path)
    assert [steps_of(config.run_dir) for config in configs] == [[6]] * 3


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
    whole = train_runs(group(tmp_path / "a"), together=3)
    monkeypatch.setattr(train, "CHUNK_S", 0.0)
    train_until(5, *group(tmp_path / "b"), together=3)
    train_runs(group(tmp_path / "b"), together=3)
    assert_same_ends([run.folder for run in whole], tmp_path / "b")


def test_batched_another_group_is_warned_of(batched, tmp_path, capsys):
    configs = group(tmp_path)
    train_until(2, configs[1])
    train_until(2, *configs, together=3)
    assert "seeds_together [1] → [0, 1, 2]" in capsys.readouterr().err
    train_run(configs[1])
    (warning,) = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert "seeds_together [0, 1, 2] → [1]" in warning
    assert "results may no longer be bit-identical" in warning
    *_, entry = folder.read_description(configs[1].run_dir).history
    assert entry.device["seeds_together"] == [1]
    assert open_run(configs[1].run_dir).step == 6


def test_batched_two_groups_follow_each_other(batched, tmp_path):
    runs = train_runs(group(tmp_path, 4), together=3)
    groups = [
        folder.read_description(run.folder).device["seeds_together"] for run in runs
    ]
    assert groups == [[0, 1, 2]] * 3 + [[3]]


# --- What starts, and what cannot ---------------------------------------------------


def test_without_a_common_step_they_start_from_the_parameters_asked_for(
    short_run, tmp_path
):
    more = {"init_from": short_run.folder, "learning_rate": 1e-30}
    configs = group(tmp_path, **more)
    train_until(6, *configs, together=3)
    for config, lost in zip(configs, ((3, 4), (6,), ()), strict=True):
        for step in lost:
            shutil.rmtree(config.run_dir / "checkpoints" / str(step))
    runs = train_runs(configs, together=3)
    for run in runs:
        kernels = (r.params["encoder_0"]["kernel"] for r in (run, short_run))
        np.testing.assert_array_equal(*kernels)


@pytest.mark.parametrize(
    ("together", "fields", "says"),
    [
        (1, {"learning_rate": 1e-2}, "differ in train.learning_rate"),
        (1, {"objective": Denoising(0.2)}, "differ in objective.name"),
        (2, {"data": Digits(num_validation=50)}, "differ in data.num_validation"),
        (2, {"patience": 2}, "train.patience: not for runs that train together"),
        (2, {"mesh": MeshConfig(1)}, "mesh.data: not for runs that train together"),
        (2, {"data": Digits(streaming=True)}, "data.streaming: not for runs that"),
    ],
)
def test_what_cannot_train_together_is_refused(together, fields, says, tmp_path):
    configs = [*group(tmp_path, 1, **fields), group(tmp_path, 2)[1]]
    with pytest.raises(UserError, match=says):
        train_runs(configs, together=together)
    assert not list(tmp_path.iterdir())


def test_two_in_one_folder_are_refused(tmp_path):
    configs = group(tmp_path, 2)
    configs[1] = replace(configs[1], run_dir=configs[0].run_dir)
    with pytest.raises(UserError, match="in use by another process"):
        train_runs(configs, together=2)
