"""The tutorial in PyTorch: faithful in its parts, and a run folder like any other."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from test_trainer import finish, rows_without_times, small

from ae_jax import cli, data, figures, records
from ae_jax import config as configs
from ae_jax.config import DataConfig, FiguresConfig, UserError
from experiments import pytorch_baseline as baseline
from experiments.pytorch_baseline import Autoencoder, Config, Images, Train

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

QUICK = baseline.PRESETS["quick"]
TORCH_FILES = {"weights.pt", "weights.safetensors"}

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
    return data.load(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run's folder and what the command printed; read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = command("--preset", "quick", "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory):
    """A run of the JAX side; read only."""
    folder = tmp_path_factory.mktemp("tutorial") / "run"
    finish(small(folder))
    return folder


# --- The parts ---


def test_state_dict_is_the_tutorials():
    shapes = {
        name: tuple(tensor.shape) for name, tensor in Autoencoder().state_dict().items()
    }
    widths = [784, 128, 64, 12, 3, 12, 64, 128, 784]
    names = [f"{part}.{i}" for part in ("encoder", "decoder") for i in (0, 2, 4, 6)]
    expected = {}
    for name, fan_in, width in zip(names, widths, widths[1:], strict=False):
        expected[f"{name}.weight"] = (width, fan_in)
        expected[f"{name}.bias"] = (width,)
    assert shapes == expected


def test_relu_follows_every_layer_but_the_last_and_the_sigmoid_that():
    model = Autoencoder(64, hidden=(8,), code_width=2)
    kinds = [type(layer).__name__ for layer in (*model.encoder, *model.decoder)]
    assert kinds == ["Linear", "ReLU"] * 3 + ["Linear", "Sigmoid"]


def test_an_epoch_of_mnist_has_938_batches_and_the_last_has_32():
    loader = baseline.make_loader(np.zeros((60_000, 2, 2), np.uint8), 64, seed=0)
    batches = list(loader.batch_sampler)
    assert len(loader) == len(batches) == 938
    assert [len(rows) for rows in batches] == [64] * 937 + [32]
    assert sorted(itertools.chain(*batches)) == list(range(60_000))


def test_each_epoch_has_its_own_order_and_each_seed():
    images = np.arange(100, dtype=np.uint8).reshape(-1, 1, 1)

    def orders(seed):
        loader = baseline.make_loader(images, 8, seed)
        return [torch.cat(list(loader)).ravel().tolist() for _ in range(2)]

    (first, second), (other, _) = orders(0), orders(1)
    assert len({tuple(order) for order in (first, second, other)}) == 3
    assert orders(0) == [first, second]


def test_images_one_by_one_are_those_in_memory(digits):
    images = digits.train.images
    one_by_one = torch.stack(list(Images(images.reshape(-1, *digits.shape))))
    assert one_by_one.shape == (1437, 1, 8, 8)
    (in_memory,) = baseline.scaled_batches(torch.tensor(images), [torch.arange(1437)])
    assert torch.equal(one_by_one.flatten(1), in_memory)
    assert in_memory.dtype == torch.float32
    assert (in_memory.min(), in_memory.max()) == (0, 1)


def test_images_of_mnist_are_scaled_by_255(mnist):
    images = mnist.train.images[:20]
    one_by_one = torch.stack(list(Images(images.reshape(-1, 28, 28)))).flatten(1)
    np.testing.assert_array_equal(one_by_one, images / np.float32(255))


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
    # second, of a single image, is reproduced. Over images the mean would be 2/3.
    batches = [torch.ones(2, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)]
    loss, img, out = baseline.train_epoch(
        model, optimizer, iter(batches), torch.nn.MSELoss()
    )
    assert loss == 0.5
    assert torch.equal(img, torch.full((1, 4), 3.0))
    assert torch.equal(out, img)
    assert model.weight == 1


def test_gradients_do_not_add_up_over_batches(digits):
    def norm_after(batches):
        torch.manual_seed(0)
        model = Autoencoder(64, hidden=(8,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        baseline.train_epoch(model, optimizer, batches, torch.nn.MSELoss())
        return baseline.gradient_norm(model)

    batch = torch.tensor(digits.train.images[:64] / np.float32(255))
    assert norm_after([batch, batch]) == norm_after([batch]) > 0


def test_gradient_norm_joins_all_parameters():
    model = torch.nn.Linear(1, 1)
    model.weight.grad, model.bias.grad = torch.full((1, 1), 3.0), torch.full((1,), 4.0)
    assert baseline.gradient_norm(model) == 5


def test_fields_and_defaults_are_those_of_the_jax_side():
    ours = configs.flatten(configs.to_json(Config()))
    theirs = configs.flatten(configs.to_json(configs.Config()))
    assert ours.items() <= theirs.items()
    with pytest.raises(ValueError, match=r"train\.learning_rate: must be finite and"):
        Train(learning_rate=float("nan"))
    with pytest.raises(ValueError, match=r"model\.hidden: must be widths above 0"):
        baseline.Model(hidden=(8, 0))


# --- The run folder ---


def test_the_command_loads_no_jax(finished):
    *_, loaded = finished[1].splitlines()
    assert loaded == "loaded: torch"


def test_help_does_not_wait_for_pytorch():
    shown = command("--help").stdout
    assert "--train.learning-rate" in shown
    assert shown.endswith("loaded:\n")


def test_without_pytorch_one_line_says_what_to_install(tmp_path):
    done = command("--run-dir", tmp_path / "run", before=NO_TORCH)
    assert done.returncode == 2
    assert done.stderr == (
        "error: PyTorch is not installed; .venv/bin/pip install -c constraints.txt "
        "-e '.[torch]'\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_the_tutorials_but_for_the_weights(finished, tutorial):
    folder, shown = finished
    names = {path.name for path in tutorial.iterdir()} - {"checkpoints"} | TORCH_FILES
    assert {path.name for path in folder.iterdir()} == names
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {
        "images.npz", "samples.png", "training_loss.png", "test_reconstructions.png",
        "reconstructions_by_epoch.png",
    }  # fmt: skip
    ours, theirs = map(records.read_description, (folder, tutorial))
    assert ours.keys() == theirs.keys()
    assert ours["data"] == theirs["data"]
    assert ours["versions"].keys() - theirs["versions"].keys() == {"torch"}
    rows, rows_there = map(records.read_rows, (folder, tutorial))
    assert [row["step"] for row in rows] == [row["step"] for row in rows_there]
    assert all(row.keys() == rows_there[0].keys() for row in rows)
    summary, there = (
        records.read_json(path / "summary.json") for path in (folder, tutorial)
    )
    assert summary.keys() == there.keys()
    for name, value in there.items():
        assert type(summary[name]) is type(value), name
        assert not name.startswith("baseline/") or summary[name] == value
    assert "test, PCA of 3 components" in shown
    assert shown.count("epoch ") == 3


def test_the_pictures_are_of_the_last_batches(finished, digits):
    loader = torch.utils.data.DataLoader(
        range(1437),
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(QUICK.train.seed),
    )
    epochs = [list(loader) for _ in range(3)]
    with np.load(finished[0] / "figures" / "images.npz") as pictures:
        last = digits.train.images[epochs[-1][-1][:5]]
        np.testing.assert_array_equal(pictures["train"].reshape(5, -1), last)
        last_test = digits.test.images[320:330]
        np.testing.assert_array_equal(pictures["test"].reshape(10, -1), last_test)
        assert pictures["samples"].shape == (25, 8, 8)


def test_of_a_test_split_of_whole_batches_the_last_is_shown(tmp_path, digits):
    train = Train(num_epochs=1, batch_size=180)
    baseline.run(dataclasses.replace(QUICK, run_dir=tmp_path / "run", train=train))
    with np.load(tmp_path / "run" / "figures" / "images.npz") as pictures:
        shown = pictures["test"].reshape(10, -1)
    np.testing.assert_array_equal(shown, digits.test.images[180:190])


def test_both_files_of_weights_give_the_numbers_of_the_summary(finished, digits):
    folder, _ = finished
    state = torch.load(folder / "weights.pt", weights_only=True)
    same = safetensors.torch.load_file(folder / "weights.safetensors")
    assert all(torch.equal(same[name], state[name]) for name in {**state, **same})
    model = Autoencoder(num_pixels=64)
    model.load_state_dict(state)
    scores = baseline.score(model, digits)
    summary = records.read_json(folder / "summary.json")
    assert {name: summary[name] for name in scores} == pytest.approx(scores, rel=1e-6)


def test_its_rows_are_those_of_the_same_training_in_memory(finished, digits):
    torch.manual_seed(QUICK.train.seed)
    model = Autoencoder(num_pixels=64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    norms = []
    optimizer.register_step_post_hook(
        lambda *_: norms.append(baseline.gradient_norm(model))
    )
    order = torch.utils.data.DataLoader(
        range(1437),
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(QUICK.train.seed),
    )
    images = torch.tensor(digits.train.images)
    for row in records.read_rows(finished[0]):
        batches = baseline.scaled_batches(images, order)
        loss, *_ = baseline.train_epoch(model, optimizer, batches, torch.nn.MSELoss())
        assert row["train/mse"] == loss
        assert row["train/grad_norm"] == np.mean(norms)
        dead = baseline.count_dead_units(model, digits.train.images)
        assert row["code/dead_units"] == dead
        norms.clear()


def test_same_seed_same_numbers(tmp_path):
    def rows(name, seed):
        train = Train(num_epochs=1, seed=seed)
        baseline.run(dataclasses.replace(QUICK, run_dir=tmp_path / name, train=train))
        return rows_without_times(tmp_path / name)

    assert rows("a", 0) == rows("b", 0) != rows("c", 1)
    a, b = (torch.load(tmp_path / name / "weights.pt") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_row_of_reconstructions_is_of_its_own_epoch(tmp_path, monkeypatch):
    drawn = {}

    def note(recons, originals):
        drawn.update(recons)
        return figures.reconstructions_by_epoch(recons, originals)

    monkeypatch.setattr(baseline, "figures", SimpleNamespace(**vars(figures)))
    monkeypatch.setattr(baseline.figures, "reconstructions_by_epoch", note)
    shown = FiguresConfig(epochs=(1, 7))
    baseline.run(dataclasses.replace(QUICK, run_dir=tmp_path / "run", figures=shown))
    assert list(drawn) == [1, 3]
    assert np.abs(drawn[1] - drawn[3]).max() > 0.01
    model = Autoencoder(num_pixels=64)
    model.load_state_dict(torch.load(tmp_path / "run" / "weights.pt"))
    with np.load(tmp_path / "run" / "figures" / "images.npz") as pictures:
        last = baseline.apply(model, pictures["train"].reshape(5, -1))
    np.testing.assert_array_equal(drawn[3].reshape(5, -1), last)


def test_a_held_out_part_is_scored_after_each_epoch(tmp_path):
    config = dataclasses.replace(
        QUICK,
        run_dir=tmp_path / "run",
        data=DataConfig(name="digits", num_validation=1400),
    )
    baseline.run(config)
    rows = records.read_rows(tmp_path / "run")
    assert all(0 < row["val/mse"] < 1 for row in rows)
    assert records.read_description(tmp_path / "run")["data"]["num_train"] == 37


def test_a_finished_run_is_left_and_says_so(finished, capsys):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    baseline.run(dataclasses.replace(QUICK, run_dir=folder))
    said = capsys.readouterr().out
    assert said.startswith(f"{folder} is finished after 3 epochs: test/mse 0.0")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_another_config_or_another_experiments_folder_is_refused(finished, tutorial):
    train = dataclasses.replace(QUICK.train, num_epochs=4)
    other = dataclasses.replace(QUICK, run_dir=finished[0], train=train)
    with pytest.raises(UserError, match=r"train\.num_epochs: the run has 3, you asked"):
        baseline.run(other)
    with pytest.raises(UserError, match=r"holds a run of experiments\.tutorial"):
        baseline.run(dataclasses.replace(QUICK, run_dir=tutorial))


def test_an_interrupted_run_leaves_quietly_and_begins_again(finished, tmp_path):
    folder = tmp_path / "run"
    args = ["-m", "experiments.pytorch_baseline", "--preset", "quick"]
    process = subprocess.Popen(
        [sys.executable, *args, "--run-dir", str(folder)],
        cwd=ROOT,
        env=ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("epoch 1/3")
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert (process.returncode, told) == (130, "")
    baseline.run(dataclasses.replace(QUICK, run_dir=folder))
    assert rows_without_times(folder) == rows_without_times(finished[0])


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path):
    train = Train(num_epochs=2, learning_rate=1e30)
    config = dataclasses.replace(QUICK, run_dir=tmp_path / "run", train=train)
    with pytest.raises(cli.Diverged, match=r"diverged at step \d+: grad_norm nan"):
        baseline.run(config)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_compare_shows_how_the_two_sides_differ(finished, tutorial):
    script = [ROOT / "scripts" / "compare.py", tutorial, finished[0]]
    shown = subprocess.check_output([sys.executable, *map(str, script)], text=True)
    assert "model.hidden: [16, 8], [128, 64, 12]" in shown
    mse = json.loads((finished[0] / "summary.json").read_text())["test/mse"]
    assert f"{mse:.5f}" in shown
