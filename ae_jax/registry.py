"""A name chooses a class: of data sets, models and objectives.

A class is known by its name in a registry, or as ``module:Class``. Its fields are its
options, so that it needs no other description.
"""

import dataclasses
import hashlib
import importlib
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ae_jax.errors import UserError, suggest

Registry = Mapping[str, type[Any]]

GENERATED = {"__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__"}
"""What ``dataclass`` writes, from fields that are compared by themselves."""


@dataclasses.dataclass(frozen=True)
class Unknown:
    """What a run's config names and this process does not know.

    Attributes:
        section: ``data`` or ``objective``.
        name: the class's.
        values: its options, as config.json has them.
    """

    section: str
    name: str
    values: dict[str, Any]

    def refuse(self, *args: Any) -> NoReturn:
        """Say that it is missing.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.section}.name: {self.name} is not known here; define and register "
            "it first, or name it module:Class"
        )

    load = make = __call__ = loss_name = property(refuse)


def find_class(section: str, registry: Registry, name: str) -> type[Any]:
    """The class of a name: a registry's, or ``module:Class``, which is imported.

    Args:
        section: the option group, for errors.
        registry: name to class.
        name: one of the registry, or ``module:Class``.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    if name in registry:
        return registry[name]
    module, colon, cls_name = name.partition(":")
    if not colon:
        raise UserError(
            f"{section}.name: there is no {name}{suggest(name, registry)}; one of your "
            "own is module:Class"
        )
    try:
        cls = getattr(importlib.import_module(module), cls_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{section}.name: cannot import {name}: {error}; define it there first"
        ) from error
    if not dataclasses.is_dataclass(cls) or not isinstance(cls, type):
        raise UserError(f"{section}.name: {name} is not a dataclass; make it one")
    return cls


def name_of(registry: Registry, value: Any) -> str:
    """The name that :func:`find_class` finds a value's class by."""
    if isinstance(value, Unknown):
        return value.name
    cls = type(value)
    names = (name for name, known in registry.items() if known is cls)
    return next(names, f"{cls.__module__}:{cls.__qualname__}")


def digest_code(value: Any) -> str | None:
    """A sha256 of what a class outside ae_jax does; None for one of ours.

    It covers the code, constants and defaults of its methods, and the functions,
    classes and plain values of its own module that they name: a class that is defined
    again in a notebook has the same digest just if it does the same.
    """
    cls = type(value)
    if cls.__module__.partition(".")[0] == "ae_jax":
        return None
    parts = sorted(set(_parts_of(cls.__qualname__, cls, cls.__module__, set())))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _parts_of(name: str, thing: Any, module: str, seen: set[int]) -> Iterator[str]:
    """What decides on the doings of a class, function or plain value, as texts."""
    thing = getattr(thing, "fget", getattr(thing, "__func__", thing))
    if not callable(thing):
        yield f"{name} = {_text_of(thing)}"
        return
    thing = inspect.unwrap(thing)  # of jax.jit, say
    if id(thing) in seen or getattr(thing, "__module__", None) != module:
        return
    seen.add(id(thing))
    inner: dict[str, Any] = {}
    if isinstance(thing, type):
        inner = {base.__qualname__: base for base in thing.__bases__}
        inner |= {k: v for k, v in vars(thing).items() if not _is_generated(k, v)}
    elif inspect.isfunction(thing):
        inner = {"defaults": (thing.__defaults__, thing.__kwdefaults__)}
        for code in _nested(thing.__code__):
            constants = [c for c in code.co_consts if not isinstance(c, types.CodeType)]
            yield f"{name} {code.co_code.hex()} {_text_of(constants)} {code.co_names}"
            named = set(code.co_names) & set(thing.__globals__)
            inner |= {used: thing.__globals__[used] for used in named}
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        inner |= {used: cell.cell_contents for used, cell in cells}
    for key, value in inner.items():
        yield from _parts_of(f"{name}.{key}", value, module, seen)


def _is_generated(name: str, member: Any) -> bool:
    return name in GENERATED or (name.startswith("__") and not callable(member))


def _text_of(value: Any) -> str:
    """A plain value as a text that is the same in every process; else its type."""
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):  # an array, or a number
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return f"{value.dtype} {value.shape} {digest}"
    if isinstance(value, dict):
        return _text_of(list(value.items()))
    if isinstance(value, set | frozenset):
        return str(sorted(map(_text_of, value)))
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} {[_text_of(item) for item in value]}"
    plain = value is None or isinstance(value, str | bytes | int | float | complex)
    return repr(value) if plain else type(value).__qualname__


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)
