"""Weights cross to PyTorch and back without losing a bit, and strangers are named."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from ae_jax import interop
from ae_jax.config import UserError
from ae_jax.models import Autoencoder
from experiments import pytorch_baseline

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


def tree_bits(params):
    return {name: bits(layer) for name, layer in params.items()}


# --- Layouts -------------------------------------------------------------------------


@given(sizes, precisions, st.integers(0, 2**32))
def test_there_and_back_is_the_identity_to_the_bit(sizes, dtype, seed):
    state_dict = noise(interop.shapes_of(sizes), dtype, seed)
    params = interop.to_linen(state_dict)
    assert bits(interop.to_torch(params)) == bits(state_dict)
    again = interop.to_linen(interop.to_torch(params))
    assert tree_bits(again) == tree_bits(params)


def shaped(sizes):
    """The sizes as the Linen model takes them."""
    num_pixels, *rest = sizes
    return (num_pixels,), *rest


@given(sizes)
@settings(max_examples=20, deadline=None)
def test_names_shapes_and_order_are_those_of_pytorch(sizes):
    theirs = pytorch_baseline.Autoencoder(*sizes).state_dict()
    ours = interop.shapes_of(sizes)
    assert list(ours.items()) == [(n, tuple(t.shape)) for n, t in theirs.items()]
    params = interop.to_linen(noise(ours))
    shuffled = dict(sorted(params.items()))  # as JAX gives its trees back
    assert list(interop.to_torch(shuffled)) == list(ours)


@pytest.mark.parametrize("sizes", [TUTORIAL, SMALL, (3, (), 4)], ids=str)
def test_the_tree_is_that_of_the_linen_model(sizes):
    x = jnp.zeros((1, sizes[0]))
    init = jax.eval_shape(Autoencoder(*shaped(sizes)).init, jax.random.key(0), x)
    expected = jax.tree.map(lambda leaf: leaf.shape, init["params"])
    params = interop.to_linen(noise(interop.shapes_of(sizes)))
    assert jax.tree.map(np.shape, params) == expected


@pytest.mark.parametrize("sizes", [TUTORIAL, SMALL, (9, (), 4)], ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float64", 1e-12)])
def test_both_sides_compute_the_same(sizes, dtype, atol):
    jax.config.update("jax_enable_x64", dtype == "float64")
    torch.manual_seed(0)
    theirs = pytorch_baseline.Autoencoder(*sizes).to(getattr(torch, dtype))
    state_dict = {n: t.numpy() for n, t in theirs.state_dict().items()}
    params = interop.to_linen(state_dict)
    formats = {"dtype": np.dtype(dtype), "param_dtype": np.dtype(dtype)}
    ours = jax.jit(Autoencoder(*shaped(sizes), **formats).apply)
    x = np.random.default_rng(0).random((20, sizes[0])).astype(dtype)
    with torch.inference_mode():
        target = theirs(torch.tensor(x)).numpy()
    recon = ours({"params": params}, jnp.asarray(x))
    assert recon.dtype == target.dtype == dtype
    np.testing.assert_allclose(recon, target, rtol=0, atol=atol)


def test_what_is_converted_is_a_copy():
    params = interop.to_linen(noise(interop.shapes_of(SMALL)))
    state_dict = interop.to_torch(params)
    before = tree_bits(params)
    for array in state_dict.values():
        assert array.flags.c_contiguous
        array[...] = 0
    assert tree_bits(params) == before


@pytest.mark.parametrize(
    "params",
    [
        {"conv_0": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}},
        {"encoder_0": {"scale": np.zeros(2), "bias": np.zeros(2)}},
    ],
    ids=["name", "leaves"],
)
def test_a_layer_that_is_not_dense_is_refused(params):
    with pytest.raises(UserError, match=r"^(conv|encoder)_0: not a layer of"):
        interop.to_torch(params)


def test_a_tensor_that_is_not_ours_is_refused():
    with pytest.raises(UserError, match=r"^encoder\.1\.weight: not a tensor of"):
        interop.to_linen({"encoder.1.weight": np.zeros((2, 2))})


# --- Which network is it? ------------------------------------------------------------


@given(sizes)
def test_the_shapes_tell_the_sizes(sizes):
    state_dict = noise(interop.shapes_of(sizes))
    assert interop.infer_sizes(state_dict) == sizes
    interop.check_matches(state_dict, interop.shapes_of(sizes))


@given(sizes, st.data())
def test_a_missing_tensor_is_named_with_its_shape(sizes, draw):
    expected = interop.shapes_of(sizes)
    state_dict = noise(expected)
    name = draw.draw(st.sampled_from(list(expected)))
    del state_dict[name]
    assert interop.infer_sizes(state_dict) == sizes
    with pytest.raises(UserError) as caught:
        interop.check_matches(state_dict, expected, "a.pt")
    fault = f"{name} {list(expected[name])} is missing"
    assert str(caught.value) == f"a.pt: not a dense autoencoder's: {fault}"


@given(sizes, st.data())
def test_a_misshapen_tensor_is_named_with_both_shapes(sizes, draw):
    expected = interop.shapes_of(sizes)
    state_dict = noise(expected)
    name = draw.draw(st.sampled_from(list(expected)))
    shape = tuple(width + 1 for width in expected[name])
    state_dict[name] = np.zeros(shape, np.float32)
    assert interop.infer_sizes(state_dict) == sizes
    with pytest.raises(UserError) as caught:
        interop.check_matches(state_dict, expected, "a.pt")
    fault = f"{name} is {list(shape)}, must be {list(expected[name])}"
    assert str(caught.value) == f"a.pt: not a dense autoencoder's: {fault}"


def test_every_fault_is_listed_in_one_line():
    expected = interop.shapes_of(SMALL)
    state_dict = noise(expected)
    del state_dict["encoder.0.bias"], state_dict["decoder.4.weight"]
    state_dict |= noise({"classifier.weight": (10, 2), "encoder.2.bias": (9,)})
    with pytest.raises(UserError) as caught:
        interop.check_matches(state_dict, expected)
    assert str(caught.value) == (
        "state dict: not a dense autoencoder's: encoder.0.bias [5] is missing; "
        "decoder.4.weight [6, 5] is missing; classifier.weight [10, 2] is extra; "
        "encoder.2.bias is [9], must be [4]"
    )


def test_a_tensor_far_from_the_others_is_extra_and_does_not_deepen_the_network():
    state_dict = noise({**interop.shapes_of(SMALL), "encoder.40.weight": (3, 4)})
    assert interop.infer_sizes(state_dict) == SMALL
    with pytest.raises(UserError, match=r"'s: encoder\.40\.weight \[3, 4\] is extra$"):
        interop.check_matches(state_dict, interop.shapes_of(SMALL))


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"fc.weight": (3, 4), "fc.bias": (3,)},
        {"module.encoder.0.weight": (3, 4)},
        {"encoder.0.weight": (3,), "encoder.0.bias": ()},  # nothing tells the pixels
        {"encoder.0.weight": (0, 4), "decoder.0.weight": (4, 0)},
        {"encoder.99998.weight": (3, 4)},
        {f"encoder.{'9' * 5000}8.weight": (3, 4)},
    ],
    ids=["none", "other", "prefix", "axes", "empty", "far", "huge"],
)
def test_another_network_is_refused_with_what_it_holds(shapes):
    with pytest.raises(UserError, match=r"^a\.pt: not the state dict of a") as caught:
        interop.infer_sizes(noise(shapes), "a.pt")
    for name, shape in shapes.items():
        assert f"{name} {list(shape)}" in str(caught.value)


@given(sizes, precisions)
def test_the_number_format_is_that_of_the_tensors(sizes, dtype):
    assert interop.precision_of(noise(interop.shapes_of(sizes), dtype)) == dtype


@pytest.mark.parametrize("others", ["float16", "int64", "complex64", "float64"])
def test_a_format_that_no_run_has_or_two_at_once_are_refused(others):
    state_dict = noise(interop.shapes_of(SMALL))
    state_dict["decoder.2.bias"] = np.zeros(5, others)
    with pytest.raises(UserError, match=rf"decoder\.2\.bias is {others}; all must be"):
        interop.precision_of(state_dict, "a.pt")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensors_that_are_not_finite_are_named(value):
    state_dict = {n: np.ones(s) for n, s in interop.shapes_of(SMALL).items()}
    assert interop.not_finite(state_dict) == []
    state_dict["encoder.4.weight"][1, 2] = state_dict["decoder.0.bias"][0] = value
    assert interop.not_finite(state_dict) == ["encoder.4.weight", "decoder.0.bias"]


# --- Safetensors ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_safetensors_file_keeps_every_bit(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    state_dict = noise(interop.shapes_of(TUTORIAL), dtype)
    interop.write_safetensors(path, state_dict)
    assert bits(interop.read_safetensors(path)) == bits(state_dict)
    theirs = safetensors.torch.load_file(path)
    assert bits({n: t.numpy() for n, t in theirs.items()}) == bits(state_dict)


def test_a_transposed_view_is_written_as_it_looks(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    interop.write_safetensors(tmp_path / "a.safetensors", {"a": array.T})
    read = interop.read_safetensors(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read["a"], array.T)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    interop.write_safetensors(path, noise(interop.shapes_of(SMALL)))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"a\.safetensors: damaged, or not a safe"):
        interop.read_safetensors(path)


def test_a_number_format_unknown_to_numpy_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(UserError, match="tensors of format 'BF16'"):
        interop.read_safetensors(path)


def test_neither_jax_nor_pytorch_is_loaded():
    code = "import sys, ae_jax.interop; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
    assert not set(loaded.split()) & {"jax", "torch", "safetensors.torch"}
