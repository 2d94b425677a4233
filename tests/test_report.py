"""The page of a comparison: whole, self-contained, and of sound judgement."""

import copy
import html.parser
import re

import numpy as np
import pytest

from ae_jax import collapse
from ae_jax.parity import lockstep, report
from ae_jax.runs import folder
from ae_jax.stats import compare_runs

VOID = {"meta", "img"}


def runs(healthy, part_dead=0, collapsed=0, mean=0.036):
    scores = mean * (1 + np.linspace(-0.01, 0.01, healthy))
    rows = [(float(score), 0) for score in scores]
    rows += [(0.045, 1)] * part_dead + [(0.0675, 3)] * collapsed
    return [
        {
            "test/mse": score,
            "latent/dead_units": dead,
            "latent/collapsed": dead == 3,
            "outcome": collapse.outcome(dead, 3),
        }
        for score, dead in rows
    ]


def made_up():
    """A run's description, options and findings, as a comparison leaves them."""

    def row(step):
        names = (
            "loss_rel",
            *(f"{t}_{m}" for t in lockstep.TREES for m in ("abs", "nrel")),
        )
        tests = {"ours/test/mse": 0.1, "theirs/test/mse": 0.1}
        return {"step": step, **dict.fromkeys(names, 1e-15), **tests}

    layer = [{"name": "encoder_0", "abs": 1e-16, "nrel": 0.0}]
    layers = {"exact": True, "forward": layer, "gradient": layer}
    found = {
        "layers": {"float32": layers, "float64": layers},
        "mini": [row(4), row(8)],
        "whole": [row(23), row(46)],
        "drift": {"ours": [0.0, 1e-7, 1e-5], "threads": [0.0, 1e-6, 1e-6]},
        "ours": runs(5, 1, 2),
        "theirs": runs(6, 0, 2),
    }
    found["checks"] = lockstep.check_lockstep(found["mini"], found["whole"])
    found["runs"] = compare_runs(found["ours"], found["theirs"], margin=0.03)
    model = {"name": "autoencoder", "hidden": [16, 8], "latent_dim": 3}
    train = {"learning_rate": 1e-3, "batch_size": 64, "num_epochs": 2}
    sizes = {"num_seeds": 8, "margin": 0.03}
    options = {"data": {"name": "digits"}, "model": model, "train": train, **sizes}
    description = folder.Description(
        experiment="compare_pytorch",
        config={},
        versions={"jax": "1", "torch": "2"},
        device={"cpu_cores": 2, "cpu_model": "a <fast> one"},
        git_commit=None,
        data=folder.Data(
            fingerprint="", source="bundled", num_train=9, shape=(8, 8, 1)
        ),
    )
    return description, options, found


def render(tmp_path, change=lambda found: None):
    description, options, found = copy.deepcopy(made_up())
    change(found)
    report.draw(found, tmp_path)
    return report.page(description, options, found, tmp_path)


class Balance(html.parser.HTMLParser):
    """Fails on a tag that is not closed in its order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.open += [tag] * (tag not in VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_whole_and_escaped(tmp_path):
    page = render(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "lockstep.png", "drift.png", "distributions.png",
    }  # fmt: skip
    assert re.findall(r'(?:src|href)="(.{10})', page) == ["data:image"] * 3
    assert not re.search(r"url\(|@import|<script|<link|{{|{%|Undefined", page)
    for words in (
        "layer by layer", "Lockstep in float64", "Drift in float32", "Many seeds",
        "a &lt;fast&gt; one", "equal in every bit", "Of our runs 2 of 8",
    ):  # fmt: skip
        assert words in page
    assert "FAILED" not in page
    parser = Balance()
    parser.feed(page)
    assert parser.open == []


def test_a_failed_check_and_a_changed_bit_are_said(tmp_path):
    def spoil(found):
        found["checks"][0]["passed"] = False
        found["layers"]["float64"]["exact"] = False

    page = render(tmp_path, spoil)
    assert page.count("FAILED") == 1
    assert "the conversion is wrong" in page


def test_too_few_healthy_runs_still_make_a_page(tmp_path):
    def empty(found):
        found["runs"] = compare_runs(runs(0, 1), runs(1), margin=0.03)

    assert "Too few healthy runs" in render(tmp_path, empty)


@pytest.mark.parametrize(
    ("ours", "theirs", "margin", "words"),
    [
        (runs(20), runs(20), 0.03, "equal to within ±3%"),
        (runs(20, mean=0.04), runs(20), 0.03, "they differ"),
        (runs(3, mean=0.0365), runs(3), 0.005, "healthy runs a side"),
        (runs(1, 1), runs(0, 0, 2), 0.03, "Too few healthy runs"),
    ],
)
def test_verdict_says_what_was_shown_and_what_was_not(ours, theirs, margin, words):
    found = compare_runs(ours, theirs, margin)
    assert words in report.mean_verdict(found, margin)
