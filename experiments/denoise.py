"""How well is noise removed, beside the strongest rivals that are no networks?

Gaussian noise, salt and pepper, masked pixels. One residual network is trained on all
of them, blind to their kind and level, and then for a while on each alone; the
tutorial's net and a wider one, both with a bottleneck, are trained on each as well. The
rivals are fitted to the same noisy training images, each at whichever of its settings
did best on held-out ones. All are scored on the same noisy test images. About 50
minutes on two cores.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ae_jax import cli, config, data, metrics
from ae_jax.config import TrainConfig
from ae_jax.data import Digits, Mnist
from ae_jax.errors import UserError
from ae_jax.files import read_json, write_json
from ae_jax.models.dense import Autoencoder
from ae_jax.models.residual import Residual
from ae_jax.objectives import AnyNoise, Denoising, Masking, SaltAndPepper
from ae_jax.options import Count, options
from ae_jax.runs import results, study, timing
from ae_jax.runs.results import Table
from ae_jax.runs.run import Run, open_run
from ae_jax.runs.study import Cell, Rows, Study
from ae_jax.tasks.denoising import corrupt

Row = dict[str, Any]

Noise = Literal[
    "gaussian_0.1",
    "gaussian_0.25",
    "gaussian_0.5",
    "salt_and_pepper_0.1",
    "salt_and_pepper_0.3",
    "masking_0.5",
]
KINDS = {"gaussian": Denoising, "salt_and_pepper": SaltAndPepper, "masking": Masking}


def make_noise(name: str) -> Any:
    """The objective of a noise: its kind, and how much of it."""
    kind, _, level = name.rpartition("_")
    return KINDS[kind](float(level))


NOISES: dict[str, Any] = {name: make_noise(name) for name in get_args(Noise)}
OURS, BLIND = "ours", "ours, blind"
BOTTLENECKS: dict[str, Any] = {
    "the tutorial's net": Autoencoder(),
    "wider bottleneck": Autoencoder(
        hidden=(512, 128), latent_dim=64, latent_activation="none", init="he"
    ),
}
"""Networks with a latent, which are trained on each noise."""

SIGMAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6)
"""Over which the figure of trained and blind runs goes."""
NUM_SHOWN, NUM_CURVE = 8, 1000
"""Test images in the figure of images, and behind each point of that of curves."""


@options
class Denoise(Study):
    """The blind run; the others differ from it as below."""

    data: Any = config.section(lambda: Mnist(num_validation=10_000))
    model: Any = config.section(lambda: Residual(channels=64, num_blocks=3))
    objective: Any = config.section(AnyNoise)
    train: TrainConfig = config.section(
        lambda: TrainConfig(
            num_epochs=1,
            batch_size=16,
            learning_rate=2e-3,
            schedule="cosine",
            warmup_steps=200,
            clip_norm=1.0,
        )
    )
    num_seeds: study.NumSeeds = dataclasses.field(
        default=1, metadata={"resume": "raise"}
    )
    """Runs of each setting, whose scores are averaged; may be raised later."""
    noises: tuple[Noise, ...] = tuple(get_args(Noise))
    """The noises of the table."""
    tuned_epochs: tuple[Count, ...] = (1, 3, 1, 1, 1, 1)
    """Epochs on each of the noises alone, from the blind run's parameters."""
    bottleneck_epochs: Count = 5
    """Epochs of the networks with a bottleneck, in batches of 64."""
    num_tuning: Count = 500
    """Held-out images by which their settings are chosen, at most."""
    num_pixels: Count = 1_000_000
    """Noisy pixels that boosted trees are fitted to, at most."""
    num_trees: Count = 150
    """How many trees they are."""


PRESETS = {
    "reference": Denoise(),
    "quick": Denoise(
        data=Digits(num_validation=200),
        model=Residual(channels=16, num_blocks=2),
        train=dataclasses.replace(Denoise().train, num_epochs=40),
        noises=("gaussian_0.25", "masking_0.5"),
        tuned_epochs=(20, 20),
        bottleneck_epochs=40,
        num_pixels=20_000,
        num_trees=50,
        num_tuning=100,
    ),
}


def cells(base: Denoise, done: Mapping[str, Rows]) -> dict[str, Cell]:
    """The blind run, and then those on each noise, ours from where it ended."""
    found = {"blind": Cell(base, base.num_seeds)}
    if "blind" not in done:
        return found
    start = Path(done["blind"][0]["run_dir"])
    tuned = dataclasses.replace(base.train, init_from=start)
    plain = TrainConfig(num_epochs=base.bottleneck_epochs, seed=base.train.seed)
    for noise, num_epochs in zip(base.noises, base.tuned_epochs, strict=True):
        objective = NOISES[noise]
        of_noise = dataclasses.replace(base, objective=objective)
        train = dataclasses.replace(tuned, num_epochs=num_epochs)
        ours = dataclasses.replace(of_noise, train=train)
        found[f"{OURS}/{noise}"] = Cell(ours, base.num_seeds)
        for name, model in BOTTLENECKS.items():
            theirs = dataclasses.replace(of_noise, model=model, train=plain)
            found[f"{name}/{noise}"] = Cell(theirs, base.num_seeds)
    return found


def summarise(base: Denoise, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """The scores of all ways to denoise, and the two figures.

    Returns:
        ``noises``: by noise and way, what :func:`_denoisers.score` gives, the
        ``setting`` of a rival, and the ``parameters`` of a network; ``train_gflop``: of
        all runs.
    """
    from experiments import _denoisers

    dataset, noises = data.load(base.data), dict[str, dict[str, Row]]()
    for noise in base.noises:
        path = base.run_dir / "rivals" / f"{noise}.json"  # so that this resumes too
        if not path.exists():
            print(f"{noise}: the rivals …", flush=True)
            path.parent.mkdir(exist_ok=True)
            rivals, shown = _denoisers.score_rivals(
                base, NOISES[noise], dataset, NUM_SHOWN
            )
            np.save(path.with_suffix(".npy"), shown)
            write_json(path, rivals)
        noises[noise] = score_networks(base, rows, noise, dataset) | read_json(path)
    draw(base, rows, noises, dataset)
    return {"noises": noises, "train_gflop": timing.train_gflop(rows)}


def runs_of(rows: Mapping[str, Rows], name: str, noise: str) -> list[Run]:
    """The runs of a network on one noise."""
    cell = "blind" if name == BLIND else f"{name}/{noise}"
    return [open_run(row["run_dir"]) for row in rows[cell]]


def score_networks(
    base: Denoise, rows: Mapping[str, Rows], noise: str, dataset: data.Dataset
) -> dict[str, Row]:
    """The scores of each network on one noise, the mean of its runs, by its name."""
    from experiments._denoisers import noisy_pairs, score

    test = noisy_pairs(NOISES[noise], dataset.test.images, base.train.seed)
    found = {}
    for name in (OURS, BLIND, *BOTTLENECKS):
        runs = runs_of(rows, name, noise)
        scores = [score(grey(run), test) for run in runs]
        means = {k: float(np.mean([s[k] for s in scores])) for k in scores[0]}
        found[name] = {**means, "parameters": runs[0].num_params}
    return found


def grey(run: Run) -> Callable[[Any], Any]:
    """A run as a function of images without an axis for the channel."""
    return lambda noisy: run.reconstruct(noisy)[..., 0]


def best_rival(scores: Mapping[str, Row]) -> str:
    """The rival of the highest PSNR; networks are none."""
    rivals = {name for name, row in scores.items() if "parameters" not in row}
    return max(rivals, key=lambda name: scores[name]["psnr_db"])


# --- What is shown --------------------------------------------------------------------


def draw(
    base: Denoise,
    rows: Mapping[str, Rows],
    noises: Mapping[str, Mapping[str, Row]],
    dataset: data.Dataset,
) -> None:
    """Images as each makes them, with their errors; PSNR against σ."""
    from ae_jax import plots  # not before: matplotlib takes half a second

    noise: str = "gaussian_0.25" if "gaussian_0.25" in noises else base.noises[0]
    test, seed = dataset.test.images, base.train.seed
    clean = test[:NUM_SHOWN] / 255
    noisy = corrupt(NOISES[noise], test[:NUM_SHOWN], seed)
    rival = best_rival(noises[noise])
    by_rival = np.load(base.run_dir / "rivals" / f"{noise}.npy")[..., None]
    by_us = runs_of(rows, OURS, noise)[0].reconstruct(noisy)
    images = {
        "Clean": clean,
        f"Noisy, {noise}": noisy,
        f"Best rival: {rival}": by_rival,
        "Ours": by_us,
        "Error of the rival": np.abs(by_rival - clean),
        "Error of ours": np.abs(by_us - clean),
    }
    plots.save(plots.image_rows(images), base.run_dir / "denoised.png")
    curves = {"blind": curve(base, runs_of(rows, BLIND, noise)[0], test)}
    for name in base.noises:
        if isinstance(objective := NOISES[name], Denoising):
            run = runs_of(rows, OURS, name)[0]
            curves[f"trained at σ {objective.sigma}"] = curve(base, run, test)
    labels = "σ of the noise", "PSNR (dB)"
    plots.save(plots.lines(curves, *labels), base.run_dir / "denoise_sigma.png")


def curve(base: Denoise, run: Run, test: Any) -> tuple[list[float], list[float]]:
    """A run's PSNR at each of ``SIGMAS``."""
    test, found = test[:NUM_CURVE], []
    for sigma in SIGMAS:
        recon = run.reconstruct(corrupt(Denoising(sigma), test, base.train.seed))
        mse = metrics.squared_error(recon, test / 255)
        found.append(float(metrics.psnr(mse).mean()))
    return list(SIGMAS), found


def tables(noises: Mapping[str, Mapping[str, Row]]) -> list[Table]:
    """PSNR, with what an image costs, and SSIM of each way on each noise."""
    ways = list(dict.fromkeys(name for scores in noises.values() for name in scores))
    titles = [noise.replace("_", " ") for noise in noises]

    def cells(way: str, key: str, digits: int) -> Iterator[str]:
        for scores in noises.values():
            if way not in scores:
                yield "–"
                continue
            value, half = scores[way][key], scores[way][f"{key}_half"]
            bold = "**" * (way in (OURS, best_rival(scores)))
            yield f"{bold}{value:.{digits}f} ± {half:.{digits}f}{bold}"

    def cost(way: str) -> list[str]:
        found = [scores[way] for scores in noises.values() if way in scores]
        seconds = np.median([row["seconds"] for row in found])
        size = found[0].get("parameters")
        return [f"{1000 * seconds:.2g}", f"{size:,}" if size else "–"]

    psnr: Table = {
        "title": "PSNR in dB on the test images",
        "columns": ["", *titles, "ms an image", "parameters"],
        "rows": [[way, *cells(way, "psnr_db", 2), *cost(way)] for way in ways],
        "caption": "",
    }
    ssim: Table = {
        "title": "SSIM on the test images",
        "columns": ["", *titles],
        "rows": [[way, *cells(way, "ssim", 3)] for way in ways],
        "caption": "±: half a 95 % interval of the mean over the images. Bold: ours, "
        "and the rival of the highest PSNR.",
    }
    return [psnr, ssim]


def main(base: Denoise) -> None:
    """Run the study in ``run_dir``, or resume it there.

    Raises:
        UserError: scikit-image or PyWavelets is not installed, the images are in
            colour or none held out, or there are not as many numbers of epochs as
            noises; see also :func:`study.run_study`.
    """
    from experiments import _denoisers

    if len(base.tuned_epochs) != len(base.noises):
        raise UserError(
            f"tuned_epochs: {len(base.tuned_epochs)} numbers for {len(base.noises)} "
            "noises; give one for each"
        )
    _denoisers.check_installed()
    _denoisers.check_images(data.load(base.data))
    summary = study.run_study("denoise", base, cells, summarise)
    noises = summary["noises"]
    shown = tables(noises)
    print("\n".join(map(results.to_markdown, shown)))
    headline: dict[str, int | float] = {"train_gflop": summary["train_gflop"]}
    for noise, scores in noises.items():
        ours, rival = scores[OURS]["psnr_db"], scores[best_rival(scores)]["psnr_db"]
        headline |= {f"psnr_db_{noise}": ours, f"psnr_gain_db_{noise}": ours - rival}
        print(f"{noise:20} {ours:.2f} dB, {ours - rival:+.2f} against the best rival")
    if study.is_reference(base, PRESETS):
        study.keep_result("denoise", base, headline, shown)


if __name__ == "__main__":
    cli.run_experiment("denoise", PRESETS, __doc__, main)
