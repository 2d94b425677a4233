"""The figures of the latent show what the run encodes and decodes."""

from dataclasses import replace

import flax.linen as nn
import numpy as np
import pytest
from conftest import shown as pictures_of

from ae_jax import plots
from ae_jax.errors import UserError
from ae_jax.runs import figures


@pytest.fixture(scope="module")
def shown(finished_run):
    return figures.read_images(finished_run.folder)


def dots_of(figure):
    """By label of the legend, the coordinates of its dots, an axis a row."""
    lines = figure.axes[0].get_lines()
    return {
        line.get_label(): getattr(line, "_verts3d", line.get_data()) for line in lines
    }


def test_what_is_stored_is_the_beginning_of_the_test_split(finished_run, shown):
    test = finished_run.data().test
    np.testing.assert_array_equal(shown["encoded"], test.images[:1000])
    np.testing.assert_array_equal(shown["labels"], test.labels[:1000])


def test_each_dot_is_an_images_latent_under_its_class(finished_run, shown):
    latents = finished_run.encode(shown["encoded"])
    dots = dots_of(finished_run.figure("latents"))
    assert list(dots) == [str(label) for label in range(10)]
    for label, drawn in dots.items():
        np.testing.assert_array_equal(drawn, latents[shown["labels"] == int(label)].T)


@pytest.mark.parametrize("num_units", [1, 2, 3, 7])
def test_latents_of_any_size_have_axes_with_names(num_units, tmp_path):
    latents = np.random.default_rng(0).normal(size=(50, num_units)) * [
        3,
        *[1] * (num_units - 1),
    ]
    labels = np.arange(50) % 4
    figure = plots.latents(latents, labels)
    axes, dots = figure.axes[0], dots_of(figure)
    assert "atent" in axes.get_xlabel()
    assert axes.get_ylabel()
    assert set(map(len, dots.values())) == {3 if num_units == 3 else 2}
    if num_units > 3:  # most of the variance is the first unit's
        first = np.concatenate([dots[str(label)][0] for label in range(4)])
        own = np.concatenate([latents[labels == label, 0] for label in range(4)])
        assert abs(np.corrcoef(first, own)[0, 1]) > 0.9
    plots.save(figure, tmp_path / "latents.png")


def test_a_row_of_the_traversal_moves_one_unit_through_its_percentiles(
    finished_run, shown
):
    latents = finished_run.encode(shown["encoded"])
    rows = dict(pictures_of(finished_run.figure("traversal")))
    assert list(rows) == [f"Latent unit {i}" for i in range(latents.shape[1])]
    for unit, pictures in enumerate(rows.values()):
        ways = np.tile(np.median(latents, axis=0), (len(figures.PERCENTILES), 1))
        ways[:, unit] = np.percentile(latents[:, unit], figures.PERCENTILES)
        expected = finished_run.decode(ways.astype(latents.dtype))[..., 0]
        np.testing.assert_allclose(pictures, expected, atol=1e-6)


def test_the_interpolation_runs_from_one_image_to_one_of_another_class(
    finished_run, shown
):
    ((_, row),) = pictures_of(finished_run.figure("interpolation"))
    images, labels = shown["encoded"][..., 0] / np.float32(255), shown["labels"]
    np.testing.assert_array_equal(row[0], images[0])
    other = np.flatnonzero(labels != labels[0])[0]
    np.testing.assert_array_equal(row[-1], images[other])
    ends = finished_run.encode(shown["encoded"][[0, other]])
    np.testing.assert_allclose(
        row[[1, -2]], finished_run.decode(ends)[..., 0], atol=1e-6
    )
    middle = finished_run.decode((ends[:1] * 5 + ends[1:] * 4) / 9)[0, ..., 0]
    np.testing.assert_allclose(row[5], middle, atol=1e-5)


def test_a_model_without_a_latent_has_none_of_these_figures(finished_run):
    class Plain(nn.Module):
        def __call__(self, x):
            return x

    run = replace(finished_run, model=Plain())
    assert not {"latents", "traversal", "interpolation"} & set(figures.applicable(run))
    with pytest.raises(
        UserError, match=r"no encode, decode, which traversal needs; it"
    ):
        figures.check(run, "traversal")
