"""Names and classes; what a class of one's own does, as a digest."""

import os
import sys
import types

import life
import pytest

from ae_jax import config, registry
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder

ALL = [
    (section, name) for section, known in config.REGISTRIES.items() for name in known
]
AN_INSTANCE = Autoencoder()


@pytest.mark.parametrize(("section", "name"), ALL)
def test_a_name_finds_its_class_and_the_class_its_name(section, name):
    known = config.REGISTRIES[section]
    cls = registry.find_class(section, known, name)
    assert cls is known[name]
    assert registry.name_of(known, cls()) == name
    assert registry.digest_code(cls()) is None  # its version is ae_jax's
    # It needs no registry to be found.
    path = registry.name_of({}, cls())
    assert registry.find_class(section, {}, path) is cls


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("autoencodr", r"there is no autoencodr \(did you mean autoencoder"),
        (
            "resnet",
            "there is no resnet; known are: autoencoder, conv, made, residual, "
            "variational; one",
        ),
        ("no.such:Thing", r"cannot import no\.such:Thing: No module named 'no'; defi"),
        ("ae_jax.models:Thing", "cannot import .* has no attribute 'Thing'"),
        (":Thing", "cannot import :Thing: "),
        ("ae_jax.errors:UserError", "is not a dataclass; make it one"),
        (f"{__name__}:AN_INSTANCE", "is not a dataclass; make it one"),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=rf"^model\.name: .*{message}") as caught:
        registry.find_class("model", config.REGISTRIES["model"], name)
    assert "\n" not in str(caught.value)


def test_what_is_not_known_here_says_so_when_it_is_used():
    unknown = registry.Unknown("objective", "mine:Mine", {"weight": 2})
    assert registry.name_of({}, unknown) == "mine:Mine"
    message = r"^objective\.name: mine:Mine is not known here; define and register it"
    for name in ("loss_name", "load", "make"):
        with pytest.raises(UserError, match=message):
            getattr(unknown, name)
    with pytest.raises(UserError, match=message):
        unknown(None, {}, None, None)


# --- Digests --------------------------------------------------------------------------

NOTEBOOK = """
import dataclasses, functools
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SCALE = 2.0
TABLE = [1, 2]
LIMITS = {"low": 0, "high": 1}
WEIGHTS = np.arange(3)

def closed(bias):
    return lambda x: x - bias

shift = closed(11)

def plain(x):
    return x + 1

@jax.jit
def jitted(x, by=3):
    return by * plain(x)

class Base:
    def inherited(self, x):
        return x - 4

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6)(x)

@dataclasses.dataclass(frozen=True)
class Mine(Base):
    sigma: float = 0.25
    loss_name = "mine"
    powers = [5, 7]

    @property
    def doubled(self):
        return self.sigma * 8

    @staticmethod
    def still(x, *, by=9):
        return x if x in {"ape", "bee", "cat", "dog", "elk", "fox", "gnu"} else by

    @classmethod
    def make(cls, shape, precision):
        return Net()

    def __call__(self, model, params, x, key):
        def inner(y):
            return y + 10
        total = SCALE * TABLE[0] + LIMITS["low"] + WEIGHTS.sum()
        return shift(jitted)(inner(self.inherited(x))) + total, {}
"""
CHANGES = {
    "a constant of a method": ("self.sigma * 8", "self.sigma * 8.5"),
    "what a method calls": ("self.inherited(x)", "self.still(x)"),
    "the loss's name": ('"mine"', '"yours"'),
    "a class's list": ("[5, 7]", "[5, 8]"),
    "an inner function": ("y + 10", "y - 10"),
    "a static method": ('"dog"', '"eel"'),
    "a method's default": ("by=9", "by=10"),
    "a helper": ("x + 1", "x + 2"),
    "a jitted helper": ("by * plain", "by + plain"),
    "a helper's default": ("by=3", "by=4"),
    "what a helper closes over": ("closed(11)", "closed(12)"),
    "a base class": ("x - 4", "x - 5"),
    "a class that it makes": ("nn.Dense(6)", "nn.Dense(7)"),
    "a number of the module": ("SCALE = 2.0", "SCALE = 2.5"),
    "a list of the module": ("TABLE = [1, 2]", "TABLE = [1, 3]"),
    "a table of the module": ('"high": 1', '"high": 2'),
    "an array of the module": ("np.arange(3)", "np.arange(3) + 1"),
}


def define(source):
    """An instance of the class that a notebook's cells define."""
    module = types.ModuleType("notebook")
    sys.modules["notebook"] = module
    try:
        exec(compile(source, "<notebook>", "exec"), vars(module))
    finally:
        del sys.modules["notebook"]
    return module.Mine()


def digest(source):
    return registry.digest_code(define(source))


def test_another_process_finds_the_same_digest_of_the_same_doings(tmp_path):
    # Neither comments nor where it stands matter, nor what it does not use.
    moved = f"# A remark.\nUNUSED = 3\n{NOTEBOOK}"
    (tmp_path / "notebook.py").write_text(moved)
    code = (
        "from ae_jax import registry\n"
        "cls = registry.find_class('objective', {}, 'notebook:Mine')\n"
        "print(registry.digest_code(cls()))"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    found = life.run("-c", code, PYTHONHASHSEED="1", PYTHONPATH=path)
    assert found == (0, f"{digest(NOTEBOOK)}\n", "")
    assert digest(moved) == digest(NOTEBOOK)


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_its_doings_changes_the_digest(change):
    before, after = CHANGES[change]
    assert NOTEBOOK.count(before) == 1
    assert digest(NOTEBOOK.replace(before, after)) != digest(NOTEBOOK)


def test_a_subclass_of_one_of_ours_is_ones_own():
    source = "from ae_jax.models.dense import Autoencoder\nclass Mine(Autoencoder):\n"
    one, other = (f"{source}    extra = {i}\n" for i in (1, 2))
    assert digest(one) != digest(other)
    name = registry.name_of(config.REGISTRIES["model"], define(one))
    assert name == "notebook:Mine"
