"""The tutorial in PyTorch: faithful in its parts, and a run folder like any other."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from ae_jax import config as configs
from ae_jax import data, files, weights
from ae_jax.errors import Diverged, UserError
from ae_jax.runs import folder
from experiments import pytorch_baseline as baseline
from experiments.pytorch_baseline import Autoencoder, Images, Train

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

QUICK = baseline.PRESETS["quick"]

# The bits depend on the number of threads, and beside JAX more than one is slow.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}

# Runs the command, then says which heavy modules it loaded.
COMMAND = """
import runpy, sys
sys.argv[0] = "pytorch_baseline"
try:
    runpy.run_module("experiments.pytorch_baseline", run_name="__main__")
finally:
    heavy = {"jax", "flax", "optax", "orbax", "tensorflow_datasets", "torch"}
    print("loaded:", *heavy & set(sys.modules))
"""

NO_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'")
sys.meta_path.insert(0, NoTorch())
"""


def command(*args, before=""):
    """Run ``python -m experiments.pytorch_baseline ARGS``."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", before + COMMAND, *map(str, args)],
        cwd=ROOT,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def digits():
    return data.load(data.Digits())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run's folder and what the command printed; read only."""
    path = tmp_path_factory.mktemp("finished") / "run"
    done = command("--preset", "quick", "--run-dir", path)
    assert (done.returncode, done.stderr) == (0, "")
    return path, done.stdout


def rows_without_times(path):
    times = ("wall_s", "images_per_s")
    rows = folder.read_metrics(path)
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def same_order(epochs, seed=QUICK.train.seed):
    """Row numbers of each batch of each epoch, as PyTorch's loader draws them."""
    loader = torch.utils.data.DataLoader(
        range(1437),
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    return [list(loader) for _ in range(epochs)]


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


def test_fields_and_defaults_are_those_of_the_jax_side():
    ours = configs.flatten(baseline.to_json(baseline.Config()))
    theirs = configs.flatten(configs.to_json(configs.Config()))
    assert ours.items() <= theirs.items()
    with pytest.raises(ValueError, match="learning_rate"):
        Train(learning_rate=float("nan"))
    with pytest.raises(ValueError, match="hidden"):
        baseline.Model(hidden=(8, 0))


# --- The run folder ---


def test_the_command_loads_no_jax_and_explains_itself(finished):
    assert finished[1].splitlines()[-1] == "loaded: torch"
    shown = command("--data.name", "digits", "--help").stdout
    for option in ("--train.learning-rate", "--preset", "--data.num-validation"):
        assert option in shown


def test_without_pytorch_one_line_says_what_to_install(tmp_path):
    done = command("--run-dir", tmp_path / "run", before=NO_TORCH)
    assert done.returncode == 2
    assert done.stderr == (
        "error: PyTorch is not installed; .venv/bin/pip install -c constraints.txt "
        "-e '.[torch]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_can_be_read_as_any_other(finished, digits):
    path, _ = finished
    assert {entry.name for entry in path.iterdir()} == {
        ".lock", "config.json", "figures", "metrics.jsonl", "summary.json",
        "weights.safetensors",
    }  # fmt: skip
    assert {entry.name for entry in (path / "figures").iterdir()} == {
        "samples.png", "training_loss.png", "test_reconstructions.png",
        "reconstructions_by_epoch.png",
    }  # fmt: skip
    description = folder.read_description(path)
    assert description["versions"]["torch"] == torch.__version__
    assert description["data"] == digits.describe()
    summary = folder.read_summary(path)
    assert summary["train/mse"] == folder.read_metrics(path)[-1]["train/mse"]
    assert summary["peak_memory_bytes"] > 0
    # The weights give the numbers of the summary.
    state_dict = weights.read_safetensors(path / "weights.safetensors")
    model = Autoencoder(*weights.infer_sizes(state_dict))
    model.load_state_dict({n: torch.tensor(a) for n, a in state_dict.items()})
    scores = baseline.score(model, digits.test.images)
    assert {name: summary[name] for name in scores} == pytest.approx(scores, rel=1e-6)


def test_its_rows_are_those_of_the_same_training_in_memory(finished, digits):
    torch.manual_seed(QUICK.train.seed)
    model = Autoencoder(num_pixels=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images = digits.train.images
    for row, order in zip(rows_without_times(finished[0]), same_order(3), strict=True):
        batches = baseline.scaled_batches(torch.tensor(images), order)
        loss, _ = baseline.train_epoch(model, optimizer, batches)
        dead = (baseline.apply(model.encoder, images) == 0).all(axis=0).sum()
        assert (row["train/mse"], row["latent/dead_units"]) == (loss, dead)


def test_the_pictures_are_of_the_last_batches_and_each_of_its_epoch(
    tmp_path, digits, monkeypatch
):
    from ae_jax import plots

    drawn = {}

    def note(name):
        draw = getattr(plots, name)

        def noted(*args):
            drawn[name] = args
            return draw(*args)

        monkeypatch.setattr(plots, name, noted)

    for name in ("samples", "reconstructions_by_epoch", "test_reconstructions"):
        note(name)
    monkeypatch.setattr(baseline, "SHOWN", (1, 7))
    # The test split is of two whole batches: the last of them is shown.
    train = Train(num_epochs=3, batch_size=180)
    baseline.main(dataclasses.replace(QUICK, run_dir=tmp_path / "run", train=train))
    assert drawn["samples"][0].shape == (25, 8, 8, 1)
    recons, originals = drawn["reconstructions_by_epoch"]
    assert list(recons) == [1, 3]
    assert np.abs(recons[1] - recons[3]).max() > 1e-3
    loader = baseline.make_loader(digits.train.images, 180, QUICK.train.seed)
    for _ in range(3):
        *_, last = loader
    np.testing.assert_allclose(originals, last[:5] * 255, atol=0.01)
    _, originals = drawn["test_reconstructions"]
    np.testing.assert_array_equal(originals, digits.test.images[180:190])


def test_a_finished_run_is_left_and_another_is_refused(finished, tmp_path, capsys):
    path, _ = finished
    config = dataclasses.replace(QUICK, run_dir=path)
    before = {entry: entry.stat().st_mtime_ns for entry in path.rglob("*")}
    moved = dataclasses.replace(config, data=data.Digits(dir=tmp_path))
    baseline.main(moved)  # the same run, wherever its data are
    assert capsys.readouterr().out.startswith(f"{path} is finished: test/mse 0.0")
    train = dataclasses.replace(QUICK.train, num_epochs=4)
    with pytest.raises(UserError, match=r"train\.num_epochs: the run has 3, you asked"):
        baseline.main(dataclasses.replace(config, train=train))
    assert {entry: entry.stat().st_mtime_ns for entry in path.rglob("*")} == before


def test_another_experiments_folder_is_refused(finished, tmp_path):
    description = files.read_json(finished[0] / "config.json")
    files.write_json(tmp_path / "config.json", {**description, "experiment": "seeds"})
    with pytest.raises(UserError, match="holds a run of seeds, not of pytorch_b"):
        baseline.main(dataclasses.replace(QUICK, run_dir=tmp_path))


def test_an_interrupted_run_leaves_quietly_and_begins_again(finished, tmp_path):
    path = tmp_path / "run"
    args = ["-u", "-m", "experiments.pytorch_baseline", "--preset", "quick"]
    process = subprocess.Popen(
        [sys.executable, *args, "--run-dir", str(path)],
        cwd=ROOT,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("epoch 1/3")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, "")
    baseline.main(dataclasses.replace(QUICK, run_dir=path))
    assert rows_without_times(path) == rows_without_times(finished[0])


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    train = Train(num_epochs=2, learning_rate=1e30)
    config = dataclasses.replace(QUICK, run_dir=tmp_path / "run", train=train)
    with pytest.raises(Diverged, match=r"diverged in epoch 1: train/mse nan"):
        baseline.main(config)
    assert not (tmp_path / "run" / "summary.json").exists()
