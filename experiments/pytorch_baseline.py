"""The tutorial in PyTorch: what the JAX side is measured against.

GeeksforGeeks' "Implement Deep Autoencoder in PyTorch for Image Reconstruction", step by
step and image by image as it is written there, on the same prepared data and into the
same kind of run folder as experiments.tutorial; no JAX is loaded. The weights are
weights.pt, a state dict, and weights.safetensors. Nothing resumes here: a finished run
is left as it is, an unfinished one starts again.
"""
# ruff: noqa: E402 - options are parsed before PyTorch, which takes seconds to load

from dataclasses import dataclass, field
from pathlib import Path

from ae_jax import cli
from ae_jax.config import DataConfig, FiguresConfig, ModelConfig, TrainConfig, UserError


@dataclass(frozen=True)
class Model:
    """Which network; the pixel count follows the data set."""

    hidden: tuple[int, ...] = ModelConfig.hidden
    """Widths of the encoder's hidden layers; the decoder mirrors them."""
    code_width: int = ModelConfig.code_width
    """Units of the code."""

    def __post_init__(self) -> None:
        ModelConfig(**vars(self))  # checks the ranges


@dataclass(frozen=True)
class Train:
    """How it is trained: mean squared error, Adam."""

    num_epochs: int = TrainConfig.num_epochs
    """Passes over the training split."""
    batch_size: int = TrainConfig.batch_size
    """Images per update; the last batch of an epoch is short, and kept."""
    learning_rate: float = TrainConfig.learning_rate
    """Adam's step size."""
    seed: int = TrainConfig.seed
    """Seed of every draw: initial weights, order of the images."""

    def __post_init__(self) -> None:
        TrainConfig(**vars(self))  # checks the ranges


@dataclass(frozen=True)
class Config:
    """Those fields of ``ae_jax.config.Config`` that the tutorial in PyTorch honours."""

    run_dir: Path = Path("runs/run")
    """Run folder: made, begun again, or, if finished, left as it is."""
    data: DataConfig = field(default_factory=DataConfig)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    figures: FiguresConfig = field(default_factory=FiguresConfig)

    def __post_init__(self) -> None:
        if self.data.streaming:
            raise ValueError("data.streaming: PyTorch's side has all in memory")


NAME = "pytorch_baseline"

PRESETS = {
    "reference": Config(),
    "quick": Config(
        data=DataConfig(name="digits"),
        train=Train(num_epochs=3),
        figures=FiguresConfig(epochs=(1, 2, 3)),
    ),
}


def main(config: Config) -> None:
    """Import this file as a module, which loads PyTorch, and run the tutorial."""
    from experiments import pytorch_baseline

    pytorch_baseline.run(config)


if __name__ == "__main__":
    cli.run_experiment(NAME, PRESETS, __doc__, main)  # does not return

try:
    import torch
except ModuleNotFoundError as error:
    raise UserError(
        "PyTorch is not installed; .venv/bin/pip install -c constraints.txt -e "
        "'.[torch]'"
    ) from error

import contextlib
import copy
import io
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import safetensors.torch
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ae_jax import config as configs
from ae_jax import data, evaluate, figures, records

# --- The tutorial's parts ------------------------------------------------------------


class Images(Dataset[Float[Tensor, "1 H W"]]):
    """Images that are fetched and scaled one by one.

    Source:
        ``torchvision.datasets.MNIST`` under ``transforms.ToTensor()``, call for call
        but for the labels, which an autoencoder has no use for: a PIL image is made of
        the stored bytes, then an array, a tensor, and floats in [0, 1].
    """

    def __init__(self, images: UInt8[np.ndarray, "N H W"]) -> None:
        self.data = torch.tensor(images)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Float[Tensor, "1 H W"]:
        image = PIL.Image.fromarray(self.data[index].numpy())
        pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
        pixels = pixels.view(image.size[1], image.size[0], 1)
        pixels = pixels.permute(2, 0, 1).contiguous()
        return pixels.to(torch.get_default_dtype()).div(255)


def make_loader(
    images: UInt8[np.ndarray, "N H W"], batch_size: int, seed: int
) -> DataLoader[Float[Tensor, "B 1 H W"]]:
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
    """The tutorial's network: ReLU after every layer, the code too; sigmoid at the end.

    Its state dict is ``encoder.0.weight`` [out, in], ``encoder.0.bias`` [out],
    ``encoder.2.weight``, … up to ``decoder.6.bias``.

    Args:
        num_pixels: D, the width of input and output.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        code_width: K, the units of the code.
    """

    def __init__(
        self,
        num_pixels: int = 28 * 28,
        hidden: tuple[int, ...] = (128, 64, 12),
        code_width: int = 3,
    ) -> None:
        super().__init__()
        widths = (num_pixels, *hidden, code_width)
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
    loss_function: Callable[[Tensor, Tensor], Tensor],
) -> tuple[float, Float[Tensor, "B D"], Float[Tensor, "B D"]]:
    """Train on each batch once.

    Args:
        model: trained in place.
        optimizer: of the model's parameters.
        batches: images in [0, 1], of any shape: they are flattened.
        loss_function: of output and images; the mean over both axes.

    Returns:
        The mean of the batches' losses, each from before its update and the short
        last one counted as one; the last batch's images, and what the model made of
        them, also before the update.
    """
    running_loss, num_batches = 0.0, 0
    for batch in batches:
        img = batch.reshape(len(batch), -1)
        out = model(img)
        loss = loss_function(out, img)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        num_batches += 1
    return running_loss / num_batches, img, out.detach()


def scaled_batches(
    images: UInt8[Tensor, "N D"], order: Iterable[Int[Tensor, " B"]]
) -> Iterator[Float[Tensor, "B D"]]:
    """Batches of images that are all in memory: what the loader gives, but faster.

    Args:
        images: stored pixels, 0 to 255.
        order: row numbers of each batch: ``torch.randperm(N).split(B)``.
    """
    for rows in order:
        yield images[rows].to(torch.get_default_dtype()).div(255)


# --- The same training in other ways, for comparisons of speed -----------------------

Contender = Callable[[int], object]  # trains so many steps


def make_contenders(
    images: UInt8[np.ndarray, "N H W"],
    make_model: Callable[[], Autoencoder],
    train: Train,
) -> dict[str, Contender]:
    """The ways to feed and to update this network in PyTorch, the tutorial's first.

    Args:
        images: stored pixels, 0 to 255.
        make_model: gives each contender a model of its own.
        train: batch size, learning rate and seed.
    """
    size, stored = train.batch_size, torch.from_numpy(images.reshape(len(images), -1))
    scaled = torch.utils.data.TensorDataset(stored.float().div(255))
    tensors = DataLoader(scaled, batch_size=size, shuffle=True)
    items = make_loader(images, size, train.seed)

    def in_memory(num_steps: int) -> Iterator[Float[Tensor, "B D"]]:
        order = torch.randperm(len(stored)).split(size)
        return scaled_batches(stored, order[-num_steps:])  # the short one among them

    def contender(
        batches: Callable[[int], Iterable[Tensor]],
        fused: bool | None = None,
        compiled: bool = False,
    ) -> Contender:
        model = make_model()
        rate = train.learning_rate
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=fused)
        forward: Any = torch.compile(model) if compiled else model
        loss = torch.nn.MSELoss()
        return lambda steps: train_epoch(forward, optimizer, batches(steps), loss)

    return {
        "item_by_item": contender(lambda steps: itertools.islice(items, steps)),
        "data_loader": contender(
            lambda steps: (batch for (batch,) in itertools.islice(tensors, steps))
        ),
        "in_memory": contender(in_memory),
        "fused": contender(in_memory, fused=True),
        "compiled": contender(in_memory, fused=True, compiled=True),
    }


def warm_up(contenders: dict[str, Contender]) -> tuple[int, str | None]:
    """Let PyTorch compile, for the number of threads with which it is faster.

    Args:
        contenders: of :func:`make_contenders`, and others; if there is no compiler,
            ``compiled`` is removed.

    Returns:
        The threads, one or all cores, to be set whenever they are timed; and why
        ``compiled`` is missing.
    """

    def seconds(num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        contenders["fused"](5)
        return records.stopwatch(contenders["fused"], 30)

    threads = min({1, records.usable_cores()}, key=seconds)
    torch.set_num_threads(threads)  # code is compiled for that many
    failed = None
    for name, contender in list(contenders.items()):
        try:
            contender(5)
        except Exception as error:  # whatever a compiler may lack
            if name != "compiled":
                raise
            failed = str(error).strip().splitlines()[0]
            del contenders[name]
    return threads, failed


# --- The tutorial's course, in a run folder ------------------------------------------


def run(config: Config) -> None:
    """Follow the tutorial in ``config.run_dir``, unless that is done already.

    Raises:
        UserError: the folder is in use, is no run folder or holds another run; or the
            data set cannot be had.
        Diverged: a gradient is not finite.
    """
    with records.lock(config.run_dir):
        if is_finished(config):
            return
        dataset = data.load(config.data)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with contextlib.closing(Log(config, dataset, device)) as log:
            follow_tutorial(config, dataset, device, log)


def is_finished(config: Config) -> bool:
    """Whether this very run is done; says so.

    Raises:
        UserError: the folder holds another run.
    """
    folder = config.run_dir
    description = records.read_known(folder, NAME)
    if not description:
        return False
    place = str(folder / "config.json")
    was = configs.from_json(Config, description["config"], place)
    configs.refuse_clashes(was, config, configs.FREE)
    summary = records.read_summary(folder)
    if not summary:
        return False
    print(
        f"{folder} is finished after {summary['epochs']} epochs: test/mse "
        f"{summary['test/mse']:.4f}"
    )
    return True


def follow_tutorial(
    config: Config, dataset: data.Dataset, device: torch.device, log: "Log"
) -> None:
    """The tutorial's steps, in its order."""
    shape, seed = dataset.shape, config.train.seed

    # 25 random training images.
    rows = np.random.default_rng(seed).permutation(len(dataset.train.images))
    samples = dataset.train.images[rows[:25]]
    log.draw("samples", figures.samples(samples.reshape(-1, *shape)))

    # The network, and its training.
    torch.manual_seed(seed)
    sizes = (math.prod(shape), config.model.hidden, config.model.code_width)
    model = Autoencoder(*sizes).to(device)
    last_batch, weights = fit(model, config, dataset, log)
    log.save_weights(model)

    # The training loss.
    epochs = [row["epoch"] for row in log.rows]
    losses = [row["train/mse"] for row in log.rows]
    held_out = [row["val/mse"] for row in log.rows if "val/mse" in row]
    figure = figures.training_loss(epochs, losses, "MSE", held_out or None)
    log.draw("training_loss", figure)

    # Five digits of the last epoch's last batch, after some epochs. The tutorial shows
    # other digits in each row, those of that epoch's last batch, which tells progress
    # from chance less well; and its outputs are from before the batch's update.
    shown = last_batch[:5]
    recons = {}
    for epoch, state in weights.items():  # at the end the model has its own back
        model.load_state_dict(state)
        recons[epoch] = apply(model, shown).reshape(-1, *shape)
    figure = figures.reconstructions_by_epoch(recons, shown.reshape(-1, *shape))
    log.draw("reconstructions_by_epoch", figure)

    # The test split: ten images of its last batch, and the score over all of it.
    test = dataset.test.images
    start = (len(test) - 1) // config.train.batch_size * config.train.batch_size
    last_test = test[start:][:10]
    recon = apply(model, last_test).reshape(-1, *shape)
    figure = figures.test_reconstructions(recon, last_test.reshape(-1, *shape))
    log.draw("test_reconstructions", figure)
    log.save_pictures(samples=samples, train=shown, test=last_test)
    log.summarise(score(model, dataset))


def fit(
    model: Autoencoder, config: Config, dataset: data.Dataset, log: "Log"
) -> tuple[UInt8[np.ndarray, "B D"], dict[int, dict[str, Tensor]]]:
    """Train the model.

    Returns:
        The last epoch's last batch of images, and the weights after each epoch whose
        reconstructions are shown, the last one always among them.
    """
    images = dataset.train.images
    num_epochs, seed = config.train.num_epochs, config.train.seed
    shaped = images.reshape(-1, *dataset.shape)
    loader = make_loader(shaped, config.train.batch_size, seed)
    criterion = torch.nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.learning_rate)
    optimizer.register_step_post_hook(lambda *_: log.note_step(gradient_norm(model)))
    device = next(model.parameters()).device
    weights = {}
    for epoch in range(1, num_epochs + 1):
        start = time.perf_counter()
        bar = tqdm(loader, f"epoch {epoch}/{num_epochs}", leave=False, disable=None)
        batches = (batch.to(device) for batch in bar)
        loss, last_batch, _ = train_epoch(model, optimizer, batches, criterion)
        wall_s = time.perf_counter() - start
        log.add_row(
            {
                "epoch": epoch,
                "step": epoch * len(loader),
                "train/mse": loss,
                "train/grad_norm": float(np.mean(log.norms[-len(loader) :])),
                **validate(model, dataset),
                "train/learning_rate": config.train.learning_rate,
                "code/dead_units": count_dead_units(model, images),
                "wall_s": wall_s,
                "images_per_s": len(images) / wall_s,
            }
        )
        if epoch in config.figures.epochs or epoch == num_epochs:
            weights[epoch] = copy.deepcopy(model.state_dict())
    return last_batch.mul(255).round().to(torch.uint8).cpu().numpy(), weights


def gradient_norm(model: torch.nn.Module) -> float:
    """The Euclidean norm of all parameters' gradients, joined."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads).item()


@torch.inference_mode()
def apply(
    module: torch.nn.Module, images: UInt8[np.ndarray, "N D"]
) -> Float[np.ndarray, "N ..."]:
    """What the model, or its encoder, makes of stored images."""
    device = next(module.parameters()).device
    blocks = torch.arange(len(images)).split(1000)
    batches = scaled_batches(torch.from_numpy(images), blocks)
    return torch.cat([module(batch.to(device)).cpu() for batch in batches]).numpy()


def count_dead_units(model: Autoencoder, images: UInt8[np.ndarray, "N D"]) -> int:
    """Code units that are zero for every image."""
    return int(evaluate.dead_units(apply(model.encoder, images)).sum())


def validate(model: Autoencoder, dataset: data.Dataset) -> dict[str, float]:
    """The loss on the held-out images, if some are."""
    images = dataset.validation.images
    if not len(images):
        return {}
    errors = evaluate.squared_error(apply(model, images), scale(images))
    return {"val/mse": float(errors.mean())}


def score(model: Autoencoder, dataset: data.Dataset) -> dict[str, Any]:
    """What the model is worth on the whole test split, and two baselines beside it."""
    train, test = dataset.train.images, dataset.test.images
    recon, codes = apply(model, test), apply(model.encoder, test)
    metrics = evaluate.image_metrics(recon, scale(test), dataset.shape)
    dead = evaluate.dead_units(codes)
    return {
        **{f"test/{name}": value for name, value in metrics.items()},
        "code/dead_units": int(dead.sum()),
        "code/collapsed": bool(dead.all()),
        "baseline/mean_image/test/mse": evaluate.mean_image_mse(train, test),
        "baseline/pca/test/mse": evaluate.pca_mse(train, test, codes.shape[1]),
    }


def scale(images: UInt8[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    """Stored pixels as floats in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)


class Log:
    """The files of a run folder, as far as they come about while the tutorial runs.

    Attributes:
        rows: those of metrics.jsonl.
        norms: norm of each step's gradient.
    """

    def __init__(
        self, config: Config, dataset: data.Dataset, device: torch.device
    ) -> None:
        self.rows: list[records.Row] = []
        self.norms: list[float] = []
        self._config, self._dataset, self._device = config, dataset, device
        self._folder = config.run_dir
        self._figures = self._folder / "figures"
        shutil.rmtree(self._figures, ignore_errors=True)  # an unfinished run's
        self._figures.mkdir()
        self._describe()
        self._board = records.Board(self._folder, [])

    def _describe(self) -> None:
        on_gpu = self._device.type == "cuda"
        kind = torch.cuda.get_device_name(self._device) if on_gpu else "cpu"
        device = {"kind": kind, "count": 1}
        about = self._dataset.describe()
        description = records.describe(NAME, self._config, device, about)
        description["versions"]["torch"] = str(torch.__version__)
        records.write_json(self._folder / "config.json", description)

    def note_step(self, norm: float) -> None:
        """An update was made with a gradient of this norm.

        Raises:
            Diverged: it is not finite.
        """
        if not self.norms:
            self._first_step_s = time.monotonic() - cli.STARTED
        self.norms.append(norm)
        if not math.isfinite(norm):
            raise cli.Diverged(
                f"{self._folder}: diverged at step {len(self.norms)}: grad_norm "
                f"{norm:g}; try a smaller --train.learning-rate, in another --run-dir"
            )

    def add_row(self, row: records.Row) -> None:
        """An epoch has ended."""
        self.rows.append(row)
        records.write_rows(self._folder, self.rows)
        self._board.add_row(row)
        num_epochs = self._config.train.num_epochs
        width = self._config.model.code_width
        print(records.epoch_line(row, num_epochs, "mse", width), flush=True)

    def draw(self, name: str, figure: Figure) -> None:
        """Keep a figure."""
        path = self._figures / f"{name}.png"
        figures.save(figure, path)
        self._board.add_figure(path)

    def save_pictures(self, **pictures: UInt8[np.ndarray, "n D"]) -> None:
        """Keep the images that the figures show."""
        shaped: dict[str, Any] = {
            name: images.reshape(-1, *self._dataset.shape)
            for name, images in pictures.items()
        }
        records.write_file(
            self._figures / "images.npz",
            lambda file: np.savez_compressed(file, **shaped),
        )

    def save_weights(self, model: Autoencoder) -> None:
        """Keep the weights, as PyTorch's state dict and as safetensors."""
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        blob = io.BytesIO()  # straight to a file, it would hide the disk's refusal
        torch.save(state, blob)
        records.write_file(
            self._folder / "weights.pt", lambda file: file.write(blob.getbuffer())
        )
        records.write_file(
            self._folder / "weights.safetensors",
            lambda file: file.write(safetensors.torch.save(state)),
        )

    def summarise(self, scores: dict[str, Any]) -> None:
        """Write summary.json, with which the run is finished, and show the scores."""
        last = self.rows[-1]
        summary = {
            "train/mse": last["train/mse"],
            **scores,
            "checkpoint_step": last["step"],
            "steps": last["step"],
            "epochs": last["epoch"],
            "stopped": False,
            "wall_s": time.monotonic() - cli.STARTED,
            "first_step_s": self._first_step_s,
            "peak_memory_bytes": records.peak_memory_bytes(),
        }
        if self._device.type == "cuda":
            summary["device_peak_bytes"] = torch.cuda.max_memory_allocated()
        records.write_json(self._folder / "summary.json", summary)
        print(records.score_table(summary, self._config.model.code_width))

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        self._board.close()
