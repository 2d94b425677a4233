"""A run, rebuilt: what its config determines, its checkpoints, its scores and figures.

:func:`build` makes model, optimiser and train step of a config. :func:`open_run` is the
only way to rebuild a run from its folder; nothing here writes to one but :func:`draw`.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from ae_jax import checkpoint, config, data, evaluate, hosts, losses, models, records
from ae_jax.checkpoint import Checkpoints, DamagedError, History
from ae_jax.config import Config, ModelConfig, TrainConfig, UserError
from ae_jax.images import Images, Rows
from ae_jax.losses import Params
from ae_jax.records import Row
from ae_jax.train import (
    TrainState,
    TrainStep,
    epoch_order,
    init_state,
    make_schedule,
    make_train_step,
    make_tx,
)

BLOCK = 1000
"""Images that go through the model at a time, outside training."""


PARAM_DTYPES: dict[str, np.dtype] = {
    "float32": jnp.dtype("float32"),
    "float64": jnp.dtype("float64"),
    "bfloat16": jnp.dtype("float32"),
}
"""What parameters, optimiser and losses are kept in, by ``train.precision``."""


class Program(NamedTuple):
    """What a config determines before any image is seen.

    Attributes:
        model: Linen module.
        schedule: learning rate of each step.
        train_step: the update rule.
        init: the state before the first step.
        init_at: the same under another seed.
        order: (key, epoch) to the epoch's batches, see :func:`train.epoch_order`.
        encode: (params, images [B, D]) to codes [B, K].
        decode: (params, codes [B, K]) to images [B, D].
        reconstruct: (params, images [B, D]) to images [B, D].
        steps_per_epoch: T.
    """

    model: nn.Module
    schedule: optax.Schedule
    train_step: TrainStep
    init: Callable[[], TrainState]
    init_at: Callable[[Any], TrainState]
    order: Callable[[Key[Array, ""], int | Int[Array, ""]], Int[Array, "T B"]]
    encode: Callable[[Params, Any], Array]
    decode: Callable[[Params, Any], Array]
    reconstruct: Callable[[Params, Any], Array]
    steps_per_epoch: int


def _choose(known: Mapping[str, Any], name: str, field: str) -> Any:
    if name not in known:
        hint = config.suggest(name, known)
        raise UserError(f"{field}: there is no {name}{hint}")
    return known[name]


@functools.cache
def _build(
    model_config: ModelConfig,
    train: TrainConfig,
    num_train: int,
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
) -> Any:
    num_pixels = math.prod(shape)
    model = _choose(models.MODELS, model_config.name, "model.name")(
        shape,
        model_config.hidden,
        model_config.code_width,
        model_config.code_activation,
        model_config.init,
        dtype=jnp.dtype(train.precision),
        param_dtype=PARAM_DTYPES[train.precision],
    )
    loss = _choose(losses.LOSSES, train.loss, "train.loss")
    steps_per_epoch = -(-num_train // train.batch_size)
    schedule = make_schedule(train, train.num_epochs * steps_per_epoch)
    tx = make_tx(train, schedule)
    train_step = make_train_step(losses.make_reconstruction(model, loss), tx)

    @models.draw_together
    def init_params(key: jax.Array) -> Params:
        return model.init(key, jnp.zeros((1, num_pixels), model.param_dtype))["params"]

    def init_at(seed: Any) -> TrainState:
        batches = (steps_per_epoch, train.batch_size, num_pixels)
        return init_state(init_params, tx, train_step, seed, batches)

    def jitted(method: str) -> Callable[[Params, Any], Array]:
        return jax.jit(
            lambda params, x: model.apply({"params": params}, x, method=method)
        )

    return Program(
        model=model,
        schedule=schedule,
        train_step=train_step,
        # The seed is an argument: what is compiled, and kept, for one serves all.
        init=functools.partial(
            jax.jit(init_at, out_shardings=sharding), np.uint32(train.seed)
        ),
        init_at=jax.jit(init_at),
        order=jax.jit(
            lambda key, epoch: epoch_order(key, epoch, num_train, train.batch_size)
        ),
        encode=jitted("encode"),
        decode=jitted("decode"),
        reconstruct=jitted("__call__"),
        steps_per_epoch=steps_per_epoch,
    )


def build(
    settings: Config,
    num_train: int,
    *shape: int,
    sharding: NamedSharding | None = None,
) -> Program:
    """The model, the optimiser and the train step of a config.

    Turns 64-bit floats and the cache of compiled programs on or off in the whole
    process, as the config asks; ``JAX_COMPILATION_CACHE_DIR`` names another cache.

    Args:
        settings: the run's config.
        num_train: N, images trained on.
        shape: of an image, or D alone where the model does not ask for more.
        sharding: where the first state shall lie; None: on the first device.

    Raises:
        UserError: no such model or loss, or a model that cannot take such images.
    """
    jax.config.update("jax_enable_x64", settings.train.precision == "float64")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    cache = cache or str(records.compilation_cache_dir())
    used = cache if settings.compilation_cache else None
    jax.config.update("jax_compilation_cache_dir", used)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    program: Program = _build(
        settings.model, settings.train, num_train, shape, sharding
    )
    return program


def in_blocks(
    forward: Callable[[Params, Any], Array], params: Params, inputs: np.ndarray | Rows
) -> Float[np.ndarray, "N ..."]:
    """Send inputs [N, …] through one of a program's functions, block by block."""
    outputs = [output for _, output in each_block(forward, params, inputs)]
    return np.concatenate(outputs)


def each_block(
    forward: Callable[[Params, Any], Array], params: Params, inputs: np.ndarray | Rows
) -> Iterator[tuple[Float[np.ndarray, "n D"], Float[np.ndarray, "n ..."]]]:
    """The inputs of each block, scaled, and what one of a program's functions makes.

    No more than a block of them is in memory, wherever the inputs are.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    for start in range(0, max(len(inputs), 1), BLOCK):
        block = inputs[start : start + BLOCK]
        x = scale(block.reshape(len(block), math.prod(inputs.shape[1:])), dtype)
        yield x, np.asarray(forward(params, x))


def dead_units(
    encode: Callable[[Params, Any], Array], params: Params, images: Images
) -> Bool[np.ndarray, "K"]:
    """Which units of the code are zero for every image."""
    blocks = each_block(encode, params, images)
    dead = np.array([evaluate.dead_units(codes) for _, codes in blocks])
    return np.asarray(dead.all(axis=0))


def scale(
    images: UInt8[np.ndarray, "N D"] | Float[np.ndarray, "N D"], dtype: np.dtype
) -> Float[np.ndarray, "N D"]:
    """Bytes as floats in [0, 1]; floats as they are."""
    floats: np.ndarray = images.astype(dtype)
    if images.dtype == np.uint8:
        floats /= np.asarray(255, dtype)
    return floats


@dataclass(frozen=True)
class OpenRun:
    """A run rebuilt from one of its checkpoints.

    Attributes:
        folder: the run folder.
        config: the run's.
        state: as saved, ``state.step`` updates old.
        rows: those of metrics.jsonl up to it.
        steps: all steps of which there is a checkpoint.
        program: model and train step.
    """

    folder: Path
    config: Config
    state: TrainState
    rows: list[Row]
    steps: list[int]
    program: Program

    @property
    def step(self) -> int:
        """The number of updates applied."""
        return int(self.state.step)

    def encode(
        self, images: UInt8[np.ndarray, "N ..."] | Float[np.ndarray, "N ..."] | Rows
    ) -> Float[np.ndarray, "N K"]:
        """Codes of images [N, D] or [N, H, W, …]: bytes, or floats in [0, 1]."""
        return in_blocks(self.program.encode, self.state.params, images)

    def decode(self, codes: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N D"]:
        """Images of codes, pixels in [0, 1]."""
        return in_blocks(self.program.decode, self.state.params, codes)

    def reconstruct(
        self, images: UInt8[np.ndarray, "N ..."] | Float[np.ndarray, "N ..."] | Rows
    ) -> Float[np.ndarray, "N D"]:
        """Images through the code and back, pixels in [0, 1]."""
        return in_blocks(self.program.reconstruct, self.state.params, images)


def open_run(run_dir: Path | str, which: str | int = "latest") -> OpenRun:
    """Rebuild a run from its folder.

    Args:
        run_dir: the run folder.
        which: ``latest``, ``best``, or a step of which there is a checkpoint.

    Raises:
        UserError: no run, no checkpoint, not that one (the message lists those there
            are), or a damaged one.
    """
    folder = Path(run_dir)
    description = records.read_description(folder)
    if "num_seeds" in description["config"]:
        raise UserError(
            f"{folder}: a run of many seeds; scripts/take_seed.py takes one out"
        )
    settings, about = read_config(folder, description, Config), description["data"]
    if not (folder / "checkpoints").is_dir():
        raise _no_checkpoint(folder)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        steps = checkpoints.steps
        if not steps:
            raise _no_checkpoint(folder)
        if which == "best":
            history = checkpoints.load_history(steps[-1])
            check_description(folder, description, history, Config)
            rows = history["rows"]
            which = best_step(rows, settings.train.loss) if rows else steps[-1]
        step = steps[-1] if which == "latest" else _as_step(which)
        if step not in steps:
            kept = ", ".join(map(str, steps))
            raise UserError(
                f"{folder}: no checkpoint of step {which}; choose latest, best or one "
                f"of {kept}"
            )
        # First, for with another config the state would only seem damaged.
        history = checkpoints.load_history(step)
        check_description(folder, description, history, Config)
        program = build(settings, about["num_train"], *about["shape"])
        abstract = checkpoint.abstract_like(program.init)
        state, _ = checkpoints.load(abstract, step)
    return OpenRun(folder, settings, state, history["rows"], steps, program)


def check_description(
    folder: Path, description: dict[str, Any], history: History, kind: type[Config]
) -> None:
    """Refuse a config.json that tells of another run than a checkpoint does.

    Args:
        folder: the run folder.
        description: its config.json.
        history: the checkpoint's, which holds ``config`` and ``data`` as they were
            when it was saved; an older version's lacks them, and passes.
        kind: of the config.

    Raises:
        UserError: they differ in a field that is not free to.
    """
    if "config" not in history:
        return
    now, saved = (read_config(folder, part, kind) for part in (description, history))
    free = config.free_to_resume(saved, now)
    changed = {
        f"config.{key}": values
        for key, values in config.clashes(now, saved, free).items()
    }
    for key in ("fingerprint", "num_train", "shape"):
        values = (description["data"][key], history["data"][key])
        if values[0] != values[1]:
            changed[f"data.{key}"] = values
    if changed:
        fields = "; ".join(f"{k}: {a}, saved was {b}" for k, (a, b) in changed.items())
        raise UserError(
            f"{folder / 'config.json'}: not the one that the checkpoints were saved "
            f"with: {fields}; mend it"
        )


def check_newest(folder: Path, description: dict[str, Any], kind: type[Config]) -> None:
    """Compare config.json with the newest checkpoint whose history is sound.

    Raises:
        UserError: see :func:`check_description`.
    """
    if not (folder / "checkpoints").is_dir():
        return
    with Checkpoints(folder / "checkpoints") as checkpoints:
        for step in reversed(checkpoints.steps):
            with contextlib.suppress(DamagedError):
                history = checkpoints.load_history(step)
                return check_description(folder, description, history, kind)


def read_config(folder: Path, description: dict[str, Any], kind: type[Config]) -> Any:
    """The config in a run's config.json; the folder may have moved since."""
    plain = {**description["config"], "run_dir": str(folder)}
    return config.from_json(kind, plain, str(folder / "config.json"))


def describe(
    experiment: str, settings: Config, dataset: data.Dataset
) -> dict[str, Any]:
    """A new run's config.json: its config, on these data and this machine."""
    devices = jax.devices()
    device = {
        "kind": devices[0].device_kind,
        "count": len(devices),
        "processes": jax.process_count(),
        "mesh": hosts.make_mesh(settings.mesh.data, settings.train.batch_size).size,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"]
        or "default",
    }
    # Asked for once, it must not come back with --config.
    kept = dataclasses.replace(settings.checkpoint, fallback=False)
    settings = dataclasses.replace(settings, checkpoint=kept)
    return records.describe(experiment, settings, device, dataset.describe())


def write_description(
    experiment: str, settings: Config, dataset: data.Dataset, known: Row | None
) -> Row:
    """Write a run's config.json as it starts, or bring it up to date as it goes on.

    Other surroundings than the run had before are told on stderr, and noted in it.

    Args:
        experiment: its name.
        settings: the run's config.
        dataset: what it is trained on.
        known: what config.json holds, if the run goes on.

    Returns:
        What config.json holds now.

    Raises:
        UserError: the run was trained on other data.
    """
    folder, now = settings.run_dir, describe(experiment, settings, dataset)
    if known:
        check_fingerprint(folder, dataset)
        warning = records.note_surroundings(known, now)
        if warning and hosts.is_first():
            print(f"warning: {folder}: {warning}", file=sys.stderr)
        known["config"] = now["config"]
        known["data"] = {**now["data"], "source": known["data"].get("source")}
    description = known or now
    if hosts.is_first():
        # If there is one, the run goes on, and it is no longer the run's summary.
        (folder / "summary.json").unlink(missing_ok=True)
        records.write_json(folder / "config.json", description)
    return description


def _no_checkpoint(folder: Path) -> UserError:
    if (folder / "weights.safetensors").exists():  # PyTorch's side saves no more
        remedy = f"scripts/convert.py makes a run of {folder / 'weights.safetensors'}"
    else:
        remedy = "give the run's command again and let it finish an epoch"
    return UserError(f"{folder}: no checkpoint; {remedy}")


def _as_step(which: str | int) -> int:
    try:
        return int(which)
    except ValueError:
        raise UserError(
            f"--checkpoint: must be latest, best or a step, got {which!r}"
        ) from None


def check_fingerprint(run_dir: Path, dataset: data.Dataset) -> None:
    """Refuse to go on with a run, or to score it, on other data than it was trained on.

    Raises:
        UserError: the fingerprints differ.
    """
    was = records.read_description(run_dir)["data"]["fingerprint"]
    if was != dataset.fingerprint:
        raise UserError(
            f"{run_dir}: the run was trained on other data (fingerprint {was[:12]}…, "
            f"now {dataset.fingerprint[:12]}…); choose another --run-dir"
        )


def best_step(rows: list[Row], loss: str) -> int:
    """The step of the best epoch: by held-out loss if there is one, else by training's.

    The test split is never asked. Ties go to the earlier epoch.
    """
    key = f"val/{loss}" if f"val/{loss}" in rows[0] else f"train/{loss}"
    return int(min(rows, key=lambda row: row[key])["step"])


def score(run: OpenRun, split: data.Split, name: str, shape: tuple[int, ...]) -> Row:
    """Metrics of one checkpoint over a whole split.

    Args:
        run: the checkpoint.
        split: images [N, D].
        name: of the split; the metrics are called ``name/mse`` and so on.
        shape: of an image, (H, W) or (H, W, 3).

    Returns:
        Its metrics, and the number of code units that are dead on it.
    """
    program, params = run.program, run.state.params
    blocks = [
        evaluate.per_image_metrics(recon, target, shape)
        for target, recon in each_block(program.reconstruct, params, split.images)
    ]
    metrics = evaluate.mean_metrics(
        {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}
    )
    dead = dead_units(program.encode, params, split.images)
    return {
        **{f"{name}/{key}": value for key, value in metrics.items()},
        "code/dead_units": int(dead.sum()),
        "code/collapsed": bool(dead.all()),
    }


# --- Figures, each from the run folder alone ---------------------------------------


def _read_pictures(folder: Path) -> dict[str, UInt8[np.ndarray, "n H W *C"]]:
    path = folder / "figures" / "images.npz"
    try:
        # From memory: NumPy does not close a file that it cannot read.
        with np.load(io.BytesIO(path.read_bytes())) as archive:
            pictures = {name: archive[name] for name in ("samples", "train", "test")}
            whole = all(
                p.dtype == np.uint8 and (p.ndim == 3 or p.shape[3:] == (3,))
                for p in pictures.values()
            )
    except Exception as error:  # NumPy, zipfile and zlib each raise their own
        raise UserError(
            f"{path}: cannot be read ({error}); {records.WRITE_ANEW}"
        ) from error
    if not whole:
        raise UserError(f"{path}: damaged, no images; {records.WRITE_ANEW}")
    return pictures


def _shown_samples(folder: Path) -> tuple[Any, ...]:
    return (_read_pictures(folder)["samples"],)


def _shown_training_loss(folder: Path) -> tuple[Any, ...]:
    run = open_run(folder)
    if not run.rows:
        raise UserError(f"{folder}: no finished epoch to draw yet")
    name = run.config.train.loss
    epochs = [row["epoch"] for row in run.rows]
    held_out = [row[f"val/{name}"] for row in run.rows if f"val/{name}" in row]
    return (
        epochs,
        [row[f"train/{name}"] for row in run.rows],
        name.upper(),
        held_out or None,
    )


def _shown_reconstructions_by_epoch(folder: Path) -> tuple[Any, ...]:
    run, originals = open_run(folder), _read_pictures(folder)["train"]
    per_epoch = run.program.steps_per_epoch
    finished = [step // per_epoch for step in run.steps if step % per_epoch == 0]
    if not finished:
        raise UserError(f"{folder}: no finished epoch to draw yet")
    shown = [e for e in finished if e in run.config.figures.epochs or e == finished[-1]]
    rows = {
        epoch: open_run(folder, epoch * per_epoch).reconstruct(originals)
        for epoch in shown
    }
    return (
        {epoch: recon.reshape(originals.shape) for epoch, recon in rows.items()},
        originals,
    )


def _shown_test_reconstructions(folder: Path) -> tuple[Any, ...]:
    run, originals = open_run(folder), _read_pictures(folder)["test"]
    recon = run.reconstruct(originals).reshape(originals.shape)
    return recon, originals


FIGURES: dict[str, Callable[[Path], tuple[Any, ...]]] = {
    "samples": _shown_samples,
    "training_loss": _shown_training_loss,
    "reconstructions_by_epoch": _shown_reconstructions_by_epoch,
    "test_reconstructions": _shown_test_reconstructions,
}
"""The figures of a run, in the tutorial's order: what each function of that name in
:mod:`figures` is given."""


def draw(run_dir: Path, name: str) -> Path:
    """Draw a figure of a run from its folder alone; returns the PNG's path."""
    # Not before: matplotlib loads while the run's programs compile.
    from ae_jax import figures

    figure = getattr(figures, name)(*FIGURES[name](run_dir))
    path = run_dir / "figures" / f"{name}.png"
    figures.save(figure, path)
    return path
