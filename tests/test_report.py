"""The page of a comparison: whole, self-contained, and every number in its place."""

import copy
import html.parser
import itertools
import re

import pytest
from life import make_runs

from ae_jax.parity import lockstep, report
from ae_jax.runs import folder
from ae_jax.stats import compare_runs

VOID = {"meta", "img"}
FIGURES = ("lockstep", "drift", "distributions")
COUNTS = ("runs", "healthy", "part_dead", "collapsed")
SCORES = ("trimmed_mean", "mean", "sd")


def made_up():
    """A run's description, options and findings; no number is there twice."""
    values = (i * 1e-17 for i in itertools.count(11))

    def row(step):
        names = [f"{t}_{m}" for t in lockstep.TREES for m in ("abs", "nrel")]
        apart = {name: next(values) for name in (*names, "loss_rel")}
        return {"step": step, **apart, "ours/test/mse": 0.5, "theirs/test/mse": 0.25}

    def layer(name):
        return [{"name": name, "abs": next(values), "nrel": next(values)}]

    def layers():
        parts = {"forward": layer("encoder_0"), "gradient": layer("encoder.0.bias")}
        return {"exact": True, **parts}

    found = {
        "layers": {"float32": layers(), "float64": layers()},
        "mini": [row(4), row(8)],
        "whole": [row(1234), row(2468)],
        "drift": {"ours": [0.0, 1e-7, 1e-5], "threads": [0.0, 1e-6, 2e-6]},
        "ours": make_runs(7, 3, 4),
        "theirs": make_runs(20, 1, 5, mean=0.035),
    }
    for side in ("ours", "theirs"):  # so that a trimmed mean is another than the mean
        found[side][0]["test/mse"] -= 0.002
    found["checks"] = lockstep.check_lockstep(found["mini"], found["whole"])
    found["runs"] = compare_runs(found["ours"], found["theirs"], margin=0.03)
    model = {"name": "autoencoder", "hidden": [16, 8], "latent_dim": 3}
    train = {"learning_rate": 1e-3, "batch_size": 64, "num_epochs": 2}
    sizes = {"num_seeds": 8, "margin": 0.03}
    options = {"data": {"name": "digits"}, "model": model, "train": train, **sizes}
    data = folder.Data(fingerprint="", source="bundled", num_train=9, shape=(8, 8, 1))
    description = folder.Description(
        experiment="compare_pytorch",
        config={},
        versions={"jax": "1", "torch": "2"},
        device={"cpu_cores": 2, "cpu_model": "a <fast> one"},
        git_commit=None,
        data=data,
    )
    return description, options, found


class Page(html.parser.HTMLParser):
    """Fails on a tag that is not closed in its order; has the tables, row by row."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] * (tag not in VOID)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += text


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of the figures; read only."""
    path = tmp_path_factory.mktemp("drawn")
    report.draw(made_up()[-1], path)
    return path


def render(drawn, change=lambda found: None):
    description, options, found = copy.deepcopy(made_up())
    change(found)
    return report.page(description, options, found, drawn)


def test_page_is_self_contained_whole_and_escaped(drawn):
    page = render(drawn)
    assert {path.name for path in drawn.iterdir()} == {f"{n}.png" for n in FIGURES}
    assert re.findall(r'(?:src|href)="(.{10})', page) == ["data:image"] * 3
    assert not re.search(r"url\(|@import|<script|<link|{{|{%|Undefined", page)
    assert re.findall(r'<img alt="(\w+)"', page) == [*FIGURES]
    for words in (
        "layer by layer", "Lockstep in float64", "Drift in float32", "Many seeds",
        "a &lt;fast&gt; one", "equal in every bit",
    ):  # fmt: skip
        assert words in page
    assert "FAILED" not in page


def test_every_number_stands_under_its_own_header(drawn):
    *_, found = made_up()
    checks, outputs, gradients, steps, drift, runs = Page(render(drawn)).tables

    def small(row, *keys):
        return [f"{row[key]:.1e}" for key in keys]

    def layers(part):
        sides = (found["layers"][name][part] for name in ("float64", "float32"))
        for a, b in zip(*sides, strict=True):
            yield [a["name"], *small(a, "abs", "nrel"), *small(b, "abs", "nrel")]

    assert checks == [
        ["Checked", "Found", "Allowed", ""],
        *([c["what"], *small(c, "value", "limit"), "passed"] for c in found["checks"]),
    ]
    formats = ["float64", "relative", "float32", "relative"]
    assert outputs == [["Output", *formats], *layers("forward")]
    assert gradients == [["Gradient", *formats], *layers("gradient")]
    keys = [f"{name}_{m}" for name in ("params", "mu", "nu") for m in ("abs", "nrel")]
    assert steps == [
        [
            *("Steps", "Parameters", "relative", "First moment", "relative"),
            *("Second moment", "relative", "Loss, relative", "Test MSE"),
        ],
        *(
            [f"{row['step']:,}", *small(row, *keys, "loss_rel"), "2.5e-01"]
            for row in found["mini"] + found["whole"]
        ),
    ]
    assert drift[1:] == [
        ["ours beside PyTorch", "1.0e-05"],
        ["PyTorch on two threads beside PyTorch on one", "2.0e-06"],
    ]
    of_sides = [(name, found["runs"][side]) for side, name in report.SIDES.items()]
    assert runs == [
        [
            *("", "runs", "healthy", "part-dead", "collapsed"),
            *("trimmed mean test MSE", "mean", "sd"),
        ],
        *(
            [name, *(str(of[k]) for k in COUNTS), *(f"{of[k]:.5f}" for k in SCORES)]
            for name, of in of_sides
        ),
    ]


def test_the_sentences_have_their_own_numbers(drawn):
    page, found = " ".join(render(drawn).split()), made_up()[-1]["runs"]
    for outcome, words in (("collapsed", "collapsed"), ("part_dead", "had some of")):
        ours, theirs = (
            f"{found[side][outcome]} of {found[side]['runs']}"
            for side in ("ours", "theirs")
        )
        p = f"{found[f'{outcome}_p']:.2g}"
        of_both = rf"{ours} \([^)]*\) {words}[^.]*PyTorch's {theirs} \([^)]*\);[^.]*\."
        assert re.search(rf"Of our runs {of_both} Fisher[^=]*= {p}\.", page), outcome
    assert f"(Kolmogorov–Smirnov, p = {found['ks_p']:.2g})" in page


def test_a_failed_check_and_a_changed_bit_are_said(drawn):
    def spoil(found):
        found["checks"][0]["passed"] = False
        found["layers"]["float64"]["exact"] = False

    page = render(drawn, spoil)
    assert page.count("FAILED") == 1
    assert "the conversion is wrong" in page


def test_too_few_healthy_runs_still_make_a_page(drawn):
    def empty(found):
        found["runs"] = compare_runs(make_runs(0, 1), make_runs(1), margin=0.03)

    assert "Too few healthy runs" in render(drawn, empty)


@pytest.mark.parametrize(
    ("ours", "theirs", "margin", "words"),
    [
        (make_runs(20), make_runs(20), 0.03, "equal to within ±3%"),
        (make_runs(20, mean=0.04), make_runs(20), 0.03, "they differ"),
        (make_runs(3, mean=0.0365), make_runs(3), 0.005, "healthy runs a side"),
        (make_runs(1, 1), make_runs(0, 0, 2), 0.03, "Too few healthy runs"),
    ],
)
def test_verdict_says_what_was_shown_and_what_was_not(ours, theirs, margin, words):
    found = compare_runs(ours, theirs, margin)
    assert words in report.mean_verdict(found, margin)
