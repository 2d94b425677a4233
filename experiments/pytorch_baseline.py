"""The tutorial in PyTorch: what the JAX side is measured against.

GeeksforGeeks' "Implement Deep Autoencoder in PyTorch for Image Reconstruction", image
by image as it is written there. The run folder is like any other, but for its
checkpoints, which hold state dicts: it is scored and drawn, evaluated, compared and
converted by the same code. Nothing resumes here: what is unfinished starts again.
Expect a test MSE of about 0.036 where no latent unit dies, after one to four minutes on
two cores.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from jaxtyping import Float, Int, UInt8

from ae_jax import collapse
from ae_jax.errors import Diverged, UserError

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

if TYPE_CHECKING:  # JAX is loaded by what needs it: not by the tutorial's parts
    from ae_jax.config import Config
    from ae_jax.runs.member import Member, Shared
    from ae_jax.weights import StateDict

NAME = "pytorch_baseline"

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


class InMemory:
    """Batches of images that stay in memory: what the loader gives, but faster.

    Args as of :func:`make_loader`.
    """

    def __init__(
        self, images: UInt8[np.ndarray, "N H W C"], batch_size: int, seed: int
    ) -> None:
        self._images, self._batch_size = torch.from_numpy(images), batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Float[Tensor, "B D"]]:
        order = torch.randperm(len(self._images), generator=self._generator)
        return scaled_batches(self._images, order.split(self._batch_size))


@torch.inference_mode()
def apply(
    module: torch.nn.Module, images: UInt8[np.ndarray, "N H W C"]
) -> Float[np.ndarray, "N ..."]:
    """What the model, or its encoder, makes of stored images."""
    device = next(module.parameters()).device
    blocks = torch.arange(len(images)).split(1000)
    batches = scaled_batches(torch.from_numpy(images), blocks)
    return torch.cat([module(batch.to(device)).cpu() for batch in batches]).numpy()


def to_numpy(tensors: Iterable[tuple[str, Tensor]]) -> "StateDict":
    """Copies of named tensors."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors}


# --- Runs ----------------------------------------------------------------------------

TUTORIAL = {
    "data.num_validation": 0,
    "data.streaming": False,
    "model.name": "autoencoder",
    "model.activation": "relu",
    "model.latent_activation": "relu",
    "model.init": "torch",
    "objective.name": "reconstruction",
    "objective.loss": "mse",
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "train.weight_decay": 0.0,
    "train.clip_norm": None,
    "train.patience": None,
    "train.init_from": None,
    "train.shift": 0,
    "train.precision": "float32",
    "mesh.data": None,
    "distributed": False,
}
"""What the tutorial does, and has no option for."""

Batches = Callable[[UInt8[np.ndarray, "N H W C"], int, int], Iterable[Tensor]]
"""Images, batch size and seed to batches: each time iterated, in another order."""


def use_one_thread() -> None:
    """Have PyTorch leave the other cores to JAX."""
    torch.set_num_threads(1)


def check_options(config: "Config") -> None:
    """Refuse a config that asks for what the tutorial does not do.

    Raises:
        UserError: names the field, and what it must be.
    """
    from ae_jax.config import flatten, to_json

    values = flatten(to_json(config))
    for name, wanted in TUTORIAL.items():
        if values.get(name, wanted) != wanted:
            raise UserError(
                f"{name}: must be {wanted}, as in the tutorial in PyTorch, got "
                f"{values[name]}"
            )


def train_run(config: "Config") -> None:
    """Train the run of a config as the tutorial does; see :func:`train_runs`."""
    from ae_jax import STARTED
    from ae_jax.runs.member import Shared

    train_runs([config], NAME, 1, Shared(), make_loader, STARTED)


def train_runs(
    configs: Sequence["Config"],
    experiment: str,
    together: int,
    shared: "Shared",
    make_batches: Batches = InMemory,
    started: float = 0.0,
) -> None:
    """Train runs one after the other, each in its folder, unless that is done already.

    Args:
        configs: of the runs.
        experiment: its name.
        together: as for :func:`trainer.train_in_folders`; here it has no effect.
        shared: what they have in common.
        make_batches: how they are fed; it changes how fast they train, not how well.
        started: the ``time.monotonic()`` from which the first one's time counts.

    Raises:
        UserError: a config asks for what the tutorial does not do; a folder is in use,
            is no run folder or holds another run; or the data set cannot be had.
        Diverged: a loss is not finite.
    """
    from ae_jax.runs import folder
    from ae_jax.runs.member import Member

    for config in configs:
        check_options(config)
        shared.dataset(config.data)  # before the folder is made
        with folder.lock(config.run_dir):
            member = Member(config, started, "pytorch")
            if not member.finished:
                follow_tutorial(member, experiment, shared, make_batches)
            elif len(configs) == 1:
                member.report_finished()


def follow_tutorial(
    member: "Member", experiment: str, shared: "Shared", make_batches: Batches
) -> None:
    """The tutorial's course: look at the images, train, reconstruct, plot and score.

    Args:
        member: the run, whose folder is held.
        experiment: its name.
        shared: what it has in common with other runs.
        make_batches: how it is fed.
    """
    config, cuda = member.config, torch.cuda.is_available()
    dataset, seed = shared.dataset(config.data), config.train.seed
    train, size = dataset.train.images, config.train.batch_size
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    member.describe(experiment, dataset, {"kind": kind, "count": 1})
    member.checkpoints.remove_after(0)  # what was interrupted starts again
    member.begin(-(-len(train) // size))

    torch.manual_seed(seed)
    sizes = math.prod(dataset.shape), config.model.hidden, config.model.latent_dim
    model = Autoencoder(*sizes).to("cuda" if cuda else "cpu")
    alone = experiment == NAME  # of a study's many runs a line each is enough
    batch = fit(member, model, train, make_batches(train, size, seed), shown=alone)

    # The tutorial shows other digits in each row, those of that epoch's last batch,
    # which tells progress from chance less well.
    last = batch.reshape(-1, *dataset.shape).mul(255).round().to(torch.uint8).cpu()
    rows = np.random.default_rng(seed).permutation(len(train))[:25]
    member.show(dataset, train[rows], last[:5].numpy())
    member.finish(shared, {}, shown=alone)
    if not alone:
        loss = member.rows[-1]["train/mse"]
        print(f"PyTorch, seed {seed}: train/mse {loss:.5f}", flush=True)


def fit(
    member: "Member",
    model: Autoencoder,
    images: UInt8[np.ndarray, "N H W C"],
    loader: Iterable[Tensor],
    shown: bool,
) -> Float[Tensor, "B D"]:
    """Train a run's model, log and save each epoch; its last batch.

    Raises:
        Diverged: the loss is not finite.
    """
    from ae_jax.runs.checkpoint import Weights

    train, device = member.config.train, next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=train.learning_rate)
    num_steps = -(-len(images) // train.batch_size)
    for epoch in range(1, train.num_epochs + 1):
        start = time.perf_counter()
        bar = tqdm(loader, f"epoch {epoch}", num_steps, leave=False, disable=None)
        loss, batch = train_epoch(model, optimizer, (b.to(device) for b in bar))
        seconds = time.perf_counter() - start
        member.note_seconds(seconds)
        if not math.isfinite(loss):
            raise Diverged(
                f"{member.folder}: diverged in epoch {epoch}: train/mse {loss:g}; try "
                "a smaller --train.learning-rate, in another --run-dir"
            )
        dead = int(collapse.dead_units(apply(model.encoder, images)).sum())
        row = {"epoch": epoch, "step": epoch * num_steps, "train/mse": loss}
        row |= {"train/learning_rate": train.learning_rate, "latent/dead_units": dead}
        row |= {"wall_s": seconds, "images_per_s": len(images) / seconds}
        member.log_epoch(row)
        if shown:
            print(f"epoch {epoch}  train/mse {loss:.5f}  {seconds:.1f} s", flush=True)
        state_dict = to_numpy(model.state_dict().items())
        member.save(Weights(epoch * num_steps, state_dict))
        member.prune()
    return batch


if __name__ == "__main__":
    from ae_jax import cli
    from ae_jax.config import Config, TrainConfig
    from ae_jax.data import Digits

    PRESETS = {
        "reference": Config(),
        "quick": Config(data=Digits(), train=TrainConfig(num_epochs=3)),
    }
    cli.run_experiment(NAME, PRESETS, __doc__, train_run)
