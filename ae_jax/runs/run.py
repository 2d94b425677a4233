"""A run, opened from its folder: what it encodes, decodes, scores and draws.

:func:`open_run` is the only way to rebuild a run. Nothing here writes to its folder.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float

from ae_jax import collapse, config, data, devices, metrics
from ae_jax.config import Config
from ae_jax.errors import UserError
from ae_jax.keys import Purpose, fold_each, key_for
from ae_jax.models import init_params
from ae_jax.objectives import Objective, apply, batched
from ae_jax.runs import checkpoint
from ae_jax.runs.checkpoint import Checkpoints, History
from ae_jax.runs.folder import (
    Description,
    EpochMetrics,
    loss_name_of,
    read_description,
)
from ae_jax.runs.inputs import as_images, as_latents
from ae_jax.train import Params, scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = 1000
"""Images that go through the model at a time, outside training."""

Scores = dict[str, Float[np.ndarray, " N"]]


def each_block(
    function: Callable[..., Any], params: Params, inputs: Any
) -> Iterator[tuple[Float[np.ndarray, "n ..."], Any]]:
    """The inputs of each block, scaled if they are bytes, and what a function gives.

    No more than a block of them is in memory, wherever the inputs are.

    Args:
        function: ``(params, block, numbers [n]) -> arrays [n, …]``, jitted.
        params: the model's.
        inputs: [N, …], uint8 or float; one empty block if N is 0.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    for start in range(0, max(len(inputs), 1), BLOCK):
        x = inputs[start : start + BLOCK]
        x = scale(x, dtype) if x.dtype == np.uint8 else x.astype(dtype)
        numbers = np.arange(start, start + len(x))
        yield x, jax.tree.map(np.asarray, function(params, x, numbers))


def in_blocks(function: Callable[..., Any], params: Params, inputs: Any) -> Any:
    """The function's outputs of all blocks, joined; see :func:`each_block`."""
    outputs = [output for _, output in each_block(function, params, inputs)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)


def method_of(model: nn.Module, method: str) -> Callable[..., Array]:
    """A method of the model as a function for :func:`each_block`, to be jitted."""

    def call(params: Params, x: Array, numbers: Array) -> Array:
        del numbers
        return apply(model, params, x, method)

    return call


def active_units_of(model: nn.Module) -> Callable[..., Array]:
    """Which latent units [K] are not zero for every image of a block."""
    encode = method_of(model, "encode")
    return lambda *inputs: (encode(*inputs) != 0).any(axis=0)


def scores_of(
    objective: Objective, model: nn.Module, seed: int = 0
) -> Callable[..., dict[str, Array]]:
    """An objective's loss and metrics as a function for :func:`each_block`.

    The draws of image i are from ``fold_in(key_for(seed, SCORE), i)``: they do not
    depend on the block.
    """
    losses = batched(objective, model)

    def scores(params: Params, x: Array, numbers: Array) -> dict[str, Array]:
        return losses(params, x, fold_each(key_for(seed, Purpose.SCORE), numbers))

    return scores


def draw_each(
    draw: Callable[..., Array], images: Any, seed: int = 0
) -> Float[np.ndarray, "N H W C"]:
    """What ``draw(x, key)`` makes of each image, with the draws of :func:`scores_of`.

    Args:
        draw: of one image; gives one of the same shape.
        images: [N, H, W, C], uint8 or floats in [0, 1].
        seed: image i draws from ``fold_in(key_for(seed, SCORE), i)``.

    Returns:
        float32.
    """

    @jax.jit
    def of_block(dtype: Array, x: Array, numbers: Array) -> Array:
        del dtype  # of x, which is what else the parameters are asked for
        return jax.vmap(draw)(x, fold_each(key_for(seed, Purpose.SCORE), numbers))

    with devices.numerics("float32"):
        return np.asarray(in_blocks(of_block, np.zeros((), np.float32), images))


def can_die(config: Config) -> bool:
    """Whether units of the latent can die: those of a ReLU can."""
    return getattr(config.model, "latent_activation", None) == "relu"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Run:
    """A run at one of its checkpoints. All it returns is NumPy's.

    Images go in as [N, H, W, C] or [N, D], bytes or floats in [0, 1], see
    :func:`ae_jax.runs.inputs.as_images`, and come out as [N, H, W, C]; latents are
    [N, K].

    Attributes:
        folder: the run folder.
        config: the run's.
        shape: of an image, (H, W, C).
        model: Linen module.
        params: its parameters, ``step`` updates old.
        step: the number of updates behind them.
        metrics: the lines of metrics.jsonl up to it.
        steps: all steps of which there is a checkpoint.
    """

    folder: Path
    config: Config
    shape: tuple[int, int, int]
    model: nn.Module
    params: Params
    step: int
    metrics: list[EpochMetrics]
    steps: list[int]
    _functions: dict[str, Any]
    """Compiled methods, shared by the run's other checkpoints."""

    def __repr__(self) -> str:
        plain = config.to_json(self.config)
        dataset, model, objective = (plain[s]["name"] for s in config.REGISTRIES)
        epochs = f"{len(self.metrics)} of {self.config.train.num_epochs} epochs"
        lines = [
            f"Run {self.folder}: step {self.step:,}, {epochs}",
            f"{objective} of {dataset} by {model}, {self.num_params:,} parameters",
        ]
        if self.metrics:
            row, name = self.metrics[-1], loss_name_of(self.metrics[-1])
            losses = [f"{p}/{name}" for p in ("train", "val") if f"{p}/{name}" in row]
            lines.append(", ".join(f"{key} {row[key]:.5f}" for key in losses))
        return "<" + "\n  ".join(lines) + ">"

    def __reduce__(self) -> Any:
        return open_run, (str(self.folder.absolute()), self.step)

    def encode(self, images: Any) -> Float[np.ndarray, "N K"]:
        """Latents of images."""
        return self._apply("encode", as_images(images, self.shape))

    def decode(self, latents: Any) -> Float[np.ndarray, "N H W C"]:
        """Images of latents [N, K], pixels in [0, 1]."""
        one = np.zeros((1, *self.shape), np.float32), np.arange(1)
        with devices.numerics(self.config.train.precision):
            latent = jax.eval_shape(self._function("encode"), self.params, *one)
        return self._apply("decode", as_latents(latents, latent.shape[1:]))

    def reconstruct(self, images: Any) -> Float[np.ndarray, "N H W C"]:
        """What the model makes of images, pixels in [0, 1]."""
        return self._apply("__call__", as_images(images, self.shape))

    @property
    def num_params(self) -> int:
        """How many numbers the parameters are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def has(self, *methods: str) -> bool:
        """Whether the model can do all of these, ``encode`` say."""
        return all(callable(getattr(self.model, method, None)) for method in methods)

    def scores(
        self, images: Any, objective: Objective | None = None, seed: int = 0
    ) -> Scores:
        """An objective's loss and metrics of each image, by name.

        Args:
            images: any number of them.
            objective: None: the run's own, so that validation scores come out again.
            seed: of the draws, if the objective makes any.
        """
        with devices.numerics(self.config.train.precision):
            if objective is None:
                function = self._own_scores(seed)
            else:
                function = jax.jit(scores_of(objective, self.model, seed))
            return in_blocks(function, self.params, as_images(images, self.shape))

    def score_split(self, images: Any) -> dict[str, float]:
        """The means of :meth:`scores` over a split, and how it is reconstructed.

        ``mse``, ``psnr_db`` and ``ssim`` are those of :meth:`reconstruct`, for any
        model with encode and decode.
        """
        images = as_images(images, self.shape)
        means = metrics.mean_metrics(self.scores(images))
        if self.has("encode", "decode"):
            with devices.numerics(self.config.train.precision):
                function = self._function("__call__")
                blocks = [
                    metrics.per_image_metrics(recon, target)
                    for target, recon in each_block(function, self.params, images)
                ]
            joined = {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
            means |= metrics.mean_metrics(joined)
        return means

    def count_dead_units(self, images: Any) -> int:
        """How many latent units are zero for every image."""
        return int(collapse.dead_units(self.encode(images)).sum())

    def at(self, which: str | int) -> "Run":
        """The run at another of its checkpoints: ``latest``, ``best`` or a step."""
        return open_like(self.config, self._functions, which)

    def for_shape(self, shape: tuple[int, ...]) -> "Run":
        """The run for images of another shape, (H, W, C), if its parameters fit them.

        Raises:
            UserError: they do not.
        """
        if shape == self.shape:
            return self
        height, width, channels = self.shape
        refused = UserError(
            f"{self.folder}: its model takes images of {height}×{width}×{channels} "
            f"pixels, got {'×'.join(map(str, shape))}; resize them"
        )
        if len(shape) != 3 or shape[2] != channels:
            raise refused
        other, precision = (shape[0], shape[1], channels), self.config.train.precision
        with devices.numerics(precision):
            model = self.config.model.make(other, precision)
            wanted = jax.eval_shape(
                lambda: init_params(model, key_for(0, Purpose.INIT), other, precision)
            )
        if jax.tree.map(np.shape, wanted) != jax.tree.map(np.shape, self.params):
            raise refused
        return dataclasses.replace(self, shape=other, model=model, _functions={})

    def data(
        self, folder: Path | None = None, source: Path | None = None
    ) -> data.Dataset:
        """The data that it is trained on.

        Args:
            folder: in which data sets are prepared; None: as the run had it, from
                wherever it is asked for.
            source: the user's own images, if they have moved.

        Raises:
            UserError: they are not what they were.
        """
        options = self.config.data
        if folder is None and hasattr(options, "dir") and not options.dir.exists():
            was = read_description(self.folder).data.dir
            folder = Path(was) if was and Path(was).exists() else None
        if folder is not None:
            options = dataclasses.replace(options, dir=folder)
        if source is not None:
            options = dataclasses.replace(options, source=source)
        dataset = data.load(options)
        check_fingerprint(self.folder, dataset)
        return dataset

    def figure(self, name: str) -> "Figure":
        """One of :data:`figures.FIGURES`, by name."""
        from ae_jax.runs import figures  # not before: matplotlib takes a second

        return figures.make(self, name)

    def _own_scores(self, seed: int) -> Any:
        name = f"scores {self.config.objective.loss_name} {seed}"
        if name not in self._functions:
            function = scores_of(self.config.objective, self.model, seed)
            self._functions[name] = jax.jit(function)
        return self._functions[name]

    def _function(self, method: str) -> Any:
        if method not in self._functions:
            if not self.has(method):
                name = type(self.model).__name__
                raise UserError(f"{self.folder}: its model, {name}, has no {method}")
            self._functions[method] = jax.jit(method_of(self.model, method))
        return self._functions[method]

    def _apply(self, method: str, inputs: Any) -> Any:
        with devices.numerics(self.config.train.precision):
            return in_blocks(self._function(method), self.params, inputs)


def open_run(run_dir: Path | str, which: str | int = "latest") -> Run:
    """Rebuild a run from its folder.

    Args:
        run_dir: the run folder.
        which: ``latest``, ``best``, or a step of which there is a checkpoint.

    Raises:
        UserError: no run, no checkpoint, not that one (the message lists those there
            are), a damaged one, or a model that is not known here.
    """
    path = Path(run_dir)
    return _open(path, read_description(path), which, None, {})


def open_like(
    like: Config, functions: dict[str, Any], which: str | int = "latest"
) -> Run:
    """Rebuild the run in the folder of a config, with the config's own classes.

    Args:
        like: its config.
        functions: compiled methods to share with runs of the same model and objective.
        which: as for :func:`open_run`.
    """
    path = like.run_dir
    return _open(path, read_description(path), which, like, functions)


def _open(
    path: Path,
    description: Description,
    which: str | int,
    like: Config | None,
    functions: dict[str, Any],
) -> Run:
    settings = read_config(path, description.config, like)
    with Checkpoints(path / "checkpoints") as checkpoints:
        step = _find_step(path, checkpoints, which)
        # First, for with another config the state would only seem damaged.
        history = checkpoints.load_history(step)
        check_description(path, description, history, like)
        shape = description.data.shape
        precision = settings.train.precision
        with devices.numerics(precision):
            model = settings.model.make(shape, precision)
            abstract = checkpoint.abstract_like(
                lambda: init_params(model, key_for(0, Purpose.INIT), shape, precision)
            )
            loaded, _ = checkpoints.load({"params": abstract}, step)
        rows, steps = history["rows"], checkpoints.steps
    params = loaded["params"]
    return Run(path, settings, shape, model, params, step, rows, steps, functions)


def _find_step(path: Path, checkpoints: Checkpoints, which: str | int) -> int:
    steps = checkpoints.steps
    if not steps:
        raise UserError(
            f"{path}: no checkpoint; give the run's command again and let it finish an "
            "epoch"
        )
    if which == "latest":
        return steps[-1]
    if which == "best":
        rows = checkpoints.load_history(steps[-1])["rows"]
        return best_step(rows) if rows else steps[-1]
    try:
        step = int(which)
    except ValueError:
        raise UserError(
            f"--checkpoint: must be latest, best or a step, got {which!r}"
        ) from None
    if step not in steps:
        kept = ", ".join(map(str, steps))
        raise UserError(
            f"{path}: no checkpoint of step {step}; choose latest, best or one of "
            f"{kept}"
        )
    return step


def read_config(path: Path, plain: Any, like: Config | None = None) -> Config:
    """The config in a run's config.json; the folder may have moved since.

    ``like`` is a config whose own classes are taken where the names are the same.
    """
    plain = {**plain, "run_dir": str(path)}
    where = str(path / "config.json")
    return config.from_json(Config, plain, where, unknown=True, like=like)


def check_description(
    path: Path,
    description: Description,
    history: History,
    like: Config | None = None,
) -> None:
    """Refuse a config.json that is not the one of a checkpoint.

    Args:
        path: the run folder.
        description: its config.json.
        history: the checkpoint's, which holds ``config`` and ``data`` as they were
            when it was saved.
        like: as for :func:`read_config`.

    Raises:
        UserError: they differ in a field that may not.
    """
    plains = description.config, history["config"]
    now, saved = (read_config(path, plain, like) for plain in plains)
    changed = {
        f"config.{key}": values
        for key, values in config.differences_that_matter(saved, now).items()
    }
    data_now = description.data.model_dump(mode="json")
    for key in ("fingerprint", "num_train", "shape"):
        values = (history["data"][key], data_now[key])
        if values[0] != values[1]:
            changed[f"data.{key}"] = values
    if changed:
        fields = "; ".join(f"{k}: {b}, saved was {a}" for k, (a, b) in changed.items())
        raise UserError(
            f"{path / 'config.json'}: not the one that the checkpoints were saved "
            f"with: {fields}; fix it"
        )


def check_fingerprint(run_dir: Path, dataset: data.Dataset) -> None:
    """Refuse to resume or score a run on other data than it was trained on.

    Raises:
        UserError: the fingerprints differ.
    """
    was = read_description(run_dir).data.fingerprint
    if was != dataset.fingerprint:
        raise UserError(
            f"{run_dir}: the run was trained on other data (fingerprint {was[:12]}…, "
            f"now {dataset.fingerprint[:12]}…); choose another --run-dir"
        )


def best_step(rows: list[EpochMetrics]) -> int:
    """The step of the best epoch: by held-out loss if there is one, else by training's.

    The test split is never asked. Ties go to the earlier epoch.
    """
    name = loss_name_of(rows[0])
    key = f"val/{name}" if f"val/{name}" in rows[0] else f"train/{name}"
    return int(min(rows, key=lambda row: row[key])["step"])
