"""Compare runs: ``compare.py RUN RUN… [--result NAME]``."""

import statistics
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from ae_jax import cli, config, records

COLUMNS = {
    "epochs": "{}",
    "train/mse": "{:.5f}",
    "test/mse": "{:.5f}",
    "test/psnr_db": "{:.2f}",
    "test/ssim": "{:.3f}",
    "code/dead_units": "{}",
    "wall_s": "{:.1f}",
}


def main(run_dirs: Positional[tuple[Path, ...]], result: str | None = None) -> None:
    """Compare runs: fields that differ, final metrics, loss curves over each other.

    Writes the curves to compare.png in the folder above the first run.

    Args:
        run_dirs: Run folders, two or more, finished or not.
        result: Keep the outcome as experiments/results/NAME.json, for the tables in
            README and docs; all runs must be finished.
    """
    if len(run_dirs) < 2:
        raise config.UserError(f"compare needs two runs or more, got {len(run_dirs)}")
    described = {path: records.read_description(path) for path in run_dirs}
    fields = {
        path: config.flatten(description["config"])
        for path, description in described.items()
    }
    rows = {path: _final_metrics(path) for path in run_dirs}
    _print_differences(fields)
    _print_metrics(rows)
    print(f"\nloss curves: {_draw(fields)}")
    if result:
        path = Path("experiments") / "results" / f"{result}.json"
        _write_result(path, described, fields, rows)
        print(f"result: {path}")


def _final_metrics(path: Path) -> dict[str, Any]:
    summary = records.read_summary(path)
    if summary:
        return summary
    rows = records.read_rows(path, types={"epoch": int})
    return {**rows[-1], "epochs": rows[-1]["epoch"]} if rows else {}


def _print_differences(fields: dict[Path, dict[str, Any]]) -> None:
    first, *others = fields.values()
    for key in (key for key in first if all(key in values for values in others)):
        values = [str(values[key]) for values in fields.values()]
        if key != "run_dir" and len(set(values)) > 1:
            print(f"{key}: {', '.join(values)}")


def _print_metrics(rows: dict[Path, dict[str, Any]]) -> None:
    width = max(len(str(path)) for path in rows)
    print(f"\n{'run':{width}}  " + "  ".join(f"{name:>15}" for name in COLUMNS))
    for path, row in rows.items():
        cells = [
            form.format(row[name]) if name in row else "–"
            for name, form in COLUMNS.items()
        ]
        print(f"{path!s:{width}}  " + "  ".join(f"{cell:>15}" for cell in cells))


def _draw(fields: dict[Path, dict[str, Any]]) -> Path:
    from ae_jax import figures

    curves = {}
    for path, values in fields.items():
        loss = f"train/{values.get('train.loss', 'mse')}"
        rows = records.read_rows(path, types={"epoch": int, loss: float})
        if rows:
            epochs = [row["epoch"] for row in rows]
            curves[str(path)] = (epochs, [row[loss] for row in rows])
    path = next(iter(fields)).parent / "compare.png"
    if not curves:
        runs = ", ".join(map(str, fields))
        raise config.UserError(f"{runs}: no run has finished an epoch yet")
    figures.save(figures.loss_curves(curves), path)
    return path


def _write_result(
    path: Path,
    described: dict[Path, dict[str, Any]],
    fields: dict[Path, dict[str, Any]],
    rows: dict[Path, dict[str, Any]],
) -> None:
    unfinished = [str(run) for run, row in rows.items() if "test/mse" not in row]
    if unfinished:
        raise config.UserError(f"not finished: {', '.join(unfinished)}; finish them")
    for run, values in fields.items():
        for name in ("train.seed", "model.code_width"):
            if type(values.get(name)) is not int:
                place = run / "config.json"
                raise config.UserError(f"{place}: no number as {name}; mend it")
    widths = {run: values["model.code_width"] for run, values in fields.items()}
    dead = {run: row["code/dead_units"] for run, row in rows.items()}
    healthy = [row["test/mse"] for run, row in rows.items() if not dead[run]]
    headline: dict[str, int | float] = {
        "healthy": len(healthy),
        "part_dead": sum(0 < dead[run] < widths[run] for run in rows),
        "collapsed": sum(dead[run] == widths[run] for run in rows),
    }
    if len(healthy) > 1:
        headline["test_mse_healthy_mean"] = statistics.mean(healthy)
        headline["test_mse_healthy_sd"] = statistics.stdev(healthy)
    table = [
        {
            "seed": fields[run]["train.seed"],
            **{name: row[name] for name in COLUMNS if name in row},
            "first_step_s": row["first_step_s"],
        }
        for run, row in rows.items()
    ]
    first = next(iter(described.values()))
    records.write_result(
        path,
        experiment=first["experiment"],
        accelerator=first["device"]["kind"],
        seeds=[row["seed"] for row in table],
        headline=headline,
        table=table,
    )


if __name__ == "__main__":
    cli.run_script(main)
