"""The study of generators: its rivals, its judge, and what it writes."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from ae_jax.data import Digits, Npz
from ae_jax.errors import UserError
from ae_jax.models.dense import Autoencoder
from ae_jax.models.made import Made
from ae_jax.models.variational import Variational
from ae_jax.objectives import Denoising, Elbo
from ae_jax.runs import results, study
from ae_jax.runs.run import open_run
from ae_jax.tasks import generation
from experiments import _generators
from experiments import generate as experiment

QUICK = experiment.PRESETS["quick"]
RNG = np.random.default_rng(0)


# --- The mixture of Bernoullis --------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Black and white, to fit and held out."""
    images = generation.binarised(Digits().load().train_images, 1)
    rows = images.reshape(len(images), -1)
    return rows[:1000], rows[1000:]


def test_the_likelihoods_of_all_images_sum_to_one():
    weights = np.array([0.2, 0.5, 0.3], np.float32)
    mixture = _generators.Mixture(weights, RNG.random((3, 6)).astype(np.float32))
    every = np.array([*itertools.product((0.0, 1.0), repeat=6)], np.float32)
    assert np.exp(-mixture.nats(every)).sum() == pytest.approx(1, rel=1e-5)
    given = np.where(every[5] > 0, mixture.white, 1 - mixture.white).prod(axis=1)
    assert mixture.nats(every)[5] == pytest.approx(-np.log(weights @ given), rel=1e-5)
    assert mixture.num_params == 2 + 18


def test_a_round_of_em_never_makes_what_it_maximises_smaller(digits):
    rows, _ = digits
    mean = rows.mean(axis=0).clip(1e-3, 1 - 1e-3)
    white = (0.25 + 0.5 * rows[:30]).astype(np.float32)
    mixture = _generators.Mixture(np.full(30, 1 / 30, np.float32), white)

    def objective(mixture):
        """The likelihood, and that of one mean image more in each part."""
        odds = mean * np.log(mixture.white) + (1 - mean) * np.log1p(-mixture.white)
        return -mixture.nats(rows).sum() + odds.sum() + np.log(mixture.weights).sum()

    values = []
    for _ in range(8):
        mixture = _generators.maximise(mixture, rows)
        values.append(objective(mixture))
    assert (np.diff(values) > -0.5).all()  # rounding; the first step gains thousands
    assert values[-1] > values[0] + 500
    assert mixture.weights.sum() == pytest.approx(1, rel=1e-5)


def test_the_number_of_parts_is_what_suits_images_held_out(digits):
    rows, held_out = digits
    fitted = {
        size: _generators.fit_mixture(rows, held_out, size, 0)[0]
        for size in (1, 10, 50)
    }
    nats = {size: one.nats(held_out).mean() for size, one in fitted.items()}
    best = _generators.fit_best_mixture(rows, held_out, (1, 10, 50, 5000), 0)
    assert len(best.weights) == min(nats, key=nats.get)
    assert nats[1] > nats[10] + 1
    one = rows.mean(axis=0).clip(1e-3, 1 - 1e-3)
    np.testing.assert_allclose(fitted[1].white[0], one, atol=2e-3)


def test_samples_of_the_mixture_are_its_parts_as_often_as_they_weigh():
    mixture = _generators.Mixture(
        np.array([0.7, 0.3], np.float32), np.array([[0.1], [0.9]], np.float32)
    )
    drawn = mixture.sample(4000, 3)
    assert np.mean(drawn > 0.5) == pytest.approx(0.3, abs=0.03)
    np.testing.assert_array_equal(drawn, mixture.sample(4000, 3))


# --- The judge ------------------------------------------------------------------------


def test_the_features_are_the_hidden_layer_of_a_classifier(digits):
    from sklearn.linear_model import LogisticRegression

    rows, held_out = digits
    labels = Digits().load().train_labels
    features = _generators.fit_features(rows, labels[:1000], 60)
    hidden = features(held_out)
    assert hidden.shape == (len(held_out), 100)
    assert hidden.min() == 0
    linear = LogisticRegression(max_iter=1000).fit(features(rows), labels[:1000])
    assert linear.score(hidden, labels[1000:]) > 0.75


def test_the_nearest_known_image_of_a_known_one_is_itself(digits):
    rows, _ = digits
    found = _generators.nearest(rows[7:10] * 0.9, rows)
    np.testing.assert_array_equal(rows[found], rows[7:10])


# --- The study ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study, small; read only."""
    base = dataclasses.replace(
        QUICK,
        run_dir=tmp_path_factory.mktemp("generate") / "study",
        model=Variational(hidden=(20,), latent_dim=5),
        objective=Elbo(num_samples=3),
        train=dataclasses.replace(QUICK.train, num_epochs=4),
        made=Made((30,)),
        vae_epochs=3,
        made_epochs=2,
        plain_epochs=2,
        bound_samples=20,
        num_judged=100,
        num_seeds=2,
    )
    summary = study.run_study("generate", base, experiment.cells, experiment.summarise)
    return base, summary


def test_the_runs_differ_in_what_they_are_compared_by(finished):
    base, _ = finished
    found = {
        name: open_run(base.run_dir / study.slug(name) / "1").config
        for name in experiment.cells(base, {})
    }
    ours, one = found[experiment.OURS], found[experiment.VAE]
    assert (ours.model, ours.objective) == (base.model, Elbo(3))
    assert (one.model, one.objective) == (base.model, Elbo(1))
    assert one.train.num_epochs == 3
    plane = found[experiment.PLANE]
    assert plane.model == dataclasses.replace(base.model, latent_dim=2)
    assert plane.objective == Elbo(1)
    assert found[experiment.MADE].model == base.made
    assert isinstance(found[experiment.PLAIN].model, Autoencoder)
    assert {one.data for one in found.values()} == {base.data}


def test_nats_are_of_the_seeds_black_and_white_test_images(finished):
    base, summary = finished
    test = Digits().load().test_images
    for name in (experiment.OURS, experiment.MADE):
        each = [
            generation.nats(
                open_run(base.run_dir / name.lower() / str(seed), "best"), test, 20, 0
            )
            for seed in (0, 1)
        ]
        mean = np.mean(each, axis=0)
        row = summary["ways"][name]
        assert row["nats"] == pytest.approx(mean.mean(), rel=1e-5)
        error = mean.std(ddof=1) / len(mean) ** 0.5
        assert row["error"] == pytest.approx(error, rel=1e-4)
        assert row.get("bounded", False) == (name == experiment.OURS)
    with np.load(base.run_dir / "ways" / "mixture.npz") as kept:
        nats = summary["ways"][experiment.MIXTURE]["nats"]
        assert nats == pytest.approx(kept["nats"].mean(), rel=1e-5)
    assert "nats" not in summary["ways"][experiment.PLAIN]
    assert summary["train_gflop"] > 0


def test_training_images_are_judged_to_be_what_they_are(finished):
    _, summary = finished
    ways = summary["ways"]
    assert all({"precision", "recall"} <= set(row) for row in ways.values())
    ideal = ways[experiment.TRAINING]
    ours = ways[experiment.OURS]
    assert ideal["precision"] > ours["precision"] + 0.3  # which has hardly learnt
    assert set(ideal) == {"precision", "recall"}


def test_what_was_computed_is_kept_for_a_study_that_is_resumed(finished, monkeypatch):
    base, summary = finished
    (base.run_dir / "summary.json").unlink()
    monkeypatch.setattr(generation, "nats", None)
    monkeypatch.setattr(generation, "sample", None)
    monkeypatch.setattr(_generators, "fit_best_mixture", None)
    again = study.run_study("generate", base, experiment.cells, experiment.summarise)
    assert again["ways"] == summary["ways"]


def test_the_figures_are_drawn(finished):
    base, _ = finished
    for name in ("generated", "generated_nearest", "generated_plane"):
        with Image.open(base.run_dir / f"{name}.png") as image:
            assert min(image.size) >= 160


def test_the_table_is_sorted_and_marks_ours_and_the_best_rival(finished):
    base, summary = finished
    (table,) = experiment.tables(base, summary)
    ways = summary["ways"]
    known = [row[0] for row in table["rows"] if row[1] != "–"]
    assert known == sorted(known, key=lambda name: ways[name]["nats"])
    assert {row[0] for row in table["rows"]} == set(ways)
    bold = {row[0] for row in table["rows"] if row[1].startswith("**")}
    rivals = (experiment.MADE, experiment.MIXTURE)
    assert bold == {experiment.OURS, min(rivals, key=lambda k: ways[k]["nats"])}
    signs = {row[0] for row in table["rows"] if "≤" in row[1]}
    assert signs == {experiment.OURS, experiment.VAE}
    assert "| IWAE" in results.to_markdown(table)
    of_mnist = experiment.tables(experiment.PRESETS["reference"], summary)[0]["rows"]
    assert ["VAE, 2016, published", "86.76", *["–"] * 4] in of_mnist


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": Digits()}, r"data\.num_validation: 0, but checkpoints and the mix"),
        ({"model": Autoencoder()}, r"model\.name, objective\.name: this study is of"),
        ({"objective": Denoising()}, "this study is of variational and elbo; train"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused_before_anything_is_written(
    change, message, tmp_path
):
    base = dataclasses.replace(QUICK, run_dir=tmp_path / "study", **change)
    with pytest.raises(UserError, match=message):
        experiment.main(base)
    assert not base.run_dir.exists()


def test_images_without_labels_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=RNG.integers(0, 256, (90, 8, 8, 1), np.uint8))
    source = Npz(dir=tmp_path, source=tmp_path / "a.npz", num_validation=20)
    base = dataclasses.replace(QUICK, run_dir=tmp_path / "study", data=source)
    with pytest.raises(UserError, match="data: its images have one label, and a class"):
        experiment.main(base)
