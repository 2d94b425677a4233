"""Training one config in one run folder: start or resume, log, save, summarise.

What may go wrong on the way has its place here: signals, a loss that is no longer
finite, surroundings that changed since the run began.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ae_jax import checkpoint, config, data, evaluate, hosts, losses, records, run
from ae_jax.checkpoint import Checkpoints, History
from ae_jax.cli import Diverged
from ae_jax.config import Config, UserError
from ae_jax.feed import make_feed
from ae_jax.losses import Params
from ae_jax.records import Row
from ae_jax.train import Purpose, TrainState, fit, key_for


class Progress:
    """A bar on a terminal, a line for each epoch elsewhere; remarks on both."""

    def __init__(self, num_images: int, done: int, num_epochs: int) -> None:
        self._num_epochs = num_epochs
        self._bar = tqdm(
            total=num_images,
            initial=done,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (sys.stderr.isatty() and hosts.is_first()),
        )

    def update(self, num_images: int, loss: float) -> None:
        """So many more images were trained on; the newest batch had this loss."""
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(num_images)

    def tell_epoch(self, epoch: int, line: str) -> None:
        """An epoch has ended; the line is for where there is no bar."""
        self._bar.set_description(f"{epoch} of {self._num_epochs} epochs")
        if self._bar.disable:
            print(line, flush=True)

    def say(self, text: str) -> None:
        """A remark on stderr."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second one ends the process at once."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def start(
    experiment: str, settings: Config, started: float | None = None
) -> Iterator["Trainer"]:
    """Hold a run folder and start, or go on with, the run in it.

    Args:
        experiment: name, as in ``python -m experiments.NAME``.
        settings: the run's config.
        started: the ``time.monotonic()`` from which its times count; None: now.

    Raises:
        UserError: the folder is in use, is no run folder or holds another run; or the
            data set cannot be had.
    """
    started = started or time.monotonic()
    hosts.join(settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(hosts.others_alive())
        if hosts.is_first():
            stack.enter_context(records.lock(settings.run_dir))
        trainer = Trainer(experiment, settings, started)
        stack.callback(trainer.close)
        yield trainer


def load_newest(
    checkpoints: Checkpoints,
    abstract: TrainState,
    fallback: bool,
    name: str,
) -> tuple[TrainState, History]:
    """The newest state and its history; says which it is, and what is lost.

    Args:
        checkpoints: of the run; there is one.
        abstract: see :func:`checkpoint.abstract_like`.
        fallback: as for :meth:`Checkpoints.load_newest`.
        name: of what is loaded.

    Raises:
        UserError: see there.
    """
    newest = checkpoints.steps[-1]
    state, history, damaged = checkpoints.load_newest(abstract, fallback)
    step = int(state.step)
    if not hosts.is_first():
        return state, history
    if damaged:
        reasons = ", ".join(f"{s} ({why})" for s, why in damaged.items())
        tqdm.write(
            f"warning: {name}: removed damaged checkpoints of steps {reasons}; "
            f"{newest - step} steps are lost",
            file=sys.stderr,
        )
    tqdm.write(f"{name}: going on from step {step}", file=sys.stderr)
    return state, history


class Trainer:
    """A run being trained; made by :func:`start`.

    Attributes:
        config: the run's.
        finished: whether there was nothing left to do.
    """

    def __init__(self, experiment: str, settings: Config, started: float) -> None:
        self.config = settings
        self.folder = settings.run_dir
        self._started = started
        self._board: records.Board | None = None
        self._mesh = hosts.make_mesh(settings.mesh.data, settings.train.batch_size)
        description = records.read_known(self.folder, experiment)
        if description:
            was = run.read_config(self.folder, description, type(settings))
            run.check_newest(self.folder, description, type(settings))
            config.check_resumable(was, settings)
        self.finished = self._is_finished()
        if self.finished:
            return
        with hosts.first_goes_ahead():
            self._dataset = data.load(settings.data)
        images, shape = self._dataset.train.images, self._dataset.shape
        self._check_enough(len(images))
        where = hosts.replicated(self._mesh)
        self._program = run.build(settings, len(images), *shape, sharding=where)
        description = run.write_description(
            experiment, settings, self._dataset, description
        )
        self._saved_with = {key: description[key] for key in ("config", "data")}
        # Compiling takes seconds, each on one core: it goes on while the main thread
        # chooses and draws images. What is traced before is in nobody's way.
        self._feed = make_feed(settings, images, self._program.order, self._mesh)
        train = self._dataset.train._replace(images=self._feed.images)
        self._dataset = dataclasses.replace(self._dataset, train=train)
        self._feed.lower(self._program.train_step, self._abstract())
        pool = ThreadPoolExecutor()
        self._compiled = pool.submit(self._feed.compile)
        self._first_state = pool.submit(self._program.init)
        pool.shutdown(wait=False)
        if hosts.is_first():
            self._write_pictures()
        self._history: History = {"rows": [], "epoch_s": 0.0, "wall_s": 0.0}

    def _check_enough(self, num_images: int) -> None:
        if num_images < jax.process_count():
            raise UserError(
                f"{self.config.data.name}: {num_images} training images are too few "
                f"for {jax.process_count()} processes; start fewer"
            )

    # --- Before training ---

    def _is_finished(self) -> bool:
        summary = records.read_summary(self.folder)
        if not summary:
            return False
        if summary["epochs"] < self.config.train.num_epochs and not summary["stopped"]:
            return False
        if hosts.is_first():
            print(
                f"{self.folder} is finished after {summary['epochs']} epochs: test/mse "
                f"{summary['test/mse']:.4f}. A larger --train.num-epochs goes on."
            )
        return True

    def _write_pictures(self) -> None:
        """Choose the images that the figures show; known before the first step."""
        seed, num_epochs = self.config.train.seed, self.config.train.num_epochs
        train, test = self._dataset.train.images, self._dataset.test.images
        batch_size = self.config.train.batch_size
        rows_of = self._feed.rows_of
        order, last = key_for(seed, Purpose.SHUFFLE), self._program.steps_per_epoch - 1
        batches = range(-(-25 // batch_size))
        samples = [
            row
            for batch in batches[: last + 1]
            for row in rows_of(key_for(seed, Purpose.SAMPLES), 0, batch)
        ]
        last_test_batch = test[(len(test) - 1) // batch_size * batch_size :]
        chosen = {
            "samples": train[np.array(samples[:25])],
            "train": train[rows_of(order, num_epochs - 1, last)[:5]],
            "test": last_test_batch[:10],
        }
        pictures: dict[str, Any] = {
            name: images.reshape(-1, *self._dataset.shape)
            for name, images in chosen.items()
        }
        path = self.folder / "figures" / "images.npz"
        path.parent.mkdir(exist_ok=True)
        records.write_file(path, lambda file: np.savez_compressed(file, **pictures))

    # --- Training ---

    def fit(self) -> None:
        """Train to the last epoch, from the newest checkpoint if there is one.

        Raises:
            SystemExit: a signal came; the state is saved, the status the shell's.
            Diverged: the loss or the gradient is not finite.
            UserError: the newest checkpoint is damaged, and no fallback asked for.
        """
        settings = self.config
        folder = self.folder / "checkpoints"
        last_step = settings.train.num_epochs * self._program.steps_per_epoch
        with Checkpoints(folder, settings.checkpoint.keep) as self._checkpoints:
            state = self._restore_or_init()
            if self._out_of_patience():
                last_step = int(state.step)
            self._compiled.result()
            with (
                self._show_progress(state),
                signals_noted() as self._signals,
                hosts.others_alive(),
            ):
                state = fit(
                    state,
                    self._feed.advance,
                    last_step,
                    settings.checkpoint.every_steps,
                    self._after_chunk,
                )
            signum = self._agreed_signal()
        if signum:
            if hosts.is_first():
                print(
                    f"interrupted: step {int(state.step)} is saved in {folder}; the "
                    "same command goes on from there",
                    file=sys.stderr,
                )
            sys.exit(128 + signum)

    def _abstract(self) -> TrainState:
        where = hosts.replicated(self._mesh)
        state: TrainState = checkpoint.abstract_like(self._program.init, where)
        return state

    def _restore_or_init(self) -> TrainState:
        """The newest checkpoint's state, or the first; rewrites the logs to match."""
        steps = self._checkpoints.steps
        state: TrainState
        if steps:
            fallback = self.config.checkpoint.fallback
            state, self._history = load_newest(
                self._checkpoints, self._abstract(), fallback, str(self.folder)
            )
            self._checkpoints.prune(self._pinned_steps())
        else:
            state = self._first_state.result()
        del self._first_state  # lest a resumed run carry it along
        self._wall_before = self._history["wall_s"]
        if hosts.is_first():
            records.write_rows(self.folder, self._history["rows"])
        return state

    @contextlib.contextmanager
    def _show_progress(self, state: TrainState) -> Iterator[None]:
        num_epochs, self._last_step = self.config.train.num_epochs, int(state.step)
        total = num_epochs * len(self._dataset.train.images)
        done = self._images_until(self._last_step)
        self._progress = Progress(total, done, num_epochs)
        try:
            yield
        finally:
            self._progress.close()

    def _images_until(self, step: int) -> int:
        """Images trained on in the first steps; an epoch's last batch is short."""
        epochs, steps = divmod(step, self._program.steps_per_epoch)
        num_images = len(self._dataset.train.images)
        return epochs * num_images + steps * self.config.train.batch_size

    def _after_chunk(self, state: TrainState, step: int, seconds: float) -> bool:
        """Log, save and judge what the last steps did; whether to go on."""
        per_epoch = self._program.steps_per_epoch
        done = (step - 1) % per_epoch + 1
        metrics = {
            name: np.asarray(values)[:done].astype(np.float64)
            for name, values in state.epoch_metrics.items()
        }
        self._check_finite(metrics, step - done)
        signum = self._agreed_signal()
        end_of_epoch, every = done == per_epoch, self.config.checkpoint.every_steps
        saving = end_of_epoch or signum or (every and step % every == 0)
        if saving:
            self._check_state(state, step)
        self._history.setdefault("first_step_s", time.monotonic() - self._started)
        self._history["epoch_s"] += seconds
        num_images = self._images_until(step) - self._images_until(self._last_step)
        self._last_step = step
        self._progress.update(num_images, metrics["loss"][-1])
        if end_of_epoch:
            self._end_epoch(state, step, metrics)
        if saving:
            self._save(state)
        return not (signum or (end_of_epoch and self._out_of_patience()))

    def _agreed_signal(self) -> int:
        """The signal that came to any of the processes; 0: none has.

        All ask together and go by the answer: one may come to this process alone, and
        at any moment.
        """
        return hosts.largest(self._signals[0] if self._signals else 0)

    def _check_finite(self, metrics: dict[str, np.ndarray], epoch_start: int) -> None:
        bad = ~np.isfinite(np.stack(list(metrics.values()))).all(axis=0)
        if not bad.any():
            return
        i = int(bad.argmax())
        values = ", ".join(f"{name} {v[i]:g}" for name, v in metrics.items())
        raise self._diverged(epoch_start + i + 1, values)

    def _check_state(self, state: TrainState, step: int) -> None:
        """What the last update made shows in no loss yet: look before it is saved."""
        for name in ("params", "opt_state"):
            for leaf in jax.tree.leaves(getattr(state, name)):
                if not np.isfinite(leaf).all():
                    raise self._diverged(step, f"{name} not finite")

    def _diverged(self, step: int, what: str) -> Diverged:
        steps = self._checkpoints.steps
        good = f"step {steps[-1]}" if steps else "there is none"
        return Diverged(
            f"{self.folder}: diverged at step {step}: {what}; last good checkpoint: "
            f"{good}; try a smaller --train.learning-rate, or --train.clip-norm 1, in "
            "another --run-dir"
        )

    def _end_epoch(
        self, state: TrainState, step: int, metrics: dict[str, np.ndarray]
    ) -> None:
        loss, images = self.config.train.loss, self._dataset.train.images
        rows: list[Row] = self._history["rows"]
        params = hosts.local(state.params)
        dead = 0.0
        if hosts.is_first():
            dead = float(run.dead_units(self._program.encode, params, images).sum())
        means = {name: float(values.mean()) for name, values in metrics.items()}
        row = {
            "epoch": step // self._program.steps_per_epoch,
            "step": step,
            f"train/{loss}": means.pop("loss"),
            **{f"train/{name}": mean for name, mean in means.items()},
            **self._validate(params, step),
            "train/learning_rate": float(self._program.schedule(step - 1)),
            "code/dead_units": int(hosts.from_first(dead)),
            "wall_s": self._history["epoch_s"],
            "images_per_s": len(images) / self._history["epoch_s"],
        }
        rows.append(row)
        self._history["epoch_s"] = 0.0
        if hosts.is_first():
            self._tell_epoch(rows)

    def _tell_epoch(self, rows: list[Row]) -> None:
        """Write and show the newest row."""
        row = rows[-1]
        records.write_rows(self.folder, rows)
        if self._board:
            self._board.add_row(row)
        else:  # not before: it takes time to open, and the first step is waited for
            self._board = records.Board(self.folder, rows)
        num_epochs, width = self.config.train.num_epochs, self.config.model.code_width
        line = records.epoch_line(row, num_epochs, self.config.train.loss, width)
        self._progress.tell_epoch(row["epoch"], line)
        dead = [0] + [row["code/dead_units"] for row in rows]
        if dead[-1] != dead[-2]:  # told when it happens, and again in the end
            self._progress.say(self._diagnose() or "no code unit is dead any more")

    def _validate(self, params: Params, step: int) -> Row:
        images = self._dataset.validation.images
        if not len(images):
            return {}
        name = self.config.train.loss
        mean = 0.0
        if hosts.is_first():
            blocks = run.each_block(self._program.reconstruct, params, images)
            per_example = [
                np.asarray(losses.LOSSES[name](jnp.asarray(recon), jnp.asarray(target)))
                for target, recon in blocks
            ]
            mean = float(np.concatenate(per_example).mean(dtype=np.float64))
        mean = hosts.from_first(mean)
        if not np.isfinite(mean):
            raise self._diverged(step, f"val/{name} {mean:g}")
        return {f"val/{name}": mean}

    def _out_of_patience(self) -> bool:
        rows, patience = self._history["rows"], self.config.train.patience
        if not patience or not rows:
            return False
        best = run.best_step(rows, self.config.train.loss)
        waited = rows[-1]["epoch"] - best // self._program.steps_per_epoch
        return bool(waited >= patience)

    def _save(self, state: TrainState) -> None:
        rows = list(self._history["rows"])
        history = {**self._history, **self._saved_with, "rows": rows}
        history["wall_s"] = self._wall_s()
        self._checkpoints.save(state, history, self._pinned_steps())

    def _pinned_steps(self) -> set[int]:
        """Those of the figures' epochs, and the best."""
        rows, per_epoch = self._history["rows"], self._program.steps_per_epoch
        shown = {*self.config.figures.epochs, self.config.train.num_epochs}
        pinned = {epoch * per_epoch for epoch in shown}
        if rows:
            pinned.add(run.best_step(rows, self.config.train.loss))
        return pinned

    def _wall_s(self) -> float:
        before: float = self._wall_before
        return before + time.monotonic() - self._started

    # --- After training ---

    def draw(self, name: str) -> None:
        """Draw one of :data:`run.FIGURES` into the run folder and its TensorBoard."""
        if not hosts.is_first():
            return
        path = run.draw(self.folder, name)
        if self._board:
            self._board.add_figure(path)
        elif self._history["rows"]:  # resumed when only the end was missing
            self._board = records.Board(self.folder, self._history["rows"])

    def summarise(self) -> None:
        """Score the newest checkpoint on the whole test split; write summary.json.

        It is also shown, as a table beside two baselines: the mean image, and PCA with
        as many components as the code has units.
        """
        if not hosts.is_first():
            return
        opened = run.open_run(self.folder)
        train, test = self._dataset.train.images, self._dataset.test.images
        width, last = self.config.model.code_width, opened.rows[-1]
        loss = f"train/{self.config.train.loss}"
        summary = {
            loss: last[loss],
            **run.score(opened, self._dataset.test, "test", self._dataset.shape),
            "baseline/mean_image/test/mse": evaluate.mean_image_mse(train, test),
            "baseline/pca/test/mse": evaluate.pca_mse(train, test, width),
            "checkpoint_step": opened.step,
            "steps": opened.step,
            "epochs": last["epoch"],
            "stopped": self._out_of_patience(),
            "wall_s": self._wall_s(),
            "first_step_s": self._history["first_step_s"],
            "peak_memory_bytes": records.peak_memory_bytes(),
        }
        device_memory = jax.local_devices()[0].memory_stats()
        if device_memory:
            summary["device_peak_bytes"] = device_memory["peak_bytes_in_use"]
        self.close()  # a kill from here on finds all else complete
        records.write_json(self.folder / "summary.json", summary)
        print(records.score_table(summary, width))
        remark = self._diagnose()
        if remark:
            print(remark)

    def _diagnose(self) -> str | None:
        dead = [row["code/dead_units"] for row in self._history["rows"]]
        return evaluate.diagnose(dead, self.config.model.code_width)

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        if self._board:
            self._board.close()
            self._board = None
