"""Options as frozen dataclasses: checked when they are made, whoever makes them.

A class under :func:`options` is an option group of the command line, an object of
``config.json`` and a constructor for notebooks at once.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass

T = TypeVar("T")

Count = Annotated[int, pydantic.Field(gt=0, lt=2**31)]
"""One or more, and no more than JAX counts to."""
CountOrZero = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
Activation = Literal["relu", "leaky_relu", "gelu", "tanh", "none"]
"""See ``models.layers.ACTIVATIONS``; here, since that module loads JAX."""


@dataclass_transform(frozen_default=True, field_specifiers=(pydantic.Field,))
def options(cls: type[T]) -> type[T]:
    """Make a frozen dataclass whose fields are checked by pydantic.

    Raises:
        ValueError: from the constructor, in one line that names each wrong field.
    """
    made: Any = dataclass(frozen=True, config={"extra": "forbid"})(cls)
    init = made.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise ValueError(explain(error)) from None
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                _check_path(field.name, str(value))

    made.__init__ = __init__
    checked: type[T] = made
    return checked


def validate(kind: Any, plain: Any, path: str = "") -> Any:
    """A JSON value as what a type asks for, with no conversion but JSON's own.

    Args:
        kind: a class of pydantic's, or a type hint.
        plain: what ``json.load`` gave.
        path: dotted path of the value, for errors.

    Raises:
        ValueError: in one line that names each wrong field.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(plain), strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(explain(error, path)) from None


def explain(error: pydantic.ValidationError, prefix: str = "") -> str:
    """What is wrong, in one line: ``train.batch_size: input should be …, got 0``.

    Args:
        error: pydantic's, of any number of fields.
        prefix: dotted path of the object that was checked.
    """

    def one(part: Any) -> str:
        message = part["msg"].removeprefix("Value error, ")
        path = ".".join(map(str, (*filter(None, [prefix]), *part["loc"])))
        if part["type"] != "value_error":  # a check of ours says what it got
            got = "" if part["type"] == "missing" else f", got {_short(part['input'])}"
            message = f"{message[0].lower()}{message[1:]}{got}"
        return f"{path}: {message}" if path else message

    return "; ".join(map(one, error.errors()))


def _check_path(name: str, path: str) -> None:
    """Refuse what the system, JSON, or a library that we give it to cannot take."""
    if "\0" in path:
        raise ValueError(f"{name}: a path cannot hold NUL")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: {path!r} is not UTF-8; rename it") from None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"
