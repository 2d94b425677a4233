"""How long training takes, for benchmarks: ratios of times measured in turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ae_jax import data
from ae_jax.config import Config
from ae_jax.devices import numerics
from ae_jax.runs.folder import read_description
from ae_jax.runs.lanes import Feeds
from ae_jax.runs.program import Compiled, build
from ae_jax.runs.run import read_config
from ae_jax.train import Plan, fit

Runner = Callable[[int], object]
"""Trains n more steps, and returns when they are done."""


def stopwatch(work: Runner, num_steps: int) -> float:
    """Seconds that a runner takes for a number of steps."""
    start = time.perf_counter()
    work(num_steps)
    return time.perf_counter() - start


def make_runner(config: Config, images: Any, num_seeds: int = 1) -> Runner:
    """Our training, compiled: the trainer's program and loop, and nothing beside.

    Args:
        config: of a run.
        images: training images [N, H, W, C]; an ``ImageFile`` is streamed.
        num_seeds: how many seeds train side by side, of images in memory.
    """
    precision, size = config.train.precision, config.train.batch_size
    with numerics(precision):
        compiled = Compiled(config, len(images), images.shape[1:], num_seeds)
        states = [compiled.init(np.uint32(seed)) for seed in range(num_seeds)]
        state = compiled.lanes.join(states)
        end = 1000 * compiled.program.steps_per_epoch  # later than anyone measures
        feeds = Feeds(images, range(num_seeds), size, compiled.lanes, end)
        chunk = compiled.chunk(state, feeds.block_at(0))

    def run(num_steps: int) -> None:
        nonlocal state
        with numerics(precision):
            plan = Plan(int(state.step) + num_steps)
            state = fit(state, chunk, feeds.block_at, plan, lambda *_: True)

    return run


def seed_time_ratio(config: Config, together: int, num_rounds: int = 15) -> float:
    """A seed's epoch beside others over that of a single run, timed in turns."""
    images = data.load(config.data).train.images
    num_steps = -(-len(images) // config.train.batch_size)
    many, alone = make_runner(config, images, together), make_runner(config, images)
    ratios = [
        stopwatch(many, num_steps) / (together * stopwatch(alone, num_steps))
        for _ in range(num_rounds + 1)
    ]
    return statistics.median(ratios[1:])  # the first round warms up


def train_gflop(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """Operations of all trainings of a study together, in 10⁹.

    Args:
        rows: ``run_dir`` and ``steps`` of its runs, by cell.
    """
    total = 0.0
    for members in rows.values():
        path = Path(members[0]["run_dir"])
        description = read_description(path)
        settings, split = read_config(path, description.config), description.data
        flops = step_flops(settings, split.num_train, split.shape)
        total += flops * sum(row["steps"] for row in members)
    return total / 1e9


def step_flops(config: Config, num_train: int, shape: tuple[int, int, int]) -> float:
    """Floating-point operations of a step, as XLA counts them before it optimises."""
    with numerics(config.train.precision):
        parts = build(config.model, config.objective, config.train, num_train, shape)
        state = jax.eval_shape(parts.init, np.uint32(0))
        x = jax.ShapeDtypeStruct((config.train.batch_size, *shape), "float32")
        weight = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
        lowered = jax.jit(parts.train_step).lower(state, x, weight)
    costs: Any = lowered.cost_analysis()
    return float(costs["flops"])
