"""The deep autoencoder of 2006: its rivals, its scores and what it shows."""

import dataclasses

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from ae_jax import baselines, data
from ae_jax.errors import UserError
from ae_jax.files import read_json
from ae_jax.models.residual import Residual
from ae_jax.runs import results, study
from ae_jax.runs.run import open_run
from experiments import _encoders
from experiments import deep as experiment

DIGITS = data.Digits().load()


def rows(images):
    return images.reshape(len(images), -1) / np.float32(255)


# --- The rivals -----------------------------------------------------------------------


def test_pca_is_the_baselines():
    train, test = DIGITS.train_images, DIGITS.test_images
    reconstruct = _encoders.fit_pca(rows(train), 5)
    expected = 64 * baselines.pca_mse(train, test, 5)
    error = _encoders.squared_error(reconstruct(rows(test)), rows(test))
    assert error == pytest.approx(expected, rel=1e-5)


def test_local_pca_finds_the_planes_that_images_lie_on():
    rng = np.random.default_rng(0)
    centres, ways = 5 * rng.normal(size=(3, 1, 20)), rng.normal(size=(3, 2, 20))
    images = np.concatenate(
        [c + rng.normal(size=(100, 2)) @ w for c, w in zip(centres, ways, strict=True)]
    )
    exact = _encoders.fit_local_pca(images, 3, num_planes=3)(images)
    np.testing.assert_allclose(exact, images, atol=1e-6)
    # The number of the plane is one of the numbers.
    coarse = _encoders.fit_local_pca(images, 2, num_planes=3)(images)
    assert _encoders.squared_error(coarse, images) > 0.1


def test_a_plane_that_is_left_with_too_few_images_is_given_up():
    images = np.random.default_rng(0).normal(size=(12, 6))
    recon = _encoders.fit_local_pca(images, 4, num_planes=6)(images)
    assert np.isfinite(recon).all()


def test_kernels_decode_what_a_plane_cannot():
    t = np.random.default_rng(0).uniform(-1, 1, size=(400, 1))
    curve = np.concatenate([5 * t, np.sin(3 * t), t**2], axis=1)
    plane = _encoders.fit_pca(curve, 1)(curve)
    bent = _encoders.fit_kernel_decoder(curve, 1, width=0.2, ridge=1e-6)(curve)
    error = _encoders.squared_error(bent, curve)
    assert error < 0.01 * _encoders.squared_error(plane, curve)


def test_a_setting_is_chosen_on_held_out_images_and_then_fitted_to_all():
    seen = []

    def fit(images, num_numbers, factor):
        seen.append((len(images), num_numbers, factor))
        return lambda x: factor * x

    images = np.random.default_rng(0).random((10, 4))
    rival = _encoders.Rival(fit, {"factor": (0.5, 1.1, 3.0)})
    reconstruct, setting = _encoders.fit_best(rival, images, 2, num_held_out=3)
    assert setting == {"factor": 1.1}
    assert seen == [(7, 2, 0.5), (7, 2, 1.1), (7, 2, 3.0), (10, 2, 1.1)]
    np.testing.assert_array_equal(reconstruct(images), 1.1 * images)


# --- The study ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study, small; read only."""
    quick = experiment.PRESETS["quick"]
    base = dataclasses.replace(
        quick,
        run_dir=tmp_path_factory.mktemp("deep") / "study",
        model=dataclasses.replace(quick.model, hidden=(40, 20), latent_dim=7),
        train=dataclasses.replace(quick.train, num_epochs=3),
        plane_epochs=2,
        num_seeds=2,
    )
    summary = study.run_study("deep", base, experiment.cells, experiment.summarise)
    return base, summary


def test_errors_are_summed_over_pixels_and_averaged_over_images_and_seeds(finished):
    base, summary = finished
    runs = [open_run(base.run_dir / "deep" / str(seed)) for seed in (0, 1)]
    for split, images in {
        "test": DIGITS.test_images,
        "train": DIGITS.train_images,
    }.items():
        pixels = images / 255
        errors = [
            np.square(run.reconstruct(images) - pixels).sum((1, 2, 3)).mean()
            for run in runs
        ]
        found = summary["errors"]["ours"][split]
        assert found == pytest.approx(np.mean(errors), rel=1e-5)
    pca = 64 * baselines.pca_mse(DIGITS.train_images, DIGITS.test_images, 7)
    assert summary["errors"]["PCA"]["test"] == pytest.approx(pca, rel=1e-5)
    assert summary["errors"]["ours"]["parameters"] == runs[0].num_params
    assert summary["train_gflop"] > 0


def test_the_nets_differ_in_their_latent_and_epochs_alone(finished):
    base, _ = finished
    deep, plane = (open_run(base.run_dir / k / "0").config for k in ("deep", "plane"))
    assert (deep.model, deep.train) == (base.model, base.train)
    assert plane.model == dataclasses.replace(base.model, latent_dim=2)
    assert plane.train == dataclasses.replace(base.train, num_epochs=2)


def test_neighbours_vote_without_the_image_itself():
    rng = np.random.default_rng(0)
    latents, labels = rng.normal(size=(60, 2)), rng.integers(0, 2, 60)
    for number, found in experiment.accuracies(latents, labels).items():
        right = 0
        for i in range(60):
            others = np.arange(60) != i
            vote = KNeighborsClassifier(int(number))
            vote.fit(latents[others], labels[others])
            right += int(vote.predict(latents[i : i + 1])[0] == labels[i])
        assert found == pytest.approx(right / 60)


def test_rivals_are_kept_for_a_study_that_is_resumed(finished, monkeypatch):
    base, summary = finished
    (base.run_dir / "summary.json").unlink()
    monkeypatch.setattr(_encoders, "fit_best", None)
    again = study.run_study("deep", base, experiment.cells, experiment.summarise)
    assert again["errors"] == summary["errors"]
    assert set(read_json(base.run_dir / "rivals.json")) == set(_encoders.RIVALS)
    for name in ("deep.png", "deep_planes.png"):
        assert (base.run_dir / name).exists()


def test_the_table_is_sorted_and_marks_ours_and_the_best_rival(finished):
    base, summary = finished
    kept, planes = experiment.tables(base, summary)
    errors = summary["errors"]
    assert [row[0] for row in kept["rows"]] == sorted(
        errors, key=lambda name: errors[name]["test"]
    )
    rivals = {k: v["test"] for k, v in errors.items() if k != "ours"}
    bold = {row[0] for row in kept["rows"] if row[1].startswith("**")}
    assert bold == {"ours", min(rivals, key=rivals.get)}
    assert [row[0] for row in planes["rows"]] == ["ours", "PCA", "t-SNE"]
    assert "| ours" in results.to_markdown(kept)
    of_mnist = experiment.PRESETS["reference"]
    published = experiment.tables(of_mnist, summary)[0]["rows"][len(errors) :]
    assert ["autoencoder, pretrained, 2006, published", "3.00", "–", "–"] in published


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tuning": 800}, "num_tuning: 800 of 1437 training images; hold out less"),
        ({"model": Residual()}, "model.name: .* a latent"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(
    change, message, tmp_path
):
    base = dataclasses.replace(
        experiment.PRESETS["quick"], run_dir=tmp_path / "study", **change
    )
    with pytest.raises(UserError, match=message):
        experiment.main(base)
    assert not base.run_dir.exists()
