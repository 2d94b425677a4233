"""What the README tells users to type does what it says."""

import re

import numpy as np
import pytest
from conftest import ROOT
from test_trainer import fit, small

from ae_jax import data, losses, models, run

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def tables():
    """Leave models, losses and data sets as they were."""
    known = (models.MODELS, losses.LOSSES, data.DATASETS)
    before = [dict(table) for table in known]
    yield
    for table, entries in zip(known, before, strict=True):
        table.clear()
        table.update(entries)


def snippet(word):
    (code,) = (code for code in SNIPPETS if word in code)
    return code


def test_the_lines_of_python_open_a_run(tmp_path):
    fit(small(tmp_path / "run", num_epochs=1))
    names = {}
    exec(snippet("open_run").replace("runs/tutorial", str(tmp_path / "run")), names)
    assert names["codes"].shape == (360, 3)
    np.testing.assert_allclose(
        names["recon"], names["run"].reconstruct(names["images"]), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("module", "option", "field", "name"),
    [
        (models, "model", "name", "linear"),
        (data, "data", "name", "bars"),
        (losses, "train", "loss", "mae"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("tables")
def test_what_the_readme_adds_can_be_trained(tmp_path, module, option, field, name):
    import dataclasses

    exec(snippet(f'["{name}"]'), vars(module))
    config = small(tmp_path / "run", num_epochs=2)
    part = dataclasses.replace(getattr(config, option), **{field: name})
    fit(dataclasses.replace(config, **{option: part}))
    loss = f"train/{name if option == 'train' else 'mse'}"
    first, last = run.open_run(tmp_path / "run").rows
    assert last[loss] < first[loss]


def test_every_module_is_on_the_map_in_reading_order():
    shown = re.findall(r"^\| `(\w+)\.py` \|", README, re.MULTILINE)
    from test_imports import MAP

    assert shown == list(MAP)


def test_every_data_set_is_in_the_table():
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == set(
        data.DATASETS
    )
