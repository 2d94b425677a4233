"""Checkpoints: digests that notice, steps that are kept, a disk that refuses."""

import math
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from life import (
    Scripted,
    assert_same_end,
    digests_of,
    flip,
    small,
    steps_of,
    train_until,
)

from ae_jax.config import CheckpointConfig, FiguresConfig
from ae_jax.data import Digits
from ae_jax.errors import Diverged, UserError
from ae_jax.models.dense import Autoencoder
from ae_jax.runs import program
from ae_jax.runs.checkpoint import Checkpoints, abstract_like, digest_leaves
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run
from ae_jax.train import make_optimizer


@pytest.fixture(scope="module")
def abstract(short_run):
    """The shapes of the short run's state."""
    config = short_run.config
    parts = config.model, config.objective, config.train
    return abstract_like(lambda: program.build(*parts, 1336, (8, 8, 1)).init(0))


@pytest.fixture
def interrupted(short_run, tmp_path):
    """The short run as if killed before its end; may be damaged."""
    path = Path(shutil.copytree(short_run.folder, tmp_path / "run"))
    (path / "summary.json").unlink()
    return replace(short_run.config, run_dir=path)


# --- Digests ------------------------------------------------------------------------


def test_digests_cover_all_of_the_state(short_run, abstract):
    recorded = digests_of(short_run.folder)
    state, _ = Checkpoints(short_run.folder / "checkpoints").load(abstract, 6)
    assert recorded == digest_leaves(state)
    groups = {name.partition(".")[0] for name in recorded}
    assert groups == {"step", "params", "opt_state", "key", "epoch_metrics"}
    for part, of_each in (("params", 1), ("opt_state", 2)):  # two moments
        kernels = [n for n in recorded if n.startswith(part) and "kernel" in n]
        assert len(kernels) == of_each * 6


def test_a_digest_tells_values_types_and_shapes_apart():
    arrays = [
        np.zeros(4, np.float32),
        np.zeros(4, np.int32),
        np.zeros((2, 2), np.float32),
        np.array([0, 0, 0, -0.0], np.float32),
        jax.random.key(0),
    ]
    assert len({digest_leaves({"a": array})["a"] for array in arrays}) == 5
    assert digest_leaves({"a": jnp.zeros(4)}) == digest_leaves({"a": arrays[0]})


FILES = [
    *("state/d/*", "state/ocdbt.process_0/d/*", "state/manifest.ocdbt"),
    *("state/ocdbt.process_0/manifest.ocdbt", "state/_METADATA", "state/_sharding"),
    *("state/array_metadatas/process_0", "record/data.json", "_CHECKPOINT_METADATA"),
]


@pytest.mark.parametrize("pattern", FILES)
def test_a_flipped_bit_is_noticed_or_changes_nothing(
    pattern, interrupted, abstract, short_run
):
    rng = np.random.default_rng(len(pattern))
    step = interrupted.run_dir / "checkpoints" / "6"
    sound, noticed = digests_of(short_run.folder), []
    for path in step.glob(pattern):
        content = path.read_bytes()
        for _ in range(5):
            flip(path, int(rng.integers(len(content))), int(rng.integers(8)))
            try:
                with Checkpoints(step.parent) as checkpoints:
                    state, history = checkpoints.load(abstract, 6)
            except UserError as error:
                noticed.append(str(error))
            else:
                assert digest_leaves(state) == sound
                assert history["rows"] == short_run.metrics
            path.write_bytes(content)
    for message in noticed:
        assert message.startswith(f"{step}: damaged checkpoint: ")
        assert "\n" not in message
    if pattern in ("state/ocdbt.process_0/d/*", "record/data.json"):
        assert len(noticed) >= 4


# --- Which steps are kept -----------------------------------------------------------


def scripted(run_dir, losses, **fields):
    """A run of an epoch for each loss but the first, a step each."""
    defaults = {
        "checkpoint": CheckpointConfig(keep=1),
        "figures": FiguresConfig(epochs=(), draw=False),
        "batch_size": 1336,
    }
    return small(
        run_dir,
        objective=Scripted(tuple(map(float, losses))),
        model=Autoencoder((16, 8), init="flax"),
        num_epochs=len(losses) - 1,
        **{**defaults, **fields},
    )


LOSSES = (9, 8, 3, 4, 5, 6, 7)  # after 0, 1, … updates; the second epoch's is the best


@pytest.mark.parametrize(
    ("keep", "shown", "kept"),
    [(1, (), [2, 6]), (3, (), [2, 4, 5, 6]), (1, (1, 4), [1, 2, 4, 6])],
)
def test_the_newest_the_best_and_those_of_the_figures_are_kept(
    keep, shown, kept, tmp_path
):
    checkpoint, figures = CheckpointConfig(keep=keep), FiguresConfig(shown, draw=False)
    config = scripted(tmp_path / "run", LOSSES, checkpoint=checkpoint, figures=figures)
    run = train_run(config)
    assert run.steps == kept
    assert run.at("best").step == 2
    assert len(run.at("best").metrics) == 2


def test_a_best_that_is_still_being_saved_does_not_replace_the_one_before(
    tmp_path, monkeypatch
):
    """A kill meets the save of the new best: the old one is still there."""
    config = scripted(tmp_path / "run", (9, 3, 4, 5, 6, 1, 2))
    save = Checkpoints.save

    def dies(self, state, history):
        if int(state.step) != 5:
            save(self, state, history)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dies)
        train_until(5, config)
    assert open_run(config.run_dir, "best").step == 1
    assert train_run(config).steps == [5, 6]


def test_unfinished_steps_are_cleared_and_never_read(interrupted, short_run):
    steps = interrupted.run_dir / "checkpoints"
    os.rename(steps / "6", steps / "6.orbax-checkpoint-tmp")
    shutil.copytree(steps / "3", steps / "2.orbax-checkpoint-tmp")
    assert open_run(interrupted.run_dir).step == 4
    assert (steps / "6.orbax-checkpoint-tmp").exists()  # a reader removes nothing
    train_run(interrupted)
    assert {path.name for path in steps.iterdir()} == {"3", "4", "6"}
    assert_same_end(interrupted.run_dir, short_run.folder)


@pytest.mark.parametrize(
    ("which", "step"), [("best", 63), ("latest", 63), ("21", 21), (42, 42)]
)
def test_a_run_is_opened_at_any_of_its_steps(which, step, finished_run):
    run = open_run(finished_run.folder, which)
    assert (run.step, run.steps) == (step, [21, 42, 63])
    assert run.metrics == finished_run.metrics[: step // 21]


@pytest.mark.parametrize(
    ("which", "says"),
    [(22, "no checkpoint of step 22; .* 21, 42, 63"), ("bets", "latest, best or a")],
)
def test_a_step_that_is_not_there_is_refused(which, says, finished_run):
    with pytest.raises(UserError, match=says):
        open_run(finished_run.folder, which)


# --- What is saved is finite --------------------------------------------------------


UNVALIDATED = {"data": Digits(), "batch_size": 1437}


def poisoned(options, num_steps):
    """Nothing of the third step's NaN shows in loss, gradient or parameters yet."""
    tx, schedule = make_optimizer(options, num_steps)
    count = optax.GradientTransformation(
        lambda params: jnp.zeros(()),
        lambda updates, state, params=None: (
            updates,
            jnp.where(state < 2, state + 1, jnp.nan),
        ),
    )
    return optax.chain(tx, count), schedule


@pytest.mark.parametrize(
    ("losses", "fields", "says"),
    [
        ((1, 1, math.inf, 1), {}, "step 2: val/scripted inf"),
        ((1, 1, 1, math.nan, 1), UNVALIDATED, "step 4: grad_norm 1, scripted nan"),
        ((1, 1, 1, 1), {"learning_rate": 1.5e38}, "step 3: params not finite"),
        ((1, 1, 1, 1), {}, "step 3: opt_state not finite"),
    ],
)
def test_nothing_that_is_not_finite_is_saved(
    losses, fields, says, tmp_path, monkeypatch
):
    if "opt_state" in says:
        monkeypatch.setattr(program, "make_optimizer", poisoned)
    fields, last = {"checkpoint": CheckpointConfig(keep=9), **fields}, int(says[5]) - 1
    config = scripted(tmp_path / "run", losses, **fields)
    match = f"diverged at {says}.*; last good checkpoint: step {last};"
    with pytest.raises(Diverged, match=match):
        train_run(config)
    assert steps_of(config.run_dir) == list(range(1, last + 1))
    assert not (config.run_dir / "summary.json").exists()


# --- A disk that refuses ------------------------------------------------------------


def test_files_that_may_not_grow_end_the_run_and_it_resumes(interrupted, short_run):
    for step in ("4", "6"):
        shutil.rmtree(interrupted.run_dir / "checkpoints" / step)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            train_run(interrupted)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value.filename).startswith(str(interrupted.run_dir))
    train_run(interrupted)
    assert_same_end(interrupted.run_dir, short_run.folder)


@pytest.mark.parametrize("room", [20, 400])
def test_a_full_disk_ends_the_run_and_it_resumes(room, tmp_path, short_run):
    checkpoint = CheckpointConfig(every_steps=1, keep=9)
    config = small(tmp_path / "disk" / "run", checkpoint=checkpoint)
    (tmp_path / "disk").mkdir()
    options = f"size={room}k"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            train_run(config)
        assert str(caught.value.filename).startswith(str(config.run_dir))
        grow = ["mount", "-o", "remount,size=9m", str(tmp_path / "disk")]
        subprocess.run(grow, check=True)
        train_run(config)
        assert_same_end(config.run_dir, short_run.folder)
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_save_that_fails_in_the_background_is_not_lost(tmp_path, monkeypatch):
    """Whatever raises it, the run ends with it, and resumes."""
    from orbax.checkpoint import v1 as ocp

    class Saving:
        def result(self):
            raise OSError(5, "Input/output error")

    save, saves = ocp.save_checkpointables_async, []

    def fails(path, parts):
        saves.append(path)
        return Saving() if len(saves) == 2 else save(path, parts)

    config = small(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save_checkpointables_async", fails)
        with pytest.raises(OSError, match="Input/output error"):
            train_run(config)
    assert steps_of(config.run_dir) == [2]
    assert train_run(config).step == 6


def test_a_folder_that_is_taken_away_meanwhile_is_named(tmp_path, monkeypatch):
    """Orbax then misses a file of its own, and says so at length."""
    from orbax.checkpoint import v1 as ocp

    class Saving:
        def result(self):
            shutil.rmtree(tmp_path / "run")
            raise ValueError("No ArrayMetadata found")

    monkeypatch.setattr(ocp, "save_checkpointables_async", lambda *_: Saving())
    with pytest.raises(FileNotFoundError) as caught:
        train_run(small(tmp_path / "run"))
    assert caught.value.filename == str(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("name", ["075", "7e1", "٧٥", "-75", "75.old"])
def test_a_folder_of_a_name_that_we_do_not_give_is_no_step(tmp_path, name):
    for folder in ("75", name):
        (tmp_path / folder).mkdir()
    assert Checkpoints(tmp_path).steps == [75]
