"""How well do thirty numbers keep an image, beside the deep autoencoder of 2006?

The autoencoder of Hinton and Salakhutdinov, 784-1000-500-250-30 and back, with a linear
latent: the benchmark on which ways to train deep networks were compared for years. It
is trained by what came since: GELU, AdamW, and images shifted by up to a pixel. Beside
it stand the published numbers and rivals that are no networks, each with thirty numbers
an image. A net with a latent of two units shows the plane of the digits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from ae_jax import cli, config, data
from ae_jax.config import TrainConfig
from ae_jax.data import Digits, Mnist
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_arrays, write_json
from ae_jax.models.dense import Autoencoder
from ae_jax.options import Count, options
from ae_jax.runs import results, study, timing
from ae_jax.runs.results import Table
from ae_jax.runs.run import open_run
from ae_jax.runs.study import Cell, Rows, Study
from ae_jax.train import scale
from experiments import _encoders

OURS = "ours"
PUBLISHED = {
    "autoencoder, pretrained, 2006": 3.00,
    "autoencoder, Hessian-free, 2010": 2.28,
    "logistic PCA, 2006": 8.01,
    "PCA, 2006": 13.87,
}
"""Squared errors on MNIST's test split with thirty numbers: Hinton and Salakhutdinov,
"Reducing the dimensionality of data with neural networks", Science 313 (2006); Martens,
"Deep learning via Hessian-free optimization", ICML 2010."""

NUM_SHOWN, NUM_TRAIN = 10, 10_000
"""Test images in the figure; training images whose error stands beside theirs."""


@options
class Deep(Study):
    """The run with a latent as wide as the model says; that of two differs in it."""

    model: Any = config.section(
        lambda: Autoencoder(
            hidden=(1000, 500, 250),
            latent_dim=30,
            activation="gelu",
            latent_activation="none",
            init="he",
        )
    )
    train: TrainConfig = config.section(
        lambda: TrainConfig(
            num_epochs=300,
            batch_size=200,
            learning_rate=2e-3,
            schedule="cosine",
            weight_decay=0.1,
            shift=1,
        )
    )
    num_seeds: study.NumSeeds = dataclasses.field(
        default=1, metadata={"resume": "raise"}
    )
    """Runs of each net, whose errors are averaged; may be raised later."""
    plane_epochs: Count = 40
    """Epochs of the net with two units."""
    num_tuning: Count = 10_000
    """Training images held out to choose the settings of the rivals."""


PRESETS = {
    "reference": Deep(),
    "quick": Deep(
        data=Digits(),
        model=dataclasses.replace(Deep().model, hidden=(250, 125, 60), latent_dim=8),
        train=TrainConfig(num_epochs=100, schedule="cosine", weight_decay=0.01),
        plane_epochs=100,
        num_tuning=400,
    ),
    "long": Deep(train=dataclasses.replace(Deep().train, num_epochs=2000), num_seeds=3),
}


def cells(base: Deep, done: Mapping[str, Rows]) -> dict[str, Cell]:
    """The deep net, and that with a latent of two units."""
    model = dataclasses.replace(base.model, latent_dim=2)
    train = dataclasses.replace(base.train, num_epochs=base.plane_epochs)
    plane = dataclasses.replace(base, model=model, train=train)
    return {"deep": Cell(base, base.num_seeds), "plane": Cell(plane, base.num_seeds)}


def summarise(base: Deep, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """The errors of all ways to keep an image, what the planes separate, the figures.

    Returns:
        ``errors``: ``test`` and ``train`` squared error by way, the ``setting`` of a
        rival, and the ``parameters`` of a network; ``planes``: by way and number of
        neighbours; ``train_gflop``: of all runs.
    """
    dataset = data.load(base.data)
    test = dataset.test.images[:]
    rivals, shown = kept_rivals(base, dataset)
    runs = [open_run(row["run_dir"]) for row in rows["deep"]]
    seen = dataset.train.images[:NUM_TRAIN]
    ours = {
        "test": float(np.mean([sse(run.reconstruct, test) for run in runs])),
        "train": float(np.mean([sse(run.reconstruct, seen) for run in runs])),
        "parameters": runs[0].num_params,
    }
    errors = {OURS: ours} | rivals
    best = best_rival(errors)
    pictures = {
        "Original images": test[:NUM_SHOWN] / 255,
        f"Ours: {ours['test']:.2f}": runs[0].reconstruct(test[:NUM_SHOWN]),
    }
    for name in dict.fromkeys((best, "PCA")):
        pictures[f"{name}: {rivals[name]['test']:.2f}"] = shown[name]
    plane = open_run(rows["plane"][0]["run_dir"]).encode(test)
    planes = {OURS: plane} | rival_planes(dataset)
    draw(base, pictures, planes, dataset.test.labels)
    return {
        "errors": errors,
        "planes": {k: accuracies(z, dataset.test.labels) for k, z in planes.items()},
        "train_gflop": timing.train_gflop(rows),
    }


def sse(reconstruct: Callable[[Any], Any], images: Any) -> float:
    """Squared error, summed over the pixels of an image, the mean over the images."""
    recon = reconstruct(images).reshape(len(images), -1)
    return _encoders.squared_error(recon, rows_of(images))


def rows_of(images: Any) -> Float[np.ndarray, "N D"]:
    """Stored images as rows of pixels in [0, 1]."""
    return scale(images, np.float32).reshape(len(images), -1)


def kept_rivals(base: Deep, dataset: data.Dataset) -> tuple[dict[str, Any], Any]:
    """The errors of the rivals, and what they make of the images that are shown.

    They are kept in ``run_dir``, so that this resumes too.
    """
    path = base.run_dir / "rivals.json"
    if not path.exists():
        train, test = rows_of(dataset.train.images[:]), rows_of(dataset.test.images[:])
        found, shown = {}, {}
        for name, rival in _encoders.RIVALS.items():
            print(f"{name} …", flush=True)
            size = base.model.latent_dim, base.num_tuning
            reconstruct, setting = _encoders.fit_best(rival, train, *size)
            recon = reconstruct(test)
            seen = train[:NUM_TRAIN]
            found[name] = {
                "test": _encoders.squared_error(recon, test),
                "train": _encoders.squared_error(reconstruct(seen), seen),
                "setting": setting,
            }
            shown[name] = recon[:NUM_SHOWN].reshape(-1, *dataset.shape)
        write_arrays(path.with_suffix(".npz"), shown)
        write_json(path, found)
    with np.load(path.with_suffix(".npz")) as file:
        return read_json(path), dict(file)


def best_rival(errors: Mapping[str, Any]) -> str:
    """The rival of the lowest error on the test split; a network is none."""
    rivals = {name for name, row in errors.items() if "parameters" not in row}
    return min(rivals, key=lambda name: errors[name]["test"])


# --- Planes ---------------------------------------------------------------------------


def rival_planes(dataset: data.Dataset) -> dict[str, Float[np.ndarray, "N 2"]]:
    """The test images in two dimensions, by PCA of training images and by t-SNE.

    Source:
        van der Maaten and Hinton, "Visualizing data using t-SNE", JMLR 9 (2008). It has
        no encoder: it is fitted to the very images that it shows.
    """
    from sklearn.manifold import TSNE

    train, test = (rows_of(part.images[:]) for part in (dataset.train, dataset.test))
    print("t-SNE …", flush=True)
    nearby = TSNE(init="pca", random_state=0, n_jobs=-1).fit_transform(test)
    return {"PCA": _encoders.fit_plane(train, 2).encode(test), "t-SNE": nearby}


def accuracies(
    latents: Float[np.ndarray, "N K"], labels: Integer[np.ndarray, " N"]
) -> dict[str, float]:
    """Share of images whose class most of their 1 and 5 nearest others have."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=5).fit(latents).kneighbors()[1]
    found = {}
    for number in (1, 5):
        votes = [np.bincount(each).argmax() for each in labels[nearest[:, :number]]]
        found[str(number)] = float(np.mean(votes == labels))
    return found


# --- What is shown --------------------------------------------------------------------


def draw(
    base: Deep,
    pictures: Mapping[str, Any],
    planes: Mapping[str, Float[np.ndarray, "N 2"]],
    labels: Integer[np.ndarray, " N"],
) -> None:
    """Images as each way keeps them; the planes side by side."""
    from ae_jax import plots  # not before: matplotlib takes half a second

    plots.save(plots.image_rows(pictures), base.run_dir / "deep.png")
    plots.save(plots.planes(planes, labels), base.run_dir / "deep_planes.png")


def tables(base: Deep, summary: Mapping[str, Any]) -> list[Table]:
    """The errors of all ways to keep an image, and what the planes separate."""
    errors, rows = summary["errors"], list[list[str]]()
    for name in sorted(errors, key=lambda name: errors[name]["test"]):
        row, bold = errors[name], "**" * (name in (OURS, best_rival(errors)))
        numbers = [f"{bold}{row[split]:.2f}{bold}" for split in ("test", "train")]
        size = row.get("parameters")
        rows.append([name, *numbers, f"{size:,}" if size else "–"])
    if isinstance(base.data, Mnist) and base.model.latent_dim == 30:
        for name, value in PUBLISHED.items():
            rows.append([f"{name}, published", f"{value:.2f}", "–", "–"])
    width = base.model.latent_dim
    kept: Table = {
        "title": f"Squared error of an image, {width} numbers each",
        "columns": ["", "test", "training", "parameters"],
        "rows": rows,
        "caption": "Summed over the pixels, the mean over the test images and over "
        f"{NUM_TRAIN:,} training images as they are. Bold: ours and the best rival.",
    }
    plane: Table = {
        "title": "Test images in the plane: whose nearest others are of their class",
        "columns": ["", "1 neighbour", "most of 5"],
        "rows": [
            [name, *(f"{row[number]:.1%}" for number in ("1", "5"))]
            for name, row in summary["planes"].items()
        ],
        "caption": "t-SNE was fitted to the test images themselves.",
    }
    return [kept, plane]


def main(base: Deep) -> None:
    """Run the study in ``run_dir``, or resume it there.

    Raises:
        UserError: see :func:`check` and :func:`study.run_study`.
    """
    check(base)
    summary = study.run_study("deep", base, cells, summarise)
    shown = tables(base, summary)
    print("\n".join(map(results.to_markdown, shown)))
    errors = summary["errors"]
    rival = errors[best_rival(errors)]["test"]
    headline: dict[str, int | float] = {
        "test_sse": errors[OURS]["test"],
        "train_sse": errors[OURS]["train"],
        "rival_test_sse": rival,
        "train_gflop": summary["train_gflop"],
    }
    if study.is_reference(base, PRESETS):
        study.keep_result("deep", base, headline, shown)


def check(base: Deep) -> None:
    """Refuse what this study cannot do, before anything is trained.

    Raises:
        UserError: the model has no latent, or too many images are held out.
    """
    dataset = data.load(base.data)
    if not hasattr(base.model, "latent_dim"):
        raise UserError("model.name: this needs a model with a latent; choose another")
    num_train = len(dataset.train.labels)
    if base.num_tuning >= num_train // 2:
        raise UserError(
            f"num_tuning: {base.num_tuning} of {num_train} training images; hold out "
            "less than half"
        )


if __name__ == "__main__":
    cli.run_experiment("deep", PRESETS, __doc__, main)
