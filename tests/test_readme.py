"""What README and docs show as Python to copy does what they say."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import ae_jax
from ae_jax import data
from ae_jax.config import FiguresConfig, TrainConfig
from ae_jax.data import Digits

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/extend.md")}


def snippet(page, word):
    snippets = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    (text,) = (text for text in snippets if word in text)
    return text


def run_snippet(page, word) -> dict:
    names = {"__name__": "notebook", "dataclasses": dataclasses, "jax": jax}
    names |= {"jnp": jnp, "np": np, "nn": nn, "Arrays": data.Arrays}
    exec(snippet(page, word), names)
    return names


def test_the_lines_of_python_train_and_open_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = snippet("README.md", "ae_jax.fit").replace("num_epochs=40", "num_epochs=2")
    names = {}
    exec(text, names)
    assert names["latents"].shape == (360, 3)
    np.testing.assert_allclose(
        names["recon"], names["run"].reconstruct(names["images"]), rtol=1e-6
    )
    error = np.square(names["recon"] - names["images"] / 255).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(names["scores"]["mse"], error, rtol=1e-4)
    assert len(names["figure"].axes) > 0


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 110


@pytest.mark.parametrize(
    ("page", "section", "cls", "loss"),
    [
        ("README.md", "objective", "Masked", "masked_mse"),
        ("README.md", "model", "Smoother", "mse"),
        ("README.md", "data", "Bars", "mse"),
        ("docs/extend.md", "objective", "Masked", "masked_mse"),
        ("docs/extend.md", "model", "LinearAutoencoder", "mse"),
        ("docs/extend.md", "data", "Bars", "mse"),
    ],
)
def test_what_a_page_adds_can_be_trained(tmp_path, page, section, cls, loss):
    config = ae_jax.Config(
        run_dir=tmp_path / "run",
        data=Digits(),
        train=TrainConfig(num_epochs=2),
        figures=FiguresConfig(draw=False),
    )
    own = run_snippet(page, f"class {cls}")[cls]()
    run = ae_jax.fit(dataclasses.replace(config, **{section: own}))
    first, last = run.metrics
    assert last[f"train/{loss}"] < first[f"train/{loss}"]
    assert run.at("best").step == run.step


def test_every_data_set_is_in_the_table():
    page = (ROOT / "docs" / "data.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(data.DATASETS)


def test_every_module_is_on_the_map():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)[1:]
    shown = set(re.findall(r"`([\w/]+?)(?:\.py|/)`", " ".join(rows)))
    there = {
        path.stem
        for path in (ROOT / "ae_jax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert shown == there - {"__init__"}
