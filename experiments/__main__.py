"""``python -m experiments``: the experiments, a line each."""

import ast
from pathlib import Path

from ae_jax import cli


def main() -> None:
    """List them."""
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        print(f"python -m experiments.{path.stem:20}  {doc.partition(chr(10))[0]}")


cli.exit_with(main)
