"""Many seeds of one run, in one folder: trained in groups, each group as one program.

A member has the initial parameters, the batches and the draws of the single run of its
seed, to the bit. What it computes differs in the last bits, since a product over all
members rounds otherwise; in float32 that grows until member and single run are two
different runs of one distribution. The same command gives the same bits again.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from ae_jax import checkpoint, config, data, evaluate, figures, losses, records, run
from ae_jax.checkpoint import Checkpoints, History
from ae_jax.cli import Diverged
from ae_jax.config import Config, EnsembleConfig, UserError
from ae_jax.losses import Params
from ae_jax.records import Row
from ae_jax.run import Program
from ae_jax.train import (
    MEMBERS,
    Purpose,
    TrainState,
    fit,
    key_for,
    make_members_chunk,
    make_runner,
    make_train_chunk,
    members_mesh,
    over_members,
    spread,
)
from ae_jax.trainer import Progress, load_newest, signals_noted


def use_all_cores() -> None:
    """Have JAX see each core as a device, so that members are spread over them.

    One member alone cannot keep two cores busy, two members on one core each do. Call
    it before anything else asks for JAX's devices; where there is an accelerator, it
    changes nothing.
    """
    jax.config.update("jax_num_cpu_devices", records.usable_cores())


class Group(NamedTuple):
    """The programs of S members, trained side by side.

    Attributes:
        init: (seeds [S]) to the states before the first step.
        order: (seeds [S], epoch) to the members' batches, [S, T, B].
        advance: (states, images [N, D], order [S, T, B], stop) to states; donated.
        mse: (params, images [N, D]) to the squared error of each, [S, N].
        active: (params, images [N, D]) to whether a code unit is ever not 0, [S, K].
        put: (seeds, states or images, their axes) to their places on the devices.
    """

    init: Callable[[UInt32[Array, " S"]], TrainState]
    order: Callable[[UInt32[Array, " S"], int], Int[Array, "S T B"]]
    advance: jax.stages.Wrapped
    mse: Callable[[Params, UInt8[Array, "N D"]], Float[Array, "S N"]]
    active: Callable[[Params, UInt8[Array, "N D"]], Bool[Array, "S K"]]
    put: Callable[[Any, Any], Any]


@functools.lru_cache(maxsize=4)  # compiled programs are large
def make_group(program: Program, num_members: int) -> Group:
    """The programs of so many members, spread over the devices at hand."""
    mesh = members_mesh(num_members)

    def jitted(function: Callable[..., Any], in_axes: Any, out_axes: Any = 0) -> Any:
        return jax.jit(over_members(function, mesh, in_axes, out_axes))

    def order(seed: UInt32[Array, ""], epoch: Int[Array, ""]) -> Int[Array, "T B"]:
        return program.order(key_for(seed, Purpose.SHUFFLE), epoch)

    def mse(params: Params, x: Float[Array, "B D"]) -> Float[Array, " B"]:
        return losses.squared_error(program.reconstruct(params, x), x)

    def active(params: Params, images: UInt8[Array, "N D"]) -> Bool[Array, " K"]:
        return (_in_blocks(program.encode, params, images) != 0).any(axis=0)

    return Group(
        init=jitted(program.init_at, 0, MEMBERS),
        order=jitted(order, (0, None)),
        advance=make_members_chunk(program.train_step, mesh),
        mse=jitted(functools.partial(_in_blocks, mse), (0, None)),
        active=jitted(active, (0, None)),
        put=lambda tree, axes: jax.device_put(tree, spread(mesh, axes)),
    )


def _in_blocks(
    function: Callable[[Params, Array], Array],
    params: Params,
    images: UInt8[Array, "N D"],
) -> Array:
    """A function of images [B, D] in [0, 1] over stored images, block by block."""
    dtype = jax.tree.leaves(params)[0].dtype

    def of_one(image: UInt8[Array, " D"]) -> Array:
        return function(params, image[None].astype(dtype) / 255)[0]

    outputs: Array = jax.lax.map(of_one, images, batch_size=run.BLOCK)
    return outputs


RESULTS = "results.jsonl"
RESULT = {"seed": int, "epochs": int, "test/mse": float, "outcome": str}
"""What a row of it must hold, and of which types."""
ROW = {"seed": int, "epoch": int}
"""The same of a row of metrics.jsonl."""


def groups(settings: EnsembleConfig) -> list[range]:
    """The seeds in the groups in which they are trained; the last may be smaller."""
    first, size = settings.train.seed, settings.seeds.group_size
    seeds = range(first, first + settings.num_seeds)
    return [seeds[start : start + size] for start in range(0, len(seeds), size)]


def checkpoints_of(run_dir: Path, seeds: range) -> Path:
    """The folder of a group's checkpoints."""
    return run_dir / "checkpoints" / f"seeds-{seeds[0]}-to-{seeds[-1]}"


def read_saved(folder: Path, history: History) -> EnsembleConfig:
    """The config under which a checkpoint was saved."""
    saved: EnsembleConfig = config.from_json(
        EnsembleConfig, history["config"], str(folder)
    )
    return saved


def check_resumable(known: EnsembleConfig, asked: EnsembleConfig) -> None:
    """As :func:`config.check_resumable`; more seeds are allowed if groups stay whole.

    Raises:
        UserError: one ``field: the run has A, you asked for B`` for each difference.
    """
    whole = known.num_seeds % known.seeds.group_size == 0
    if whole and asked.num_seeds >= known.num_seeds:
        known = dataclasses.replace(known, num_seeds=asked.num_seeds)
    config.check_resumable(known, asked)


@contextlib.contextmanager
def start(
    experiment: str, settings: EnsembleConfig, started: float | None = None
) -> Iterator["Ensemble"]:
    """Hold a run folder and start, or go on with, the seeds in it.

    Args:
        experiment: name, as in ``python -m experiments.NAME``.
        settings: the run's config.
        started: the ``time.monotonic()`` from which its times count; None: now.

    Raises:
        UserError: the folder is in use, is no run folder or holds another run; or the
            data set cannot be had.
    """
    with records.lock(settings.run_dir):
        yield Ensemble(experiment, settings, started or time.monotonic())


class Ensemble:
    """Many seeds being trained; made by :func:`start`.

    Attributes:
        config: the run's.
        results: by seed, what has become of those that are finished.
        saved_with: what of config.json a checkpoint's history holds.
        clock: the ``time.monotonic()`` up to which time is accounted for.
        finished: whether there was nothing left to do.
    """

    def __init__(
        self, experiment: str, settings: EnsembleConfig, started: float
    ) -> None:
        self.config = settings
        self.folder = settings.run_dir
        self.clock = started
        known = records.read_known(self.folder, experiment)
        if known:
            was = run.read_config(self.folder, known, type(settings))
            check_resumable(was, settings)
        rows = records.read_rows(self.folder, RESULTS, RESULT)
        self.results: dict[int, Row] = {row["seed"]: row for row in rows}
        rows = records.read_rows(self.folder, types=ROW)
        self._logged = {row["seed"]: row["epoch"] for row in rows}
        self.finished = (self.folder / "summary.json").exists() and not self._pending()
        if self.finished:
            print(f"{self.folder} is finished: see summary.json and {RESULTS} there")
            return
        self.dataset = data.load(settings.data)
        num_train = len(self.dataset.train.images)
        self.program = run.build(settings, num_train, *self.dataset.shape)
        description = run.write_description(experiment, settings, self.dataset, known)
        self.saved_with = {key: description[key] for key in ("config", "data")}

    def _pending(self) -> list[range]:
        """The groups with a seed that has not been trained to the last epoch."""
        return [
            seeds
            for seeds in groups(self.config)
            if any(not self._is_done(seed) for seed in seeds)
        ]

    def _is_done(self, seed: int) -> bool:
        row, num_epochs = self.results.get(seed), self.config.train.num_epochs
        logged = self._logged.get(seed, 0) >= num_epochs  # else the file was lost
        return row is not None and row["epochs"] >= num_epochs and logged

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        before, self.clock = self.clock, time.monotonic()
        return self.clock - before

    def fit(self) -> None:
        """Train each group to the last epoch, from its newest checkpoint.

        Raises:
            SystemExit: a signal came; the states are saved, the status the shell's.
            Diverged: a loss or a gradient is not finite.
            UserError: the newest checkpoint is damaged, or the disk is full.
        """
        num_epochs, pending = self.config.train.num_epochs, self._pending()
        per_seed = num_epochs * len(self.dataset.train.images)
        done = self.config.num_seeds - sum(map(len, pending))
        progress = Progress(
            self.config.num_seeds * per_seed, done * per_seed, num_epochs
        )
        with contextlib.closing(progress), signals_noted() as signals:
            for seeds in pending:
                results = GroupTraining(self, seeds, progress, signals).fit()
                self.results |= {row["seed"]: row for row in results}
                rows = [self.results[seed] for seed in sorted(self.results)]
                records.write_rows(self.folder, rows, RESULTS)
                if signals:
                    break
        if signals:
            print(
                f"interrupted: all is saved in {self.folder}; the same command goes on "
                "from there",
                file=sys.stderr,
            )
            sys.exit(128 + signals[0])

    def time_ratios(self, num_rounds: int = 5, num_steps: int = 200) -> list[float]:
        """A seed's time in a full group over that of a single run, timed in turns."""
        program, size = self.program, self.config.seeds.group_size
        group, seeds = make_group(program, size), jnp.arange(size, dtype=jnp.uint32)
        images = self.dataset.train.images
        together = make_runner(
            group.advance,
            group.init(seeds),
            group.put(images, None),
            group.order(seeds, 0),
        )
        alone = make_runner(
            make_train_chunk(program.train_step),
            program.init(),
            jax.device_put(images),
            program.order(key_for(0, Purpose.SHUFFLE), 0),
        )

        turns = [
            records.stopwatch(together, num_steps)
            / (size * records.stopwatch(alone, num_steps))
            for _ in range(num_rounds + 1)
        ]
        return turns[1:]  # the first compiles

    def summarise(self) -> Row:
        """Write summary.json: shares and scores of all seeds, with their intervals."""
        rows = [self.results[seed] for group in groups(self.config) for seed in group]
        summary = {
            **evaluate.summarise_runs(rows),
            "epochs": self.config.train.num_epochs,
            "steps": self.config.train.num_epochs * self.program.steps_per_epoch,
            "baseline/mean_image/test/mse": evaluate.mean_image_mse(
                self.dataset.train.images, self.dataset.test.images
            ),
            "wall_s": sum(row["wall_s"] for row in rows),
            "seed_epoch_s": statistics.mean(
                row["wall_s"] for row in records.read_rows(self.folder)
            ),
            "peak_memory_bytes": records.peak_memory_bytes(),
        }
        records.write_json(self.folder / "summary.json", summary)
        return summary


def draw(run_dir: Path) -> Path:
    """Draw the seeds' training losses from the run folder alone; the PNG's path.

    Raises:
        UserError: no seed is finished yet.
    """
    results = records.read_rows(run_dir, RESULTS, RESULT)
    if not results:
        raise UserError(f"{run_dir}: no finished seed to draw yet")
    loss = records.read_description(run_dir)["config"]["train"]["loss"]
    rows: dict[int, list[Row]] = {row["seed"]: [] for row in results}
    for row in records.read_rows(run_dir, types=ROW):
        rows.get(row["seed"], []).append(row)
    curves: dict[str, list[figures.Curve]] = {name: [] for name in evaluate.OUTCOMES}
    for result in results:
        of_it = rows[result["seed"]]
        curve = [row["epoch"] for row in of_it], [row[f"train/{loss}"] for row in of_it]
        curves[result["outcome"]].append(curve)
    path = run_dir / "figures" / "seeds.png"
    path.parent.mkdir(exist_ok=True)
    figures.save(figures.seeds(curves, loss.upper()), path)
    return path


def summary_table(summary: Row) -> str:
    """What has become of the seeds, as a table for people."""
    lines = [f"{'':10}{'seeds':>6}{'share':>8}   95 % interval   median test MSE"]
    for name in evaluate.OUTCOMES:
        key = name.replace("-", "_")
        share, low, high = (
            summary[f"share_{key}{end}"] for end in ("", "_low", "_high")
        )
        mse = summary[f"test/mse/{key}"]
        lines.append(
            f"{name:10}{summary[key]:6}{share:8.0%}   {low:5.0%} to {high:4.0%}   "
            + (f"{mse:15.5f}" if mse else f"{'–':>15}")
        )
    low, high = summary["test/mse/median_low"], summary["test/mse/median_high"]
    lines.append(
        f"median test MSE of all: {summary['test/mse/median']:.5f} (95 % interval "
        f"{low:.5f} to {high:.5f})"
    )
    return "\n".join(lines)


def take(run_dir: Path, seed: int, new_dir: Path) -> int:
    """Take a member out as a run folder of its own, of the tutorial's form.

    All of its checkpoints go with it, so that it can be scored, drawn and gone on with
    as any single run.

    Args:
        run_dir: the seeds' folder.
        seed: the member's.
        new_dir: the new run folder.

    Returns:
        The newest step.

    Raises:
        UserError: no such member, or none of its checkpoints yet; or ``new_dir`` is not
            empty.
    """
    if new_dir.is_file() or (new_dir.is_dir() and any(new_dir.iterdir())):
        raise UserError(f"{new_dir}: in the way; choose another folder")
    description = records.read_description(run_dir)
    if description["experiment"] != "seeds":
        raise UserError(
            f"{run_dir}: a run of experiments.{description['experiment']}; only one of "
            "experiments.seeds has seeds to take out"
        )
    settings = run.read_config(run_dir, description, EnsembleConfig)
    all_groups = groups(settings)
    group = next((seeds for seeds in all_groups if seed in seeds), None)
    if group is None:
        first, last = all_groups[0][0], all_groups[-1][-1]
        raise UserError(f"{run_dir}: no seed {seed}; it has {first} to {last}")
    folder = checkpoints_of(run_dir, group)
    if not folder.is_dir():
        raise UserError(f"{run_dir}: seed {seed} has no checkpoint yet; let it train")
    about = description["data"]
    program = run.build(settings, about["num_train"], *about["shape"])
    members = jnp.asarray(group, jnp.uint32)
    init = functools.partial(make_group(program, len(group)).init, members)
    abstract = checkpoint.abstract_like(init)
    index = group.index(seed)
    known = {field.name for field in dataclasses.fields(Config)}
    plain = {k: v for k, v in description["config"].items() if k in known}
    plain["train"] = {**plain["train"], "seed": seed}
    plain["run_dir"] = str(new_dir)
    beside = new_dir.with_name(f".{new_dir.name}.{os.getpid()}")
    try:
        with (
            Checkpoints(folder) as ours,
            Checkpoints(beside / "checkpoints", len(ours.steps)) as theirs,
        ):
            for step in ours.steps:
                states, history = ours.load(abstract, step)
                check_resumable(read_saved(folder, history), settings)
                own = {**_history_of(history, seed), "config": plain, "data": about}
                theirs.save(member(states, index), own, set())
        taken = {"experiment": "tutorial", "config": plain}
        source = {"taken_from": {"run": str(run_dir), "seed": seed}}
        records.write_json(beside / "config.json", {**description, **taken, **source})
        os.replace(beside, new_dir)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return step


def member(states: TrainState, index: int) -> TrainState:
    """The state of one member, as a single run has it."""

    def part_of(axis: int | None, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda leaf: leaf[index], part)

    own: TrainState = jax.tree.map(
        part_of, MEMBERS, states, is_leaf=lambda axis: axis is None
    )
    return own


def _history_of(history: History, seed: int) -> History:
    """A group's history as that of one of its members."""
    rows = [
        {name: value for name, value in row.items() if name != "seed"}
        for row in history["rows"]
        if row["seed"] == seed
    ]
    return {**history, "rows": rows}


def _epoch_line(rows: list[Row], num_epochs: int, loss: str, code_width: int) -> str:
    """An epoch of a group as one line for people."""
    median = statistics.median(row[f"train/{loss}"] for row in rows)
    counts = collections.Counter(
        evaluate.outcome(row["code/dead_units"], code_width) for row in rows
    )
    outcomes = ", ".join(f"{counts[name]} {name}" for name in evaluate.OUTCOMES)
    return (
        f"seeds {rows[0]['seed']} to {rows[-1]['seed']}  "
        f"epoch {rows[0]['epoch']}/{num_epochs}  median train/{loss} {median:.5f}  "
        f"{outcomes}  {rows[0]['wall_s']:.2f} s each"
    )


class GroupTraining:
    """A group being trained, in the folder of its ensemble."""

    def __init__(
        self, ensemble: Ensemble, seeds: range, progress: Progress, signals: list[int]
    ) -> None:
        self._ensemble, self._seeds = ensemble, seeds
        self._progress, self._signals = progress, signals
        self._config, self._program = ensemble.config, ensemble.program
        self._loss = self._config.train.loss
        self._group = make_group(self._program, len(seeds))
        self._members = self._group.put(np.asarray(seeds, np.uint32), 0)
        self._others = [
            row
            for row in records.read_rows(ensemble.folder)
            if row["seed"] not in seeds
        ]
        self._history: History = {"rows": [], "epoch_s": 0.0, "wall_s": 0.0}

    def fit(self) -> list[Row]:
        """Train to the last epoch; the members' results, none if a signal came."""
        settings, group = self._config, self._group
        self._images = group.put(self._ensemble.dataset.train.images, None)
        folder = checkpoints_of(settings.run_dir, self._seeds)
        with Checkpoints(folder, settings.checkpoint.keep) as self._checkpoints:
            states = self._restore_or_init()
            order = group.order(self._members, 0)
            # Compiled here, so that the first chunk's time is its steps' alone.
            advance = group.advance.lower(states, self._images, order, 0).compile()
            per_epoch = self._program.steps_per_epoch

            def go_on(states: TrainState, step: int, stop: int) -> TrainState:
                order = group.order(self._members, step // per_epoch)
                after: TrainState = advance(states, self._images, order, stop)
                return after

            states = fit(
                states,
                go_on,
                settings.train.num_epochs * per_epoch,
                settings.checkpoint.every_steps,
                self._after_chunk,
            )
        return [] if self._signals else self._score(states.params)

    def _restore_or_init(self) -> TrainState:
        """The newest checkpoint's states, or the first; rewrites the log to match."""
        folder, steps = self._checkpoints.folder, self._checkpoints.steps
        init = functools.partial(self._group.init, self._members)
        self._last_step = 0
        if steps:
            name, fallback = str(folder), self._config.checkpoint.fallback
            abstract = checkpoint.abstract_like(init)
            loaded, self._history = load_newest(
                self._checkpoints, abstract, fallback, name
            )
            check_resumable(read_saved(folder, self._history), self._config)
            self._checkpoints.prune(self._pinned_steps())
            states: TrainState = self._group.put(loaded, MEMBERS)
            self._tell_progress(states, int(states.step))
        else:
            states = init()
        self._write_rows()
        return states

    def _write_rows(self) -> None:
        rows = [*self._others, *self._history["rows"]]
        records.write_rows(self._config.run_dir, rows)

    def _images_until(self, step: int) -> int:
        num_images = len(self._ensemble.dataset.train.images)
        epochs, steps = divmod(step, self._program.steps_per_epoch)
        of_one = epochs * num_images + steps * self._config.train.batch_size
        return of_one * len(self._seeds)

    def _after_chunk(self, states: TrainState, step: int, seconds: float) -> bool:
        """Log, save and judge what the last steps did; whether to go on."""
        per_epoch = self._program.steps_per_epoch
        done = (step - 1) % per_epoch + 1
        metrics = {
            name: np.asarray(values)[:, :done].astype(np.float64)
            for name, values in states.epoch_metrics.items()
        }
        self._check_finite(metrics, step - done)
        every = self._config.checkpoint.every_steps
        saving = done == per_epoch or self._signals or (every and step % every == 0)
        if saving:
            self._check_states(states, step)
        since = time.monotonic() - self._ensemble.clock
        self._history.setdefault("first_step_s", since)
        self._history["epoch_s"] += seconds
        self._tell_progress(states, step)
        if done == per_epoch:
            self._end_epoch(states, step, metrics)
        if saving:
            self._save(states)
        return not self._signals

    def _tell_progress(self, states: TrainState, step: int) -> None:
        num_images = self._images_until(step) - self._images_until(self._last_step)
        self._last_step = step
        newest = (step - 1) % self._program.steps_per_epoch
        median = float(np.median(states.epoch_metrics["loss"][:, newest]))
        self._progress.update(num_images, median)

    def _check_finite(self, metrics: dict[str, np.ndarray], epoch_start: int) -> None:
        bad = ~np.isfinite(np.stack(list(metrics.values()))).all(axis=0)
        if not bad.any():
            return
        step = int(bad.any(axis=0).argmax())
        raise self._diverged(int(bad[:, step].argmax()), epoch_start + step + 1)

    def _check_states(self, states: TrainState, step: int) -> None:
        """What the last update made shows in no loss yet: look before it is saved."""
        for leaf in jax.tree.leaves((states.params, states.opt_state)):
            bad = ~np.isfinite(leaf).reshape(len(self._seeds), -1).all(axis=1)
            if bad.any():
                raise self._diverged(int(bad.argmax()), step)

    def _diverged(self, member: int, step: int) -> Diverged:
        return Diverged(
            f"{self._config.run_dir}: seed {self._seeds[member]} diverged at step "
            f"{step}; try a smaller --train.learning-rate, or --train.clip-norm 1, in "
            "another --run-dir"
        )

    def _end_epoch(
        self, states: TrainState, step: int, metrics: dict[str, np.ndarray]
    ) -> None:
        num_images = len(self._ensemble.dataset.train.images)
        means = {name: values.mean(axis=1) for name, values in metrics.items()}
        wall_s = self._history["epoch_s"] / len(self._seeds)
        dead = self._dead_units(states.params, self._images)
        rows = [
            {
                "seed": seed,
                "epoch": step // self._program.steps_per_epoch,
                "step": step,
                f"train/{self._loss}": float(means["loss"][i]),
                **{
                    f"train/{name}": float(values[i])
                    for name, values in means.items()
                    if name != "loss"
                },
                "train/learning_rate": float(self._program.schedule(step - 1)),
                "code/dead_units": int(dead[i]),
                "wall_s": wall_s,
                "images_per_s": num_images / wall_s,
            }
            for i, seed in enumerate(self._seeds)
        ]
        self._history["rows"] += rows
        self._history["epoch_s"] = 0.0
        self._write_rows()
        width = self._config.model.code_width
        line = _epoch_line(rows, self._config.train.num_epochs, self._loss, width)
        self._progress.tell_epoch(rows[0]["epoch"], line)

    def _dead_units(self, params: Params, images: Array) -> np.ndarray:
        active = np.asarray(self._group.active(params, images))
        counts: np.ndarray = (~active).sum(axis=1)
        return counts

    def _save(self, states: TrainState) -> None:
        self._history["wall_s"] += self._ensemble.lap()
        rows = list(self._history["rows"])
        history = {**self._history, **self._ensemble.saved_with, "rows": rows}
        self._checkpoints.save(states, history, self._pinned_steps())

    def _pinned_steps(self) -> set[int]:
        per_epoch = self._program.steps_per_epoch
        return {epoch * per_epoch for epoch in self._config.figures.epochs}

    def _score(self, params: Params) -> list[Row]:
        """The results of the members on the whole test split."""
        group, last = self._group, self._history["rows"][-len(self._seeds) :]
        images = group.put(self._ensemble.dataset.test.images, None)
        errors = np.asarray(group.mse(params, images), np.float64)
        dead = self._dead_units(params, images)
        width = self._config.model.code_width
        wall_s = self._history["wall_s"] + self._ensemble.lap()
        return [
            {
                "seed": row["seed"],
                "epochs": row["epoch"],
                "train/mse": row["train/mse"],
                "test/mse": float(errors[i].mean()),
                "test/psnr_db": float(evaluate.psnr(errors[i]).mean()),
                "code/dead_units": int(dead[i]),
                "outcome": evaluate.outcome(int(dead[i]), width),
                "wall_s": wall_s / len(self._seeds),
            }
            for i, row in enumerate(last)
        ]
