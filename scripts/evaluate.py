"""Score a checkpoint of a run: ``evaluate.py RUN [--checkpoint best] [--json]``."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from ae_jax import cli
from ae_jax.errors import UserError


def main(
    run_dir: Positional[Path],
    checkpoint: str = "latest",
    split: Literal["test", "train", "validation"] = "test",
    as_json: Annotated[bool, arg(name="json")] = False,
    data_dir: Annotated[Path | None, arg(name="data.dir")] = None,
    data_source: Annotated[Path | None, arg(name="data.source")] = None,
) -> None:
    """Score a checkpoint on a whole split: loss, MSE, PSNR, SSIM, dead latent units.

    Args:
        run_dir: Run folder, finished or not.
        checkpoint: latest, best (by held-out loss, else by training loss), or a step.
        split: The images to score.
        as_json: Print one line of JSON.
        data_dir: Folder in which data sets are prepared; default: the run's.
        data_source: Your own images, if they have moved since.
    """
    from ae_jax.runs.run import can_die, open_run

    run = open_run(run_dir, checkpoint)
    images = getattr(run.data(data_dir, data_source), split).images
    if not len(images):
        raise UserError(f"{run_dir}: no {split} images; the run held none out")
    means = {f"{split}/{k}": v for k, v in run.score_split(images).items()}
    head = {"checkpoint_step": run.step, "split": split, "num_images": len(images)}
    scores: dict[str, Any] = head | means
    if can_die(run.config):
        scores["latent/dead_units"] = run.count_dead_units(images)
    if as_json:
        print(json.dumps(scores))
        return
    for name, value in scores.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        print(f"{name:24} {shown}")


if __name__ == "__main__":
    cli.run_script(main)
