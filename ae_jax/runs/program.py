"""What the options of a run determine before any image is seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from ae_jax.config import TrainConfig
from ae_jax.keys import Purpose, key_for
from ae_jax.models import init_params
from ae_jax.models.layers import param_dtype
from ae_jax.objectives import Objective, batched
from ae_jax.train import (
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
        UserError: a model that cannot take such images or has other state, or an
            objective with a metric named twice or a loss that is no scalar.
    """
    model = model_options.make(shape, train.precision)
    dtype = param_dtype(train.precision)
    steps_per_epoch = -(-num_train // train.batch_size)
    tx, schedule = make_optimizer(train, train.num_epochs * steps_per_epoch)
    losses = batched(objective, model)
    train_step = make_train_step(losses, objective.loss_name, tx)

    def draw_params(key: Key[Array, ""]) -> Params:
        return init_params(model, key, shape, train.precision)

    # Traced here, so that a mistake in either is found before anything is written.
    metrics = jax.eval_shape(
        lambda: losses(
            draw_params(key_for(0, Purpose.INIT)),
            jnp.zeros((1, *shape), dtype),
            key_for(0, Purpose.STEP)[None],
        )
    )

    def start_from(params: Params, seed: Any) -> TrainState:
        key = key_for(seed, Purpose.STEP)
        return init_state(params, tx, key, metrics, steps_per_epoch)

    def init(seed: Any) -> TrainState:
        return start_from(draw_params(key_for(seed, Purpose.INIT)), seed)

    chunk = make_train_chunk(train_step, steps_per_epoch, np.dtype(dtype))
    return Program(
        model, schedule, train_step, chunk, init, start_from, steps_per_epoch
    )
