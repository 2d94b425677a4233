"""Small runs for the tests of a run's life, and what those tests ask of a folder."""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT

from ae_jax import collapse, devices, train
from ae_jax.config import CheckpointConfig, Config, FiguresConfig, TrainConfig
from ae_jax.data import Digits
from ae_jax.models.dense import Autoencoder
from ae_jax.options import options
from ae_jax.runs import folder
from ae_jax.runs.run import Run
from ae_jax.runs.trainer import train_runs

TIMES = {"wall_s", "images_per_s"}

TWO_STEPS = {"batch_size": 700, "checkpoint": CheckpointConfig(every_steps=3)}
"""An epoch of two: saved at steps 2, 3 and 4, and not at 1."""


def small(run_dir: Path, **fields: Any) -> Config:
    """A run of 2 epochs of 3 steps, the last of 436 images, that draws nothing.

    Fields of ``train`` may be given as they are, others as objects.
    """
    train = {"num_epochs": 2, "batch_size": 450}
    train |= {k: fields.pop(k) for k in list(fields) if hasattr(TrainConfig(), k)}
    defaults = {
        "data": Digits(num_validation=101),
        "model": Autoencoder(hidden=(16, 8)),
        "checkpoint": CheckpointConfig(every_steps=2),
        "figures": FiguresConfig(epochs=(1,), draw=False),
    }
    return Config(run_dir=run_dir, train=TrainConfig(**train), **{**defaults, **fields})


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what differs from run to run."""
    rows = folder.read_metrics(run_dir)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def steps_of(run_dir: Path) -> list[int]:
    """The checkpoints that there are."""
    names = os.listdir(run_dir / "checkpoints")
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def digests_of(run_dir: Path, step: int | None = None) -> dict[str, str]:
    """What a checkpoint, the last by default, says of every array of its state."""
    step = step or steps_of(run_dir)[-1]
    path = run_dir / "checkpoints" / str(step) / "record" / "data.json"
    return json.loads(path.read_text())["digests"]


def assert_same_end(run_dir: Path, other: Path) -> None:
    """Both ended with the same bits, in state and rows."""
    assert steps_of(run_dir)[-1] == steps_of(other)[-1]
    assert digests_of(run_dir) == digests_of(other)
    assert rows_of(run_dir) == rows_of(other)


def snapshot(run_dir: Path) -> dict[str, Any]:
    """Every file of a folder with its content and time, to see that none is touched."""
    files = [path for path in sorted(run_dir.rglob("*")) if path.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def make_runs(
    healthy: int, part_dead: int = 0, collapsed: int = 0, mean: float = 0.036
) -> list[dict[str, Any]]:
    """Rows of runs of three latent units as a study has them, none of them trained."""
    scores = mean * (1 + np.linspace(-0.01, 0.01, healthy))
    rows = [(float(score), 0) for score in scores]
    rows += [(0.045, 1)] * part_dead + [(0.0675, 3)] * collapsed
    return [
        {
            "test/mse": score,
            "latent/dead_units": dead,
            "latent/collapsed": dead == 3,
            "outcome": collapse.outcome(dead, 3),
        }
        for score, dead in rows
    ]


def count_seconds(patch: Any) -> None:
    """Have every step be a chunk, which takes a second by the trainer's clock."""
    now = itertools.count()
    patch.setattr(train, "CHUNK_S", 0.0)
    patch.setattr(devices, "clock", lambda: float(next(now)))


class Stop(Exception):
    """Raised in the middle of a training, as anything might be."""


def stop_at(step: int) -> Any:
    """An ``on_chunk`` that stops there."""

    def on_chunk(now: int) -> None:
        if now == step:
            raise Stop

    return on_chunk


def train_until(step: int, *configs: Config, together: int = 1) -> None:
    """Train, and stop after a step."""
    try:
        train_runs(configs, together=together, on_chunk=stop_at(step))
    except Stop:
        return
    raise AssertionError(f"it never came to step {step}")


def train_with_stops(
    configs: Sequence[Config], together: int = 1
) -> tuple[list[Run], int]:
    """Train, stopped once at the end of every chunk; and how often that was."""
    seen = []

    def on_chunk(step: int) -> None:
        if not seen or step > seen[-1]:
            seen.append(step)
            raise Stop

    while True:
        try:
            return train_runs(configs, together=together, on_chunk=on_chunk), len(seen)
        except Stop:
            continue


def flip(path: Path, position: int | None = None, bit: int = 0) -> None:
    """Flip one bit of a file, in its middle by default."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


# --- Processes ----------------------------------------------------------------------

QUICK = (
    *("--preset", "quick", "--model.hidden", "16", "8"),
    *("--train.batch-size", "450", "--figures.epochs", "1"),
)


def start(*args: Any, devices: int = 1, **env: str) -> subprocess.Popen:
    """Start ``python ARGS``, which sees so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": flags, **env}
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args: Any, **how: Any) -> tuple[int, str, str]:
    """The status of ``python ARGS``, and what it wrote."""
    process = start(*args, **how)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def free_port() -> int:
    """One that nobody listens on at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def error_line(err: str) -> str:
    """The one line that a user's mistake is worth."""
    assert "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


# --- Classes of one's own -----------------------------------------------------------


@options
class Scripted:
    """A loss whose course is written beforehand: ``losses[t]`` after t updates.

    Its gradient is 1 whatever its value, so that Adam takes equal steps.
    """

    losses: tuple[float, ...] = (1.0, 0.5, 0.25)
    loss_name = "scripted"

    def __call__(self, model: nn.Module, params: Any, x: Any, key: Any) -> Any:
        bias = params["decoder_0"]["bias"][0]
        updates = jnp.round(-jax.lax.stop_gradient(bias) / 1e-3)
        value = jnp.asarray(self.losses)[updates.astype(jnp.int32)]
        return value + bias - jax.lax.stop_gradient(bias), {}
