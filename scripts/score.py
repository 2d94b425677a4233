"""How unlike a run's training images are these? ``score.py RUN IMAGES…``."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import Positional, arg

from ae_jax import cli
from ae_jax.errors import UserError


def main(
    run_dir: Positional[Path],
    images: Positional[tuple[Path, ...]],
    score: str = "squared_error",
    resize: bool = False,
    checkpoint: str = "latest",
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Score pictures: the higher, the less like the images that the run was trained on.

    Beside each score stands its p-value: how often a normal image scores as high. It is
    counted on the images that the run held out, or, if it held none out, on those that
    it was trained on, which makes anomalies of too many.

    Args:
        run_dir: Run folder; what it was trained on is normal, see --data.classes.
        images: Pictures, and folders of pictures.
        score: See docs/anomaly.md.
        resize: Bring the pictures to the size of the run's images first.
        checkpoint: latest, best (by held-out loss, else by training loss), or a step.
        as_json: Print a line of JSON for each picture.
    """
    from ae_jax.runs.run import open_run
    from ae_jax.tasks import anomaly
    from ae_jax.tasks.pictures import find_pictures, read_picture

    run = open_run(run_dir, checkpoint)
    paths = find_pictures(images)
    height, _, channels = run.shape
    pictures = [read_picture(p, channels, height if resize else None) for p in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape != run.shape:
            found, wanted = (
                "×".join(map(str, x[:2])) for x in (picture.shape, run.shape)
            )
            raise UserError(
                f"{path}: {found} pixels, where the run's images have {wanted}; "
                "--resize brings them to that"
            )
    dataset = run.data()
    fitted = anomaly.fit_score(run, score, dataset.train.images)
    held_out = dataset.validation.images
    normal = fitted(held_out if len(held_out) else dataset.train.images)
    scores = fitted(np.stack(pictures))
    for path, value, p in zip(
        paths, scores, anomaly.p_values(scores, normal), strict=True
    ):
        row = {"picture": str(path), score: float(value), "p": float(p)}
        print(json.dumps(row) if as_json else f"{value:12.6g}  p {p:.4f}  {path}")


if __name__ == "__main__":
    cli.run_script(main)
