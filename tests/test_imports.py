"""The map of the modules, as the README draws it, holds in the code."""

import ast
import itertools
import subprocess
import sys

import pytest
from conftest import ROOT

# Each module may import those named, and no other module of ours.
MAP = {
    "config": set(),
    "cli": {"config"},
    "models": {"config"},
    "losses": {"models"},
    "figures": set(),
    "images": {"config"},
    "evaluate": {"images"},
    "data": {"config", "images"},
    "hosts": {"config"},
    "train": {"config", "hosts", "losses"},
    "feed": {"config", "hosts", "train"},
    "checkpoint": {"config", "hosts"},
    "records": {"config"},
    "interop": {"config", "records"},
    "parity": {"interop"},
    "report": {"figures", "parity"},
    "run": {
        "checkpoint", "config", "data", "evaluate", "figures", "hosts", "images",
        "losses",
        "models", "records", "train",
    },
    "trainer": {
        "checkpoint", "cli", "config", "data", "evaluate", "feed", "hosts", "losses",
        "records", "run", "train",
    },
    "ensemble": {
        "checkpoint", "cli", "config", "data", "evaluate", "figures", "losses",
        "records", "run", "train", "trainer",
    },
}  # fmt: skip

# Packages that one module alone may import.
OWNERS = {
    "matplotlib": "figures",
    "tensorflow_datasets": "data",
    "grain": "feed",
    "orbax": "checkpoint",
}
NUMPY_ONLY = {
    "config",
    "cli",
    "figures",
    "images",
    "evaluate",
    "data",
    "records",
    "interop",
    "parity",
    "report",
}

# What is set beside PyTorch imports the tutorial's model from the one file that has it.
BASELINE = "experiments.pytorch_baseline"
BASELINE_USERS = {"compare_pytorch", "convert", "benchmark"}
# What runs an experiment by its command takes the presets from it.
PRESETS_OF = {"verify_resume": "experiments.tutorial"}


def imports(path, *, at_start=False) -> set[str]:
    """Dotted names that a file imports, in functions too.

    At start: only those on top of the file, above its ``if __name__ == "__main__"``,
    which a command has loaded when it parses its options.
    """
    tree = ast.parse(path.read_text())
    above = itertools.takewhile(
        lambda node: not ast.unparse(node).startswith("if __name__ == '__main__'"),
        tree.body,
    )
    nodes = above if at_start else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(names) -> set[str]:
    return {
        name.split(".")[1]
        for name in names
        if name.startswith("ae_jax.") and name != "ae_jax.__version__"
    }


def packages(names) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_map_names_every_module():
    modules = {path.stem for path in (ROOT / "ae_jax").glob("*.py")} - {"__init__"}
    assert modules == set(MAP)


@pytest.mark.parametrize("module", MAP)
def test_module_imports_only_from_rows_above_it(module):
    found = imports(ROOT / "ae_jax" / f"{module}.py")
    above = list(MAP)[: list(MAP).index(module)]
    assert ours(found) <= MAP[module] <= set(above)
    for package, owner in OWNERS.items():
        assert package not in packages(found) or module == owner or module == "run"
    if module in NUMPY_ONLY:
        assert not packages(found) & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize("folder", ["experiments", "scripts"])
def test_nothing_heavy_is_imported_before_the_options_are_parsed(folder):
    light = {"ae_jax.cli", "ae_jax.config", "ae_jax.records", "ae_jax.interop"}
    for path in (ROOT / folder).glob("*.py"):
        found = imports(path, at_start=True)
        assert not packages(found) & {"jax", "flax", "orbax", "matplotlib", "optax"}
        assert {f"ae_jax.{name}" for name in ours(found)} <= light
        others = {
            ".".join(name.split(".")[:2])
            for name in imports(path)
            if name.startswith(("experiments.", "scripts."))
        } - {f"{folder}.{path.stem}"}
        allowed = {BASELINE} if path.stem in BASELINE_USERS else set()
        assert others <= allowed | {PRESETS_OF.get(path.stem)}


def test_importing_a_loss_loads_no_data_checkpoint_or_figure_library():
    code = "import sys, ae_jax.losses; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not set(loaded) & {"orbax", "tensorflow_datasets", "matplotlib"}


def test_a_run_starts_without_what_only_its_scores_and_figures_need():
    code = "import sys, ae_jax.trainer; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not set(loaded) & {
        "matplotlib", "orbax", "PIL.Image", "scipy.ndimage", "scipy.sparse",
        "scipy.stats", "tensorboardX",
    }  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "experiments.tutorial"],
        ["-m", "experiments.pytorch_baseline"],
        ["-m", "experiments.seeds"],
        ["-m", "experiments.dead_code"],
        ["scripts/plot.py"],
        ["scripts/evaluate.py"],
        ["scripts/compare.py"],
        ["scripts/convert.py"],
        ["scripts/take_seed.py"],
        ["scripts/benchmark.py"],
        ["scripts/tables.py"],
        ["scripts/verify_resume.py"],
    ],
    ids=lambda command: command[-1],
)
def test_help_explains_itself_without_loading_jax(command):
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try:\n"
        "    runpy.{}('{}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('status', end.code, 'jax' in sys.modules)"
    )
    how = ("run_module", command[1]) if command[0] == "-m" else ("run_path", command[0])
    shown = subprocess.check_output(
        [sys.executable, "-c", code.format(*how)], text=True, cwd=ROOT
    )
    assert "usage: " in shown
    assert shown.endswith("status 0 False\n")
    assert "-h, --help" in shown
