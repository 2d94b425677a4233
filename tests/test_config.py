"""Configs: JSON and back, what is refused by name, what may change on resume."""

import dataclasses
import itertools
import json
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from ae_jax import config, data, registry
from ae_jax.config import REGISTRIES, CheckpointConfig, Config, TrainConfig
from ae_jax.errors import UserError
from ae_jax.models.conv import ConvAutoencoder
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Denoising, Reconstruction

# --- Every config that can be made of the registries ----------------------------------

COMBINATIONS = list(
    itertools.product(*(known.values() for known in REGISTRIES.values()))
)


def default(combination) -> Config:
    return Config(**{k: cls() for k, cls in zip(REGISTRIES, combination, strict=True)})


def another(hint: Any, value: Any) -> Any:
    """A value of the type, other than the one given."""
    args = get_args(hint)
    if hasattr(hint, "__metadata__"):
        return another(args[0], value)
    if get_origin(hint) is Literal:
        return next(arg for arg in args if arg != value)
    if isinstance(hint, types.UnionType) or type(None) in args:
        kinds = [arg for arg in args if arg is not type(None)]
        return another(kinds[0], value) if value is None else None
    if hint is bool:
        return not value
    if get_origin(hint) is tuple:
        return (*value, 2, 1)
    if hint is Path:
        return Path("else/where")
    if hint is str:
        return "localhost:1234"
    return {int: (value or 0) + 1, float: (value or 0.0) + 0.125}[hint]


def fields_of(part: Any, prefix: str = "") -> dict[str, Any]:
    """Each option by its dotted path, and another value for it."""
    hints, found = get_type_hints(type(part), include_extras=True), {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            found |= fields_of(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = another(hints[field.name], value)
    return found


def changed(part: Any, path: str, value: Any) -> Any:
    """A config with one option changed."""
    name, _, rest = path.partition(".")
    value = changed(getattr(part, name), rest, value) if rest else value
    return dataclasses.replace(part, **{name: value})


@given(st.data())
def test_json_and_back_is_the_identity(data):
    made = default(data.draw(st.sampled_from(COMBINATIONS)))
    other = fields_of(made)
    try:
        for path in data.draw(st.lists(st.sampled_from(sorted(other)), unique=True)):
            made = changed(made, path, other[path])
    except ValueError:  # some options go only with others
        reject()
    plain = json.loads(json.dumps(config.to_json(made)))
    assert config.from_json(Config, plain) == made
    flat = config.flatten(plain)
    assert set(flat) == {*other, *(f"{section}.name" for section in REGISTRIES)}
    known = {k: v for k, v in plain.items() if k != "train"}
    rest = config.from_json(Config, known)  # as of an older version, without it
    assert rest == dataclasses.replace(made, train=TrainConfig())


@dataclasses.dataclass(frozen=True)
class Blobs:
    """A data set of one's own, which inherits nothing."""

    num: int = 12

    def load(self):
        raise NotImplementedError


def test_classes_of_ones_own_go_through_json_as_module_and_class():
    made = Config(data=Blobs(num=5))
    plain = config.to_json(made)
    assert plain["data"] == {"name": f"{__name__}:Blobs", "num": 5}
    assert config.from_json(Config, json.loads(json.dumps(plain))) == made
    local = dataclasses.make_dataclass("Local", ["n"], namespace={"load": None})
    plain["data"]["name"] = f"{__name__}:{local.__name__}"
    with pytest.raises(
        UserError, match=r"cannot import .*:Local.*define it there first"
    ):
        config.from_json(Config, plain)


def test_an_unknown_objective_or_data_set_is_carried_along_and_a_model_is_not():
    plain = config.to_json(Config())
    for section in ("data", "objective"):
        given = {**plain, section: {"name": "gone:Thing", "weight": 2}}
        with pytest.raises(UserError, match=rf"{section}\.name: cannot import gone:Th"):
            config.from_json(Config, given)
        made = config.from_json(Config, given, unknown=True)
        assert isinstance(getattr(made, section), registry.Unknown)
        assert config.to_json(made) == given
    plain["model"] = {"name": "gone:Thing"}
    with pytest.raises(UserError, match=r"model\.name: cannot import gone:Thing"):
        config.from_json(Config, plain, unknown=True)


# --- What is refused ------------------------------------------------------------------

WRONG_JSON = [
    ({"train": {"num_epoch": 3}}, r"train\.num_epoch: no such .* mean num_epochs\?"),
    ({"trian": {}}, r"trian: no such field \(did you mean train\?\)"),
    ({"train": {"num_epochs": "ten"}}, r"train\.num_epochs: .* integer, got 'ten'"),
    ({"train": {"num_epochs": "10"}}, r"train\.num_epochs: .* integer, got '10'"),
    ({"train": {"num_epochs": 2.5}}, r"train\.num_epochs: .* integer, got 2\.5"),
    ({"train": {"num_epochs": True}}, r"train\.num_epochs: .* integer, got True"),
    ({"train": {"num_epochs": 0}}, r"train\.num_epochs: .* greater than 0, got 0"),
    ({"train": {"schedule": "step"}}, r"train\.schedule: .* or 'cosine', got 'step'"),
    ({"train": {"learning_rate": float("nan")}}, r"train\.learning_rate: .* finite"),
    ({"train": 3}, r"train: must be an object, got 3"),
    ({"model": 3}, r'model: must be an object with a "name", got 3'),
    ({"model": {}}, r'model: must be an object with a "name"'),
    ({"model": {"name": "cnov"}}, r"model\.name: there is no cnov \(did you mean conv"),
    ({"model": {"name": "conv", "hidden": 8}}, r"model\.hidden: .* array, got 8"),
    (
        {"model": {"name": "conv", "hidden": [8, "a"]}},
        r"model\.hidden\.1: .* integer, got 'a'",
    ),
    (
        {"objective": {"name": "denoising", "loss": "mse"}},
        r"objective\.loss: no such field; known are: sigma",
    ),
    ({"objective": {"name": "denoising", "sigma": -1}}, r"objective\.sigma: .* -1"),
    ({"data": {"name": "mnist", "dir": None}}, r"data\.dir: .* got None"),
    ({"data": {"name": "folder", "channels": 2}}, r"data\.channels: .* got 2"),
    ({"train": {"patience": 2}}, r"train\.patience: needs a held-out part"),
    ([], "config: must be an object"),
]


@pytest.mark.parametrize(("plain", "told"), WRONG_JSON, ids=str)
def test_a_wrong_value_in_a_file_is_named_by_its_path_in_one_line(plain, told):
    with pytest.raises(UserError, match=f"^f.json: {told}.*; fix the file$") as caught:
        config.from_json(Config, plain, "f.json")
    assert "\n" not in str(caught.value)


OUT_OF_RANGE = [
    (TrainConfig, "num_epochs", 0),
    (TrainConfig, "batch_size", -1),
    (TrainConfig, "learning_rate", 0.0),
    (TrainConfig, "learning_rate", float("nan")),
    (TrainConfig, "learning_rate", float("inf")),
    (TrainConfig, "warmup_steps", -1),
    (TrainConfig, "weight_decay", -0.1),
    (TrainConfig, "clip_norm", 0.0),
    (TrainConfig, "patience", 0),
    (TrainConfig, "seed", -1),
    (TrainConfig, "seed", 2**32),
    (TrainConfig, "precision", "float16"),
    (Autoencoder, "hidden", (128, 0)),
    (Autoencoder, "latent_dim", 0),
    (ConvAutoencoder, "latent_activation", "relo"),
    (Reconstruction, "loss", "mae"),
    (Denoising, "sigma", -0.1),
    (Denoising, "sigma", float("inf")),
    (data.Digits, "num_validation", -1),
    (CheckpointConfig, "every_steps", -1),
    (CheckpointConfig, "keep", 0),
    (config.FiguresConfig, "epochs", (0,)),
    (config.MeshConfig, "data", 0),
]


@pytest.mark.parametrize(("cls", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_its_name(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{name}(\.\d)?: input should be .*got "):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("told", "options"),
    [
        (r"^train\.patience: needs a held-out", {"train": TrainConfig(patience=2)}),
        (r"^mesh\.data: 3 devices cannot share", {"mesh": config.MeshConfig(3)}),
        ("^process_id: only with --distributed", {"process_id": 1}),
        ("HOST:PORT, got here", {"distributed": True, "coordinator": "here"}),
        ("HOST:PORT", {"distributed": True, "coordinator": "host:99999"}),
        (
            "^process_id: must be below num_processes, got 2",
            {"distributed": True, "num_processes": 2, "process_id": 2},
        ),
        ("^model: must be an instance .* with make, such as Auto", {"model": "conv"}),
        ("^model: must be an instance", {"model": Autoencoder}),
        ("^objective: .* with __call__", {"objective": Autoencoder()}),
        ("^data: .* with load", {"data": Reconstruction()}),
    ],
)
def test_what_does_not_go_together_is_refused(told, options):
    with pytest.raises(ValueError, match=told):
        Config(**options)


def test_a_file_may_be_bare_or_a_runs_config_json_and_is_named_if_it_is_neither(
    tmp_path,
):
    path, made = tmp_path / "c.json", Config(train=TrainConfig(seed=9))
    for plain in (config.to_json(made), {"format": 2, "config": config.to_json(made)}):
        path.write_text(json.dumps(plain))
        assert config.load(path, Config) == made
    path.write_text("{")
    with pytest.raises(UserError, match=r"--config: .*c\.json is not JSON"):
        config.load(path, Config)
    with pytest.raises(UserError, match=r"--config: cannot read .*nowhere\.json: No "):
        config.load(tmp_path / "nowhere.json", Config)


# --- Resuming -------------------------------------------------------------------------

FREE = {
    *("run_dir", "data.dir", "data.source", "checkpoint.every_steps"),
    *("checkpoint.keep", "figures.epochs", "figures.draw", "mesh.data"),
    "data.skip_broken",  # the fingerprint tells whether it mattered
    *("distributed", "coordinator", "num_processes", "process_id"),
}
"""What the contract lets a resumed run change."""


@pytest.mark.parametrize("combination", COMBINATIONS[:: len(COMBINATIONS) // 5 or 1])
def test_what_is_free_may_change_and_any_other_field_is_refused_by_name(combination):
    run = default(combination)
    run = dataclasses.replace(run, distributed=True, num_processes=3)
    run = changed(run, "data.num_validation", 7)
    for path, value in fields_of(run).items():
        if path == "distributed":  # only without the others of its kind
            asked = dataclasses.replace(run, distributed=False, num_processes=None)
        else:
            asked = changed(run, path, value)
        assert config.diff(run, asked)
        if path in FREE or path == "train.num_epochs":
            config.check_same_run(run, asked)
        else:
            flat = (config.flatten(config.to_json(c))[path] for c in (run, asked))
            told = "{}: the run has {}, you asked for {}. Choose another --run-dir"
            with pytest.raises(UserError) as caught:
                config.check_same_run(run, asked)
            assert told.format(path, *flat) in str(caught.value)


@pytest.mark.parametrize(
    ("run", "asked", "allowed"),
    [
        ({"num_epochs": 3}, {"num_epochs": 4}, True),
        ({"num_epochs": 3}, {"num_epochs": 2}, False),
        (
            {"num_epochs": 3, "schedule": "cosine"},
            {"num_epochs": 4, "schedule": "cosine"},
            False,
        ),
        ({"num_epochs": 3, "schedule": "cosine"}, {"num_epochs": 4}, False),
    ],
)
def test_epochs_may_be_raised_under_a_constant_rate_alone(run, asked, allowed):
    run, asked = (Config(train=TrainConfig(**options)) for options in (run, asked))
    assert bool(config.differences_that_matter(run, asked)) != allowed


def test_every_difference_is_listed_and_of_another_class_the_name():
    run = Config(train=TrainConfig(seed=4))
    asked = Config(objective=Denoising(), train=TrainConfig(seed=5, batch_size=32))
    with pytest.raises(UserError) as caught:
        config.check_same_run(run, asked)
    for told in (
        "runs/run holds another run: ",
        "train.seed: the run has 4, you asked for 5",
        "train.batch_size: the run has 64, you asked for 32",
        "objective.name: the run has reconstruction, you asked for denoising",
    ):
        assert told in str(caught.value)
    assert "objective.sigma" not in str(caught.value)  # follows from the name
