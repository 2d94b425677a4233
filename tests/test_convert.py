"""Weights go between run folders, safetensors and PyTorch exactly; traps do not."""

import dataclasses
import errno
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from ae_jax import config, data, files, weights
from ae_jax.config import CheckpointConfig, Config, FiguresConfig, TrainConfig
from ae_jax.errors import UserError
from ae_jax.models.conv import ConvAutoencoder
from ae_jax.models.dense import Autoencoder as Dense
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run
from experiments.pytorch_baseline import Autoencoder
from scripts import convert

ENDINGS = [".safetensors", ".pt", ".pth"]
SIZES = (64, (10, 6), 3)
SMALL = Config(
    data=data.Digits(),
    model=Dense(hidden=(16, 8), latent_activation="leaky_relu"),
    train=TrainConfig(num_epochs=2),
    checkpoint=CheckpointConfig(keep=2),
    figures=FiguresConfig(draw=False),
)


def to(src, dst, *args, data_name="digits"):
    convert.main(src, dst, *args, data_name=data_name)
    return dst


def save_torch(path, sizes=SIZES, dtype=torch.float32):
    """A state dict that PyTorch made."""
    torch.manual_seed(0)
    model = Autoencoder(*sizes).to(dtype)
    torch.save(model.state_dict(), path)
    return model


def bits(path, which="latest"):
    state_dict, _ = convert._read(path, which)
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in state_dict.items()}


def difference(shown):
    """What the last line of a conversion says."""
    return float(re.search(r": (\S+)$", shown.strip())[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 2 epochs on the digits, its latent leaky; read only."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train_run(dataclasses.replace(SMALL, run_dir=path))
    return path


# --- What it does --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_survives_the_way_through_a_file_to_the_bit(
    trained, tmp_path, ending, capsys
):
    file = to(trained, tmp_path / f"weights{ending}", data_name=None)
    folder = to(file, tmp_path / "new" / "run", "latest", "leaky_relu")
    assert bits(file) == bits(folder) == bits(trained)
    ours, theirs = open_run(folder), open_run(trained)
    images = data.load(data.Digits()).test.images
    np.testing.assert_array_equal(ours.reconstruct(images), theirs.reconstruct(images))
    assert (ours.step, ours.metrics) == (0, [])
    description = files.read_json(folder / "config.json")
    assert description["weights"] == str(file)
    first, shown, second, again = capsys.readouterr().out.splitlines()
    assert first == f"{file}: 64-16-8-3, float32, latent leaky_relu"
    assert second == f"{folder}: 64-16-8-3, float32, latent leaky_relu"
    for line in (shown, again):
        assert line.startswith("100 test images: largest difference of a pixel: ")
        assert difference(line) < 1e-6


@pytest.mark.parametrize(
    ("sizes", "dtype", "atol"),
    [(SIZES, torch.float32, 1e-6), ((64, (), 2), torch.float64, 1e-14)],
    ids=str,
)
@pytest.mark.parametrize("dst", ["b.safetensors", "b.pth", "run"])
def test_foreign_weights_keep_sizes_format_and_bits(
    tmp_path, sizes, dtype, atol, dst, capsys
):
    save_torch(tmp_path / "a.pt", sizes, dtype)
    to(tmp_path / "a.pt", tmp_path / dst)
    assert bits(tmp_path / dst) == bits(tmp_path / "a.pt")
    assert difference(capsys.readouterr().out) <= atol
    if dst == "run":
        settings = open_run(tmp_path / dst).config
        assert (64, settings.model.hidden, settings.model.latent_dim) == sizes
        assert f"torch.{settings.train.precision}" == str(dtype)
        assert settings.model.latent_activation == "relu"


def test_the_comparison_sees_a_wrong_activation_and_a_wrong_weight(
    tmp_path, capsys, monkeypatch
):
    save_torch(tmp_path / "a.pt", (64, (9,), 4))
    monkeypatch.setattr(torch.nn, "Identity", torch.nn.ReLU)
    to(tmp_path / "a.pt", tmp_path / "run", "latest", "none")
    assert difference(capsys.readouterr().out) > 1e-3

    def write_doubled(path, state_dict):
        doubled = {name: 2 * array for name, array in state_dict.items()}
        convert._write_pt(path, doubled)

    monkeypatch.setitem(convert.WRITERS, ".pt", write_doubled)
    to(tmp_path / "a.pt", tmp_path / "b.pt")
    assert difference(capsys.readouterr().out) > 1e-3


def test_training_on_from_a_runs_first_weights_ends_as_that_run(tmp_path):
    import jax

    from ae_jax.objectives import Reconstruction
    from ae_jax.runs.program import build

    begun = dataclasses.replace(
        SMALL,
        run_dir=tmp_path / "begun",
        model=Dense(hidden=(16, 8)),
        train=TrainConfig(),
    )
    program = build(begun.model, Reconstruction(), begun.train, 1437, (8, 8, 1))
    first = weights.to_torch(jax.jit(program.init)(np.uint32(0)).params)
    weights.write_safetensors(tmp_path / "a.safetensors", first)
    folder = to(tmp_path / "a.safetensors", tmp_path / "run")
    asked = config.load(folder / "config.json", Config)
    train_run(dataclasses.replace(asked, figures=SMALL.figures))
    train_run(begun)
    assert bits(folder) == bits(begun.run_dir)


def test_the_checkpoint_is_chosen(trained, tmp_path):
    first = to(trained, tmp_path / "a.pt", "23")
    assert bits(first) == bits(trained, "23") != bits(trained)
    best = to(trained, tmp_path / "run", "best", data_name=None)
    assert bits(best) == bits(trained, "best")
    was, now = open_run(trained), open_run(best)
    assert set(config.diff(was.config, now.config)) == {"run_dir"}


def test_weights_that_are_not_finite_are_converted_but_said(tmp_path, capsys):
    model = save_torch(tmp_path / "a.pt")
    with torch.no_grad():
        model.encoder[2].bias[1] = torch.nan
        model.decoder[4].weight[3, 2] = -torch.inf
    torch.save(model.state_dict(), tmp_path / "a.pt")
    to(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert bits(tmp_path / "b.safetensors") == bits(tmp_path / "a.pt")
    shown = capsys.readouterr()
    assert shown.err == (
        f"warning: {tmp_path / 'a.pt'}: NaN or infinity in encoder.2.bias, "
        "decoder.4.weight; converted all the same\n"
    )
    assert np.isnan(difference(shown.out))


# --- What it does without ------------------------------------------------------------


def test_without_pytorch_its_files_alone_are_refused(trained, tmp_path, monkeypatch):
    file = to(trained, tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "experiments.pytorch_baseline")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    folder = to(to(trained, tmp_path / "a.safetensors"), tmp_path / "run")
    assert bits(folder) == bits(trained)
    for src, dst in ((trained, "b.pt"), (file, "b.safetensors")):
        with pytest.raises(UserError, match=r"PyTorch"):
            to(src, tmp_path / dst)
        assert not (tmp_path / dst).exists()


def test_a_file_needs_no_data_set_and_a_run_does(tmp_path, capsys):
    save_torch(tmp_path / "a.pt", (63, (5,), 2))
    to(tmp_path / "a.pt", tmp_path / "b.pt")
    message = "data.name: the weights are for 63 pixels, these images have 64; choose"
    assert capsys.readouterr().err.startswith(f"not compared: {message}")
    with pytest.raises(UserError, match=message):
        to(tmp_path / "a.pt", tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.name: there is no mnits"):
        to(tmp_path / "a.pt", tmp_path / "run", data_name="mnits")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


# --- What it refuses -----------------------------------------------------------------


class Trap:
    """Unpickled freely, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [None, 0, 2, 4], ids=str)
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, protocol):
    path, sprung = tmp_path / "a.pt", tmp_path / "sprung"
    state_dict = {"encoder.0.weight": Trap(sprung)}
    if protocol is None:
        torch.save(state_dict, path)
    else:
        path.write_bytes(pickle.dumps(state_dict, protocol))
    with pytest.raises(UserError, match=r"a\.pt: not a PyTorch state dict") as caught:
        to(path, tmp_path / "b.safetensors")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(
    "content",
    [
        Autoencoder(*SIZES),
        [torch.zeros(2)],
        {"state_dict": {"a": torch.zeros(2)}},
        {0: torch.zeros(2)},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(2, dtype=torch.bfloat16)},
        {"encoder.0.weight": torch.zeros(2, 2, dtype=torch.float16)},
        {"a": torch.zeros(2)},
    ],
    ids=lambda content: type(content).__name__,
)
def test_what_is_not_a_state_dict_of_ours_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        to(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pt'}: ")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("cut", [0, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path, ending, cut):
    path = tmp_path / f"a{ending}"
    model = Autoencoder(*SIZES)
    arrays = {name: t.numpy() for name, t in model.state_dict().items()}
    convert.WRITERS[ending](path, arrays)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"damaged|not a PyTorch state dict"):
        to(path, tmp_path / "run")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("dst", ["b.pt", "run"])
def test_another_architecture_is_told_tensor_by_tensor(tmp_path, dst):
    model = Autoencoder(*SIZES)
    model.decoder[0] = torch.nn.Linear(3, 11)
    model.extra = torch.nn.Linear(2, 1, bias=False)
    state_dict = model.state_dict()
    del state_dict["decoder.2.weight"]
    torch.save(state_dict, tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        to(tmp_path / "a.pt", tmp_path / dst)
    for fault in (
        "decoder.2.weight [10, 6] is missing",
        "extra.weight [1, 2] is extra",
        "decoder.0.weight is [11, 3], must be [6, 3]",
    ):
        assert fault in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_model_without_a_counterpart_is_refused(tmp_path):
    model = ConvAutoencoder(hidden=(2,), latent_dim=2)
    train = TrainConfig(num_epochs=1, batch_size=512)
    folder = tmp_path / "run"
    train_run(dataclasses.replace(SMALL, run_dir=folder, model=model, train=train))
    with pytest.raises(UserError, match="a run of ConvAutoencoder; only the dense"):
        to(folder, tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ("nowhere.pt", "b.pt", "nowhere.pt: not there; check the path"),
        ("a.onnx", "b.pt", "a.onnx: unknown ending; SRC must be a run folder, or a"),
        ("empty", "b.pt", "empty: not a run folder"),
        ("a.pt", "b.onnx", "b.onnx: unknown ending; DST must be a run folder, or a"),
        ("a.pt", "a.pt", "a.pt: exists already; delete it, or choose another DST"),
        ("a.pt", "full", "full: exists already"),
        ("a.pt", "dangling.pt", "dangling.pt: exists already"),
        ("a.pt", "no/b.pt", "no/b.pt: there is no folder no; make it first"),
        ("a.pt", "a.pt/b.pt", "a.pt/b.pt: there is no folder a.pt; make it first"),
    ],
)
def test_a_wrong_path_is_refused_and_nothing_is_touched(
    tmp_path, monkeypatch, src, dst, message
):
    monkeypatch.chdir(tmp_path)
    save_torch("a.pt")
    Path("a.onnx").write_text("mine")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("mine")
    Path("empty").mkdir()
    Path("dangling.pt").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        to(Path(src), Path(dst))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dst", ["b.pt", "b.safetensors", "run"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, dst):
    save_torch(tmp_path / "a.pt")

    def refuse(src, dst):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # Orbax renames by another function; ours is the last step of all three.
    monkeypatch.setattr("ae_jax.files.os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        to(tmp_path / "a.pt", tmp_path / dst)
    assert os.listdir(tmp_path) == ["a.pt"]


# --- As typed ------------------------------------------------------------------------


def test_the_command_converts_and_a_refusal_is_one_line_and_status_2(tmp_path):
    save_torch(tmp_path / "a.pt")

    def command(*args):
        script = [sys.executable, ROOT / "scripts" / "convert.py"]
        return subprocess.run(
            [*map(str, (*script, *args))], capture_output=True, text=True, check=False
        )

    options = ["--model.latent-activation", "none", "--data.name", "digits"]
    done = command(tmp_path / "a.pt", tmp_path / "run", *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert difference(done.stdout) < 1e-6
    done = command(tmp_path / "a.pt", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'run'}: exists already; ")
    assert done.stderr.count("\n") == 1
