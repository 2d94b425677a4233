"""What the documents show as Python runs, in the order of the page, and holds."""

import re

import pytest
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_of_a_page_are_one_program_that_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    names = {}
    for snippet in re.finditer(
        r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    ):
        # Empty lines before it give the errors the page's own line numbers.
        above = "\n" * text.count("\n", 0, snippet.start(1))
        exec(compile(above + snippet[1], page, "exec"), names)


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda page: page.stem
)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
