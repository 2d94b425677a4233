"""Weights from one form into another: ``convert.py SRC DST [--model.…]``."""

import atexit
import dataclasses
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from tyro.conf import Positional, arg

from ae_jax import cli, interop, records
from ae_jax.config import Config, UserError
from ae_jax.interop import Precision, Sizes, StateDict

if TYPE_CHECKING:
    from ae_jax.data import Dataset

NUM_IMAGES = 100
"""Images that both sides reconstruct, to see that they agree."""


@dataclass(frozen=True)
class ModelOptions:
    """What the shapes of the weights cannot tell."""

    code_activation: Literal["relu", "leaky_relu", "none"] | None = None
    """Activation of the code; None: the run folder's, for a file the tutorial's."""


@dataclass(frozen=True)
class DataOptions:
    """The images that both sides reconstruct, and that a new run folder trains on."""

    name: str | None = None
    """Data set; None: the run folder's, for a file mnist."""
    dir: Path | None = None
    """Folder in which data sets are prepared; None: the run folder's, or data."""
    source: Path | None = None
    """Folder with the four IDX files (raw or .gz), to prepare from without network."""


def main(
    src: Annotated[Positional[Path], arg(metavar="SRC")],
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    model: ModelOptions,
    data: DataOptions,
    checkpoint: str = "latest",
) -> None:
    """Convert weights between a run folder, .safetensors and PyTorch's .pt, exactly.

    SRC and DST are each a run folder, a file that ends in .safetensors, or a PyTorch
    state dict that ends in .pt or .pth. Afterwards 100 test images go through what was
    read and through what was written, once in JAX and once in PyTorch if that is
    installed, and the largest difference is printed.

    Args:
        src: Where the weights are.
        dst: Where they shall be; must not exist. A new run folder stands at step 0: it
            can be evaluated, and trained on from there.
        model: What the shapes of the weights cannot tell.
        data: The images that both sides reconstruct, and that a new run folder trains
            on.
        checkpoint: Of a run folder: latest, best (by held-out loss, else by training
            loss), or a step.
    """
    _check_paths(src, dst)
    state_dict, known = _read(src, checkpoint)
    sizes, precision = _check_weights(src, state_dict)
    num_pixels, hidden, code_width = sizes
    settings = dataclasses.replace(
        known,
        run_dir=dst,
        model=dataclasses.replace(
            known.model, **_given(model), hidden=hidden, code_width=code_width
        ),
        data=dataclasses.replace(known.data, **_given(data)),
        train=dataclasses.replace(known.train, precision=precision),
    )
    if dst.suffix in FORMATS:
        images, shown = _choose_images(settings, num_pixels)
        FORMATS[dst.suffix].write(dst, state_dict)
    else:
        dataset = _load_data(settings, num_pixels)
        images, shown = _test_images(dataset)
        _write_run(settings, state_dict, dataset, src)
    widths = "-".join(map(str, (num_pixels, *hidden, code_width)))
    print(f"{dst}: {widths}, {precision}, code {settings.model.code_activation}")
    written, _ = _read(dst)
    # The new form goes to its own side: a run folder is JAX's, a file PyTorch's.
    pair = (state_dict, written) if dst.suffix in FORMATS else (written, state_dict)
    print(f"{shown}: {_compare(settings, *pair, images)}")


def _given(options: ModelOptions | DataOptions) -> dict[str, Any]:
    """Those options that were given; they override what SRC tells."""
    return {name: value for name, value in vars(options).items() if value is not None}


def _check_paths(src: Path, dst: Path) -> None:
    """Refuse what cannot be done before anything is loaded, or written."""
    endings = f"a run folder, or a file that ends in {', '.join(FORMATS)}"
    if not src.exists():
        raise UserError(f"{src}: not there; check the path")
    if not src.is_dir() and src.suffix not in FORMATS:
        raise UserError(f"{src}: unknown ending; SRC must be {endings}")
    if dst.is_dir() and dst.suffix not in FORMATS and not any(dst.iterdir()):
        return
    if os.path.lexists(dst):
        raise UserError(f"{dst}: exists already; delete it, or choose another DST")
    if dst.suffix not in FORMATS and dst.suffix:
        raise UserError(f"{dst}: unknown ending; DST must be {endings}")
    if dst.suffix in FORMATS and not dst.parent.is_dir():
        raise UserError(f"{dst}: there is no folder {dst.parent}; make it first")


def _check_weights(src: Path, state_dict: StateDict) -> tuple[Sizes, Precision]:
    """The sizes and the number format; says on stderr what is odd, but no hindrance."""
    sizes = interop.infer_sizes(state_dict, str(src))
    interop.check_matches(state_dict, interop.shapes_of(sizes), str(src))
    precision = interop.precision_of(state_dict, str(src))
    bad = ", ".join(interop.not_finite(state_dict))
    if bad:
        warning = f"warning: {src}: NaN or infinity in {bad}; converted all the same"
        print(warning, file=sys.stderr)
    return sizes, precision


# --- The forms -----------------------------------------------------------------------


def _read(path: Path, checkpoint: str = "latest") -> tuple[StateDict, Config]:
    """Weights, and the config that they come with: a run's, or the tutorial's."""
    if not path.is_dir():
        return FORMATS[path.suffix].read(path), Config()
    from ae_jax import run

    opened = run.open_run(path, checkpoint)
    if opened.config.model.name != "autoencoder":
        raise UserError(
            f"{path}: a run of the model {opened.config.model.name}; only those of "
            "autoencoder have a counterpart in PyTorch"
        )
    return interop.to_torch(opened.state.params), opened.config


def _write_run(
    settings: Config, state_dict: StateDict, dataset: "Dataset", src: Path
) -> None:
    """Make a run folder that stands at step 0 with these weights, all or nothing."""
    import jax
    import jax.numpy as jnp

    from ae_jax import checkpoint, run

    folder = settings.run_dir
    state = run.build(settings, *dataset.train.images.shape).init()
    params = jax.tree.map(jnp.asarray, interop.to_linen(state_dict))
    description = run.describe("tutorial", settings, dataset)
    description["weights"] = str(src)  # and not what the seed would have drawn
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
    ) as place:
        # On a full disk Orbax's threads go on to write when it has given up already.
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        made = Path(place) / folder.name
        made.mkdir()
        records.write_json(made / "config.json", description)
        keep = settings.checkpoint.keep
        with checkpoint.Checkpoints(made / "checkpoints", keep) as checkpoints:
            history = {"rows": [], "epoch_s": 0.0, "wall_s": 0.0}
            history |= {key: description[key] for key in ("config", "data")}
            checkpoints.save(state._replace(params=params), history, set())
        os.replace(made, folder)


def _read_pt(path: Path) -> StateDict:
    """The tensors of a PyTorch state dict; nothing else is ever unpickled.

    Raises:
        UserError: the file is damaged, or holds anything but plain tensors by name.
    """
    torch = _import_torch()
    blob = io.BytesIO(path.read_bytes())  # so that no error below is the disk's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what it then refuses
            loaded = torch.load(blob, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each raise their own
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it holds {named[1]}, no tensor" if named else "damaged, or no tensors"
        raise _refused(path, what) from error
    if not isinstance(loaded, Mapping):
        raise _refused(path, f"it holds a {type(loaded).__name__}")
    state_dict: StateDict = {}
    for name, tensor in loaded.items():
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise _refused(path, f"{name} is a {type(tensor).__name__}")
        try:
            state_dict[name] = tensor.detach().numpy().copy()
        except (TypeError, RuntimeError) as error:
            raise UserError(
                f"{path}: {name} is of {tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}; all must be plain tensors of float32, or of float64"
            ) from error
    return state_dict


def _refused(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: refused: {what}; it must be a state dict, as "
        "torch.save(model.state_dict(), …) writes it"
    )


def _write_pt(path: Path, state_dict: StateDict) -> None:
    torch = _import_torch()
    tensors = {name: torch.tensor(array) for name, array in state_dict.items()}
    blob = io.BytesIO()  # written to disk, torch.save hides the system's reason
    torch.save(tensors, blob)
    records.write_file(path, lambda file: file.write(blob.getbuffer()))


def _import_torch() -> Any:
    """PyTorch, or the error that it is not installed, which is the baseline's."""
    importlib.import_module("experiments.pytorch_baseline")
    return importlib.import_module("torch")


class Format(NamedTuple):
    """A file that carries weights in PyTorch's layout."""

    read: Callable[[Path], StateDict]
    write: Callable[[Path, StateDict], None]


FORMATS = {
    ".safetensors": Format(interop.read_safetensors, interop.write_safetensors),
    ".pt": Format(_read_pt, _write_pt),
    ".pth": Format(_read_pt, _write_pt),
}
"""By the ending; what has none is a run folder."""


# --- The comparison ------------------------------------------------------------------


def _load_data(settings: Config, num_pixels: int) -> "Dataset":
    from ae_jax import data

    dataset = data.load(settings.data)
    found = dataset.train.images.shape[1]
    if found != num_pixels:
        raise UserError(
            f"data.name: the weights are for {num_pixels} pixels, {dataset.name} has "
            f"{found}; choose another of {', '.join(data.DATASETS)}"
        )
    return dataset


def _test_images(dataset: "Dataset") -> tuple[np.ndarray, str]:
    images = dataset.test.images[:NUM_IMAGES]
    return images, f"{len(images)} test images of {dataset.name}"


def _choose_images(settings: Config, num_pixels: int) -> tuple[np.ndarray, str]:
    """The images [n, D] and what they are: test images, or, failing those, noise."""
    try:
        return _test_images(_load_data(settings, num_pixels))
    except (UserError, OSError) as error:
        print(f"no test images: {error}", file=sys.stderr)
    noise = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, num_pixels))
    return noise.astype(np.uint8), f"{NUM_IMAGES} images of noise"


def _compare(
    settings: Config, ours: StateDict, theirs: StateDict, images: np.ndarray
) -> str:
    """How far what JAX makes of one state dict is from what PyTorch does of another."""
    from ae_jax import run

    x = run.scale(images, run.PARAM_DTYPES[settings.train.precision])
    recon = _reconstruct_in_jax(settings, ours, x)
    if importlib.util.find_spec("torch"):
        target, sides = _reconstruct_in_torch(settings, theirs, x), "JAX and PyTorch"
    else:
        target, sides = _reconstruct_in_jax(settings, theirs, x), "before and after"
    both_nan = np.isnan(recon) & np.isnan(target)
    largest = np.max(np.where(both_nan, 0, np.abs(recon - target)))
    shown = f"largest difference of a pixel, {sides}: {largest:.2g}"
    if both_nan.any():
        shown += f"; {both_nan.mean():.0%} of the pixels are NaN in both"
    return shown


def _reconstruct_in_jax(
    settings: Config, state_dict: StateDict, x: np.ndarray
) -> np.ndarray:
    import jax

    from ae_jax import run

    program = run.build(settings, *x.shape)
    # An accelerator would by default round the factors of a product to fewer bits.
    with jax.default_matmul_precision("highest"):
        return run.in_blocks(program.reconstruct, interop.to_linen(state_dict), x)


def _reconstruct_in_torch(
    settings: Config, state_dict: StateDict, x: np.ndarray
) -> np.ndarray:
    import torch

    from experiments.pytorch_baseline import Autoencoder

    activations = {
        "relu": torch.nn.ReLU,
        "leaky_relu": torch.nn.LeakyReLU,
        "none": torch.nn.Identity,
    }
    sizes = settings.model
    model = Autoencoder(x.shape[1], sizes.hidden, sizes.code_width)
    model.encoder[-1] = activations[sizes.code_activation]()
    model.to(getattr(torch, x.dtype.name))
    tensors = {name: torch.tensor(array) for name, array in state_dict.items()}
    model.load_state_dict(tensors)
    with torch.inference_mode():
        recon: np.ndarray = model(torch.tensor(x)).numpy()
    return recon


if __name__ == "__main__":
    cli.run_script(main)
