"""Prove on this machine that a killed run ends as an undisturbed one.

The tutorial runs once undisturbed, then again while it is killed (SIGKILL) at random
moments and resumed, until all kills are used up. If a run finishes before that, it is
compared, and another one begins. Compared to the bit are parameters, optimiser state,
key and metrics at the end, and the names of the files left. The verdict is one line of
JSON; exit status 0: identical, 1: not, and the two runs are kept. The runs lie in a
temporary folder, so that --run-dir is refused.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ae_jax import cli, records
from ae_jax.config import CheckpointConfig, Config, UserError, to_json
from experiments import tutorial

TIMES = ("wall_s", "images_per_s")


@dataclass(frozen=True)
class Verification(Config):
    """A run of the tutorial, and how often it is killed."""

    kills: int = 20
    """Kills, at moments drawn uniformly over the undisturbed run's time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kills < 1:
            raise ValueError(f"kills: must be above 0, got {self.kills}")


# Saved often, a run makes progress even between kills that follow each other closely.
OFTEN = CheckpointConfig(every_steps=100)
PRESETS = {
    name: Verification(**{**vars(preset), "checkpoint": OFTEN})
    for name, preset in tutorial.PRESETS.items()
}


def main() -> None:
    """Verify, print the verdict, and leave with its status."""
    if any(word.startswith(("--run-dir", "--run_dir")) for word in sys.argv[1:]):
        raise UserError("--run-dir: the runs lie in a temporary folder; leave it out")
    prog = "python scripts/verify_resume.py"
    config = cli.parse("tutorial", PRESETS, __doc__ or "", sys.argv[1:], prog)
    for signum in (signal.SIGINT, signal.SIGTERM):  # by an exception: it ends the child
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    folder = Path(tempfile.mkdtemp(prefix="ae_jax-verify-"))
    verdict: dict[str, Any] = {"identical": True}
    try:
        verdict = verify(config, folder)
    finally:
        if verdict["identical"]:
            shutil.rmtree(folder)
    print(json.dumps(verdict))
    if not verdict["identical"]:
        print(f"the runs are kept in {folder}", file=sys.stderr)
        sys.exit(1)


def verify(config: Verification, folder: Path) -> dict[str, Any]:
    """Run undisturbed, then disturbed, and compare.

    Args:
        config: the run's, with the number of kills.
        folder: where the runs go.

    Returns:
        The verdict: ``identical``, ``kills``, ``runs`` (disturbed ones), ``steps``,
        ``wall_s``, and, if they are not identical, ``differences``.

    Raises:
        UserError: the undisturbed run ended with a user's mistake.
    """
    started, kills, runs = time.monotonic(), 0, 0
    rng = np.random.default_rng(config.train.seed)
    undisturbed, differences = folder / "undisturbed", []
    status = attempt(config, undisturbed, None)
    duration = time.monotonic() - started
    if status:
        line = last_words(undisturbed)
        if status == 2:
            raise UserError(line.removeprefix("error: "))
        differences = [f"the undisturbed run ended with status {status}: {line}"]
    tell(f"undisturbed: {duration:.1f} s")
    while kills < config.kills and not differences:
        runs += 1
        disturbed, finished = folder / f"disturbed-{runs}", False
        while not finished and not differences:
            limit = rng.uniform(0, duration) if kills < config.kills else None
            status = attempt(config, disturbed, limit)
            finished = status == 0
            if limit is not None and status == -signal.SIGKILL:
                kills += 1
                where = f"newest checkpoint: {newest_step(disturbed)}"
                tell(f"kill {kills} of {config.kills} after {limit:.2f} s, {where}")
            elif not finished:
                line = last_words(disturbed)
                differences = [f"run {runs} ended with status {status}: {line}"]
        if finished:
            differences = compare(undisturbed, disturbed)
            tell(f"run {runs} finished: {len(differences)} differences")
    verdict: dict[str, Any] = {
        "identical": not differences,
        "kills": kills,
        "runs": runs,
        "steps": newest_step(undisturbed),
        "wall_s": round(time.monotonic() - started, 1),
    }
    return {**verdict, "differences": differences} if differences else verdict


def attempt(config: Verification, run_dir: Path, limit_s: float | None) -> int:
    """Give the tutorial's command, and kill it after some seconds; its status."""
    with log_of(run_dir).open("wb") as log:
        process = subprocess.Popen(
            make_command(config, run_dir), stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:  # a signal came to us
            process.kill()


def make_command(config: Verification, run_dir: Path) -> list[str]:
    """The command of a run; it takes its options from a file beside the run folder."""
    plain = to_json(config)
    del plain["kills"]
    options = run_dir.with_suffix(".json")
    records.write_json(options, plain)
    command = [sys.executable, "-m", "experiments.tutorial"]
    return [*command, "--config", str(options), "--run-dir", str(run_dir)]


def log_of(run_dir: Path) -> Path:
    """What the newest command for a run folder wrote on stderr."""
    return run_dir.with_suffix(".log")


def last_words(run_dir: Path) -> str:
    """The last line of that."""
    lines = log_of(run_dir).read_text(errors="replace").splitlines()
    return lines[-1] if lines else "without a word"


def newest_step(run_dir: Path) -> int | None:
    """The newest checkpoint of a run; None: there is none."""
    names = (path.name for path in run_dir.glob("checkpoints/*"))
    return max((int(name) for name in names if name.isdigit()), default=None)


def compare(run_dir: Path, other: Path) -> list[str]:
    """What differs at the end of two runs, a line each."""
    ours, theirs = describe_end(run_dir), describe_end(other)
    return [
        f"{key}: {ours.get(key)}, disturbed {theirs.get(key)}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]


def describe_end(run_dir: Path) -> dict[str, Any]:
    """Digests of a run's last state, its metrics without times, and what it left."""
    import jax

    from ae_jax import run
    from ae_jax.checkpoint import digest_leaves

    jax.config.update("jax_platforms", "cpu")  # an accelerator is for the runs
    rows = {
        f"metrics.jsonl, line {number}": {
            key: value for key, value in row.items() if key not in TIMES
        }
        for number, row in enumerate(records.read_rows(run_dir), start=1)
    }
    paths = [*run_dir.glob("*"), *run_dir.glob("[cf]*/*")]
    left = sorted(str(path.relative_to(run_dir)) for path in paths)
    logs = len(list(run_dir.glob("tensorboard/*")))
    state = digest_leaves(run.open_run(run_dir).state)
    return {**state, **rows, "files": left, "files in tensorboard": logs}


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.exit_with(main)
