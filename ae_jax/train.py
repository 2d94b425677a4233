"""Training: one state, one step, one loop.

Read :func:`make_train_step` first: it is the update rule. :func:`make_train_chunk`
repeats it on the device, :func:`fit` repeats that until the run is trained. All of the
state is one value of arrays, and it is all that a checkpoint needs: which images make
up step t, and every draw in it, follow from the seed and t alone.
"""

import enum
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt8, UInt32

from ae_jax import hosts
from ae_jax.config import TrainConfig
from ae_jax.losses import Objective, Params

CHUNK_S = 2.0
"""Seconds of work between two looks at signals and progress bar."""


class Purpose(enum.IntEnum):
    """What a draw is for; folded into the seed's key, so that no two draws share."""

    INIT = 0
    SHUFFLE = 1
    STEP = 2
    SAMPLES = 3


def key_for(seed: int | UInt32[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """The key of all draws of one purpose under one seed."""
    return jax.random.fold_in(jax.random.key(seed), purpose)


class TrainState(NamedTuple):
    """All that training changes, as arrays: a checkpoint of it is a checkpoint.

    Attributes:
        step: the number of updates applied.
        params: the model's parameters.
        opt_state: the optimiser's.
        key: key of the draws inside steps. It never advances: step t folds t into it.
        epoch_metrics: each metric of each step of the current epoch, by name; what
            lies at and after ``step % T`` is the previous epoch's.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    key: Key[Array, ""]
    epoch_metrics: dict[str, Float[Array, " T"]]


Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[
    [TrainState, Float[Array, "B D"], Float[Array, " B"]], tuple[TrainState, Metrics]
]


def make_schedule(config: TrainConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of each step: a linear rise, then constant or half a cosine."""
    peak, rise = config.learning_rate, config.warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, num_steps - rise))
    else:
        after = optax.constant_schedule(peak)
    if not rise:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, rise), after], [rise])


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam's direction, its bias correction exact to rounding in float32 too.

    Optax subtracts 1 − β^t; in float32 that has a relative error of up to 1e-5 while
    β^t is near 1. As −expm1(t log β) it costs the same, and a float32 run follows
    PyTorch's, which computes it in float64, for ten times as many steps.

    Args:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the denominator, outside the root.

    Returns:
        A transformation with the state of ``optax.scale_by_adam``.

    Source:
        Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015,
        algorithm 1; PyTorch ``optim.Adam``.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        zeros = [optax.tree.zeros_like(params) for _ in range(2)]
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), *zeros)

    def update(
        grads: optax.Updates, state: optax.ScaleByAdamState, params: object = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, b1, 1)
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)

        def direction(m: Array, v: Array) -> Array:
            t = count.astype(m.dtype)
            m_hat = m / -jnp.expm1(t * math.log(b1))
            v_hat = v / -jnp.expm1(t * math.log(b2))
            return m_hat / (jnp.sqrt(v_hat) + eps)

        updates = jax.tree.map(direction, mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_tx(
    config: TrainConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimiser: Adam; with weight decay AdamW; behind a clip if one is asked for.

    Source:
        PyTorch ``optim.Adam(lr)`` and ``optim.AdamW(lr, weight_decay=…)``, same
        defaults (β 0.9 and 0.999, ε 1e-8 outside the root).
    """
    decay, norm = config.weight_decay, config.clip_norm
    rate = optax.scale_by_learning_rate(schedule)
    decayed = [optax.add_decayed_weights(decay)] if decay else []
    tx = optax.chain(scale_by_adam(), *decayed, rate)
    return optax.chain(optax.clip_by_global_norm(norm), tx) if norm else tx


def make_train_step(
    objective: Objective, tx: optax.GradientTransformation
) -> TrainStep:
    """The update rule: one batch, one gradient, one step of the optimiser.

    Args:
        objective: what to minimise, of each example.
        tx: the optimiser.

    Returns:
        ``step(state, x [B, D], weight [B]) -> (state, metrics)``. An example of weight
        0 does not count, which is how the short last batch keeps the shape of the
        others: the loss is the mean over those that do count. The metrics are the
        batch's: ``loss``, ``grad_norm`` (before any clip) and the objective's own.
    """

    def train_step(
        state: TrainState, x: Float[Array, "B D"], weight: Float[Array, " B"]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def mean(per_example: Float[Array, " B"]) -> Float[Array, ""]:
            return jnp.sum(weight * per_example) / jnp.sum(weight)

        def batch_loss(params: Params) -> tuple[Float[Array, ""], Metrics]:
            per_example, metrics = objective(params, x, key)
            return mean(per_example), jax.tree.map(mean, metrics)

        grad_fn = jax.value_and_grad(batch_loss, has_aux=True)
        (loss, metrics), grads = grad_fn(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return train_step


def rows_of_split(
    images: UInt8[Array, "N D"], order: Int[Array, "T B"], i: Int[Array, ""]
) -> tuple[UInt8[Array, "B D"], Bool[Array, " B"]]:
    """Batch i of an epoch, out of the whole split, and which of its rows count."""
    rows = order[i]
    return images[rows], rows >= 0


def rows_of_block(
    images: UInt8[Array, "n B D"], counts: Bool[Array, "n B"], i: Int[Array, ""]
) -> tuple[UInt8[Array, "B D"], Bool[Array, " B"]]:
    """The same, where a block of n batches at a time is on the device."""
    i %= len(images)
    return images[i], counts[i]


def make_train_chunk(
    train_step: TrainStep, read: Callable[..., tuple[Array, Array]] = rows_of_split
) -> jax.stages.Wrapped:
    """Many steps in one program, with their images on the device.

    Args:
        train_step: the step.
        read: where a step finds its batch, :func:`rows_of_split` or
            :func:`rows_of_block`.

    Returns:
        ``chunk(state, images, order, stop) -> state``, jitted, its state donated: steps
        ``state.step`` up to ``stop`` of the epoch whose order [T, B] is given (see
        :func:`epoch_order`), with images [N, D]; or of a block of it. Bounds are
        traced, so any split of an epoch into chunks runs the same program and gives the
        same bits.
    """

    def chunk(
        state: TrainState, images: UInt8[Array, "..."], order: Array, stop: Array
    ) -> TrainState:
        like = state.epoch_metrics["loss"]

        def body(_: Array, state: TrainState) -> TrainState:
            i = state.step % len(like)
            x, counts = read(images, order, i)
            scaled = x.astype(like.dtype) / 255
            state, metrics = train_step(state, scaled, counts.astype(like.dtype))
            written = {
                name: values.at[i].set(metrics[name])
                for name, values in state.epoch_metrics.items()
            }
            return state._replace(epoch_metrics=written)

        after: TrainState = jax.lax.fori_loop(state.step, stop, body, state)
        return after

    return jax.jit(chunk, donate_argnums=0)


def make_runner(
    advance: Callable[..., TrainState], state: TrainState, *inputs: Any
) -> Callable[[int], None]:
    """Goes on by so many steps with each call, and waits for them: for stopwatches.

    Args:
        advance: a train chunk, of one run or of many members.
        state: where to begin; donated.
        inputs: the chunk's images and order.
    """
    step = int(state.step)

    def run(num_steps: int) -> None:
        nonlocal state, step
        step += num_steps
        state = jax.block_until_ready(advance(state, *inputs, step))

    return run


MEMBERS = TrainState(step=None, params=0, opt_state=0, key=0, epoch_metrics=0)  # type: ignore[arg-type]
"""Axes of the states of many seeds in one: they share the step, and nothing else."""


def members_mesh(num_members: int) -> Mesh:
    """The devices over which so many members are spread: as many as do it evenly."""
    devices = jax.local_devices()
    even = [n for n in range(1, len(devices) + 1) if num_members % n == 0]
    return Mesh(np.array(devices[: even[-1]]), ("seed",))


def over_members(
    function: Callable[..., Any], mesh: Mesh, in_axes: Any, out_axes: Any = 0
) -> Callable[..., Any]:
    """What a function does for one member, for many side by side, in one program.

    Within a device they are one by vmap; over the devices they are apart by shard_map,
    so that none waits for another.

    Args:
        function: of one member.
        mesh: see :func:`members_mesh`; the devices divide the members evenly.
        in_axes: of each argument, or of parts of it, 0 where each member has its own,
            None where they share it; as for ``jax.vmap``.
        out_axes: the same, of what is returned.
    """
    specs = [
        jax.tree.map(lambda sharding: sharding.spec, spread(mesh, axes))
        for axes in (in_axes, out_axes)
    ]
    members = jax.vmap(function, in_axes, out_axes)
    return jax.shard_map(members, mesh=mesh, in_specs=specs[0], out_specs=specs[1])


def spread(mesh: Mesh, axes: Any) -> Any:
    """Where arrays with such axes lie: 0 with their members, None on every device."""

    def sharding(axis: int | None) -> NamedSharding:
        spec = PartitionSpec() if axis is None else PartitionSpec("seed")
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, axes, is_leaf=lambda axis: axis is None)


def make_members_chunk(train_step: TrainStep, mesh: Mesh) -> jax.stages.Wrapped:
    """A train chunk of many seeds at once, in one program.

    Args:
        train_step: of one member.
        mesh: see :func:`members_mesh`.

    Returns:
        ``chunk(states, images [N, D], order [S, T, B], stop) -> states``, jitted, the
        states donated: what :func:`make_train_chunk`'s does, for each member with the
        epoch's order of its own seed.
    """
    chunk = make_train_chunk(train_step)
    members = over_members(chunk, mesh, (MEMBERS, None, 0, None), MEMBERS)
    # Said, lest the states come out placed alike but named otherwise: a second program.
    return jax.jit(members, donate_argnums=0, out_shardings=spread(mesh, MEMBERS))


def epoch_order(
    key: Key[Array, ""],
    epoch: int | Int[Array, ""],
    num_examples: int,
    batch_size: int,
) -> Int[Array, "T B"]:
    """Which images make up each batch of an epoch.

    Args:
        key: ``key_for(seed, Purpose.SHUFFLE)``.
        epoch: counted from 0.
        num_examples: N.
        batch_size: B.

    Returns:
        Row numbers, each of 0 … N-1 once; the last batch is filled up with -1.
    """
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    order = jnp.pad(order, (0, -num_examples % batch_size), constant_values=-1)
    return order.reshape(-1, batch_size).astype(jnp.int32)


def init_state(
    init_params: Callable[[Key[Array, ""]], Params],
    tx: optax.GradientTransformation,
    train_step: TrainStep,
    seed: int | UInt32[Array, ""],
    batches: tuple[int, int, int],
) -> TrainState:
    """The state before the first step.

    Args:
        init_params: draws the parameters from a key.
        tx: the optimiser.
        train_step: the step that the state is for; it tells the metrics' names.
        seed: of all draws.
        batches: (T, B, D): steps per epoch, batch size, pixels.
    """
    num_steps, batch_size, num_pixels = batches

    def init() -> TrainState:
        params = init_params(key_for(seed, Purpose.INIT))
        dtype = jax.tree.leaves(params)[0].dtype
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            key=key_for(seed, Purpose.STEP),
            epoch_metrics={},
        )
        x = jax.ShapeDtypeStruct((batch_size, num_pixels), dtype)
        weight = jax.ShapeDtypeStruct((batch_size,), dtype)
        _, metrics = jax.eval_shape(train_step, state, x, weight)
        zeros = {name: jnp.zeros(num_steps, dtype) for name in metrics}
        return state._replace(epoch_metrics=zeros)

    # One program, and not a hundred small ones: 2 s against 4 s.
    state: TrainState = jax.jit(init)()
    return state


def fit(
    state: TrainState,
    advance: Callable[[TrainState, int, int], TrainState],
    until_step: int,
    save_every: int,
    on_chunk: Callable[[TrainState, int, float], bool],
) -> TrainState:
    """Train until a step is reached: the only loop.

    It starts wherever ``state.step`` stands, and ends each chunk at the end of an
    epoch, at a multiple of ``save_every``, or after about ``CHUNK_S`` seconds.

    Args:
        state: where to start; donated.
        advance: ``(state, step, stop) -> state``, a train chunk that finds its images;
            the steps are of one epoch.
        until_step: where to end.
        save_every: steps between forced ends of a chunk; 0: none.
        on_chunk: ``(state, step, seconds) -> go on?`` after each chunk. It may read the
            state, not keep it.

    Returns:
        The state at ``until_step``, or where ``on_chunk`` answered no.
    """
    steps_per_epoch = state.epoch_metrics["loss"].shape[-1]
    step, planned = int(state.step), 1
    while step < until_step:
        save_at = (step // save_every + 1) * save_every if save_every else until_step
        epoch_end = (step // steps_per_epoch + 1) * steps_per_epoch
        stop = min(until_step, epoch_end, save_at, step + planned)
        start = time.perf_counter()
        state = jax.block_until_ready(advance(state, step, stop))
        # By one clock, so that all processes plan the same chunks.
        seconds = hosts.from_first(time.perf_counter() - start)
        planned = max(1, int(CHUNK_S * (stop - step) / seconds))
        step = stop
        if not on_chunk(state, step, seconds):
            break
    return state
