"""The tutorial in PyTorch: faithful in its parts, and a run folder like any other."""

import itertools
import os
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
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run as train_ours
from experiments import pytorch_baseline as baseline
from experiments.pytorch_baseline import Autoencoder, Images, InMemory

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

# The bits depend on the number of threads, and beside JAX more than one is slow.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = (sys.executable, "-W", "error", "-m", "experiments.pytorch_baseline")
QUICK = ("--preset", "quick", "--model.hidden", "16", "8", "--train.batch-size", "180")

NO_TORCH = """
import runpy, sys
sys.argv[0] = "pytorch_baseline"
class NoTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
sys.meta_path.insert(0, NoTorch())
runpy.run_module("experiments.pytorch_baseline", run_name="__main__")
"""


def command(*args, how=COMMAND):
    """Run ``python -m experiments.pytorch_baseline ARGS``."""
    return subprocess.run(
        [*how, *map(str, args)],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )


def small(run_dir, **train):
    """Three epochs of eight steps, the last one of 177 images."""
    return Config(
        run_dir=run_dir,
        data=data.Digits(),
        model=Options(hidden=(16, 8)),
        train=TrainConfig(**{"num_epochs": 3, "batch_size": 180, **train}),
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


def test_an_epoch_of_mnist_has_938_batches_and_the_last_has_32():
    loader = baseline.make_loader(np.zeros((60_000, 2, 2, 1), np.uint8), 64, seed=0)
    batches = list(loader.batch_sampler)
    assert len(loader) == len(batches) == 938
    assert [len(rows) for rows in batches] == [64] * 937 + [32]
    assert sorted(itertools.chain(*batches)) == list(range(60_000))


def test_each_epoch_has_its_own_order_and_each_seed():
    images = np.arange(100, dtype=np.uint8).reshape(-1, 1, 1, 1)

    def orders(seed):
        loader = baseline.make_loader(images, 8, seed)
        return [torch.cat(list(loader)).ravel().tolist() for _ in range(2)]

    (first, second), (other, _) = orders(0), orders(1)
    assert len({tuple(order) for order in (first, second, other)}) == 3
    assert orders(0) == [first, second]


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


def test_images_in_memory_come_in_another_order_each_epoch_and_seed(digits):
    images = digits.train.images[:100]

    def epochs(seed):
        batches = InMemory(images, 64, seed)
        return [torch.cat(list(batches)).numpy() for _ in range(2)]

    (first, second), (other, _) = epochs(0), epochs(1)
    assert {first.tobytes(), second.tobytes(), other.tobytes()}.__len__() == 3
    assert np.array_equal(epochs(0), [first, second])
    scaled = images.reshape(100, -1) / np.float32(255)
    assert {x.tobytes() for x in first} == {x.tobytes() for x in scaled}


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
    assert {entry.name for entry in (finished / "figures").iterdir()} == {
        "images.npz", "samples.png", "training_loss.png", "test_reconstructions.png",
        "reconstructions_by_epoch.png",
    }  # fmt: skip
    about = folder.read_description(finished)
    assert (about.experiment, about.framework) == ("pytorch_baseline", "pytorch")
    assert about.versions["torch"] == torch.__version__
    assert about.data.model_dump(mode="json") == digits.describe()
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
    torch.manual_seed(0)
    model = Autoencoder(64, (16, 8), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = digits.train.images
    loader = baseline.make_loader(images, 180, seed=0)
    for row in rows_of(finished):
        loss, _ = baseline.train_epoch(model, optimizer, loader)
        dead = (baseline.apply(model.encoder, images) == 0).all(axis=0).sum()
        assert (row["train/mse"], row["latent/dead_units"]) == (loss, dead)
        for name, array in baseline.to_numpy(model.state_dict().items()).items():
            assert np.array_equal(state_dict_at(finished, row["step"])[name], array)


def test_the_pictures_are_of_the_last_batches(finished, digits):
    with np.load(finished / "figures" / "images.npz") as images:
        loader = baseline.make_loader(digits.train.images, 180, seed=0)
        for _ in range(3):
            *_, last = loader
        np.testing.assert_array_equal(images["train"], (last[:5] * 255).round())
        np.testing.assert_array_equal(images["test"], digits.test.images[180:190])
        assert images["samples"].shape == (25, 8, 8, 1)


def test_a_finished_run_is_left_and_another_is_refused(finished, finished_run, capsys):
    before = snapshot(finished)
    baseline.train_run(small(finished))
    assert f"{finished} is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"train\.batch_size: the run has 180, you"):
        baseline.train_run(small(finished, batch_size=64))
    with pytest.raises(UserError, match="a run of pytorch_baseline, trained by pyt"):
        train_ours(small(finished))
    with pytest.raises(UserError, match="a run of tutorial, trained by jax"):
        baseline.train_run(replace(small(finished_run.folder), data=data.Digits()))
    assert snapshot(finished) == before


@pytest.mark.parametrize("name", ["weights.safetensors", "record.json"])
def test_a_damaged_checkpoint_is_refused(name, finished, tmp_path):
    import shutil

    copy = shutil.copytree(finished, tmp_path / "run")
    flip(copy / "checkpoints" / "24" / name)
    with pytest.raises(UserError, match=r"24: damaged checkpoint"):
        open_run(copy)
    (copy / "checkpoints" / "24" / name).unlink()
    with pytest.raises(UserError, match=r"24: damaged checkpoint"):
        open_run(copy)


def test_its_weights_start_a_run_of_ours(finished, tmp_path):
    settings = small(tmp_path / "run", init_from=finished, num_epochs=1)
    ours = open_run(finished).reconstruct(np.zeros((1, 64)))
    run = train_ours(settings)
    assert np.abs(run.reconstruct(np.zeros((1, 64))) - ours).max() < 0.3
    assert folder.read_description(run.folder).init_from_digest


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


def test_without_pytorch_one_line_says_what_to_install(tmp_path):
    how = (sys.executable, "-W", "error", "-c", NO_TORCH)
    done = command("--run-dir", tmp_path / "run", how=how)
    assert done.returncode == 2
    assert done.stderr == (
        "error: PyTorch is not installed; .venv/bin/pip install -c constraints.txt "
        "-e '.[torch]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_leaves_quietly_and_starts_again(tmp_path):
    path, other = tmp_path / "run", tmp_path / "other"
    with subprocess.Popen(
        [*COMMAND, *QUICK, "--run-dir", str(path)],
        cwd=ROOT,
        env={**ONE_THREAD, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline().startswith("epoch 1")
        process.send_signal(signal.SIGINT)
        assert (process.wait(), process.stderr.read()) == (130, "")
    assert set(steps_of(path)) < {8, 16, 24}
    for run_dir in (path, other):
        done = command(*QUICK, "--run-dir", run_dir)
        assert (done.returncode, done.stderr) == (0, "")
    assert rows_of(path) == rows_of(other)
    assert "test, reconstructed" in done.stdout


def test_the_parts_load_no_jax():
    code = "import sys, experiments.pytorch_baseline; print('jax' in sys.modules)"
    done = command(how=(sys.executable, "-c", code))
    assert done.stdout == "False\n"
