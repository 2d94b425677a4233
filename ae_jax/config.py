"""What one run is: its options, as frozen dataclasses, and their JSON.

Every field is an option of the command line (``train.num_epochs`` is
``--train.num-epochs``), a key of ``config.json``, and documented by the string under
it. ``data``, ``model`` and ``objective`` are instances of classes that a name chooses,
see :mod:`registry`. Whether a field may differ on resume stands in its metadata.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import Field, FiniteFloat

from ae_jax import registry
from ae_jax.data import DATASETS, Mnist
from ae_jax.errors import UserError, suggest
from ae_jax.files import read_json
from ae_jax.models import MODELS
from ae_jax.models.dense import Autoencoder
from ae_jax.models.layers import Precision
from ae_jax.objectives import OBJECTIVES, Reconstruction
from ae_jax.options import Count, CountOrZero, options, validate

C = TypeVar("C")

REGISTRIES: dict[str, registry.Registry] = {
    "data": DATASETS,
    "model": MODELS,
    "objective": OBJECTIVES,
}
"""The sections of a config whose class a name chooses."""

METHODS = {"data": "load", "model": "make", "objective": "__call__"}
"""What makes a class one of them."""

Positive = Annotated[FiniteFloat, Field(gt=0)]
NonNegative = Annotated[FiniteFloat, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _defines(cls: type, method: str) -> bool:
    return any(method in vars(base) for base in cls.__mro__)


def free(default: Any) -> Any:
    """A field that may differ when a run is resumed, and its default."""
    return dataclasses.field(default=default, metadata={"resume": "free"})


def section(make: Callable[[], Any], resume: str = "same") -> Any:
    """A field that is a group of options, and what makes its default."""
    return dataclasses.field(default_factory=make, metadata={"resume": resume})


@options
class TrainConfig:
    """How it is trained."""

    num_epochs: Count = dataclasses.field(
        default=10, metadata={"resume": "raise if constant"}
    )
    """Passes over the training split; may be raised later under a constant schedule."""
    batch_size: Count = 64
    """Images per update; the last batch of an epoch is short, and kept."""
    learning_rate: Positive = 1e-3
    """Adam's step size, at its highest."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate: constant, or a cosine down to 0 at the end."""
    warmup_steps: CountOrZero = 0
    """Updates over which the learning rate first rises from 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (AdamW); 0 is plain Adam."""
    clip_norm: Positive | None = None
    """Gradients with a larger global norm are scaled down to this one."""
    patience: Count | None = None
    """Stop after this many epochs without a better validation loss."""
    seed: Seed = 0
    """Seed of every draw: initial weights, order of the images, noise."""
    init_from: Path | None = None
    """Start from other parameters: a run folder, .safetensors or .pt (fine-tuning)."""
    shift: CountOrZero = 0
    """Pixels by which each image is shifted at random, each way, at most; what comes in
    repeats the edge. The images of scores and of validation stay where they are."""
    precision: Precision = "float32"
    """Number format. bfloat16 and tf32 are the layers' arithmetic alone; float32 is
    full float32 on every device."""


@options
class CheckpointConfig:
    """What is saved while it trains."""

    every_steps: CountOrZero = 0
    """Updates between saves within an epoch; 0: save at the end of each epoch only."""
    keep: Count = 3
    """Newest checkpoints to keep, beside the best one and those that figures show."""


@options
class FiguresConfig:
    """What is drawn."""

    epochs: tuple[Count, ...] = (1, 5, 10)
    """Epochs whose reconstructions are shown; the last one always is."""
    draw: bool = True
    """Draw the figures at the end; scripts/plot.py draws them at any time."""


@options
class MeshConfig:
    """On how many devices."""

    data: Count | None = None
    """Devices that share each batch; by default one, or, distributed, all there are."""


@options
class Config:
    """One run, whole. Experiments subclass it to add or narrow fields."""

    run_dir: Path = free(Path("runs/run"))
    """Run folder: made, resumed, or, if finished, left as it is."""
    distributed: bool = free(False)
    """This process is one of several that train one run together."""
    coordinator: str | None = free(None)
    """HOST:PORT of process 0; on SLURM, Open MPI, Kubernetes and TPU it is found."""
    num_processes: Count | None = free(None)
    """How many processes there are; found as the coordinator is."""
    process_id: CountOrZero | None = free(None)
    """Which of them this is, from 0; found as the coordinator is."""
    mesh: MeshConfig = section(MeshConfig, resume="free")
    data: Any = section(Mnist)
    """--data.name chooses the data set; these are the options of the chosen one."""
    model: Any = section(Autoencoder)
    """--model.name chooses the network; these are the options of the chosen one."""
    objective: Any = section(Reconstruction)
    """--objective.name chooses what is minimised; these are its options."""
    train: TrainConfig = section(TrainConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig, resume="free")
    figures: FiguresConfig = section(FiguresConfig, resume="free")

    def __post_init__(self) -> None:
        for name, method in METHODS.items():
            value = getattr(self, name)
            is_instance = dataclasses.is_dataclass(value) and not isinstance(
                value, type
            )
            # Not hasattr: every class has __call__, which makes its instances.
            if not (is_instance and _defines(type(value), method)):
                raise ValueError(
                    f"{name}: must be an instance of a dataclass with {method}, such "
                    f"as {next(iter(REGISTRIES[name].values())).__name__}(), got "
                    f"{value!r}"
                )
        if self.train.patience and not getattr(self.data, "num_validation", 0):
            raise ValueError(
                "train.patience: needs a held-out part; set data.num_validation too"
            )
        self._check_processes()
        devices, size = self.mesh.data or 1, self.train.batch_size
        if size % devices:
            raise ValueError(
                f"mesh.data: {devices} devices cannot share a batch of {size} evenly; "
                "change train.batch_size or mesh.data"
            )

    def _check_processes(self) -> None:
        """Processes are numbered from 0, and know of each other in one way."""
        for name in ("coordinator", "num_processes", "process_id"):
            if getattr(self, name) is not None and not self.distributed:
                raise ValueError(f"{name}: only with --distributed")
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isdigit() and 0 < int(port) < 2**16):
                raise ValueError(
                    f"coordinator: must be HOST:PORT, got {self.coordinator}"
                )
        if (self.process_id or 0) >= (self.num_processes or math.inf):
            raise ValueError(
                f"process_id: must be below num_processes, got {self.process_id}"
            )


# --- JSON ---------------------------------------------------------------------------


def to_json(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config, or a part of it, as plain JSON values: paths are strings, tuples lists.

    ``prefix`` is the dotted path of the part.
    """
    if isinstance(config, registry.Unknown):
        return {"name": config.name, **config.values}
    plain: dict[str, Any] = {}
    if prefix[:-1] in REGISTRIES:
        plain["name"] = registry.name_of(REGISTRIES[prefix[:-1]], config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            plain[field.name] = to_json(value, f"{prefix}{field.name}.")
        else:
            plain[field.name] = json.loads(json.dumps(value, default=str))
    return plain


def from_json(
    cls: type[C],
    plain: Any,
    where: str = "config",
    unknown: bool = False,
    like: Any = None,
) -> C:
    """A config from its JSON; an absent field takes its default.

    Args:
        cls: the dataclass to make.
        plain: what ``json.load`` gave.
        where: what to call it in an error, most often the file's name.
        unknown: whether the classes of ``data`` and ``objective`` may be unknown here;
            they become :class:`registry.Unknown`.
        like: a config whose own classes are taken where the names are the same, so that
            they need not be found by it.

    Raises:
        UserError: an unknown key or name, a value of the wrong type or out of range;
            the message names the field and the place.
    """
    try:
        find_class = functools.partial(_find_class, unknown, like)
        return _decode(cls, plain, "", find_class)
    except (ValueError, UserError) as error:
        raise UserError(f"{where}: {error}; fix the file") from error


FindClass = Callable[[str, str], type[Any] | None]
"""The class of a section and a name; None: it is unknown, and may be."""


def _find_class(unknown: bool, like: Any, section: str, name: str) -> type[Any] | None:
    known = REGISTRIES[section]
    ours = getattr(like, section, None)
    own = ours is not None and not isinstance(ours, registry.Unknown)
    if own and registry.name_of(known, ours) == name:
        return type(ours)
    try:
        return registry.find_class(section, known, name)
    except UserError:
        if unknown and section != "model":
            return None
        raise


def _decode(cls: type[C], plain: Any, prefix: str, find_class: FindClass) -> C:
    if not isinstance(plain, dict):
        raise ValueError(f"{prefix[:-1] or 'config'}: must be an object, got {plain!r}")
    hints = get_type_hints(cls, include_extras=True)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in plain.items():
        path = prefix + key
        if key not in known:
            raise ValueError(f"{path}: no such field{suggest(key, known)}")
        if path in REGISTRIES:
            values[key] = _decode_named(path, value, find_class)
        elif dataclasses.is_dataclass(known[key]):
            values[key] = _decode(known[key], value, f"{path}.", find_class)
        else:
            values[key] = validate(known[key], value, path)
    return cls(**values)


def _decode_named(path: str, plain: Any, find_class: FindClass) -> Any:
    if not isinstance(plain, dict) or not isinstance(plain.get("name"), str):
        raise ValueError(f'{path}: must be an object with a "name", got {plain!r}')
    name, values = plain["name"], {k: v for k, v in plain.items() if k != "name"}
    cls = find_class(path, name)
    if cls is None:
        return registry.Unknown(path, name, values)
    return _decode(cls, values, f"{path}.", find_class)


def load(path: Path, cls: type[C]) -> C:
    """Read a config from a file: a bare config object, or a run's config.json.

    Raises:
        UserError: the file cannot be read, is no JSON, or holds no such config.
    """
    plain = read_json(path, "give a config by --config")
    if isinstance(plain, dict) and "format" in plain and "config" in plain:
        plain = plain["config"]
    return from_json(cls, plain, str(path))


# --- Comparing ----------------------------------------------------------------------


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's JSON as one level.

    Example:
        >>> flatten({"run_dir": "runs/a", "train": {"seed": 0}})
        {'run_dir': 'runs/a', 'train.seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def diff(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, each with both values.

    Of a section whose class differs the name alone is given.
    """
    a, b = flatten(to_json(ours)), flatten(to_json(theirs))
    keys = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
    renamed = {key.removesuffix("name") for key in keys if key.endswith(".name")}
    return {
        key: (a.get(key), b.get(key))
        for key in keys
        if key.endswith(".name") or key.partition(".")[0] + "." not in renamed
    }


def resume_rules(config: Any, prefix: str = "") -> dict[str, str]:
    """What each field, or group of fields, says about resuming, by its path."""
    rules: dict[str, str] = {}
    for field in dataclasses.fields(config):
        rule, value = field.metadata.get("resume", "same"), getattr(config, field.name)
        rules[prefix + field.name] = rule
        if dataclasses.is_dataclass(value):
            inner = resume_rules(value, f"{prefix}{field.name}.")
            rules |= {k: rule if rule == "free" else r for k, r in inner.items()}
    return rules


def differences_that_matter(run: Any, asked: Any) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ and may not, if one resumes the other.

    Those that say so themselves may: ``free`` ones, those of which more may be asked
    for (``raise``), and the number of epochs while the schedule does not depend on it.
    """
    rules = {**resume_rules(run), **resume_rules(asked)}
    constant = asked.train.schedule == run.train.schedule == "constant"
    growing = {"raise", "raise if constant"} if constant else {"raise"}

    def may_differ(key: str, a: Any, b: Any) -> bool:
        rule = rules.get(key)
        return rule == "free" or (rule in growing and b > a)

    return {k: v for k, v in diff(run, asked).items() if not may_differ(k, *v)}


def check_same_run(run: Any, asked: Any) -> None:
    """Refuse to resume a run under a config that would have made another one.

    Raises:
        UserError: one ``field: the run has A, you asked for B`` for each difference.
    """
    fields = [
        f"{key}: the run has {a}, you asked for {b}"
        for key, (a, b) in differences_that_matter(run, asked).items()
    ]
    if fields:
        raise UserError(
            f"{asked.run_dir} holds another run: {'; '.join(fields)}. "
            "Choose another --run-dir, or delete the run"
        )
