"""The tutorial in PyTorch alone, and its training fed and updated in other ways.

For scripts/benchmark.py, which sets ours beside them. No JAX is loaded here.
"""

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
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


def make_contenders(
    images: UInt8[np.ndarray, "N H W C"],
    make_model: Callable[[], Autoencoder],
    batch_size: int,
    learning_rate: float,
) -> dict[str, Contender]:
    """The ways to feed and to update this network in PyTorch, the tutorial's first.

    Args:
        images: stored pixels, 0 to 255.
        make_model: gives each contender a model of its own.
        batch_size: B.
        learning_rate: Adam's.
    """
    stored = torch.from_numpy(images)
    (scaled,) = scaled_batches(stored, [torch.arange(len(stored))])
    tensors = DataLoader(TensorDataset(scaled), batch_size=batch_size, shuffle=True)
    items = make_loader(images, batch_size, seed=0)

    def in_memory(num_steps: int) -> Iterator[Float[Tensor, "B D"]]:
        order = torch.randperm(len(stored)).split(batch_size)
        return scaled_batches(stored, order[-num_steps:])  # the short one among them

    def contender(
        batches: Callable[[int], Iterable[Tensor]],
        fused: bool | None = None,
        compiled: bool = False,
    ) -> Contender:
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), learning_rate, fused=fused)
        forward: Any = torch.compile(model) if compiled else model
        return lambda steps: train_epoch(forward, optimizer, batches(steps))

    return {
        "item_by_item": contender(lambda steps: itertools.islice(items, steps)),
        "data_loader": contender(
            lambda steps: (batch for (batch,) in itertools.islice(tensors, steps))
        ),
        "in_memory": contender(in_memory),
        "fused": contender(in_memory, fused=True),
        "compiled": contender(in_memory, fused=True, compiled=True),
    }


def whole_job(data_name: str, data_dir: str, num_epochs: str) -> None:
    """What the tutorial's command does, in PyTorch alone; prints the memory it took."""
    from ae_jax import baselines, collapse, data, plots

    dataset = data.load(data.DATASETS[data_name](dir=Path(data_dir)))
    train, test = dataset.train.images, dataset.test.images
    model = Autoencoder(math.prod(dataset.shape))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader, losses = make_loader(train, 64, seed=0), []
    for _ in range(int(num_epochs)):
        losses.append(train_epoch(model, optimizer, loader)[0])
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
    contenders: dict[str, Contender], num_steps: int, num_rounds: int
) -> dict[str, Any]:
    """Time all contenders in turns, round by round; whatever compiles does so before.

    Args:
        contenders: of :func:`make_contenders`, and others; if there is no compiler,
            ``compiled`` is removed.
        num_steps: that each takes in a round.
        num_rounds: so a machine that slows down slows all of them.

    Returns:
        ``rounds``: of each, the seconds by contender; ``threads``: one or all cores,
        whichever PyTorch was faster with; ``failed``: why ``compiled`` is missing.
    """
    from ae_jax.runs.timing import stopwatch

    def seconds(num_threads: int) -> float:
        torch.set_num_threads(num_threads)
        contenders["fused"](5)
        return stopwatch(contenders["fused"], 30)

    before, failed = torch.get_num_threads(), None
    threads = min({1, usable_cores()}, key=seconds)
    torch.set_num_threads(threads)  # code is compiled for that many
    for name, contender in list(contenders.items()):
        try:
            contender(5)
        except Exception as error:  # whatever a compiler may lack
            if name != "compiled":
                raise
            failed = str(error).strip().splitlines()[0]
            del contenders[name]
    rounds = [
        {
            name: stopwatch(contender, num_steps)
            for name, contender in contenders.items()
        }
        for _ in range(num_rounds)
    ]
    torch.set_num_threads(before)
    return {"rounds": rounds, "threads": threads, "failed": failed}
