"""Option classes: frozen, checked in one line, each field explained."""

import ast
import dataclasses
import inspect
import pickle
from typing import Literal

import pytest
from pydantic import PositiveInt

from ae_jax import config
from ae_jax.options import options


@options
class Mine:
    """Of one's own."""

    count: PositiveInt = 3
    widths: tuple[PositiveInt, ...] = (5, 4)
    kind: Literal["a", "b"] = "a"

    def __post_init__(self):
        if self.count == 13:
            raise ValueError("count: brings bad luck, got 13")


def test_options_are_a_frozen_dataclass_with_values_of_their_types():
    made = Mine(7, widths=[2, 1])
    assert made == Mine(count=7, widths=(2, 1), kind="a")
    assert hash(made) == hash(Mine(7, (2, 1)))
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.count = 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count: input should be greater than 0, got 0"),
        ({"widths": (5, -1)}, r"widths\.1: input should be greater than 0, got -1"),
        ({"kind": "c"}, "kind: input should be 'a' or 'b', got 'c'"),
        ({"count": 13}, "count: brings bad luck, got 13"),
        ({"count": -2, "cuont": 3}, "count: .* got -2; cuont: unexpected .* got 3"),
    ],
)
def test_each_wrong_value_is_named_in_one_line_whoever_makes_it(values, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Mine(**values)


SECTIONS = {
    cls
    for cls in vars(config).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls)
}
GROUPS = {cls.__name__ for cls in SECTIONS}  # which explain themselves
CLASSES = SECTIONS.union(*(names.values() for names in config.REGISTRIES.values()))


@pytest.mark.parametrize("cls", sorted(CLASSES, key=str), ids=lambda c: c.__name__)
def test_every_field_is_explained_by_a_string_under_it(cls):
    assert cls.__doc__
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body
    for field, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        kind = ast.unparse(field.annotation)
        if kind not in GROUPS and not kind.startswith("ClassVar"):
            text = getattr(below, "value", None)
            assert isinstance(text, ast.Constant), ast.unparse(field.target)
            assert len(text.value) > 10
