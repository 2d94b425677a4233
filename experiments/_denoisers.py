"""Denoisers that are no networks: the rivals of :mod:`experiments.denoise`.

Each is fitted to noisy training images beside their clean ones, at whichever of its
settings does best on held-out training images. Images are [N, H, W], pixels in [0, 1].
"""

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from ae_jax import metrics
from ae_jax.data import Dataset
from ae_jax.errors import UserError
from ae_jax.objectives import Masking
from ae_jax.tasks.denoising import corrupt

Images: TypeAlias = Float[np.ndarray, "N H W"]
Denoise: TypeAlias = Callable[[Images], Images]


class Pairs(NamedTuple):
    """Images, with and without noise."""

    clean: Images
    noisy: Images


class Rival(NamedTuple):
    """A way to denoise.

    Attributes:
        fit: ``(training pairs, **setting)`` to the function that denoises.
        grid: the values of each setting that are tried.
        given_mask: it is given which pixels are masked, and of use for masking alone.
    """

    fit: Callable[..., Denoise]
    grid: Mapping[str, Sequence[Any]] = {}
    given_mask: bool = False

    def settings(self) -> Iterator[dict[str, Any]]:
        """Each combination of the values."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


def check_installed() -> None:
    """Refuse to start without the packages of the filters.

    Raises:
        UserError: one of them is not installed.
    """
    packages = {"skimage": "scikit-image", "pywt": "PyWavelets"}
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{package} is not installed; .venv/bin/pip install -c constraints.txt "
                "-e '.[rivals]'"
            )


def check_images(dataset: Dataset) -> None:
    """Refuse images that the rivals cannot take.

    Raises:
        UserError: they are in colour, or none are held out.
    """
    if dataset.train.images.shape[-1] > 1:
        raise UserError("data: the rivals take grey images; set data.channels to 1")
    if not len(dataset.validation.images):
        raise UserError(
            "data.num_validation: 0, but the rivals are tuned on images held out; "
            "hold some out"
        )


# --- Fitting and scoring --------------------------------------------------------------


def score_rivals(
    base: Any, objective: Any, dataset: Dataset, num_shown: int
) -> tuple[dict[str, Any], Images]:
    """The scores of each rival, at its best setting, by its name.

    Args:
        base: options of :mod:`experiments.denoise`.
        objective: makes the noise.
        dataset: what they are fitted to, chosen by, and scored on.
        num_shown: M, images.

    Returns:
        The scores; and what the best rival makes of the first test images [M, H, W].
    """
    seed, held_out = base.train.seed, dataset.validation.images[: base.num_tuning]
    test, found, shown = dataset.test.images, dict[str, Any](), {}
    train = noisy_pairs(objective, dataset.train.images, seed + 1)
    for name, rival in rivals(base).items():
        if rival.given_mask and not isinstance(objective, Masking):
            continue
        pairs = masked_pairs if rival.given_mask else noisy_pairs
        settings = [*rival.settings()]
        if len(settings) > 1:
            tuning = pairs(objective, held_out, seed + 2)
            scores = [score(rival.fit(train, **s), tuning) for s in settings]
            best = int(np.argmax([row["psnr_db"] for row in scores]))
            settings = [settings[best]]
        denoise = rival.fit(train, **settings[0])
        tested = pairs(objective, test, seed)
        found[name] = {**score(denoise, tested), "setting": settings[0]}
        shown[name] = denoise(tested.noisy[:num_shown]).clip(0, 1)
    return found, shown[max(found, key=lambda name: found[name]["psnr_db"])]


def noisy_pairs(objective: Any, images: Any, seed: int) -> Pairs:
    """Images beside what an objective's noise, drawn from a seed, makes of them."""
    noisy = corrupt(objective, images, seed % 2**32)
    return Pairs((images / np.float32(255))[..., 0], noisy[..., 0])


def masked_pairs(objective: Any, images: Any, seed: int) -> Pairs:
    """The same, but that masked pixels are NaN."""
    clean, noisy = noisy_pairs(objective, images, seed)
    seen = corrupt(objective, np.ones(images.shape, np.float32), seed % 2**32)
    return Pairs(clean, np.where(seen[..., 0] > 0, noisy, np.nan))


def score(denoise: Denoise, pairs: Pairs) -> dict[str, float]:
    """How near what is made of noisy images comes to the clean ones.

    Returns:
        ``psnr_db`` and ``ssim``, means over the images; each with ``…_half``, half a
        95 % interval of it; ``seconds`` an image.
    """
    start = time.perf_counter()
    recon = denoise(pairs.noisy)
    found = {"seconds": (time.perf_counter() - start) / len(pairs.noisy)}
    recon, clean = np.clip(recon, 0, 1)[..., None], pairs.clean[..., None]
    psnr = metrics.psnr(metrics.squared_error(recon, clean))
    for name, values in {"psnr_db": psnr, "ssim": metrics.ssim(recon, clean)}.items():
        found[name] = float(values.mean())
        found[f"{name}_half"] = float(1.96 * values.std(ddof=1) / len(values) ** 0.5)
    return found


def of_each(denoise: Callable[..., Any], **options: Any) -> Denoise:
    """A function of one image over many, on all cores."""
    from joblib import Parallel, delayed

    def of_some(images: Images) -> Images:
        return np.stack([denoise(image, **options) for image in images])

    def of_all(images: Images) -> Images:
        blocks = np.array_split(images, max(1, len(images) // 250))
        parts = Parallel(n_jobs=-1)(delayed(of_some)(block) for block in blocks)
        return np.concatenate(parts)

    return of_all


# --- Filters that know nothing of digits ----------------------------------------------


def gaussian(train: Pairs, sigma: float) -> Denoise:
    """Gaussian filter."""
    from scipy.ndimage import gaussian_filter

    return lambda noisy: gaussian_filter(noisy, sigma, axes=(1, 2))


def median(train: Pairs, size: int) -> Denoise:
    """Median filter."""
    from scipy.ndimage import median_filter

    return lambda noisy: median_filter(noisy, size, axes=(1, 2))


def non_local_means(train: Pairs, size: int, strength: float) -> Denoise:
    """Non-local means (Buades et al., CVPR 2005)."""
    from skimage.restoration import denoise_nl_means

    return of_each(
        denoise_nl_means, patch_size=size, patch_distance=9, h=strength, fast_mode=True
    )


def total_variation(train: Pairs, weight: float) -> Denoise:
    """Total variation (Chambolle, 2004)."""
    from skimage.restoration import denoise_tv_chambolle

    return of_each(denoise_tv_chambolle, weight=weight)


def wavelet(train: Pairs, sigma: float, kind: str) -> Denoise:
    """Wavelet shrinkage (BayesShrink; Chang et al., 2000)."""
    from skimage.restoration import denoise_wavelet

    return of_each(denoise_wavelet, sigma=sigma, wavelet=kind)


def biharmonic(train: Pairs) -> Denoise:
    """Biharmonic inpainting, which is given the mask: where the noisy image is NaN."""
    from skimage.restoration import inpaint_biharmonic

    def inpaint(image: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
        mask = np.isnan(image)
        return inpaint_biharmonic(np.where(mask, 0, image), mask)

    return of_each(inpaint)


# --- From training images ------------------------------------------------------------


def pca(train: Pairs, rank: int) -> Denoise:
    """Projection onto the first principal components of clean images."""
    mean, _, vectors = _once(_moments, flat(train.clean))
    basis = vectors[:, -rank:]
    return of_rows(lambda y: mean + (y - mean) @ basis @ basis.T)


def pca_wiener(train: Pairs, sigma: float) -> Denoise:
    """Wiener filter in the principal components of clean images."""
    mean, values, vectors = _once(_moments, flat(train.clean))
    gain = _wiener_gain(values, vectors, sigma)
    return of_rows(lambda y: mean + (y - mean) @ gain)


def linear_map(train: Pairs, ridge: float) -> Denoise:
    """The best linear map from the noisy to the clean image (ridge regression)."""
    x, y = flat(train.clean), flat(train.noisy)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    inputs, targets = y - mean_y, x - mean_x
    scatter = inputs.T @ inputs / len(y) + ridge * np.eye(y.shape[1], dtype=y.dtype)
    weights = np.linalg.solve(scatter, inputs.T @ targets / len(y))
    return of_rows(lambda y: mean_x + (y - mean_y) @ weights)


def mixture(train: Pairs, sigma: float, parts: int) -> Denoise:
    """Posterior mean under a mixture of Gaussians, fitted to clean images by k-means.

    Source:
        Zoran and Weiss, "From learning models of natural image patches to whole image
        restoration", ICCV 2011, with whole images for patches.
    """
    found = _once(_gaussians, flat(train.clean), parts)

    def denoise(y: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        log_p = np.empty((len(found), len(y)))
        for k, (count, mean, values, vectors) in enumerate(found):
            total, rest = values + sigma**2, y.shape[1] - len(values)
            along = ((y - mean) @ vectors) ** 2
            across = ((y - mean) ** 2).sum(axis=1) - along.sum(axis=1)
            fits = (along / total + np.log(total)).sum(axis=1)
            fits += across / sigma**2 + rest * np.log(sigma**2)
            log_p[k] = np.log(count) - fits / 2
        p = np.exp(log_p - log_p.max(axis=0))
        p = (p / p.sum(axis=0)).astype(y.dtype)
        x = np.zeros_like(y)
        for weight, (_, mean, values, vectors) in zip(p, found, strict=True):
            rows = weight > 1e-6  # few images belong to a part at all
            gain = _wiener_gain(values, vectors, sigma)
            x[rows] += weight[rows, None] * (mean + (y[rows] - mean) @ gain)
        return x

    return of_rows(denoise)


def _gaussians(x: Float[np.ndarray, "N D"], parts: int) -> list[Any]:
    """The size, mean, variances and principal components of each of so many parts.

    Those of the least variance are left out, as if they had none.
    """
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(parts, random_state=0, n_init=1, batch_size=2048)
    labels = kmeans.fit_predict(x)
    parts_of = [x[labels == k] for k in range(parts)]
    moments = [(len(part), *_moments(part)) for part in parts_of if len(part) > 1]
    return [
        (count, mean, values[values > 1e-4], vectors[:, values > 1e-4])
        for count, mean, values, vectors in moments
    ]


def kernel_average(train: Pairs, sigma: float) -> Denoise:
    """Posterior mean if the training images were all there are: a kernel regression.

    Source:
        Nadaraya and Watson, 1964.
    """
    x = flat(train.clean)
    norms = (x**2).sum(axis=1)

    def denoise(y: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        log_p = (y @ x.T - norms / 2) / sigma**2
        p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
        return p @ x / p.sum(axis=1, keepdims=True)

    return of_rows(denoise)


def table(train: Pairs, by_position: bool) -> Denoise:
    """Posterior mean of a pixel by its noisy value, and by its position too."""
    bins, (_, height, width) = 64, train.noisy.shape
    places = height * width if by_position else 1

    def cell(noisy: Images) -> np.ndarray:
        value = np.rint(noisy * (bins - 1)).astype(np.int64)
        place = np.arange(height * width).reshape(height, width) if by_position else 0
        return place * bins + value

    cells, size = cell(train.noisy).ravel(), places * bins
    total = np.bincount(cells, train.clean.ravel(), size)
    # A cell that was never seen keeps its value.
    value = np.tile(np.arange(bins) / (bins - 1), places)
    count = np.bincount(cells, minlength=size)
    means = (total + 1e-3 * value) / (count + 1e-3)
    return lambda noisy: means[cell(noisy)]


def boosted(train: Pairs, size: int, trees: int, pixels: int) -> Denoise:
    """Boosted trees for a pixel, from the noisy and two estimated images around it.

    They are given its position too. The estimates, by :func:`mixture` and
    :func:`linear_map`, see the whole image; they are fitted to five sixths of the
    images, the trees to the rest.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    cut = len(train.clean) - len(train.clean) // 6
    first, last = Pairs(*(x[:cut] for x in train)), Pairs(*(x[cut:] for x in train))
    estimates = [mixture(first, sigma=0.2, parts=100), linear_map(first, ridge=1e-3)]

    def features(noisy: Images, at: np.ndarray | None) -> Float[np.ndarray, "M F"]:
        around = [patches(estimate(noisy), 3, at) for estimate in estimates]
        return np.concatenate([patches(noisy, size, at), *around], axis=1)

    number = min(pixels, last.noisy.size)
    at = np.random.default_rng(0).choice(last.noisy.size, number, replace=False)
    model = HistGradientBoostingRegressor(
        max_iter=trees, max_leaf_nodes=127, learning_rate=0.2, early_stopping=False
    )
    model.fit(features(last.noisy, at), last.clean.ravel()[at])

    def predict(rows: Float[np.ndarray, "M F"]) -> Float[np.ndarray, " M"]:
        # What stays in the cache takes 0.4 of the time.
        parts = np.array_split(rows, max(1, len(rows) // 10_000))
        return np.concatenate([model.predict(part) for part in parts])

    def denoise(noisy: Images) -> Images:
        blocks = np.array_split(noisy, max(1, len(noisy) // 500))
        return np.concatenate(
            [predict(features(b, None)).reshape(b.shape) for b in blocks]
        )

    return denoise


def patches(
    images: Images, size: int, at: np.ndarray | None = None
) -> Float[np.ndarray, "M F"]:
    """The pixels around each, black outside the image, and its row and column.

    Args:
        images: [N, H, W].
        size: side of the patch, odd.
        at: numbers of the pixels wanted, in all N·H·W; None: all of them.
    """
    at = np.arange(images.size) if at is None else at
    number, row, column = np.unravel_index(at, images.shape)
    half = size // 2
    padded = np.pad(images, ((0, 0), (half, half), (half, half)))
    around = [
        padded[number, row + i, column + j] for i in range(size) for j in range(size)
    ]
    return np.stack([*around, row, column], axis=1).astype(np.float32)


def flat(images: Images) -> Float[np.ndarray, "N D"]:
    """Images as rows."""
    return images.reshape(len(images), -1)


def of_rows(denoise: Callable[..., Any], block: int = 500) -> Denoise:
    """A function of images as rows, a block of them at a time."""

    def of_all(noisy: Images) -> Images:
        starts = range(0, len(noisy), block)
        rows = [denoise(flat(noisy[start : start + block])) for start in starts]
        return np.concatenate(rows).reshape(noisy.shape)

    return of_all


_fitted: dict[Any, Any] = {}


def _once(fit: Callable[..., Any], x: Float[np.ndarray, "N D"], *args: Any) -> Any:
    """What is fitted to clean images: the same for every setting and every noise."""
    import joblib

    key = fit.__name__, joblib.hash((x, args))
    if key not in _fitted:
        _fitted[key] = fit(x, *args)
    return _fitted[key]


def _moments(x: Float[np.ndarray, "N D"]) -> tuple[Any, Any, Any]:
    """Mean, variances (ascending) and principal components of rows."""
    mean = x.mean(axis=0)
    centred = x - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(x))
    return mean, values.clip(0), vectors


def _wiener_gain(values: Any, vectors: Any, sigma: float) -> Any:
    """The matrix of Wiener's filter, of a Gaussian's variances and components."""
    return (vectors * (values / (values + sigma**2))) @ vectors.T


def rivals(base: Any) -> dict[str, Rival]:
    """The rivals by their names, and what is tried of each."""
    sigmas = (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    trees = {"trees": (base.num_trees,), "pixels": (base.num_pixels,)}
    return {
        "noisy image": Rival(lambda train: lambda noisy: noisy),
        "Gaussian filter": Rival(gaussian, {"sigma": (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)}),
        "median filter": Rival(median, {"size": (2, 3, 5)}),
        "non-local means": Rival(
            non_local_means,
            {"size": (3, 5), "strength": (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)},
        ),
        "total variation": Rival(
            total_variation, {"weight": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8)}
        ),
        "wavelets": Rival(
            wavelet,
            {"sigma": (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8), "kind": ("haar", "db2")},
        ),
        "biharmonic inpainting, given the mask": Rival(biharmonic, given_mask=True),
        "PCA": Rival(pca, {"rank": (10, 20, 30, 40, 60, 90, 120, 200)}),
        "PCA-Wiener": Rival(pca_wiener, {"sigma": sigmas}),
        "linear map": Rival(
            linear_map, {"ridge": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}
        ),
        "mixture of Gaussians": Rival(
            mixture, {"sigma": (0.05, 0.1, 0.2, 0.4), "parts": (100,)}
        ),
        "mean of training images by likeness": Rival(
            kernel_average, {"sigma": sigmas[3:]}
        ),
        "table by value": Rival(table, {"by_position": (False,)}),
        "table by value and position": Rival(table, {"by_position": (True,)}),
        "boosted trees": Rival(boosted, {"size": (9,), **trees}),
    }
