"""One run's folder while it trains: what it was, what is logged and saved, its end."""

import datetime
import functools
import time
from pathlib import Path
from typing import Any, Literal

from ae_jax import baselines, collapse, config, data, devices, files, registry
from ae_jax.config import Config
from ae_jax.errors import UserError
from ae_jax.runs import environment, folder, report
from ae_jax.runs import run as runs
from ae_jax.runs.checkpoint import Checkpoints, History, Weights
from ae_jax.runs.folder import EpochMetrics
from ae_jax.runs.run import Run, open_like
from ae_jax.train import TrainState

Framework = Literal["jax", "pytorch"]

NUM_ENCODED = 1000
"""Test images whose latents the figures show."""


def code_digests(settings: Config) -> dict[str, str]:
    """Of the classes that are not ours, what they do, by section."""
    digests = {
        name: registry.digest_code(getattr(settings, name))
        for name in config.REGISTRIES
    }
    return {name: digest for name, digest in digests.items() if digest}


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


class Member:
    """A run among those that train together; often it is alone.

    Attributes:
        config: the run's.
        folder: its folder.
        known: what config.json holds, if there is one.
        history: the rows of metrics.jsonl, and times.
    """

    def __init__(
        self, settings: Config, started: float = 0.0, framework: Framework = "jax"
    ) -> None:
        """Look at what is there; nothing is written.

        Args:
            settings: the run's config.
            started: the ``time.monotonic()`` from which its times count; 0: now.
            framework: what trains it.

        Raises:
            UserError: the folder holds another run, or a damaged one.
        """
        for section in config.REGISTRIES:
            if isinstance(chosen := getattr(settings, section), registry.Unknown):
                chosen.refuse()
        self.config, self.folder = settings, settings.run_dir
        self.history: History = {"rows": [], "epoch_s": 0.0, "wall_s": 0.0}
        self._started, self._framework = started or time.monotonic(), framework
        self._writer: folder.TensorBoardWriter | None = None
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.known: folder.Description | None = None
        if (self.folder / "config.json").exists():
            self.known = folder.read_description(self.folder)
            self._check_known(self.known)

    def _check_known(self, known: folder.Description) -> None:
        path, settings = self.folder, self.config
        if known.framework != self._framework:
            raise UserError(
                f"{path} holds a run of {known.experiment}, trained by "
                f"{known.framework}; choose another --run-dir"
            )
        config.check_same_run(runs.read_config(path, known.config, settings), settings)
        code = code_digests(settings)
        changed = [k for k in code if code[k] != known.code.get(k)]
        if changed:
            raise UserError(
                f"{path} holds another run: the class of {', '.join(changed)} was "
                "defined differently. Choose another --run-dir, or delete the run"
            )
        steps = self.checkpoints.steps
        if steps:
            with self.checkpoints:
                history = self.checkpoints.load_history(steps[-1])
            runs.check_description(path, known, history, settings)

    @functools.cached_property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        summary = folder.read_summary(self.folder) if self.known else None
        if summary is None:
            return False
        if summary["steps"] not in self.checkpoints.steps:
            return False  # what it scored is gone, and is trained again
        enough: bool = summary["epochs"] >= self.config.train.num_epochs
        return enough or bool(summary["stopped"])

    def report_finished(self) -> None:
        """Say that there is nothing left to do."""
        print(
            f"{self.folder} is finished. A larger --train.num-epochs continues it."
            if self._framework == "jax"
            else f"{self.folder} is finished."
        )

    @property
    def rows(self) -> list[EpochMetrics]:
        """The rows of metrics.jsonl so far."""
        rows: list[EpochMetrics] = self.history["rows"]
        return rows

    # --- Before training ---

    def describe(
        self,
        experiment: str,
        dataset: data.Dataset,
        device: dict[str, Any],
        start_digest: str | None = None,
    ) -> str | None:
        """Write config.json as the run starts, or bring it up to date on resume.

        Args:
            experiment: its name.
            dataset: what it is trained on.
            device: accelerators, and the group of runs that share a program.
            start_digest: of the parameters it starts from, if not its own draw.

        Returns:
            How the environment differs from that of the run's last session, which is
            recorded; None: not at all.

        Raises:
            UserError: the run was trained on other data.
        """
        packages = ("torch",) if self._framework == "pytorch" else ()
        now, changed = environment.here(device, *packages), []
        if self.known is None:
            description = folder.Description(
                experiment=experiment,
                config={},
                framework=self._framework,
                **now.model_dump(exclude={"date"}),
                data=folder.Data(**dataset.describe()),
            )
        else:
            description = self.known
            runs.check_fingerprint(self.folder, dataset)
            changed = environment.changes(description.environment, now)
        if changed:
            description.history.append(now.model_copy(update={"date": _today()}))
        description.config = config.to_json(self.config)
        if place := getattr(self.config.data, "dir", None):
            description.data.dir = str(Path(place).absolute())
        description.code = code_digests(self.config)
        if start_digest:
            description.init_from_digest = start_digest
        saved = description.model_dump(include={"config", "data"}, mode="json")
        self._saved_with = saved
        if devices.is_first():
            # If there is one, the run is resumed, and it is no longer its summary.
            (self.folder / "summary.json").unlink(missing_ok=True)
            folder.write_description(self.folder, description)
        keep = self.config.checkpoint.keep
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep)
        return ", ".join(changed) or None

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of a step; later ones are removed, and earlier ones looked into."""
        self.checkpoints.remove_after(step)
        self.checkpoints.check_others(abstract, step)
        state, self.history = self.checkpoints.load(abstract, step)
        return state

    def begin(self, steps_per_epoch: int) -> None:
        """Start counting time, and have metrics.jsonl as the history has it.

        Args:
            steps_per_epoch: T.
        """
        self._steps_per_epoch = steps_per_epoch
        self._wall_before = self.history["wall_s"]
        self._resumed_at = self.rows[-1]["step"] if self.rows else 0
        if devices.is_first():
            folder.write_metrics(self.folder, self.rows)

    def show(self, dataset: data.Dataset, samples: Any, last_batch: Any) -> None:
        """Write figures/images.npz, all that the figures show.

        Args:
            dataset: of the run.
            samples: random training images [n, H, W, C].
            last_batch: images of the last batch of the last epoch.
        """
        (test, labels), size = dataset.test, self.config.train.batch_size
        images = {
            "samples": samples,
            "train": last_batch,
            "test": test[(len(test) - 1) // size * size :][:10],
            "encoded": test[:NUM_ENCODED],
            "labels": labels[:NUM_ENCODED],
        }
        if devices.is_first():
            path = self.folder / "figures" / "images.npz"
            path.parent.mkdir(exist_ok=True)
            files.write_arrays(path, images)

    # --- While it trains ---

    def note_seconds(self, seconds: float) -> None:
        """So much longer has the current epoch been training."""
        self.history.setdefault("first_step_s", time.monotonic() - self._started)
        self.history["epoch_s"] += seconds

    def log_epoch(self, row: EpochMetrics) -> None:
        """Log an epoch's numbers."""
        self.rows.append(row)
        self.history["epoch_s"] = 0.0
        if not devices.is_first():
            return
        folder.write_metrics(self.folder, self.rows)
        self._tensorboard().add_row(row)

    def _tensorboard(self) -> folder.TensorBoardWriter:
        # Not at the start: its import takes time, and the first step is waited for.
        if self._writer is None:
            self._writer = folder.TensorBoardWriter(self.folder, self._resumed_at)
        return self._writer

    def save(self, state: TrainState | Weights) -> None:
        """Save a state, in the background."""
        history = {**self.history, **self._saved_with, "rows": list(self.rows)}
        history["wall_s"] = self._wall_s()
        self.checkpoints.save(state, history)

    def prune(self) -> None:
        """Keep the newest checkpoints, the best, and those of the figures' epochs."""
        shown = {*self.config.figures.epochs, self.config.train.num_epochs}
        # Not of what is still being saved: if it never is, the one before is the best.
        last = max(self.checkpoints.steps, default=0)
        rows = [row for row in self.rows if row["step"] <= last]
        best = {runs.best_step(rows)} if rows else set()
        self.checkpoints.prune({e * self._steps_per_epoch for e in shown} | best)

    def out_of_patience(self) -> bool:
        """Whether the validation loss has not improved for too many epochs."""
        patience = self.config.train.patience
        if not patience or not self.rows:
            return False
        best = runs.best_step(self.rows) // self._steps_per_epoch
        return bool(self.rows[-1]["epoch"] - best >= patience)

    def diagnose(self) -> str | None:
        """One sentence about dead latent units; None if there are none."""
        dead = [row.get("latent/dead_units", 0) for row in self.rows]
        return collapse.diagnose(dead, getattr(self.config.model, "latent_dim", 0))

    def _wall_s(self) -> float:
        before: float = self._wall_before
        return before + time.monotonic() - self._started

    # --- After training ---

    def finish(self, shared: "Shared", functions: dict[str, Any], shown: bool) -> None:
        """Draw the figures, score the newest checkpoint, write summary.json.

        summary.json is the last file: it is what makes the run finished.

        Args:
            shared: what it has in common with other runs.
            functions: compiled methods that it shares with them.
            shown: whether the scores are printed.
        """
        opened = open_like(self.config, functions)
        if self.config.figures.draw:
            from ae_jax.runs import figures  # not before: matplotlib takes a second

            for name in figures.applicable(opened):
                figures.draw(opened, name)
        summary = self._summarise(opened, shared)
        scores = {k: v for k, v in summary.items() if k.startswith("test/")}
        flat = config.flatten(config.to_json(self.config))
        self._tensorboard().add_scores(flat, scores, opened.step)
        folder.write_summary(self.folder, summary)  # a kill before finds all complete
        if shown:
            print(report.score_table(summary, self.config, self.diagnose()))

    def _summarise(self, opened: Run, shared: "Shared") -> dict[str, Any]:
        """The scores of a checkpoint on the whole test split, beside two baselines."""
        test = shared.dataset(self.config.data).test.images
        last = opened.metrics[-1]
        loss = f"train/{folder.loss_name_of(last)}"
        summary: dict[str, Any] = {loss: last[loss]}
        summary |= {f"test/{k}": v for k, v in opened.score_split(test).items()}
        if opened.has("encode", "decode"):
            latent_dim = opened.encode(test[:1]).shape[-1]
            summary |= shared.baselines(self.config.data, latent_dim)
            if runs.can_die(self.config):
                dead = opened.count_dead_units(test)
                summary["latent/dead_units"] = dead
                summary["latent/collapsed"] = dead == latent_dim
        return {
            **summary,
            "checkpoint_step": opened.step,
            "steps": opened.step,
            "epochs": last["epoch"],
            "stopped": self.out_of_patience(),
            "wall_s": self._wall_s(),
            "first_step_s": self.history["first_step_s"],
            "peak_memory_bytes": environment.peak_memory_bytes(),
            **devices.peak_memory(),
        }


class Shared:
    """What runs of the same data have in common: loaded and computed once."""

    def __init__(self) -> None:
        self._options: Any = None
        self._dataset: data.Dataset
        self._baselines: dict[int, dict[str, float]] = {}

    def dataset(self, options: Any) -> data.Dataset:
        """The data set of these options; the last one is kept."""
        if options is not self._options:
            with devices.process0_first("data"):
                self._dataset = data.load(options)
            self._options, self._baselines = options, {}
        return self._dataset

    def baselines(self, options: Any, latent_dim: int) -> dict[str, float]:
        """Test errors of the mean image, and of PCA where the images are not large."""
        dataset = self.dataset(options)
        if latent_dim not in self._baselines:
            splits = dataset.train.images, dataset.test.images
            mean = baselines.mean_image_mse(*splits)
            scores = {"baseline/mean_image/test/mse": mean}
            pca = baselines.pca_mse(*splits, latent_dim)
            scores |= {} if pca is None else {"baseline/pca/test/mse": pca}
            self._baselines[latent_dim] = scores
        return self._baselines[latent_dim]
