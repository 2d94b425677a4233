"""Training: one state, one step, one loop.

Read :func:`make_train_step` first: it is the update rule. :func:`make_train_chunk`
repeats it on the device, :func:`fit` repeats that until the run is trained. The state
is one value of arrays, all that a checkpoint needs: which images make up step t, and
every draw in it, follow from two keys and t alone.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8

CHUNK_S = 2.0  # of work between two looks at signals and progress bar
SHIFT = 2**31  # folded into an image's key; objectives fold in small numbers

Params = Any
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """All that training changes, as arrays: a checkpoint of it is a checkpoint."""

    step: Int[Array, ""]
    """The number of updates applied."""
    params: Params
    opt_state: optax.OptState
    key: Key[Array, ""]
    """Of the draws inside steps. It never advances: step t folds t into it."""
    epoch_metrics: dict[str, Float[Array, " T"]]
    """Of each step of the epoch; from ``step % T`` on it is the previous epoch's."""


class Block(NamedTuple):
    """Consecutive batches of one epoch: what a train chunk is fed."""

    images: UInt8[Any, "M H W C"]
    """Stored pixels, of the whole split or just of what the batches need."""
    rows: Int[Any, "*S n B"]
    """Which of them make up each batch; -1 fills up the last one."""
    first_step: int | Int[Array, ""]
    end_step: int | Int[Array, ""]
    """The step after the last batch; what the rows hold beyond is padding."""


def make_optimizer(
    options: Any, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam or AdamW, behind a clip if there is a ``clip_norm``; and its schedule.

    ``options`` has learning_rate, schedule (``constant`` or ``cosine``, which ends at 0
    after ``num_steps``), warmup_steps, weight_decay and clip_norm (or None).

    Source:
        PyTorch ``optim.Adam(lr)`` and ``optim.AdamW(lr, weight_decay=…)``, same
        defaults (β 0.9 and 0.999, ε 1e-8 outside the root).
    """
    peak, rise = options.learning_rate, options.warmup_steps
    schedule = optax.constant_schedule(peak)
    if options.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(peak, max(1, num_steps - rise))
    if rise:
        warmup = optax.linear_schedule(0.0, peak, rise)
        schedule = optax.join_schedules([warmup, schedule], [rise])
    decay, norm = options.weight_decay, options.clip_norm
    tx = optax.adamw(schedule, weight_decay=decay) if decay else optax.adam(schedule)
    return (optax.chain(optax.clip_by_global_norm(norm), tx) if norm else tx), schedule


def shift_randomly(
    x: Float[Array, "H W C"], key: Key[Array, ""], most: int
) -> Float[Array, "H W C"]:
    """An image shifted by up to ``most`` pixels each way; what comes in is its edge."""
    padded = jnp.pad(x, ((most, most), (most, most), (0, 0)), mode="edge")
    own = jax.random.fold_in(key, SHIFT)
    row, column = jax.random.randint(own, (2,), 0, 2 * most + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), x.shape)


def make_train_step(
    losses: Callable[..., dict[str, Float[Array, " B"]]],
    loss_name: str,
    tx: optax.GradientTransformation,
    shift: int = 0,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update rule: one batch, one gradient, one step of the optimiser.

    ``losses(params, x [B, H, W, C], keys [B])`` are the losses of each image by name,
    of which that of ``loss_name`` is minimised. Each image is first shifted by up to
    ``shift`` pixels, at random.

    Returns:
        ``step(state, x, weight [B]) -> (state, metrics)``. An image of weight 0 does
        not count, which is how the short last batch keeps the shape of the others. The
        metrics are the means over those that do, and ``grad_norm``, before any clip.
        The image at position b of step t draws from ``fold_in(fold_in(key, t), b)``.
    """

    def train_step(
        state: TrainState, x: Float[Array, "B H W C"], weight: Float[Array, " B"]
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(x)))
        if shift:
            x = jax.vmap(shift_randomly, (0, 0, None))(x, keys, shift)

        def batch_loss(params: Params) -> tuple[Float[Array, ""], Metrics]:
            means = {
                name: jnp.sum(weight * values) / jnp.sum(weight)
                for name, values in losses(params, x, keys).items()
            }
            return means[loss_name], means

        grads, metrics = jax.grad(batch_loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, metrics

    return train_step


def scale(images: Shaped[Any, "*B H W C"], dtype: Any) -> Float[Any, "*B H W C"]:
    """Stored pixels, 0 to 255, as floats in [0, 1]; of JAX or of NumPy."""
    return images.astype(dtype) / 255


def make_train_chunk(
    train_step: Callable[..., tuple[TrainState, Metrics]],
    steps_per_epoch: int,
    dtype: Any,
) -> Callable[[TrainState, Block, Any], TrainState]:
    """Many steps in one program, with their images on the device.

    Returns:
        ``chunk(state, block, stop) -> state`` does steps ``state.step`` up to ``stop``,
        all in the block, pixels of ``dtype``; to be jitted, its state donated. Bounds
        are traced: any split of an epoch runs the same program and gives the same bits.
    """

    def chunk(state: TrainState, block: Block, stop: Any) -> TrainState:
        def body(step: Array, state: TrainState) -> TrainState:
            rows, i = block.rows[step - block.first_step], step % steps_per_epoch
            x = scale(block.images[rows], dtype)
            state, metrics = train_step(state, x, (rows >= 0).astype(dtype))
            logged = state.epoch_metrics
            logged = {name: logged[name].at[i].set(metrics[name]) for name in logged}
            return state._replace(epoch_metrics=logged)

        return jax.lax.fori_loop(state.step, stop, body, state)

    return chunk


def batch_indices(
    key: Key[Array, ""], epoch: int | Int[Array, ""], num_images: int, batch_size: int
) -> Int[Array, "T B"]:
    """Rows of each batch of an epoch, from 0: each image once, then -1 to fill up."""
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_images)
    order = jnp.pad(order, (0, -num_images % batch_size), constant_values=-1)
    return order.reshape(-1, batch_size).astype(jnp.int32)


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    key: Key[Array, ""],
    metrics: Iterable[str],
    steps_per_epoch: int,
) -> TrainState:
    """The state before the first step; ``metrics`` are the names of a step's."""
    dtype, names = jax.tree.leaves(params)[0].dtype, (*metrics, "grad_norm")
    epoch_metrics = {name: jnp.zeros(steps_per_epoch, dtype) for name in names}
    return TrainState(jnp.int32(0), params, tx.init(params), key, epoch_metrics)


class Plan(NamedTuple):
    """How far to train, and where to pause."""

    until_step: int
    save_every: int = 0
    """Steps between forced pauses; 0: none."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds; of several processes the same one's, so that all pause alike."""


def fit(
    state: TrainState,
    chunk: Callable[[TrainState, Block, int], TrainState],
    block_at: Callable[[int], Block],
    plan: Plan,
    on_chunk: Callable[[TrainState, int, float], bool],
) -> TrainState:
    """Train until a step is reached: the only loop.

    It starts wherever ``state.step`` stands, and ends each chunk at the end of a block,
    at a multiple of ``save_every``, or after about ``CHUNK_S`` seconds. Then
    ``on_chunk(state, step, seconds)``, which must not keep the state, returns whether
    to continue.
    """
    step, planned, going = int(state.step), 1, True
    while going and step < plan.until_step:
        start, every = plan.clock(), plan.save_every
        block = block_at(step)
        save_at = (step // every + 1) * every if every else plan.until_step
        stop = min(plan.until_step, int(block.end_step), save_at, step + planned)
        state = jax.block_until_ready(chunk(state, block, stop))
        seconds = plan.clock() - start
        planned = max(1, int(CHUNK_S * (stop - step) / seconds))
        step, going = stop, on_chunk(state, stop, seconds)
    return state
