"""The operator's scripts, each called once on one finished run."""

import dataclasses
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from life import small

from ae_jax.config import CheckpointConfig, FiguresConfig
from ae_jax.data import Npz
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_json
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Denoising
from ae_jax.runs import results
from ae_jax.runs.figures import FIGURES
from ae_jax.runs.trainer import train_run
from scripts import compare, evaluate, plot, tables


@pytest.fixture(scope="module")
def copied(finished_run, tmp_path_factory):
    """The finished run where a script may write."""
    folder = tmp_path_factory.mktemp("copied") / "run"
    return shutil.copytree(finished_run.folder, folder)


@pytest.fixture(scope="module")
def other(finished_run, copied):
    """The same run but for its seed, beside the copied one."""
    train = dataclasses.replace(finished_run.config.train, seed=1)
    values = {"run_dir": copied.parent / "other", "train": train}
    return train_run(dataclasses.replace(finished_run.config, **values)).folder


# --- evaluate.py --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "size"), [("test", 360), ("train", 1336), ("validation", 101)]
)
def test_evaluate_scores_the_whole_split(finished_run, capsys, split, size):
    evaluate.main(finished_run.folder, split=split, as_json=True)
    scores = json.loads(capsys.readouterr().out)
    images = getattr(finished_run.data(), split).images
    error = finished_run.reconstruct(images).astype(np.float64) - images / 255
    mse = np.square(error).mean(axis=(1, 2, 3))
    assert scores["num_images"] == size == len(images)
    assert scores[f"{split}/mse"] == pytest.approx(mse.mean(), rel=1e-5)
    psnr = -10 * np.log10(mse)
    assert scores[f"{split}/psnr_db"] == pytest.approx(psnr.mean(), rel=1e-5)
    dead = (finished_run.encode(images) == 0).all(axis=0).sum()
    assert scores["latent/dead_units"] == dead
    assert scores["checkpoint_step"] == 3 * 21


def test_evaluate_gives_the_numbers_that_the_run_logged(finished_run, capsys):
    summary = read_json(finished_run.folder / "summary.json")
    evaluate.main(finished_run.folder, as_json=True)
    scores = json.loads(capsys.readouterr().out)
    shared = {name for name in scores if name in summary}
    assert shared >= {"test/mse", "test/psnr_db", "test/ssim", "latent/dead_units"}
    assert {name: scores[name] for name in shared} == {n: summary[n] for n in shared}
    for row in finished_run.metrics[::2]:
        step = str(row["step"])
        evaluate.main(finished_run.folder, step, "validation", as_json=True)
        scores = json.loads(capsys.readouterr().out)
        assert scores["validation/mse"] == pytest.approx(row["val/mse"], rel=1e-6)


def test_images_that_moved_are_scored_where_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 5, 4), np.uint8)
    np.savez("a.npz", images=pixels)
    dataset = Npz(dir=Path("here"), source=Path("a.npz"), streaming=True)
    train_run(small(Path("run"), data=dataset, model=Autoencoder((4,), 2)))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("../a.npz").rename("../b.npz")
    with pytest.raises(UserError, match=r"data\.source: a\.npz is not there"):
        evaluate.main(tmp_path / "run")
    evaluate.main(tmp_path / "run", data_source=Path("../b.npz"), as_json=True)
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        scores["test/mse"] == read_json(tmp_path / "run" / "summary.json")["test/mse"]
    )


def test_evaluate_shows_every_number_on_a_line_of_its_own(finished_run, capsys):
    evaluate.main(finished_run.folder, "best")
    lines = capsys.readouterr().out.splitlines()
    shown = dict(line.split() for line in lines)
    assert float(shown["test/mse"]) > 0
    assert len(shown) == len(lines)


# --- plot.py ------------------------------------------------------------------------


def test_plot_draws_from_the_folder_alone_what_the_run_drew(copied, capsys):
    drawn = {name: copied / "figures" / f"{name}.png" for name in FIGURES}
    before = {name: path.read_bytes() for name, path in drawn.items()}
    for path in drawn.values():
        path.unlink()
    plot.main(copied)
    assert capsys.readouterr().out.splitlines() == [str(p) for p in drawn.values()]
    assert {name: path.read_bytes() for name, path in drawn.items()} == before


def test_plot_draws_one_figure_in_the_format_asked_for(copied, capsys):
    plot.main(copied, ("training_loss",), ending="svg")
    (path,) = (copied / "figures").glob("*.svg")
    assert capsys.readouterr().out == f"{path}\n"
    assert path.name == "training_loss.svg"
    assert b"<svg" in path.read_bytes()


def test_plot_lists_the_figures_of_a_run(finished_run, capsys):
    plot.main(finished_run.folder, show_names=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(FIGURES)
    assert all(len(line.split()) > 3 for line in lines)


def test_plot_draws_nothing_if_one_name_is_wrong(copied):
    with pytest.raises(UserError, match="did you mean samples"):
        plot.main(copied, ("test_reconstructions", "sample"), ending="pdf")
    assert not list((copied / "figures").glob("*.pdf"))


# --- compare.py ---------------------------------------------------------------------


def cells_of(shown):
    """The rows of a table in Markdown, each by its headings."""
    lines = [line for line in shown.splitlines() if line.startswith("|")]
    heads, _, *rows = [[c.strip() for c in line[1:-1].split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_compare_shows_what_differs_and_what_it_came_to(copied, other, capsys):
    compare.main((copied, other))
    shown = capsys.readouterr().out
    assert shown.startswith("train.seed: 0, 1\n**Final metrics**")
    summaries = {
        str(path): read_json(path / "summary.json") for path in (copied, other)
    }
    for row in cells_of(shown):
        summary = summaries.pop(row["run"])
        assert float(row["test MSE"]) == pytest.approx(summary["test/mse"], abs=5e-6)
        assert float(row["SSIM"]) == pytest.approx(summary["test/ssim"], abs=5e-4)
        assert row["dead units"] == str(summary["latent/dead_units"])
    assert not summaries
    figure = copied.parent / "compare.png"
    assert f"loss curves: {figure}" in shown
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_compare_sorts_by_a_metric_that_all_have(copied, other, capsys):
    compare.main((copied, other), sort="test/mse")
    shown = cells_of(capsys.readouterr().out)
    scores = [float(row["test MSE"]) for row in shown]
    assert scores == sorted(scores)
    compare.main((copied, other), sort="test/psnr_db")
    assert [row["run"] for row in cells_of(capsys.readouterr().out)] == [
        row["run"] for row in shown[::-1]
    ]
    with pytest.raises(UserError, match="did you mean test/mse"):
        compare.main((copied, other), sort="test/msee")


def test_compare_as_json_is_a_line_for_each_run(copied, other, capsys):
    compare.main((copied, other), sort="test/mse", as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["run"] for row in rows} == {str(copied), str(other)}
    assert rows[0]["test/mse"] <= rows[1]["test/mse"]
    for row in rows:
        path = Path(row["run"])
        assert row["config"] == {"train.seed": int(path == other)}
        summary = read_json(path / "summary.json")
        assert row["test/ssim"] == summary["test/ssim"]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_path_that_is_no_run_gets_the_runs_near_it(tmp_path, depth):
    for name in ("a", "b"):
        path = tmp_path / "/".join(["study"] * (depth - 1) + [name])
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"there are \S*/a, \S*/b$"):
        evaluate.main(tmp_path / "c")
    with pytest.raises(UserError, match=r"there are \S*/a, \S*/b$"):
        evaluate.main(tmp_path)


def test_a_kept_result_holds_the_runs_and_their_table(
    copied, other, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    compare.main((copied, other), result="two")
    path = tmp_path / "experiments" / "results" / "two.json"
    result = read_json(path)
    assert list(result) == [
        "experiment", "command", "date", "machine", "versions", "seeds", "headline",
        "table",
    ]  # fmt: skip
    assert (result["experiment"], result["seeds"]) == ("tutorial", [0, 1])
    head = result["headline"]
    summaries = [read_json(one / "summary.json") for one in (copied, other)]
    dead = [summary["latent/dead_units"] for summary in summaries]
    assert head["healthy"] == dead.count(0)
    assert head["collapsed"] == dead.count(3)
    assert head["healthy"] + head["part_dead"] + head["collapsed"] == 2
    (table,) = results.read_tables(path)
    assert [row[0] for row in table["rows"]] == ["0", "1"]
    assert table["columns"][0] == "seed"
    assert table["caption"].endswith(f"GF/s), {result['date']}.")


def test_the_headline_is_over_healthy_runs_alone():
    scores = [0.03, 0.04, 0.05, 0.07]
    rows = [
        {
            "test/mse": mse,
            "latent/dead_units": dead,
            "model.latent_dim": 3,
            "baseline/pca/test/mse": 0.05,
            "baseline/mean_image/test/mse": mse,
        }
        for mse, dead in zip(scores, (0, 0, 1, 3), strict=True)
    ]
    headline, caption = compare.conclude(rows, ["test/mse", "latent/dead_units"])
    assert (
        headline
        == {
            "healthy": 2,
            "part_dead": 1,
            "collapsed": 1,
            "test_mse_pca": 0.05,  # the mean images differ, as of other data
            "test_mse_healthy_mean": statistics.mean(scores[:2]),
            "test_mse_healthy_sd": pytest.approx(0.01 / 2**0.5),
        }
    )
    assert "2 healthy, 1 part-dead, 1 collapsed" in caption


def test_runs_of_two_objectives_share_what_both_have(
    finished_run, copied, tmp_path, capsys
):
    settings = dataclasses.replace(
        finished_run.config,
        run_dir=tmp_path / "denoising",
        objective=Denoising(sigma=0.1),
        checkpoint=CheckpointConfig(keep=1),
        figures=FiguresConfig(epochs=(), draw=False),
    )
    noisy = train_run(settings).folder
    (noisy / "summary.json").unlink()  # as if it were not finished
    compare.main((copied, noisy))
    shown = capsys.readouterr().out
    assert "objective.name: reconstruction, denoising\n" in shown
    assert "objective.sigma: –, 0.1\n" in shown
    assert set(cells_of(shown)[0]) >= {"run", "epochs", "dead units"}
    assert "train MSE" not in shown
    with pytest.raises(UserError, match=r"not finished: .*denoising"):
        compare.main((copied, noisy), result="two")


def test_compare_overwrites_its_own_figure_alone_and_names_no_path(copied, other):
    place = copied.parent / "compare.png"
    place.unlink(missing_ok=True)
    for _ in range(2):
        compare.main((copied, other))
    place.write_bytes(b"a user's")
    with pytest.raises(UserError, match=r"compare\.png: not drawn by this command"):
        compare.main((copied, other))
    assert place.read_bytes() == b"a user's"
    place.unlink()
    with pytest.raises(UserError, match="--result: must be a name, not a path"):
        compare.main((copied, other), result="../../x")
    assert not place.exists()


def test_compare_needs_two_runs(copied):
    with pytest.raises(UserError, match="two runs or more, got 1"):
        compare.main((copied, copied))


@pytest.mark.parametrize(
    "line", ['{"epoch": 1}', '{"epoch": 1, "train/mse": "0.1"}', "[1]", "3", '{"epoch"']
)
def test_a_damaged_line_of_metrics_is_named(copied, other, tmp_path, line):
    damaged = shutil.copytree(other, tmp_path / "damaged")
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: line 4 is damaged"):
        compare.main((copied, damaged))


# --- tables.py ----------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A README with one empty table, a page with two, and a result."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "experiments" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("a\n<!-- table two -->\n<!-- end -->\nz\n")
    (tmp_path / "docs" / "page.md").write_text("no table here\n")
    table = {"title": "T", "columns": ["x", "y"], "rows": [["1", "2"]], "caption": "C."}
    path = tmp_path / "experiments" / "results" / "two.json"
    write_json(path, {"table": [table, {**table, "title": "U", "caption": ""}]})
    return tmp_path


def test_tables_fills_and_then_finds_nothing_to_do(project, capsys):
    tables.main(root=project)
    shown = "| x   | y   |\n| --- | --- |\n| 1   | 2   |\n"
    filled = f"**T**\n\n{shown}\nC.\n\n**U**\n\n{shown}"
    text = (project / "README.md").read_text()
    assert text == f"a\n<!-- table two -->\n{filled}<!-- end -->\nz\n"
    assert capsys.readouterr().err == f"{project / 'README.md'}\n"
    tables.main(root=project)
    tables.main(root=project, check=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("old", [("| 1 ", "| 9 "), ("C.", "D."), ("**U**", "**V**")])
def test_a_number_that_was_typed_fails_the_check(project, old):
    tables.main(root=project)
    path = project / "README.md"
    typed = path.read_text().replace(*old)
    path.write_text(typed)
    with pytest.raises(UserError, match=r"README.md: tables are old"):
        tables.main(root=project, check=True)
    assert path.read_text() == typed


def test_a_number_in_the_text_is_its_results_in_the_format_asked_for(project):
    path = project / "experiments" / "results" / "two.json"
    write_json(path, {**read_json(path), "headline": {"share": 0.25, "n": 7}})
    text = "<!-- number two share .1% -->?<!-- end --> of "
    text += "<!-- number two n d --><!-- end -->"
    (project / "docs" / "page.md").write_text(text)
    tables.main(root=project)
    filled = (project / "docs" / "page.md").read_text()
    assert re.sub("<!--.*?-->", "", filled) == "25.0% of 7"
    tables.main(root=project, check=True)
    (project / "docs" / "page.md").write_text(text.replace("two n", "two m"))
    with pytest.raises(UserError, match=r"two.json: no 'm'.*known are: n, share"):
        tables.main(root=project)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([], "no headline in it; restore"),
        ({"headline": 3}, "no headline in it; restore"),
        ({"headline": {"share": "much"}}, "share: .*format code"),
    ],
)
def test_a_number_that_is_none_is_named(project, result, message):
    write_json(project / "two.json", result)
    text = "<!-- number two share .1% --><!-- end -->"
    with pytest.raises(UserError, match=f"two.json: {message}"):
        tables.fill(text, project)


@pytest.mark.parametrize(
    "marker",
    ["number two share .1%  ", "number two share ", "table two  ", "number two a b c "],
)
def test_a_marker_that_would_not_be_filled_is_named(project, marker):
    text = f"a\n<!-- {marker}-->\n9<!-- end -->\n"
    (project / "docs" / "page.md").write_text(text)
    with pytest.raises(UserError, match=rf"page.md:2: <!-- {marker}--> is not filled"):
        tables.main(root=project)


@pytest.mark.parametrize("result", [{}, [], {"table": 3}, {"table": {"rows": [[1]]}}])
def test_a_result_without_a_table_is_named(project, result):
    path = project / "experiments" / "results" / "two.json"
    write_json(path, result)
    with pytest.raises(UserError, match=r"two.json: no table"):
        tables.main(root=project)


def test_the_tables_of_this_project_are_up_to_date():
    tables.main(check=True)


def test_a_row_with_a_cell_too_few_is_never_written(tmp_path):
    table = results.Table(title="", columns=["a", "b"], rows=[["1"]], caption="")
    with pytest.raises(ValueError, match="not a cell for each"):
        results.write_result(tmp_path / "a.json", "a", [0], {}, table)
    assert not list(tmp_path.iterdir())


# --- All of them --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plot.py", "nowhere"], "nowhere: not a run folder"),
        (["evaluate.py", "nowhere", "--split", "train"], "nowhere: not a run folder"),
        (["compare.py", "nowhere", "elsewhere"], "nowhere: not a run folder"),
        (["tables.py", "--root", "/nowhere"], "/nowhere/README.md: No such file"),
    ],
)
def test_a_users_mistake_gets_one_line_and_status_2(args, message):
    script, *options = args
    done = subprocess.run(
        [sys.executable, f"scripts/{script}", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
