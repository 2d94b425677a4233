"""Score a checkpoint of a run: ``evaluate.py RUN [--checkpoint best] [--json]``."""

import json
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ae_jax import cli, config


def main(
    run_dir: Positional[Path],
    checkpoint: str = "latest",
    split: Literal["test", "train", "validation"] = "test",
    as_json: Annotated[bool, arg(name="json")] = False,
) -> None:
    """Score a checkpoint on a whole split: MSE, PSNR, SSIM, dead code units.

    Args:
        run_dir: Run folder, finished or not.
        checkpoint: latest, best (by held-out loss, else by training loss), or a step.
        split: The images to score.
        as_json: Print one line of JSON.
    """
    from ae_jax import data, run

    opened = run.open_run(run_dir, checkpoint)
    dataset = data.load(opened.config.data)
    run.check_fingerprint(run_dir, dataset)
    images: data.Split = getattr(dataset, split)
    if not len(images.images):
        raise config.UserError(f"{run_dir}: no {split} images; the run held none out")
    scores = {
        "checkpoint_step": opened.step,
        "split": split,
        "num_images": len(images.images),
        **run.score(opened, images, split, dataset.shape),
    }
    if as_json:
        print(json.dumps(scores))
    else:
        for name, value in scores.items():
            print(
                f"{name:18} {value:.6g}"
                if type(value) is float
                else f"{name:18} {value}"
            )


if __name__ == "__main__":
    cli.run_script(main)
