"""The floors of the house: a module imports from those below, and so on down."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# A module imports only from the rows above its own, or from its own package.
FLOORS = """
errors
options files keys train gradients
objectives models metrics stats plots weights registry
baselines collapse devices
data
config
runs
parity tasks
cli
"""
# One module alone imports these; runs.figures and runs.run name the type Figure.
OWNERS = {
    "matplotlib": {"plots", "runs.figures", "runs.run"},
    "torch": {"weights"},
    "orbax": {"runs.checkpoint"},
    "tensorflow_datasets": {"data.mnist"},
    "grain": {"data.feed"},
}
NUMPY_ONLY = """
errors options files metrics stats plots weights baselines collapse registry
data data.mnist data.own data.stored
"""
BASELINE = "experiments/pytorch_baseline.py"  # reads like the tutorial: PyTorch first
JAX = {"jax", "flax", "optax", "orbax"}

MODULES = {
    ".".join(path.relative_to(ROOT / "ae_jax").with_suffix("").parts): path
    for path in sorted((ROOT / "ae_jax").rglob("*.py"))
    if path.parent != ROOT / "ae_jax" or path.stem != "__init__"
}
MODULES = {name.removesuffix(".__init__"): path for name, path in MODULES.items()}
LEVELS = {name: i for i, row in enumerate(FLOORS.split("\n")) for name in row.split()}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def ours(path: Path) -> set[str]:
    """The modules of ours, without ``ae_jax.``, that a file imports."""
    found = set()
    for name in imports(path):
        package, _, name = name.partition(".")
        if package == "ae_jax":
            found.add(name if name in MODULES else name.rpartition(".")[0])
    return found - {""}


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_floors_below(module):
    package = module.partition(".")[0]
    assert package in LEVELS, "give it a floor"
    for other in ours(MODULES[module]):
        floor = other.partition(".")[0]
        assert floor == package or LEVELS[floor] < LEVELS[package], other
    assert not packages(MODULES[module]) & {"experiments", "scripts"}


def test_no_module_comes_back_to_itself():
    graph = {module: ours(path) - {module} for module, path in MODULES.items()}
    graph["runs.run"] -= {"runs.figures"}  # asked for only when a run is to be drawn
    graphlib.TopologicalSorter(graph).prepare()


def test_train_imports_nothing_of_ours():
    found = packages(MODULES["train"]) - set(sys.stdlib_module_names)
    assert found == {"jax", "optax", "jaxtyping"}


@pytest.mark.parametrize("package", OWNERS)
def test_a_heavy_library_has_one_owner(package):
    users = {module for module, path in MODULES.items() if package in packages(path)}
    assert users <= OWNERS[package]


def test_figures_need_neither_pyplot_nor_scipy():
    assert not {"matplotlib.pyplot", "pylab"} & imports(MODULES["plots"])
    assert "scipy" not in packages(MODULES["plots"])


@pytest.mark.parametrize("module", NUMPY_ONLY.split())
def test_what_needs_numpy_alone_imports_no_jax(module):
    assert not packages(MODULES[module]) & JAX
    assert not {"models", "train", "keys", "devices"} & ours(MODULES[module])


def test_scripts_import_no_script_and_experiments_no_other_but_the_baseline():
    for path in (*ROOT.glob("scripts/*.py"), *ROOT.glob("experiments/*.py")):
        folders = [name.split(".")[:2] for name in imports(path)]
        own = [path.parent.name, path.stem]
        others = [name for name in folders if name != own]
        assert not [name for name in others if name[0] == "scripts"], path
        if path.parent.name == "experiments":
            names = {name[1] for name in others if name[0] == "experiments"}
            names = {name for name in names if not name.startswith("_")}
            assert names <= {"pytorch_baseline"}, path


LOADED = """
import sys, importlib
def loads(module, *banned):
    importlib.import_module(module)
    found = [name for name in banned if name in sys.modules]
    assert not found, f"{module} loads {found}"
loads("ae_jax", "jax", "numpy", "pydantic")
import ae_jax
assert not hasattr(ae_jax, "nothing") and "jax" not in sys.modules
loads("ae_jax.data", "jax", "grain", "tensorflow_datasets", "sklearn", "PIL", "scipy")
loads("ae_jax.weights", "jax", "torch")
loads("ae_jax.objectives", "orbax", "grain", "tensorflow_datasets", "matplotlib")
loads("ae_jax.cli", "orbax", "grain", "tensorflow_datasets", "matplotlib", "scipy")
loads("ae_jax.runs.trainer", "matplotlib", "orbax", "grain", "tensorflow_datasets",
      "PIL.Image", "scipy.stats", "scipy.ndimage", "tensorboardX", "torch")
assert ae_jax.Config is sys.modules["ae_jax.config"].Config
assert callable(ae_jax.fit) and callable(ae_jax.open_run)
"""


def test_nothing_is_loaded_before_it_is_needed():
    subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, check=True)


def commands() -> list[str]:
    found = []
    for folder in ("experiments", "scripts"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if "__main__" in path.read_text() and not path.stem.startswith("_"):
                found.append(str(path.relative_to(ROOT)))
    return sorted(found, key=lambda command: command == BASELINE)


HELP = """
import contextlib, io, json, runpy, sys
shown = {}
for path in sys.argv[1:]:
    sys.argv, out, before = [path, "--help"], io.StringIO(), set(sys.modules)
    try:
        with contextlib.redirect_stdout(out):
            if path.startswith("experiments"):
                module = path.removesuffix(".py").replace("/", ".")
                runpy.run_module(module, run_name="__main__")
            else:
                runpy.run_path(path, run_name="__main__")
        status = None
    except SystemExit as end:
        status = end.code
    except Exception as error:
        status = repr(error)
    banned = {"matplotlib", "orbax", "grain", "tensorflow_datasets", "torch", "sklearn"}
    shown[path] = [status, sorted(banned & set(sys.modules) - before), out.getvalue()]
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def helps():
    import json

    done = subprocess.run(
        [sys.executable, "-c", HELP, *commands()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", commands())
def test_help_explains_a_command_and_all_its_options(command, helps):
    status, loaded, text = helps[command]
    assert status == 0
    assert set(loaded) <= ({"torch"} if command == BASELINE else set())
    assert text.startswith("usage: ")
    words = " ".join(text.translate({ord(c): " " for c in "│╭╮╰╯─"}).split())
    assert len(words.split("-h, --help")[0]) > 100  # what it does
    if command.startswith("experiments"):
        assert "--preset {" in words
        assert "--train." in words or "--seeds" in words
