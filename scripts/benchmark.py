"""How fast is it: beside PyTorch, beside this machine's own limit, as the work grows.

All contenders take turns in one process, round by round, so that a machine that slows
down slows them all; a ratio is of times of one round. What starts a process of its own
(start-up, the whole job, peak memory) says so. Without PyTorch its lines are missing.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ae_jax import cli, config, records
from ae_jax.config import (
    Config,
    DataConfig,
    EnsembleConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rounds: int
    steps: int
    epochs: int
    batches: tuple[int, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    images: tuple[int, ...]
    streamed: tuple[int, ...]
    devices: tuple[int, ...]
    hundredfold: tuple[int, int]
    turn_s: float = 0.5


PRESETS = {
    "full": Sizes(
        rounds=5,
        steps=938,
        epochs=10,
        batches=(16, 64, 256, 1024, 8192),
        widths=(1, 2, 4, 8, 16),
        seeds=(1, 2, 4, 8, 16, 32, 64),
        images=(10_000, 30_000, 100_000, 300_000, 1_000_000),
        streamed=(10_000, 30_000, 100_000, 300_000, 1_000_000),
        devices=(1, 2, 4),
        hundredfold=(60_000, 6_000_000),
    ),
    "quick": Sizes(
        rounds=3,
        steps=150,
        epochs=1,
        batches=(16, 64, 1024),
        widths=(1, 4),
        seeds=(1, 8),
        images=(10_000, 100_000),
        streamed=(10_000, 100_000),
        devices=(1, 2),
        hundredfold=(600, 60_000),
    ),
}


def main(
    preset: Literal["full", "quick"] = "full",
    json: Path = Path("runs/benchmark.json"),
    data_dir: Path = DataConfig.dir,
) -> None:
    """Measure speed, memory and scaling beside PyTorch and the machine's own limit.

    Draws a figure beside the file, of the same name. The full preset takes about ten
    minutes on two cores and 5 GB of temporary files, and keeps its result in
    experiments/results; close what else the machine is doing.

    Args:
        preset: full, or quick (less of everything, three minutes).
        json: The file for all that was measured.
        data_dir: Folder of the prepared data sets.
    """
    sizes, data_config = PRESETS[preset], DataConfig(dir=data_dir)
    json.parent.mkdir(parents=True, exist_ok=True)
    found = measure(sizes, data_config)
    records.write_json(json, found)
    print(table(found))
    print(f"measured: {json}, {draw(found, json.with_suffix('.png'))}")
    if preset == "full":
        write_result(found)


def measure(sizes: Sizes, data_config: DataConfig) -> Row:
    """All parts, one after the other; see the functions that they come from."""
    import jax

    from ae_jax import data

    dataset = data.load(data_config)
    num_pixels = dataset.train.images.shape[1]
    per_epoch = -(-len(dataset.train.images) // TrainConfig.batch_size)
    found: Row = {
        "accelerator": jax.devices()[0].device_kind,
        "steps_per_epoch": per_epoch,
    }
    with part("the limit"):
        limits = [measure_limit(num_pixels)]
    with part("epochs"):
        found |= measure_epochs(sizes, dataset, per_epoch)
    with part("the limit again"):
        limits.append(measure_limit(num_pixels))
    found["limit"] = limits
    with part("start-up and the whole job"):
        found |= measure_commands(sizes, data_config)
    with part("scaling"):
        found["scaling"] = measure_scaling(sizes, dataset.train.images)
    with part("streams"):
        found["streams"] = measure_streams(sizes, dataset.train.images)
    return found | {"headline": conclude(found)}


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Tell on stderr what is being measured, and how long it took."""
    print(f"{name} …", end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


def best_of(
    work: Callable[[], object], rounds: int = 5, least_s: float = 0.004
) -> float:
    """Seconds that a piece of work takes at its fastest, repeated until it is long."""
    work()
    times: list[float] = []
    repeats = 1
    while len(times) < rounds:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        seconds = time.perf_counter() - start
        if seconds < least_s:
            repeats *= 2
        else:
            times.append(seconds / repeats)
    return min(times)


# --- The limit -----------------------------------------------------------------------


def layers(settings: Config, num_pixels: int) -> list[tuple[int, int]]:
    """Fan-in and width of each layer."""
    model = settings.model
    half = list(itertools.pairwise((num_pixels, *model.hidden, model.code_width)))
    return [*half, *(pair[::-1] for pair in half[::-1])]


def products(shapes: list[tuple[int, int]], batch: int) -> list[tuple[int, int, int]]:
    """The matrix products (m, k, n) of a step: forward, and of kernels and inputs.

    Nobody asks for the gradient of the images.
    """
    forward = [(batch, fan_in, width) for fan_in, width in shapes]
    kernels = [(fan_in, batch, width) for fan_in, width in shapes]
    inputs = [(batch, width, fan_in) for fan_in, width in shapes[1:]]
    return [*forward, *kernels, *inputs]


def measure_limit(num_pixels: int) -> Row:
    """What a step must take at least: its products, and the bytes that Adam moves.

    Each product at its own shape by the fastest BLAS at hand, on one thread or all; the
    bytes (parameters and both moments read and written, gradients read) at the speed at
    which arrays of that size are added.
    """
    shapes = layers(Config(), num_pixels)
    product_s = sum(map(fastest_product, products(shapes, TrainConfig.batch_size)))
    num_params = sum(fan_in * width + width for fan_in, width in shapes)
    moved = 7 * 4 * num_params
    gb_per_s = measure_bandwidth(moved)
    adam_s = moved / gb_per_s / 1e9
    return {
        "products_s": product_s,
        "adam_s": adam_s,
        "step_s": product_s + adam_s,
        "gb_per_s": gb_per_s,
        "gflops": records.measure_gflops(),
    }


def fastest_product(shape: tuple[int, int, int]) -> float:
    """Seconds of one float32 product (m, k, n) by NumPy's BLAS or PyTorch's."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    m, k, n = shape
    a, b = (np.ones(s, np.float32) for s in ((m, k), (k, n)))
    out = np.empty((m, n), np.float32)
    times = []
    for threads in {1, records.usable_cores()}:
        with threadpool_limits(threads):
            times.append(best_of(lambda: np.matmul(a, b, out=out)))
    with contextlib.suppress(ImportError):
        import torch

        tensors = [torch.from_numpy(array) for array in (a, b, out)]
        before = torch.get_num_threads()
        for threads in {1, records.usable_cores()}:
            torch.set_num_threads(threads)
            times.append(best_of(lambda: torch.mm(*tensors[:2], out=tensors[2])))
        torch.set_num_threads(before)
    return min(times)


def measure_bandwidth(num_bytes: int) -> float:
    """GB/s at which arrays of so many bytes in all are added, by one core or all."""
    rates = []
    for threads in {1, records.usable_cores()}:
        size = num_bytes // 12 // threads
        arrays = [[np.ones(size, np.float32) for _ in range(3)] for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            fastest = best_of(functools.partial(add_all, pool, arrays))
        rates.append(12 * size * threads / fastest / 1e9)
    return max(rates)


def add_all(pool: ThreadPoolExecutor, arrays: list[list[np.ndarray]]) -> None:
    """The first of each three plus the second into the third, side by side."""
    list(pool.map(lambda a: np.add(a[0], a[1], out=a[2]), arrays))


# --- An epoch of the tutorial --------------------------------------------------------


def measure_epochs(sizes: Sizes, dataset: Any, per_epoch: int) -> Row:
    """Seconds of an epoch, of each contender in each round."""
    whole = our_runner(Config(), dataset.train.images)
    single = our_runner(Config(), dataset.train.images)
    contenders: dict[str, Callable[[int], object]] = {
        "ours": whole,
        "ours, bfloat16": our_runner(
            Config(train=TrainConfig(precision="bfloat16")), dataset.train.images
        ),
        "ours, a call each step": lambda n: [single(1) for _ in range(n)],
    }
    threads, failed = 1, None
    try:
        import torch

        from experiments import pytorch_baseline as baseline
    except config.UserError as error:
        failed = str(error)
    else:
        images = dataset.train.images.reshape(-1, *dataset.shape)
        make_model = functools.partial(
            baseline.Autoencoder, dataset.train.images.shape[1]
        )
        contenders |= baseline.make_contenders(images, make_model, baseline.Train())
        threads, failed = baseline.warm_up(contenders)
        torch.set_num_threads(threads)
    share = per_epoch / sizes.steps
    rounds = [
        {
            name: records.stopwatch(contender, sizes.steps) * share
            for name, contender in contenders.items()
        }
        for _ in range(sizes.rounds)
    ]
    return {"epoch_s": rounds, "torch_threads": threads, "torch_missing": failed}


def our_runner(settings: Config, images: Any) -> Callable[[int], None]:
    """Our training on these images, warmed up; its weights are of no account."""
    import jax

    from ae_jax import checkpoint, hosts, run
    from ae_jax.feed import make_feed

    mesh = hosts.make_mesh(settings.mesh.data, settings.train.batch_size)
    where = hosts.replicated(mesh)
    program = run.build(settings, len(images), images.shape[1], sharding=where)
    feed = make_feed(settings, images, program.order, mesh)
    feed.lower(program.train_step, checkpoint.abstract_like(program.init, where))
    feed.compile()
    state, step = jax.device_put(made_up(program.init), where), 0
    per_epoch = program.steps_per_epoch

    def runner(num_steps: int) -> None:
        nonlocal state, step
        end = step + num_steps
        while step < end:
            stop = min(end, (step // per_epoch + 1) * per_epoch)
            state, step = feed.advance(state, step, stop), stop
        jax.block_until_ready(state)

    runner(2)
    return runner


def made_up(init: Callable[[], Any]) -> Any:
    """A state of the right shapes, but for the seconds that it takes to draw one."""
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0, 0.02, leaf.shape), leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, jax.eval_shape(init))


# --- Commands, each a process of its own ---------------------------------------------


def measure_commands(sizes: Sizes, data_config: DataConfig) -> Row:
    """Start-up, the whole job, its parts, and the peak memory of both sides."""
    with tempfile.TemporaryDirectory(prefix="ae_jax-benchmark-") as place:
        folder = Path(place)
        fresh = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        options = ["--data.name", data_config.name]
        options += ["--data.dir", str(data_config.dir.absolute())]
        options += ["--train.num-epochs", str(sizes.epochs)]

        def job(name: str, experiment: str) -> Row:
            run_dir = folder / name
            command = ["-m", f"experiments.{experiment}", *options]
            wall_s = command_s([*command, "--run-dir", str(run_dir)], fresh)
            return {"command_s": wall_s, **records.read_json(run_dir / "summary.json")}

        found: Row = {
            "import_s": command_s(["-c", "import ae_jax.trainer"], fresh),
            "help_s": command_s(["-m", "experiments.tutorial", "--help"], fresh),
            "cold": job("cold", "tutorial"),
            "cached": job("cached", "tutorial"),
            "parts_s": measure_parts(folder / "cached", data_config),
        }
        if importlib.util.find_spec("torch"):
            found["pytorch"] = job("pytorch", "pytorch_baseline")
    return found


def command_s(args: list[str], env: dict[str, str]) -> float:
    """Seconds of a Python command.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    # Linux counts a process's peak memory from before its exec, when it is as large as
    # its parent: a small shell in between keeps ours out of it.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, *args]
    done = subprocess.run(
        shell, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)} failed: {done.stderr}")
    return time.perf_counter() - start


def measure_parts(run_dir: Path, data_config: DataConfig) -> dict[str, float]:
    """What a run does beside training, each alone and warmed up."""
    from ae_jax import data, run
    from ae_jax.checkpoint import Checkpoints

    opened, dataset = run.open_run(run_dir), data.load(data_config)

    def save() -> None:
        with (
            tempfile.TemporaryDirectory() as place,
            Checkpoints(Path(place), 1) as checkpoints,
        ):
            checkpoints.save(opened.state, {"rows": opened.rows}, set())

    work: dict[str, Callable[[], object]] = {
        "data": lambda: data.load(data_config),
        "evaluation": lambda: run.score(opened, dataset.test, "test", dataset.shape),
        "figures": lambda: [run.draw(run_dir, name) for name in run.FIGURES],
        "checkpoint": save,
        "restore": lambda: run.open_run(run_dir),
    }
    return {name: best_of(one, rounds=2) for name, one in work.items()}


# --- As the work grows ---------------------------------------------------------------


def measure_scaling(sizes: Sizes, images: np.ndarray) -> dict[str, list[Row]]:
    """Seconds of a step or an image as one size grows; ``ideal`` from the first on."""
    from ae_jax import data

    names = ("batch", "width", "seeds", "images", "streamed")
    found: dict[str, list[Row]] = {name: [] for name in names}
    turn_s = sizes.turn_s
    for batch in sizes.batches:
        settings = Config(train=TrainConfig(batch_size=batch))
        y = step_s(settings, images, turn_s) / batch
        found["batch"].append({"x": batch, "y": y})
    for times in sizes.widths:
        hidden = tuple(times * width for width in ModelConfig.hidden)
        settings = Config(model=ModelConfig(hidden=hidden))
        shapes = layers(settings, images.shape[1])
        work = sum(m * k * n for m, k, n in products(shapes, TrainConfig.batch_size))
        y = step_s(settings, images, turn_s)
        found["width"].append({"x": times, "y": y, "work": work})
    for seeds in sizes.seeds:
        y = members_step_s(seeds, images, turn_s) / seeds
        found["seeds"].append({"x": seeds, "y": y})
    for count in sizes.images:
        many = np.resize(images, (count, images.shape[1]))
        y = step_s(Config(), many, turn_s) / TrainConfig.batch_size
        found["images"].append({"x": count, "y": y})
    with tempfile.TemporaryDirectory(prefix="ae_jax-benchmark-") as place:
        for count in sizes.streamed:
            source = on_disk(images, count, Path(place) / f"{count}.npz")
            settings = Config(data=source, train=TrainConfig(num_epochs=10**6))
            many = data.load(source).train.images
            y = step_s(settings, many, turn_s) / TrainConfig.batch_size
            found["streamed"].append({"x": count, "y": y})
    found["devices"] = measure_devices(sizes)
    for rows in found.values():
        for row in rows:
            share = row.get("work", 1) / rows[0].get("work", 1)
            row["ideal"] = rows[0]["y"] * share
    return found


def on_disk(images: np.ndarray, count: int, path: Path) -> DataConfig:
    """So many images in a file, written block by block, to be streamed from it."""
    from ae_jax.images import write_member

    side = round(images.shape[1] ** 0.5)
    with zipfile.ZipFile(path, "w") as archive:
        for name, size in (("train_images", count), ("test_images", 1000)):
            starts = range(0, size, len(images))
            blocks = [images[: size - start].data for start in starts]
            write_member(archive, name, (size, side, side), np.uint8, blocks)
    return DataConfig(name="npz", source=path, streaming=True)


def measure_streams(sizes: Sizes, images: np.ndarray) -> list[Row]:
    """An epoch of two streams, one a hundred times longer, each a run of its own."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="ae_jax-benchmark-") as place:
        for count in sizes.hundredfold:
            folder = Path(place)
            source = on_disk(images, count, folder / "images.npz")
            command = ["-m", "experiments.tutorial", "--data.name", "npz"]
            command += ["--data.source", str(source.source), "--data.streaming"]
            # To compile takes memory: both do, whatever the cache has.
            command += ["--train.num-epochs", "1", "--no-compilation-cache"]
            command += ["--run-dir", str(folder / "run")]
            wall_s = command_s(command, dict(os.environ))
            epoch = records.read_rows(folder / "run")[0]
            summary = records.read_json(folder / "run" / "summary.json")
            peak = summary["peak_memory_bytes"]
            rows.append(
                {
                    "images": count,
                    "peak_memory_bytes": peak,
                    "images_per_s": epoch["images_per_s"],
                    "command_s": wall_s,
                }
            )
            shutil.rmtree(folder / "run")
    return rows


def measure_devices(sizes: Sizes) -> list[Row]:
    """Seconds of a step that devices share, in a process of its own.

    On CPU the devices are virtual: they share the cores.
    """
    code = "from scripts import benchmark; benchmark.tell_devices({}, {})"
    flags = f"--xla_force_host_platform_device_count={max(sizes.devices)}"
    done = subprocess.run(
        [sys.executable, "-c", code.format(sizes.devices, sizes.turn_s)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[Row] = json.loads(done.stdout)
    return rows


def tell_devices(counts: tuple[int, ...], turn_s: float) -> None:
    """Print what :func:`measure_devices` returns."""
    import jax

    virtual = jax.devices()[0].platform == "cpu"
    images = np.random.default_rng(0).integers(0, 256, (60_000, 784)).astype(np.uint8)
    rows = []
    for count in counts:
        if count <= len(jax.devices()):
            settings = Config(
                mesh=MeshConfig(count), train=TrainConfig(batch_size=8192)
            )
            y = step_s(settings, images, turn_s) / 8192
            rows.append({"x": count, "y": y, "work": 1 / count, "virtual": virtual})
    print(json.dumps(rows))


def step_s(settings: Config, images: Any, turn_s: float) -> float:
    """Seconds of a step."""
    return steady_s(our_runner(settings, images), turn_s)


def members_step_s(num_members: int, images: np.ndarray, turn_s: float) -> float:
    """Seconds of a step of so many seeds in one program."""
    import jax.numpy as jnp

    from ae_jax import ensemble, run
    from ae_jax.train import MEMBERS, make_runner

    program = run.build(EnsembleConfig(), *images.shape)
    group = ensemble.make_group(program, num_members)
    members = jnp.arange(num_members, dtype=jnp.uint32)
    state = group.put(made_up(lambda: group.init(members)), MEMBERS)
    order = group.order(members, 0)
    runner = make_runner(group.advance, state, group.put(images, None), order)
    runner(2)
    return steady_s(runner, turn_s)


def steady_s(runner: Callable[[int], None], turn_s: float) -> float:
    """Seconds of a step: the median of three turns of about so many seconds."""
    steps = 1
    while (once := records.stopwatch(runner, steps)) < turn_s / 2:
        steps *= 2
    steps = max(1, round(steps * turn_s / once))
    turns = [records.stopwatch(runner, steps) for _ in range(3)]
    return statistics.median(turns) / steps


# --- What it comes to ----------------------------------------------------------------


def conclude(found: Row) -> Row:
    """The headline: ratios of medians of what was measured side by side."""
    epoch_s = statistics.median(row["ours"] for row in found["epoch_s"])
    step_s = epoch_s / found["steps_per_epoch"]
    limit_s = statistics.mean(limit["step_s"] for limit in found["limit"])
    headline = {
        "share_of_limit": limit_s / step_s,
        "first_step_cold_s": found["cold"]["first_step_s"],
        "first_step_cached_s": found["cached"]["first_step_s"],
    }
    if "pytorch" in found:
        best = fastest_torch(found)
        headline |= {
            "speed_ratio_best": ratio(found, best),
            "speed_ratio_item_by_item": ratio(found, "item_by_item"),
            "whole_job_ratio": found["pytorch"]["command_s"]
            / found["cached"]["command_s"],
            "peak_memory_ratio": found["cached"]["peak_memory_bytes"]
            / found["pytorch"]["peak_memory_bytes"],
        }
    return headline


def ratio(found: Row, name: str) -> float:
    """A contender's time over ours: the median over the rounds."""
    ratios = [float(row[name] / row["ours"]) for row in found["epoch_s"]]
    return statistics.median(ratios)


def fastest_torch(found: Row) -> str:
    """PyTorch's best contender."""
    names: list[str] = [n for n in found["epoch_s"][0] if not n.startswith("ours")]
    return min(names, key=lambda name: ratio(found, name))


def table(found: Row) -> str:
    """What was measured, for people."""
    lines = [f"{'an epoch of the tutorial':34}{'median':>9}{'spread':>18}{'ratio':>8}"]
    for name in found["epoch_s"][0]:
        times = sorted(row[name] for row in found["epoch_s"])
        spread = f"{times[0]:.2f} to {times[-1]:.2f} s"
        median = f"{statistics.median(times):.2f} s"
        label = name if name.startswith("ours") else f"PyTorch, {name}"
        lines.append(f"{label:34}{median:>9}{spread:>18}{ratio(found, name):8.1f}")
    if found["torch_missing"]:
        lines.append(f"missing: {found['torch_missing']}")
    limit = found["limit"][0]
    lines += [
        f"a step's products {limit['products_s'] * 1e3:.3f} ms, Adam's bytes "
        f"{limit['adam_s'] * 1e3:.3f} ms at {limit['gb_per_s']:.0f} GB/s: the limit; "
        f"ours reaches {found['headline']['share_of_limit']:.0%} of it",
        "",
        f"import {found['import_s']:.1f} s, --help {found['help_s']:.1f} s; first step "
        f"{found['cold']['first_step_s']:.1f} s, with programs in the cache "
        f"{found['cached']['first_step_s']:.1f} s",
        f"whole job of {found['cached']['epochs']} epochs: "
        + ", ".join(
            f"{name} {found[name]['command_s']:.1f} s, "
            f"{found[name]['peak_memory_bytes'] / 2**20:.0f} MiB"
            for name in ("cold", "cached", "pytorch")
            if name in found
        ),
        "parts: "
        + ", ".join(f"{name} {s:.2f} s" for name, s in found["parts_s"].items()),
        "",
    ]
    units = {"width": "a step", "seeds": "a seed's step"}
    for name, rows in found["scaling"].items():
        cells = (f"{row['x']:,}: {row['y'] * 1e6:,.1f}" for row in rows)
        unit = units.get(name, "an image")
        lines.append(f"{name}, µs {unit}: {'; '.join(cells)}")
    lines += [
        f"an epoch streamed from {row['images']:,} images: "
        f"{row['peak_memory_bytes'] / 2**20:.0f} MiB, "
        f"{row['images_per_s']:,.0f} images a second"
        for row in found["streams"]
    ]
    return "\n".join(lines)


def draw(found: Row, path: Path) -> Path:
    """The four lines of growth, each beside its ideal."""
    from ae_jax import figures

    labels = {
        "batch": "s an image, by batch size",
        "width": "s a step, by times the width",
        "seeds": "s a seed's step, by seeds in one program",
        "images": "s an image, by images in memory",
        "streamed": "s an image, by images streamed from disk",
        "devices": "s an image, by devices (virtual on CPU)",
    }
    panels = {labels[name]: rows for name, rows in found["scaling"].items()}
    figures.save(figures.scaling(panels), path)
    return path


def write_result(found: Row) -> None:
    """Keep the outcome as experiments/results/benchmark.json and scaling.json."""
    rows = []
    for name in found["epoch_s"][0]:
        times = [row[name] for row in found["epoch_s"]]
        rows.append(
            {
                "what": name,
                "epoch_s": statistics.median(times),
                "low": min(times),
                "high": max(times),
                "ratio": ratio(found, name),
            }
        )
    results = ROOT / "experiments" / "results"
    records.write_result(
        results / "benchmark.json",
        experiment="benchmark",
        accelerator=found["accelerator"],
        seeds=[0],
        headline=found["headline"],
        table=rows,
    )
    streamed, resident = (found["scaling"][name][-1] for name in ("streamed", "images"))
    short, long = found["streams"]
    records.write_result(
        results / "scaling.json",
        experiment="benchmark",
        accelerator=found["accelerator"],
        seeds=[0],
        headline={
            "streamed_ratio": streamed["y"] / resident["y"],
            "hundredfold_memory_ratio": long["peak_memory_bytes"]
            / short["peak_memory_bytes"],
            "hundredfold_time_ratio": short["images_per_s"] / long["images_per_s"],
        },
        table=[
            *({"what": "devices", **row} for row in found["scaling"]["devices"]),
            *({"what": "stream", **row} for row in found["streams"]),
        ],
    )


if __name__ == "__main__":
    cli.run_script(main)
