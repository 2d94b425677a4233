"""Fill README's and docs' tables and numbers from experiments/results/: ``tables.py``.

What stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is replaced by the
tables of ``NAME.json``, which holds them exactly as they are shown; and what stands
between ``<!-- number NAME KEY FORMAT -->`` and ``<!-- end -->``, by a number of its
headline in Python's format.
"""

import re
import sys
from pathlib import Path

from ae_jax import cli
from ae_jax.errors import UserError, suggest

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"<!--\s*(?:table|number)\b.*?-->")
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"(<!-- number (\w+) (\S+) (\S+) -->).*?(<!-- end -->)")


def fill(text: str, results: Path) -> str:
    """A document with its tables and numbers as the results have them.

    Args:
        text: the document.
        results: folder of the results.

    Raises:
        UserError: a result without a table, or without that number.
        OSError: there is no such result.
    """
    from ae_jax.files import read_json
    from ae_jax.runs.results import read_tables, to_markdown

    def tables(match: re.Match[str]) -> str:
        shown = map(to_markdown, read_tables(results / f"{match[2]}.json"))
        return f"{match[1]}{chr(10).join(shown)}{match[3]}"

    def number(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        result = read_json(path, "restore it from git")
        headline = result.get("headline") if isinstance(result, dict) else None
        if not isinstance(headline, dict):
            raise UserError(f"{path}: no headline in it; restore it from git")
        if match[3] not in headline:
            raise UserError(f"{path}: no {match[3]!r}{suggest(match[3], headline)}")
        try:
            return f"{match[1]}{headline[match[3]]:{match[4]}}{match[5]}"
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {match[3]}: {error}; fix it") from error

    return NUMBER.sub(number, TABLE.sub(tables, text))


def check_markers(path: Path, text: str) -> None:
    """Refuse what looks like a marker but is none, whose number would stay as typed.

    Raises:
        UserError: there is one.
    """
    for found in MARKER.finditer(text):
        if not any(kind.match(text, found.start()) for kind in (TABLE, NUMBER)):
            line = text.count("\n", 0, found.start()) + 1
            raise UserError(
                f"{path}:{line}: {found[0]} is not filled; write <!-- table NAME --> "
                "at the end of a line, or <!-- number NAME KEY FORMAT -->, with single "
                "spaces, and <!-- end --> after it"
            )


def main(check: bool = False, root: Path = ROOT) -> None:
    """Fill the tables and numbers of README and docs from experiments/results/.

    Args:
        check: Write nothing; status 2 if a document is not up to date.
        root: Folder of README.md, docs and experiments.
    """
    from ae_jax.files import write_text

    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text = path.read_text()
        check_markers(path, text)
        filled = fill(text, root / "experiments" / "results")
        if filled == text:
            continue
        if check:
            raise UserError(f"{path}: tables are old; run scripts/tables.py")
        write_text(path, filled)
        print(path, file=sys.stderr)


if __name__ == "__main__":
    cli.run_script(main)
