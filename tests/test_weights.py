"""Weights cross to PyTorch and back without losing a bit, and strangers are named."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ae_jax import weights
from ae_jax.errors import UserError
from experiments.pytorch_baseline import Autoencoder

TUTORIAL = (784, (128, 64, 12), 3)
SMALL = (6, (5, 4), 2)

sizes = st.tuples(
    st.integers(1, 7),
    st.lists(st.integers(1, 7), max_size=12).map(tuple),  # encoder_10 comes before _2
    st.integers(1, 7),
)
precisions = st.sampled_from(["float32", "float64"])


def noise(shapes, dtype="float32", seed=0):
    """Arrays of any bits at all: NaNs of every payload, infinities, negative zeros."""
    rng, item = np.random.default_rng(seed), np.dtype(dtype).itemsize
    return {
        name: np.frombuffer(rng.bytes(item * int(np.prod(shape))), dtype).reshape(shape)
        for name, shape in shapes.items()
    }


def bits(state_dict):
    return {n: (a.dtype, a.shape, a.tobytes()) for n, a in state_dict.items()}


@given(sizes, precisions, st.integers(0, 2**32))
def test_there_and_back_is_the_identity_to_the_bit(sizes, dtype, seed):
    state_dict = noise(weights.shapes_of(sizes), dtype, seed)
    params = weights.to_linen(state_dict)
    shuffled = dict(sorted(params.items()))  # as JAX gives its trees back
    back = weights.to_torch(shuffled)
    assert list(back) == list(state_dict)
    assert bits(back) == bits(state_dict)
    assert weights.infer_sizes(state_dict) == sizes
    assert weights.precision_of(state_dict) == dtype


@given(sizes)
@settings(max_examples=20, deadline=None)
def test_names_shapes_and_order_are_those_of_pytorch(sizes):
    theirs = Autoencoder(*sizes).state_dict()
    ours = weights.shapes_of(sizes)
    assert list(ours.items()) == [(n, tuple(t.shape)) for n, t in theirs.items()]


def test_what_is_converted_is_a_copy():
    params = weights.to_linen(noise(weights.shapes_of(SMALL)))
    before = {name: bits(layer) for name, layer in params.items()}
    for array in weights.to_torch(params).values():
        assert array.flags.c_contiguous
        array[...] = 0
    assert {name: bits(layer) for name, layer in params.items()} == before


@pytest.mark.parametrize(
    ("convert", "tree"),
    [
        (weights.to_torch, {"conv_0": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}),
        (weights.to_torch, {"encoder_0": {"scale": np.ones(2), "bias": np.ones(2)}}),
        (weights.to_linen, {"encoder.1.weight": np.ones((2, 2))}),
        (weights.to_linen, {"encoder.0.scale": np.ones(2)}),
        (weights.to_linen, {f"encoder.{'9' * 5000}8.weight": np.ones(2)}),
    ],
)
def test_what_is_not_the_dense_autoencoders_is_refused_by_name(convert, tree):
    (name,) = tree
    with pytest.raises(UserError, match=rf"^{name}: not a (layer|tensor) of the dense"):
        convert(tree)


# --- Which network is it? ------------------------------------------------------------


@given(sizes, st.data())
def test_a_tensor_that_is_missing_or_misshapen_is_named_with_its_shapes(sizes, draw):
    expected = weights.shapes_of(sizes)
    name = draw.draw(st.sampled_from([n for n in expected if n != "encoder.0.weight"]))
    state_dict = noise(expected)
    was = list(state_dict.pop(name).shape)
    with pytest.raises(UserError) as missing:
        weights.infer_sizes(state_dict, "a.pt")
    fault = f"a.pt: not a dense autoencoder's: {name} {was} is missing"
    assert str(missing.value) == fault
    state_dict[name] = np.zeros([width + 1 for width in was], np.float32)
    with pytest.raises(UserError, match=r"^a\.pt: not a dense autoencoder's: "):
        weights.infer_sizes(state_dict, "a.pt")
    with pytest.raises(UserError) as misshapen:
        weights.check_matches(state_dict, expected)
    shape = list(state_dict[name].shape)
    fault = f"state dict: not a dense autoencoder's: {name} is {shape}, must be {was}"
    assert str(misshapen.value) == fault


def test_every_fault_is_listed_in_one_line():
    state_dict = noise(weights.shapes_of(SMALL))
    del state_dict["encoder.0.bias"], state_dict["decoder.4.weight"]
    state_dict |= noise({"classifier.weight": (10, 2), "encoder.40.bias": (3,)})
    state_dict |= noise({"encoder.2.bias": (9,)})
    with pytest.raises(UserError) as caught:
        weights.infer_sizes(state_dict)
    assert str(caught.value) == (
        "state dict: not a dense autoencoder's: encoder.0.bias [5] is missing; "
        "decoder.4.weight [6, 5] is missing; classifier.weight [10, 2] is extra; "
        "encoder.40.bias [3] is extra; encoder.2.bias is [9], must be [4]"
    )


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"fc.weight": (3, 4), "fc.bias": (3,)},
        {"module.encoder.0.weight": (3, 4)},
        {"encoder.0.weight": (3,), "encoder.0.bias": ()},  # nothing tells the pixels
        {"encoder.0.weight": (0, 4), "decoder.0.weight": (4, 0)},
    ],
    ids=["none", "other", "prefix", "axes", "empty"],
)
def test_another_network_is_refused_with_what_it_holds(shapes):
    with pytest.raises(UserError, match=r"^a\.pt: not the state dict of a") as caught:
        weights.infer_sizes(noise(shapes), "a.pt")
    for name, shape in shapes.items():
        assert f"{name} {list(shape)}" in str(caught.value)


@pytest.mark.parametrize("other", ["float16", "int64", "float64"])
def test_a_format_that_no_run_has_or_two_at_once_are_refused(other):
    state_dict = noise(weights.shapes_of(SMALL))
    state_dict["decoder.2.bias"] = np.zeros(5, other)
    with pytest.raises(UserError, match=rf"decoder\.2\.bias is {other}; all must be"):
        weights.precision_of(state_dict, "a.pt")
    if other != "float64":
        with pytest.raises(UserError, match=rf"a\.pt: b is {other}; all must be"):
            weights.precision_of({"b": np.zeros(1, other)}, "a.pt")


# --- Safetensors ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_safetensors_file_keeps_every_bit(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    state_dict = noise(weights.shapes_of(TUTORIAL), dtype)
    state_dict["decoder.0.weight"] = state_dict["decoder.0.weight"].T.copy().T  # a view
    weights.write_safetensors(path, state_dict)
    assert bits(weights.read_safetensors(path)) == bits(state_dict)
    theirs = safetensors.torch.load_file(path)
    assert bits({n: t.numpy() for n, t in theirs.items()}) == bits(state_dict)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    weights.write_safetensors(path, noise(weights.shapes_of(SMALL)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.safetensors: damaged, or not a safe"):
        weights.read_safetensors(path)


def test_a_number_format_unknown_to_numpy_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(UserError, match="tensors of format 'BF16'"):
        weights.read_safetensors(path)


# --- PyTorch's own files -------------------------------------------------------------


class Trap:
    """Unpickled freely, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [None, 0, 2, 4], ids=str)
def test_code_in_a_pickle_is_refused_and_never_runs(tmp_path, protocol):
    path = tmp_path / "a.pt"
    state_dict = {"encoder.0.weight": Trap(tmp_path / "sprung")}
    if protocol is None:
        torch.save(state_dict, path)
    else:
        path.write_bytes(pickle.dumps(state_dict, protocol))
    with pytest.raises(UserError, match=r"a\.pt: not a PyTorch state dict") as caught:
        weights.read_state_dict(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize(
    "content",
    [
        Autoencoder(*SMALL),
        [torch.zeros(2)],
        {},
    ],
    ids=lambda content: type(content).__name__,
)
def test_what_is_not_a_state_dict_is_refused_in_one_line(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: not a PyTorch state dict") as caught:
        weights.read_state_dict(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


STATE = {"encoder.0.weight": torch.ones(2, 3), "decoder.0.bias": torch.zeros(3)}
OTHER = {"a": torch.zeros(2)}


@pytest.mark.parametrize("name", ["a.pt", "a.pth.tar", "a.BIN", "a.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "model_state_dict"])
def test_a_state_dict_is_found_where_there_is_one_and_what_was_done_is_said(
    tmp_path, capsys, name, prefix, key
):
    path, saved = tmp_path / name, {prefix + n: t for n, t in STATE.items()}
    if name.endswith(".safetensors"):
        weights.write_safetensors(path, {n: t.numpy() for n, t in saved.items()})
        key = None
    else:
        torch.save({"epoch": 3, key: saved, "optimizer": {}} if key else saved, path)
    found = weights.read_state_dict(path)
    assert bits(found) == bits({n: t.numpy() for n, t in STATE.items()})
    taken = f"{path}: {key} is taken, of epoch, {key}, optimizer\n" if key else ""
    without = f"{path}: names without their prefix {prefix}\n" if prefix else ""
    assert capsys.readouterr().err == taken + without


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"g": STATE, "d": OTHER}, "it holds g, d; save the one to take alone"),
        ({"epoch": 3, "loss": 0.5}, "it holds epoch, loss; save the one"),
        (
            {"a": torch.zeros(2).to_sparse()},
            "a is torch.float32, torch.sparse_coo; all",
        ),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, "a is torch.bfloat16, .*float32"),
    ],
)
def test_what_is_ambiguous_or_has_no_counterpart_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        weights.read_state_dict(tmp_path / "a.pt")


def test_another_nets_parameters_are_not_laid_out_as_this_ones():
    kernels = {"encoder_0": {"kernel": np.zeros((3, 3, 1, 4)), "bias": np.zeros(4)}}
    with pytest.raises(UserError, match="encoder_0: not a layer of the dense"):
        weights.to_torch(kernels)


@pytest.mark.parametrize("cut", [0, 1000, -1])
def test_a_truncated_state_dict_is_refused(tmp_path, cut):
    path = tmp_path / "a.pt"
    torch.save(Autoencoder(*SMALL).state_dict(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.pt: not a PyTorch state dict"):
        weights.read_state_dict(path)


def test_neither_jax_nor_pytorch_is_loaded():
    code = "import sys, ae_jax.weights; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert not set(loaded.split()) & {"jax", "torch", "safetensors.torch"}
