"""Denoising: the noise, the rivals, the study, a user's own picture."""

import dataclasses

import numpy as np
import pytest
from life import small
from PIL import Image

from ae_jax import metrics
from ae_jax.data import Digits, Npz
from ae_jax.errors import UserError
from ae_jax.files import read_json
from ae_jax.models.dense import Autoencoder
from ae_jax.models.residual import Residual
from ae_jax.objectives import Denoising, Masking
from ae_jax.runs import results, study, timing
from ae_jax.runs.run import open_run
from ae_jax.runs.trainer import train_run
from ae_jax.tasks.denoising import corrupt, denoise
from ae_jax.tasks.pictures import read_picture
from experiments import _denoisers
from experiments import denoise as experiment
from experiments._denoisers import Pairs, noisy_pairs
from scripts import denoise as script

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A residual network trained on noise for two epochs; read only."""
    folder = tmp_path_factory.mktemp("residual") / "run"
    fields = {"model": Residual(8, 1), "objective": Denoising(0.2), "batch_size": 50}
    return train_run(small(folder, **fields))


# --- A run --------------------------------------------------------------------------


def test_a_runs_scores_are_of_the_noise_that_corrupt_makes(run):
    images = run.data().test.images[:30]
    noisy = corrupt(run.config.objective, images, seed=5)
    errors = metrics.squared_error(denoise(run, noisy), images / 255)
    scores = run.scores(images, seed=5)["denoising_mse"]
    np.testing.assert_allclose(scores, errors, rtol=1e-5)
    assert errors.mean() < metrics.squared_error(noisy, images / 255).mean()
    assert not np.array_equal(noisy, corrupt(run.config.objective, images, seed=6))


def test_an_image_of_another_size_is_denoised_as_its_parts_are(run):
    image = RNG.random((1, 40, 36, 1)).astype(np.float32)
    whole = denoise(run, image)
    assert whole.shape == image.shape
    # The network sees 13 pixels around at most.
    np.testing.assert_allclose(
        denoise(run, image[:, :30, 4:])[:, :16, 14:], whole[:, :16, 18:], rtol=1e-5
    )


def test_a_run_trained_for_something_else_is_refused(finished_run):
    with pytest.raises(UserError, match="run: its objective adds no noise, so it was"):
        denoise(finished_run, finished_run.data().test.images)


def test_images_that_do_not_fit_are_refused(run, finished_run):
    dense = dataclasses.replace(finished_run, config=run.config, _functions={})
    dense = dataclasses.replace(
        dense,
        config=dataclasses.replace(run.config, model=finished_run.config.model),
    )
    for of, shape in ((dense, (1, 9, 8, 1)), (run, (1, 8, 8, 3)), (run, (8, 8))):
        with pytest.raises(UserError, match="takes images of 8×8×1 pixels, got"):
            denoise(of, np.zeros(shape, np.uint8))


def test_an_image_beyond_memory_is_refused(run, monkeypatch):
    monkeypatch.setattr("ae_jax.devices.memory_bytes", lambda: 10_000)
    with pytest.raises(UserError, match=r"an image of 64×64 pixels takes .*smaller"):
        denoise(run, np.zeros((1, 64, 64, 1), np.uint8))


# --- scripts/denoise.py ---------------------------------------------------------------


def test_a_users_picture_comes_back_clean(run, tmp_path, capsys):
    pixels = RNG.integers(0, 256, (21, 34, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noisy.png")
    script.main(run.folder, tmp_path / "noisy.png", tmp_path / "clean.png")
    assert capsys.readouterr().out == f"{tmp_path / 'clean.png'}\n"
    grey = read_picture(tmp_path / "noisy.png", channels=1)
    with Image.open(tmp_path / "clean.png") as image:
        clean = np.asarray(image)
    expected = denoise(run, grey[None])[0, :, :, 0] * 255
    np.testing.assert_allclose(clean, expected, atol=0.51)
    script.main(run.folder, tmp_path / "noisy.png", tmp_path / "a.bmp", resize=True)
    with Image.open(tmp_path / "a.bmp") as image:
        assert image.size == (8, 8)


def test_what_is_no_picture_is_refused_and_nothing_is_written(run, tmp_path):
    (tmp_path / "text.png").write_text("mine")
    Image.new("L", (9, 9)).save(tmp_path / "grey.png")
    for name, output, message in (
        ("text.png", "a.png", r"text\.png: no PNG, JPEG"),
        ("none.png", "a.png", r"none\.png: No such file"),
        (".", "a.png", "not a file"),
        ("grey.png", "a.xyz", r"a\.xyz: no format of pictures ends in '\.xyz'"),
        ("grey.png", "a", "no format of pictures ends in ''; try .png"),
    ):
        with pytest.raises(UserError, match=message):
            script.main(run.folder, tmp_path / name, tmp_path / output)
        assert not (tmp_path / output).exists()


# --- The rivals -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs():
    """Digits with Gaussian noise: for fitting, and others."""
    images = Digits().load().train_images
    noise = Denoising(sigma=0.2)
    return noisy_pairs(noise, images[:1000], 1), noisy_pairs(noise, images[1000:], 2)


def psnr(denoise, pairs):
    return _denoisers.score(denoise, pairs)["psnr_db"]


def test_a_score_is_the_mean_over_images_and_its_interval(pairs):
    found = _denoisers.score(lambda noisy: noisy - 0.5, pairs[1])
    recon = np.clip(pairs[1].noisy - 0.5, 0, 1)
    mse = np.square(recon - pairs[1].clean).mean(axis=(1, 2))
    each = -10 * np.log10(mse)
    assert found["psnr_db"] == pytest.approx(each.mean(), rel=1e-6)
    half = 1.96 * each.std(ddof=1) / len(each) ** 0.5
    assert found["psnr_db_half"] == pytest.approx(half, rel=1e-6)
    assert found["ssim"] < 1
    assert found["seconds"] > 0


def test_pca_of_full_rank_changes_nothing_and_wiener_without_noise_neither(pairs):
    train, test = pairs
    for filtered in (
        _denoisers.pca(train, rank=64)(test.noisy),
        _denoisers.pca_wiener(train, 1e-6)(test.noisy),
    ):
        found = filtered[:, 1:-1, 2:-2]  # at the edges digits are black
        np.testing.assert_allclose(found, test.noisy[:, 1:-1, 2:-2], atol=2e-3)


def test_a_mixture_of_one_is_wieners_filter(pairs):
    train, test = pairs
    one = _denoisers.mixture(train, sigma=0.3, parts=1)(test.noisy)
    wiener = _denoisers.pca_wiener(train, 0.3)(test.noisy)
    np.testing.assert_allclose(
        one, wiener, atol=2e-3
    )  # the least variances are left out


def test_the_linear_map_is_ridge_regression(pairs):
    from sklearn.linear_model import Ridge

    train, test = pairs
    rows = [x.reshape(len(x), -1).astype(np.float64) for x in train]
    ridge = Ridge(alpha=1e-2 * len(rows[0])).fit(rows[1], rows[0])
    expected = ridge.predict(test.noisy.reshape(len(test.noisy), -1))
    found = _denoisers.linear_map(train, ridge=1e-2)(test.noisy)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-3)


def test_the_mean_by_likeness_is_the_posterior_mean(pairs):
    train, test = pairs
    found = _denoisers.kernel_average(train, sigma=0.3)(test.noisy[:3])
    for noisy, mean in zip(test.noisy[:3], found, strict=True):
        distances = np.square(train.clean - noisy).sum(axis=(1, 2), dtype=np.float64)
        weights = np.exp(-(distances - distances.min()) / (2 * 0.3**2))
        expected = np.tensordot(weights / weights.sum(), train.clean, axes=1)
        np.testing.assert_allclose(mean, expected, atol=1e-4)


def test_the_tables_hold_the_mean_of_what_had_the_value():
    clean = np.zeros((4, 1, 2), np.float32)
    clean[:, 0, 0], clean[:, 0, 1] = [0, 0.5, 1, 1], [1, 1, 1, 0.6]
    train = Pairs(clean, np.ones_like(clean))
    noisy = np.ones((1, 1, 2), np.float32)
    found = _denoisers.table(train, by_position=True)(noisy)[0, 0]
    np.testing.assert_allclose(found, [0.625, 0.9], atol=1e-3)
    found = _denoisers.table(train, by_position=False)(noisy)[0, 0]
    np.testing.assert_allclose(found, 0.7625, atol=1e-3)
    # A value that was never seen is left as it is.
    dark = _denoisers.table(train, by_position=True)(np.zeros_like(noisy))
    np.testing.assert_allclose(dark, 0)


def test_a_patch_is_what_lies_around_a_pixel_and_where():
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 4) + 1
    found = _denoisers.patches(images, 3, np.array([12 + 5]))  # of the second image
    assert found[0].tolist() == [*range(13, 16), *range(17, 20), *range(21, 24), 1, 1]
    corner = _denoisers.patches(images, 3)[0]
    assert corner.tolist() == [0, 0, 0, 0, 1, 2, 0, 5, 6, 0, 0]


def test_trees_beat_what_they_are_given(pairs):
    train, test = pairs
    trees = _denoisers.boosted(train, size=3, trees=30, pixels=10_000)
    given = _denoisers.linear_map(train, ridge=1e-3)
    assert psnr(trees, test) > psnr(given, test) + 0.5


def test_biharmonic_inpainting_is_given_the_mask_and_changes_nothing_else():
    images = Digits().load().train_images[:5]
    clean, noisy = _denoisers.masked_pairs(Masking(0.5), images, 3)
    plain = noisy_pairs(Masking(0.5), images, 3).noisy
    seen = ~np.isnan(noisy)
    np.testing.assert_array_equal(noisy[seen], clean[seen])
    assert not plain[~seen].any()
    assert 0.4 < seen.mean() < 0.6
    found = _denoisers.biharmonic(Pairs(clean, noisy))(noisy)
    np.testing.assert_allclose(found[seen], clean[seen], atol=1e-6)
    assert psnr(lambda _: found, Pairs(clean, noisy)) > psnr(
        lambda _: plain, Pairs(clean, noisy)
    )


# --- What it costs --------------------------------------------------------------------


def test_a_steps_operations_are_six_for_each_weight_and_image(tmp_path):
    config = small(tmp_path, model=Autoencoder((64,), 8), batch_size=200)
    weights, first = 2 * (784 * 64 + 64 * 8), 784 * 64
    expected = 200 * (6 * weights - 2 * first)  # images themselves need no gradient
    found = timing.step_flops(config, 1000, (28, 28, 1))
    assert found == pytest.approx(expected, rel=0.05)


# --- The study ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The study, small; read only."""
    folder = tmp_path_factory.mktemp("denoise") / "study"
    base = dataclasses.replace(
        experiment.PRESETS["quick"],
        run_dir=folder,
        model=Residual(8, 1),
        noises=("masking_0.5",),
        tuned_epochs=(1,),
        bottleneck_epochs=1,
        num_trees=10,
        num_pixels=5000,
        num_tuning=30,
    )
    base = dataclasses.replace(
        base, train=dataclasses.replace(base.train, num_epochs=2)
    )
    summary = study.run_study("denoise", base, experiment.cells, experiment.summarise)
    return base, summary


def test_each_noise_has_its_number_of_epochs(finished):
    base, _ = finished
    base = dataclasses.replace(base, tuned_epochs=(1, 2))
    with pytest.raises(UserError, match="tuned_epochs: 2 numbers for 1 noises"):
        experiment.main(base)


def test_the_study_scores_each_way_on_the_same_noise(finished):
    base, summary = finished
    scores = summary["noises"]["masking_0.5"]
    assert set(scores) == {
        *("ours", "ours, blind", *experiment.BOTTLENECKS),
        *_denoisers.rivals(base),
    }
    test = base.data.load().test_images
    noisy = corrupt(Masking(0.5), test, base.train.seed)
    run = open_run(base.run_dir / "ours" / "masking-0.5" / "0")
    for name, recon in {"ours": run.reconstruct(noisy), "noisy image": noisy}.items():
        expected = metrics.psnr(metrics.squared_error(recon, test / 255)).mean()
        assert scores[name]["psnr_db"] == pytest.approx(expected, rel=1e-6)
    assert scores["ours"]["parameters"] == run.num_params
    assert run.config.train.init_from == base.run_dir / "blind" / "0"
    blind, tutorial = (
        open_run(base.run_dir / name / "0")
        for name in ("blind", "the-tutorial-s-net/masking-0.5")
    )
    assert tutorial.config.objective == Masking(0.5) == run.config.objective
    assert blind.config.objective == base.objective
    assert summary["train_gflop"] > 0
    for name in ("denoised.png", "denoise_sigma.png"):
        assert (base.run_dir / name).exists()


def test_the_scores_of_rivals_are_kept_for_a_study_that_is_resumed(
    finished, monkeypatch
):
    base, summary = finished
    (base.run_dir / "summary.json").unlink()
    monkeypatch.setattr(_denoisers, "score_rivals", None)
    again = study.run_study("denoise", base, experiment.cells, experiment.summarise)
    kept = read_json(base.run_dir / "rivals" / "masking_0.5.json")
    for name, row in again["noises"]["masking_0.5"].items():
        assert row["psnr_db"] == summary["noises"]["masking_0.5"][name]["psnr_db"]
        assert (name in kept) == ("parameters" not in row)


def test_the_tables_mark_ours_and_the_best_rival(finished):
    noises = finished[1]["noises"]
    psnr, ssim = experiment.tables(noises)
    best = experiment.best_rival(noises["masking_0.5"])
    rivals = {k: v for k, v in noises["masking_0.5"].items() if "parameters" not in v}
    assert rivals[best]["psnr_db"] == max(row["psnr_db"] for row in rivals.values())
    bold = [row[0] for row in psnr["rows"] if row[1].startswith("**")]
    assert bold == ["ours", best]
    row = noises["masking_0.5"]["ours"]
    assert psnr["rows"][0] == [
        "ours",
        f"**{row['psnr_db']:.2f} ± {row['psnr_db_half']:.2f}**",
        f"{1000 * row['seconds']:.2g}",
        f"{row['parameters']:,}",
    ]
    assert "| masking 0.5" in results.to_markdown(ssim)


def test_without_its_extra_the_study_does_not_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-image is not installed; .*\[rivals\]"):
        experiment.main(experiment.PRESETS["quick"])


@pytest.mark.parametrize(
    ("images", "held_out", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), 1, "data: the rivals take grey images; set"),
        (np.zeros((4, 8, 8, 1), np.uint8), 0, r"data\.num_validation: 0, but the riva"),
    ],
)
def test_images_that_the_rivals_cannot_take_are_refused(
    tmp_path, images, held_out, message
):
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    source = Npz(dir=tmp_path, source=tmp_path / "images.npz", num_validation=held_out)
    base = dataclasses.replace(
        experiment.PRESETS["quick"], data=source, run_dir=tmp_path / "study"
    )
    with pytest.raises(UserError, match=message):
        experiment.main(base)
    assert not (tmp_path / "study").exists()
