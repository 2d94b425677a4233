"""``python -m experiments``: the experiments, a line each."""

import ast
from pathlib import Path

for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    print(f"python -m experiments.{path.stem:20}  {doc.partition(chr(10))[0]}")
