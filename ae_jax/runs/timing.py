"""How long training takes, for benchmarks: ratios of times measured in turns."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ae_jax import data
from ae_jax.config import Config
from ae_jax.data.feed import InMemory, Stream
from ae_jax.devices import numerics, replicated
from ae_jax.keys import Purpose, key_for
from ae_jax.runs import program
from ae_jax.runs.lanes import Lanes
from ae_jax.train import Block, Plan, fit

Runner = Callable[[int], object]
"""Trains so many more steps, and returns when they are done."""


def stopwatch(work: Runner, num_steps: int) -> float:
    """Seconds that something takes for so many steps."""
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
    train, shape = config.train, tuple(images.shape[1:])
    size, precision = train.batch_size, train.precision
    lanes, block = Lanes(num_seeds, config.mesh.data, size), Block((), (), 0, 0)
    where = replicated(lanes.mesh)
    keys = [key_for(seed, Purpose.SHUFFLE) for seed in range(num_seeds)]

    def block_at(step: int) -> Block:
        nonlocal block
        if not block.first_step <= step < block.end_step:
            block = lanes.join_blocks([feed.block_at(step) for feed in feeds])
        return block

    with numerics(precision):
        parts = program.build(config.model, config.objective, train, len(images), shape)
        init = jax.jit(parts.init)
        state = lanes.join([init(np.uint32(seed)) for seed in range(num_seeds)])
        feeds: list[Any]
        if isinstance(images, data.ImageFile):
            end = 1000 * parts.steps_per_epoch  # later than anyone measures
            feeds = [Stream(images, keys[0], size, where, end)]
        else:
            feed = InMemory(images, keys[0], size, where)
            feeds = [feed.with_key(key) for key in keys]
        chunk = lanes.jit_chunk(parts.chunk).lower(state, block_at(0), 0).compile()

    def run(num_steps: int) -> None:
        nonlocal state
        with numerics(precision):
            plan = Plan(int(state.step) + num_steps)
            state = fit(state, chunk, block_at, plan, lambda *_: True)

    return run


def seed_time_ratio(
    config: Config, together: int, num_rounds: int = 5, num_steps: int = 200
) -> float:
    """A seed's time beside others over that of a single run, timed in turns."""
    images = data.load(config.data).train.images
    many, alone = make_runner(config, images, together), make_runner(config, images)
    ratios = [
        stopwatch(many, num_steps) / (together * stopwatch(alone, num_steps))
        for _ in range(num_rounds + 1)
    ]
    return statistics.median(ratios[1:])  # the first round warms up
