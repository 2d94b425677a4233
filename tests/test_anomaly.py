"""Anomaly scores: of a run, of a user's pictures, and how they are judged."""

import dataclasses
import json

import numpy as np
import pytest
from life import small
from PIL import Image

from ae_jax.config import CheckpointConfig
from ae_jax.data import Digits
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder
from ae_jax.models.residual import Residual
from ae_jax.runs.trainer import train_run
from ae_jax.tasks import anomaly
from scripts import score as script

NORMAL = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained on one digit alone; read only."""
    folder = tmp_path_factory.mktemp("anomaly") / "run"
    return train_run(
        small(
            folder,
            data=Digits(classes=(NORMAL,), num_validation=40),
            model=Autoencoder((24,), 4, latent_activation="none", init="he"),
            checkpoint=CheckpointConfig(keep=1),
            num_epochs=60,
            batch_size=20,
            learning_rate=3e-3,
        )
    )


@pytest.fixture(scope="module")
def test_split():
    arrays = Digits().load()
    return arrays.test_images, arrays.test_labels != NORMAL


@pytest.mark.parametrize("name", anomaly.SCORES)
def test_other_digits_score_higher_than_the_normal_one(run, test_split, name):
    images, anomalous = test_split
    fitted = anomaly.fit_score(run, name, run.data().train.images)
    scores = fitted(images)
    assert scores.shape == (len(images),)
    assert anomaly.evaluate(scores, anomalous)["auroc"] > 0.9
    # Of each image by itself, and the same for floats.
    np.testing.assert_allclose(fitted(images[:7]), scores[:7], rtol=1e-3)
    floats = (images[:7] / 255).astype(np.float32)
    np.testing.assert_allclose(fitted(floats), scores[:7], rtol=1e-3)


def test_the_pathway_is_the_image_and_each_layer_of_the_encoder(run):
    images = run.data().test.images[:5]
    first, last = (
        {name: np.asarray(x) for name, x in run.params[layer].items()}
        for layer in ("encoder_0", "encoder_1")
    )
    pathways = []
    for x in (images / 255, run.reconstruct(images)):
        hidden = x.reshape(5, -1) @ first["kernel"] + first["bias"]
        latent = np.maximum(hidden, 0) @ last["kernel"] + last["bias"]
        pathways.append(np.concatenate([x.reshape(5, -1), hidden, latent], axis=1))
    found = anomaly.pathway_differences(run, images)
    np.testing.assert_allclose(found, pathways[0] - pathways[1], atol=1e-4)


def test_nearest_is_the_mean_distance_to_five():
    normal = np.arange(10, dtype=np.float32)[:, None]
    found = anomaly.nearest(normal, np.array([[0.0], [20.0]], np.float32))
    np.testing.assert_allclose(found, [2, 13], rtol=1e-5)
    np.testing.assert_allclose(anomaly.nearest(normal[:2], normal[:1]), [0.5])


def test_a_p_value_counts_normal_images_that_score_as_high():
    normal = np.random.default_rng(0).normal(size=1999)
    found = anomaly.p_values(normal, normal)
    order = np.argsort(-normal)
    np.testing.assert_allclose(found[order], np.arange(2, 2001) / 2000)
    fresh = anomaly.p_values(np.random.default_rng(1).normal(size=4000), normal)
    for level in (0.05, 0.5):
        assert np.mean(fresh <= level) == pytest.approx(level, abs=0.03)


def test_evaluation_counts_pairs_and_false_alarms():
    rng = np.random.default_rng(0)
    anomalous = rng.random(500) < 0.3
    scores = rng.normal(size=500) + anomalous
    found = anomaly.evaluate(scores, anomalous)
    pairs = scores[anomalous][:, None] - scores[~anomalous]
    assert found["auroc"] == pytest.approx((pairs > 0).mean())
    threshold = np.sort(scores[anomalous])[int(0.05 * anomalous.sum())]
    assert found["fpr95"] == pytest.approx((scores[~anomalous] >= threshold).mean())
    shuffled = anomaly.evaluate(scores, rng.permutation(anomalous))
    assert shuffled["auroc"] == pytest.approx(0.5, abs=0.06)


def test_scores_that_a_run_cannot_have_are_refused(run):
    with pytest.raises(UserError, match=r"no score 'masked'.*did you mean mask"):
        anomaly.fit_score(run, "masked", None)
    model = Residual(4, 1).make(run.shape, "float32")
    other = dataclasses.replace(run, model=model)
    with pytest.raises(
        UserError, match="has no encode, which latent_density needs; it"
    ):
        anomaly.fit_score(other, "latent_density", None)


# --- scripts/score.py -----------------------------------------------------------------


def test_a_users_pictures_are_scored_beside_the_images_held_out(run, tmp_path, capsys):
    images = run.data().test.images
    labels = run.data().test.labels
    chosen = [int(np.argmax(labels == NORMAL)), int(np.argmax(labels == 0))]
    (tmp_path / "more").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "more" / "b.png"]
    for path, i in zip(paths, chosen, strict=True):
        Image.fromarray(images[i, :, :, 0]).save(path)
    script.main(run.folder, (paths[0], tmp_path / "more"), as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["picture"] for row in rows] == list(map(str, paths))
    fitted = anomaly.squared_error(run, None)
    held_out = fitted(run.data().validation.images)
    for row, i in zip(rows, chosen, strict=True):
        value = fitted(images[i : i + 1])[0]
        assert row["squared_error"] == pytest.approx(value, rel=1e-4)
        assert row["p"] == (1 + (held_out >= value).sum()) / (1 + len(held_out))
    assert rows[0]["p"] > 0.05 > rows[1]["p"]
    script.main(run.folder, (paths[0],), "latent_density")
    assert capsys.readouterr().out.endswith(f"{paths[0]}\n")


def test_pictures_that_cannot_be_scored_are_refused(run, tmp_path):
    Image.new("L", (9, 7)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("large.png", r"large\.png: 7×9 pixels, where the run's .* 8×8; --resize"),
        ("text.png", r"text\.png: no PNG"),
        ("empty", "empty holds no picture"),
        ("none.png", "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            script.main(run.folder, (tmp_path / name,))
    with pytest.raises(UserError, match="no pictures; give files, or folders"):
        script.main(run.folder, ())
    script.main(run.folder, (tmp_path / "large.png",), resize=True)
