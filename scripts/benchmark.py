"""How fast is it: beside PyTorch, beside this machine's own limit, as the work grows.

All contenders take turns in one process, round by round, so that a machine that slows
down slows them all; a ratio is of times of one round. Commands, which are timed whole
and whose memory counts, are processes of their own. Without PyTorch its lines are
missing.
"""

import functools
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ae_jax import cli
from ae_jax.config import Config, TrainConfig
from ae_jax.data import DATASETS
from ae_jax.errors import UserError
from ae_jax.files import write_json
from ae_jax.models.dense import Autoencoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ae_jax.runs.results import Table
    from ae_jax.runs.timing import Runner

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
BATCH = TrainConfig().batch_size
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured; what is empty is left out."""

    rounds: int = 5
    steps: int = 938
    epochs: int = 10
    compiled: bool = True
    batches: tuple[int, ...] = (16, 64, 256, 1024, 8192)
    widths: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    devices: tuple[int, ...] = (1, 2, 4)
    streams: tuple[int, ...] = (60_000, 6_000_000)
    turn_s: float = 0.5
    gpu: bool = False
    """Ask what one asks of a GPU: TF32, CUDA graphs, the limit of the card."""
    slow_steps: int = 10**6
    """At most so many of a round are taken by those in ``SLOW``."""


PRESETS = {
    "full": Sizes(),
    "quick": Sizes(3, 60, 1, False, (64, 1024), (), (), (), (), 0.1),
    "gpu": Sizes(
        epochs=5,
        batches=(64, 1024, 8192),
        widths=(1, 4, 16),
        seeds=(1, 16, 128, 1024),
        devices=(),
        streams=(),
        turn_s=0.3,
        gpu=True,
        slow_steps=188,
    ),
}
SLOW = ("ours, a call each step", "item_by_item", "in_memory", "fused", "compiled")
"""On a GPU they wait for the host in every step: a fifth of an epoch is enough."""


def main(
    preset: Literal["full", "quick", "gpu"] | None = None,
    json: Path = Path("runs/benchmark.json"),
    data_name: Literal["mnist", "fashion_mnist", "kmnist", "digits"] | None = None,
    data_dir: Path = Path("data"),
) -> None:
    """Measure speed, memory and scaling beside PyTorch and the machine's own limit.

    Draws a figure beside the file, of the same name. The full preset takes about ten
    minutes on two cores, that for a GPU about four; both keep their result in
    experiments/results. Close what else the machine is doing.

    Args:
        preset: full, or gpu where JAX finds one, or quick (less of everything, on small
            images, in half a minute).
        json: The file for all that was measured.
        data_name: Data set of the images; by default mnist, or digits if quick.
        data_dir: Folder of the prepared data sets.
    """
    from ae_jax import plots
    from ae_jax.runs.results import to_markdown

    preset = preset or ("gpu" if default_backend() == "gpu" else "full")
    data_name = data_name or ("digits" if preset == "quick" else "mnist")
    options = ["--data.name", data_name, "--data.dir", str(data_dir.absolute())]
    dataset: Any = DATASETS[data_name](dir=data_dir)
    json.parent.mkdir(parents=True, exist_ok=True)
    found = measure(PRESETS[preset], dataset.load().train_images, options)
    write_json(json, found)
    tables = [speed_table(found), scaling_table(found)]
    print("\n".join(to_markdown(table) for table in tables if table["rows"]))
    panels = [plots.Panel(**row) for row in found["growth"]]
    plots.save(plots.scaling(panels), json.with_suffix(".png"))
    speed = json.with_name(f"{json.stem}_speed.png")
    plots.save(speed_figure(found), speed)
    print(f"measured: {json}, {json.with_suffix('.png')}, {speed}")
    if preset != "quick":
        write_results(found, tables)


def default_backend() -> str:
    """JAX's default backend, asked in a process of its own.

    This one holds no GPU before its commands are done: JAX takes most of its memory.
    """
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"JAX finds no device: {done.stderr.strip()}")
    return done.stdout.split()[-1]


def measure(sizes: Sizes, images: np.ndarray, options: list[str]) -> Row:
    """All of it; the commands first, while this process is small and holds no GPU.

    On Linux a process's peak memory counts from before its exec, when it is as large
    as its parent.

    Args:
        sizes: how much.
        images: training images [N, H, W, C].
        options: by which the commands find the same images.
    """
    with tempfile.TemporaryDirectory(prefix="ae_jax-benchmark-") as place:
        found = measure_commands(sizes, images, options, Path(place))
    limit = measure_card_limit if sizes.gpu else measure_limit
    limits = [limit(images)]
    found |= measure_epochs(sizes, images)
    found["limit"] = [*limits, limit(images)]
    found["growth"] = measure_growth(sizes, images)
    found["gpu"] = sizes.gpu
    return found | {"headline": conclude(found)}


# --- Commands -----------------------------------------------------------------------


def run_command(experiment: str, run_dir: Path, *options: str, **env: str) -> Row:
    """An experiment by its command, one epoch unless the options say otherwise.

    Returns:
        Its summary, with ``command_s`` and the last epoch's ``images_per_s``.

    Raises:
        UserError: it failed.
    """
    from ae_jax.runs import folder

    command = [sys.executable, "-m", f"experiments.{experiment}", *options]
    command += ["--run-dir", str(run_dir)]
    env, start = {**os.environ, **env}, time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    print(f"{experiment} {run_dir.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    speed = folder.read_metrics(run_dir)[-1]["images_per_s"]
    summary = folder.read_summary(run_dir) or {}
    return {**summary, "command_s": seconds, "images_per_s": speed}


def run_pytorch(*args: str) -> Row:
    """The whole job in PyTorch, without JAX: its memory and time."""
    code = "import sys; from experiments._contenders import whole_job as job\n"
    command = [sys.executable, "-c", f"{code}job(*sys.argv[1:])", *args]
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"PyTorch's tutorial failed: {done.stderr.strip()}")
    return {**loads(done.stdout), "command_s": time.perf_counter() - start}


def measure_commands(
    sizes: Sizes, images: np.ndarray, options: list[str], place: Path
) -> Row:
    """Start-up, the whole job and peak memory of both sides; devices and streams."""
    job = [*options, "--train.num-epochs", str(sizes.epochs)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
    found: Row = {
        name: run_command("tutorial", place / name, *job, **cache)
        for name in ("cold", "cached")
    }
    if importlib.util.find_spec("torch"):
        name, folder = options[1], options[3]
        found["pytorch"] = run_pytorch(name, folder, str(sizes.epochs))
    found["scaling"] = []
    job = [*options, "--train.batch-size", "8192", "--train.num-epochs", "3"]
    flags = f"--xla_force_host_platform_device_count={max(sizes.devices, default=1)}"
    for count in sizes.devices:  # on a CPU they are virtual
        name, values = f"{count} devices", [*job, "--mesh.data", str(count)]
        row = run_command("tutorial", place / name, *values, XLA_FLAGS=flags)
        found["scaling"].append({"what": f"{name}, batches of 8,192", **row})
    off = {"JAX_ENABLE_COMPILATION_CACHE": "0"}  # to compile takes memory: all do
    for count in sizes.streams:
        name, source = f"{count:,} images streamed", place / f"{count}.npz"
        write_npz(images, count, source)
        job = ["--data.name", "npz", "--data.streaming", "--data.source", str(source)]
        job += ["--data.dir", str(place), "--train.num-epochs", "1"]
        row = run_command("tutorial", place / name, *job, **off)
        found["scaling"].append({"what": name, **row})
    return found


def write_npz(images: np.ndarray, count: int, path: Path) -> None:
    """So many images in a file, block by block, and some for a test split."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, size in (("train_images", count), ("test_images", 1000)):
            header = {"descr": "|u1", "fortran_order": False}
            header["shape"] = (size, *images.shape[1:])
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for start in range(0, size, len(images)):
                    file.write(images[: size - start].data)


# --- The limit ----------------------------------------------------------------------


def layers(num_pixels: int, net: Autoencoder) -> list[tuple[int, int]]:
    """Fan-in and width of each layer."""
    half = list(itertools.pairwise((num_pixels, *net.hidden, net.latent_dim)))
    return [*half, *(pair[::-1] for pair in half[::-1])]


def products(shapes: list[tuple[int, int]], batch: int) -> list[tuple[int, int, int]]:
    """The matrix products (m, k, n) of a step: forward, and of kernels and inputs.

    Nobody asks for the gradient of the images.
    """
    forward = [(batch, fan_in, width) for fan_in, width in shapes]
    kernels = [(fan_in, batch, width) for fan_in, width in shapes]
    inputs = [(batch, width, fan_in) for fan_in, width in shapes[1:]]
    return [*forward, *kernels, *inputs]


def measure_limit(images: np.ndarray) -> Row:
    """What a step must take at least: its products, and the bytes that Adam moves.

    Each product at its own shape by the fastest BLAS installed, on one thread or all;
    the bytes (parameters and both moments read and written, gradients read) at the
    speed at which arrays of that size are added.
    """
    shapes = layers(images[0].size, Autoencoder())
    products_s = sum(map(fastest_product, products(shapes, BATCH)))
    moved = 7 * 4 * sum(fan_in * width + width for fan_in, width in shapes)
    adam_s = moved / measure_bandwidth(moved)
    return {"products_s": products_s, "adam_s": adam_s, "step_s": products_s + adam_s}


def best_of(work: Callable[[], object], rounds: int = 3) -> float:
    """Seconds that a piece of work takes at its fastest, repeated until it is long."""
    work()
    times: list[float] = []
    repeats = 1
    while len(times) < rounds:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        seconds = time.perf_counter() - start
        if seconds < 0.004:
            repeats *= 2
        else:
            times.append(seconds / repeats)
    return min(times)


def fastest_product(shape: tuple[int, int, int]) -> float:
    """Seconds of one float32 product (m, k, n) by NumPy's BLAS or PyTorch's."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from ae_jax.runs.environment import usable_cores

    m, k, n = shape
    a, b = np.ones((m, k), np.float32), np.ones((k, n), np.float32)
    out = np.empty((m, n), np.float32)
    ways: list[Callable[[], object]] = [lambda: np.matmul(a, b, out=out)]
    if importlib.util.find_spec("torch"):
        import torch

        x, y, z = map(torch.from_numpy, (a, b, out))
        ways.append(lambda: torch.mm(x, y, out=z))
    times: list[float] = []
    for threads in {1, usable_cores()}:
        with threadpool_limits(threads):  # PyTorch's too
            times += map(best_of, ways)
    return min(times)


def measure_bandwidth(num_bytes: int) -> float:
    """Bytes a second at which all cores add arrays of this size in all."""
    from ae_jax.runs.environment import usable_cores

    def add(arrays: list[np.ndarray]) -> None:
        np.add(arrays[0], arrays[1], out=arrays[2])

    threads = usable_cores()
    size = num_bytes // 12 // threads
    parts = [[np.ones(size, np.float32) for _ in range(3)] for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        together_s = best_of(lambda: list(pool.map(add, parts)))
    alone_s = threads * best_of(lambda: add(parts[0]))
    return 12 * size * threads / min(together_s, alone_s)


def measure_card_limit(images: np.ndarray, repeats: int = 1000) -> Row:
    """What a step must take at least on a GPU, launches within a program included.

    The products at their own shapes, as XLA has them in full float32, and Adam's bytes
    at the speed at which an array of that size is read and written. Of many seeds side
    by side, Adam's bytes alone, at the speed of an array too large for any cache.

    Args:
        images: of which the first layer is as wide.
        repeats: of each piece of work, in one program.
    """
    shapes = layers(images[0].size, Autoencoder())
    moved = 7 * 4 * sum(fan_in * width + width for fan_in, width in shapes)
    operands = [
        (np.zeros((BATCH, fan_in), np.float32), np.zeros((fan_in, width), np.float32))
        for fan_in, width in shapes
    ]
    products_s = seconds_on_device(products_of_step, operands, repeats)
    adam_s = moved / measure_card_bandwidth(moved, repeats)
    many_s = moved / measure_card_bandwidth(repeats * moved // 2, 20)
    found = {"products_s": products_s, "adam_s": adam_s, "many_seeds_s": many_s}
    return {**found, "step_s": products_s + adam_s}


def products_of_step(operands: Any) -> Any:
    """The matrix products of a step, each used by a later one or the next time.

    Args:
        operands: of each layer its inputs [B, fan-in] and kernel [fan-in, width].
    """
    made = []
    for number, (x, kernel) in enumerate(operands):
        out = x @ kernel
        kernel = x.T @ out
        made.append((out @ kernel.T if number else x, kernel))
    return made


def measure_card_bandwidth(num_bytes: int, repeats: int) -> float:
    """Bytes a second at which the device reads and writes so many in all."""
    size = num_bytes // 8
    array = np.ones(size, np.float32)
    seconds = seconds_on_device(lambda x: 0.5 * x + 1, array, repeats)
    return 8 * size / seconds


def seconds_on_device(work: Callable[[Any], Any], start: Any, repeats: int) -> float:
    """Seconds of work on the device, so often in one program, each on what it made."""
    import jax

    from ae_jax.devices import jit_loop, numerics

    def repeat(made: Any) -> Any:
        return jax.lax.fori_loop(0, repeats, lambda _, made: work(made), made)

    loop = jit_loop(repeat)
    with numerics("float32"):
        operands = jax.device_put(start)
        return best_of(lambda: jax.block_until_ready(loop(operands))) / repeats


# --- In turns -----------------------------------------------------------------------


def measure_epochs(sizes: Sizes, images: np.ndarray) -> Row:
    """Seconds of an epoch of the tutorial, of each contender in each round."""
    from ae_jax.runs.timing import make_runner

    per_epoch = -(-len(images) // BATCH)
    ours = make_runner(Config(), images)
    other: Literal["tf32", "bfloat16"] = "tf32" if sizes.gpu else "bfloat16"
    contenders: dict[str, Runner] = {
        "ours": ours,
        f"ours, {other}": make_runner(
            Config(train=TrainConfig(precision=other)), images
        ),
        "ours, a call each step": lambda n: [ours(1) for _ in range(n)],
    }
    if importlib.util.find_spec("torch"):
        contenders |= make_theirs(sizes, images)
    most = min(sizes.steps, per_epoch)
    steps = {
        name: min(most, sizes.slow_steps) if name in SLOW else most
        for name in contenders
    }
    raced = race(contenders, steps, sizes.rounds)
    epoch_s = [
        {name: per_epoch / steps[name] * seconds for name, seconds in row.items()}
        for row in raced["rounds"]
    ]
    return {
        "epoch_s": epoch_s,
        "steps_per_epoch": per_epoch,
        "missing": raced["failed"],
    }


def make_theirs(sizes: Sizes, images: np.ndarray) -> dict[str, "Runner"]:
    """PyTorch's contenders, on its GPU if it has one and we ask for it."""
    import torch

    from experiments import _contenders as theirs
    from experiments import pytorch_baseline

    device = "cuda" if sizes.gpu and torch.cuda.is_available() else "cpu"
    make_model = functools.partial(pytorch_baseline.Autoencoder, images[0].size)
    rate = TrainConfig().learning_rate
    made = theirs.make_contenders(images, make_model, BATCH, rate, device)
    if not sizes.compiled:  # it takes PyTorch a minute
        del made["compiled"]
    return made


def race(
    contenders: dict[str, "Runner"], steps: dict[str, int], num_rounds: int
) -> Row:
    """Seconds of each contender in each round, and why one is missing."""
    from ae_jax.runs.timing import stopwatch

    if importlib.util.find_spec("torch"):
        from experiments import _contenders as theirs

        return theirs.race(contenders, steps, num_rounds)
    for runner in contenders.values():
        runner(5)
    rounds = [
        {name: stopwatch(runner, steps[name]) for name, runner in contenders.items()}
        for _ in range(num_rounds)
    ]
    return {"rounds": rounds, "failed": "PyTorch is not installed"}


def ratio(found: Row, name: str) -> float:
    """A contender's time over ours: the median over the rounds."""
    ratios = [float(row[name] / row["ours"]) for row in found["epoch_s"]]
    return statistics.median(ratios)


def measure_growth(sizes: Sizes, images: np.ndarray) -> list[Row]:
    """Microseconds of a step, or of a part of it, as one size grows.

    Returns:
        What ``plots.Panel`` takes, for each kind of growth; ``ideal`` starts where the
        measurement does.
    """
    from ae_jax.runs.timing import make_runner

    def net(times: int) -> Autoencoder:
        return Autoencoder(hidden=tuple(times * n for n in Autoencoder().hidden))

    def flops(times: int) -> int:
        shapes = layers(images[0].size, net(times))
        return sum(m * k * n for m, k, n in products(shapes, BATCH))

    def batches(n: int) -> Config:
        return Config(train=TrainConfig(batch_size=n))

    found = []
    if x := sizes.batches:
        seconds = in_turns([make_runner(batches(n), images) for n in x], sizes.turn_s)
        y = [s / n for s, n in zip(seconds, x, strict=True)]
        found.append(("batch size", "time per image (µs)", x, y, [y[0]] * len(x)))
    if x := sizes.widths:
        nets = [Config(model=net(n)) for n in x]
        y = in_turns([make_runner(c, images) for c in nets], sizes.turn_s)
        ideal = [y[0] * (flops(n) / flops(x[0])) for n in x]
        found.append(("times the width", "time per step (µs)", x, y, ideal))
    if x := sizes.seeds:
        runners = [make_runner(Config(), images, n) for n in x]
        # A turn on a GPU holds an epoch: what shuffling takes the host counts.
        least = -(-len(images) // BATCH) if sizes.gpu else 1
        seconds = in_turns(runners, sizes.turn_s, least)
        y = [s / n for s, n in zip(seconds, x, strict=True)]
        label = "time per seed and step (µs)"
        found.append(("seeds in one program", label, x, y, [y[0]] * len(x)))
    names = ("xlabel", "ylabel", "x", "y", "ideal")
    return [dict(zip(names, panel, strict=True)) for panel in found]


def in_turns(runners: list["Runner"], turn_s: float, least: int = 1) -> list[float]:
    """Microseconds of a step of each: the median of three rounds of turns.

    Args:
        runners: of which each has its turn in every round.
        turn_s: how long a turn shall take.
        least: steps in a turn, however long it takes.
    """
    from ae_jax.runs.timing import stopwatch

    steps = []
    for runner in runners:
        runner(2)
        count = 1
        while (seconds := stopwatch(runner, count)) < turn_s / 2:
            count *= 2
        steps.append(max(least, round(count * turn_s / seconds)))
    turns = list(zip(runners, steps, strict=True))
    rounds = [[1e6 * stopwatch(run, n) / n for run, n in turns] for _ in range(3)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


# --- Results ------------------------------------------------------------------------


def conclude(found: Row) -> Row:
    """The headline: ratios of what was measured side by side."""
    cached, theirs = found["cached"], found.get("pytorch")
    step_s = statistics.median(row["ours"] for row in found["epoch_s"])
    step_s /= found["steps_per_epoch"]
    headline = {
        "share_of_limit": limit_step_s(found) / step_s,
        "first_step_cold_s": found["cold"]["first_step_s"],
        "first_step_cached_s": cached["first_step_s"],
    }
    if theirs:
        names = [name for name in found["epoch_s"][0] if not name.startswith("ours")]
        memory = cached["peak_memory_bytes"] / theirs["peak_memory_bytes"]
        headline |= {
            "speed_ratio_best": min(ratio(found, name) for name in names),
            "speed_ratio_item_by_item": ratio(found, "item_by_item"),
            "whole_job_ratio": theirs["command_s"] / cached["command_s"],
            "peak_memory_ratio": memory,
        }
    return headline | (conclude_gpu(found) if found["gpu"] else {})


def conclude_gpu(found: Row) -> Row:
    """What else one asks of a GPU: an epoch's time, memory, and many seeds."""
    epochs = [row["ours"] for row in found["epoch_s"]]
    headline = {
        "epoch_s": statistics.median(epochs),
        "peak_memory_bytes": found["cached"]["peak_memory_bytes"],
    }
    if "device_peak_bytes" in found["cached"]:
        headline["device_peak_bytes"] = found["cached"]["device_peak_bytes"]
    if "graph" in found["epoch_s"][0]:
        headline["cuda_graph_ratio"] = ratio(found, "graph")
    for panel in found["growth"]:
        if panel["xlabel"] == "seeds in one program":
            step_us = panel["y"][-1]
            limits_us = [1e6 * limit["many_seeds_s"] for limit in found["limit"]]
            headline |= {
                "num_seeds": panel["x"][-1],
                "seed_epoch_ms": step_us * found["steps_per_epoch"] / 1000,
                "many_seeds_share_of_limit": statistics.mean(limits_us) / step_us,
            }
    return headline


def limit_step_s(found: Row) -> float:
    """Seconds of a step at the machine's limit: the mean of before and after."""
    return statistics.mean(limit["step_s"] for limit in found["limit"])


WAYS = {
    "ours": "**ours**",
    "item_by_item": "PyTorch, item by item as in the tutorial",
    "data_loader": "PyTorch, a `DataLoader` over tensors",
    "in_memory": "PyTorch, images in memory",
    "fused": "PyTorch, in memory, fused Adam",
    "compiled": "PyTorch, in memory, fused Adam, `torch.compile`",
    "graph": "PyTorch, in memory, fused Adam, each step one CUDA graph",
}


def speed_figure(found: Row) -> "Figure":
    """An epoch of each contender beside what the machine takes at least."""
    from ae_jax import plots

    medians = {
        name: statistics.median(row[name] for row in found["epoch_s"])
        for name in found["epoch_s"][0]
    }
    values = {
        WAYS.get(name, name).replace("*", "").replace("`", ""): medians[name]
        for name in ("ours", *sorted({*medians} - {"ours"}, key=medians.__getitem__))
    }
    limit = limit_step_s(found) * found["steps_per_epoch"]
    return plots.bars(values, "time per epoch (s)", ("the machine's limit", limit))


def speed_table(found: Row) -> "Table":
    """An epoch of each contender, and the headline in words."""
    rows, head, digits = [], found["headline"], 3 if found["gpu"] else 2
    for name in sorted(found["epoch_s"][0], key=lambda name: ratio(found, name)):
        times = [row[name] for row in found["epoch_s"]]
        spread = f"{min(times):.{digits}f} to {max(times):.{digits}f} s"
        cells = [
            f"{statistics.median(times):.{digits}f} s",
            spread,
            f"{ratio(found, name):.1f}",
        ]
        rows.append([WAYS.get(name, name), *cells])
    caption = describe(head)
    if found["missing"]:
        caption += f" Missing: {found['missing'].rstrip('.')}."
    columns = ["an epoch of the tutorial", "median", "rounds", "times ours"]
    title = "Speed beside PyTorch"
    return {"title": title, "columns": columns, "rows": rows, "caption": caption}


def describe(head: Row) -> str:
    """The headline in words."""
    caption = (
        f"A step stands at {head['share_of_limit']:.0%} of the machine's limit. First "
        f"trained step {head['first_step_cold_s']:.1f} s after the command, "
        f"{head['first_step_cached_s']:.1f} s with the programs in the cache."
    )
    if "whole_job_ratio" in head:
        caption += (
            " The whole job, from command to last figure, takes PyTorch's tutorial "
            f"{head['whole_job_ratio']:.1f} times as long. Peak memory "
            f"{head['peak_memory_ratio']:.1f} times PyTorch's."
        )
    if "epoch_s" in head:  # of a GPU
        caption += f" That is {head['peak_memory_bytes'] / 1e9:.1f} GB of the host's."
    if "device_peak_bytes" in head:
        caption += f" {head['device_peak_bytes'] / 1e6:,.0f} MB of the GPU's."
    if "num_seeds" in head:
        caption += (
            f" Of {head['num_seeds']:,} seeds in one program each takes "
            f"{head['seed_epoch_ms']:.2f} ms an epoch, "
            f"{head['many_seeds_share_of_limit']:.0%} of the limit of the memory."
        )
    return caption


def scaling_table(found: Row) -> "Table":
    """Devices that share a batch, and streams, as far as they were measured."""
    return {
        "title": "Devices and streams",
        "columns": ["", "images a second", "peak memory", "whole command"],
        "rows": [
            [
                row["what"],
                f"{row['images_per_s']:,.0f}",
                f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
                f"{row['command_s']:.0f} s",
            ]
            for row in found["scaling"]
        ],
        "caption": "On a CPU devices are virtual and share the same cores.",
    }


def write_results(found: Row, tables: list["Table"]) -> None:
    """Keep the outcome in experiments/results: benchmark.json and scaling.json.

    Of a GPU it is benchmark_gpu.json alone.
    """
    from ae_jax.runs.results import write_result

    if found["gpu"]:
        path = RESULTS / "benchmark_gpu.json"
        write_result(path, "benchmark", [0], found["headline"], tables[0])
        return
    *_, short, long = found["scaling"]
    headline = {
        "streamed_ratio": found["cached"]["images_per_s"] / short["images_per_s"],
        "hundredfold_memory_ratio": long["peak_memory_bytes"]
        / short["peak_memory_bytes"],
        "hundredfold_time_ratio": short["images_per_s"] / long["images_per_s"],
    }
    headlines = {"benchmark": found["headline"], "scaling": headline}
    for (name, values), table in zip(headlines.items(), tables, strict=True):
        write_result(RESULTS / f"{name}.json", "benchmark", [0], values, table)


if __name__ == "__main__":
    cli.run_script(main)
