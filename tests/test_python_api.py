"""Runs from Python, as in a notebook: no command line, no switch, no global state."""

import asyncio
import dataclasses
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from life import assert_same_end, small, snapshot, train_until

import ae_jax
from ae_jax import cli, objectives
from ae_jax.config import CheckpointConfig, FiguresConfig
from ae_jax.errors import UserError
from ae_jax.runs import figures
from experiments.tutorial import PRESETS

# --- One process, many runs ---------------------------------------------------------


def test_float64_and_float32_follow_each_other(tmp_path, short_run):
    double = ae_jax.fit(small(tmp_path / "double", precision="float64"))
    after = ae_jax.fit(small(tmp_path / "after"))
    assert_same_end(after.folder, short_run.folder)
    first, what, loss = repr(after).splitlines()
    assert first == f"<Run {after.folder}: step 6, 2 of 2 epochs"
    num_params = sum(leaf.size for leaf in jax.tree.leaves(after.params))
    assert what.endswith(f"{num_params:,} parameters")
    row = after.metrics[-1]
    assert loss == f"  train/mse {row['train/mse']:.5f}, val/mse {row['val/mse']:.5f}>"
    images = after.data().test.images[:3]
    assert [r.encode(images).dtype for r in (double, after)] == [np.float64, np.float32]


def in_an_event_loop(work):
    """As Jupyter's cells run."""

    async def cell():
        work()

    asyncio.run(cell())


def in_another_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("within", [in_an_event_loop, in_another_thread])
def test_an_event_loop_or_a_thread_that_is_not_the_main_one_does_it_too(
    within, tmp_path, short_run
):
    config, latents = small(tmp_path / "run"), []
    images = short_run.data().test.images[:2]

    def work():
        train_until(4, config)
        latents.append(ae_jax.fit(config).at(3).encode(images))

    within(work)
    assert_same_end(config.run_dir, short_run.folder)
    np.testing.assert_array_equal(latents[0], short_run.at(3).encode(images))


def switches():
    """What a call must leave as it was."""
    known = logging.root.manager.loggerDict
    loggers = [logging.root, *(logging.getLogger(name) for name in known)]
    return {
        "levels": {log.name: log.level for log in loggers},
        "handlers": {log.name: list(log.handlers) for log in loggers},
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "x64": jax.config.jax_enable_x64,
        "precision": jax.config.jax_default_matmul_precision,
        "cache": jax.config.jax_compilation_cache_dir,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }


def test_the_users_process_is_as_it_was(tmp_path):
    config = small(tmp_path / "run", precision="float64")
    train_until(2, config)  # all is imported now
    before = switches()
    train_until(4, config)
    ae_jax.fit(config).encode(np.zeros((1, 64)))
    with pytest.raises(UserError):
        ae_jax.fit(small(tmp_path / "run"))
    assert switches() == before


SWITCHES = {
    "jax_threefry_partitionable": False,
    "jax_default_prng_impl": "rbg",
    "jax_random_seed_offset": 7,
    "jax_numpy_dtype_promotion": "strict",
    "jax_transfer_guard": "disallow",
    "jax_default_matmul_precision": "bfloat16",
    "jax_enable_x64": True,
}


def test_the_users_switches_change_no_bit(tmp_path, short_run):
    before = {name: getattr(jax.config, name) for name in SWITCHES}
    try:
        for name, value in SWITCHES.items():
            jax.config.update(name, value)
        config = small(tmp_path / "run")
        train_until(4, config)
        run = ae_jax.fit(config)
        scores = run.scores(np.eye(2, 64), objectives.Denoising(0.3))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert_same_end(config.run_dir, short_run.folder)
    expected = short_run.scores(np.eye(2, 64), objectives.Denoising(0.3))
    np.testing.assert_array_equal(scores["denoising_mse"], expected["denoising_mse"])


# --- A run's own methods ------------------------------------------------------------


def test_images_go_in_in_any_form_and_come_out_as_images(finished_run):
    images = finished_run.data().test.images[:7]
    floats = images / 255
    latents, recon = finished_run.encode(images), finished_run.reconstruct(images)
    assert (latents.shape, recon.shape) == ((7, 3), images.shape)
    kinds = [images.tolist(), np.int64(images), np.uint16(images), jnp.array(images)]
    kinds += [np.float32(floats), floats.tolist(), torch.from_numpy(floats).float()]
    for form in (images.reshape(7, 64), images[..., 0], floats, *kinds):
        np.testing.assert_allclose(finished_run.encode(form), latents, atol=1e-6)
    halves = jnp.array(floats, jnp.bfloat16)  # which NumPy does not know
    np.testing.assert_allclose(
        finished_run.encode(halves), finished_run.encode(np.float32(halves))
    )
    np.testing.assert_allclose(finished_run.decode(latents), recon, rtol=1e-6)
    scores = finished_run.scores(images)["mse"]
    np.testing.assert_allclose(
        scores, np.square(recon - floats).mean((1, 2, 3)), rtol=1e-5
    )
    assert {type(x) for x in (latents, recon, scores)} == {np.ndarray}


def test_a_block_of_images_is_scored_as_each_of_them(finished_run):
    images = np.concatenate([finished_run.data().train.images[:1003]])
    whole = finished_run.encode(images)
    np.testing.assert_allclose(whole[1000:], finished_run.encode(images[1000:]), 1e-4)
    noisy = objectives.Denoising(0.3)
    first, again = (finished_run.scores(images, noisy, seed=s) for s in (1, 1))
    other = finished_run.scores(images, noisy, seed=2)
    np.testing.assert_array_equal(first["denoising_mse"], again["denoising_mse"])
    assert (first["denoising_mse"] != other["denoising_mse"]).all()
    assert finished_run.encode(images[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 28, 28, 1), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((2, 63)),
        np.zeros((8, 8)),
        np.zeros((2, 64), bool),
    ],
)
def test_images_of_another_shape_are_refused_with_the_one_wanted(images, finished_run):
    with pytest.raises(UserError, match=r"takes \[N, 8, 8, 1\] or \[N, 64\], uint8 or"):
        finished_run.encode(images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((2, 64), 255.0), "floats from 255 to 255; this run takes"),
        (np.full((2, 64), np.nan), "floats from nan to nan; this run takes"),
        (np.full((2, 64), -0.1), "floats from -0.1 to -0.1; this run takes"),
        (np.full((2, 64), 256), "integers from 256 to 256, and not bytes"),
        (np.full((2, 64), -1), "integers from -1 to -1, and not bytes"),
        (np.eye(2, 64, dtype=int), "integers from 0 to 1, and not bytes"),
        (np.zeros((8, 8, 1)), r"images are \[8, 8, 1\].*of one image give image"),
        (torch.zeros(2, 64, requires_grad=True), "NumPy cannot take them: Can't call"),
        ([[0.5], [0.5, 0.5]], "NumPy cannot take them: setting an array element"),
        (np.full((2, 64), "a"), "images are .* of <U1"),
    ],
)
def test_images_of_another_scale_are_refused(images, message, finished_run):
    """Scaled wrongly, they would be reconstructed badly, and no more be said."""
    for method in (finished_run.reconstruct, finished_run.scores):
        with pytest.raises(UserError, match=message):
            method(images)


def test_floats_may_leave_their_range_by_rounding(finished_run):
    rounded = np.full((1, 64), 1 + 1e-6)
    assert np.isfinite(finished_run.encode(rounded)).all()


def test_latents_are_numbers_as_they_are(finished_run):
    latents = np.array([[1, 2, 3], [0, 20, 1]])
    images = finished_run.decode(latents / 1.0)
    for form in (latents, np.uint8(latents), latents.tolist(), torch.tensor(latents)):
        np.testing.assert_allclose(finished_run.decode(form), images)
    for wrong, message in (
        (latents[:, :2], r"latents are \[2, 2\].*takes \[N, 3\]"),
        (latents[0], r"takes \[N, 3\].*of one latent give latent"),
        (latents * np.nan, "latents are not finite"),
    ):
        with pytest.raises(UserError, match=message):
            finished_run.decode(wrong)


def test_a_run_works_in_the_processes_of_a_pool(finished_run):
    images = finished_run.data().test.images[:6]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (latents,) = pool.map(finished_run.encode, [images])
    np.testing.assert_array_equal(latents, finished_run.encode(images))


def test_a_run_is_pickled_as_its_folder_and_step(finished_run):
    earlier = finished_run.at(21)
    content = pickle.dumps(earlier)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert again.step == 21
    images = again.data().test.images[:3]
    np.testing.assert_array_equal(again.encode(images), earlier.encode(images))


# --- Classes of a notebook ----------------------------------------------------------

CELL = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
import flax.linen as nn
from ae_jax.data import Arrays

SCALE = [2.0]

def weigh(x):
    return SCALE[0] * x

@dataclasses.dataclass(frozen=True)
class Weighted:
    power: int = 2
    loss_name = "weighted"
    def __call__(self, model, params, x, key):
        error = jnp.abs(model.apply({"params": params}, x) - x)
        return weigh(jnp.mean(error ** self.power)), {"worst": jnp.max(error)}

@dataclasses.dataclass(frozen=True)
class Line:
    width: int = 5
    def make(self, shape, precision):
        return Net(shape, self.width)

class Net(nn.Module):
    shape: tuple
    width: int
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x.reshape(*x.shape[:-3], -1))
        size = self.shape[0] * self.shape[1] * self.shape[2]
        return nn.sigmoid(nn.Dense(size)(x)).reshape(*x.shape[:-1], *self.shape)

@dataclasses.dataclass(frozen=True)
class Noise:
    num: int = 90
    def load(self):
        images = np.random.default_rng(0).integers(0, 256, (self.num, 4, 6, 1))
        images, labels = images.astype(np.uint8), np.zeros(self.num, int)
        return Arrays(images[20:], labels[20:], images[:20], labels[:20])
"""


@pytest.fixture(scope="module")
def notebook():
    """Run a cell, again if asked to, as a notebook does: in one module's namespace."""
    module = types.ModuleType("a_notebook")

    def cell(text=CELL):
        exec(compile(text, "<cell>", "exec"), module.__dict__)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "a_notebook", module)
        yield cell


def config_of(module, run_dir, num_epochs=2):
    return small(
        run_dir,
        data=module.Noise(),
        model=module.Line(),
        objective=module.Weighted(),
        figures=FiguresConfig(epochs=(1,)),
        checkpoint=CheckpointConfig(),
        batch_size=32,
        num_epochs=num_epochs,
    )


@pytest.fixture(scope="module")
def own_run(notebook, tmp_path_factory):
    """A finished run of three classes of one's own; read only."""
    run_dir = tmp_path_factory.mktemp("own") / "run"
    return ae_jax.fit(config_of(notebook(), run_dir))


def test_classes_of_ones_own_train_score_and_draw(own_run):
    assert own_run.step == 6
    row = own_run.metrics[-1]
    assert {"train/weighted", "train/worst", "train/grad_norm"} <= set(row)
    assert "latent/dead_units" not in row
    test = own_run.data().test.images
    assert set(own_run.scores(test)) == {"weighted", "worst"}
    assert not own_run.has("encode", "decode")
    drawn = {path.stem for path in (own_run.folder / "figures").glob("*.png")}
    assert {"training_loss", "samples", "test_reconstructions"} <= drawn
    with pytest.raises(UserError, match="Net, has no encode"):
        own_run.encode(test)
    names = [own_run.config.data, own_run.config.model, own_run.config.objective]
    assert [type(value).__module__ for value in names] == ["a_notebook"] * 3


def test_the_same_definitions_find_the_run_finished(own_run, notebook, capsys):
    module = notebook(f"# The same, further down.\n\n{CELL}")
    before = snapshot(own_run.folder)
    capsys.readouterr()
    assert ae_jax.fit(config_of(module, own_run.folder)).step == 6
    assert "is finished" in capsys.readouterr().out
    assert snapshot(own_run.folder) == before


@pytest.mark.parametrize(
    ("old", "new", "section"),
    [
        ('{"worst": jnp.max(error)}', '{"least": jnp.min(error)}', "objective"),
        ("SCALE = [2.0]", "SCALE = [3.0]", "objective"),
        ("self.width)(x.resh", "self.width + 1)(x.resh", "model"),
        ("default_rng(0)", "default_rng(1)", "data"),
    ],
)
def test_a_redefined_class_never_gets_the_old_run(old, new, section, own_run, notebook):
    assert CELL.count(old) == 1
    module, before = notebook(CELL.replace(old, new)), snapshot(own_run.folder)
    with pytest.raises(UserError, match=f"class of {section} was defined differently"):
        ae_jax.fit(config_of(module, own_run.folder))
    assert snapshot(own_run.folder) == before


def test_a_class_that_only_the_config_knows_serves_all_the_same(tmp_path):
    """It was made in a function, so that no name leads to it later."""

    @dataclasses.dataclass(frozen=True)
    class Local:
        loss_name = "local"

        def __call__(self, model, params, x, key):
            return model.apply({"params": params}, x).mean(), {}

    run = ae_jax.fit(small(tmp_path / "run", objective=Local()))
    images = run.data().test.images[:2]
    assert set(run.scores(images)) == set(run.at(3).scores(images)) == {"local"}
    assert ae_jax.fit(small(tmp_path / "run", objective=Local())).step == 6
    later = ae_jax.open_run(run.folder)
    np.testing.assert_array_equal(later.encode(images), run.encode(images))
    with pytest.raises(UserError, match=r"Local is not known here"):
        later.scores(images)


def test_a_run_whose_objective_and_data_are_unknown_still_reconstructs(
    own_run, monkeypatch, notebook
):
    images = own_run.data().test.images
    expected = own_run.reconstruct(images)
    module = notebook()
    del module.Weighted, module.Noise
    run = ae_jax.open_run(own_run.folder)
    np.testing.assert_array_equal(run.reconstruct(images), expected)
    assert run.at(3).step == 3
    for name in figures.applicable(run):
        assert run.figure(name).axes
    with pytest.raises(UserError, match="is not known here; define and register it"):
        run.scores(images)
    more = dataclasses.replace(run.config.train, num_epochs=3)
    with pytest.raises(UserError, match="a_notebook:Noise is not known here"):
        ae_jax.fit(dataclasses.replace(run.config, train=more))
    with pytest.raises(UserError, match=r"data\.name: a_notebook:Noise is not known"):
        run.data()
    assert set(run.scores(images, objectives.Reconstruction())) == {"mse"}


def test_a_run_whose_model_is_unknown_says_so_in_a_line(own_run, notebook):
    del notebook().Line
    with pytest.raises(UserError, match=r"model\.name: cannot import a_notebook:Line"):
        ae_jax.open_run(own_run.folder)


def test_an_own_run_resumes_after_its_cell_ran_again(notebook, own_run, tmp_path):
    train_until(3, config_of(notebook(), tmp_path / "run"))
    ae_jax.fit(config_of(notebook(), tmp_path / "run"))
    assert_same_end(tmp_path / "run", own_run.folder)


def test_module_and_class_choose_them_on_the_command_line(notebook):
    module = notebook()
    args = "--objective.name a_notebook:Weighted --objective.power 4 --data.name "
    args += "a_notebook:Noise --model.name a_notebook:Line --model.width 3"
    made = cli.parse("tutorial", PRESETS, "What it does.", args.split())
    assert made.objective == module.Weighted(4)
    assert (made.data, made.model) == (module.Noise(), module.Line(3))
