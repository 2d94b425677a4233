import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ae_jax import config
from ae_jax.config import Config, DataConfig, ModelConfig, TrainConfig, UserError

positive = st.integers(1, 10**6)
plain_configs = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries({"num_validation": positive}),
        "model": st.fixed_dictionaries(
            {"hidden": st.lists(positive, max_size=4), "code_width": positive}
        ),
        "train": st.fixed_dictionaries(
            {
                "learning_rate": st.floats(1e-9, 1e3),
                "schedule": st.sampled_from(["constant", "cosine"]),
                "clip_norm": st.none() | st.floats(1e-9, 1e9),
                "patience": st.none() | positive,
            }
        ),
    }
)


@given(plain_configs)
def test_json_and_back_is_the_identity(plain):
    made = config.from_json(Config, plain)
    assert made.train.clip_norm == plain["train"]["clip_norm"]
    assert made.model.hidden == tuple(plain["model"]["hidden"])
    again = json.loads(json.dumps(config.to_json(made)))
    assert config.from_json(Config, again) == made


def test_absent_fields_take_their_defaults():
    made = config.from_json(Config, {"train": {"seed": 7}})
    assert made == Config(train=TrainConfig(seed=7))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        (
            {"train": {"num_epoch": 3}},
            "train.num_epoch: no such field (did you mean num",
        ),
        ({"trian": {}}, "trian: no such field (did you mean train?)"),
        ({"train": {"num_epochs": "ten"}}, "train.num_epochs: must be of type int"),
        ({"train": {"num_epochs": 2.5}}, "train.num_epochs: must be of type int"),
        ({"train": {"num_epochs": True}}, "train.num_epochs: must be of type int"),
        (
            {"train": {"schedule": "step"}},
            "train.schedule: must be one of constant, cos",
        ),
        ({"model": {"hidden": 128}}, "model.hidden: must be a list"),
        ({"model": {"hidden": [128, "a"]}}, "model.hidden: must be of type int"),
        ({"model": 3}, "model: must be an object"),
        ([], "config: must be an object"),
        ({"data": {"dir": None}}, "data.dir: must be of type str"),
        (
            {"train": {"learning_rate": float("nan")}},
            "train.learning_rate: must be fin",
        ),
    ],
)
def test_a_wrong_field_names_itself_and_its_file(plain, message):
    with pytest.raises(UserError) as caught:
        config.from_json(Config, plain, "f.json")
    assert str(caught.value).startswith(f"f.json: {message}")


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (TrainConfig, "num_epochs", 0),
        (TrainConfig, "batch_size", -1),
        (TrainConfig, "learning_rate", 0.0),
        (TrainConfig, "learning_rate", math.nan),
        (TrainConfig, "learning_rate", math.inf),
        (TrainConfig, "warmup_steps", -1),
        (TrainConfig, "weight_decay", -0.1),
        (TrainConfig, "clip_norm", 0.0),
        (TrainConfig, "patience", 0),
        (TrainConfig, "seed", -1),
        (TrainConfig, "seed", 2**32),
        (ModelConfig, "hidden", (128, 0)),
        (ModelConfig, "code_width", 0),
        (DataConfig, "num_validation", -1),
        (config.CheckpointConfig, "every_steps", -1),
        (config.CheckpointConfig, "keep", 0),
        (config.FiguresConfig, "epochs", (0,)),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(part, name, value):
    with pytest.raises(ValueError, match=rf"\.{name}: must be "):
        part(**{name: value})


def test_a_choice_among_numbers_is_of_their_type():
    for value in (True, 1.0, "1", [1]):
        with pytest.raises(UserError, match=r"channels: must be one of 1, 3"):
            config.from_json(DataConfig, {"name": "folder", "channels": value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (r"data\.streaming", {"data": DataConfig(streaming=True)}),
        (r"mesh\.data", {"mesh": config.MeshConfig(2)}),
        ("distributed", {"distributed": True}),
    ],
)
def test_many_seeds_refuse_what_is_for_single_runs(name, options):
    with pytest.raises(ValueError, match=f"^{name}: for single runs"):
        config.EnsembleConfig(**options)


def test_patience_needs_held_out_images():
    with pytest.raises(ValueError, match="needs a held-out part"):
        Config(train=TrainConfig(patience=2))
    Config(train=TrainConfig(patience=2), data=DataConfig(num_validation=1))


def changed(**train) -> Config:
    return Config(train=TrainConfig(**train))


def test_more_epochs_resume_a_run_of_constant_learning_rate():
    config.check_resumable(changed(num_epochs=3), changed(num_epochs=4))


@pytest.mark.parametrize(
    ("run", "asked"),
    [
        (changed(num_epochs=3), changed(num_epochs=2)),
        (
            changed(num_epochs=3, schedule="cosine"),
            changed(num_epochs=4, schedule="cosine"),
        ),
        (changed(seed=4), changed(seed=5)),
        (Config(), Config(model=ModelConfig(code_width=4))),
        (Config(), Config(data=DataConfig(name="digits"))),
    ],
)
def test_a_config_of_another_run_does_not_resume_this_one(run, asked):
    with pytest.raises(UserError, match=r": the run has .*, you asked for "):
        config.check_resumable(run, asked)


def test_every_difference_is_listed_with_both_values():
    asked = changed(seed=5, batch_size=32)
    with pytest.raises(UserError) as caught:
        config.check_resumable(changed(seed=4), asked)
    assert "train.seed: the run has 4, you asked for 5" in str(caught.value)
    assert "train.batch_size: the run has 64, you asked for 32" in str(caught.value)


def test_where_and_how_often_a_run_is_saved_and_drawn_may_change(tmp_path):
    asked = dataclasses.replace(
        Config(),
        run_dir=tmp_path,
        data=DataConfig(dir=tmp_path, source=tmp_path),
        checkpoint=config.CheckpointConfig(every_steps=5, keep=9),
        figures=config.FiguresConfig(epochs=(2,)),
    )
    config.check_resumable(Config(), asked)


def test_a_file_may_be_bare_or_a_runs_config_json(tmp_path):
    path, made = tmp_path / "c.json", changed(seed=9)
    path.write_text(json.dumps(config.to_json(made)))
    assert config.load(path, Config) == made
    path.write_text(json.dumps({"format": 1, "config": config.to_json(made)}))
    assert config.load(path, Config) == made


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json"):
        config.load(tmp_path / "nowhere.json", Config)
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UserError, match=r"c\.json is not JSON"):
        config.load(tmp_path / "c.json", Config)
