"""How likely does a variational autoencoder find new images, and how good are its own?

One latent of Gaussians, trained on the bound of one sample (VAE) and of several (IWAE),
on MNIST made black and white: afresh at each step in training, once and for all on the
test split. Beside them stand the published numbers, rivals without a latent, and the
simplest way to create images: a mixture of Gaussians on the latents of the tutorial's
kind of net. Samples are judged by precision and recall, and shown beside the training
images that are nearest to them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from ae_jax import cli, config, data
from ae_jax.config import TrainConfig
from ae_jax.data import Digits, Mnist
from ae_jax.errors import UserError
from ae_jax.files import keep_arrays
from ae_jax.models.dense import Autoencoder
from ae_jax.models.made import Made
from ae_jax.models.variational import Variational
from ae_jax.objectives import Autoregressive, Elbo, Reconstruction
from ae_jax.options import Count, options
from ae_jax.runs import results, study, timing
from ae_jax.runs.results import Table
from ae_jax.runs.run import Run, open_run
from ae_jax.runs.study import Cell, Rows, Study
from ae_jax.tasks import generation

OURS, VAE, PLANE = "IWAE", "VAE", "VAE of two units"
PLAIN, MADE = "autoencoder, mixture of Gaussians", "MADE"
MIXTURE, TRAINING = "mixture of Bernoullis", "training images"
PUBLISHED = {
    "IWAE, 50 samples, 2016": 84.78,
    "VampPrior, 2018": 85.79,
    "VAE, 2016": 86.76,
    "NADE, 2011": 88.33,
}
"""−log p of MNIST's binarised test split in nats, or its bound: Burda et al., ICLR 2016
(one stochastic layer, 5,000 samples); Tomczak and Welling, AISTATS 2018; Larochelle and
Murray, AISTATS 2011, on a binarisation of their own."""
SIZES = (20, 50, 100, 200, 500, 1000)
"""Parts of the mixture of Bernoullis that are tried."""
NUM_SHOWN, SIDE = 10, 20
"""Samples in a row of a figure; images along a side of the plane's."""


@options
class Generate(Study):
    """The run that is trained on several samples; the others differ as below."""

    data: Any = config.section(lambda: Mnist(num_validation=5000))
    model: Any = config.section(Variational)
    objective: Any = config.section(lambda: Elbo(num_samples=8))
    train: TrainConfig = config.section(
        lambda: TrainConfig(
            num_epochs=80,
            batch_size=100,
            learning_rate=3e-3,
            schedule="cosine",
            weight_decay=0.05,
        )
    )
    num_seeds: study.NumSeeds = dataclasses.field(
        default=1, metadata={"resume": "raise"}
    )
    """Runs of each kind; may be raised later."""
    vae_epochs: Count = 60
    """Epochs of the runs that are trained on one sample."""
    made: Made = config.section(Made)
    """The autoregressive rival."""
    made_epochs: Count = 60
    """Its epochs."""
    plain_epochs: Count = 20
    """Epochs of the autoencoder whose latents get a mixture of Gaussians."""
    bound_samples: Count = 5000
    """Samples of each test image's latent in the bound."""
    num_judged: Count = 5000
    """Samples of each way, and test images, behind precision and recall, at most."""
    classifier_epochs: Count = 10
    """Epochs of the classifier whose hidden layer they are judged by."""


PRESETS = {
    "reference": Generate(),
    "quick": Generate(
        data=Digits(num_validation=200),
        model=Variational(hidden=(100,), latent_dim=12),
        train=TrainConfig(
            num_epochs=100, batch_size=20, learning_rate=2e-3, schedule="cosine"
        ),
        vae_epochs=100,
        made=Made(hidden=(200,)),
        made_epochs=20,
        plain_epochs=60,
        bound_samples=200,
        classifier_epochs=60,
    ),
    "long": Generate(
        objective=Elbo(num_samples=20),
        train=dataclasses.replace(Generate().train, num_epochs=600),
        vae_epochs=600,
        made_epochs=200,
    ),
}


def cells(base: Generate, done: Mapping[str, Rows]) -> dict[str, Cell]:
    """The two variational runs, one with a plane for a latent, and the two rivals."""
    one = dataclasses.replace(
        base,
        objective=dataclasses.replace(base.objective, num_samples=1),
        train=dataclasses.replace(base.train, num_epochs=base.vae_epochs),
    )
    plane = dataclasses.replace(base.model, latent_dim=2)
    train = dataclasses.replace(base.train, num_epochs=base.made_epochs)
    short = TrainConfig(num_epochs=base.plain_epochs, seed=base.train.seed)
    configs = {
        OURS: base,
        VAE: one,
        PLANE: dataclasses.replace(one, model=plane),
        MADE: dataclasses.replace(
            base, model=base.made, objective=Autoregressive(), train=train
        ),
        PLAIN: dataclasses.replace(
            base,
            model=Autoencoder(latent_activation="none"),
            objective=Reconstruction(),
            train=short,
        ),
    }
    return {name: Cell(one, base.num_seeds) for name, one in configs.items()}


def summarise(base: Generate, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """How likely each way finds the test images, how good its samples are, the figures.

    Returns:
        ``ways``: by name, ``nats`` and their standard ``error`` where there is a
        likelihood, ``bounded`` if it is a bound, ``active_units`` if there is a
        posterior, ``precision``, ``recall`` and ``parameters``; ``train_gflop``: of all
        runs.
    """
    dataset, ways = data.load(base.data), dict[str, dict[str, Any]]()
    samples = dict[str, Any]()
    for name in (OURS, VAE, MADE, PLAIN):
        runs = [open_run(row["run_dir"], "best") for row in rows[name]]
        kept = [keep_run(base, name, run, dataset) for run in runs]
        samples[name] = kept[0].pop("samples")
        ways[name] = describe(runs[0], dataset) | likelihood(kept)
    kept_mixture = keep_mixture(base, dataset)
    samples[MIXTURE] = kept_mixture["samples"]
    size = int(kept_mixture["parameters"])
    ways[MIXTURE] = {"parameters": size} | likelihood([kept_mixture])
    for name, found in judge(base, samples, dataset).items():
        ways.setdefault(name, {}).update(found)
    draw(base, samples, open_run(rows[PLANE][0]["run_dir"], "best"), dataset)
    return {"ways": ways, "train_gflop": timing.train_gflop(rows)}


# --- What each way comes to -----------------------------------------------------------


def keep_run(
    base: Generate, name: str, run: Run, dataset: data.Dataset
) -> dict[str, Any]:
    """A run's nats of each test image, and samples; kept, so that this resumes too."""
    seed = run.config.train.seed

    def compute() -> dict[str, Any]:
        print(f"{name}, seed {seed}: samples …", flush=True)
        num = min(base.num_judged, len(dataset.test.images))
        found = {"samples": generation.sample(run, num, base.train.seed)}
        if name != PLAIN:
            print(f"{name}, seed {seed}: the likelihood of test images …", flush=True)
            asked = dataset.test.images, base.bound_samples, base.train.seed
            found["nats"] = generation.nats(run, *asked)
        return found

    folder = base.run_dir / "ways" / study.slug(name)
    return keep_arrays(folder / f"{seed}-{run.step}.npz", compute)


def keep_mixture(base: Generate, dataset: data.Dataset) -> dict[str, Any]:
    """The same of the mixture of Bernoullis, and how many numbers it is."""
    from experiments import _generators

    def compute() -> dict[str, Any]:
        print(f"{MIXTURE} …", flush=True)
        seed, num = base.train.seed, min(base.num_judged, len(dataset.test.images))
        # The test images are those of every run, the others drawn by other seeds.
        parts = (dataset.train, 1), (dataset.validation, 2), (dataset.test, 0)
        train, held_out, test = (
            rows_of(part.images, (seed + other) % 2**32) for part, other in parts
        )
        mixture = _generators.fit_best_mixture(train, held_out, SIZES, seed)
        return {
            "samples": mixture.sample(num, seed).reshape(num, *dataset.shape),
            "nats": mixture.nats(test),
            "parameters": np.array(mixture.num_params),
        }

    return keep_arrays(base.run_dir / "ways" / "mixture.npz", compute)


def rows_of(images: Any, seed: int) -> Float[np.ndarray, "N D"]:
    """Images made black and white, as rows."""
    return generation.binarised(images[:], seed).reshape(len(images), -1)


def describe(run: Run, dataset: data.Dataset) -> dict[str, Any]:
    """A run's size, and the active units of its latent if it has a posterior."""
    found: dict[str, Any] = {"parameters": run.num_params}
    if run.has("posterior"):
        images = generation.binarised(dataset.test.images[:], run.config.train.seed)
        found["active_units"] = int(generation.active_units(run, images).sum())
        found["bounded"] = True
    return found


def likelihood(kept: list[dict[str, Any]]) -> dict[str, float]:
    """The nats of an image, the mean over images and seeds, and its standard error."""
    if "nats" not in kept[0]:
        return {}
    each = np.stack([one["nats"] for one in kept]).mean(axis=0, dtype=np.float64)
    error = each.std(ddof=1) / len(each) ** 0.5
    return {"nats": float(each.mean()), "error": float(error)}


def judge(
    base: Generate, samples: Mapping[str, Any], dataset: data.Dataset
) -> dict[str, dict[str, float]]:
    """Precision and recall of each way's samples, made black and white as images are.

    Training images stand beside them: what samples of the true distribution come to.
    """
    from experiments import _generators

    seed, train = base.train.seed, dataset.train
    features = _generators.fit_features(
        rows_of(train.images, (seed + 1) % 2**32), train.labels, base.classifier_epochs
    )
    num = len(samples[OURS])
    real = features(rows_of(dataset.test.images[:num], seed))
    # Those that lie beside each other may be alike.
    some = np.random.default_rng(seed).permutation(len(train.images))[:num]
    found = {}
    for name, images in {**samples, TRAINING: train.images[np.sort(some)]}.items():
        drawn = features(rows_of(images, (seed + 3) % 2**32))
        precision, recall = generation.precision_recall(real, drawn)
        found[name] = {"precision": precision, "recall": recall}
    return found


def best_rival(ways: Mapping[str, Any]) -> str:
    """The way without a latent that finds the test images most likely."""
    return min((MADE, MIXTURE), key=lambda name: ways[name]["nats"])


# --- What is shown --------------------------------------------------------------------


def draw(
    base: Generate, samples: Mapping[str, Any], plane: Run, dataset: data.Dataset
) -> None:
    """Samples of each way; some beside their nearest training images; the plane."""
    from scipy.special import ndtri

    from ae_jax import plots  # not before: matplotlib takes half a second
    from ae_jax.tasks.pictures import tile, write_picture
    from experiments._generators import nearest

    shown = {name: images[:NUM_SHOWN] for name, images in samples.items()}
    plots.save(plots.image_rows(shown), base.run_dir / "generated.png")
    known = dataset.train.images[:] / np.float32(255)
    rows, beside = known.reshape(len(known), -1), dict[str, Any]()
    for name in (OURS, VAE, MADE, PLAIN):
        beside[name] = shown[name]
        which = nearest(shown[name].reshape(len(shown[name]), -1), rows)
        beside[f"{name}: the nearest training images"] = known[which]
    plots.save(plots.image_rows(beside), base.run_dir / "generated_nearest.png")
    # In equal shares of the prior, from the top left.
    line = ndtri((np.arange(SIDE) + 0.5) / SIDE)
    latents = np.stack(np.meshgrid(line, -line), axis=-1).reshape(-1, 2)
    picture = tile(plane.decode(latents), SIDE, gap=0)
    write_picture(base.run_dir / "generated_plane.png", picture)


def tables(base: Generate, summary: Mapping[str, Any]) -> list[Table]:
    """How likely each way finds the test images, and how good its samples are."""
    ways, rows = summary["ways"], list[list[str]]()
    ranked = sorted(ways, key=lambda name: ways[name].get("nats", np.inf))
    for name in ranked:
        row, bold = ways[name], "**" * (name in (OURS, best_rival(ways)))
        nats = "–"
        if "nats" in row:
            sign = "≤ " * row.get("bounded", False)
            nats = f"{bold}{sign}{row['nats']:.2f} ± {row['error']:.2f}{bold}"
        counts = (row.get(key) for key in ("active_units", "parameters"))
        active, size = (f"{n:,}" if n is not None else "–" for n in counts)
        shares = [f"{row[key]:.2f}" for key in ("precision", "recall")]
        rows.append([name, nats, active, *shares, size])
    if isinstance(base.data, Mnist):
        for name, value in PUBLISHED.items():
            rows.append([f"{name}, published", f"{value:.2f}", *["–"] * 4])
    caption = (
        f"≤: a bound, of {base.bound_samples:,} samples an image; ±: standard error of "
        "the mean over the test images. Bold: ours and the best rival. Precision and "
        "recall: of samples made black and white, by a classifier's hidden layer."
    )
    columns = ["", "−log p, nats", "active units", "precision", "recall", "parameters"]
    title = "Test images made black and white, and samples"
    return [{"title": title, "columns": columns, "rows": rows, "caption": caption}]


def check(base: Generate) -> None:
    """Refuse what this study cannot do, before anything is trained.

    Raises:
        UserError: another model or objective, none held out, or one label alone.
    """
    if not isinstance(base.model, Variational) or not isinstance(base.objective, Elbo):
        raise UserError(
            "model.name, objective.name: this study is of variational and elbo; train "
            "others by experiments.tutorial"
        )
    dataset = data.load(base.data)
    if not len(dataset.validation.images):
        raise UserError(
            "data.num_validation: 0, but checkpoints and the mixture are chosen on "
            "images held out; hold some out"
        )
    if len(np.unique(dataset.train.labels)) < 2:
        raise UserError(
            "data: its images have one label, and a classifier by which samples are "
            "judged takes two; give labels"
        )


def main(base: Generate) -> None:
    """Run the study in ``run_dir``, or resume it there.

    Raises:
        UserError: see :func:`check` and :func:`study.run_study`.
    """
    check(base)
    summary = study.run_study("generate", base, cells, summarise)
    shown, ways = tables(base, summary), summary["ways"]
    print("\n".join(map(results.to_markdown, shown)))
    headline: dict[str, int | float] = {
        "nats_bound": ways[OURS]["nats"],
        "nats_error": ways[OURS]["error"],
        "num_samples_k": base.bound_samples,
        "rival_nats": ways[best_rival(ways)]["nats"],
        "train_gflop": summary["train_gflop"],
    }
    if study.is_reference(base, PRESETS):
        study.keep_result("generate", base, headline, shown)


if __name__ == "__main__":
    cli.run_experiment("generate", PRESETS, __doc__, main)
