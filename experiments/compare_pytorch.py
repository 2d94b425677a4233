"""Our training against PyTorch's: the same numbers, the same distribution, what speed?

Weights both ways; both sides in lockstep from the same weights and batches, in float64
until rounding grows visible and in float32 until it takes over; many seeds a side, each
with draws of its own; time and memory. The outcome is ``report.html`` in the run
folder, and ``parity.json``. What is finished is kept, and the same command resumes.

Expect a difference of 1e-16 after 12 steps in float64, 1e-14 after an epoch, 1e-11 to
1e-9 after ten, and in the seeds' distributions none. About half an hour on two cores;
the preset ``quick`` takes two to three minutes.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import PositiveFloat, PositiveInt

from ae_jax import cli, config, data
from ae_jax.config import CheckpointConfig, Config, FiguresConfig, TrainConfig
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_json, write_text
from ae_jax.options import options
from ae_jax.parity import lockstep
from ae_jax.runs import folder, results
from ae_jax.stats import compare_runs
from ae_jax.weights import Precision

if TYPE_CHECKING:
    from experiments._pair import Pair

NAME = "compare_pytorch"
ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]

TUTORIAL = {
    "data.num_validation": 0,
    "model.name": "autoencoder",
    "model.latent_activation": "relu",
    "model.init": "torch",
    "objective.name": "reconstruction",
    "objective.loss": "mse",
    "train.schedule": "constant",
    "train.warmup_steps": 0,
    "train.weight_decay": 0.0,
    "train.clip_norm": None,
    "train.patience": None,
    "train.init_from": None,
    "train.precision": "float32",
}
"""What the PyTorch side does, and has no option for."""


@options
class Comparison(Config):
    """What is compared: a run's config, and how much of each part."""

    lockstep_epochs: PositiveInt = 10
    """Epochs in which both sides are followed in float64."""
    drift_steps: PositiveInt = 938
    """Steps in which they are followed in float32, an epoch's at most."""
    num_seeds: PositiveInt = 32
    """Seeds a side, from 0 on, for the distributions."""
    seeds_at_once: PositiveInt = 8
    """Seeds that are one program on our side."""
    margin: PositiveFloat = 0.03
    """Relative difference in mean test MSE that counts as none."""
    speed_rounds: PositiveInt = 3
    """Rounds in which the speeds are measured, one after the other."""
    speed_steps: PositiveInt = 938
    """Steps that each takes in a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        values = config.flatten(config.to_json(self))
        for name, wanted in TUTORIAL.items():
            if values.get(name, wanted) != wanted:
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


def main(asked: Comparison) -> None:
    """The whole comparison in ``asked.run_dir``, or what is left of it.

    Raises:
        UserError: PyTorch is not installed; the folder is in use, is no run folder or
            holds another run; or the data set cannot be had.
        SystemExit: 1; the two sides are not the same.
    """
    import experiments.pytorch_baseline  # noqa: F401 - says it if there is no PyTorch
    from experiments._pair import Pair

    dataset = data.load(asked.data)
    with folder.lock(asked.run_dir):
        description = describe(asked, dataset)
        path = asked.run_dir / "report.html"  # the last file: with it we are done
        if path.exists():
            print(f"{asked.run_dir} is finished: see report.html there")
            return
        pair = Pair(asked.model, asked.train, dataset)
        found = measure(asked, pair, Ledger(asked.run_dir / "finished.jsonl").once)
        found |= conclude(found, asked.margin)
        write_report(asked, description, found)
    say(found["checks"], path)


def describe(asked: Comparison, dataset: data.Dataset) -> Row:
    """The folder's config.json: written, or the same comparison's.

    Raises:
        UserError: the folder holds another one, or one on other data.
    """
    import jax
    import torch

    from ae_jax.runs.run import check_fingerprint

    path = asked.run_dir
    device = {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
    now = folder.environment(device)
    now["versions"]["torch"] = str(torch.__version__)
    about = {"format": folder.FORMAT, "experiment": NAME, "data": dataset.describe()}
    new = {**about, **now, "code": {}, "history": []}
    known = folder.read_known(path, NAME)
    if known:
        values = {**known["config"], "run_dir": str(path)}  # it may have moved
        saved = config.from_json(Comparison, values, str(path / "config.json"))
        fields = [
            f"{key}: the run has {a}, you asked for {b}"
            for key, (a, b) in differ(saved, asked)
        ]
        if fields:
            raise UserError(f"{path} holds another run: {'; '.join(fields)}")
        check_fingerprint(path, dataset)
        warning = folder.record_environment_change(known, now)
        if warning:
            print(f"warning: {path}: {warning}", file=sys.stderr)
    description = {**(known or new), "config": config.to_json(asked)}
    write_json(path / "config.json", description)
    return description


def differ(a: Comparison, b: Comparison) -> list[tuple[str, Any]]:
    """What makes two comparisons different; unlike a run, none may grow by epochs."""
    rules = config.resume_rules(a)
    differences = config.diff(a, b).items()
    return [(key, pair) for key, pair in differences if rules.get(key) != "free"]


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
            write_text(self._path, "".join(lines))
        return self._rows[piece]["result"]


def measure(
    asked: Comparison, pair: "Pair", once: Callable[[str, Callable[[], Any]], Any]
) -> Row:
    """Every part of the comparison, piece by piece.

    Args:
        asked: how much of each.
        pair: the two sides.
        once: gives the result of a piece, see :meth:`Ledger.once`.
    """
    import torch

    from experiments import _pair

    torch.set_num_threads(1)  # beside JAX; two fight for the cores
    mini, whole = _pair.mini_images(pair), pair.dataset.train.images
    mini_epochs, epochs = _pair.MINI_EPOCHS, asked.lockstep_epochs
    race = partial(_pair.race, pair, asked.speed_steps, asked.speed_rounds)
    return {
        "layers": {
            name: once(f"layers in {name}", partial(_pair.compare_layers, pair, name))
            for name in get_args(Precision)
        },
        "mini": once("lockstep, mini", partial(_pair.follow, pair, mini, mini_epochs)),
        "whole": once("lockstep", partial(_pair.follow, pair, whole, epochs)),
        "drift": once("drift", partial(_pair.measure_drift, pair, asked.drift_steps)),
        "speed": once("speed", race),
        "memory": once("memory", partial(measure_memory, asked)),
        "ours": train_ours(asked),
        "theirs": [
            once(f"PyTorch's seed {seed}", partial(_pair.train_theirs, pair, seed))
            for seed in range(asked.num_seeds)
        ],
    }


def train_ours(asked: Comparison) -> list[Row]:
    """Our runs, each in a run folder below ``ours``; the outcome of each."""
    from ae_jax.runs.trainer import train_in_folders

    runs = [
        Config(
            run_dir=asked.run_dir / "ours" / str(seed),
            data=asked.data,
            model=asked.model,
            train=dataclasses.replace(asked.train, seed=seed),
            checkpoint=CheckpointConfig(keep=1),
            figures=FiguresConfig(epochs=(), draw=False),
        )
        for seed in range(asked.num_seeds)
    ]
    train_in_folders(runs, NAME, asked.seeds_at_once)
    names = ("test/mse", "latent/dead_units", "latent/collapsed")
    rows = []
    for run in runs:
        summary = read_json(run.run_dir / "summary.json")
        rows.append({"seed": run.train.seed, **{name: summary[name] for name in names}})
    return rows


def measure_memory(asked: Comparison) -> dict[str, int]:
    """Peak memory of both sides' commands for one epoch, each a process of its own."""
    name = config.to_json(asked)["data"]["name"]
    options = ["--data.name", name, "--data.dir", str(asked.data.dir.absolute())]
    peaks = {}
    for side, experiment in (("ours", "tutorial"), ("theirs", "pytorch_baseline")):
        with tempfile.TemporaryDirectory() as place:
            run_dir = Path(place) / "run"
            command = [sys.executable, "-m", f"experiments.{experiment}", *options]
            command += ["--train.num-epochs", "1", "--run-dir", str(run_dir)]
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
            summary = read_json(run_dir / "summary.json")
            peaks[side] = summary["peak_memory_bytes"]
    return peaks


def conclude(found: Row, margin: float) -> Row:
    """What the measurements come to.

    Returns:
        ``runs``, see :func:`compare_runs`; ``ratios``, see :func:`speed_ratios`;
        ``checks``, see :func:`lockstep.check_lockstep`, with one more, of the weights;
        ``headline``, flat.
    """
    runs = compare_runs(found["ours"], found["theirs"], margin)
    checks = lockstep.check_lockstep(found["mini"], found["whole"])
    headline = {
        **{row["name"]: row["value"] for row in checks},
        "tost_p": runs["tost_p"],
        "ks_p": runs["ks_p"],
        "collapse_fisher_p": runs["collapsed_p"],
    }
    exact = all(layers["exact"] for layers in found["layers"].values())
    what = "weights to PyTorch and back: conversions that change a bit"
    values = {"step": 0, "value": int(not exact), "limit": 0, "passed": exact}
    return {
        "runs": runs,
        "ratios": speed_ratios(found["speed"]),
        "checks": [{"name": "weights", "what": what, **values}, *checks],
        "headline": headline,
    }


def speed_ratios(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """PyTorch's time over ours: of each contender, and of the best one.

    Returns:
        By contender ``median``, ``low`` and ``high`` over the rounds; each round's
        ratio is of times that were taken within it.
    """
    times = [row["epoch_s"] for row in rounds]
    names = [name for name in times[0] if name != "ours"]
    ratios = {name: [t[name] / t["ours"] for t in times] for name in names}
    ratios["best"] = min(ratios.values(), key=statistics.median)
    return {
        name: {
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
        }
        for name, values in ratios.items()
    }


def write_report(asked: Comparison, description: Row, found: Row) -> None:
    """Write parity.json, the figures, of the reference the result, last the page."""
    from ae_jax.parity import report

    figures = asked.run_dir / "figures"
    figures.mkdir(exist_ok=True)
    report.draw(found, figures)
    write_json(asked.run_dir / "parity.json", found)
    if not differ(PRESETS["reference"], asked):
        results.write_result(
            ROOT / "experiments" / "results" / f"{NAME}.json",
            experiment=NAME,
            seeds=list(range(asked.num_seeds)),
            headline=found["headline"],
            table={
                "title": "Ours and PyTorch, from the same weights and batches",
                "columns": ["checked", "found", "allowed"],
                "rows": [
                    [row["what"], f"{row['value']:.1e}", f"{row['limit']:.0e}"]
                    for row in found["checks"]
                ],
                "caption": report.mean_verdict(found["runs"], asked.margin),
            },
        )
    page = report.page(description, found, figures)
    write_text(asked.run_dir / "report.html", page)


def say(checks: Sequence[Mapping[str, Any]], path: Path) -> None:
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


if __name__ == "__main__":
    cli.run_experiment(NAME, PRESETS, __doc__, main)
