"""Remove the noise from a picture: ``denoise.py RUN IN.png OUT.png``."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ae_jax import cli


def main(
    run_dir: Positional[Path],
    picture: Annotated[Positional[Path], arg(name="in")],
    output: Annotated[Positional[Path], arg(name="out")],
    resize: bool = False,
    checkpoint: str = "latest",
) -> None:
    """Remove the noise from a picture, in one channel or three as the run's images.

    Args:
        run_dir: Run folder of a run trained to denoise, as experiments.denoise makes
            them in runs/denoise.
        picture: A picture; of any size if the run's model is residual.
        output: Where the result goes, in the format of its ending.
        resize: Bring the picture to the size of the run's images first.
        checkpoint: latest, best (by held-out loss, else by training loss), or a step.
    """
    from ae_jax.runs.run import open_run
    from ae_jax.tasks.denoising import denoise
    from ae_jax.tasks.pictures import read_picture, write_picture

    run = open_run(run_dir, checkpoint)
    height, _, channels = run.shape
    image = read_picture(picture, channels, height if resize else None)
    write_picture(output, denoise(run, image[None])[0])
    print(output)


if __name__ == "__main__":
    cli.run_script(main)
