"""Configs: JSON and back, what is refused by name, what may change on resume."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import get_args, get_type_hints

import pydantic
import pytest
from life import small

from ae_jax import config, data, registry, weights
from ae_jax.config import (
    REGISTRIES,
    CheckpointConfig,
    Config,
    FiguresConfig,
    MeshConfig,
    TrainConfig,
)
from ae_jax.errors import UserError
from ae_jax.models.conv import ConvAutoencoder
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Denoising, Reconstruction
from ae_jax.runs import folder
from ae_jax.runs.trainer import train_run

# --- Every class of the registries, and every field -----------------------------------

COMBINATIONS = [
    {
        section: [*known.values()][i % len(known)]()
        for section, known in REGISTRIES.items()
    }
    for i in range(max(map(len, REGISTRIES.values())))
]
"""Each class in one of them at least."""


@pytest.fixture(params=COMBINATIONS, ids=lambda made: type(made["data"]).__name__)
def run(request):
    """A config to change fields of, in which any one of them may be changed."""
    made = Config(**request.param, distributed=True, num_processes=3)
    return changed(made, "data.num_validation", 7)


def another(hint, value):
    """A value of the type, other than the one given."""
    number = value if isinstance(value, int | float) else 0
    likely = (*get_args(hint), not value, number + 1, number + 0.125, (2, 1))
    for other in (*likely, Path("else/where"), "localhost:1234"):
        with contextlib.suppress(pydantic.ValidationError):
            pydantic.TypeAdapter(hint).validate_python(other, strict=True)
            if other != value:
                return other
    raise AssertionError(f"no other {hint} comes to mind")


def fields_of(part, prefix=""):
    """Each option by its dotted path, and another value for it."""
    hints, found = get_type_hints(type(part), include_extras=True), {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            found |= fields_of(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = another(hints[field.name], value)
    return found


def changed(part, path, value):
    """A config with one option changed."""
    name, _, rest = path.partition(".")
    value = changed(getattr(part, name), rest, value) if rest else value
    return dataclasses.replace(part, **{name: value})


def test_json_and_back_is_the_identity(run):
    others = fields_of(run)
    for path in sorted(others.keys() - {"distributed"}):  # which the processes need
        run = changed(run, path, others[path])
    plain = json.loads(json.dumps(config.to_json(run)))
    assert config.from_json(Config, plain) == run
    names = {f"{section}.name" for section in REGISTRIES}
    assert set(config.flatten(plain)) == names | set(others)
    del plain["train"]  # as of an older version
    rest = config.from_json(Config, {**plain, "mesh": {}})
    assert rest == dataclasses.replace(run, train=TrainConfig(), mesh=MeshConfig())


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
    assert config.from_json(Config, plain) == made
    gone = {"data": {"name": f"{__name__}:Gone"}}
    with pytest.raises(UserError, match=r"cannot import .*:Gone: .*define it there"):
        config.from_json(Config, gone)
    local = dataclasses.make_dataclass("Gone", [], namespace={"load": None})
    local.__module__ = __name__  # where it cannot be found, as a notebook's
    like = Config(data=local())
    assert config.from_json(Config, gone, like=like) == like


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
    ({"train": {"num_epochs": "10"}}, r"train\.num_epochs: .* integer, got '10'"),
    ({"train": {"num_epochs": True}}, r"train\.num_epochs: .* integer, got True"),
    ({"train": {"num_epochs": 0}}, r"train\.num_epochs: .* greater than 0, got 0"),
    ({"train": {"learning_rate": float("nan")}}, r"train\.learning_rate: .* finite"),
    ({"train": {"patience": 2}}, r"train\.patience: needs a held-out part"),
    ({"train": 3}, r"train: must be an object, got 3"),
    ({"model": 3}, r'model: must be an object with a "name", got 3'),
    ({"model": {}}, r'model: must be an object with a "name"'),
    ({"model": {"name": "cnov"}}, r"model\.name: there is no cnov \(did you mean conv"),
    ({"model": {"name": "conv", "hidden": [8, "a"]}}, r"model\.hidden\.1: .* got 'a'"),
    (
        {"objective": {"name": "denoising", "width": 1}},
        r"objective\.width: .* known are",
    ),
    ({"data": {"name": "mnist", "dir": None}}, r"data\.dir: .* got None"),
    ([], "config: must be an object"),
]


@pytest.mark.parametrize(("plain", "message"), WRONG_JSON, ids=str)
def test_a_wrong_value_in_a_file_is_named_by_its_path_in_one_line(plain, message):
    expected = f"^f.json: {message}.*; fix the file$"
    with pytest.raises(UserError, match=expected) as caught:
        config.from_json(Config, plain, "f.json")
    assert "\n" not in str(caught.value)


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [
    (TrainConfig, {"num_epochs": 0, "batch_size": -1, "learning_rate": 0.0}),
    (TrainConfig, {"learning_rate": NAN, "warmup_steps": -1, "weight_decay": -0.1}),
    (TrainConfig, {"learning_rate": INF, "clip_norm": 0.0, "patience": 0, "seed": -1}),
    (TrainConfig, {"seed": 2**32, "precision": "float16"}),
    (CheckpointConfig, {"every_steps": -1, "keep": 0}),
    (FiguresConfig, {"epochs": (0,)}),
    (MeshConfig, {"data": 0}),
    (data.Digits, {"num_validation": -1}),
    (data.Folder, {"test_share": 1.0, "channels": 2, "image_size": 0}),
    (data.Npz, {"test_share": NAN, "split_seed": -1}),
    (Autoencoder, {"hidden": (128, 0), "latent_dim": 0}),
    (ConvAutoencoder, {"latent_activation": "relo"}),
    (Reconstruction, {"loss": "mae"}),
    (Denoising, {"sigma": -0.1}),
    (Denoising, {"sigma": INF}),
]


@pytest.mark.parametrize(("cls", "values"), OUT_OF_RANGE)
def test_each_value_out_of_range_is_refused_by_its_name(cls, values):
    with pytest.raises(ValueError, match=r"input should be .*got ") as caught:
        cls(**values)
    wrong = [part.partition(":")[0] for part in str(caught.value).split("; ")]
    assert {name.partition(".")[0] for name in wrong} == set(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": TrainConfig(patience=2)}, r"^train\.patience: needs a held-out"),
        ({"mesh": MeshConfig(3)}, r"^mesh\.data: 3 devices cannot share"),
        ({"process_id": 1}, "^process_id: only with --distributed"),
        ({"distributed": True, "coordinator": "here"}, "HOST:PORT, got here"),
        ({"distributed": True, "coordinator": "host:99999"}, "HOST:PORT"),
        (
            {"distributed": True, "num_processes": 2, "process_id": 2},
            "^process_id: must be below num_processes, got 2",
        ),
        ({"model": "conv"}, "^model: must be an instance .* with make, such as Auto"),
        ({"objective": Reconstruction}, "^objective: must be an instance"),
        ({"objective": Autoencoder()}, "^objective: .* with __call__"),
        ({"data": Reconstruction()}, "^data: .* with load"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_a_file_holds_a_config_or_is_a_runs_config_json_or_is_named(tmp_path):
    path, made = tmp_path / "c.json", Config(train=TrainConfig(seed=9))
    for plain in (config.to_json(made), {"format": 2, "config": config.to_json(made)}):
        path.write_text(json.dumps(plain))
        assert config.load(path, Config) == made
    with pytest.raises(FileNotFoundError):
        config.load(tmp_path / "nowhere.json", Config)


BAD_JSON = {
    "cut": ("{", "not JSON"),
    "brackets": ("[" * 100_000, "not JSON .maximum recursion depth"),
    "digits": (f'{{"train": {{"seed": {"9" * 5000}}}}}', "not JSON .Exceeds the limit"),
    "a large number": (
        f'{{"train": {{"num_epochs": {"9" * 400}}}}}',
        "train.num_epochs: input should be less than 2147483648, got 9{77}…; fix",
    ),
    "NaN": ('{"train": {"seed": NaN}}', "train.seed: .* valid integer, got nan"),
    "NUL": (r'{"run_dir": "a\u0000b"}', "run_dir: a path cannot hold NUL"),
    "half a surrogate": (r'{"run_dir": "a\ud800b"}', "run_dir: invalid JSON"),
}


def test_a_path_must_be_utf8():
    with pytest.raises(ValueError, match=r"run_dir: 'a.udcff' is not UTF-8; rename"):
        Config(run_dir=Path(os.fsdecode(b"a\xff")))
    assert Config(run_dir=Path("ö 画")).run_dir == Path("ö 画")


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_that_is_none_or_out_of_range_is_named_in_a_line(tmp_path, kind):
    text, message = BAD_JSON[kind]
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=rf"c\.json: .*{message}") as caught:
        config.load(tmp_path / "c.json", Config)
    assert len(str(caught.value)) < 400


def make_zero(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, make_zero])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: config.load(path, Config),
        lambda path: data.load(data.Npz(source=path)),
        weights.read_state_dict,
        lambda path: folder.read_summary(path.parent),
    ],
)
def test_what_never_ends_is_not_read(tmp_path, make, read):
    path = tmp_path / "summary.json"
    make(path)
    with pytest.raises(UserError, match="not a regular file"):
        read(path)


def test_what_no_machine_can_hold_or_count_is_refused_before_it_begins(tmp_path):
    for fields, message in (
        (
            {"model": Autoencoder(hidden=(10**6, 10**6))},
            "state take 44,706.6 GiB, .* ma",
        ),
        ({"batch_size": 2**31 - 1}, "a batch 512.0 GiB, and there are"),
        ({"num_epochs": 2**31 - 1}, "2,147,483,647 epochs of 3 steps are more than"),
    ):
        with pytest.raises(UserError, match=message):
            train_run(small(tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


# --- Resuming -------------------------------------------------------------------------

FREE = {
    *("run_dir", "data.dir", "data.source", "checkpoint.every_steps"),
    *("checkpoint.keep", "figures.epochs", "figures.draw", "mesh.data"),
    "data.skip_broken",  # the fingerprint tells whether it mattered
    *("distributed", "coordinator", "num_processes", "process_id"),
}
"""What the contract lets a resumed run change."""


def test_what_is_free_may_change_and_any_other_field_is_refused_by_name(run):
    for path, value in fields_of(run).items():
        if path == "distributed":  # only without the others of its kind
            asked = dataclasses.replace(run, distributed=False, num_processes=None)
        else:
            asked = changed(run, path, value)
        assert config.diff(run, asked)
        if path in FREE or path == "train.num_epochs":
            config.check_same_run(run, asked)
            continue
        ours, theirs = (config.flatten(config.to_json(c))[path] for c in (run, asked))
        with pytest.raises(UserError) as caught:
            config.check_same_run(run, asked)
        message = f"{path}: the run has {ours}, you asked for {theirs}. Choose another"
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "schedule", "allowed"),
    [(4, "constant", True), (2, "constant", False), (4, "cosine", False)],
)
def test_epochs_may_be_raised_under_a_constant_rate_alone(asked, schedule, allowed):
    run, more = (
        Config(train=TrainConfig(num_epochs=num_epochs, schedule=schedule))
        for num_epochs in (3, asked)
    )
    assert bool(config.differences_that_matter(run, more)) != allowed


def test_every_difference_is_listed_and_of_another_class_the_name():
    run = Config(train=TrainConfig(seed=4))
    asked = Config(objective=Denoising(), train=TrainConfig(seed=5, batch_size=32))
    with pytest.raises(UserError) as caught:
        config.check_same_run(run, asked)
    for message in (
        "runs/run holds another run: ",
        "train.seed: the run has 4, you asked for 5",
        "train.batch_size: the run has 64, you asked for 32",
        "objective.name: the run has reconstruction, you asked for denoising",
    ):
        assert message in str(caught.value)
    assert "objective.sigma" not in str(caught.value)  # follows from the name
