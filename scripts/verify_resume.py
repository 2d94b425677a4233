"""Prove on this machine that a killed run ends as an uninterrupted one.

The tutorial runs once uninterrupted, then again while it is killed (SIGKILL) at random
moments and resumed, until all kills are used up. If a run finishes before that, it is
compared, and another one begins. Compared to the bit are the last state (parameters,
optimiser state, key), the metrics and scores without times, the figures, and the names
of the files left. The verdict is one line of JSON; exit status 0: identical, 1: not,
and the two runs are kept. The runs lie in a temporary folder: --run-dir is refused.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ae_jax import cli
from ae_jax.config import CheckpointConfig, Config, to_json
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_json
from ae_jax.options import Count, options
from experiments import tutorial

TIMES = ("digest", "wall_s", "images_per_s", "first_step_s", "peak_memory_bytes")
"""What no two runs have in common."""


@options
class Verification(Config):
    """A run of the tutorial, and how often it is killed."""

    kills: Count = 20
    """Kills, at moments drawn uniformly over the uninterrupted run's time."""


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
    """Run uninterrupted, then killed and resumed, and compare.

    Args:
        config: the run's, with the number of kills.
        folder: where the runs go.

    Returns:
        The verdict: ``identical``, ``kills``, ``runs`` (killed ones), ``steps``,
        ``wall_s``, and, if they are not identical, ``differences``.

    Raises:
        UserError: the uninterrupted run ended with a user's mistake.
    """
    started, kills, runs = time.monotonic(), 0, 0
    rng = np.random.default_rng(config.train.seed)
    whole, differences = folder / "uninterrupted", []
    status = attempt(config, whole, None)
    duration = time.monotonic() - started
    if status == 2:
        raise UserError(last_stderr_line(whole).removeprefix("error: "))
    if status:
        differences = [f"{whole.name} run: status {status}: {last_stderr_line(whole)}"]
    report(f"uninterrupted: {duration:.1f} s")
    while kills < config.kills and not differences:
        runs += 1
        killed, status = folder / f"killed-{runs}", -signal.SIGKILL
        while status == -signal.SIGKILL:
            limit = rng.uniform(0, duration) if kills < config.kills else None
            status = attempt(config, killed, limit)
            if status == -signal.SIGKILL and limit is None:
                break  # by someone else: the system, short of memory
            if status == -signal.SIGKILL:
                kills += 1
                where = f"newest checkpoint: {newest_step(killed)}"
                report(f"kill {kills} of {config.kills} after {limit:.2f} s, {where}")
        if status:
            line = last_stderr_line(killed)
            differences = [f"run {runs} ended with status {status}: {line}"]
        else:
            differences = compare(whole, killed)
            report(f"run {runs} finished: {len(differences)} differences")
    verdict: dict[str, Any] = {
        "identical": not differences,
        "kills": kills,
        "runs": runs,
        "steps": newest_step(whole),
        "wall_s": round(time.monotonic() - started, 1),
    }
    return {**verdict, "differences": differences} if differences else verdict


def attempt(config: Verification, run_dir: Path, limit_s: float | None) -> int:
    """Give the tutorial's command, and kill it after some seconds; its status.

    It takes its options from a file beside the run folder, and what it writes on stderr
    goes into another.
    """
    plain = to_json(config)
    del plain["kills"]
    file = run_dir.with_suffix(".json")
    write_json(file, plain)
    command = [sys.executable, "-m", "experiments.tutorial", "--config", str(file)]
    with run_dir.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--run-dir", str(run_dir)], stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
        finally:  # a signal came to us
            process.kill()


def last_stderr_line(run_dir: Path) -> str:
    """The last line that the newest command for a run folder printed."""
    lines = run_dir.with_suffix(".log").read_text(errors="replace").splitlines()
    return lines[-1] if lines else "no message"


def newest_step(run_dir: Path) -> int | None:
    """The newest checkpoint of a run; None: there is none."""
    from ae_jax.runs.checkpoint import Checkpoints

    return max(Checkpoints(run_dir / "checkpoints").steps, default=None)


def compare(run_dir: Path, other: Path) -> list[str]:
    """What differs at the end of two runs, a line each."""
    ours, theirs = describe_end(run_dir), describe_end(other)
    return [
        f"{key}: {ours.get(key)}, killed {theirs.get(key)}"
        for key in {**ours, **theirs}
        if ours.get(key) != theirs.get(key)
    ]


def describe_end(run_dir: Path) -> dict[str, Any]:
    """Digests of a run's last state and figures, its numbers, and what it left."""
    from ae_jax.runs import folder
    from ae_jax.runs.checkpoint import Checkpoints

    rows: dict[str, dict[str, Any]] = {
        f"metrics.jsonl, line {number}": row
        for number, row in enumerate(folder.read_metrics(run_dir), start=1)
    }
    rows["summary.json"] = read_json(run_dir / "summary.json")
    numbers = {
        f"{place}, {name}": value
        for place, row in rows.items()
        for name, value in row.items()
        if name not in TIMES and not name.startswith("device_")
    }
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        state = checkpoints.load_digests(checkpoints.steps[-1])
    figures = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run_dir.glob("figures/*"))
    }
    paths = [*run_dir.glob("*"), *run_dir.glob("[cf]*/*")]
    left = sorted(str(path.relative_to(run_dir)) for path in paths)
    return {**state, **numbers, **figures, "files": left}


def report(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.exit_with(main)
