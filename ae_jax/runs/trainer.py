"""The trainer: one run, or many that share a program, from start or resume to the end.

What may go wrong on the way has its place here: signals, a loss that is no longer
finite. What a run's folder holds is :mod:`member`'s.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np

from ae_jax import config, data, devices
from ae_jax.config import Config
from ae_jax.errors import Diverged, UserError
from ae_jax.keys import Purpose, key_for
from ae_jax.runs import checkpoint, environment, folder, report
from ae_jax.runs import run as runs
from ae_jax.runs.lanes import Feeds
from ae_jax.runs.member import Member, Shared
from ae_jax.runs.program import Compiled
from ae_jax.runs.run import Run, open_like
from ae_jax.runs.weights import load_weights
from ae_jax.train import Plan, TrainState, fit


def train_run(settings: Config, experiment: str = "run", started: float = 0.0) -> Run:
    """Train the run of a config in its folder, resume it, or find it finished.

    Errors and signals are those of :func:`train_runs`.

    Args:
        settings: the run's options; its ``run_dir`` is the folder.
        experiment: name, as in ``python -m experiments.NAME``.
        started: the ``time.monotonic()`` from which its time counts; 0: now.

    Returns:
        The run, opened at its newest checkpoint.
    """
    return train_runs([settings], experiment, started=started)[0]


def train_runs(
    configs: Sequence[Config],
    experiment: str = "run",
    together: int = 1,
    started: float = 0.0,
    on_chunk: Callable[[int], object] | None = None,
) -> list[Run]:
    """Train the runs of some configs, each in its folder: or resume or find them.

    Args:
        configs: of the runs, which differ in ``run_dir`` and ``train.seed`` alone.
        experiment: name, as in ``python -m experiments.NAME``.
        together: how many share a program. They are grouped by their order, and on an
            accelerator the size of a group is part of the bits: a finished run keeps
            its lane.
        started: the ``time.monotonic()`` from which their times count; 0: now.
        on_chunk: called with the step at each pause of a second or two, after what is
            due there has been logged and saved. What it raises ends the training.

    Raises:
        UserError: a folder is in use, is no run folder or holds another run; the data
            set cannot be had; a checkpoint is damaged.
        Diverged: a loss or a gradient is not finite.
        KeyboardInterrupt: SIGINT came; the state is saved.
        SystemExit: SIGTERM came; the state is saved.
    """
    train_in_folders(configs, experiment, together, started, on_chunk)
    return [open_like(one, {}) for one in configs]


def train_in_folders(
    configs: Sequence[Config],
    experiment: str,
    together: int,
    started: float = 0.0,
    on_chunk: Callable[[int], object] | None = None,
    shared: Shared | None = None,
) -> None:
    """What :func:`train_runs` does, without opening the runs in the end.

    ``shared`` is what they have in common with the runs of other calls.
    """
    first, started, shared = configs[0], started or time.monotonic(), shared or Shared()
    _check_alike(configs, min(together, len(configs)))
    devices.join(first)
    with devices.numerics(first.train.precision):
        devices.check_all_agree(_shared_options(first), "options")
        compile_for = functools.partial(_compile, first, shared)
        if len(configs) > together:  # else it goes before the scores need memory
            compile_for = functools.cache(compile_for)  # type: ignore[assignment]
        for start in range(0, len(configs), together):
            group = configs[start : start + together]
            _train_group(group, experiment, shared, compile_for, started, on_chunk)
            started = time.monotonic()


def _shared_options(settings: Config) -> dict[str, Any]:
    """What the processes of one job must agree on."""
    flat = config.flatten(config.to_json(settings))
    rules = config.resume_rules(settings.data, "data.")
    own = {"process_id", *(name for name, rule in rules.items() if rule == "free")}
    return {name: value for name, value in flat.items() if name not in own}


def _check_alike(configs: Sequence[Config], together: int) -> None:
    """Refuse runs of which one is not like the first, or that cannot train together.

    Raises:
        UserError: names what differs, or what is not possible.
    """
    first = configs[0]
    for name, value in {
        "train.patience": first.train.patience,
        "mesh.data": first.mesh.data,
        "distributed": first.distributed,
        "data.streaming": getattr(first.data, "streaming", False),
    }.items():
        if value and together > 1:
            raise UserError(f"{name}: not for runs that train together ({together})")
    for other in configs[1:]:
        fields = set(config.diff(first, other)) - {"run_dir", "train.seed"}
        if fields:
            raise UserError(
                f"{other.run_dir}: cannot be trained with {first.run_dir}: they "
                f"differ in {', '.join(sorted(fields))}"
            )


def _train_group(
    configs: Sequence[Config],
    experiment: str,
    shared: Shared,
    compile_for: Callable[[int], Compiled],
    started: float,
    on_chunk: Callable[[int], object] | None,
) -> None:
    """Train a group of runs in one program; their folders are locked meanwhile."""
    with contextlib.ExitStack() as stack:
        new = _lock_those_there(stack, configs)
        members = [Member(one, started) for one in configs]
        pending = [member for member in members if not member.finished]
        if not pending:
            if len(members) == 1 and devices.is_first():
                members[0].report_finished()
            return
        dataset, compiled = shared.dataset(configs[0].data), compile_for(len(configs))
        group = Group(members, dataset, compiled, on_chunk)
        for one in new:
            stack.enter_context(_lock_new(one.run_dir))
        _describe(pending, experiment, dataset, group)
        group.train()
        functions = compiled.functions
        del group, compiled  # a sixth of a run's memory is programs of its training
        environment.return_freed_memory()
        for member in pending if devices.is_first() else ():
            member.finish(shared, functions, shown=len(configs) == 1)


def _compile(settings: Config, shared: Shared, size: int) -> Compiled:
    dataset = shared.dataset(settings.data)
    num_train, processes = len(dataset.train.images), jax.process_count()
    if num_train < processes:
        raise UserError(
            f"data: {num_train} training images are too few for {processes} "
            "processes; start fewer"
        )
    return Compiled(settings, num_train, dataset.shape, size)


def _describe(
    members: Sequence[Member], experiment: str, dataset: data.Dataset, group: "Group"
) -> None:
    """Write each config.json; say once how the environment has changed."""
    device, digest = group.device(), group.start_digest
    changed = {
        member.folder: change
        for member in members
        if (change := member.describe(experiment, dataset, device, digest))
    }
    if changed and devices.is_first():
        place, change = next(iter(changed.items()))
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        print(
            f"warning: {place}{more}: environment changed since the last run "
            f"({change}): results may no longer be bit-identical",
            file=sys.stderr,
        )


def _lock_those_there(
    stack: contextlib.ExitStack, configs: Sequence[Config]
) -> list[Config]:
    """Hold the folders that exist; the other configs. Process 0 does it for all."""
    if not devices.is_first():
        return []
    there = [one for one in configs if one.run_dir.exists()]
    for one in there:
        stack.enter_context(folder.lock(one.run_dir))
    return [one for one in configs if one not in there]


@contextlib.contextmanager
def _lock_new(run_dir: Path) -> Iterator[None]:
    """Make and hold a folder that was not there when the command began."""
    with folder.lock(run_dir):
        if (run_dir / "config.json").exists():
            raise UserError(
                f"{run_dir}: another process has just started a run there; give the "
                "same command again"
            )
        yield


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one ends the process at once.

    In a thread other than the main one, which receives none, nothing is changed.
    """
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Group:
    """Runs being trained in one program; a finished one keeps its lane, unread.

    Args:
        members: of the group; at least one is not finished.
        dataset: of all.
        compiled: their program.
        on_chunk: see :func:`train_runs`.

    Raises:
        UserError: the parameters to start from are missing, or another model's.
    """

    def __init__(
        self,
        members: Sequence[Member],
        dataset: data.Dataset,
        compiled: Compiled,
        on_chunk: Callable[[int], object] | None = None,
    ) -> None:
        self._members, self._dataset, self._on_chunk = members, dataset, on_chunk
        self._config, self._compiled = members[0].config, compiled
        self._pending = [i for i, m in enumerate(members) if not m.finished]
        self._program, self._lanes = compiled.program, compiled.lanes
        self._num_train = len(dataset.train.images)
        self._loss = self._config.objective.loss_name
        num_epochs = self._config.train.num_epochs
        self._last_step = num_epochs * self._program.steps_per_epoch
        self._start = self._load_start()

    def _load_start(self) -> Any:
        """The parameters of ``init_from`` and their digest; None: there are none."""
        source = self._config.train.init_from
        if source is None or self._common_step():
            return None
        abstract = jax.eval_shape(self._program.init, np.uint32(0))
        return load_weights(source, abstract.params)

    def _common_step(self) -> int:
        """The newest step of which all have a checkpoint; 0: there is none."""
        steps = [set(self._members[i].checkpoints.steps) for i in self._pending]
        return max(set.intersection(*steps), default=0)

    def device(self) -> dict[str, Any]:
        """What config.json says of the devices, as far as a run's bits depend on them.

        Where seeds take turns each computes what a run alone does; else their products
        are batched, and the size of the group is part of the bits.
        """
        alone, mesh = len(self._members) == 1, self._lanes.mesh
        device: dict[str, Any] = {
            "kind": jax.devices()[0].device_kind,
            "count": mesh.size if alone else 1,
            "processes": jax.process_count(),
        }
        if not devices.take_turns(mesh):
            seeds = [member.config.train.seed for member in self._members]
            device["seeds_together"] = seeds
        return device

    @property
    def start_digest(self) -> str | None:
        """Of the parameters to start from, if there are any."""
        return self._start[1] if self._start else None

    # --- Training ---

    def train(self) -> None:
        """Train to the last epoch, from the newest checkpoint if there is one.

        Raises:
            KeyboardInterrupt, SystemExit: a signal came; the state is saved.
            Diverged: the loss or the gradient is not finite.
            UserError: a checkpoint is damaged.
        """
        settings, pending = self._config, [self._members[i] for i in self._pending]
        seeds = [member.config.train.seed for member in self._members]
        images, size = self._dataset.train.images, settings.train.batch_size
        feeds = Feeds(images, seeds, size, self._lanes, self._last_step)
        with contextlib.ExitStack() as stack:
            for member in pending:
                stack.enter_context(member.checkpoints)
            state = self._restore_or_init()
            step = int(state.step)
            for i in self._pending:
                member = self._members[i]
                member.begin(self._program.steps_per_epoch)
                self._show_images(member, feeds[i])
            until = step if pending[0].out_of_patience() else self._last_step
            chunk = self._program.chunk  # not compiled if there is nothing to do
            if step < until:
                chunk = self._compiled.chunk(state, feeds.block_at(step))
            plan = Plan(until, settings.checkpoint.every_steps, devices.clock)
            self._progress = self._start_progress(step)
            stack.enter_context(contextlib.closing(self._progress))
            self._signals = stack.enter_context(signals_noted())
            state = fit(state, chunk, feeds.block_at, plan, self._after_chunk)
            for member in pending:
                member.checkpoints.wait()
                member.prune()
            signum = self._agreed_signal()
        if signum:
            self._leave(int(state.step), signum)

    def _show_images(self, member: Member, feed: Any) -> None:
        """Store the images that the figures show; known before the first step."""
        seed, size = member.config.train.seed, self._config.train.batch_size
        train = self._dataset.train.images
        shuffle, drawn = (key_for(seed, p) for p in (Purpose.SHUFFLE, Purpose.SAMPLES))
        batches = range(min(-(-25 // size), self._program.steps_per_epoch))
        rows = np.concatenate([feed.rows_at(drawn, batch) for batch in batches])
        last_rows = feed.rows_at(shuffle, self._last_step - 1)
        member.show(self._dataset, train[rows[:25]], train[last_rows[:5]])

    def _start_progress(self, step: int) -> report.Progress:
        num_epochs, self._logged_step = self._config.train.num_epochs, step
        total = num_epochs * self._num_train * len(self._members)
        done = self._images_until(step)
        return report.Progress(total, done, num_epochs, devices.is_first())

    def _leave(self, step: int, signum: int) -> None:
        if devices.is_first():
            place = ", ".join(str(self._members[i].folder) for i in self._pending[:1])
            print(
                f"interrupted: step {step} is saved in {place}; the same command "
                "resumes from there",
                file=sys.stderr,
            )
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signum)

    def _init_of(self, member: Member) -> TrainState:
        seed = np.uint32(member.config.train.seed)
        if self._start:
            return self._compiled.start_from(self._start[0], seed)
        return self._compiled.init(seed)

    def _restore_or_init(self) -> TrainState:
        """The states of the newest common checkpoint, or the first ones."""
        pending = [self._members[i] for i in self._pending]
        step = self._common_step()
        if not step:
            for member in pending:
                member.checkpoints.remove_after(0)
            return self._lanes.join([self._init_of(m) for m in self._members])
        abstract = checkpoint.abstract_like(lambda: self._program.init(0))
        states = [
            member.restore(abstract, step)
            if i in self._pending
            else self._init_of(member)
            for i, member in enumerate(self._members)
        ]
        if devices.is_first():
            print(f"{pending[0].folder}: resumed at step {step}", file=sys.stderr)
        return self._lanes.join(
            [state._replace(step=states[self._pending[0]].step) for state in states]
        )

    def _images_until(self, step: int) -> int:
        """Images trained on in the first steps; an epoch's last batch is short."""
        epochs, steps = divmod(step, self._program.steps_per_epoch)
        of_one = epochs * self._num_train + steps * self._config.train.batch_size
        return of_one * len(self._members)

    # --- After each chunk ---

    def _after_chunk(self, state: TrainState, step: int, seconds: float) -> bool:
        """Log, save and judge what the last steps did; whether to continue."""
        per_epoch = self._program.steps_per_epoch
        done = (step - 1) % per_epoch + 1
        metrics = {
            name: self._lanes.on_host(values)[:, :done].astype(np.float64)
            for name, values in state.epoch_metrics.items()
        }
        self._check_finite(metrics, step - done)
        signum = self._agreed_signal()
        end_of_epoch, every = done == per_epoch, self._config.checkpoint.every_steps
        saving = end_of_epoch or signum or (every and step % every == 0)
        if saving:
            self._check_state(state, step)
        for i in self._pending:
            self._members[i].note_seconds(seconds / len(self._members))
        num_images = self._images_until(step) - self._images_until(self._logged_step)
        self._logged_step = step
        losses = metrics[self._loss][self._pending, -1]
        self._progress.update(num_images, float(np.median(losses)))
        if end_of_epoch:
            self._end_epoch(state, step, metrics)
        if saving:
            self._save(state)
        if self._on_chunk:
            self._on_chunk(step)
        stopped = end_of_epoch and self._members[self._pending[0]].out_of_patience()
        return not (signum or stopped)

    def _save(self, state: TrainState) -> None:
        """All save before any of them removes an older step: there is a common one."""
        pending = [self._members[i] for i in self._pending]
        states = self._lanes.split(state, self._pending)
        for member, one in zip(pending, states, strict=True):
            member.save(one)
        if len(self._members) > 1:  # they also share one copy of the state
            for member in pending:
                member.checkpoints.wait()
        for member in pending:
            member.prune()

    def _agreed_signal(self) -> int:
        """The signal that came to any of the processes; 0: none has.

        All processes ask together: a signal may come to this one alone, at any moment.
        """
        return devices.max_over_processes(self._signals[0] if self._signals else 0)

    def _check_finite(self, metrics: dict[str, np.ndarray], epoch_start: int) -> None:
        values = np.stack([values[self._pending] for values in metrics.values()])
        bad = ~np.isfinite(values).all(axis=0)
        if not bad.any():
            return
        step = int(bad.any(axis=0).argmax())
        lane = int(bad[:, step].argmax())
        numbers = zip(metrics, values[:, lane, step], strict=True)
        what = ", ".join(f"{name} {value:g}" for name, value in numbers)
        raise self._diverged(self._pending[lane], epoch_start + step + 1, what)

    def _check_state(self, state: TrainState, step: int) -> None:
        """What the last update made shows in no loss yet: look before it is saved."""
        for name in ("params", "opt_state"):
            for leaf in jax.tree.leaves(getattr(state, name)):
                values = self._lanes.on_host(leaf)
                for i in self._pending:
                    if not np.isfinite(values[i]).all():
                        raise self._diverged(i, step, f"{name} not finite")

    def _diverged(self, lane: int, step: int, what: str) -> Diverged:
        member = self._members[lane]
        member.checkpoints.wait()  # the last one may still be on its way
        steps = member.checkpoints.steps
        good = f"step {steps[-1]}" if steps else "there is none"
        return Diverged(
            f"{member.folder}: diverged at step {step}: {what}; last good checkpoint: "
            f"{good}; try a smaller --train.learning-rate, or --train.clip-norm 1, in "
            "another --run-dir"
        )

    def _end_epoch(
        self, state: TrainState, step: int, metrics: dict[str, np.ndarray]
    ) -> None:
        validation = self._validate(state, step)
        dead = self._count_dead_units(state)
        rate = float(self._program.schedule(step - 1))
        rows = []
        for i in self._pending:
            member = self._members[i]
            means = {name: float(values[i].mean()) for name, values in metrics.items()}
            seconds = member.history["epoch_s"]
            row = {
                "epoch": step // self._program.steps_per_epoch,
                "step": step,
                f"train/{self._loss}": means.pop(self._loss),
                **{f"train/{name}": mean for name, mean in means.items()},
                **{f"val/{name}": float(v[i]) for name, v in validation.items()},
                "train/learning_rate": rate,
                **({} if dead is None else {"latent/dead_units": int(dead[i])}),
                "wall_s": seconds,
                "images_per_s": self._num_train / seconds,
            }
            member.log_epoch(row)
            rows.append(row)
        self._report_epoch(rows)

    def _report_epoch(self, rows: list[folder.EpochMetrics]) -> None:
        num_epochs, row = self._config.train.num_epochs, rows[0]
        if len(self._members) > 1:
            seeds = [self._members[i].config.train.seed for i in self._pending]
            line = report.group_line(rows, seeds, num_epochs)
            self._progress.log_epoch(row["epoch"], line)
            return
        self._progress.log_epoch(row["epoch"], report.epoch_line(row, num_epochs))
        member = self._members[0]
        dead = [0, *(row.get("latent/dead_units", 0) for row in member.rows)]
        if dead[-1] != dead[-2] and devices.is_first():  # and again in the end
            line = member.diagnose() or "all latent units are active again"
            self._progress.write(line)

    def _count_dead_units(self, state: TrainState) -> np.ndarray | None:
        """How many latent units of each lane are zero for every training image."""
        if not runs.can_die(self._config):
            return None
        images, params = self._dataset.train.images, self._lanes.local(state.params)
        blocks = runs.each_block(self._compiled.active_units, params, images)
        active = functools.reduce(np.logical_or, (block for _, block in blocks))
        dead: np.ndarray = (~self._lanes.per_lane(active)).sum(axis=-1)
        return dead

    def _validate(self, state: TrainState, step: int) -> dict[str, np.ndarray]:
        """The objective's means over the held-out images, [S] each, by name."""
        images = self._dataset.validation.images
        if not len(images):
            return {}
        params = self._lanes.local(state.params)
        scores = self._compiled.scores
        blocks = [block for _, block in runs.each_block(scores, params, images)]
        means = {
            name: np.concatenate(
                [self._lanes.per_lane(block[name]) for block in blocks], axis=-1
            ).mean(axis=-1, dtype=np.float64)
            for name in blocks[0]
        }
        if jax.process_count() > 1:  # by it they decide when to stop
            agreed = devices.broadcast_from_process0(float(means[self._loss][0]))
            means[self._loss] = np.array([agreed])
        for i in self._pending:
            loss = float(means[self._loss][i])
            if not math.isfinite(loss):
                raise self._diverged(i, step, f"val/{self._loss} {loss:g}")
        return means
