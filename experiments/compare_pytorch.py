"""Our training against PyTorch's: the same numbers, the same distribution, what speed?

Weights both ways; both sides in lockstep from the same weights and batches, in float64
until rounding grows visible and in float32 until it takes over; many seeds a side, each
with draws of its own; time and memory. The outcome is ``report.html`` in the run
folder, and ``parity.json``. What is finished is kept, and the same command goes on.

Expect a difference of 1e-16 after 12 steps in float64, 1e-14 after an epoch, 1e-11 to
1e-9 after ten, and in the seeds' distributions none. About half an hour on two cores;
the preset ``quick`` takes two to three minutes.
"""
# ruff: noqa: E402 - options are parsed before JAX and PyTorch, which take seconds

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ae_jax import cli
from ae_jax.config import Config, TrainConfig, UserError, flatten, to_json

NAME = "compare_pytorch"

TUTORIAL = {
    "data.num_validation": 0,
    "data.streaming": False,
    "model.name": "autoencoder",
    "model.code_activation": "relu",
    "model.init": "torch",
    "train.loss": "mse",
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "train.weight_decay": 0.0,
    "train.clip_norm": None,
    "train.patience": None,
    "train.precision": "float32",
}
"""What the PyTorch side does, and has no option for."""


@dataclass(frozen=True)
class Comparison(Config):
    """What is compared: a run's config, and how much of each part."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """Of every seed's run; num_epochs is that of the distributions."""
    lockstep_epochs: int = 10
    """Epochs in which both sides are followed in float64."""
    drift_steps: int = 938
    """Steps in which they are followed in float32, an epoch's at most."""
    num_seeds: int = 32
    """Seeds a side, from 0 on, for the distributions."""
    seeds_at_once: int = 8
    """Seeds that are one program on our side."""
    margin: float = 0.03
    """Relative difference in mean test MSE that counts as none."""
    speed_rounds: int = 3
    """Rounds in which the speeds are measured, one after the other."""
    speed_steps: int = 938
    """Steps that each takes in a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for own in dataclasses.fields(Comparison):
            value = getattr(self, own.name)
            if own.type in (int, float) and not value > 0:
                raise ValueError(f"{own.name}: must be above 0, got {value}")
        values = flatten(to_json(self))
        for name, wanted in TUTORIAL.items():
            if values[name] != wanted:
                raise ValueError(
                    f"{name}: must be {wanted}, as in the tutorial in PyTorch, got "
                    f"{values[name]}"
                )


PRESETS = {
    "reference": Comparison(),
    "quick": Comparison(
        train=TrainConfig(num_epochs=1),
        lockstep_epochs=1,
        drift_steps=200,
        num_seeds=4,
        seeds_at_once=4,
        speed_rounds=2,
        speed_steps=100,
    ),
}


def main(config: Comparison) -> None:
    """Import this file as a module, which loads JAX and PyTorch, and compare."""
    import experiments.pytorch_baseline  # noqa: F401 - says it if there is no PyTorch
    from experiments import compare_pytorch

    compare_pytorch.compare(config)


if __name__ == "__main__":
    cli.run_experiment(NAME, PRESETS, __doc__, main)  # does not return

import contextlib
import functools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jaxtyping import Array, Float, UInt8

from ae_jax import config as configs
from ae_jax import (
    data,
    ensemble,
    evaluate,
    interop,
    losses,
    parity,
    records,
    report,
    run,
)
from ae_jax.interop import StateDict
from ae_jax.parity import Snapshot
from ae_jax.records import Row
from ae_jax.train import (
    Purpose,
    TrainState,
    TrainStep,
    key_for,
    make_runner,
    make_train_chunk,
    make_train_step,
)
from experiments import pytorch_baseline as baseline

ROOT = Path(__file__).resolve().parent.parent

Precision = Literal["float32", "float64"]

# --- The two sides -------------------------------------------------------------------


@contextlib.contextmanager
def precision(name: Precision) -> Iterator[None]:
    """Both sides in ``float32`` or ``float64``; in float32 again afterwards."""
    try:
        jax.config.update("jax_enable_x64", name == "float64")
        torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        jax.config.update("jax_enable_x64", False)
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Pair:
    """Both sides of one config, on one data set.

    Attributes:
        config: of both.
        dataset: of both.
    """

    config: Comparison
    dataset: data.Dataset

    def ours(
        self, number_format: Precision = "float32", images: np.ndarray | None = None
    ) -> run.Program:
        """Our side's program, for the training split or other images [N, D]."""
        train = dataclasses.replace(self.config.train, precision=number_format)
        model, cache = self.config.model, self.config.compilation_cache
        settings = Config(model=model, train=train, compilation_cache=cache)
        shape = (self.dataset.train.images if images is None else images).shape
        return run.build(settings, *shape)

    def theirs(self, weights: StateDict | None = None) -> baseline.Autoencoder:
        """PyTorch's model with these weights, or with its own draw of them."""
        sizes = self.config.model.hidden, self.config.model.code_width
        model = baseline.Autoencoder(self.dataset.train.images.shape[1], *sizes)
        if weights is not None:
            tensors = {name: torch.from_numpy(a) for name, a in weights.items()}
            model.load_state_dict(tensors)
        return model

    def adam(
        self, model: torch.nn.Module, fused: bool | None = None
    ) -> torch.optim.Optimizer:
        """PyTorch's optimiser of a model; None lets PyTorch choose the variant."""
        rate = self.config.train.learning_rate
        return torch.optim.Adam(model.parameters(), lr=rate, fused=fused)

    def shuffle(self, program: run.Program, epoch: int) -> np.ndarray:
        """The order [T, B] of an epoch, counted from 0, filled up with -1."""
        key = key_for(self.config.train.seed, Purpose.SHUFFLE)
        return np.asarray(program.order(key, epoch))


def our_epochs(
    train_step: TrainStep,
    state: TrainState,
    images: UInt8[np.ndarray, "N D"],
    orders: Iterable[np.ndarray],
) -> Iterator[Snapshot]:
    """Train our side for an epoch by each order [T, B], in train chunks.

    The state is left as it is: a copy is trained.
    """
    chunk, step = make_train_chunk(train_step), 0
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    for order in orders:
        step += len(order)
        state = chunk(state, images, order, step)
        mu, nu = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
        yield Snapshot(
            np.array(state.epoch_metrics["loss"])[: len(order)],
            *map(interop.to_torch, (state.params, mu, nu)),
        )


def their_epochs(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    images: UInt8[np.ndarray, "N D"],
    orders: Iterable[np.ndarray],
) -> Iterator[Snapshot]:
    """Train PyTorch's side on the same batches, in place."""
    stored, criterion = torch.from_numpy(images), torch.nn.MSELoss()
    parameters = dict(model.named_parameters())

    def arrays(tensors: Iterable[torch.Tensor]) -> StateDict:
        return {
            name: tensor.detach().numpy().copy()
            for name, tensor in zip(parameters, tensors, strict=True)
        }

    for order in orders:
        rows = [torch.from_numpy(batch[batch >= 0]) for batch in order]
        values = [
            baseline.train_epoch(model, optimizer, [batch], criterion)[0]
            for batch in baseline.scaled_batches(stored, rows)
        ]
        moments = [optimizer.state[tensor] for tensor in parameters.values()]
        yield Snapshot(
            np.array(values),
            arrays(parameters.values()),
            arrays(moment["exp_avg"] for moment in moments),
            arrays(moment["exp_avg_sq"] for moment in moments),
        )


# --- a. Weights, forward, gradient ---------------------------------------------------


def compare_layers(pair: Pair, number_format: Precision) -> dict[str, Any]:
    """One batch through both sides, layer by layer, forwards and backwards.

    Returns:
        ``exact``: whether our weights come back from PyTorch's model to the bit;
        ``forward``, of the output of each layer, and ``gradient``, of each tensor: by
        name, the largest and the norm-relative difference.
    """
    with precision(number_format):
        program = pair.ours(number_format)
        params = jax.device_get(program.init().params)
        model = pair.theirs(interop.to_torch(params))
        back = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        batch = pair.dataset.train.images[: pair.config.train.batch_size]
        x = run.scale(batch, np.dtype(number_format))
        ours, theirs = our_layers(program, params, x), their_layers(model, x)
    return {
        "exact": same_bits(params, interop.to_linen(back)),
        "forward": compare_arrays(ours[0], theirs[0]),
        "gradient": compare_arrays(ours[1], theirs[1]),
    }


def same_bits(ours: losses.Params, theirs: losses.Params) -> bool:
    """Whether two trees of arrays are equal in every bit, number formats included."""
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and (a == b).all(), ours, theirs
    )
    return all(jax.tree.leaves(same))


def compare_arrays(ours: StateDict, theirs: StateDict) -> list[Row]:
    """Of each array its name, the largest and the norm-relative difference."""
    pairs = {name: ({"": ours[name]}, {"": b}) for name, b in theirs.items()}
    return [
        {"name": n, "abs": parity.largest(*p), "nrel": parity.norm_relative(*p)}
        for n, p in pairs.items()
    ]


def our_layers(
    program: run.Program, params: losses.Params, x: Float[np.ndarray, "B D"]
) -> tuple[StateDict, StateDict]:
    """Each layer's output before its activation, and each tensor's gradient."""
    objective = losses.make_reconstruction(program.model, losses.squared_error)

    def loss(params: losses.Params, x: Array) -> Array:
        return jnp.mean(objective(params, x, jax.random.key(0))[0])

    @jax.jit
    def forward(params: losses.Params, x: Array) -> Any:
        variables = {"params": params}
        return program.model.apply(variables, x, capture_intermediates=True)[1]

    outputs = forward(params, x)["intermediates"]
    layers = {name: np.asarray(outputs[name]["__call__"][0]) for name in params}
    return layers, interop.to_torch(jax.jit(jax.grad(loss))(params, x))


def their_layers(
    model: baseline.Autoencoder, x: Float[np.ndarray, "B D"]
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
    pixels = torch.from_numpy(x)
    torch.nn.MSELoss()(model(pixels), pixels).backward()
    gradients = {
        name: tensor.grad.numpy()
        for name, tensor in model.named_parameters()
        if tensor.grad is not None
    }
    return layers, gradients


# --- b. Lockstep, c. Drift -----------------------------------------------------------

LIMITS = {"mini": 1e-10, "epoch": 1e-12, "end": 1e-6}
"""Largest difference allowed: of any entry on the mini set; relative to the norm of all
parameters after an epoch, and after up to ten."""

MINI_EPOCHS = 3


def mini_images(pair: Pair) -> UInt8[np.ndarray, "N D"]:
    """Training images of three and a half batches: the last one is short."""
    size = pair.config.train.batch_size
    images: np.ndarray = pair.dataset.train.images[: 3 * size + size // 2]
    return images


def follow(pair: Pair, images: UInt8[np.ndarray, "N D"], num_epochs: int) -> list[Row]:
    """Both sides in float64 from our weights, through our batches.

    Returns:
        After each epoch the ``step``, :func:`parity.differences`, and the test MSE of
        both sides.
    """
    rows = []
    # The seed's draw in float32, whose run is known to keep its code units alive: one
    # that collapses trains half of the network only, and would prove half as much.
    start = jax.device_get(pair.ours("float32", images).init().params)
    with precision("float64"):
        program = pair.ours("float64", images)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, np.float64), start)
        state = program.init()._replace(params=params)
        model = pair.theirs(interop.to_torch(state.params))
        orders = [pair.shuffle(program, epoch) for epoch in range(num_epochs)]
        sides = zip(
            our_epochs(program.train_step, state, images, orders),
            their_epochs(model, pair.adam(model), images, orders),
            strict=True,
        )
        test = pair.dataset.test.images
        for epoch, (ours, theirs) in enumerate(sides, start=1):
            weights = interop.to_linen(ours.params)
            recons = {
                "ours": run.in_blocks(program.reconstruct, weights, test),
                "theirs": baseline.apply(model, test),
            }
            rows.append(
                {
                    "step": epoch * program.steps_per_epoch,
                    **parity.differences(ours, theirs),
                    **{f"{side}/test/mse": mse(r, test) for side, r in recons.items()},
                }
            )
    return rows


def mse(recon: Float[np.ndarray, "N D"], images: UInt8[np.ndarray, "N D"]) -> float:
    """The mean over all pixels of all images."""
    target = run.scale(images, recon.dtype)
    return float(evaluate.squared_error(recon, target).mean())


def measure_drift(pair: Pair) -> dict[str, list[float]]:
    """Relative difference of each batch's loss, of pairs of runs in float32.

    Returns:
        By name: ours beside PyTorch; ours with Optax's own bias correction beside it;
        and, as the yardstick, PyTorch on two threads beside itself on one.
    """
    program, images = pair.ours(), pair.dataset.train.images
    state = program.init()
    weights = interop.to_torch(state.params)
    order = pair.shuffle(program, 0)[: pair.config.drift_steps]

    def ours(train_step: TrainStep) -> Float[np.ndarray, " T"]:
        return next(our_epochs(train_step, state, images, [order])).losses

    def theirs(num_threads: int) -> Float[np.ndarray, " T"]:
        torch.set_num_threads(num_threads)
        model = pair.theirs(weights)
        snapshot = next(their_epochs(model, pair.adam(model), images, [order]))
        torch.set_num_threads(1)
        return snapshot.losses

    objective = losses.make_reconstruction(program.model, losses.squared_error)
    optax_step = make_train_step(objective, optax.adam(program.schedule))
    reference = theirs(1)
    runs = {
        "ours": ours(program.train_step),
        "optax": ours(optax_step),
        "threads": theirs(2),
    }
    return {
        name: parity.relative_losses(values, reference).tolist()
        for name, values in runs.items()
    }


# --- d. Distributions ----------------------------------------------------------------


def score(recon: np.ndarray, codes: np.ndarray, images: np.ndarray) -> Row:
    """The outcome of a run, from its reconstructions and codes of the test split."""
    dead = evaluate.dead_units(codes)
    return {
        "test/mse": mse(recon, images),
        "code/dead_units": int(dead.sum()),
        "code/collapsed": bool(dead.all()),
    }


def train_ours(pair: Pair, seeds: Sequence[int]) -> list[Row]:
    """Our runs of some seeds, as one program; the outcome of each."""
    program = pair.ours()
    group = ensemble.make_group(program, len(seeds))
    images = group.put(pair.dataset.train.images, None)
    members = group.put(np.asarray(seeds, np.uint32), 0)
    states = group.init(members)
    for epoch in range(pair.config.train.num_epochs):
        stop = (epoch + 1) * program.steps_per_epoch
        order = group.order(members, epoch)
        states = jax.block_until_ready(group.advance(states, images, order, stop))
    test, rows = pair.dataset.test.images, []
    for i, seed in enumerate(seeds):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], states.params)
        recon = run.in_blocks(program.reconstruct, params, test)
        codes = run.in_blocks(program.encode, params, test)
        rows.append({"seed": seed, **score(recon, codes, test)})
    return rows


def train_theirs(pair: Pair, seed: int) -> Row:
    """PyTorch's run of one seed, weights and batches drawn by PyTorch; its outcome."""
    torch.manual_seed(seed)
    images = torch.from_numpy(pair.dataset.train.images)
    model = pair.theirs()
    optimizer = pair.adam(model, fused=True)
    for _ in range(pair.config.train.num_epochs):
        order = torch.randperm(len(images)).split(pair.config.train.batch_size)
        batches = baseline.scaled_batches(images, order)
        baseline.train_epoch(model, optimizer, batches, torch.nn.MSELoss())
    test = pair.dataset.test.images
    recon, codes = (baseline.apply(part, test) for part in (model, model.encoder))
    return {"seed": seed, **score(recon, codes, test)}


# --- e. Speed and memory -------------------------------------------------------------


class Race:
    """All contenders in one process, built and warmed up, to be timed in turns."""

    def __init__(self, pair: Pair) -> None:
        self._steps = pair.config.speed_steps
        self._per_epoch = pair.ours().steps_per_epoch
        images = pair.dataset.train.images.reshape(-1, *pair.dataset.shape)
        rate, seed = pair.config.train.learning_rate, pair.config.train.seed
        train = baseline.Train(learning_rate=rate, seed=seed)
        self._contenders: dict[str, baseline.Contender] = {
            "ours": our_contender(pair),
            **baseline.make_contenders(images, pair.theirs, train),
        }
        self._threads, self._failed = baseline.warm_up(self._contenders)

    def round(self) -> Row:
        """Time each contender once.

        Returns:
            Seconds per epoch by contender, PyTorch's threads, and why one is missing.
        """
        torch.set_num_threads(self._threads)
        share = self._per_epoch / self._steps
        seconds = {
            name: records.stopwatch(contender, self._steps) * share
            for name, contender in self._contenders.items()
        }
        torch.set_num_threads(1)
        return {
            "epoch_s": seconds,
            "threads": self._threads,
            "failed": self._failed,
        }


def our_contender(pair: Pair) -> baseline.Contender:
    """Our train chunk, the images on the device."""
    program = pair.ours()
    return make_runner(
        make_train_chunk(program.train_step),
        program.init(),
        jax.device_put(pair.dataset.train.images),
        jnp.asarray(pair.shuffle(program, 0)),
    )


def measure_memory(config: Comparison) -> dict[str, int]:
    """Peak memory of both sides' commands for one epoch, each a process of its own."""
    options = {
        "--data.name": config.data.name,
        "--data.dir": config.data.dir.absolute(),
        "--train.num-epochs": 1,
    }
    peaks = {}
    for side, name in (("ours", "tutorial"), ("theirs", "pytorch_baseline")):
        with tempfile.TemporaryDirectory() as folder:
            options["--run-dir"] = f"{folder}/run"
            command = [sys.executable, "-m", f"experiments.{name}"]
            command += [str(word) for option in options.items() for word in option]
            # Linux counts a process's peak from before its exec, when it is as large
            # as its parent: a small shell in between keeps ours out of it.
            done = subprocess.run(
                ["sh", "-c", '"$@"; exit $?', "sh", *command],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
            summary = records.read_json(Path(folder) / "run" / "summary.json")
            peaks[side] = summary["peak_memory_bytes"]
    return peaks


# --- The comparison, in a run folder -------------------------------------------------


class Ledger:
    """Finished pieces of work in a file, a JSON line each: none is done twice.

    Args:
        path: the file; made with the first piece.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            self._rows = {row["piece"]: row for row in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); delete the folder") from error

    def once(self, piece: str, work: Callable[[], Any]) -> Any:
        """The result of a piece: from the file, or else worked out and written there.

        Args:
            piece: its name.
            work: gives its result, as JSON can hold it.
        """
        if piece not in self._rows:
            print(f"{piece} …", end=" ", flush=True)
            start = time.monotonic()
            result = json.loads(json.dumps(work()))
            wall_s = round(time.monotonic() - start, 2)
            print(f"{wall_s:.1f} s")
            self._rows[piece] = {"piece": piece, "wall_s": wall_s, "result": result}
            lines = [json.dumps(row) + "\n" for row in self._rows.values()]
            records.write_text(self._path, "".join(lines))
        return self._rows[piece]["result"]


def compare(config: Comparison) -> None:
    """The whole comparison in ``config.run_dir``, or what is left of it.

    Raises:
        UserError: the folder is in use, is no run folder or holds another run; or the
            data set cannot be had.
        SystemExit: 1; the two sides are not the same.
    """
    with records.lock(config.run_dir):
        known = read_known(config)
        if (config.run_dir / "report.html").exists():
            print(f"{config.run_dir} is finished: see report.html there")
            return
        torch.set_num_threads(1)  # beside JAX; two fight for the cores
        pair = Pair(config, data.load(config.data))
        pair.ours()  # sets up JAX
        description = describe(pair, known)
        found = measure(pair, Ledger(config.run_dir / "finished.jsonl").once)
        found |= conclude(found, config)
        folder = config.run_dir / "figures"
        folder.mkdir(exist_ok=True)
        report.draw(found, folder)
        records.write_json(config.run_dir / "parity.json", found)
        if is_reference(config):
            write_result(found, config)
        path = config.run_dir / "report.html"  # the last file: with it we are done
        records.write_text(path, report.page(description, found, folder))
    tell(found["checks"], path)


def tell(checks: list[Row], path: Path) -> None:
    """Show the outcome.

    Raises:
        SystemExit: 1; a check has failed.
    """
    for row in checks:
        passed = "" if row["passed"] else "   FAILED"
        print(f"{row['what']}: {row['value']:.1e} (limit {row['limit']:.0e}){passed}")
    print(f"report: {path}")
    if not all(row["passed"] for row in checks):
        sys.exit(1)


def read_known(config: Comparison) -> Row | None:
    """The folder's config.json, if it has one, and it is of the same comparison."""
    known = records.read_known(config.run_dir, NAME)
    if known:
        was: Comparison = run.read_config(config.run_dir, known, Comparison)
        # A run may grow by epochs; half of these seeds may not.
        configs.refuse_clashes(was, config, configs.FREE)
    return known


def describe(pair: Pair, known: Row | None) -> Row:
    """Write config.json, or note in it that the surroundings have changed."""
    folder, dataset = pair.config.run_dir, pair.dataset
    now = run.describe(NAME, pair.config, dataset)
    now["versions"]["torch"] = str(torch.__version__)
    if known:
        run.check_fingerprint(folder, dataset)
        warning = records.note_surroundings(known, now)
        if warning:
            print(f"warning: {folder}: {warning}", file=sys.stderr)
    description = known or now
    records.write_json(folder / "config.json", description)
    return description


def measure(pair: Pair, once: Callable[[str, Callable[[], Any]], Any]) -> Row:
    """Every part of the comparison, piece by piece.

    Args:
        pair: the two sides.
        once: gives the result of a piece, see :meth:`Ledger.once`.
    """
    config = pair.config
    seeds, size = range(config.num_seeds), config.seeds_at_once
    groups = [seeds[start : start + size] for start in seeds[::size]]
    mini, whole = mini_images(pair), pair.dataset.train.images
    race = functools.cache(lambda: Race(pair))
    return {
        "layers": {
            name: once(f"layers in {name}", partial(compare_layers, pair, name))
            for name in get_args(Precision)
        },
        "mini": once("lockstep, mini set", partial(follow, pair, mini, MINI_EPOCHS)),
        "whole": once("lockstep", partial(follow, pair, whole, config.lockstep_epochs)),
        "drift": once("drift in float32", partial(measure_drift, pair)),
        "speed": [
            once(f"speed, round {i}", lambda: race().round())
            for i in range(1, config.speed_rounds + 1)
        ],
        "memory": once("memory", partial(measure_memory, config)),
        "ours": [
            row
            for group in groups
            for row in once(
                f"our seeds {group[0]} to {group[-1]}", partial(train_ours, pair, group)
            )
        ],
        "theirs": [
            once(f"PyTorch's seed {seed}", partial(train_theirs, pair, seed))
            for seed in seeds
        ],
    }


def conclude(found: Row, config: Comparison) -> Row:
    """What the measurements come to.

    Returns:
        ``runs``, see :func:`parity.compare_runs`; ``ratios``, see :func:`speed_ratios`;
        ``checks``, see :func:`check_lockstep`, with one more, of the weights;
        ``headline``, flat.
    """
    runs = parity.compare_runs(found["ours"], found["theirs"], config.margin)
    ratios = speed_ratios(found["speed"])
    lockstep = check_lockstep(found["mini"], found["whole"])
    exact = all(layers["exact"] for layers in found["layers"].values())
    what = "weights to PyTorch and back: conversions that change a bit"
    weights = {"what": what, "value": int(not exact), "limit": 0, "passed": exact}
    headline = {
        **{row["name"]: row["value"] for row in lockstep},
        "tost_p": runs["tost_p"],
        "ks_p": runs["ks_p"],
        "collapse_fisher_p": runs["collapsed_p"],
        "speed_ratio_best": ratios["best"]["median"],
        "speed_ratio_item_by_item": ratios["item_by_item"]["median"],
    }
    checks = [weights, *lockstep]
    return {"runs": runs, "ratios": ratios, "checks": checks, "headline": headline}


def check_lockstep(mini: list[Row], whole: list[Row]) -> list[Row]:
    """Hold the lockstep to its limits: on the mini set, after an epoch, at the end.

    Returns:
        Of each check its ``name`` in the headline, ``what`` it is in words, the
        ``step``, the ``value``, the ``limit``, and whether it ``passed``.
    """
    names = [f"{name}_abs" for name in ("params", "mu", "nu")]
    worst = float(np.max([[row[name] for name in names] for row in mini]))
    largest = "largest difference of a parameter or a moment"
    relative = "norm-relative difference of the parameters"
    found = [(mini[-1]["step"], "abs", largest, worst, LIMITS["mini"])]
    for row, kind in ((whole[0], "epoch"), (whole[-1], "end"))[: len(whole)]:
        value = row["params_nrel"]
        found.append((row["step"], "nrel", relative, value, LIMITS[kind]))
    return [
        {
            "name": f"lockstep_f64_{step}_{measure}",
            "what": f"float64, {step:,} steps: {what}",
            "step": step,
            "value": value,
            "limit": limit,
            "passed": value <= limit,
        }
        for step, measure, what, value, limit in found
    ]


def speed_ratios(rounds: list[Row]) -> dict[str, dict[str, float]]:
    """PyTorch's time over ours: of each contender, and of the best one.

    Returns:
        By contender ``median``, ``low`` and ``high`` over the rounds; each round's
        ratio is of times that were taken within it.
    """
    times = [row["epoch_s"] for row in rounds]
    names = [name for name in times[0] if name != "ours"]
    ratios = {name: [t[name] / t["ours"] for t in times] for name in names}
    fastest = min(names, key=lambda name: statistics.median(ratios[name]))
    ratios["best"] = ratios[fastest]
    return {
        name: {
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
        }
        for name, values in ratios.items()
    }


def is_reference(config: Comparison) -> bool:
    """Whether a config measures what the reference preset does, wherever it runs."""
    return not configs.clashes(PRESETS["reference"], config)


def write_result(found: Row, config: Comparison) -> None:
    """Keep the outcome as experiments/results/compare_pytorch.json."""
    rows = [{"part": "check", **row} for row in found["checks"]]
    for side in ("ours", "theirs"):
        rows.append({"part": "runs", "side": side, **found["runs"][side]})
    for name in found["speed"][0]["epoch_s"]:
        seconds = [row["epoch_s"][name] for row in found["speed"]]
        row = {"part": "speed", "what": name, "epoch_s": statistics.median(seconds)}
        rows.append({**row, **found["ratios"].get(name, {})})
    records.write_result(
        ROOT / "experiments" / "results" / f"{NAME}.json",
        experiment=NAME,
        accelerator=jax.devices()[0].device_kind,
        seeds=list(range(config.num_seeds)),
        headline=found["headline"],
        table=rows,
    )
