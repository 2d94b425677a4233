"""What the documents show as Python runs and holds, and the site of them is whole."""

import html
import importlib.util
import json
import re
import subprocess
import sys

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


# --- The site -----------------------------------------------------------------------


def build(source, out):
    """Sphinx as scripts/docs calls it: its status, and what it had to say."""
    if not importlib.util.find_spec("myst_nb"):
        install = ".venv/bin/pip install -c constraints.txt -e '.[docs]'"
        pytest.exit(f"error: no packages to build the docs with: {install}", 2)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going"),
            *("-c", ROOT / "docs", source, out),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    colour = r"\x1b\[[\d;]*m"
    return done.returncode, re.sub(colour, "", done.stdout + done.stderr)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site; read only."""
    folder = tmp_path_factory.mktemp("site") / "html"
    status, said = build(ROOT / "docs", folder)
    assert status == 0, said
    return folder


def test_the_site_is_built_from_every_page_and_notebook(site):
    pages = {path.stem for path in site.glob("*.html")}
    assert pages >= {page.stem for page in PAGES}
    tour = (site / "tour.html").read_text()
    alts = re.findall(r'<img alt="([^"]*)" src="_images', tour)
    assert len(alts) == 7
    assert all(re.fullmatch("[A-Z][a-z][a-z, ]+", alt) for alt in alts), alts
    index = (site / "index.html").read_text()
    result = ROOT / "experiments" / "results" / "benchmark.json"
    speed = json.loads(result.read_text())["headline"]["speed_ratio_item_by_item"]
    assert f"{speed:.1f} times as long" in index


def test_every_link_of_the_site_leads_to_a_place_in_it(site):
    pages = [page for page in site.rglob("*.html") if "_static" not in page.parts]
    texts = {page: page.read_text() for page in pages}
    places = {p: {*re.findall(r'\bid="([^"]+)"', text)} for p, text in texts.items()}
    links = {
        (page, html.unescape(link))
        for page, text in texts.items()
        for link in re.findall(r'<a\b[^>]* href="(?!https?:)([^"]+)"', text)
    }
    assert len(links) > 1000
    for page, link in links:
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), (page, link)
        if place and target in places:
            assert place in places[target], (page, link)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("```{eval-rst}\n:func:`ae_jax.fitt`\n```", "ae_jax.fitt"),
        ("```{code-cell}\nraise ValueError(6 * 7)\n```", "ValueError: 42"),
    ],
    ids=["link", "reference", "notebook"],
)
def test_a_broken_page_fails_the_build(tmp_path, text, message):
    head = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n# Page\n"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "index.md").write_text(head + text)
    status, said = build(tmp_path / "source", tmp_path / "html")
    assert status != 0
    assert message in said


def test_every_module_is_in_the_reference():
    pages = (ROOT / "docs" / "api").glob("*.rst")
    listed = [
        name
        for page in pages
        for name in re.findall(r"^\.\. automodule:: ([\w.]+)$", page.read_text(), re.M)
    ]
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "ae_jax").rglob("*.py")
        if len(path.read_text().splitlines()) > 1  # an empty package's is its docstring
    }
    assert sorted(listed) == sorted(modules - {"ae_jax"})
