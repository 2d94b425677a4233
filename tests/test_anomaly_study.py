"""The study of anomalies: its tasks, its rivals, and what it writes."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ae_jax.data import Digits, Npz
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder
from ae_jax.runs import study
from ae_jax.runs.run import open_run
from ae_jax.tasks import anomaly
from experiments import _detectors
from experiments import anomaly as experiment

NORMAL = 8
QUICK = experiment.PRESETS["quick"]


# --- The rivals -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Normal images, some held out, and a few test images of all digits."""
    arrays = Digits().load()
    normal = arrays.train_images[arrays.train_labels == NORMAL] / np.float32(255)
    test = arrays.test_images[:60] / np.float32(255)
    return normal[:-20], normal[-20:], test


@pytest.mark.parametrize("name", _detectors.RIVALS)
def test_an_obvious_anomaly_scores_above_normal_images(digits, name):
    normal, held_out, _ = digits
    rival = _detectors.RIVALS[name]
    score = rival.fit(normal[: rival.limit], **rival.setting)
    stripes = np.zeros_like(held_out[:1])
    stripes[:, ::3] = 1
    assert score(stripes)[0] > score(held_out).max()


def test_a_rivals_score_is_of_each_image_by_itself(digits):
    normal, held_out, test = digits
    found = _detectors.score_rivals(normal, held_out, test)
    part = _detectors.score_rivals(normal, held_out, test[40:])
    assert set(found) == {*_detectors.RIVALS, *_detectors.SUMS}
    for name in found:
        np.testing.assert_allclose(part[name], found[name][40:], rtol=1e-3, atol=1e-4)


def test_a_sum_is_of_scores_in_units_of_the_images_held_out(digits):
    normal, held_out, test = digits
    found = _detectors.score_rivals(normal, held_out, test)
    (name, parts), total = next(iter(_detectors.SUMS.items())), 0
    for part in parts:
        rival = _detectors.RIVALS[part]
        score = rival.fit(normal, **rival.setting)
        total += (score(test) - score(held_out).mean()) / score(held_out).std()
    np.testing.assert_allclose(found[name], total, rtol=1e-3, atol=1e-4)


def test_histograms_of_gradients_are_scikit_images():
    from skimage.feature import hog

    images = np.random.default_rng(0).random((5, 30, 28, 1))
    expected = [hog(image[..., 0], 9, (4, 4), (2, 2)) for image in images]
    np.testing.assert_allclose(_detectors.gradients(images), expected, atol=1e-6)


def test_shifted_images_are_all_by_a_pixel_each_way():
    image = np.zeros((1, 5, 5, 1))
    image[0, 2, 2] = 1
    found = _detectors.shifted(image, 1)
    places = {tuple(map(int, np.argwhere(one[..., 0])[0])) for one in found}
    assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}
    np.testing.assert_array_equal(_detectors.shifted(image, 0), image)


# --- The study ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study, small, with another set of noise; read only."""
    folder = tmp_path_factory.mktemp("anomaly")
    noise = np.random.default_rng(0).integers(0, 256, (80, 8, 8, 1), np.uint8)
    np.savez(folder / "noise.npz", train_images=noise[:60], test_images=noise[60:])
    base = dataclasses.replace(
        QUICK,
        run_dir=folder / "study",
        model=Autoencoder((24,), 4, latent_activation="none", init="he"),
        train=dataclasses.replace(QUICK.train, num_epochs=40),
        classes=(NORMAL,),
        rest_epochs=3,
        cross="npz",
        cross_source=folder / "noise.npz",
    )
    with pytest.MonkeyPatch.context() as patch:
        few = {k: experiment.SCORES[k] for k in ("squared_error", "gradients")}
        patch.setattr(experiment, "SCORES", few)
        summary = study.run_study(
            "anomaly", base, experiment.cells, experiment.summarise
        )
    return base, summary


def test_auroc_comes_out_of_the_scores_that_are_kept(finished):
    base, summary = finished
    kept = np.load(base.run_dir / "scores.npz")
    rng, seen = np.random.default_rng(0), {}
    for task, name, seed, score, label in zip(
        *(kept[key] for key in ("task", "name", "seed", "score", "label")), strict=True
    ):
        there = label >= 0
        assert np.isnan(score[~there]).all()
        auroc = roc_auc_score(label[there], score[there])
        seen.setdefault((*task.split("/"), name), []).append(auroc)
        assert (seed in (0, 1)) == (name in anomaly.SCORES)
        shuffled = [
            roc_auc_score(rng.permutation(label[there]), score[there]) for _ in range(9)
        ]
        assert np.mean(shuffled) == pytest.approx(0.5, abs=0.08)
    for (kind, task, name), values in seen.items():
        expected = summary["tasks"][kind][task][name]["auroc"]
        assert np.mean(values) == pytest.approx(expected, abs=1e-12)
    assert len(seen) == sum(
        len(ways) for kinds in summary["tasks"].values() for ways in kinds.values()
    )
    table = experiment.tables(base, summary)[0]
    one = summary["tasks"]["one"][str(NORMAL)][experiment.HEADLINE]["auroc"]
    row = next(r for r in table["rows"] if r[1].startswith("**"))
    assert row[1] == f"**{one:.4f}**"
    assert experiment.headline_of(summary)["auroc_mean"] == one


def test_runs_are_trained_on_normal_images_alone(finished):
    base, summary = finished
    assert summary["tasks"]["one"][str(NORMAL)]["gradients"]["auroc"] > 0.9
    labels = {}
    for kind in ("one", "rest"):
        run = open_run(base.run_dir / kind / str(NORMAL) / "1")
        labels[kind] = set(run.data().train.labels.tolist())
    assert labels == {"one": {NORMAL}, "rest": set(range(10)) - {NORMAL}}
    for task in experiment.tasks(base)[:2]:
        images = experiment.load_images(task, 10_000)
        test = Digits().load().test_labels
        odd = test != NORMAL if task.kind == "one" else test == NORMAL
        np.testing.assert_array_equal(images.anomalous, odd)


def test_another_set_is_detected_and_detects(finished):
    base, summary = finished
    assert list(summary["tasks"]["cross"]) == ["digits", "npz"]
    for ways in summary["tasks"]["cross"].values():
        assert ways["neighbours"]["auroc"] > 0.95
    assert (
        experiment.load_images(experiment.tasks(base)[-1], 10_000).anomalous.sum()
        == 360
    )
    for name in ("anomaly_roc.png", "anomaly_images.png"):
        assert (base.run_dir / name).exists()


def test_the_scores_of_rivals_are_kept_for_a_study_that_is_resumed(
    finished, monkeypatch
):
    base, _ = finished
    task = experiment.tasks(base)[0]
    monkeypatch.setattr(_detectors, "score_rivals", None)
    kept = experiment.score_rivals(base, task, experiment.load_images(task, 10_000))
    assert {one.name for one in kept} == {*_detectors.RIVALS, *_detectors.SUMS}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": (3, 12)}, "classes: no training image has the label 12; there"),
        ({"data": Digits(classes=(1,))}, r"data\.classes: each class is normal in"),
        ({"data": Digits()}, r"data\.num_validation: 0, but scores are brought to one"),
        (
            {"data": Digits(num_validation=130)},
            "one/3: too few normal images: 1[0-9] to train on, beside 130 held out",
        ),
        ({"cross": "npz"}, "cross: images of npz are of 9×9×1 pixels, those of digits"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_trained(
    tmp_path, fields, message
):
    images = np.random.default_rng(0).integers(0, 256, (90, 9, 9, 1), np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    source = tmp_path / "images.npz"
    base = dataclasses.replace(
        QUICK, run_dir=tmp_path / "study", cross_source=source, **fields
    )
    with pytest.raises(UserError, match=message):
        experiment.main(base)
    assert not (tmp_path / "study").exists()


def test_a_set_without_labels_has_nothing_to_tell(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    source = Npz(dir=tmp_path, source=tmp_path / "images.npz", num_validation=20)
    base = dataclasses.replace(QUICK, data=source, classes=())
    with pytest.raises(UserError, match="normal: nothing is; the data set has one"):
        experiment.main(base)
