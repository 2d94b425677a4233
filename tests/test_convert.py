"""Weights go between run folders, safetensors and PyTorch exactly; traps do not."""

import errno
import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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

SIZES = (64, (10, 6), 3)
ACTIVATIONS = convert.Activations("gelu", "leaky_relu")  # as below
SMALL = Config(
    data=data.Digits(),
    model=Dense(hidden=(16, 8), activation="gelu", latent_activation="leaky_relu"),
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
    if path.is_dir():
        state_dict = weights.to_torch(open_run(path, which).params)
    else:
        state_dict = weights.read_state_dict(path)
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in state_dict.items()}


def difference(shown):
    """What the last line of a conversion says."""
    return float(re.search(r": (\S+)$", shown.strip())[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 2 epochs on the digits, its latent leaky; read only."""
    path = tmp_path_factory.mktemp("trained") / "run"
    train_run(replace(SMALL, run_dir=path))
    return path


# --- What it does --------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_run_survives_the_way_through_a_file_to_the_bit(
    trained, tmp_path, ending, capsys
):
    file = to(trained, tmp_path / f"weights{ending}", data_name=None)
    folder = to(file, tmp_path / "new" / "run", "latest", ACTIVATIONS)
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
def test_foreign_weights_keep_sizes_format_and_bits(
    tmp_path, sizes, dtype, atol, capsys
):
    save_torch(tmp_path / "a.pt", sizes, dtype)
    for dst in ("b.safetensors", "b.pth", "run-0.2"):
        to(tmp_path / "a.pt", tmp_path / dst)
        assert bits(tmp_path / dst) == bits(tmp_path / "a.pt")
        assert difference(capsys.readouterr().out) <= atol
    settings = open_run(tmp_path / "run-0.2").config
    assert (64, settings.model.hidden, settings.model.latent_dim) == sizes
    assert f"torch.{settings.train.precision}" == str(dtype)
    assert settings.model.latent_activation == "relu"


def test_the_comparison_sees_a_wrong_activation_and_a_wrong_weight(
    tmp_path, capsys, monkeypatch
):
    save_torch(tmp_path / "a.pt", (64, (9,), 4))
    wrong = {
        "Identity": convert.Activations(latent_activation="none"),
        "GELU": convert.Activations(activation="gelu"),
    }
    for name, activations in wrong.items():
        monkeypatch.setattr(torch.nn, name, torch.nn.ReLU)
        to(tmp_path / "a.pt", tmp_path / name, "latest", activations)
        assert difference(capsys.readouterr().out) > 1e-3

    write = convert.WRITERS[".pt"]

    def write_doubled(path, state_dict):
        write(path, {name: 2 * array for name, array in state_dict.items()})

    monkeypatch.setitem(convert.WRITERS, ".pt", write_doubled)
    to(tmp_path / "a.pt", tmp_path / "b.pt")
    assert difference(capsys.readouterr().out) > 1e-3


def test_training_on_from_a_runs_first_weights_gives_that_run(trained, tmp_path):
    import jax

    from ae_jax.objectives import Reconstruction
    from ae_jax.runs.program import build

    program = build(SMALL.model, Reconstruction(), SMALL.train, 1437, (8, 8, 1))
    first = weights.to_torch(jax.jit(program.init)(np.uint32(0)).params)
    weights.write_safetensors(tmp_path / "a.safetensors", first)
    folder = to(tmp_path / "a.safetensors", tmp_path / "run", "latest", ACTIVATIONS)
    asked = config.load(folder / "config.json", Config)
    keep_all = CheckpointConfig(keep=asked.train.num_epochs)
    train_run(replace(asked, figures=SMALL.figures, checkpoint=keep_all))
    assert bits(folder, "46") == bits(trained)


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


def test_weights_that_no_run_has_are_refused_and_nothing_is_left(tmp_path):
    whole = Autoencoder(*SIZES).state_dict()
    extra = {**whole, "extra.bias": torch.ones(2)}
    half = {name: tensor.half() for name, tensor in whole.items()}
    for state_dict, message in (
        (extra, r"not a dense autoencoder's: extra\.bias \[2\] is extra"),
        (half, r"decoder\.4\.bias is float16; all must be"),
    ):
        torch.save(state_dict, tmp_path / "a.pt")
        for dst in ("run", "b.safetensors"):
            with pytest.raises(UserError, match=rf"a\.pt: {message}"):
                to(tmp_path / "a.pt", tmp_path / dst)
        assert os.listdir(tmp_path) == ["a.pt"]


def test_a_model_without_a_counterpart_is_refused(tmp_path, monkeypatch):
    run = SimpleNamespace(config=Config(model=ConvAutoencoder()))
    monkeypatch.setattr("ae_jax.runs.run.open_run", lambda *args: run)
    with pytest.raises(UserError, match="a run of ConvAutoencoder; only the dense"):
        to(tmp_path, tmp_path / "a.pt")


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


def test_the_command_converts_and_a_refusal_is_one_line_and_status_2(
    tmp_path, monkeypatch, capsys
):
    def command(*args):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    monkeypatch.setattr("ae_jax.cli.leave_on_signals", lambda: None)
    save_torch(tmp_path / "a.pt")
    options = ["--model.latent-activation", "none", "--model.activation", "tanh"]
    options += ["--data.name", "digits"]
    status, out, err = command(tmp_path / "a.pt", tmp_path / "run", *options)
    assert (status, err) == (0, "")
    assert difference(out) < 1e-6
    status, out, err = command(tmp_path / "a.pt", tmp_path / "run")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'run'}: exists already; ")
    assert err.count("\n") == 1
