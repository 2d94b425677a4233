import errno
import json
import os
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1

from ae_jax.checkpoint import Checkpoints, abstract_like, digest_leaves
from ae_jax.config import UserError
from ae_jax.train import TrainState


def make_state(step=0):
    return TrainState(
        step=jnp.int32(step),
        params={"w": jnp.arange(6.0).reshape(2, 3) + step},
        opt_state=(jnp.zeros(3), {"count": jnp.int32(step)}),
        key=jax.random.key(7),
        epoch_metrics={"loss": jnp.full(4, 0.5)},
    )


KEY = jax.random.key(0)
ABSTRACT = abstract_like(make_state)
DTYPES = [leaf.dtype for leaf in jax.tree.leaves(ABSTRACT)]


def history(step):
    return {"rows": [{"epoch": 1, "train/mse": 0.1 + step}], "epoch_s": 1 / 3}


def save(folder, steps, keep=10, pinned=()):
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), history(step), set(pinned))


def test_what_is_loaded_is_what_was_saved_to_the_bit(tmp_path):
    save(tmp_path, [3])
    with Checkpoints(tmp_path) as checkpoints:
        state, loaded_history = checkpoints.load(ABSTRACT, 3)
    assert digest_leaves(state) == digest_leaves(make_state(3))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(3))
    assert loaded_history == history(3)
    np.testing.assert_array_equal(
        jax.random.normal(state.key), jax.random.normal(make_state().key)
    )


def test_a_state_may_be_given_away_as_soon_as_it_is_saved(tmp_path):
    give_away = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path, 1) as checkpoints:
        for step in range(20):
            state = make_state(step)
            checkpoints.save(state, history(step), set())
            give_away((state.params, state.opt_state))
    with Checkpoints(tmp_path) as checkpoints:
        state, _ = checkpoints.load(ABSTRACT, 19)
    assert digest_leaves(state) == digest_leaves(make_state(19))


def test_the_newest_and_the_pinned_steps_are_kept(tmp_path):
    save(tmp_path, range(1, 9), keep=2, pinned=[1, 4])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 4, 7, 8]


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, [2, 2])
    save(tmp_path, [2])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [2]


def test_a_digest_tells_values_types_and_shapes_apart():
    arrays = [
        jnp.zeros(4),
        jnp.zeros((2, 2)),
        jnp.zeros(4, jnp.int32),
        jnp.zeros(4).at[0].set(-0.0),
        jnp.zeros(4).at[3].set(1e-30),
        jax.random.key(0),
        jax.random.key(1),
    ]
    assert len({digest_leaves([array])["[0]"] for array in arrays}) == len(arrays)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def load(folder, step):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.load(ABSTRACT, step)


# A load that fails leaves callbacks in Orbax's threads, which find their loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_refused_or_loads_what_was_saved(tmp_path, damage):
    save(tmp_path, [5])
    refused = 0
    for path in files(tmp_path / "5"):
        content = path.read_bytes()
        if damage == "flip":
            middle = len(content) // 2
            flipped = content[middle : middle + 1] or b"\0"
            changed = bytes([flipped[0] ^ 1])
            path.write_bytes(content[:middle] + changed + content[middle + 1 :])
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.unlink()
        try:
            loaded = load(tmp_path, 5)
        except UserError as error:
            message = str(error)
            refused += message.startswith(f"{tmp_path / '5'}: damaged checkpoint: ")
            if "\n" in message or len(message) > 600:
                pytest.fail(message)
        else:
            assert digest_leaves(loaded[0]) == digest_leaves(make_state(5))
            assert [leaf.dtype for leaf in jax.tree.leaves(loaded[0])] == DTYPES
            assert loaded[1] == history(5)
        path.write_bytes(content)
    assert refused >= 3
    load(tmp_path, 5)


def test_a_changed_value_names_its_leaf(tmp_path):
    save(tmp_path, [5])
    path = tmp_path / "5" / "record" / "data.json"
    record = json.loads(path.read_text())
    record["digests"][".params['w']"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"\.params\['w'\] is not what was saved"):
        load(tmp_path, 5)


def test_a_changed_history_is_refused(tmp_path):
    save(tmp_path, [5])
    path = tmp_path / "5" / "record" / "data.json"
    record = json.loads(path.read_text())
    record["history"]["rows"][0]["train/mse"] += 1e-16
    path.write_text(json.dumps(record))
    load(tmp_path, 5)  # too small a change to be one
    record["history"]["rows"][0]["train/mse"] += 1e-12
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="the history is not what was saved"):
        load(tmp_path, 5)


def test_a_reader_leaves_an_unfinished_step_alone_and_a_writer_clears_it(tmp_path):
    save(tmp_path, [1])
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    os.makedirs(unfinished / "state")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        time.sleep(0.3)  # Orbax clears in the background
    assert unfinished.exists()
    save(tmp_path, [3])
    assert not unfinished.exists()


def test_what_the_disk_refuses_is_an_os_error_and_leaves_earlier_steps_sound(tmp_path):
    save(tmp_path, [1])
    big = make_state(2)._replace(params={"w": jax.random.normal(KEY, (500, 500))})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with (
            pytest.raises(OSError, match="too large") as caught,
            Checkpoints(tmp_path, 1) as checkpoints,
        ):
            checkpoints.save(big, history(2), set())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path)
    save(tmp_path, [3])
    assert digest_leaves(load(tmp_path, 3)[0]) == digest_leaves(make_state(3))


def test_a_refusal_to_read_is_not_called_damage(tmp_path, monkeypatch):
    save(tmp_path, [1, 2])
    with Checkpoints(tmp_path, 2) as checkpoints:

        def refuse(*args):
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(v1, "load_checkpointables", refuse)
        with pytest.raises(PermissionError):
            checkpoints.load_newest(ABSTRACT, fallback=True)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
