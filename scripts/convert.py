"""Weights from one form into another: ``convert.py SRC DST [--data.name NAME]``."""

import dataclasses
import importlib
import importlib.util
import io
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from ae_jax import cli, data, registry, weights
from ae_jax.errors import UserError
from ae_jax.files import write_file
from ae_jax.options import Activation, options
from ae_jax.weights import StateDict

if TYPE_CHECKING:
    from ae_jax.config import Config

NUM_IMAGES = 100
"""Test images that both forms reconstruct, to see that they agree."""


@options
class Activations:
    """What a file of weights does not hold of a model."""

    activation: Activation | None = None
    """Activation of the hidden layers."""
    latent_activation: Activation | None = None
    """Activation of the latent."""


UNCHANGED = Activations()


def main(
    src: Annotated[Positional[Path], arg(metavar="SRC")],
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    checkpoint: str = "latest",
    model: Activations = UNCHANGED,
    data_name: Annotated[str | None, arg(name="data.name")] = None,
    data_dir: Annotated[Path | None, arg(name="data.dir")] = None,
) -> None:
    """Convert weights between a run folder, .safetensors and PyTorch's .pt, exactly.

    SRC and DST are each a run folder, a file that ends in .safetensors, or a PyTorch
    state dict that ends in .pt or .pth (SRC also in .pth.tar or .bin). Afterwards 100
    test images go through SRC and through DST, a run folder in JAX and a file in
    PyTorch, and the largest difference is printed; not so without PyTorch.

    Args:
        src: Where the weights are.
        dst: Where they shall be; must not exist. A new run folder stands at step 0: it
            can be evaluated, and trained on from there.
        checkpoint: Of a run folder: latest, best (by held-out loss, else by training
            loss), or a step.
        model: What the weights do not hold; default: the run folder's, for a file the
            tutorial's.
        data_name: Data set of the test images, on which a new run folder trains;
            default: the run folder's, for a file mnist.
        data_dir: Folder in which data sets are prepared.
    """
    _check_paths(src, dst)
    state_dict, settings = _read(src, checkpoint)
    sizes = weights.infer_sizes(state_dict, str(src))
    precision = weights.precision_of(state_dict, str(src))
    _warn_if_not_finite(src, state_dict)
    num_pixels, hidden, latent_dim = sizes
    chosen = {name: value for name, value in vars(model).items() if value}
    sized = {"hidden": hidden, "latent_dim": latent_dim}
    net = dataclasses.replace(settings.model, **sized, **chosen)
    settings = dataclasses.replace(
        settings,
        run_dir=dst,
        data=_choose_data(settings.data, data_name, data_dir),
        model=net,
        train=dataclasses.replace(settings.train, precision=precision),
    )
    dataset = _load_data(settings, num_pixels, needed=dst.suffix not in WRITERS)
    if dst.suffix in WRITERS:
        WRITERS[dst.suffix](dst, state_dict)
    elif dataset:
        _write_run(settings, state_dict, dataset, src)
    widths = "-".join(map(str, (num_pixels, *hidden, latent_dim)))
    print(f"{dst}: {widths}, {precision}, latent {net.latent_activation}")
    if dataset and importlib.util.find_spec("torch"):
        images = dataset.test.images[:NUM_IMAGES]
        before = reconstruct(src, settings, images, checkpoint)
        after = reconstruct(dst, settings, images)
        largest = np.max(np.abs(before - after))
        shown = f"{len(images)} test images: largest difference of a pixel"
        print(f"{shown}: {largest:.2g}")


def _check_paths(src: Path, dst: Path) -> None:
    """Refuse what cannot be done before anything is loaded, or written."""
    endings = "a run folder, or a file that ends in"
    if not src.exists():
        raise UserError(f"{src}: not there; check the path")
    if not src.is_dir() and not src.name.lower().endswith(weights.ENDINGS):
        known = ", ".join(weights.ENDINGS)
        raise UserError(f"{src}: unknown ending; SRC must be {endings} {known}")
    if dst.is_dir() and dst.suffix not in WRITERS and not any(dst.iterdir()):
        return
    if os.path.lexists(dst):
        raise UserError(f"{dst}: exists already; delete it, or choose another DST")
    # A run folder may be called mnist-0.2.
    if dst.suffix[1:2].isalpha() and dst.suffix not in WRITERS:
        known = ", ".join(WRITERS)
        raise UserError(f"{dst}: unknown ending; DST must be {endings} {known}")
    if dst.suffix in WRITERS and not dst.parent.is_dir():
        raise UserError(f"{dst}: there is no folder {dst.parent}; make it first")


def _read(path: Path, checkpoint: str) -> tuple[StateDict, "Config"]:
    """Weights, and the config that they come with: a run's, or the tutorial's."""
    from ae_jax.config import Config
    from ae_jax.models.dense import Autoencoder
    from ae_jax.runs.run import open_run

    if not path.is_dir():
        return weights.read_state_dict(path), Config()
    run = open_run(path, checkpoint)
    if not isinstance(run.config.model, Autoencoder):
        raise UserError(
            f"{path}: a run of {type(run.config.model).__name__}; only the dense "
            "autoencoder has a counterpart in PyTorch"
        )
    return weights.to_torch(run.params), run.config


def _warn_if_not_finite(path: Path, state_dict: StateDict) -> None:
    bad = [name for name, array in state_dict.items() if not np.isfinite(array).all()]
    if bad:
        place = f"warning: {path}: NaN or infinity in {', '.join(bad)}"
        print(f"{place}; converted all the same", file=sys.stderr)


# --- Data ----------------------------------------------------------------------------


def _choose_data(options: Any, name: str | None, folder: Path | None) -> Any:
    if name:
        options = registry.find_class("data", data.DATASETS, name)()
    return dataclasses.replace(options, dir=folder) if folder else options


def _load_data(
    settings: "Config", num_pixels: int, needed: bool
) -> data.Dataset | None:
    """The data set; None, with a remark, if it cannot be had and is not needed."""
    try:
        dataset = data.load(settings.data)
        size = math.prod(dataset.shape)
        if size != num_pixels:
            raise UserError(
                f"data.name: the weights are for {num_pixels} pixels, these images "
                f"have {size}; choose another of {', '.join(data.DATASETS)}"
            )
    except (UserError, OSError) as error:
        if needed:
            raise
        print(f"not compared: {error}", file=sys.stderr)
        return None
    return dataset


# --- Writing -------------------------------------------------------------------------


def _write_run(
    settings: "Config", state_dict: StateDict, dataset: data.Dataset, src: Path
) -> None:
    """Make a run folder that stands at step 0 with these weights, all or nothing."""
    import jax
    import jax.numpy as jnp

    from ae_jax.config import to_json
    from ae_jax.devices import numerics
    from ae_jax.runs import environment
    from ae_jax.runs.checkpoint import Checkpoints
    from ae_jax.runs.folder import Data, Description, write_description
    from ae_jax.runs.program import build

    train, folder = settings.train, settings.run_dir
    kind = {"kind": jax.devices()[0].device_kind, "count": 1}
    origin: dict[str, Any] = {"weights": str(src)}
    description = Description(
        experiment="run",
        config=to_json(settings),
        data=Data(**dataset.describe()),
        **environment.here(kind).model_dump(exclude={"date"}),
        **origin,
    )
    saved = description.model_dump(include={"config", "data"}, mode="json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    with numerics(train.precision), place as beside:
        images = dataset.train.images
        shape = images.shape[1:]
        program = build(settings.model, settings.objective, train, len(images), shape)
        params = jax.tree.map(jnp.asarray, weights.to_linen(state_dict))
        made = Path(beside) / folder.name
        made.mkdir()
        write_description(made, description)
        history = {"rows": [], "epoch_s": 0.0, "wall_s": 0.0, **saved}
        with Checkpoints(made / "checkpoints") as checkpoints:
            checkpoints.save(program.start_from(params, train.seed), history)
        os.replace(made, folder)


def _write_pt(path: Path, state_dict: StateDict) -> None:
    importlib.import_module("experiments.pytorch_baseline")  # says if it is missing
    import torch

    tensors = {name: torch.tensor(array) for name, array in state_dict.items()}
    blob = io.BytesIO()  # written to disk, torch.save hides the system's reason
    torch.save(tensors, blob)
    write_file(path, lambda file: file.write(blob.getbuffer()))


WRITERS: dict[str, Callable[[Path, StateDict], None]] = {
    ".safetensors": weights.write_safetensors,
    ".pt": _write_pt,
    ".pth": _write_pt,
}
"""By the ending; what has none is a run folder."""


# --- The comparison ------------------------------------------------------------------


def reconstruct(
    path: Path, settings: "Config", images: np.ndarray, checkpoint: str = "latest"
) -> np.ndarray:
    """What the weights at a place make of images: a run's in JAX, a file's in PyTorch.

    Args:
        path: a run folder or a file.
        settings: what a file does not hold: the activations, the precision.
        images: uint8 [N, H, W, C].
        checkpoint: of a run folder.
    """
    import torch

    from ae_jax.runs.run import open_run
    from experiments.pytorch_baseline import Autoencoder

    if path.is_dir():
        return open_run(path, checkpoint).reconstruct(images)
    activations = {
        "relu": torch.nn.ReLU,
        "leaky_relu": torch.nn.LeakyReLU,
        "gelu": torch.nn.GELU,
        "tanh": torch.nn.Tanh,
        "none": torch.nn.Identity,
    }
    state_dict = weights.read_state_dict(path)
    model = Autoencoder(*weights.infer_sizes(state_dict))
    for part in (model.encoder, model.decoder):
        for i in range(1, len(part) - 1, 2):
            part[i] = activations[settings.model.activation]()
    model.encoder[-1] = activations[settings.model.latent_activation]()
    model.to(getattr(torch, settings.train.precision))
    tensors = {name: torch.tensor(array) for name, array in state_dict.items()}
    model.load_state_dict(tensors)
    x = images.astype(settings.train.precision) / 255
    with torch.inference_mode():
        recon: np.ndarray = model(torch.tensor(x).flatten(1)).numpy()
    return recon.reshape(images.shape)


if __name__ == "__main__":
    cli.run_script(main)
