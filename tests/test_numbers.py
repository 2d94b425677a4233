"""Every number that a run writes, computed again from its data with NumPy alone."""

import json
import math

import jax
import numpy as np
import pytest
from life import count_seconds, small

from ae_jax import metrics, models, weights
from ae_jax.config import CheckpointConfig
from ae_jax.data import Npz
from ae_jax.keys import Purpose, key_for
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Reconstruction
from ae_jax.runs import folder, report
from ae_jax.runs.trainer import train_run

TRAIN, BATCH, STEPS, EPOCHS = 1336, 300, 5, 3  # the last batch holds 136
SEED = 1  # of which one or two units die, and one lives
LAYERS = [f"{half}_{i}" for half in ("encoder", "decoder") for i in range(3)]

OPTIONS = {
    "mse": {"schedule": "cosine"},
    "bce": {
        "schedule": "cosine",
        "warmup_steps": 4,
        "weight_decay": 0.3,
        "clip_norm": 0.05,
    },
}
"""How the run of each loss is trained, beside a learning rate of 0.02."""


@pytest.fixture(scope="module", params=OPTIONS)
def loss(request):
    return request.param


@pytest.fixture(scope="module")
def run(loss, tmp_path_factory):
    """A float64 run of 3 epochs of 5 steps, each of which takes a second; read only."""
    with pytest.MonkeyPatch.context() as patch:
        count_seconds(patch)
        config = small(
            tmp_path_factory.mktemp("numbers") / "run",
            objective=Reconstruction(loss),
            precision="float64",
            batch_size=BATCH,
            num_epochs=EPOCHS,
            learning_rate=0.02,
            checkpoint=CheckpointConfig(every_steps=2, keep=9),
            seed=SEED,
            **OPTIONS[loss],
        )
        return train_run(config)


# --- The net, its gradient and Adam -------------------------------------------------


def as_numpy(params):
    return {
        f"{layer}.{kind}": np.asarray(params[layer][kind])
        for layer in LAYERS
        for kind in ("kernel", "bias")
    }


def forward(p, x):
    """The input of each layer of 64-16-8-3-8-16-64, and the last one's output."""
    values = [x.reshape(len(x), -1) / 255]
    for name in LAYERS:
        y = values[-1] @ p[f"{name}.kernel"] + p[f"{name}.bias"]
        last = name == LAYERS[-1]
        values.append(1 / (1 + np.exp(-y)) if last else np.maximum(y, 0))
    return values


def losses(p, x):
    """Of each image, by name."""
    values = forward(p, x)
    target, recon = values[0], values[-1]
    cross = target * np.log(recon) + (1 - target) * np.log1p(-recon)
    error = np.square(recon - target)
    return {"mse": error.mean(axis=1), "bce": -cross.mean(axis=1)}


def gradient(p, x, loss):
    """Of the batch's mean loss, by hand."""
    values, found = forward(p, x), {}
    out = values[-1]
    delta = (out - values[0]) / out.size
    if loss == "mse":
        delta = delta * 2 * out * (1 - out)
    for i, name in reversed([*enumerate(LAYERS)]):
        found[f"{name}.kernel"] = values[i].T @ delta
        found[f"{name}.bias"] = delta.sum(axis=0)
        delta = delta @ p[f"{name}.kernel"].T * (values[i] > 0)
    return found


def rate(step, rise=0):
    """The learning rate of a step: up for so many, then half a cosine to the end."""
    if step < rise:
        return 0.02 * step / rise
    done = (step - rise) / (EPOCHS * STEPS - rise)
    return 0.01 * (1 + math.cos(math.pi * done))


def batches(seed, images):
    """All steps' images: each epoch holds each once, in the documented order."""
    for epoch in range(EPOCHS):
        key = jax.random.key(seed, impl="threefry2x32")
        key = jax.random.fold_in(jax.random.fold_in(key, 1), epoch)
        order = np.asarray(jax.random.permutation(key, TRAIN))
        yield from np.split(images[order], range(BATCH, TRAIN, BATCH))


def replay(p, images, loss, **options):
    """Each step's metrics, and the parameters after it, of Adam written out."""
    first, second = ({k: np.zeros_like(v) for k, v in p.items()} for _ in range(2))
    decay, limit = options.get("weight_decay", 0), options.get("clip_norm", math.inf)
    for step, x in enumerate(batches(SEED, images)):
        means = {name: values.mean() for name, values in losses(p, x).items()}
        found = gradient(p, x, loss)
        norm = math.sqrt(sum(np.square(g).sum() for g in found.values()))
        here, new = rate(step, options.get("warmup_steps", 0)), {}
        for name, g in found.items():
            g = g * min(1, limit / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            root = np.sqrt(second[name] / (1 - 0.999 ** (step + 1)))
            new[name] = p[name] - here * (mean / (root + 1e-8) + decay * p[name])
        p = new
        yield {**means, "grad_norm": norm, "learning_rate": here}, p


@pytest.fixture(scope="module")
def replayed(run, loss):
    with jax.enable_x64(True):
        key = key_for(SEED, Purpose.INIT)
        start = models.init_params(run.model, key, (8, 8, 1), "float64")
    images = run.data().train.images
    return list(replay(as_numpy(start), images, loss, **OPTIONS[loss]))


# --- What is written ----------------------------------------------------------------


def dead_units(p, images):
    return int((forward(p, images)[3] == 0).all(axis=0).sum())


def test_metrics_jsonl_is_what_the_steps_of_each_epoch_were(run, loss, replayed):
    data, lines = run.data(), (run.folder / "metrics.jsonl").read_text().splitlines()
    names = ["mse"] if loss == "mse" else ["bce", "mse"]
    assert len(lines) == EPOCHS
    for epoch, row in enumerate(map(json.loads, lines)):
        steps = [found for found, _ in replayed[epoch * STEPS : (epoch + 1) * STEPS]]
        after = as_numpy(run.at((epoch + 1) * STEPS).params)
        held_out = losses(after, data.validation.images)
        expected = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * STEPS,
            **{f"train/{n}": np.mean([s[n] for s in steps]) for n in names},
            "train/grad_norm": np.mean([s["grad_norm"] for s in steps]),
            "train/learning_rate": steps[-1]["learning_rate"],
            **{f"val/{name}": held_out[name].mean() for name in names},
            "latent/dead_units": dead_units(after, data.train.images),
            "wall_s": STEPS,
            "images_per_s": TRAIN / STEPS,
        }
        assert row == pytest.approx(expected, rel=1e-6)
        assert list(row)[:3] == ["epoch", "step", f"train/{loss}"]
        for name, ours in replayed[(epoch + 1) * STEPS - 1][1].items():
            np.testing.assert_allclose(after[name], ours, rtol=1e-6, atol=1e-7)


def test_summary_json_is_the_last_checkpoints_score_beside_the_baselines(run, loss):
    p, data = as_numpy(run.params), run.data()
    train, test = data.train.images, data.test.images
    assert {array.dtype.name for array in p.values()} == {"float64"}
    found = losses(p, test)
    recon = forward(p, test)[-1].reshape(test.shape)
    flat, points = (x.reshape(len(x), -1) / 255 for x in (train, test))
    centred = points - flat.mean(axis=0)
    axes = np.linalg.svd(flat - flat.mean(axis=0), full_matrices=False)[2][:3]
    expected = {
        f"train/{loss}": run.metrics[-1][f"train/{loss}"],
        **({"test/bce": found["bce"].mean()} if loss == "bce" else {}),
        "test/mse": found["mse"].mean(),
        "test/psnr_db": (-10 * np.log10(found["mse"])).mean(),
        "test/ssim": metrics.ssim(recon, test / 255).mean(),
        "baseline/mean_image/test/mse": np.mean(centred**2),
        "baseline/pca/test/mse": np.mean((centred - centred @ axes.T @ axes) ** 2),
        "latent/dead_units": dead_units(p, test),
        "latent/collapsed": dead_units(p, test) == 3,
        "checkpoint_step": EPOCHS * STEPS,
        "steps": EPOCHS * STEPS,
        "epochs": EPOCHS,
        "stopped": False,
    }
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {k: summary[k] for k in expected} == pytest.approx(expected, rel=1e-7)
    measured = {"wall_s", "first_step_s", "peak_memory_bytes", "digest"}
    assert set(summary) - {"device_peak_bytes"} == {*expected, *measured}
    assert next(iter(summary)) == f"train/{loss}"
    assert 0 < summary["first_step_s"] < summary["wall_s"]
    assert 2e7 < summary["peak_memory_bytes"] < 1e11


def test_the_epochs_take_less_time_than_the_whole_run(finished_run):
    times = [row["wall_s"] for row in finished_run.metrics]
    wall_s = folder.read_summary(finished_run.folder)["wall_s"]
    assert 0 < max(times) < sum(times) < wall_s


def test_the_scores_are_shown_beside_their_names(run):
    summary = folder.read_summary(run.folder)
    shown = report.score_table(summary, run.config, "a remark").splitlines()
    for title, name in {
        "test, reconstructed": "test/mse",
        "test, PCA of 3 components": "baseline/pca/test/mse",
        "test, mean training image": "baseline/mean_image/test/mse",
    }.items():
        (line,) = [line for line in shown if line.startswith(f"{title} ")]
        assert line.removeprefix(title).split()[0] == f"{summary[name]:.5f}"
    assert f"test split: {summary['latent/dead_units']} of 3" in shown[-2]
    assert shown[-1] == "a remark"


def test_a_unit_that_one_training_image_of_1200_wakes_is_alive(tmp_path):
    """In the summary it is dead, for no test image wakes it."""
    train, test = np.full((1200, 4, 5), 60, np.uint8), np.full((7, 4, 5), 150, np.uint8)
    train[5] = 240
    np.savez(tmp_path / "greys.npz", train_images=train, test_images=test)
    levels = np.float32([0.9, 0.5, 0.2])  # of the mean brightness
    encoder = {"kernel": np.full((20, 3), 0.05, np.float32), "bias": -levels}
    decoder = {"kernel": np.zeros((3, 20), np.float32), "bias": np.float32([0.0] * 20)}
    state_dict = weights.to_torch({"encoder_0": encoder, "decoder_0": decoder})
    weights.write_safetensors(tmp_path / "weights.safetensors", state_dict)
    config = small(
        tmp_path / "run",
        data=Npz(tmp_path / "data", tmp_path / "greys.npz"),
        model=Autoencoder(hidden=()),
        init_from=tmp_path / "weights.safetensors",
        learning_rate=1e-30,
    )
    run = train_run(config)
    assert [row["latent/dead_units"] for row in run.metrics] == [0, 0]
    assert folder.read_summary(run.folder)["latent/dead_units"] == 1
