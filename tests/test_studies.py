"""Studies: folders of ordinary runs, and what they come to."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from life import snapshot

import ae_jax
from ae_jax.config import TrainConfig
from ae_jax.data import Digits
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder
from ae_jax.runs import study
from ae_jax.runs.study import Study
from experiments import collapse, seeds

SMALL = {
    "data": Digits(),
    "model": Autoencoder(hidden=(16, 8)),
    "train": TrainConfig(num_epochs=1, batch_size=450),
}


def run_seeds(folder, name="seeds", **fields):
    fields = {"num_seeds": 3, "together": 2, **SMALL, **fields}
    small = Study(run_dir=folder, **fields)
    return study.run_study(name, small, seeds.cells, seeds.summarise)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of three seeds, two of them together; read only."""
    folder = tmp_path_factory.mktemp("seeds") / "study"
    return folder, run_seeds(folder)


def test_each_seed_is_an_ordinary_run(finished):
    folder, summary = finished
    runs = [ae_jax.open_run(folder / "tutorial" / str(seed)) for seed in range(3)]
    assert [run.config.train.seed for run in runs] == [0, 1, 2]
    assert not any(hasattr(run.config, "num_seeds") for run in runs)
    test = Digits().load().test_images / 255
    errors = [np.square(run.reconstruct(test) - test).mean() for run in runs]
    np.testing.assert_allclose(summary["test/mse/median"], np.median(errors), rtol=1e-5)
    dead = [run.count_dead_units(test) for run in runs]
    assert summary["healthy"] == dead.count(0)
    assert summary["collapsed"] == dead.count(3)
    assert summary["num_seeds"] == 3
    assert (folder / "seeds.png").exists()


def test_a_finished_study_says_so_and_trains_nothing(finished, capsys):
    folder, summary = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.json")}
    assert run_seeds(folder) == json.loads(json.dumps(summary))
    assert "is finished" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.json")}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_seeds": 2}, "num_seeds: the run has 3, you asked for 2"),
        ({"together": 3}, "together: the run has 2, you asked for 3"),
        (
            {"train": TrainConfig(num_epochs=1, batch_size=450, seed=1)},
            "train.seed: the run has 0",
        ),
    ],
)
def test_another_study_is_refused(finished, fields, says):
    with pytest.raises(UserError, match=says):
        run_seeds(finished[0], **fields)
    with pytest.raises(UserError, match=r"holds a study of experiments\.seeds"):
        run_seeds(finished[0], "collapse")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("study.json", '{"format": 2}', "study.json: not a study of this version: e"),
        ("study.json", '{"format": 1, "experiment": "a", "study": {}}', "not a study"),
        ("study.json", '{"format": 2, "experiment": "seeds", "study": 5}', "study: in"),
        ("study.json", "[]", "not a study of this version: input should be"),
        ("summary.json", "null", "summary.json: damaged: input should be"),
        ("summary.json", "{}", "summary.json: damaged: digest: field required"),
        ("summary.json", '{"healthy": 1, "digest": "a"}', "not what was written"),
    ],
)
def test_a_damaged_file_is_reported(finished, tmp_path, name, content, says):
    folder = shutil.copytree(finished[0], tmp_path / "study")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        run_seeds(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_study_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not a run folder"):
        run_seeds(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_more_seeds_later_keep_those_that_are_finished(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "study")
    first = snapshot(folder / "tutorial" / "1")
    assert run_seeds(folder, num_seeds=4)["num_seeds"] == 4
    assert snapshot(folder / "tutorial" / "1") == first
    assert ae_jax.open_run(folder / "tutorial" / "3").config.train.seed == 3


FIELDS = {
    "initialiser": ("model.init", str.lower),
    "activation": ("model.latent_activation", lambda n: n.lower().replace(" ", "_")),
    "latent units": ("model.latent_dim", int),
    "learning rate": ("train.learning_rate", float),
}


def test_a_cell_of_collapse_trains_by_what_its_name_says_and_by_nothing_else(tmp_path):
    base = collapse.Collapse(run_dir=tmp_path, **SMALL, num_seeds=2)
    cells = collapse.cells(base, {})
    runs = {name: study.member_configs(base, name, cells[name]) for name in cells}
    assert len(runs) == 11
    tutorial = runs.pop("short/tutorial")[0]
    assert (tutorial.model, tutorial.train) == (base.model, base.train)
    for name, (first, second) in runs.items():
        factor, _, value = name.removeprefix("short/").partition(": ")
        field, read = FIELDS[factor]
        changed = ae_jax.config.diff(tutorial, first)
        assert changed.pop("run_dir")[1] == str(tmp_path / study.slug(name) / "0")
        assert {key: new for key, (_, new) in changed.items()} == {field: read(value)}
        assert set(ae_jax.config.diff(first, second)) == {"run_dir", "train.seed"}
        assert second.train.seed == 1


def test_the_command_of_collapse_ends_with_a_table_and_its_figures(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(study, "use_all_cores", lambda: None)
    first, *_ = collapse.FACTORS
    monkeypatch.setattr(collapse, "FACTORS", {first: collapse.FACTORS[first]})
    quick = dataclasses.replace(
        collapse.PRESETS["quick"],
        run_dir=tmp_path / "study",
        **SMALL,
        num_seeds=2,
        long_seeds=2,
        long_epochs=2,
    )
    tables = []
    for _ in range(2):  # the second time it is found finished
        collapse.main(quick)
        out = capsys.readouterr().out
        tables.append([line for line in out.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1]
    names = [f"{n}, {e} epochs" for e in (1, 2) for n in ("tutorial", first)]
    assert [line.split("|")[1].strip() for line in tables[0][2:]] == names
    for name in ("collapse.png", "collapse_cost.png"):
        assert (tmp_path / "study" / name).exists()


def test_collapse_trains_the_best_for_longer():
    base = dataclasses.replace(collapse.PRESETS["quick"], num_best=2)
    rows = {
        name: [{"outcome": "part-dead", "test/mse": 0.07}] * 4
        for name in collapse.cells(base, {})
    }
    healthy = [{"outcome": "healthy", "test/mse": 0.05}] * 4
    better = [{"outcome": "healthy", "test/mse": 0.04}] * 4
    rows["short/activation: none"] = healthy
    rows["short/initialiser: He"] = better
    rows["short/latent units: 8"] = better  # not as many latent units: no rival
    cells = collapse.cells(base, rows)
    longer = {name: cell for name, cell in cells.items() if name.startswith("long/")}
    assert list(longer) == [
        "long/tutorial", "long/initialiser: He", "long/activation: none"
    ]  # fmt: skip
    for cell in longer.values():
        assert cell.num_seeds == base.long_seeds
        assert cell.config.train.num_epochs == base.long_epochs
