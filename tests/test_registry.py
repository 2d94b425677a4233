"""Names and classes; what a class of one's own does, as a digest."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import types

import pytest

from ae_jax import config, registry
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder

ALL = [
    (section, name) for section, known in config.REGISTRIES.items() for name in known
]


@pytest.mark.parametrize(("section", "name"), ALL)
def test_a_name_finds_its_class_and_the_class_its_name(section, name):
    known = config.REGISTRIES[section]
    cls = registry.find_class(section, known, name)
    assert registry.name_of(known, cls()) == name
    assert isinstance(cls(), config.REGISTRIES[section][name])
    assert registry.digest_code(cls()) is None  # its version is ae_jax's
    # It needs no registry to be found.
    path = registry.name_of({}, cls())
    assert registry.find_class(section, {}, path) is cls


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("autoencodr", r"^model\.name: there is no autoencodr \(did you mean autoenc"),
        (
            "resnet",
            r"there is no resnet; known are: autoencoder, conv; one of your own",
        ),
        (
            "no.such:Thing",
            r"cannot import no\.such:Thing: No module named 'no'; define",
        ),
        ("ae_jax.models:Thing", "cannot import .* has no attribute 'Thing'"),
        (":Thing", "cannot import :Thing: "),
        ("ae_jax.models:MODELS", "is not a dataclass; make it one"),
        ("ae_jax.errors:UserError", "is not a dataclass; make it one"),
    ],
)
def test_a_name_that_is_none_is_refused_in_one_line(name, told):
    with pytest.raises(UserError, match=told) as caught:
        registry.find_class("model", config.REGISTRIES["model"], name)
    assert "\n" not in str(caught.value)


def test_what_is_not_known_here_says_so_when_it_is_used():
    unknown = registry.Unknown("objective", "mine:Mine", {"weight": 2})
    assert registry.name_of({}, unknown) == "mine:Mine"
    for name in ("loss_name", "load", "make"):
        with pytest.raises(
            UserError, match=r"^objective\.name: mine:Mine is not known"
        ):
            getattr(unknown, name)
    with pytest.raises(UserError, match="define and register it first"):
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
        return x if x in {"ape", "bee", "cat", "dog"} else by

    def make(self, shape, precision):
        return Net()

    def __call__(self, model, params, x, key):
        def inner(y):
            return y + 10
        total = SCALE * TABLE[0] + LIMITS["low"] + WEIGHTS.sum()
        return shift(jitted)(inner(self.inherited(x))) + total, {}
"""


def define(source, name="notebook"):
    """An instance of the class that a notebook's cells define."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(source, f"<{name}>", "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module.Mine()


def test_the_same_definition_again_has_the_same_digest():
    digest = registry.digest_code(define(NOTEBOOK))
    assert digest == registry.digest_code(define(NOTEBOOK))
    assert len(digest) == 64
    # Neither comments nor where it stands matter, nor what it does not use.
    moved = f"# A remark.\nUNUSED = 3\n{NOTEBOOK}"
    assert registry.digest_code(define(moved)) == digest


CHANGES = {
    "a constant of a method": ("self.sigma * 8", "self.sigma * 8.5"),
    "what a method calls": ("self.inherited(x)", "self.doubled"),
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


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_its_doings_changes_the_digest(change):
    before, after = CHANGES[change]
    assert NOTEBOOK.count(before) == 1
    changed = define(NOTEBOOK.replace(before, after))
    assert registry.digest_code(changed) != registry.digest_code(define(NOTEBOOK))


def test_fields_are_no_part_of_the_digest_for_they_are_compared_by_themselves():
    other = define(NOTEBOOK.replace("sigma: float = 0.25", "sigma: float = 0.5"))
    assert dataclasses.astuple(other) == (0.5,)


def test_another_process_finds_the_same_digest(tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    code = textwrap.dedent(
        """
        from ae_jax import registry
        print(registry.digest_code(registry.find_class("o", {}, "notebook:Mine")()))
        """
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(set(digests)) == 1


def test_a_class_of_ours_passed_by_subclass_is_ones_own():
    source = "from ae_jax.models.dense import Autoencoder\nclass Mine(Autoencoder):\n"
    one, other = (
        registry.digest_code(define(f"{source}    extra = {i}\n")) for i in (1, 2)
    )
    assert one != other
    assert isinstance(define(f"{source}    extra = 1\n"), Autoencoder)
