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

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ae_jax.config import UserError
from ae_jax.records import write_file

StateDict = dict[str, np.ndarray]
"""PyTorch's names and layout: a weight is [out, in], a bias [out]."""

LinenTree = dict[str, dict[str, np.ndarray]]
"""Linen's: ``encoder_0`` and so on, each a kernel [in, out] and a bias [out]."""

Sizes = tuple[int, tuple[int, ...], int]
"""Of an autoencoder: (num_pixels, hidden, code_width)."""

Precision = Literal["float32", "float64"]
"""Number formats that a run can have, and that are therefore converted."""

_LINEN_LAYER = re.compile(r"(encoder|decoder)_([0-9]+)")
_TORCH_NAME = re.compile(r"(encoder|decoder)\.([0-9]{0,5}[02468])\.(weight|bias)")


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
        match = _LINEN_LAYER.fullmatch(name)
        if match is None or set(layer) != {"kernel", "bias"}:
            raise UserError(f"{name}: not a layer of the dense autoencoder")
        layers[match[1], int(match[2])] = layer
    state_dict = {}
    for part, i in sorted(layers, key=lambda at: (at[0] == "decoder", at[1])):
        layer = layers[part, i]
        weight = np.asarray(layer["kernel"]).T
        state_dict[f"{part}.{2 * i}.weight"] = np.array(weight, order="C")
        state_dict[f"{part}.{2 * i}.bias"] = np.array(layer["bias"])
    return state_dict


def to_linen(state_dict: Mapping[str, np.ndarray]) -> LinenTree:
    """PyTorch's state dict as a Linen tree of parameters: :func:`to_torch` undone.

    Raises:
        UserError: a name is not one of the dense autoencoder's.
    """
    params: LinenTree = {}
    for name, array in state_dict.items():
        match = _TORCH_NAME.fullmatch(name)
        if match is None:
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
    num_pixels, hidden, code_width = sizes
    widths = (num_pixels, *hidden, code_width)
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

    Every tensor says what it knows of the widths and the majority is believed, so that
    :func:`check_matches` afterwards blames the tensor that stands alone.

    Args:
        state_dict: PyTorch's, not yet known to be whole, or to be of an autoencoder.
        where: what to call it in an error, most often the file's name.

    Returns:
        (num_pixels, hidden, code_width).

    Raises:
        UserError: some width cannot be told; it lists what the state dict holds.
    """
    layers = []
    for name, array in state_dict.items():
        match = _TORCH_NAME.fullmatch(name)
        # An index beyond the number of tensors cannot belong to a whole state dict.
        if match and int(match[2]) < 2 * len(state_dict):
            layers.append((match[1], int(match[2]) // 2, array.shape))
    depth = 1 + max((i for _, i, _ in layers), default=-1)
    votes: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for part, i, shape in layers:
        # Position 0 is the pixels, ``depth`` the code; the decoder goes backwards.
        ends = (i + 1, i) if part == "encoder" else (depth - i - 1, depth - i)
        for position, width in zip(ends, shape, strict=False):
            votes[position][width] += 1
    widths = [
        max(votes[i], key=votes[i].__getitem__, default=0) for i in range(depth + 1)
    ]
    if not all(widths):
        holds = ", ".join(f"{name} {_show(a.shape)}" for name, a in state_dict.items())
        raise UserError(
            f"{where}: not the state dict of a dense autoencoder, which has "
            f"encoder.0.weight, encoder.0.bias, encoder.2.weight, …, decoder.0.weight, "
            f"…; it holds {holds or 'nothing'}"
        )
    return widths[0], tuple(widths[1:-1]), widths[-1]


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
    found = {name: array.shape for name, array in state_dict.items()}
    faults = [
        *(f"{n} {_show(s)} is missing" for n, s in expected.items() if n not in found),
        *(f"{n} {_show(s)} is extra" for n, s in found.items() if n not in expected),
        *(
            f"{name} is {_show(found[name])}, must be {_show(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
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
            found: Precision = precision
            return found
    shown = ", ".join(f"{name} is {dtype}" for dtype, name in examples.items())
    raise UserError(
        f"{where}: {shown}; all must be float32 or all float64, as model.float() and "
        "model.double() make them"
    )


def not_finite(state_dict: Mapping[str, np.ndarray]) -> list[str]:
    """The names of the tensors that hold NaN or infinity."""
    return [name for name, array in state_dict.items() if not np.isfinite(array).all()]


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
        return load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(
            f"{path}: damaged, or not a safetensors file ({error}); get it again"
        ) from error
    except KeyError as error:  # safetensors' table of NumPy's formats
        raise UserError(
            f"{path}: holds tensors of format {error}; all must be float32, or all "
            "float64"
        ) from error


def write_safetensors(path: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write tensors as a safetensors file, whole or not at all."""
    from safetensors.numpy import save

    # safetensors copies memory as it lies, whatever the strides say.
    arrays = {name: np.ascontiguousarray(a) for name, a in state_dict.items()}
    blob = save(arrays)
    write_file(path, lambda file: file.write(blob))


def _show(shape: tuple[int, ...]) -> str:
    return str(list(shape))
