"""What one run is: frozen dataclasses, and their JSON.

Every field is an option of the command line (``train.num_epochs`` is
``--train.num-epochs``), a key of ``config.json``, and documented by the string under
it. Ranges are checked when a config is made, so that a wrong value is refused by
whoever states it first: the command line, a file, or a caller.
"""

import dataclasses
import json
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

C = TypeVar("C")


class UserError(Exception):
    """Something that the user can mend; its message is the one line that they see."""


def _check(ok: bool, name: str, wanted: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name}: must be {wanted}, got {value}")


def _check_positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = math.isfinite(value) and value > 0
        _check(ok, f"{prefix}.{name}", "finite and above 0", value)


def _check_not_negative(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = math.isfinite(value) and value >= 0
        _check(ok, f"{prefix}.{name}", "finite and at least 0", value)


OWN_FIELDS = {
    ("folder",): ("channels", "image_size", "max_broken"),
    ("folder", "npz"): ("test_share", "split_seed"),
}
"""Fields of :class:`DataConfig` that some data sets alone have."""


@dataclass(frozen=True)
class DataConfig:
    """Which images."""

    name: str = "mnist"
    """Data set: mnist, fashion_mnist, kmnist, digits (8×8, nothing to download), or
    your own images: folder, npz."""
    dir: Path = Path("data")
    """Folder in which data sets are prepared, once for all runs."""
    source: Path | None = None
    """Your images: a folder of PNG, JPEG or WebP, or an .npz file. Of mnist and its
    kin: folder with the four IDX files (raw or .gz), to prepare without network."""
    num_validation: int = 0
    """Images held out of training: the last ones of the training split."""
    channels: Literal[1, 3] = 1
    """Of a folder: 1 makes all its pictures grey, 3 makes them colour."""
    image_size: int | None = None
    """Of a folder: each picture is shrunk or enlarged until its shorter side has so
    many pixels, and its middle square is taken. None: all are of one size already."""
    test_share: float = 0.1
    """Share of your images that are the test split, where the file does not say."""
    split_seed: int = 0
    """Seed of the order of your images, which decides on the test split."""
    max_broken: float = 0.001
    """Of a folder: largest share of its files that may be unreadable, and left out."""
    streaming: bool = False
    """Read images from disk as they are needed, rather than hold all in memory."""

    def __post_init__(self) -> None:
        _check_not_negative("data", self, "num_validation")
        _check(0 < self.test_share < 1, "data.test_share", "in (0, 1)", self.test_share)
        _check(
            0 <= self.split_seed < 2**32,
            "data.split_seed",
            "in [0, 2^32)",
            self.split_seed,
        )
        _check(
            0 <= self.max_broken <= 1, "data.max_broken", "in [0, 1]", self.max_broken
        )
        if self.image_size is not None:
            _check_positive("data", self, "image_size")
        for names, fields in OWN_FIELDS.items():
            for name in fields if self.name not in names else ():
                if getattr(self, name) != getattr(DataConfig, name):
                    wanted = " or ".join(names)
                    raise ValueError(
                        f"data.{name}: only for data.name {wanted}, not {self.name}"
                    )


@dataclass(frozen=True)
class ModelConfig:
    """Which network; the images' shape follows the data set."""

    name: str = "autoencoder"
    """Model: autoencoder (dense) or conv, or another in ae_jax.models.MODELS."""
    hidden: tuple[int, ...] = (128, 64, 12)
    """Widths of the encoder's hidden layers, of conv the channels of its stages, each
    of which halves the image; the decoder mirrors them."""
    code_width: int = 3
    """Units of the code."""
    code_activation: Literal["relu", "leaky_relu", "none"] = "relu"
    """Activation of the code. The tutorial's is relu, whose units can die."""
    init: Literal["torch", "flax", "he"] = "torch"
    """Initialiser: PyTorch's (all uniform in ±1/√fan_in), Flax's (LeCun), or He's."""

    def __post_init__(self) -> None:
        widths = " ".join(map(str, self.hidden))
        ok = all(width > 0 for width in self.hidden)
        _check(ok, "model.hidden", "widths above 0", widths)
        _check_positive("model", self, "code_width")


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    num_epochs: int = 10
    """Passes over the training split; may be raised later under a constant schedule."""
    batch_size: int = 64
    """Images per update; the last batch of an epoch is short, and kept."""
    loss: str = "mse"
    """Loss: a name in ae_jax.losses.LOSSES (mse, bce)."""
    learning_rate: float = 1e-3
    """Adam's step size, at its highest."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate: constant, or a cosine down to 0 at the end."""
    warmup_steps: int = 0
    """Updates over which the learning rate first rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); 0 is plain Adam."""
    clip_norm: float | None = None
    """Gradients with a larger global norm are scaled down to this one."""
    patience: int | None = None
    """Stop after this many epochs without a better validation loss."""
    seed: int = 0
    """Seed of every draw: initial weights, order of the images, noise."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """Number format; bfloat16 is the layers' arithmetic alone, the rest is float32."""

    def __post_init__(self) -> None:
        _check_positive("train", self, "num_epochs", "batch_size", "learning_rate")
        _check_not_negative("train", self, "warmup_steps", "weight_decay")
        _check(0 <= self.seed < 2**32, "train.seed", "in [0, 2^32)", self.seed)
        for name in ("clip_norm", "patience"):
            if getattr(self, name) is not None:
                _check_positive("train", self, name)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved while it trains."""

    every_steps: int = 0
    """Save also every so many updates; 0: at the end of each epoch only."""
    keep: int = 3
    """Newest checkpoints to keep, beside the best one and those that figures show."""
    fallback: bool = False
    """Go back to the newest sound checkpoint, and remove the damaged ones after it."""

    def __post_init__(self) -> None:
        _check_not_negative("checkpoint", self, "every_steps")
        _check_positive("checkpoint", self, "keep")


@dataclass(frozen=True)
class FiguresConfig:
    """What is drawn."""

    epochs: tuple[int, ...] = (1, 5, 10)
    """Epochs whose reconstructions are shown; the last one always is."""

    def __post_init__(self) -> None:
        shown = " ".join(map(str, self.epochs))
        ok = all(epoch > 0 for epoch in self.epochs)
        _check(ok, "figures.epochs", "epochs above 0", shown)


@dataclass(frozen=True)
class Config:
    """One run, whole. Experiments subclass it to add or narrow fields."""

    run_dir: Path = Path("runs/run")
    """Run folder: made, resumed, or, if finished, left as it is."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, for a faster next start."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    figures: FiguresConfig = field(default_factory=FiguresConfig)

    def __post_init__(self) -> None:
        if self.train.patience and not self.data.num_validation:
            raise ValueError(
                "train.patience: needs a held-out part; set data.num_validation too"
            )


@dataclass(frozen=True)
class SeedsConfig:
    """How many seeds are trained together."""

    group_size: int = 8
    """Seeds in one program, side by side, as one state; another size, other bits."""

    def __post_init__(self) -> None:
        _check_positive("seeds", self, "group_size")


@dataclass(frozen=True)
class EnsembleConfig(Config):
    """One run under many seeds, of which ``train.seed`` is the first."""

    num_seeds: int = 64
    """How many seeds; may be raised later, from a multiple of the group size."""
    seeds: SeedsConfig = field(default_factory=SeedsConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_seeds < 1 or self.train.seed + self.num_seeds > 2**32:
            raise ValueError(
                "num_seeds: must be above 0, and the last seed below 2^32, got "
                f"{self.num_seeds} from {self.train.seed}"
            )
        if self.train.patience:
            raise ValueError("train.patience: stops single runs; leave it out here")
        if self.data.streaming:
            raise ValueError("data.streaming: many seeds have all images in memory")


@runtime_checkable
class RunConfig(Protocol):
    """What the config of every experiment is: a dataclass with a run folder."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        ...


def to_json(config: RunConfig) -> dict[str, Any]:
    """A config as plain JSON values: paths become strings, tuples lists."""
    plain: dict[str, Any] = json.loads(
        json.dumps(dataclasses.asdict(config), default=str)
    )
    return plain


def from_json(kind: type[C], plain: object, where: str = "config") -> C:
    """A config from its JSON; an absent field takes its default.

    Args:
        kind: the dataclass to make.
        plain: what ``json.load`` gave.
        where: what to call it in an error, most often the file's name.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range; the
            message names the field and the place.
    """
    try:
        made: C = _decode(kind, plain, "")
    except ValueError as error:
        raise UserError(f"{where}: {error}; mend the file") from error
    return made


def _decode(kind: Any, plain: Any, name: str) -> Any:
    """Rebuild a value of type ``kind``; ``name`` is the dotted path for errors."""
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, plain, name)
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        # True equals 1, and is none of the choices.
        ok = any(type(plain) is type(one) and plain == one for one in get_args(kind))
        _check(ok, name, f"one of {choices}", repr(plain))
        return plain
    if get_origin(kind) in (Union, types.UnionType):  # the only unions are X | None
        inner = next(arg for arg in get_args(kind) if arg is not type(None))
        return None if plain is None else _decode(inner, plain, name)
    if get_origin(kind) is tuple:
        _check(isinstance(plain, list), name, "a list", repr(plain))
        return tuple(_decode(get_args(kind)[0], item, name) for item in plain)
    if kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    wanted = str if kind is Path else kind
    _check(type(plain) is wanted, name, f"of type {wanted.__name__}", repr(plain))
    return kind(plain)


def _decode_dataclass(kind: Any, plain: Any, name: str) -> Any:
    _check(isinstance(plain, dict), name or "config", "an object {…}", repr(plain))
    prefix = f"{name}." if name else ""
    hints = get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key in plain:
        if key not in known:
            raise ValueError(f"{prefix}{key}: no such field{suggest(key, known)}")
    return kind(**{key: _decode(hints[key], plain[key], prefix + key) for key in plain})


def suggest(word: str, known: Iterator[str] | set[str] | Mapping[str, Any]) -> str:
    """The tail of an error about an unknown name: the nearest one, and them all."""
    import difflib

    names = sorted(known)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"{hint}; known are: {', '.join(names)}"


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


def diff(ours: RunConfig, theirs: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ, each with both values."""
    a, b = flatten(to_json(ours)), flatten(to_json(theirs))
    return {
        key: (a.get(key), b.get(key))
        for key in [*a, *(key for key in b if key not in a)]
        if a.get(key) != b.get(key)
    }


FREE = ("run_dir", "compilation_cache", "data.dir", "data.source", "data.max_broken")
"""Fields that do not change a single bit of what a run finds."""


def clashes(
    run: RunConfig, asked: RunConfig, free: tuple[str, ...] = FREE
) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs differ and may not, each with both values.

    Args:
        run: a config.
        asked: another one.
        free: beginnings of the names of the fields that may differ.
    """
    return {
        key: values
        for key, values in diff(run, asked).items()
        if not key.startswith(free)
    }


def refuse_clashes(run: RunConfig, asked: RunConfig, free: tuple[str, ...]) -> None:
    """Refuse to go on with a run under a config that would have made another run.

    Args:
        run: the config that the run was started with.
        asked: the config asked for now.
        free: beginnings of the names of the fields that may differ.

    Raises:
        UserError: one ``field: the run has A, you asked for B`` for each difference.
    """
    told = [
        f"{key}: the run has {a}, you asked for {b}"
        for key, (a, b) in clashes(run, asked, free).items()
    ]
    if told:
        raise UserError(
            f"{asked.run_dir} holds another run: {'; '.join(told)}. "
            "Choose another --run-dir, or delete the run"
        )


def free_to_resume(run: Config, asked: Config) -> tuple[str, ...]:
    """Beginnings of the names of the fields that may differ when a run goes on.

    Those are what is kept and drawn, and, if it is raised, the number of epochs.
    """
    free: tuple[str, ...] = (*FREE, "checkpoint.", "figures.")
    raised = asked.train.num_epochs >= run.train.num_epochs
    if raised and run.train.schedule == "constant":
        free += ("train.num_epochs",)
    return free


def check_resumable(run: Config, asked: Config) -> None:
    """Refuse to resume a run but with more epochs, or other things kept and drawn.

    Raises:
        UserError: see :func:`refuse_clashes`.
    """
    refuse_clashes(run, asked, free_to_resume(run, asked))


def load(path: Path, kind: type[C]) -> C:
    """Read a config from a file: a bare config object, or a run's config.json.

    Raises:
        UserError: the file cannot be read, is no JSON, or holds no such config.
    """
    try:
        plain = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--config: {path} is not JSON: {error}") from error
    if isinstance(plain, dict) and "format" in plain and "config" in plain:
        plain = plain["config"]
    return from_json(kind, plain, str(path))
