"""The study of dead codes: one factor at a time, and the best for longer."""

import dataclasses

import pytest

from ae_jax import ensemble, records
from ae_jax.config import ModelConfig, SeedsConfig, TrainConfig, UserError, diff
from experiments import dead_code
from experiments.dead_code import PRESETS, cells, longer


def test_each_setting_differs_from_the_first_in_one_factor(tmp_path):
    config = dataclasses.replace(PRESETS["reference"], run_dir=tmp_path)
    first, *others = cells(config).values()
    changed = [set(diff(first, other)) - {"run_dir"} for other in others]
    assert all(len(fields) == 1 for fields in changed)
    assert set.union(*changed) == {
        "model.init", "model.code_activation", "model.code_width",
        "train.learning_rate",
    }  # fmt: skip
    folders = {cell.run_dir for cell in [first, *others]}
    assert len(folders) == len(others) + 1 >= 11
    assert first.num_seeds == 64
    assert first.train == TrainConfig(num_epochs=3)
    assert first.model == ModelConfig()


def test_the_best_are_the_healthiest_of_the_same_width_then_the_lowest_error(tmp_path):
    config = dataclasses.replace(PRESETS["reference"], run_dir=tmp_path, num_best=3)
    short = {
        name: {"share_healthy": 0.5, "test/mse/median": 0.04} for name in cells(config)
    }
    short["width: 8"] = {"share_healthy": 1.0, "test/mse/median": 0.01}
    short["initialiser: He"] = {"share_healthy": 0.9, "test/mse/median": 0.06}
    short["activation: none"] = {"share_healthy": 1.0, "test/mse/median": 0.05}
    short["activation: leaky ReLU"] = {"share_healthy": 1.0, "test/mse/median": 0.04}
    found = longer(config, short)
    assert list(found) == [
        "tutorial", "activation: leaky ReLU", "activation: none", "initialiser: He",
    ]  # fmt: skip
    for cell in found.values():
        assert (cell.train.num_epochs, cell.num_seeds) == (10, 16)


def tiny(folder):
    return dataclasses.replace(
        PRESETS["quick"],
        run_dir=folder,
        model=ModelConfig(hidden=(8,)),
        train=TrainConfig(num_epochs=1),
        num_seeds=2,
        seeds=SeedsConfig(group_size=2),
        long_epochs=2,
        long_seeds=2,
    )


def test_the_study_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        dead_code, "CELLS", {"width: 2": ("model", "code_width", 2),
                             "learning rate: 1e-2": ("train", "learning_rate", 1e-2)},
    )  # fmt: skip
    monkeypatch.setattr(ensemble, "use_all_cores", lambda: None)  # JAX has begun
    train, done = dead_code.train, []

    def until_the_third(cell):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell.run_dir.name)
        return train(cell)

    config = tiny(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(dead_code, "train", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            dead_code.main(config)
    assert done == ["tutorial", "width-2"]
    capsys.readouterr()
    dead_code.main(config)
    shown = capsys.readouterr().out
    assert "tutorial is finished" in shown
    assert "width-2 is finished" in shown
    summary = records.read_json(config.run_dir / "summary.json")
    assert list(summary["short"]) == ["tutorial", "width: 2", "learning rate: 1e-2"]
    assert list(summary["long"]) == ["tutorial", "learning rate: 1e-2"]
    assert summary["long"]["tutorial"]["epochs"] == 2
    names = {path.name for path in (config.run_dir / "figures").iterdir()}
    assert names == {"dead_code.png", "dead_code_cost.png"}
    dead_code.main(config)
    assert "is finished: see summary.json" in capsys.readouterr().out
    other = dataclasses.replace(config, long_seeds=3)
    with pytest.raises(UserError, match="long_seeds: the run has 2, you asked for 3"):
        dead_code.main(other)
