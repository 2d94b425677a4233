"""Weights in PyTorch's layout and in Linen's, and the file that carries either.

The dense autoencoder is in PyTorch two ``nn.Sequential`` of ``nn.Linear``, with an
activation after each; that makes the state dict, and so the safetensors file::

    encoder_0/kernel [784, 128]    encoder.0.weight [128, 784]    the transpose
    encoder_0/bias   [128]         encoder.0.bias   [128]
    encoder_1/kernel [128, 64]     encoder.2.weight [64, 128]     1 is an activation
    decoder_0/kernel [3, 12]       decoder.0.weight [12, 3]

Nothing is computed, so both directions are exact to the bit. NumPy alone: neither JAX
nor PyTorch is imported.
"""

import io
import itertools
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ae_jax.errors import UserError
from ae_jax.files import read_bytes, write_file

StateDict = dict[str, np.ndarray]
"""PyTorch's names and layout: a weight is [out, in], a bias [out]."""

LinenTree = dict[str, dict[str, np.ndarray]]
"""Linen's: ``encoder_0`` and so on, each a kernel [in, out] and a bias [out]."""

Sizes = tuple[int, tuple[int, ...], int]
"""Of an autoencoder: (num_pixels, hidden, latent_dim)."""

Precision = Literal["float32", "float64"]
"""Number formats of weights that PyTorch and a run can have alike."""

ONE_FORMAT = (
    "all must be float32 or all float64, as model.float() and model.double() make them"
)
ENDINGS = (".safetensors", ".pt", ".pth", ".pth.tar", ".bin")
"""Of files of weights, in whatever case; the first is read without PyTorch."""


def to_torch(params: Mapping[str, Mapping[str, Any]]) -> StateDict:
    """A Linen tree of parameters as PyTorch's state dict, in PyTorch's order.

    Args:
        params: ``{"encoder_0": {"kernel": [in, out], "bias": [out]}, …}`` of NumPy or
            JAX arrays; copied.

    Raises:
        UserError: a layer is not one of the dense autoencoder's.

    Source:
        PyTorch ``nn.Linear`` computes ``x @ weight.T + bias``, Linen ``nn.Dense``
        ``x @ kernel + bias``; ``nn.Sequential`` counts the activations too.
    """
    layers = {}
    for name, layer in params.items():
        match = re.fullmatch(r"(encoder|decoder)_([0-9]+)", name)
        if (
            match is None
            or set(layer) != {"kernel", "bias"}
            or np.ndim(layer["kernel"]) != 2
        ):
            raise UserError(f"{name}: not a layer of the dense autoencoder")
        layers[match[1] == "decoder", int(match[2])] = layer
    state_dict = {}
    for (is_decoder, i), layer in sorted(layers.items(), key=lambda item: item[0]):
        name = f"{'decoder' if is_decoder else 'encoder'}.{2 * i}"
        state_dict[f"{name}.weight"] = np.array(
            np.asarray(layer["kernel"]).T, order="C"
        )
        state_dict[f"{name}.bias"] = np.array(layer["bias"])
    return state_dict


def to_linen(state_dict: Mapping[str, np.ndarray]) -> LinenTree:
    """PyTorch's state dict as a Linen tree of parameters: :func:`to_torch` undone.

    Raises:
        UserError: a name is not one of the dense autoencoder's.
    """
    params: LinenTree = {}
    for name, array in state_dict.items():
        match = re.fullmatch(r"(encoder|decoder)\.([0-9]{0,5}[02468])\.(\w+)", name)
        if match is None or match[3] not in ("weight", "bias"):
            raise UserError(f"{name}: not a tensor of the dense autoencoder")
        layer = params.setdefault(f"{match[1]}_{int(match[2]) // 2}", {})
        leaf = "kernel" if match[3] == "weight" else "bias"
        layer[leaf] = np.array(array.T, order="C")
    return params


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The state dict of a dense autoencoder of these sizes, as shapes.

    Example:
        >>> shapes_of((4, (), 1))["decoder.0.weight"]
        (4, 1)
    """
    num_pixels, hidden, latent_dim = sizes
    widths = (num_pixels, *hidden, latent_dim)
    shapes: dict[str, tuple[int, ...]] = {}
    for part, chain in (("encoder", widths), ("decoder", widths[::-1])):
        for i, (fan_in, width) in enumerate(itertools.pairwise(chain)):
            shapes[f"{part}.{2 * i}.weight"] = (width, fan_in)
            shapes[f"{part}.{2 * i}.bias"] = (width,)
    return shapes


def infer_sizes(
    state_dict: Mapping[str, np.ndarray], where: str = "state dict"
) -> Sizes:
    """The sizes of the dense autoencoder that a state dict belongs to.

    They are those of the encoder's tensors, in order; the rest must fit.

    Args:
        state_dict: PyTorch's, not yet known to be whole, or to be of an autoencoder.
        where: what to call it in an error, most often the file's name.

    Raises:
        UserError: naming every tensor that does not fit, or, if the encoder does not
            even begin, all that there are.
    """
    first = state_dict.get("encoder.0.weight", np.zeros(()))
    if first.ndim != 2 or 0 in first.shape:
        holds = ", ".join(f"{name} {list(a.shape)}" for name, a in state_dict.items())
        raise UserError(
            f"{where}: not the state dict of a dense autoencoder, which begins with "
            f"encoder.0.weight [out, in]; it holds {holds or 'nothing'}"
        )
    widths = [first.shape[1]]
    for i in itertools.count(step=2):
        layer = [state_dict.get(f"encoder.{i}.{leaf}") for leaf in ("weight", "bias")]
        known = [array.shape[0] for array in layer if array is not None and array.ndim]
        if not known:
            break
        widths.append(known[0])
    sizes = widths[0], tuple(widths[1:-1]), widths[-1]
    check_matches(state_dict, shapes_of(sizes), where)
    return sizes


def check_matches(
    state_dict: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    where: str = "state dict",
) -> None:
    """Refuse a state dict that is not just the expected tensors.

    Args:
        state_dict: PyTorch's.
        expected: names and shapes, as :func:`shapes_of` gives them.
        where: what to call it in an error, most often the file's name.

    Raises:
        UserError: every missing, extra and misshapen tensor, by name with its shapes.
    """
    shapes = {name: array.shape for name, array in state_dict.items()}
    faults = [
        *(f"{n} {list(s)} is missing" for n, s in expected.items() if n not in shapes),
        *(f"{n} {list(s)} is extra" for n, s in shapes.items() if n not in expected),
        *(
            f"{name} is {list(shapes[name])}, must be {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ),
    ]
    if faults:
        raise UserError(f"{where}: not a dense autoencoder's: {'; '.join(faults)}")


def precision_of(
    state_dict: Mapping[str, np.ndarray], where: str = "state dict"
) -> Precision:
    """The one number format of all tensors.

    Raises:
        UserError: there are several, or one that no run has; names a tensor of each.
    """
    examples = {array.dtype.name: name for name, array in state_dict.items()}
    for precision in get_args(Precision):
        if set(examples) == {precision}:
            only: Precision = precision
            return only
    shown = ", ".join(f"{name} is {dtype}" for dtype, name in examples.items())
    raise UserError(f"{where}: {shown}; {ONE_FORMAT}")


def read_safetensors(path: Path) -> StateDict:
    """The tensors of a safetensors file.

    Raises:
        UserError: the file is damaged or none, or holds a number format unknown to
            NumPy.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(read_bytes(path))
    except SafetensorError as error:
        raise UserError(
            f"{path}: damaged, or not a safetensors file ({error}); get it again"
        ) from error
    except KeyError as error:  # safetensors' table of NumPy's formats
        raise UserError(
            f"{path}: holds tensors of format {error}; {ONE_FORMAT}"
        ) from error


def write_safetensors(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write tensors as a safetensors file, whole or not at all."""
    from safetensors.numpy import save

    # safetensors copies memory as it lies, whatever the strides say.
    blob = save({name: np.ascontiguousarray(a) for name, a in state_dict.items()})
    write_file(path, lambda file: file.write(blob))


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a file with PyTorch's names: ``.safetensors``, or PyTorch's own.

    A state dict within a checkpoint is taken if it is the only one there, and a prefix
    that all names share (``module.``) is taken off; both are reported.

    Raises:
        UserError: the file is damaged or none, holds several state dicts, or PyTorch,
            which alone reads its own format, is not installed.
        OSError: it cannot be read.
    """
    if path.name.lower().endswith(".safetensors"):
        return _without_prefix(read_safetensors(path), path)
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: only PyTorch can read it; pip install '.[torch]', or give a "
            ".safetensors file"
        ) from error
    blob = io.BytesIO(read_bytes(path))  # so that no error below is the disk's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what it then refuses
            loaded = torch.load(blob, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile and torch each raise their own
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path}: not a PyTorch state dict ({reason}); write one by "
            "torch.save(model.state_dict(), PATH)"
        ) from error
    arrays = {}
    for name, tensor in _only_state_dict(loaded, path).items():
        try:
            arrays[name] = tensor.detach().numpy()
        except TypeError as error:  # bfloat16, sparse and others that NumPy lacks
            raise UserError(
                f"{path}: {name} is {tensor.dtype}, {tensor.layout}; {ONE_FORMAT}"
            ) from error
    return _without_prefix(arrays, path)


def _only_state_dict(loaded: Any, path: Path) -> dict[str, Any]:
    """The one dict of tensors that was saved, or that is in the dict that was.

    Raises:
        UserError: there is none, or more than one; names them.
    """

    def is_state_dict(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and bool(value)
            and all(hasattr(tensor, "detach") for tensor in value.values())
        )

    if is_state_dict(loaded):
        return {str(name): tensor for name, tensor in loaded.items()}
    holds = loaded if isinstance(loaded, dict) else {}
    found = {key: value for key, value in holds.items() if is_state_dict(value)}
    if len(found) != 1:
        names = ", ".join(map(str, found or holds)) or type(loaded).__name__
        raise UserError(
            f"{path}: not a PyTorch state dict: it holds {names}; save the one to take "
            "alone, by torch.save(loaded[KEY], PATH)"
        )
    ((key, tensors),) = found.items()
    print(f"{path}: {key} is taken, of {', '.join(map(str, holds))}", file=sys.stderr)
    return {str(name): tensor for name, tensor in tensors.items()}


def _without_prefix(state_dict: StateDict, path: Path) -> StateDict:
    """A state dict whose names begin with the autoencoder's own parts."""
    prefix = min(state_dict, default="").partition("decoder.")[0]
    if not prefix or not all(
        name.startswith((f"{prefix}encoder.", f"{prefix}decoder."))
        for name in state_dict
    ):
        return state_dict
    print(f"{path}: names without their prefix {prefix}", file=sys.stderr)
    return {name.removeprefix(prefix): a for name, a in state_dict.items()}
