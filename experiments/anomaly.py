"""How well are anomalies detected, beside the strongest rivals that are no networks?

One class of the data set is normal, each in turn, or all but one are; with ``--cross``
also all of it, where the images of another set are the anomalies. Runs are trained on
normal images alone and score the test images by each entry of
``ae_jax.tasks.anomaly.SCORES``, one run by itself or all seeds together. The rivals are
fitted to the same normal images. No label of a test image, and none of an anomaly, is
used for a choice. About an hour on two cores.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from ae_jax import cli, config, data
from ae_jax.config import Config, TrainConfig
from ae_jax.data import Digits, Mnist
from ae_jax.errors import UserError
from ae_jax.files import keep_arrays, write_arrays
from ae_jax.models.dense import Autoencoder
from ae_jax.objectives import Gradients
from ae_jax.options import Count, options
from ae_jax.runs import results, study, timing
from ae_jax.runs.results import Table
from ae_jax.runs.run import open_run
from ae_jax.runs.study import Cell, Rows, Study
from ae_jax.tasks import anomaly
from ae_jax.tasks.anomaly import SCORES, Scores

TOGETHER = "{}, all seeds"
"""Name of the mean over the seeds of a score, each standardised by held-out images."""
HEADLINE = TOGETHER.format("gradients")
"""The score by which we are judged; chosen on Fashion-MNIST, see docs/anomaly.md."""

Kind = Literal["one", "rest"]
Other = Literal["mnist", "fashion_mnist", "kmnist", "digits", "folder", "npz"]
TITLES = {
    "one": "One class is normal",
    "rest": "All classes but one are normal",
    "cross": "All of one set is normal, the other set is not",
}
PUBLISHED = {"Deep SVDD": 0.948, "ARAE": 0.9757, "RaPP": 0.979, "KDAD": 0.987}
"""Mean AUROC on MNIST, one digit normal, as their authors report it."""
METRICS = {"auroc": "AUROC", "average_precision": "precision", "fpr95": "FPR at 95 %"}
MIN_NORMAL, MIN_HELD_OUT, MIN_SIDE = 20, 10, 8
"""Images to train on, and held out, and pixels of a side that there must be."""
NUM_SHOWN, NUM_CURVES = 10, 3
"""Images in a row of the figure, and rivals in that of curves."""


@options
class Anomaly(Study):
    """A run's options but for its classes, and which tasks there are."""

    data: Any = config.section(lambda: Mnist(num_validation=500))
    model: Any = config.section(
        lambda: Autoencoder(
            hidden=(256, 128), latent_dim=32, latent_activation="none", init="he"
        )
    )
    objective: Any = config.section(Gradients)
    train: TrainConfig = config.section(
        lambda: TrainConfig(num_epochs=20, learning_rate=2e-3, schedule="cosine")
    )
    num_seeds: study.NumSeeds = dataclasses.field(
        default=3, metadata={"resume": "raise"}
    )
    """Runs of each task; may be raised later."""
    normal: tuple[Kind, ...] = ("one", "rest")
    """What is normal: one class, or all the rest."""
    classes: tuple[int, ...] = ()
    """The classes that are it in turn; none given: each there is."""
    rest_epochs: Count = 3
    """Epochs of the runs to which many classes are normal."""
    cross: Other | None = config.free(None)
    """Another data set, in the same folder: anomalies to this one, and the reverse."""
    cross_source: Path | None = config.free(None)
    """Where its images are, as --data.source."""
    num_normal: Count = 10_000
    """Normal images that scores, ours and the rivals', are fitted to, at most."""


PRESETS = {
    "reference": Anomaly(),
    "quick": Anomaly(
        data=Digits(num_validation=20),
        model=Autoencoder(
            hidden=(64,), latent_dim=8, latent_activation="none", init="he"
        ),
        train=TrainConfig(num_epochs=100, batch_size=20, learning_rate=3e-3),
        num_seeds=2,
        classes=(3, 8),
        rest_epochs=15,
    ),
}


# --- The tasks ------------------------------------------------------------------------


class Task(NamedTuple):
    """What is normal.

    Attributes:
        kind: a key of ``TITLES``.
        name: of the class in question, or of the normal data set.
        data: options of the data that runs are trained on, which are normal.
        other: of the data whose test images are anomalies too.
    """

    kind: str
    name: str
    data: Any
    other: Any = None

    @property
    def key(self) -> str:
        """Of its cell."""
        return f"{self.kind}/{self.name}"


class Images(NamedTuple):
    """The images of a task, bytes."""

    normal: Any
    held_out: Any
    test: Any
    anomalous: Bool[np.ndarray, " N"]
    """Of each test image."""


def tasks(base: Anomaly) -> list[Task]:
    """The tasks of a study.

    Raises:
        UserError: a class that is not there, or a normal set too small to train on.
    """
    labels = data.load(dataclasses.replace(base.data, num_validation=0)).train.labels
    known = np.unique(labels).tolist()
    if unknown := sorted(set(base.classes) - set(known)):
        raise UserError(
            f"classes: no training image has the label {unknown[0]}; there are "
            f"{len(known)} labels, from {known[0]} to {known[-1]}"
        )
    found = []
    for kind in dict.fromkeys(base.normal if len(known) > 1 else ()):
        for label in dict.fromkeys(base.classes or known):
            rest = tuple(other for other in known if other != label)
            chosen = (label,) if kind == "one" else rest
            left = int(np.isin(labels, chosen).sum()) - base.data.num_validation
            if left < MIN_NORMAL:
                raise UserError(
                    f"{kind}/{label}: too few normal images: {max(left, 0)} to train "
                    f"on, beside {base.data.num_validation} held out; it takes "
                    f"{MIN_NORMAL}"
                )
            normal = dataclasses.replace(base.data, classes=chosen)
            found.append(Task(kind, str(label), normal))
    return found + cross_tasks(base)


def cross_tasks(base: Anomaly) -> list[Task]:
    """Those of two data sets, each of which is normal once."""
    if base.cross is None:
        return []
    names = {cls: name for name, cls in data.DATASETS.items()}
    ours, theirs = names.get(type(base.data), "own"), str(base.cross)
    other = data.DATASETS[theirs](
        dir=base.data.dir,
        source=base.cross_source,
        num_validation=base.data.num_validation,
    )
    shapes = [data.load(each).shape for each in (base.data, other)]
    if shapes[0] != shapes[1]:
        sizes = ["×".join(map(str, shape)) for shape in shapes]
        raise UserError(
            f"cross: images of {theirs} are of {sizes[1]} pixels, those of {ours} of "
            f"{sizes[0]}; choose another set"
        )
    if ours == theirs:
        ours, theirs = f"{ours} 1", f"{theirs} 2"
    return [
        Task("cross", ours, base.data, other),
        Task("cross", theirs, other, base.data),
    ]


def load_images(task: Task, num_normal: int) -> Images:
    """The images of a task, so many normal ones at most; which are anomalies."""
    dataset, classes = data.load(task.data), task.data.classes
    parts = (dataset.train, dataset.validation, dataset.test)
    normal, held_out, test = (part.images[:] for part in parts)
    anomalous = ~np.isin(dataset.test.labels, classes or dataset.test.labels)
    if task.other is not None:
        others = data.load(task.other).test.images[:]
        test = np.concatenate([test, others])
        anomalous = np.append(anomalous, np.ones(len(others), bool))
    order = np.random.default_rng(0).permutation(len(normal))[:num_normal]
    return Images(normal[order], held_out, test, anomalous)


def cells(base: Anomaly, done: Mapping[str, Rows]) -> dict[str, Cell]:
    """The runs of each task."""
    many = dataclasses.replace(base.train, num_epochs=base.rest_epochs)
    fields = [field.name for field in dataclasses.fields(Config)]
    plain = Config(**{name: getattr(base, name) for name in fields})
    found = {}
    for task in tasks(base):
        train = base.train if task.kind == "one" else many
        of_task = dataclasses.replace(plain, data=task.data, train=train)
        found[task.key] = Cell(of_task, base.num_seeds)
    return found


# --- The scores -----------------------------------------------------------------------


class Scored(NamedTuple):
    """The scores of a task's test images; ``seed`` is -1 where it is not of one."""

    task: str
    name: str
    seed: int
    scores: Scores


def score_runs(task: Task, images: Images, rows: Rows) -> Iterator[Scored]:
    """By each score that the runs can have: of each seed, and of all together."""
    from experiments._detectors import standardise

    runs = {row["seed"]: open_run(row["run_dir"]) for row in rows}
    first = next(iter(runs.values()))
    # One that needs nothing of a run is a rival.
    for name in (n for n, s in SCORES.items() if s.needs and first.has(*s.needs)):
        standardised = []
        for seed, run in runs.items():
            fitted = anomaly.fit_score(run, name, images.normal)
            scores = fitted(images.test)
            standardised.append(standardise(scores, fitted(images.held_out)))
            yield Scored(task.key, name, seed, scores)
        together = np.mean(standardised, axis=0)
        yield Scored(task.key, TOGETHER.format(name), -1, together)


def score_rivals(base: Anomaly, task: Task, images: Images) -> list[Scored]:
    """By each rival; kept in ``run_dir``, so that this resumes too."""
    from experiments import _detectors

    def score() -> dict[str, Any]:
        print(f"{task.key}: the rivals …", flush=True)
        normal, held_out, test = (
            part / np.float32(255)
            for part in (images.normal, images.held_out, images.test)
        )
        return _detectors.score_rivals(normal, held_out, test)

    path = base.run_dir / "rivals" / f"{study.slug(task.key)}.npz"
    kept = keep_arrays(path, score)
    return [Scored(task.key, name, -1, scores) for name, scores in kept.items()]


def summarise(base: Anomaly, rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Every score of every test image, how well each detects anomalies, the figures.

    Returns:
        ``tasks``: by kind, name of the task and way, what :func:`anomaly.evaluate`
        gives, the mean over the seeds; ``rivals``: which of the ways are;
        ``train_gflop``: of all runs.
    """
    scored, labels = list[Scored](), dict[str, Any]()
    found: dict[str, Any] = {}
    rivals = list[str]()
    for task in tasks(base):
        images = load_images(task, base.num_normal)
        labels[task.key] = images.anomalous
        theirs = score_rivals(base, task, images)
        rivals = [one.name for one in theirs]
        new = [*score_runs(task, images, rows[task.key]), *theirs]
        scored += new
        found.setdefault(task.kind, {})[task.name] = judge(new, images.anomalous)
    save_scores(base, scored, labels)
    gflop = timing.train_gflop(rows)
    summary = {"tasks": found, "rivals": rivals, "train_gflop": gflop}
    draw(base, rows, scored, labels, summary)
    return summary


def judge(
    scored: Sequence[Scored], anomalous: Bool[np.ndarray, " N"]
) -> dict[str, dict[str, float]]:
    """How well each way detects anomalies, the mean over its seeds, by its name."""
    found: dict[str, list[dict[str, float]]] = {}
    for one in scored:
        # As they are kept, so that whoever reads them comes to the same.
        row = anomaly.evaluate(one.scores.astype(np.float32), anomalous)
        found.setdefault(one.name, []).append(row)
    return {
        name: {key: float(np.mean([row[key] for row in rows])) for key in METRICS}
        for name, rows in found.items()
    }


def save_scores(
    base: Anomaly, scored: Sequence[Scored], labels: Mapping[str, Any]
) -> None:
    """Write ``scores.npz``, a row for each task, name and seed.

    ``score`` [R, N], NaN beyond a task's test images; ``label`` [R, N], 1 of an
    anomaly, 0 of a normal image, -1 beyond; ``task``, ``name`` and ``seed`` [R].
    """
    size = max(map(len, labels.values()))
    score = np.full((len(scored), size), np.nan, np.float32)
    label = np.full((len(scored), size), -1, np.int8)
    for row, one in enumerate(scored):
        score[row, : len(one.scores)] = one.scores
        label[row, : len(one.scores)] = labels[one.task]
    columns: dict[str, Any] = {"score": score, "label": label}
    for key in ("task", "name", "seed"):
        columns[key] = np.array([getattr(one, key) for one in scored])
    write_arrays(base.run_dir / "scores.npz", columns)


# --- Figures and tables ---------------------------------------------------------------


def mean_of(by_task: Mapping[str, Any], name: str, key: str = "auroc") -> float:
    """A metric of a way, the mean over tasks."""
    return float(np.mean([ways[name][key] for ways in by_task.values()]))


def worst_of(by_task: Mapping[str, Any], name: str) -> float:
    """The AUROC of a way on the task at which it does worst."""
    return float(min(ways[name]["auroc"] for ways in by_task.values()))


def best_rivals(by_task: Mapping[str, Any], rivals: Sequence[str]) -> list[str]:
    """The rivals by their mean AUROC, the best first."""
    return sorted(rivals, key=lambda name: -mean_of(by_task, name))


def draw(
    base: Anomaly,
    rows: Mapping[str, Rows],
    scored: Sequence[Scored],
    labels: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> None:
    """Curves of the first kind of task, means over its tasks; images of its first."""
    from sklearn.metrics import roc_curve

    from ae_jax import plots  # not before: matplotlib takes half a second

    kind, by_task = next(iter(summary["tasks"].items()))
    best = best_rivals(by_task, summary["rivals"])[:NUM_CURVES]
    grid = np.linspace(0, 0.2, 21)
    curves = {}
    for name in (HEADLINE, *best):
        found = [
            np.interp(grid, *roc_curve(labels[one.task], one.scores)[:2])
            for one in scored
            if one.name == name and one.task.startswith(f"{kind}/")
        ]
        curves[name] = grid.tolist(), np.mean(found, axis=0).tolist()
    axes = "share of normal images taken for anomalies", "share of anomalies found"
    plots.save(plots.lines(curves, *axes), base.run_dir / "anomaly_roc.png")
    first = next(task for task in tasks(base) if task.kind == kind)
    key, test = first.key, load_images(first, base.num_normal).test
    scores = next(s for s in scored if (s.task, s.name) == (key, HEADLINE)).scores
    chosen = pick(np.argsort(scores), labels[key])
    run, pictures = open_run(rows[key][0]["run_dir"]), {}
    for title, order in chosen.items():
        pictures[title] = test[order[:NUM_SHOWN]] / 255
        pictures[f"{title}: reconstructed"] = run.reconstruct(pictures[title])
    plots.save(plots.image_rows(pictures), base.run_dir / "anomaly_images.png")


def pick(
    order: Int[np.ndarray, " N"], anomalous: Bool[np.ndarray, " N"]
) -> dict[str, Int[np.ndarray, " M"]]:
    """Which images are shown: the most and the least normal, and those mistaken most.

    ``order`` is from the most normal to the least.
    """
    return {
        "Most normal": order,
        "Least normal": order[::-1],
        "Anomalies that seem most normal": order[anomalous[order]],
        "Normal images that seem least so": order[~anomalous[order]][::-1],
    }


def tables(base: Anomaly, summary: Mapping[str, Any]) -> list[Table]:
    """How well each way detects anomalies, a table for each kind of task."""
    rivals, found = summary["rivals"], list[Table]()
    for kind, by_task in summary["tasks"].items():
        ways = list(next(iter(by_task.values())))
        ours = [name for name in ways if name not in rivals]
        ranked = best_rivals(by_task, rivals)
        bold, shown = (HEADLINE, ranked[0]), list[list[str]]()
        for name in ours + ranked:
            cells = [mean_of(by_task, name, key) for key in METRICS]
            cells.insert(1, worst_of(by_task, name))
            mark = "**" * (name in bold)
            label = f"{name}{', a rival' * (name in rivals)}".replace("_", " ")
            shown.append([label, *(f"{mark}{cell:.4f}{mark}" for cell in cells)])
        if kind == "one" and isinstance(base.data, Mnist) and not base.classes:
            for name, value in PUBLISHED.items():
                shown.append([f"{name}, published", f"{value:.3f}", "–", "–", "–"])
        auroc, *others = METRICS.values()
        found.append(
            {
                "title": f"{TITLES[kind]}: {', '.join(by_task)}",
                "columns": ["", auroc, "worst", *others],
                "rows": shown,
                "caption": "",
            }
        )
    found[-1]["caption"] = (
        f"Means over the tasks and {base.num_seeds} seeds; worst: the lowest AUROC of "
        "a task. Bold: the score that was chosen beforehand, and the best rival, which "
        f"is chosen by this table. All are fitted to {base.num_normal:,} normal images "
        "at most, the one-class SVM to 3,000; the runs are trained on all."
    )
    return found


def headline_of(summary: Mapping[str, Any]) -> dict[str, int | float]:
    """Ours and the best rival's, where one class is normal, and the other kinds."""
    found: dict[str, int | float] = {}
    for kind, by_task in summary["tasks"].items():
        best = best_rivals(by_task, summary["rivals"])[0]
        before = "" if kind == "one" else f"{kind}_"
        for whose, name in {"": HEADLINE, "rival_": best}.items():
            found[f"{before}{whose}auroc_mean"] = mean_of(by_task, name)
            found[f"{before}{whose}auroc_min"] = worst_of(by_task, name)
    return found


def check(base: Anomaly) -> None:
    """Refuse what this study cannot do, before anything is trained.

    Raises:
        UserError: there is nothing to do, too little held out, or images too small.
    """
    chosen = getattr(base.data, "classes", None)
    if chosen is None or chosen:
        raise UserError("data.classes: each class is normal in turn; set classes")
    if base.data.num_validation < MIN_HELD_OUT:
        raise UserError(
            f"data.num_validation: {base.data.num_validation}, but scores are brought "
            f"to one scale on images held out; hold out {MIN_HELD_OUT} or more"
        )
    if min(data.load(base.data).shape[:2]) < MIN_SIDE:
        raise UserError(f"data: images must be of {MIN_SIDE}×{MIN_SIDE} pixels or more")
    if not tasks(base):
        raise UserError("normal: nothing is; the data set has one label, or none")


def main(base: Anomaly) -> None:
    """Run the study in ``run_dir``, or resume it there.

    Raises:
        UserError: see :func:`check`, :func:`tasks` and :func:`study.run_study`.
    """
    check(base)
    summary = study.run_study("anomaly", base, cells, summarise)
    shown, headline = tables(base, summary), headline_of(summary)
    print("\n".join(map(results.to_markdown, shown)))
    for name, value in headline.items():
        print(f"{name:25} {value:.4f}")
    if study.is_reference(base, PRESETS):
        headline["train_gflop"] = summary["train_gflop"]
        study.keep_result("anomaly", base, headline, shown)


if __name__ == "__main__":
    cli.run_experiment("anomaly", PRESETS, __doc__, main)
