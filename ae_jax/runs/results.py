"""A finished reference run of an experiment, as ``experiments/results/NAME.json``."""

import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from typing_extensions import TypedDict

from ae_jax.devices import machine_memory_bytes
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_json
from ae_jax.options import validate
from ae_jax.runs.environment import cpu_model, usable_cores, versions


def measure_gflops(size: int = 2048, rounds: int = 5) -> float:
    """GF/s of a large float32 matrix product by NumPy's BLAS: the best of some."""
    a = np.random.default_rng(0).random((size, size), np.float32)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def machine(accelerator: str) -> dict[str, Any]:
    """The machine a result was measured on.

    Args:
        accelerator: JAX's name of the device, ``cpu`` if there is none.
    """
    return {
        "cores": usable_cores(),
        "cpu": cpu_model(),
        "accelerator": accelerator,
        "memory_gib": round(machine_memory_bytes() / 2**30, 1),
        "gflops": round(measure_gflops(), 1),
    }


class Table(TypedDict):
    """A table exactly as README and docs show it: every cell is text, or Markdown."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str


def write_result(
    path: Path,
    experiment: str,
    seeds: list[int],
    headline: Mapping[str, int | float],
    table: Table | Sequence[Table],
    accelerator: str | None = None,
) -> None:
    """Write an experiment's result: where it came from, its numbers, its table.

    Args:
        path: ``experiments/results/NAME.json``.
        experiment: the experiment's name.
        seeds: the seeds it ran.
        headline: name to number, flat.
        table: what is shown, one table or several; machine and date are added to the
            (last) caption.
        accelerator: JAX's name of the device; None: of this process's.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    tables = [table] if isinstance(table, dict) else [*table]
    for row, columns in ((r, t["columns"]) for t in tables for r in t["rows"]):
        if len(row) != len(columns):
            raise ValueError(f"{row}: not a cell for each of {columns}")
    date = datetime.datetime.now(datetime.UTC).date()
    found = machine(accelerator or jax.devices()[0].device_kind)
    parts = [tables[-1]["caption"].rstrip("."), f"{_describe(found)}, {date}."]
    tables[-1] = {**tables[-1], "caption": ". ".join(filter(None, parts))}
    result = {
        "experiment": experiment,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": date.isoformat(),
        "machine": found,
        "versions": versions(),
        "seeds": seeds,
        "headline": headline,
        "table": tables[0] if len(tables) == 1 else tables,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def _describe(found: Mapping[str, Any]) -> str:
    cores = f"{found['cores']} cores of {found['cpu']} ({found['gflops']:.0f} GF/s)"
    accelerator = found["accelerator"]
    return cores if accelerator == "cpu" else f"{accelerator}, {cores}"


def read_tables(path: Path) -> list[Table]:
    """The tables of a result.

    Raises:
        UserError: the file is damaged.
    """
    result = read_json(path, "restore it from git")
    try:
        tables = result["table"]
        tables = validate(list[Table], [tables] if "rows" in tables else tables)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no table in it; restore it from git") from error
    return list(tables)


def to_markdown(table: Table) -> str:
    """A table as Markdown, aligned, so that it reads well on a terminal too.

    Example:
        >>> rows = [["0", "0.035"], ["10", "0.0675"]]
        >>> table = Table(title="Seeds", columns=["seed", "MSE"], rows=rows, caption="")
        >>> print(to_markdown(table), end="")
        **Seeds**
        <BLANKLINE>
        | seed | MSE    |
        | ---- | ------ |
        | 0    | 0.035  |
        | 10   | 0.0675 |
    """
    lines = [table["columns"], *table["rows"]]
    widths = [max(3, *map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [
        " | ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True))
        for line in lines
    ]
    shown = [f"**{table['title']}**\n\n", *(f"| {line} |\n" for line in padded)]
    return "".join(shown) + (f"\n{table['caption']}\n" if table["caption"] else "")
