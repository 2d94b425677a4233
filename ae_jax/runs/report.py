"""What a run shows on the terminal: a bar, a line for each epoch, a table of scores."""

import statistics
import sys
from typing import Any

from tqdm import tqdm

from ae_jax.config import Config
from ae_jax.runs.folder import EpochMetrics, loss_name_of


class Progress:
    """A bar on a terminal or in a notebook, elsewhere a line for each epoch."""

    def __init__(
        self, num_images: int, done: int, num_epochs: int, shown: bool
    ) -> None:
        self._num_epochs, self._shown = num_epochs, shown
        self._bar = tqdm(
            total=num_images,
            initial=done,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (shown and (sys.stderr.isatty() or "ipykernel" in sys.modules)),
        )

    def update(self, num_images: int, loss: float) -> None:
        """So many more images were trained on; the newest batch had this loss."""
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(num_images)

    def log_epoch(self, epoch: int, line: str) -> None:
        """An epoch has ended; the line is for where there is no bar."""
        self._bar.set_description(f"{epoch} of {self._num_epochs} epochs")
        if self._shown and self._bar.disable:
            print(line, flush=True)

    def write(self, text: str) -> None:
        """A remark on stderr."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


def epoch_line(row: EpochMetrics, num_epochs: int) -> str:
    """A row of metrics.jsonl as one line for people."""
    loss = loss_name_of(row)
    keys = [f"{part}/{loss}" for part in ("train", "val")]
    parts = [f"{key} {row[key]:.5f}" for key in keys if key in row]
    if "latent/dead_units" in row:
        parts.append(f"dead units {row['latent/dead_units']}")
    parts.append(f"{row['images_per_s']:,.0f} images/s  {row['wall_s']:.1f} s")
    return f"epoch {row['epoch']}/{num_epochs}  {'  '.join(parts)}"


def group_line(rows: list[EpochMetrics], seeds: list[int], num_epochs: int) -> str:
    """An epoch of runs that train together as one line for people."""
    name = f"train/{loss_name_of(rows[0])}"
    parts = [f"median {name} {statistics.median(row[name] for row in rows):.5f}"]
    if "latent/dead_units" in rows[0]:
        dead = sum(row["latent/dead_units"] > 0 for row in rows)
        parts.append(f"{dead} of {len(rows)} with dead units")
    parts.append(f"{rows[0]['wall_s']:.2f} s each")
    shown = f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{shown}  epoch {rows[0]['epoch']}/{num_epochs}  {'  '.join(parts)}"


def score_table(summary: dict[str, Any], config: Config, remark: str | None) -> str:
    """The scores of a summary.json as a table, beside the baselines', and a remark."""
    reconstructs = "test/psnr_db" in summary
    below = ("test/mse", "test/psnr_db", "test/ssim") if reconstructs else ()
    lines = [
        f"{name:32}{summary[name]:10.5f}"
        for name in summary
        if name.startswith(("train/", "test/")) and name not in below
    ]
    if reconstructs:
        pca = f"test, PCA of {getattr(config.model, 'latent_dim', '')} components"
        rows = {
            "test, reconstructed": "test/mse",
            pca: "baseline/pca/test/mse",
            "test, mean training image": "baseline/mean_image/test/mse",
        }
        others = f"{summary['test/psnr_db']:9.2f} dB{summary['test/ssim']:8.3f}"
        lines.append(f"{'':32}{'MSE':>10}{'PSNR':>12}{'SSIM':>8}")
        for title, key in rows.items():
            if key in summary:
                rest = others if key == "test/mse" else ""
                lines.append(f"{title:32}{summary[key]:10.5f}{rest}")
    if "latent/dead_units" in summary:
        dead, latent_dim = summary["latent/dead_units"], config.model.latent_dim
        lines.append(f"dead latent units on the test split: {dead} of {latent_dim}")
    if remark:
        lines.append(remark)
    return "\n".join(lines)
