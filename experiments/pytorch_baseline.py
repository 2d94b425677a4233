"""The tutorial in PyTorch: what the JAX side is measured against.

GeeksforGeeks' "Implement Deep Autoencoder in PyTorch for Image Reconstruction", step by
step and image by image as it is written there, on the same prepared data and with the
same scores and figures as experiments.tutorial; no JAX is loaded. The weights are kept
as weights.safetensors. Nothing resumes here: a finished run is left as it is, an
unfinished one starts again. Expect a test MSE of about 0.036 where no latent unit dies,
after one to four minutes on two cores.
"""

import copy
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float, Int, UInt8
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, TypeAdapter

from ae_jax import STARTED, cli, collapse, data, metrics, registry, weights
from ae_jax.errors import Diverged, UserError
from ae_jax.files import write_json
from ae_jax.options import options
from ae_jax.runs import folder

try:
    import torch
except ModuleNotFoundError as error:
    MISSING = (
        "PyTorch is not installed; .venv/bin/pip install -c constraints.txt -e "
        "'.[torch]'"
    )
    if __name__ != "__main__":
        raise UserError(MISSING) from error
    print(f"error: {MISSING}", file=sys.stderr)
    sys.exit(2)

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

NAME = "pytorch_baseline"
Row = dict[str, Any]


@options
class Model:
    """Which network; the pixel count follows the data set."""

    hidden: tuple[PositiveInt, ...] = (128, 64, 12)
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    latent_dim: PositiveInt = 3
    """Units of the latent."""


@options
class Train:
    """How it is trained: mean squared error, Adam."""

    num_epochs: PositiveInt = 10
    """Passes over the training split."""
    batch_size: PositiveInt = 64
    """Images per update; the last batch of an epoch is short, and kept."""
    learning_rate: PositiveFloat = 1e-3
    """Adam's step size."""
    seed: NonNegativeInt = 0
    """Seed of every draw: initial weights, order of the images."""


@options
class Config:
    """Those fields of ``ae_jax.config.Config`` that the tutorial in PyTorch honours."""

    run_dir: Path = Path("runs/run")
    """Run folder: made, begun again, or, if finished, left as it is."""
    data: Any = field(default_factory=data.Mnist)
    """--data.name chooses the data set; these are the options of the chosen one."""
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


PRESETS = {
    "reference": Config(),
    "quick": Config(data=data.Digits(), train=Train(num_epochs=3)),
}

SHOWN = (1, 5, 10)
"""Epochs whose reconstructions are shown; the last one always is."""

# --- The tutorial's parts ------------------------------------------------------------


class Images(torch.utils.data.Dataset[Float[Tensor, "H W C"]]):
    """Images that are fetched and scaled one by one.

    Source:
        ``torchvision.datasets.MNIST`` under ``transforms.ToTensor()``, call for call
        but for the labels, which an autoencoder has no use for, and the channels, which
        stay last, so that the pixels are in our order: a PIL image is made of the
        stored bytes, then an array, a tensor, and floats in [0, 1].
    """

    def __init__(self, images: UInt8[np.ndarray, "N H W C"]) -> None:
        self.data = torch.tensor(images)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Float[Tensor, "H W C"]:
        stored = self.data[index].numpy()
        image = PIL.Image.fromarray(stored[..., 0] if stored.shape[-1] == 1 else stored)
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        pixels = pixels.view(image.size[1], image.size[0], -1)
        return pixels.to(torch.get_default_dtype()).div(255)


def make_loader(
    images: UInt8[np.ndarray, "N H W C"], batch_size: int, seed: int
) -> DataLoader[Float[Tensor, "B H W C"]]:
    """The tutorial's loader: another order each epoch, the short last batch kept.

    Args:
        images: stored pixels, 0 to 255.
        batch_size: B.
        seed: of the orders; the same seed gives the same orders, epoch by epoch.
    """
    return DataLoader(
        Images(images),
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )


class Autoencoder(torch.nn.Module):
    """The tutorial's network: ReLU after each layer, the latent too, a sigmoid last.

    Its state dict is ``encoder.0.weight`` [out, in], ``encoder.0.bias`` [out],
    ``encoder.2.weight``, … up to ``decoder.6.bias``.

    Args:
        num_pixels: D, the width of input and output.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        latent_dim: K, the units of the latent.
    """

    def __init__(
        self,
        num_pixels: int = 28 * 28,
        hidden: tuple[int, ...] = (128, 64, 12),
        latent_dim: int = 3,
    ) -> None:
        super().__init__()
        widths = (num_pixels, *hidden, latent_dim)
        self.encoder = self._layers(widths)
        self.decoder = self._layers(widths[::-1])
        self.decoder[-1] = torch.nn.Sigmoid()

    @staticmethod
    def _layers(widths: tuple[int, ...]) -> torch.nn.Sequential:
        layers: list[torch.nn.Module] = []
        for fan_in, width in itertools.pairwise(widths):
            layers += [torch.nn.Linear(fan_in, width), torch.nn.ReLU()]
        return torch.nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The reconstruction, pixels in (0, 1)."""
        encoded = self.encoder(x)
        decoded: Tensor = self.decoder(encoded)
        return decoded


def train_epoch(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Float[Tensor, "B ..."]],
) -> tuple[float, Float[Tensor, "B D"]]:
    """Train on each batch once.

    Args:
        model: trained in place.
        optimizer: of the model's parameters.
        batches: images in [0, 1], of any shape: they are flattened.

    Returns:
        The mean of the batches' losses, each from before its update and the short
        last one counted as one; and the last batch's images.
    """
    criterion = torch.nn.MSELoss()
    running_loss, num_batches = 0.0, 0
    for batch in batches:
        img = batch.reshape(len(batch), -1)
        out = model(img)
        loss = criterion(out, img)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        num_batches += 1
    return running_loss / num_batches, img


def scaled_batches(
    images: UInt8[Tensor, "N ..."], order: Iterable[Int[Tensor, " B"]]
) -> Iterator[Float[Tensor, "B D"]]:
    """Batches of images that are all in memory: what the loader gives, but faster.

    Args:
        images: stored pixels, 0 to 255.
        order: row numbers of each batch: ``torch.randperm(N).split(B)``.
    """
    for rows in order:
        yield images[rows].flatten(1).to(torch.get_default_dtype()).div(255)


@torch.inference_mode()
def apply(
    module: torch.nn.Module, images: UInt8[np.ndarray, "N H W C"]
) -> Float[np.ndarray, "N ..."]:
    """What the model, or its encoder, makes of stored images."""
    device = next(module.parameters()).device
    blocks = torch.arange(len(images)).split(1000)
    batches = scaled_batches(torch.from_numpy(images), blocks)
    return torch.cat([module(batch.to(device)).cpu() for batch in batches]).numpy()


def to_numpy(tensors: Iterable[tuple[str, Tensor]]) -> weights.StateDict:
    """Copies of named tensors."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors}


def score(model: Autoencoder, images: UInt8[np.ndarray, "N H W C"]) -> Row:
    """What the model is worth on a whole split: means over its images, dead units."""
    recon = apply(model, images).reshape(images.shape)
    target = images.astype(recon.dtype) / 255
    means = metrics.mean_metrics(metrics.per_image_metrics(recon, target))
    dead = collapse.dead_units(apply(model.encoder, images))
    return {
        **{f"test/{name}": value for name, value in means.items()},
        "latent/dead_units": int(dead.sum()),
        "latent/collapsed": bool(dead.all()),
    }


# --- The tutorial's course, in a run folder ------------------------------------------


def main(config: Config) -> None:
    """Follow the tutorial in ``config.run_dir``, unless that is done already.

    Raises:
        UserError: the folder is in use, is no run folder or holds another run; or the
            data set cannot be had.
        Diverged: the loss is not finite.
    """
    if is_finished(config):
        return
    dataset = data.load(config.data)
    with folder.lock(config.run_dir):
        describe(config, dataset)
        follow_tutorial(config, dataset)


def to_json(config: Config) -> dict[str, Any]:
    """The config as config.json has it."""
    plain: dict[str, Any] = TypeAdapter(Config).dump_python(config, mode="json")
    name = registry.name_of(data.DATASETS, config.data)
    return {**plain, "data": {"name": name, **plain["data"]}}


def is_finished(config: Config) -> bool:
    """Whether this very run is done; says so.

    Raises:
        UserError: the folder holds another run.
    """
    known = folder.read_known(config.run_dir, NAME)
    if not known:
        return False
    different = [
        f"{part}.{name}: the run has {known['config'][part].get(name)}, you asked for "
        f"{value}"
        for part, values in to_json(config).items()
        if part != "run_dir"
        for name, value in values.items()
        if name not in ("dir", "source") and known["config"][part].get(name) != value
    ]
    if different:
        raise UserError(
            f"{config.run_dir} holds another run: {'; '.join(different)}. Choose "
            "another --run-dir, or delete the run"
        )
    summary = folder.read_summary(config.run_dir)
    if not summary:
        return False
    print(f"{config.run_dir} is finished: test/mse {summary['test/mse']:.4f}")
    return True


def describe(config: Config, dataset: data.Dataset) -> None:
    """Write config.json."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    now = folder.environment({"kind": kind, "count": 1})
    now["versions"]["torch"] = str(torch.__version__)
    about = {"format": folder.FORMAT, "experiment": NAME, "config": to_json(config)}
    about |= {**now, "data": dataset.describe(), "code": {}, "history": []}
    write_json(config.run_dir / "config.json", about)


def follow_tutorial(config: Config, dataset: data.Dataset) -> None:
    """The tutorial's steps, in its order."""
    from ae_jax import baselines, plots  # not before: matplotlib takes a second

    train, test, seed = dataset.train.images, dataset.test.images, config.train.seed
    figures = config.run_dir / "figures"
    figures.mkdir(exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # 25 random training images.
    rows = np.random.default_rng(seed).permutation(len(train))[:25]
    plots.save(plots.samples(train[rows]), figures / "samples.png")

    # The network, and its training.
    torch.manual_seed(seed)
    sizes = (math.prod(dataset.shape), config.model.hidden, config.model.latent_dim)
    model = Autoencoder(*sizes).to(device)
    first_step_s = time.monotonic() - STARTED
    epochs, last_batch, kept = fit(model, config, train)
    path = config.run_dir / "weights.safetensors"
    weights.write_safetensors(path, to_numpy(model.state_dict().items()))

    # The training loss.
    losses = [row["train/mse"] for row in epochs]
    figure = plots.training_loss([row["epoch"] for row in epochs], losses)
    plots.save(figure, figures / "training_loss.png")

    # Five digits of the last epoch's last batch, after some epochs. The tutorial shows
    # other digits in each row, those of that epoch's last batch, which tells progress
    # from chance less well; and its outputs are from before the batch's update.
    shown, recons = last_batch[:5], {}
    for epoch, state in kept.items():  # at the end the model has its own back
        model.load_state_dict(state)
        recons[epoch] = apply(model, shown).reshape(shown.shape)
    figure = plots.reconstructions_by_epoch(recons, shown)
    plots.save(figure, figures / "reconstructions_by_epoch.png")

    # The test split: ten images of its last batch, and the score over all of it.
    size = config.train.batch_size
    last_test = test[(len(test) - 1) // size * size :][:10]
    recon = apply(model, last_test).reshape(last_test.shape)
    figure = plots.test_reconstructions(recon, last_test)
    plots.save(figure, figures / "test_reconstructions.png")
    summary = {
        "train/mse": losses[-1],
        **score(model, test),
        "baseline/mean_image/test/mse": baselines.mean_image_mse(train, test),
        "baseline/pca/test/mse": baselines.pca_mse(train, test, sizes[-1]),
        "steps": epochs[-1]["step"],
        "epochs": len(epochs),
        "stopped": False,
        "wall_s": time.monotonic() - STARTED,
        "first_step_s": first_step_s,
        "peak_memory_bytes": folder.peak_memory_bytes(),
    }
    write_json(config.run_dir / "summary.json", summary)  # with it, it is finished
    print("\n".join(f"{name:32}{value:.5g}" for name, value in summary.items()))


def fit(
    model: Autoencoder, config: Config, images: UInt8[np.ndarray, "N H W C"]
) -> tuple[list[Row], UInt8[np.ndarray, "B H W C"], dict[int, dict[str, Tensor]]]:
    """Train the model.

    Returns:
        The rows of metrics.jsonl; the last epoch's last batch; and the weights after
        each epoch whose reconstructions are shown.
    """
    num_epochs, rate = config.train.num_epochs, config.train.learning_rate
    loader = make_loader(images, config.train.batch_size, config.train.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    device = next(model.parameters()).device
    rows: list[Row] = []
    kept = {}
    for epoch in range(1, num_epochs + 1):
        start = time.perf_counter()
        bar = tqdm(loader, f"epoch {epoch}/{num_epochs}", leave=False, disable=None)
        batches = (batch.to(device) for batch in bar)
        loss, last_batch = train_epoch(model, optimizer, batches)
        wall_s = time.perf_counter() - start
        if not math.isfinite(loss):
            raise Diverged(
                f"{config.run_dir}: diverged in epoch {epoch}: train/mse {loss:g}; try "
                "a smaller --train.learning-rate, in another --run-dir"
            )
        dead = int(collapse.dead_units(apply(model.encoder, images)).sum())
        row: Row = {"epoch": epoch, "step": epoch * len(loader), "train/mse": loss}
        row |= {"latent/dead_units": dead, "train/learning_rate": rate}
        rows.append({**row, "wall_s": wall_s, "images_per_s": len(images) / wall_s})
        folder.write_metrics(config.run_dir, rows)
        print(f"epoch {epoch}/{num_epochs}  train/mse {loss:.5f}  {wall_s:.1f} s")
        if epoch in SHOWN or epoch == num_epochs:
            kept[epoch] = copy.deepcopy(model.state_dict())
    pixels = last_batch.reshape(-1, *images.shape[1:]).mul(255).round()
    return rows, pixels.to(torch.uint8).cpu().numpy(), kept


if __name__ == "__main__":
    known = {"data": data.DATASETS}
    args = sys.argv[1:]
    cli.exit_with(
        lambda: main(cli.parse(NAME, PRESETS, __doc__ or "", args, None, known))
    )
