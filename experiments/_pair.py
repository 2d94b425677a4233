"""Our training and PyTorch's of one config, side by side, for compare_pytorch.

Both are what everyone trains with: our train step, chunk and batch order, and the
baseline's model and loop.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jaxtyping import Array, Float, Int, UInt8

from ae_jax import devices, weights
from ae_jax.config import TrainConfig
from ae_jax.data import Dataset
from ae_jax.keys import Purpose, key_for
from ae_jax.objectives import Reconstruction, batched
from ae_jax.parity import lockstep
from ae_jax.parity.lockstep import Snapshot
from ae_jax.runs.program import Program, build
from ae_jax.runs.run import in_blocks, method_of
from ae_jax.train import (
    Block,
    Params,
    TrainState,
    batch_indices,
    make_train_chunk,
    scale,
)
from ae_jax.weights import Precision, StateDict
from experiments import pytorch_baseline as baseline

Row = dict[str, Any]
Images = UInt8[np.ndarray, "N H W C"]
TrainStep = Callable[..., Any]
Orders = Iterable[Int[np.ndarray, "T B"]]


@contextlib.contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Both sides in ``float32`` or ``float64``; as they were afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        with devices.numerics(name):
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Pair:
    """Both sides of one config, on one data set.

    The counterpart is PyTorch's net, called with D, ``hidden`` and ``latent_dim``;
    ``to_torch`` makes its state dict of our parameters, and of Adam's moments.
    """

    model: Any
    train: TrainConfig
    dataset: Dataset
    counterpart: Callable[..., torch.nn.Module] = baseline.Autoencoder
    to_torch: Callable[[Params], StateDict] = weights.to_torch

    def ours(self, images: Images, number_format: Precision = "float32") -> Program:
        """Our side, for training on some images."""
        train = dataclasses.replace(self.train, precision=number_format)
        shape = images.shape[1:]
        return build(self.model, Reconstruction(), train, len(images), shape)

    def first_state(self, ours: Program) -> TrainState:
        """Our state before the first step, of the config's seed."""
        state: TrainState = jax.jit(ours.init)(jnp.uint32(self.train.seed))
        return state

    def orders(self, images: Images, num_epochs: int) -> list[np.ndarray]:
        """Our orders [T, B] of the first epochs."""
        key, size = key_for(self.train.seed, Purpose.SHUFFLE), self.train.batch_size
        orders = [batch_indices(key, e, len(images), size) for e in range(num_epochs)]
        return [np.asarray(order) for order in orders]

    def theirs(self, params: Params) -> Any:
        """PyTorch's model with our parameters."""
        num_pixels = int(np.prod(self.dataset.shape))
        model = self.counterpart(num_pixels, self.model.hidden, self.model.latent_dim)
        arrays = self.to_torch(params).items()
        model.load_state_dict({name: torch.from_numpy(a) for name, a in arrays})
        return model

    def adam(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """PyTorch's optimiser of a model."""
        return torch.optim.Adam(model.parameters(), lr=self.train.learning_rate)

    def our_epochs(
        self, train_step: TrainStep, state: TrainState, images: Images, orders: Orders
    ) -> Iterator[Snapshot]:
        """Train our side for an epoch by each order [T, B], in train chunks.

        The state is left as it is: a copy is trained.
        """
        dtype = jax.tree.leaves(state.params)[0].dtype
        state = jax.tree.map(lambda leaf: leaf.copy(), state)
        orders, step = list(orders), 0
        chunk = devices.jit_chunk(make_train_chunk(train_step, len(orders[0]), dtype))
        for order in orders:
            block = Block(images, order, step, step + len(order))
            step += len(order)
            state = chunk(state, block, step)
            mu, nu = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
            losses = np.array(state.epoch_metrics["mse"])[: len(order)]
            yield Snapshot(losses, *map(self.to_torch, (state.params, mu, nu)))


def their_epochs(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    orders: Orders,
) -> Iterator[Snapshot]:
    """Train PyTorch's side on the same batches, in place."""
    stored, parameters = torch.from_numpy(images), dict(model.named_parameters())
    for order in orders:
        rows = [torch.from_numpy(batch[batch >= 0]) for batch in order]
        losses = [
            baseline.train_epoch(model, optimizer, [batch])[0]
            for batch in baseline.scaled_batches(stored, rows)
        ]
        moments = {name: optimizer.state[p] for name, p in parameters.items()}
        yield Snapshot(
            np.array(losses),
            baseline.to_numpy(parameters.items()),
            *(
                baseline.to_numpy((name, of[moment]) for name, of in moments.items())
                for moment in ("exp_avg", "exp_avg_sq")
            ),
        )


# --- Weights, forward, gradient ------------------------------------------------------


def compare_layers(pair: Pair, number_format: Precision) -> Row:
    """One batch through both sides, layer by layer, forwards and backwards.

    Returns:
        ``exact``: whether our weights come back from PyTorch's model to the bit;
        ``forward``, of the output of each layer, and ``gradient``, of each tensor: by
        name, the largest and the norm-relative difference.
    """
    batch = pair.dataset.train.images[: pair.train.batch_size]
    with precision(number_format):
        ours = pair.ours(batch, number_format)
        params = jax.device_get(pair.first_state(ours).params)
        model = pair.theirs(params)
        back = weights.to_linen(baseline.to_numpy(model.state_dict().items()))
        same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), params, back)
        x = scale(batch, np.dtype(number_format))
        a, b = our_layers(ours.model, params, x), their_layers(model, x)
    return {
        "exact": jax.tree.all(same),
        "forward": lockstep.compare_arrays(a[0], b[0]),
        "gradient": lockstep.compare_arrays(a[1], b[1]),
    }


def our_layers(
    net: nn.Module, params: Params, x: Float[np.ndarray, "B H W C"]
) -> tuple[StateDict, StateDict]:
    """Each layer's output before its activation, and each tensor's gradient."""
    losses = batched(Reconstruction(), net)
    keys = jax.random.split(jax.random.key(0), len(x))

    def loss(params: Params, x: Array) -> Float[Array, ""]:
        return jnp.mean(losses(params, x, keys)["mse"])

    def forward(params: Params, x: Array) -> Any:
        return net.apply({"params": params}, x, capture_intermediates=True)[1]

    outputs = jax.jit(forward)(params, x)["intermediates"]
    layers = {name: np.asarray(outputs[name]["__call__"][0]) for name in params}
    return layers, weights.to_torch(jax.jit(jax.grad(loss))(params, x))


def their_layers(
    model: baseline.Autoencoder, x: Float[np.ndarray, "B H W C"]
) -> tuple[StateDict, StateDict]:
    """What :func:`our_layers` gives, of PyTorch's model; layers by our names."""
    layers: StateDict = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: torch.Tensor) -> None:
            layers[name] = output.detach().numpy()

        return hook

    for part in ("encoder", "decoder"):
        for i, layer in enumerate(getattr(model, part)[::2]):
            layer.register_forward_hook(keep(f"{part}_{i}"))
    pixels = torch.from_numpy(x).flatten(1)
    torch.nn.MSELoss()(model(pixels), pixels).backward()
    return layers, baseline.to_numpy(
        (name, p.grad) for name, p in model.named_parameters() if p.grad is not None
    )


# --- Lockstep, drift -----------------------------------------------------------------

MINI_EPOCHS = 3


def mini_images(pair: Pair) -> Images:
    """Training images of three and a half batches: the last one is short."""
    size = pair.train.batch_size
    images: np.ndarray = pair.dataset.train.images[: 3 * size + size // 2]
    return images


def follow(pair: Pair, images: Images, num_epochs: int) -> list[Row]:
    """Both sides in float64 from our weights, through our batches.

    Returns:
        After each epoch the ``step``, :func:`lockstep.differences`, and the test MSE of
        both sides.
    """
    rows, seed, test = [], pair.train.seed, pair.dataset.test.images
    # The seed's draw in float32, whose run is known to keep its latent units alive: one
    # that collapses trains half of the network only, and would prove half as much.
    start = jax.device_get(pair.first_state(pair.ours(images)).params)
    with precision("float64"):
        ours = pair.ours(images, "float64")
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, np.float64), start)
        state = ours.start_from(params, seed)
        model = pair.theirs(params)
        orders = pair.orders(images, num_epochs)
        reconstruct = jax.jit(method_of(ours.model, "__call__"))
        sides = zip(
            pair.our_epochs(ours.train_step, state, images, orders),
            their_epochs(model, pair.adam(model), images, orders),
            strict=True,
        )
        for epoch, (a, b) in enumerate(sides, start=1):
            recon = in_blocks(reconstruct, weights.to_linen(a.params), test)
            rows.append(
                {
                    "step": epoch * ours.steps_per_epoch,
                    **lockstep.differences(a, b),
                    "ours/test/mse": mse(recon, test),
                    "theirs/test/mse": mse(baseline.apply(model, test), test),
                }
            )
    return rows


def mse(recon: Float[np.ndarray, "N ..."], images: Images) -> float:
    """The mean over all pixels of all images."""
    target = scale(images, recon.dtype).reshape(recon.shape)
    return float(np.mean(np.square(recon - target), dtype=np.float64))


def measure_drift(pair: Pair, num_steps: int) -> dict[str, list[float]]:
    """Relative difference of each batch's loss, of pairs of runs in float32.

    Returns:
        By name: ours beside PyTorch; and, as the yardstick, PyTorch on two threads
        beside itself on one.
    """
    images = pair.dataset.train.images
    ours = pair.ours(images)
    state = pair.first_state(ours)
    order = pair.orders(images, 1)[0][:num_steps]

    def theirs(num_threads: int) -> Float[np.ndarray, " T"]:
        torch.set_num_threads(num_threads)
        model = pair.theirs(state.params)
        snapshot = next(their_epochs(model, pair.adam(model), images, [order]))
        torch.set_num_threads(1)
        return snapshot.losses

    with precision("float32"):
        losses = next(pair.our_epochs(ours.train_step, state, images, [order])).losses
    reference = theirs(1)
    runs = {"ours": losses, "threads": theirs(2)}
    return {
        name: lockstep.relative_losses(values, reference).tolist()
        for name, values in runs.items()
    }
