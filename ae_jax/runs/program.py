"""What the options of a run determine before any image is seen, and its compilation."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from ae_jax import devices
from ae_jax.config import Config, TrainConfig
from ae_jax.errors import UserError
from ae_jax.keys import Purpose, key_for
from ae_jax.models import init_params
from ae_jax.models.layers import param_dtype
from ae_jax.objectives import Objective, batched
from ae_jax.runs import run as runs
from ae_jax.runs.lanes import Lanes
from ae_jax.train import (
    Block,
    Params,
    TrainState,
    init_state,
    make_optimizer,
    make_train_chunk,
    make_train_step,
)


class Program(NamedTuple):
    """The parts of a training, yet to be jitted.

    Attributes:
        model: Linen module.
        schedule: learning rate of each step.
        train_step: the update rule.
        chunk: many of its steps, see :func:`train.make_train_chunk`.
        init: seed to the state before the first step.
        start_from: (params, seed) to the same with these parameters.
        steps_per_epoch: T.
    """

    model: nn.Module
    schedule: optax.Schedule
    train_step: Callable[..., Any]
    chunk: Callable[..., TrainState]
    init: Callable[[Any], TrainState]
    start_from: Callable[[Params, Any], TrainState]
    steps_per_epoch: int


def build(
    model_options: Any,
    objective: Objective,
    train: TrainConfig,
    num_train: int,
    shape: tuple[int, int, int],
) -> Program:
    """Model, optimiser and train step; nothing is compiled yet.

    Args:
        model_options: an instance of a class in ``MODELS``.
        objective: one of a class in ``OBJECTIVES``.
        train: how to train.
        num_train: N, images trained on.
        shape: of an image, (H, W, C).

    Raises:
        UserError: a model that cannot take such images or has other state, an
            objective with a metric named twice or a loss that is no scalar, more steps
            than JAX counts, or more memory than there is.
    """
    model = model_options.make(shape, train.precision)
    dtype = param_dtype(train.precision)
    steps_per_epoch = -(-num_train // train.batch_size)
    if train.num_epochs * steps_per_epoch >= 2**31:
        raise UserError(
            f"train.num_epochs: {train.num_epochs:,} epochs of {steps_per_epoch:,} "
            f"steps are more than JAX counts, {2**31 - 1:,} in all; ask for fewer"
        )
    tx, schedule = make_optimizer(train, train.num_epochs * steps_per_epoch)
    losses = batched(objective, model)
    train_step = make_train_step(losses, objective.loss_name, tx, train.shift)

    def draw_params(key: Key[Array, ""]) -> Params:
        return init_params(model, key, shape, train.precision)

    params = jax.eval_shape(draw_params, key_for(0, Purpose.INIT))
    _check_memory(params, train.batch_size * math.prod(shape) * dtype.itemsize)
    # Traced here, so that a mistake in either is found before anything is written.
    x = jnp.zeros((1, *shape), dtype)
    metrics = jax.eval_shape(losses, params, x, key_for(0, Purpose.STEP)[None])

    def start_from(params: Params, seed: Any) -> TrainState:
        key = key_for(seed, Purpose.STEP)
        return init_state(params, tx, key, metrics, steps_per_epoch)

    def init(seed: Any) -> TrainState:
        return start_from(draw_params(key_for(seed, Purpose.INIT)), seed)

    chunk = make_train_chunk(train_step, steps_per_epoch, np.dtype(dtype))
    return Program(
        model, schedule, train_step, chunk, init, start_from, steps_per_epoch
    )


def _check_memory(params: Any, batch_bytes: int) -> None:
    """Refuse what cannot fit: the system would kill the process, and say nothing."""
    leaves = jax.tree.leaves(params)
    # The parameters and Adam's two moments, and all three once more while they change.
    state_bytes = 6 * sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    there = devices.memory_bytes()
    if state_bytes + batch_bytes > there:
        raise UserError(
            f"parameters and Adam's state take {state_bytes / 2**30:,.1f} GiB, a batch "
            f"{batch_bytes / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB; "
            "make the model or train.batch_size smaller"
        )


class Compiled:
    """The program of runs that differ in their seed alone, for a number of lanes.

    Nothing in it is compiled twice, however many groups of that size it trains.

    Args:
        config: of one of them.
        num_train: N, images trained on.
        shape: of an image, (H, W, C).
        num_lanes: S.

    Attributes:
        program: its parts.
        lanes: where they lie.
        init: the program's, jitted; so is ``start_from``.
        scores: see :func:`run.scores_of`; of all lanes.
        active_units: see :func:`run.active_units_of`; of all lanes.
        functions: compiled methods, shared by the runs when they are opened.

    Raises:
        UserError: as of :func:`build`; or there are fewer devices than asked for.
    """

    def __init__(
        self,
        config: Config,
        num_train: int,
        shape: tuple[int, int, int],
        num_lanes: int,
    ) -> None:
        model, train = config.model, config.train
        self.program = build(model, config.objective, train, num_train, shape)
        self.lanes = Lanes(num_lanes, config.mesh.data, train.batch_size)
        # The seed is an argument: what is compiled, and cached, for one serves all.
        self.init = jax.jit(self.program.init)
        self.start_from = jax.jit(self.program.start_from)
        net = self.program.model
        self.scores = self.lanes.jit(runs.scores_of(config.objective, net))
        self.active_units = self.lanes.jit(runs.active_units_of(net))
        self.functions: dict[str, Any] = {}
        self._chunk: Any = None

    def chunk(
        self, state: TrainState, block: Block
    ) -> Callable[[TrainState, Block, int], TrainState]:
        """The train chunk, compiled ahead of time, so that no epoch's time holds it."""
        switches: Any = jax.config
        if self._chunk is None:
            self._chunk = self.lanes.jit_chunk(self.program.chunk)
            if not switches.jax_disable_jit:  # else to look into a step
                self._chunk = self._chunk.lower(state, block, 0).compile()
        return self._chunk
