"""The tutorial in PyTorch alone, and its training fed and updated in other ways.

For scripts/benchmark.py, which sets ours beside them. No JAX is loaded here.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ae_jax import metrics
from ae_jax.runs.environment import peak_memory_bytes, usable_cores
from experiments.pytorch_baseline import (
    Autoencoder,
    apply,
    make_loader,
    scaled_batches,
    train_epoch,
)

Contender = Callable[[int], object]  # trains n steps
Batches = Callable[[int], Iterable[Tensor]]  # of n steps
CPU_COMPILER = {"mode": "default"}
GPU_COMPILER = {"mode": "reduce-overhead", "dynamic": False}
"""For CUDA graphs, one for each of the two shapes of a batch."""
FRAGILE = ("compiled", "graph")
"""Those that need more than PyTorch, and are left out where they do not work."""


def make_contenders(
    images: UInt8[np.ndarray, "N H W C"],
    make_model: Callable[[], Autoencoder],
    batch_size: int,
    learning_rate: float,
    device: str = "cpu",
) -> dict[str, Contender]:
    """The ways to feed and to update this network in PyTorch, the tutorial's first.

    Args:
        images: stored pixels, 0 to 255.
        make_model: gives each contender a model of its own.
        batch_size: B.
        learning_rate: Adam's.
        device: ``cpu``; or ``cuda``, where all images but the tutorial's lie too, and
            which is waited for once, at the end of all steps.
    """
    cpu = device == "cpu"
    train = train_epoch if cpu else train_unwatched
    stored = torch.from_numpy(images).to(device)
    items = make_loader(images, batch_size, seed=0)

    def from_loader(num_steps: int) -> Iterator[Tensor]:
        return (b.to(device) for b in itertools.islice(items, num_steps))

    def in_memory(num_steps: int) -> Iterator[Float[Tensor, "B D"]]:
        order = torch.randperm(len(stored), device=device).split(batch_size)
        return scaled_batches(stored, order[-num_steps:])  # the short one among them

    def contender(batches: Batches, fused: bool | None = None, **how: Any) -> Contender:
        model = make_model().to(device)
        optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=fused)
        forward: Any = torch.compile(model, **how) if how else model
        return lambda steps: train(forward, optimizer, batches(steps))

    found = {"item_by_item": contender(from_loader)}
    if cpu:
        found["data_loader"] = contender(from_tensors(stored, batch_size))
    found["in_memory"] = contender(in_memory)
    found["fused"] = contender(in_memory, fused=True)
    how = CPU_COMPILER if cpu else GPU_COMPILER
    found["compiled"] = contender(in_memory, fused=True, **how)
    if not cpu:
        graphs = Captured(stored, make_model().to(device), batch_size, learning_rate)
        found["graph"] = graphs.train
    return found


def from_tensors(stored: UInt8[Tensor, "N H W C"], batch_size: int) -> Batches:
    """Scaled beforehand, and collated by a loader."""
    (scaled,) = scaled_batches(stored, [torch.arange(len(stored))])
    tensors = DataLoader(TensorDataset(scaled), batch_size=batch_size, shuffle=True)
    return lambda steps: (batch for (batch,) in itertools.islice(tensors, steps))


def train_unwatched(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Float[Tensor, "B ..."]],
) -> float:
    """What ``train_epoch`` does, its losses summed where they are.

    Nothing is asked of the device before the end, so that its steps queue up.

    Returns:
        The sum of the batches' losses.
    """
    criterion, losses = torch.nn.MSELoss(), []
    for batch in batches:
        img = batch.flatten(1)
        optimizer.zero_grad()
        loss = criterion(model(img), img)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).sum())


class Captured:
    """Each step one CUDA graph: gather, forward, backward and update.

    Nothing is captured before the first call.

    Args:
        stored: pixels, 0 to 255, on the GPU.
        model: on the GPU; trained in place.
        batch_size: B; the short last batch has a graph of its own.
        learning_rate: Adam's.

    Source:
        PyTorch's notes on CUDA graphs, "Whole-network capture".
    """

    def __init__(
        self,
        stored: UInt8[Tensor, "N H W C"],
        model: Autoencoder,
        batch_size: int,
        learning_rate: float,
    ) -> None:
        self._stored, self._model, self._batch_size = stored, model, batch_size
        self._adam = torch.optim.Adam(
            model.parameters(), learning_rate, fused=True, capturable=True
        )
        self._total = torch.zeros((), device=stored.device)
        self._graphs: dict[int, tuple[Tensor, torch.cuda.CUDAGraph]] = {}

    def train(self, num_steps: int) -> float:
        """Train n more steps; the sum of their losses."""
        order = torch.randperm(len(self._stored), device=self._stored.device)
        self._total.zero_()
        for batch in order.split(self._batch_size)[-num_steps:]:
            if len(batch) not in self._graphs:
                self._graphs[len(batch)] = self._capture(len(batch))
            rows, graph = self._graphs[len(batch)]
            rows.copy_(batch)
            graph.replay()
        return float(self._total)

    def _step(self, rows: Int[Tensor, " B"]) -> None:
        self._adam.zero_grad()  # so that each graph has gradients of its own
        (img,) = scaled_batches(self._stored, [rows])
        loss = torch.nn.functional.mse_loss(self._model(img), img)
        loss.backward()
        self._adam.step()
        self._total.add_(loss.detach())

    def _capture(self, size: int) -> tuple[Int[Tensor, " B"], torch.cuda.CUDAGraph]:
        """The rows that a step of so many images reads, and its graph."""
        rows = torch.arange(size, device=self._stored.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(rows)
        torch.cuda.current_stream().wait_stream(stream)
        self._adam.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(rows)
        return rows, graph


def whole_job(data_name: str, data_dir: str, num_epochs: str) -> None:
    """What the tutorial's command does, in PyTorch alone; prints the memory it took."""
    from ae_jax import baselines, collapse, data, plots

    dataset = data.load(data.DATASETS[data_name](dir=Path(data_dir)))
    train, test = dataset.train.images, dataset.test.images
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Autoencoder(math.prod(dataset.shape)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader, losses = make_loader(train, 64, seed=0), []
    for _ in range(int(num_epochs)):
        batches = (batch.to(device) for batch in loader)
        losses.append(train_epoch(model, optimizer, batches)[0])
        collapse.dead_units(apply(model.encoder, train))
    recon, target = apply(model, test).reshape(test.shape), test / np.float32(255)
    found = metrics.mean_metrics(metrics.per_image_metrics(recon, target))
    found["mean_image"] = baselines.mean_image_mse(train, test)
    found["pca"] = baselines.pca_mse(train, test, 3) or math.nan
    figures = [
        plots.samples(train[:25]),
        plots.training_loss([*range(len(losses))], losses),
        plots.reconstructions_by_epoch({1: recon[:5]}, test[:5]),
        plots.test_reconstructions(recon[:10], test[:10]),
    ]
    with tempfile.TemporaryDirectory() as place:
        for i, figure in enumerate(figures):
            plots.save(figure, Path(place) / f"{i}.png")
    print(json.dumps({**found, "peak_memory_bytes": peak_memory_bytes()}))


def race(
    contenders: dict[str, Contender], num_steps: Mapping[str, int], num_rounds: int
) -> dict[str, Any]:
    """Time all contenders in turns, round by round; whatever compiles does so before.

    Args:
        contenders: of :func:`make_contenders`, and others; of those in ``FRAGILE`` the
            ones that fail are removed.
        num_steps: that each takes in a round.
        num_rounds: so a machine that slows down slows all of them.

    Returns:
        ``rounds``: of each, the seconds by contender; ``threads``: one or all cores,
        whichever PyTorch was faster with; ``failed``: why one is missing, or None.
    """
    from ae_jax.runs.timing import stopwatch

    def seconds(num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        contenders["fused"](5)
        return stopwatch(contenders["fused"], 30)

    before = torch.get_num_threads()
    threads = min({1, usable_cores()}, key=seconds)
    torch.set_num_threads(threads)  # code is compiled for that many
    failed = warm_up(contenders)
    rounds = [
        {
            name: stopwatch(contender, num_steps[name])
            for name, contender in contenders.items()
        }
        for _ in range(num_rounds)
    ]
    torch.set_num_threads(before)
    return {"rounds": rounds, "threads": threads, "failed": failed}


def warm_up(contenders: dict[str, Contender]) -> str | None:
    """A few steps of each; a fragile one that fails is removed.

    ``torch.compile`` records its CUDA graph in the second call, which is not timed.

    Returns:
        Why those removed are missing, or None.
    """
    failed = []
    for name, contender in list(contenders.items()):
        try:
            for _ in range(3 if name in FRAGILE else 1):
                contender(5)
        except Exception as error:  # whatever a compiler may lack
            if name not in FRAGILE:
                raise
            reason = str(error).strip() or type(error).__name__
            failed.append(f"{name}: {reason.splitlines()[0]}")
            del contenders[name]
    return "; ".join(failed) or None
