"""Compare runs: ``compare.py RUN RUN… [--sort METRIC] [--json] [--result NAME]``."""

import json
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ae_jax import cli, collapse, config
from ae_jax.errors import UserError, suggest
from ae_jax.files import read_bytes

if TYPE_CHECKING:
    from ae_jax.runs.folder import Description
    from ae_jax.runs.results import Table

HEADINGS = {
    "train/mse": "train MSE",
    "test/mse": "test MSE",
    "test/psnr_db": "PSNR (dB)",
    "test/ssim": "SSIM",
    "latent/dead_units": "dead units",
    "wall_s": "time (s)",
    "train.seed": "seed",
}
FORMATS = {"test/psnr_db": ".2f", "test/ssim": ".3f", "wall_s": ".1f"}
SHOWN = ("epochs", "train/", "val/", "test/", "latent/dead_units", "wall_s")

Row = dict[str, Any]


def main(
    run_dirs: Positional[tuple[Path, ...]],
    sort: str | None = None,
    result: str | None = None,
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Compare runs: fields that differ, final metrics, loss curves over each other.

    Writes the curves to compare.png in the folder above the first run.

    Args:
        run_dirs: Run folders, two or more, finished or not.
        sort: Order the runs by this metric, the smallest first.
        result: Keep the outcome as experiments/results/NAME.json, for the tables in
            README and docs; all runs must be finished.
        as_json: Print one line of JSON for each run, and draw nothing.
    """
    from ae_jax.runs import folder
    from ae_jax.runs.results import to_markdown

    check_arguments(run_dirs, result)
    described = {path: folder.read_description(path) for path in run_dirs}
    fields = {path: config.flatten(d.config) for path, d in described.items()}
    epochs = {path: folder.read_metrics(path) for path in run_dirs}
    scores = {path: final_scores(path, rows) for path, rows in epochs.items()}
    metrics = shared_metrics(list(scores.values()))
    if sort is not None:
        if sort not in metrics:
            raise UserError(f"--sort: no metric {sort!r}{suggest(sort, metrics)}")
        scores = dict(sorted(scores.items(), key=lambda item: item[1][sort]))
    differ = differing_fields(list(fields.values()))
    if as_json:
        for path, row in scores.items():
            config_of = {name: fields[path].get(name) for name in differ}
            print(json.dumps({"run": str(path), "config": config_of, **row}))
        return
    for name in differ:
        values = ", ".join(str(fields[path].get(name, "–")) for path in scores)
        print(f"{name}: {values}")
    rows = [{"run": path, **row} for path, row in scores.items()]
    print(to_markdown(make_table("Final metrics", rows, ["run", *metrics])), end="")
    print(f"loss curves: {draw(epochs)}")
    if result is not None:
        rows = [fields[path] | row for path, row in scores.items()]
        keep(result, described[run_dirs[0]], rows, [*differ, *metrics])


def check_arguments(run_dirs: tuple[Path, ...], result: str | None) -> None:
    """Refuse what cannot be done before anything is read, or written."""
    if result is not None and not re.fullmatch(r"\w[\w.-]*", result):
        raise UserError(f"--result: must be a name, not a path, got {result}")
    if len(set(run_dirs)) < 2:
        raise UserError(f"compare needs two runs or more, got {len(set(run_dirs))}")


def keep(name: str, first: "Description", rows: list[Row], shown: list[str]) -> None:
    """Keep the outcome as experiments/results/NAME.json.

    Args:
        name: of the file.
        first: config.json of one of the runs.
        rows: of each run its config's fields and its scores.
        shown: names of the table's columns.
    """
    from ae_jax.runs.results import write_result

    unfinished = [row["run_dir"] for row in rows if "steps" not in row]
    if unfinished:
        raise UserError(f"not finished: {', '.join(unfinished)}; finish them")
    table = make_table(f"Runs of {first.experiment}", rows, shown)
    headline, table["caption"] = conclude(rows, shown)
    path = Path("experiments") / "results" / f"{name}.json"
    seeds = [row.get("train.seed", 0) for row in rows]
    kind = first.device["kind"]
    write_result(path, first.experiment, seeds, headline, table, kind)
    print(f"result: {path}")


def final_scores(path: Path, rows: list[Row]) -> Row:
    """A finished run's summary, or the last finished epoch of another one."""
    from ae_jax.runs import folder

    summary = folder.read_summary(path)
    if summary is not None:
        return summary
    return {"epochs": rows[-1]["epoch"], **rows[-1]} if rows else {}


def shared_metrics(scores: list[Row]) -> list[str]:
    """The names of the numbers that all runs have."""
    return [
        name
        for name in scores[0]
        if name.startswith(SHOWN)
        and all(isinstance(row.get(name), int | float) for row in scores)
    ]


def differing_fields(fields: list[Row]) -> list[str]:
    """The config fields in which the runs differ, but for the folder."""
    names = dict.fromkeys(name for values in fields for name in values)
    return [
        name
        for name in names
        if name != "run_dir"
        and any(values.get(name) != fields[0].get(name) for values in fields)
    ]


def make_table(title: str, rows: list[Row], names: list[str]) -> "Table":
    """A table with a row for each run and a column for each name."""

    def cell(name: str, value: Any) -> str:
        form = FORMATS.get(name, ".5f") if isinstance(value, float) else ""
        return format(value, form) if form else str(value)

    return {
        "title": title,
        "columns": [HEADINGS.get(name, name) for name in names],
        "rows": [[cell(n, row.get(n, "–")) for n in names] for row in rows],
        "caption": "",
    }


def draw(epochs: dict[Path, list[Row]]) -> Path:
    """The losses of the runs over each other, each its own objective's; the file."""
    from ae_jax import plots
    from ae_jax.runs.folder import loss_name_of

    names = {path: loss_name_of(rows[0]) for path, rows in epochs.items() if rows}
    if not names:
        runs = ", ".join(map(str, epochs))
        raise UserError(f"{runs}: no run has finished an epoch yet")
    same = len(set(names.values())) == 1
    curves = {
        f"{path}" if same else f"{path}: {name}": (
            [row["epoch"] for row in epochs[path]],
            [row[f"train/{name}"] for row in epochs[path]],
        )
        for path, name in names.items()
    }
    path = next(iter(epochs)).parent / "compare.png"
    if path.exists() and b"ae_jax" not in read_bytes(path)[:500]:
        raise UserError(f"{path}: not drawn by this command; move it elsewhere first")
    shown = next(iter(names.values())).upper() if same else ""
    plots.save(plots.loss_curves(curves, shown), path)
    return path


def conclude(rows: list[Row], metrics: list[str]) -> tuple[dict[str, Any], str]:
    """The headline, and what it says in words.

    Args:
        rows: of each run its config's fields and its scores.
        metrics: that all of them have.
    """
    outcomes = [
        collapse.outcome(
            row.get("latent/dead_units", 0), row.get("model.latent_dim", -1)
        )
        for row in rows
    ]
    counts = {name: outcomes.count(name) for name in collapse.OUTCOMES}
    headline: Row = {name.replace("-", "_"): n for name, n in counts.items()}
    for name in ("mean_image", "pca"):
        scores = {row.get(f"baseline/{name}/test/mse") for row in rows}
        if len(scores) == 1 and None not in scores:
            headline[f"test_mse_{name}"] = scores.pop()
    caption = ", ".join(f"{count} {name}" for name, count in counts.items())
    tests = [name for name in metrics if name.startswith("test/")]
    for test in ["test/mse"] if "test/mse" in tests else tests:
        pairs = zip(rows, outcomes, strict=True)
        healthy = [row[test] for row, outcome in pairs if outcome == "healthy"]
        if len(healthy) > 1:
            mean, sd = statistics.mean(healthy), statistics.stdev(healthy)
            name = f"{test.replace('/', '_')}_healthy"
            headline |= {f"{name}_mean": mean, f"{name}_sd": sd}
            caption += f"; {test} of the healthy {mean:.4f} ± {sd:.4f}"
    return headline, f"Of {len(rows)} runs {caption}."


if __name__ == "__main__":
    cli.run_script(main)
