"""What the README tells users to type does what it says."""

import dataclasses
import re

import numpy as np
import pytest
from conftest import ROOT

import ae_jax
from ae_jax import data
from ae_jax.config import FiguresConfig, TrainConfig
from ae_jax.data import Digits

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def snippet(word):
    (text,) = (text for text in SNIPPETS if word in text)
    return text


def run_snippet(word) -> dict:
    names = {"__name__": "notebook"}
    exec(snippet(word), names)
    return names


def test_the_lines_of_python_train_and_open_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = "ae_jax.Config(train=ae_jax.config.TrainConfig(num_epochs=2), run_dir="
    text = snippet("ae_jax.fit").replace("ae_jax.Config(run_dir=", short)
    names = {}
    exec(text, names)
    assert names["latents"].shape == (360, 3)
    np.testing.assert_allclose(
        names["recon"], names["run"].reconstruct(names["images"]), rtol=1e-6
    )
    error = np.square(names["recon"] - names["images"] / 255).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(names["scores"]["mse"], error, rtol=1e-4)
    assert len(names["figure"].axes) > 0


@pytest.mark.parametrize(
    ("section", "cls", "loss"),
    [
        ("objective", "Masked", "masked_mse"),
        ("model", "LinearAutoencoder", "mse"),
        ("data", "Bars", "mse"),
    ],
)
def test_what_the_readme_adds_can_be_trained(tmp_path, section, cls, loss):
    config = ae_jax.Config(
        run_dir=tmp_path / "run",
        data=Digits(),
        train=TrainConfig(num_epochs=2),
        figures=FiguresConfig(draw=False),
    )
    own = run_snippet(f"class {cls}")[cls]()
    run = ae_jax.fit(dataclasses.replace(config, **{section: own}))
    first, last = run.metrics
    assert last[f"train/{loss}"] < first[f"train/{loss}"]
    assert run.at("best").step == run.step


def test_every_data_set_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(
        data.DATASETS
    )


def test_every_module_is_on_the_map():
    part = README.partition("## Read it")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)[1:]
    shown = set(re.findall(r"`([\w/]+?)(?:\.py|/)`", " ".join(rows)))
    there = {
        path.stem
        for path in (ROOT / "ae_jax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert shown == there - {"__init__"}
