"""One run's folder while it trains: what it was, what is logged and saved, its end."""

import functools
import sys
import time
from typing import Any

import numpy as np

from ae_jax import baselines, collapse, config, data, devices, files, registry
from ae_jax.config import Config
from ae_jax.errors import UserError
from ae_jax.runs import folder, report
from ae_jax.runs import run as runs
from ae_jax.runs.checkpoint import Checkpoints, History
from ae_jax.runs.folder import EpochMetrics
from ae_jax.runs.run import Run, open_like
from ae_jax.train import TrainState


def code_digests(settings: Config) -> dict[str, str]:
    """Of the classes that are not ours, what they do, by section."""
    digests = {
        name: registry.digest_code(getattr(settings, name))
        for name in config.REGISTRIES
    }
    return {name: digest for name, digest in digests.items() if digest}


class Member:
    """A run among those that train together; often it is alone.

    Attributes:
        config: the run's.
        folder: its folder.
        known: what config.json holds, if there is one.
        history: the rows of metrics.jsonl, and times.
    """

    def __init__(self, settings: Config, started: float) -> None:
        """Look at what is there; nothing is written.

        Raises:
            UserError: the folder holds another run, or a damaged one.
        """
        for section in config.REGISTRIES:
            if isinstance(chosen := getattr(settings, section), registry.Unknown):
                chosen.refuse()
        self.config, self.folder = settings, settings.run_dir
        self.history: History = {"rows": [], "epoch_s": 0.0, "wall_s": 0.0}
        self._started = started
        self._writer: folder.TensorBoardWriter | None = None
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.known: dict[str, Any] | None = None
        if (self.folder / "config.json").exists():
            self.known = folder.read_description(self.folder)
            self._check_known(self.known)

    def _check_known(self, known: dict[str, Any]) -> None:
        path, settings = self.folder, self.config
        config.check_same_run(runs.read_config(path, known, settings), settings)
        code = code_digests(settings)
        changed = [k for k in code if code[k] != known["code"].get(k)]
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
        enough: bool = summary["epochs"] >= self.config.train.num_epochs
        return enough or bool(summary["stopped"])

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
        start_digest: str | None,
    ) -> None:
        """Write config.json as the run starts, or bring it up to date on resume.

        Another environment than the run had before is reported, and noted in it.

        Args:
            experiment: its name.
            dataset: what it is trained on.
            device: accelerators, and the group of runs that share a program.
            start_digest: of the parameters it starts from, if not its own draw.

        Raises:
            UserError: the run was trained on other data.
        """
        now = folder.environment(device)
        description = self.known or {
            "format": folder.FORMAT,
            "experiment": experiment,
            "config": {},
            **now,
            "data": dataset.describe(),
            "code": {},
            "history": [],
        }
        if self.known:
            runs.check_fingerprint(self.folder, dataset)
            warning = folder.record_environment_change(self.known, now)
            if warning and devices.is_first():
                print(f"warning: {self.folder}: {warning}", file=sys.stderr)
        description["config"] = config.to_json(self.config)
        description["code"] = code_digests(self.config)
        if start_digest:
            description["init_from_digest"] = start_digest
        self._saved_with = {key: description[key] for key in ("config", "data")}
        if devices.is_first():
            # If there is one, the run is resumed, and it is no longer its summary.
            (self.folder / "summary.json").unlink(missing_ok=True)
            files.write_json(self.folder / "config.json", description)
        keep = self.config.checkpoint.keep
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state of a step; later ones are removed."""
        self.checkpoints.remove_after(step)
        state, self.history = self.checkpoints.load(abstract, step)
        return state

    def begin(self, images: dict[str, Any], steps_per_epoch: int) -> None:
        """Write what the figures show, and metrics.jsonl as the history has it.

        Args:
            images: the figures' images, by name.
            steps_per_epoch: T.
        """
        self._steps_per_epoch = steps_per_epoch
        self._wall_before = self.history["wall_s"]
        if devices.is_first():
            path = self.folder / "figures" / "images.npz"
            path.parent.mkdir(exist_ok=True)
            files.write_file(path, lambda file: np.savez_compressed(file, **images))
            folder.write_metrics(self.folder, self.rows)

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
        if self._writer:
            self._writer.add_row(row)
        else:  # not before: it takes time to open, and the first step is waited for
            self._writer = folder.TensorBoardWriter(self.folder, self.rows)

    def save(self, state: TrainState) -> None:
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

    def finish(self, dataset: data.Dataset, shared: "Shared", shown: bool) -> None:
        """Draw the figures, score the newest checkpoint, write summary.json.

        summary.json is the last file: it is what makes the run finished.

        Args:
            dataset: what it is trained on.
            shared: what the runs of a group have in common.
            shown: whether the scores are printed.
        """
        opened = open_like(self.config, shared.functions)
        if self.config.figures.draw:
            from ae_jax.runs import figures  # not before: matplotlib takes a second

            for name in figures.applicable(opened):
                figures.draw(opened, name)
        summary = self._summarise(opened, dataset, shared)
        if self._writer is None:  # resumed when only the end was missing
            self._writer = folder.TensorBoardWriter(self.folder, opened.metrics)
        scores = {k: v for k, v in summary.items() if k.startswith("test/")}
        flat = config.flatten(config.to_json(self.config))
        self._writer.add_scores(flat, scores, opened.step)
        self.close()  # a kill from here on finds all else complete
        files.write_json(self.folder / "summary.json", summary)
        if shown:
            print(report.score_table(summary, self.config, self.diagnose()))

    def _summarise(
        self, opened: Run, dataset: data.Dataset, shared: "Shared"
    ) -> dict[str, Any]:
        """The scores of a checkpoint on the whole test split, beside two baselines."""
        test, last = dataset.test.images, opened.metrics[-1]
        loss = f"train/{folder.loss_name_of(last)}"
        summary: dict[str, Any] = {loss: last[loss]}
        summary |= {f"test/{k}": v for k, v in opened.score_split(test).items()}
        if opened.has("encode", "decode"):
            latent_dim = opened.encode(test[:1]).shape[-1]
            summary |= shared.baselines(latent_dim)
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
            "peak_memory_bytes": folder.peak_memory_bytes(),
            **devices.peak_memory(),
        }

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        if self._writer:
            self._writer.close()
            self._writer = None


class Shared:
    """What runs that differ in their seed alone have in common, made once for all.

    Attributes:
        functions: compiled methods of their model.
    """

    def __init__(self, dataset: data.Dataset) -> None:
        self.functions: dict[str, Any] = {}
        self._splits = dataset.train.images, dataset.test.images
        self._scores: dict[int, dict[str, float]] = {}

    def baselines(self, latent_dim: int) -> dict[str, float]:
        """Test errors of the mean image, and of PCA where the images are not large."""
        if latent_dim not in self._scores:
            pca = baselines.pca_mse(*self._splits, latent_dim)
            mean = baselines.mean_image_mse(*self._splits)
            scores = {"baseline/mean_image/test/mse": mean}
            scores |= {} if pca is None else {"baseline/pca/test/mse": pca}
            self._scores[latent_dim] = scores
        return self._scores[latent_dim]
