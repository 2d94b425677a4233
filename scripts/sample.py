"""Draw images from a run: ``sample.py RUN OUT.png --num 64``."""

import math
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ae_jax import cli


def main(
    run_dir: Positional[Path],
    output: Annotated[Positional[Path], arg(name="out")],
    num: int = 64,
    seed: int = 0,
    checkpoint: str = "latest",
) -> None:
    """Draw images that never were, as a picture of so many in a grid.

    A variational run decodes latents of its prior, a run of model made draws pixel
    after pixel, and any other with a latent decodes latents of a mixture of Gaussians
    that is fitted to those of its training images.

    Args:
        run_dir: Run folder, such as runs/generate/iwae/0 or runs/tutorial.
        output: Where the picture goes, in the format of its ending.
        num: How many images, 10,000 at most.
        seed: Of the draws.
        checkpoint: latest, best (by held-out loss, else by training loss), or a step.
    """
    from ae_jax.runs.run import open_run
    from ae_jax.tasks.generation import sample
    from ae_jax.tasks.pictures import format_of, tile, write_picture

    format_of(output)
    images = sample(open_run(run_dir, checkpoint), num, seed)
    write_picture(output, tile(images, math.ceil(num**0.5)))
    print(output)


if __name__ == "__main__":
    cli.run_script(main)
