"""The tutorial in PyTorch: faithful in its parts, and a run folder like any other."""

import itertools
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from life import flip, rows_of, snapshot, steps_of

from ae_jax import collapse, data, metrics, weights
from ae_jax.config import Config, FiguresConfig, TrainConfig
from ae_jax.errors import Diverged, UserError
from ae_jax.models.dense import Autoencoder as Options
from ae_jax.runs import folder
from ae_jax.runs.figures import FIGURES
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run as train_ours
from experiments import pytorch_baseline as baseline
from experiments.pytorch_baseline import Autoencoder, Images, InMemory

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")


def small(run_dir, **train):
    """Three epochs of eight steps, the last one of 177 images; a latent unit dies."""
    return Config(
        run_dir=run_dir,
        data=data.Digits(),
        model=Options(hidden=(16, 8)),
        train=TrainConfig(**{"num_epochs": 3, "batch_size": 180, "seed": 6, **train}),
        figures=FiguresConfig(epochs=(1, 7)),
    )


@pytest.fixture(scope="module")
def digits():
    return data.load(data.Digits())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder; read only."""
    path = tmp_path_factory.mktemp("finished") / "run"
    baseline.train_run(small(path))
    return path


# --- The parts ---


def test_state_dict_and_layers_are_the_tutorials():
    model = Autoencoder()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert shapes == weights.shapes_of((784, (128, 64, 12), 3))
    kinds = [type(layer).__name__ for layer in (*model.encoder, *model.decoder)]
    assert kinds == ["Linear", "ReLU"] * 7 + ["Linear", "Sigmoid"]


@pytest.mark.parametrize("make_batches", [baseline.make_loader, InMemory])
def test_each_epoch_has_each_image_once_in_its_own_order_and_each_seed(make_batches):
    images = np.arange(100, dtype=np.uint8).reshape(-1, 1, 1, 1)

    def epochs(seed):
        batches = make_batches(images, 8, seed)
        return [[batch.ravel().tolist() for batch in batches] for _ in range(2)]

    (first, second), (other, _) = epochs(0), epochs(1)
    assert epochs(0) == [first, second]
    orders = [[*itertools.chain(*epoch)] for epoch in (first, second, other)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order) == (images / np.float32(255)).ravel().tolist()
    assert [len(batch) for batch in first] == [8] * 12 + [4]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_one_by_one_are_those_in_memory_over_255(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 4, 5, channels), np.uint8)
    one_by_one = torch.stack(list(Images(images)))
    np.testing.assert_array_equal(one_by_one, images / np.float32(255))
    (in_memory,) = baseline.scaled_batches(torch.tensor(images), [torch.arange(20)])
    assert torch.equal(one_by_one.flatten(1), in_memory)


def test_running_loss_is_the_mean_of_batch_means_from_before_the_updates():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.weight * x

    model = Scale()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    # The first batch's loss is 1, and its update makes the weight 1, by which the
    # second, of a single image, is reproduced. Over images the mean would be 2/3; and
    # a gradient that were not zeroed would move the weight again.
    batches = [torch.ones(2, 2, 2, 1), torch.full((1, 2, 2, 1), 3.0)]
    loss, img = baseline.train_epoch(model, optimizer, iter(batches))
    assert loss == 0.5
    assert torch.equal(img, torch.full((1, 4), 3.0))
    assert model.weight == 1


# --- The run folder ---


def state_dict_at(path, step):
    return weights.read_safetensors(
        path / "checkpoints" / str(step) / "weights.safetensors"
    )


def model_of(path, step):
    state_dict = state_dict_at(path, step)
    model = Autoencoder(*weights.infer_sizes(state_dict))
    model.load_state_dict({n: torch.tensor(a) for n, a in state_dict.items()})
    return model


def test_the_folder_is_like_any_other(finished, digits):
    assert {entry.name for entry in finished.iterdir()} == {
        ".lock", "config.json", "checkpoints", "figures", "metrics.jsonl",
        "summary.json", "tensorboard",
    }  # fmt: skip
    drawn = {entry.stem for entry in (finished / "figures").glob("*.png")}
    assert drawn == set(FIGURES)
    about = folder.read_description(finished)
    assert (about.experiment, about.framework) == ("pytorch_baseline", "pytorch")
    assert about.versions["torch"] == torch.__version__
    assert about.data.model_dump(mode="json", exclude={"dir"}) == digits.describe()
    assert steps_of(finished) == [8, 16, 24]


def test_its_scores_are_those_of_pytorchs_own_model(finished, digits):
    model, test = model_of(finished, 24), digits.test.images
    recon = baseline.apply(model, test).reshape(test.shape)
    scores = metrics.per_image_metrics(recon, test / np.float32(255))
    dead = int(collapse.dead_units(baseline.apply(model.encoder, test)).sum())
    summary = folder.read_summary(finished)
    for name, values in scores.items():
        assert summary[f"test/{name}"] == pytest.approx(values.mean(), rel=1e-5)
    assert summary["latent/dead_units"] == dead
    assert summary["train/mse"] == folder.read_metrics(finished)[-1]["train/mse"]
    run = open_run(finished, 16)
    np.testing.assert_allclose(
        run.encode(test),
        baseline.apply(model_of(finished, 16).encoder, test),
        atol=1e-6,
    )


def test_its_rows_are_those_of_the_same_training_in_memory(finished, digits):
    torch.manual_seed(6)
    model = Autoencoder(64, (16, 8), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = digits.train.images
    loader = baseline.make_loader(images, 180, seed=6)
    for row in rows_of(finished):
        loss, _ = baseline.train_epoch(model, optimizer, loader)
        dead = (baseline.apply(model.encoder, images) == 0).all(axis=0).sum()
        assert (row["train/mse"], row["latent/dead_units"]) == (loss, dead)
        for name, array in baseline.to_numpy(model.state_dict().items()).items():
            assert np.array_equal(state_dict_at(finished, row["step"])[name], array)


def test_the_pictures_are_of_the_last_batches(finished, digits):
    with np.load(finished / "figures" / "images.npz") as images:
        loader = baseline.make_loader(digits.train.images, 180, seed=6)
        for _ in range(3):
            *_, last = loader
        np.testing.assert_array_equal(images["train"], (last[:5] * 255).round())
        np.testing.assert_array_equal(images["test"], digits.test.images[180:190])
        assert images["samples"].shape == (25, 8, 8, 1)


def test_a_finished_run_is_left_and_another_is_refused(finished, capsys):
    before = snapshot(finished)
    baseline.train_run(small(finished))
    assert f"{finished} is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train\.batch_size: the run has 180, you"):
        baseline.train_run(small(finished, batch_size=64))
    with pytest.raises(UserError, match="a run of pytorch_baseline, trained by pyt"):
        train_ours(small(finished))
    assert snapshot(finished) == before


@pytest.mark.parametrize("name", ["weights.safetensors", "record.json"])
def test_a_damaged_checkpoint_is_refused(name, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    flip(copy / "checkpoints" / "24" / name)
    with pytest.raises(UserError, match=r"24: damaged checkpoint"):
        open_run(copy)
    (copy / "checkpoints" / "24" / name).unlink()
    with pytest.raises(UserError, match=r"24: damaged checkpoint"):
        open_run(copy)


def test_its_weights_start_a_run_of_ours(finished, digits, tmp_path):
    train = {"num_epochs": 1, "learning_rate": 1e-9}
    settings = small(tmp_path / "run", init_from=finished, **train)
    run = train_ours(settings)
    images = digits.test.images
    begun = open_run(finished).reconstruct(images)
    np.testing.assert_allclose(run.reconstruct(images), begun, atol=1e-5)
    assert folder.read_description(run.folder).init_from_digest
    with pytest.raises(UserError, match="a run of run, trained by jax"):
        baseline.train_run(replace(settings, train=TrainConfig()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Options(latent_activation="none")}, "model.latent_activation: m"),
        ({"train": TrainConfig(weight_decay=0.1)}, "train.weight_decay: must be 0.0"),
        ({"data": data.Digits(num_validation=10)}, "data.num_validation: must be 0"),
        ({"data": data.Digits(streaming=True)}, "data.streaming: must be False"),
    ],
)
def test_what_the_tutorial_does_not_do_is_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        baseline.train_run(replace(small(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(Diverged, match=r"diverged in epoch 1: train/mse nan"):
        baseline.train_run(small(tmp_path / "run", learning_rate=1e30))
    assert not (tmp_path / "run" / "summary.json").exists()


# --- The command ---


def test_without_pytorch_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, baseline.__name__)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(baseline.__name__, run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: PyTorch is not installed; .venv/bin/pip install -c constraints.txt "
        "-e '.[torch]'\n"
    )


def test_an_interrupted_run_leaves_quietly_and_starts_again(
    finished, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "run"
    options = "--preset quick --model.hidden 16 8 --train.batch-size 180 --train.seed 6"
    with subprocess.Popen(
        [
            sys.executable,
            "-um",
            baseline.__name__,
            *options.split(),
            f"--run-dir={path}",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("epoch 1")
        process.send_signal(signal.SIGINT)
        assert (process.wait(), process.stderr.read()) == (130, "")
    assert set(steps_of(path)) < {8, 16, 24}
    shutil.copytree(finished / "checkpoints/24", path / "checkpoints/24")
    settings = replace(small(path), figures=FiguresConfig())
    with monkeypatch.context() as patch:
        patch.setattr(baseline, "train_epoch", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            baseline.train_run(settings)
    assert steps_of(path) == []
    baseline.train_run(settings)
    assert "test, reconstructed" in capsys.readouterr().out
    assert rows_of(path) == rows_of(finished)


def test_the_parts_load_no_jax():
    code = f"import sys, {baseline.__name__}; print('jax' in sys.modules)"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert shown == "False\n"
