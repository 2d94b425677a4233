"""Weights go between run folders, safetensors and PyTorch exactly; traps do not."""

import dataclasses
import errno
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_commands import command
from test_interop import bits, noise
from test_trainer import assert_same_end, fit, small

from ae_jax import config, data, interop, models, run
from ae_jax.config import Config, DataConfig, ModelConfig, UserError
from experiments.pytorch_baseline import Autoencoder
from scripts import convert

ENDINGS = [".safetensors", ".pt", ".pth"]
SIZES = (64, (10, 6), 3)
DIGITS = convert.DataOptions(name="digits")


def to(src, dst, data=DIGITS, checkpoint="latest", **model):
    convert.main(src, dst, convert.ModelOptions(**model), data, checkpoint)
    return dst


def save_torch(path, sizes=SIZES, dtype=torch.float32):
    """A state dict that PyTorch made, of a network with live code units."""
    torch.manual_seed(0)
    model = Autoencoder(*sizes).to(dtype)
    torch.save(model.state_dict(), path)
    return model


def weights(path, which="latest"):
    return bits(convert._read(path, which)[0])


def difference(shown):
    """What the last line of a conversion says."""
    return float(re.search(r": (\S+)$", shown.strip())[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 2 epochs on the digits, its code leaky; read only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(small(folder, num_epochs=2))
    return folder


# --- What it does --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_survives_the_way_through_a_file_to_the_bit(
    trained, tmp_path, ending, capsys
):
    file = to(trained, tmp_path / f"weights{ending}")
    folder = to(file, tmp_path / "run", code_activation="leaky_relu")
    assert weights(file) == weights(folder) == weights(trained)
    images = data.load(run.open_run(trained).config.data).test.images
    np.testing.assert_array_equal(
        run.open_run(folder).reconstruct(images),
        run.open_run(trained).reconstruct(images),
    )
    first, shown, second, again = capsys.readouterr().out.splitlines()
    assert first == f"{file}: 64-16-8-3, float32, code leaky_relu"
    assert second == f"{folder}: 64-16-8-3, float32, code leaky_relu"
    for line in (shown, again):
        assert line.startswith("100 test images of digits: largest difference of a ")
        assert difference(line) < 1e-6


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_becomes_another_and_back_to_the_bit(tmp_path, ending, capsys):
    save_torch(tmp_path / "a.pt")
    there = to(tmp_path / "a.pt", tmp_path / f"b{ending}")
    back = to(there, tmp_path / "c.pt")
    assert weights(back) == weights(there) == weights(tmp_path / "a.pt")
    assert difference(capsys.readouterr().out) < 1e-6


@pytest.mark.parametrize("ending", ENDINGS)
def test_pytorch_reads_what_is_written(trained, tmp_path, ending):
    path = to(trained, tmp_path / f"a{ending}")
    tensors = (
        safetensors.torch.load_file(path)
        if ending == ".safetensors"
        else torch.load(path, weights_only=True)
    )
    model = Autoencoder(64, (16, 8), 3)
    model.load_state_dict(tensors)
    model.encoder[-1] = torch.nn.LeakyReLU()
    opened = run.open_run(trained)
    x = run.scale(data.load(opened.config.data).test.images, np.dtype("float32"))
    with torch.inference_mode():
        target = model(torch.tensor(x)).numpy()
    np.testing.assert_allclose(opened.reconstruct(x), target, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "dtype", "atol"),
    [
        (SIZES, torch.float32, 1e-6),
        ((64, (), 2), torch.float64, 1e-14),
    ],
    ids=str,
)
def test_foreign_weights_become_a_run_that_computes_the_same(
    tmp_path, sizes, dtype, atol, capsys
):
    model = save_torch(tmp_path / "a.pt", sizes, dtype)
    opened = run.open_run(to(tmp_path / "a.pt", tmp_path / "run"))
    found = opened.config
    assert (64, found.model.hidden, found.model.code_width) == sizes
    assert found.model.code_activation == "relu"
    assert f"torch.{found.train.precision}" == str(dtype)
    assert (opened.step, opened.rows) == (0, [])
    images = data.load(found.data).test.images
    x = run.scale(images, np.dtype(found.train.precision))
    with torch.inference_mode():
        target = model(torch.tensor(x)).numpy()
    recon = opened.reconstruct(images)
    assert recon.dtype == target.dtype
    np.testing.assert_allclose(recon, target, rtol=0, atol=atol)
    assert difference(capsys.readouterr().out) <= atol


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_the_activation_of_the_code_is_asked_for(tmp_path, activation, capsys):
    save_torch(tmp_path / "a.pt")
    folder = to(tmp_path / "a.pt", tmp_path / "run", code_activation=activation)
    assert run.open_run(folder).config.model.code_activation == activation
    assert difference(capsys.readouterr().out) < 1e-6


@pytest.mark.parametrize("dst", ["b.pt", "run"])
def test_the_comparison_sees_a_wrong_activation(tmp_path, dst, capsys, monkeypatch):
    monkeypatch.setitem(models.ACTIVATIONS, "none", models.ACTIVATIONS["relu"])
    save_torch(tmp_path / "a.pt", (64, (9,), 4))
    to(tmp_path / "a.pt", tmp_path / dst, code_activation="none")
    assert difference(capsys.readouterr().out) > 1e-3


def test_the_comparison_is_of_what_was_written(tmp_path, capsys, monkeypatch):
    read, write = convert.FORMATS[".pt"]

    def write_doubled(path, state_dict):
        write(path, {name: 2 * array for name, array in state_dict.items()})

    monkeypatch.setitem(convert.FORMATS, ".pt", convert.Format(read, write_doubled))
    save_torch(tmp_path / "a.pt")
    to(tmp_path / "a.pt", tmp_path / "b.pt")
    assert difference(capsys.readouterr().out) > 1e-3


def test_training_on_from_a_runs_first_weights_ends_as_that_run(tmp_path):
    sizes = ModelConfig(hidden=(16, 8))
    begun = Config(tmp_path / "begun", data=DataConfig(name="digits"), model=sizes)
    first = interop.to_torch(run.build(begun, 1437, 64).init().params)
    interop.write_safetensors(tmp_path / "a.safetensors", first)
    folder = to(tmp_path / "a.safetensors", tmp_path / "run")
    fit(config.load(folder / "config.json", Config))
    fit(begun)
    assert_same_end(folder, begun.run_dir)


def test_a_run_can_start_from_anothers_weights(trained, tmp_path):
    folder = to(trained, tmp_path / "run", data=convert.DataOptions())
    was, now = run.open_run(trained), run.open_run(folder)
    assert (was.step, now.step) == (46, 0)
    assert weights(folder) == weights(trained)
    assert set(config.diff(was.config, now.config)) == {"run_dir"}


def test_the_checkpoint_is_chosen(trained, tmp_path):
    first = to(trained, tmp_path / "a.pt", checkpoint="23")
    assert weights(first) == weights(trained, "23") != weights(trained)
    best = to(trained, tmp_path / "b.pt", checkpoint="best")
    assert weights(best) == weights(trained, "best")


def test_a_config_tells_where_its_weights_are_from(tmp_path):
    save_torch(tmp_path / "a.pt")
    folder = to(tmp_path / "a.pt", tmp_path / "new" / "run")
    description = json.loads((folder / "config.json").read_text())
    assert description["weights"] == str(tmp_path / "a.pt")


def test_an_empty_folder_may_become_the_run(tmp_path):
    save_torch(tmp_path / "a.pt")
    (tmp_path / "run").mkdir()
    assert run.open_run(to(tmp_path / "a.pt", tmp_path / "run")).step == 0


@pytest.mark.parametrize("dst", ["b.pt", "b.safetensors", "run"])
def test_weights_that_are_not_finite_are_converted_but_said(tmp_path, dst, capsys):
    model = save_torch(tmp_path / "a.pt")
    with torch.no_grad():
        model.encoder[2].bias[1] = torch.nan
        model.decoder[4].weight[3, 2] = -torch.inf
    torch.save(model.state_dict(), tmp_path / "a.pt")
    to(tmp_path / "a.pt", tmp_path / dst)
    assert weights(tmp_path / dst) == weights(tmp_path / "a.pt")
    shown = capsys.readouterr()
    assert shown.err == (
        f"warning: {tmp_path / 'a.pt'}: NaN or infinity in encoder.2.bias, "
        "decoder.4.weight; converted all the same\n"
    )
    assert shown.out.endswith("; 100% of the pixels are NaN in both\n")


def test_a_difference_in_nan_is_a_difference(tmp_path, monkeypatch, capsys):
    save_torch(tmp_path / "a.pt")
    monkeypatch.setattr(
        convert, "_reconstruct_in_torch", lambda *args: np.full((100, 64), np.nan)
    )
    to(tmp_path / "a.pt", tmp_path / "b.pt")
    assert np.isnan(difference(capsys.readouterr().out))


# --- What it does without ------------------------------------------------------------


@pytest.fixture
def no_torch(monkeypatch):
    """As where PyTorch is not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "experiments.pytorch_baseline")


@pytest.mark.usefixtures("no_torch")
def test_without_pytorch_run_folders_and_safetensors_are_still_converted(
    trained, tmp_path, capsys
):
    file = to(trained, tmp_path / "a.safetensors")
    folder = to(file, tmp_path / "run", code_activation="leaky_relu")
    assert weights(folder) == weights(trained)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("largest difference of a pixel, before and after: 0")


@pytest.mark.usefixtures("no_torch")
def test_without_pytorch_its_files_are_refused_with_the_remedy(trained, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"")
    for src, dst in ((trained, "b.pt"), (tmp_path / "a.pt", "b.safetensors")):
        with pytest.raises(UserError, match=r"^PyTorch is not installed; .*'\.\[torch"):
            to(src, tmp_path / dst)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_file_needs_no_data_set(trained, tmp_path, monkeypatch, capsys):
    def refuse(settings):
        raise UserError("digits cannot be fetched")

    monkeypatch.setattr(data, "load", refuse)
    to(trained, tmp_path / "a.pt")
    shown = capsys.readouterr()
    assert shown.err == "no test images: digits cannot be fetched\n"
    assert "100 images of noise: largest difference" in shown.out
    assert difference(shown.out) < 1e-6
    with pytest.raises(UserError, match="cannot be fetched"):
        to(tmp_path / "a.pt", tmp_path / "run")
    assert os.listdir(tmp_path) == ["a.pt"]


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
    with pytest.raises(UserError, match=r"a\.pt: refused: .*as torch\.save\(model\.st"):
        to(path, tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_the_forbidden_name_is_told(tmp_path):
    torch.save({"a": Trap(tmp_path)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"it holds \w+\.mkdir, no tensor"):
        to(tmp_path / "a.pt", tmp_path / "b.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Autoencoder(*SIZES), r"it holds experiments\.pytorch_baseline\.Autoencoder"),
        ([torch.zeros(2)], "it holds a list"),
        ({"state_dict": {"a": torch.zeros(2)}}, "state_dict is a dict"),
        ({0: torch.zeros(2)}, "0 is a Tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "a is of torch.float32, torch.sparse_coo"),
        ({"a": torch.zeros(2, device="meta")}, "torch.strided, on meta"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, "a is of torch.bfloat16"),
        ({"a": torch.zeros(2)}, r"not the state dict of a dense .* it holds a \[2\]"),
    ],
)
def test_what_is_not_a_state_dict_of_ours_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message) as caught:
        to(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_a_truncated_file_is_refused(tmp_path, ending, cut):
    path = tmp_path / f"a{ending}"
    convert.FORMATS[ending].write(path, noise(interop.shapes_of(SIZES)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="damaged, or no"):
        to(path, tmp_path / "run")
    assert os.listdir(tmp_path) == [path.name]


def test_half_precision_is_refused_with_the_remedy(tmp_path):
    save_torch(tmp_path / "a.pt", dtype=torch.float16)
    with pytest.raises(UserError, match=r" is float16; .* as model\.float\(\)"):
        to(tmp_path / "a.pt", tmp_path / "b.safetensors")


@pytest.mark.parametrize("dst", ["b.pt", "b.safetensors", "run"])
def test_another_architecture_is_told_tensor_by_tensor(tmp_path, dst):
    model = Autoencoder(*SIZES)
    model.encoder[0] = torch.nn.Linear(64, 11)
    model.extra = torch.nn.Linear(2, 1, bias=False)
    state_dict = model.state_dict()
    del state_dict["decoder.2.weight"]
    torch.save(state_dict, tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        to(tmp_path / "a.pt", tmp_path / dst)
    assert "\n" not in (told := str(caught.value))
    for fault in (
        "decoder.2.weight [10, 6] is missing",
        "extra.weight [1, 2] is extra",
        "encoder.0.weight is [11, 64], must be [10, 64]",
    ):
        assert fault in told
    assert os.listdir(tmp_path) == ["a.pt"]


def test_data_of_another_size_are_refused(tmp_path):
    save_torch(tmp_path / "a.pt", (63, (5,), 2))
    with pytest.raises(UserError, match="for 63 pixels, digits has 64; choose another"):
        to(tmp_path / "a.pt", tmp_path / "run")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_model_without_a_counterpart_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "twin", models.Autoencoder)
    folder = tmp_path / "run"
    settings = small(folder, num_epochs=1)
    twin = dataclasses.replace(settings.model, name="twin")
    fit(dataclasses.replace(settings, model=twin))
    with pytest.raises(UserError, match="a run of the model twin; only those of"):
        to(folder, tmp_path / "a.pt")


def test_a_run_without_a_checkpoint_is_refused(trained, tmp_path):
    (tmp_path / "run").mkdir()
    description = (trained / "config.json").read_text()
    (tmp_path / "run" / "config.json").write_text(description)
    with pytest.raises(UserError, match="no checkpoint; give"):
        to(tmp_path / "run", tmp_path / "a.pt")
    with pytest.raises(UserError, match="no checkpoint of step 7; choose"):
        to(trained, tmp_path / "a.pt", checkpoint="7")


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        ("nowhere.pt", "b.pt", "nowhere.pt: not there; check the path"),
        ("a.onnx", "b.pt", "a.onnx: unknown ending; SRC must be a run folder, or a"),
        ("empty", "b.pt", "empty: not a run folder"),
        ("a.pt", "b.onnx", "b.onnx: unknown ending; DST must be a run folder, or a"),
        ("a.pt", "a.pt", "a.pt: exists already; delete it, or choose another DST"),
        ("a.pt", "full", "full: exists already"),
        ("a.pt", "file", "file: exists already"),
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
    for name in ("a.onnx", "file", "full/thesis.tex"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine")
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
    monkeypatch.setattr("ae_jax.records.os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        to(tmp_path / "a.pt", tmp_path / dst)
    assert os.listdir(tmp_path) == ["a.pt"]


# --- As typed ------------------------------------------------------------------------


def test_the_commands_go_around_the_circle(trained, tmp_path):
    file, folder = tmp_path / "a.pt", tmp_path / "run"
    leaky = ["--model.code-activation", "leaky_relu", "--data.name", "digits"]
    for args in ([trained, file], [file, folder, *leaky]):
        done = command("scripts/convert.py", *args)
        assert (done.returncode, done.stderr) == (0, "")
        assert difference(done.stdout) < 1e-6
    scores = json.loads(command("scripts/evaluate.py", folder, "--json").stdout)
    opened = run.open_run(trained)
    dataset = data.load(opened.config.data)
    expected = run.score(opened, dataset.test, "test", dataset.shape)
    assert {name: scores[name] for name in expected} == expected


def test_a_refusal_is_one_line_and_status_2(tmp_path):
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "a.pt")
    done = command("scripts/convert.py", tmp_path / "a.pt", tmp_path / "b.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'a.pt'}: refused: it holds ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["a.pt"]
