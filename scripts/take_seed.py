"""Take one seed out of a run of many: ``take_seed.py RUN SEED NEW_RUN``."""

from pathlib import Path

from tyro.conf import Positional

from ae_jax import cli


def main(
    run_dir: Positional[Path], seed: Positional[int], new_run: Positional[Path]
) -> None:
    """Take one seed out of a run of many, as a run folder of its own.

    The new run can be scored, drawn and gone on with as any single run.

    Args:
        run_dir: Run folder of experiments.seeds, finished or not.
        seed: Which seed.
        new_run: The new run folder.
    """
    from ae_jax import ensemble

    ensemble.use_all_cores()
    step = ensemble.take(run_dir, seed, new_run)
    print(
        f"{new_run}: seed {seed} at step {step}; go on with python -m "
        f"experiments.tutorial --config {new_run}/config.json"
    )


if __name__ == "__main__":
    cli.run_script(main)
