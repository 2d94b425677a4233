"""Fill the tables of README and docs from experiments/results/: ``tables.py``.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->`` and is made by the
function of that name in :data:`TABLES`.
"""

import itertools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ae_jax import cli, config, records

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _result(name: str) -> dict[str, Any]:
    result: dict[str, Any] = records.read_json(
        ROOT / "experiments" / "results" / f"{name}.json"
    )
    return result


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _where(result: dict[str, Any]) -> str:
    """The machine and the day of a result."""
    machine = result["machine"]
    return (
        f"{machine['cores']} cores of {machine['cpu']} ({machine['gflops']:.0f} GF/s), "
        f"{result['date']}."
    )


def tutorial() -> str:
    """One row a seed, and a sentence that counts them."""
    result = _result("tutorial")
    outcome = {0: "healthy", 3: "**collapsed**"}
    rows = [
        [
            str(row["seed"]),
            f"{row['train/mse']:.4f}",
            f"{row['test/mse']:.4f}",
            f"{row['test/psnr_db']:.2f}",
            f"{row['test/ssim']:.3f}",
            outcome.get(row["code/dead_units"], f"{row['code/dead_units']} of 3 dead"),
            f"{row['wall_s']:.0f} s",
        ]
        for row in result["table"]
    ]
    head = result["headline"]
    counted = (
        f"\nOf {len(rows)} seeds {head['healthy']} are healthy (test MSE "
        f"{head['test_mse_healthy_mean']:.4f} ± {head['test_mse_healthy_sd']:.4f}), "
        f"{head['part_dead']} with a dead unit, {head['collapsed']} collapsed. "
        f"{_where(result)}\n"
    )
    header = ["seed", "train MSE", "test MSE", "PSNR (dB)", "SSIM", "code", "time"]
    return _markdown(header, rows) + counted


SIDES = {"ours": "ours", "theirs": "PyTorch"}
CONTENDERS = {
    "ours": "ours",
    "item_by_item": "PyTorch, item by item as in the tutorial",
    "data_loader": "PyTorch, a `DataLoader` over tensors",
    "in_memory": "PyTorch, images in memory",
    "fused": "PyTorch, in memory, fused Adam",
    "compiled": "PyTorch, in memory, fused Adam, `torch.compile`",
}


def compare_pytorch() -> str:
    """The same numbers, the same distribution, the speed: a table each."""
    result = _result("compare_pytorch")
    parts: dict[str, list[dict[str, Any]]] = {"check": [], "runs": [], "speed": []}
    for row in result["table"]:
        parts[row["part"]].append(row)
    checks = [
        [row["what"], f"{row['value']:.1e}", f"{row['limit']:.0e}"]
        for row in parts["check"]
    ]
    runs = [
        [
            SIDES[row["side"]],
            *(str(row[name]) for name in ("runs", "healthy", "part_dead", "collapsed")),
            f"{row['mean']:.4f} ± {row['sd']:.4f}",
        ]
        for row in parts["runs"]
    ]
    speed = [
        [CONTENDERS[row["what"]], f"{row['epoch_s']:.2f} s", _ratio(row)]
        for row in parts["speed"]
    ]
    head = result["headline"]
    tests = (
        f"\nHealthy runs, TOST within ±3 %: p = {head['tost_p']:.2g}; "
        f"Kolmogorov–Smirnov: p = {head['ks_p']:.2g}; numbers of collapsed runs, "
        f"Fisher: p = {head['collapse_fisher_p']:.2g}.\n\n"
    )
    return (
        _markdown(["from the same weights and batches", "found", "limit"], checks)
        + "\n"
        + _markdown(
            ["draws of their own", "runs", "healthy", "a dead unit", "collapsed",
             "test MSE, healthy"],
            runs,
        )
        + tests
        + _markdown(["speed, interleaved", "an epoch", "ours is faster by"], speed)
    )  # fmt: skip


def seeds() -> str:
    """One row an outcome, and the time."""
    result = _result("seeds")
    (row,), head = result["table"], result["headline"]
    rows = [
        [name, str(row[key]), _share(row, key), _mse(row[f"test/mse/{key}"])]
        for name, key in OUTCOMES.items()
    ]
    header = ["code", "seeds", "share (95 %)", "median test MSE"]
    return _markdown(header, rows) + (
        f"\n{row['num_seeds']} seeds, {row['epochs']} epochs: median test MSE of all "
        f"{row['test/mse/median']:.4f} (95 %: {row['test/mse/median_low']:.4f} to "
        f"{row['test/mse/median_high']:.4f}); {row['wall_s'] / 60:.0f} minutes. A seed "
        f"takes {head['seed_epoch_s_ratio']:.2f} of a single run's time. "
        f"{_where(result)}\n"
    )


OUTCOMES = {"healthy": "healthy", "a dead unit": "part_dead", "collapsed": "collapsed"}


def _share(row: dict[str, Any], key: str) -> str:
    share, low, high = (row[f"share_{key}{end}"] for end in ("", "_low", "_high"))
    return f"{share:.0%} ({low:.0%} to {high:.0%})"


def _mse(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def dead_code() -> str:
    """The settings after three epochs, and the best after ten."""
    result, parts = _result("dead_code"), {}
    for part in ("short", "long"):
        rows = [row for row in result["table"] if row["part"] == part]
        epochs = rows[0]["epochs"]
        header = ["setting", "seeds", *OUTCOMES, f"median test MSE, {epochs} epochs"]
        cells = [
            [
                row["setting"],
                str(row["num_seeds"]),
                *(_share(row, key) for key in OUTCOMES.values()),
                f"{row['test/mse/median']:.4f} ({row['test/mse/median_low']:.4f} to "
                f"{row['test/mse/median_high']:.4f})",
            ]
            for row in rows
        ]
        parts[part] = _markdown(header, cells)
    machine, wall_s = result["machine"], result["headline"]["wall_s"]
    return (
        parts["short"]
        + "\n"
        + parts["long"]
        + (
            f"\nIn brackets 95 % intervals. {wall_s / 60:.0f} minutes on "
            f"{machine['cores']} cores of {machine['cpu']}, {result['date']}.\n"
        )
    )


WAYS = {
    **{name: what for name, what in CONTENDERS.items() if name != "ours"},
    "ours": "**ours**",
    "ours, bfloat16": "ours, bfloat16",
    "ours, a call each step": "ours, a call each step",
}


def benchmark() -> str:
    """An epoch of each contender, and the headline in words."""
    result = _result("benchmark")
    head = result["headline"]
    rows = [
        [
            WAYS[row["what"]],
            f"{row['epoch_s']:.2f} s",
            f"{row['low']:.2f} to {row['high']:.2f} s",
            f"{row['ratio']:.1f}",
        ]
        for row in sorted(result["table"], key=lambda row: row["ratio"])
    ]
    header = ["an epoch of the tutorial", "median", "rounds", "times ours"]
    return _markdown(header, rows) + (
        f"\nA step stands at {head['share_of_limit']:.0%} of the machine's limit. The "
        f"whole job, from command to last figure, takes PyTorch's tutorial "
        f"{head['whole_job_ratio']:.1f} times as long. First trained step "
        f"{head['first_step_cold_s']:.1f} s after the command, "
        f"{head['first_step_cached_s']:.1f} s with the programs in the cache. Peak "
        f"memory {head['peak_memory_ratio']:.1f} times PyTorch's. {_where(result)}\n"
    )


NET = (784, 128, 64, 12, 3, 12, 64, 128, 784)
FLOPS, BANDWIDTH, LINK, HOP_S = 50e12, 3e12, 50e9, 10e-6
"""Of the device on paper: float32 products, memory, network in bytes a second; and the
delay of one message."""


def cost_on_paper(num_devices: int, batch: int) -> dict[str, float]:
    """What a step of the tutorial's net costs each device that shares the batch.

    Args:
        num_devices: n.
        batch: B, of all devices together.

    Returns:
        ``flops``: the products of forward and backward, but for the images' gradient.
        ``bytes``: parameters and moments read and written, gradients read, and the
        batch's activations written and read, forward and backward. ``reduced_bytes``:
        the gradients, which all devices add up. And the seconds of each on the device
        on paper, the sum by a ring for the bytes and a tree for the delays.
    """
    pairs = list(itertools.pairwise(NET))
    weights = sum(a * b for a, b in pairs)
    params = weights + sum(NET[1:])
    share = batch / num_devices
    flops = 2 * share * (3 * weights - NET[0] * NET[1])
    moved = 7 * 4 * params + 4 * 4 * share * sum(NET)
    reduced = 4 * params if num_devices > 1 else 0
    ring = 2 * (num_devices - 1) / num_devices * reduced / LINK
    return {
        "flops": flops,
        "bytes": moved,
        "reduced_bytes": reduced,
        "flops_s": flops / FLOPS,
        "bytes_s": moved / BANDWIDTH,
        "reduced_s": ring + 2 * math.log2(num_devices) * HOP_S,
    }


def on_paper() -> str:
    """A step's cost by devices, for a batch that grows with them and one that does not.

    Products and memory overlap; the sum of the gradients comes after them.
    """
    rows = []
    for count in (1, 2, 4, 8, 16, 64, 256, 1024):
        cells = [f"{count:,}"]
        for batch in (64 * count, 65_536):
            cost = cost_on_paper(count, batch)
            whole = max(cost["flops_s"], cost["bytes_s"]) + cost["reduced_s"]
            times = [cost[key] for key in ("flops_s", "bytes_s", "reduced_s")]
            cells += [f"{s * 1e6:,.1f}" for s in times]
            cells.append(f"{batch / whole / 1e6:,.1f}")
        rows.append(cells)
    parts = ["products", "memory", "sum of gradients", "images a µs"]
    header = ["devices", *(f"{part}, 64 each" for part in parts)]
    header += [f"{part}, 65,536 in all" for part in parts]
    return _markdown(header, rows)


def scaling() -> str:
    """Devices that share a batch, and streams, as measured."""
    result = _result("scaling")
    found = {
        what: [row for row in result["table"] if row["what"] == what]
        for what in ("devices", "stream")
    }
    one = found["devices"][0]["y"]
    devices = [
        [
            f"{row['x']}{' (virtual)' if row['virtual'] else ''}",
            f"{row['y'] * 1e6:.2f} µs",
            f"{one / row['y']:.2f}",
        ]
        for row in found["devices"]
    ]
    streams = [
        [
            f"{row['images']:,}",
            f"{row['images_per_s']:,.0f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
            f"{row['command_s']:.0f} s",
        ]
        for row in found["stream"]
    ]
    head = result["headline"]
    return (
        _markdown(["devices", "an image, batch 8,192", "speed-up"], devices)
        + "\n"
        + _markdown(
            ["streamed images", "images a second", "peak memory", "whole command"],
            streams,
        )
        + f"\nA step whose images are streamed takes {head['streamed_ratio']:.2f} "
        f"times one from memory, at a million images. {_where(result)}\n"
    )


def _ratio(row: dict[str, Any]) -> str:
    if "median" not in row:
        return "–"
    return f"{row['median']:.1f}× ({row['low']:.1f} to {row['high']:.1f})"


TABLES: dict[str, Callable[[], str]] = {
    "tutorial": tutorial,
    "compare_pytorch": compare_pytorch,
    "seeds": seeds,
    "dead_code": dead_code,
    "benchmark": benchmark,
    "scaling": scaling,
    "on_paper": on_paper,
}


def fill(text: str) -> str:
    """A document with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return MARKED.sub(table, text)


def main(check: bool = False) -> None:
    """Fill the tables of README and docs from experiments/results/.

    Args:
        check: Write nothing; status 2 if a document is not up to date.
    """
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        filled = fill(text)
        if filled == text:
            continue
        if check:
            raise config.UserError(f"{path}: tables are old; run scripts/tables.py")
        records.write_text(path, filled)
        print(path.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    cli.run_script(main)
