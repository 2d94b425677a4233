"""What reconstructions and codes are worth: metrics, diagnosis and baselines.

From arrays to numbers, in NumPy and SciPy alone, so that any framework's output is
scored by the same code. Images are rows of D = H·W pixels, or H·W·3 in colour; the
arithmetic is float64 whatever the input. N and M number the images of a split, K the
units of a code. The baselines read images block by block, so that they may be on disk.

SciPy is imported where it is used: most of a second, and a run starts without it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ae_jax.images import Images

BLOCK = 256
"""Images worked on at once, so that temporaries stay in the processor's cache; no more
than 256, or the sums of ``_second_moment`` are no longer exact."""

DENSE = 4096
"""Most pixels whose covariance is worth making: at twice as many it takes 0.5 GB."""
NUM_PASSES = 8
"""Over images of more pixels, to find their principal components."""

WHITE = 255
"""The largest value of a stored pixel; divided by it, pixels lie in [0, 1]."""


def _blocks(num_images: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, num_images, BLOCK))


def squared_error(
    recon: Float[np.ndarray, "N D"], target: Float[np.ndarray, "N D"]
) -> Float[np.ndarray, "N"]:
    """Mean squared pixel error of each image.

    Args:
        recon: reconstructions, in the pixel scale of ``target``.
        target: pixels in [0, 1].

    Returns:
        Mean over D (not the sum), in squared pixel units, float64.

    Raises:
        ValueError: the two shapes differ; broadcasting is never wanted here.

    Source:
        PyTorch ``nn.MSELoss(reduction="none")`` averaged over axis 1.

    Example:
        >>> squared_error(np.array([[0.0, 1.0]]), np.array([[0.5, 1.0]])).tolist()
        [0.125]
    """
    _check_same_shape(recon, target)
    errors = np.empty(len(target))
    for block in _blocks(len(target)):
        difference = np.subtract(recon[block], target[block], dtype=np.float64)
        errors[block] = np.mean(difference**2, axis=1)
    return errors


def psnr(mse: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Peak signal-to-noise ratio of each image, in dB.

    Args:
        mse: mean squared error of each image whose pixels lie in [0, 1].

    Returns:
        −10 log10(mse); at most 100 dB, since an mse below 1e-10 counts as 1e-10 and
        a perfect image would otherwise make every mean infinite.

    Example:
        >>> psnr(np.array([0.01, 0.0])).tolist()
        [20.0, 100.0]
    """
    return np.asarray(-10 * np.log10(np.maximum(mse, 1e-10)))


def ssim(
    recon: Float[np.ndarray, "N H W *C"], target: Float[np.ndarray, "N H W *C"]
) -> Float[np.ndarray, "N"]:
    """Structural similarity of each image to its target.

    Means, variances and the covariance are taken under a Gaussian window of σ 1.5,
    11 pixels wide or, if a side is shorter, the largest odd number that it holds. The
    border, where the window would hang over the edge, is left out. Each channel of a
    colour image counts as an image.

    Args:
        recon: reconstructions, in the pixel scale of ``target``.
        target: pixels in [0, 1].

    Returns:
        Mean over the pixels and channels of each image; 1 where the two are equal;
        float64.

    Raises:
        ValueError: the two shapes differ.

    Source:
        Wang et al., "Image quality assessment: from error visibility to structural
        similarity", IEEE TIP 13 (2004), equation 13, with their constants. Equals
        scikit-image's ``structural_similarity(gaussian_weights=True, data_range=1,
        use_sample_covariance=False)`` where that is defined, on sides of 11 or more; in
        colour with ``channel_axis=-1``.

    Example:
        >>> image = np.linspace(0, 1, 64).reshape(1, 8, 8)
        >>> ssim(image, image).tolist()
        [1.0]
    """
    _check_same_shape(recon, target)
    scores = np.empty(len(target))
    axes = tuple(range(1, target.ndim))
    for block in _blocks(len(target)):
        scores[block] = _ssim_map(
            recon[block].astype(np.float64), target[block].astype(np.float64)
        ).mean(axis=axes)
    return scores


def _ssim_map(
    x: Float[np.ndarray, "n H W *C"], y: Float[np.ndarray, "n H W *C"]
) -> Float[np.ndarray, "n h w *C"]:
    from scipy.ndimage import gaussian_filter

    height, width = x.shape[1:3]
    half = (min(11, height, width) - 1) // 2
    moments = gaussian_filter(
        np.stack([x, y, x * x, y * y, x * y]), sigma=1.5, radius=half, axes=(2, 3)
    )
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = moments[
        :, :, half : height - half, half : width - half
    ]
    # Two small constants keep the quotients finite where an image is black or flat.
    black, flat = 0.01**2, 0.03**2
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = mean_xy - product, mean_xx + mean_yy - squares
    luminance = (2 * product + black) / (squares + black)
    scores: Float[np.ndarray, "n h w *C"] = (
        luminance * (2 * covariance + flat) / (variances + flat)
    )
    return scores


def per_image_metrics(
    recon: Float[np.ndarray, "N D"],
    target: Float[np.ndarray, "N D"],
    shape: tuple[int, ...],
) -> dict[str, Float[np.ndarray, "N"]]:
    """How well each image is reconstructed.

    Args:
        recon: reconstructions, in the pixel scale of ``target``.
        target: pixels in [0, 1].
        shape: of an image, (H, W) or (H, W, 3); D is the product.

    Returns:
        ``mse``, ``psnr_db`` and ``ssim``; none depends on the other images.

    Raises:
        ValueError: the two shapes differ, or ``shape`` does not fit.
    """
    errors = squared_error(recon, target)
    return {
        "mse": errors,
        "psnr_db": psnr(errors),
        "ssim": ssim(recon.reshape(-1, *shape), target.reshape(-1, *shape)),
    }


def mean_metrics(per_image: Mapping[str, Float[np.ndarray, "N"]]) -> dict[str, float]:
    """How well a split is reconstructed: the means over its images.

    Args:
        per_image: what :func:`per_image_metrics` returns.

    Returns:
        ``mse``, the mean over all pixels of all images; ``psnr_db``, the mean of the
        images' own PSNR (not the PSNR of the mean); ``ssim``. The sums are rounded
        once, so the order of the images does not change a bit of them.
    """
    return {name: math.fsum(values) / len(values) for name, values in per_image.items()}


def image_metrics(
    recon: Float[np.ndarray, "N D"],
    target: Float[np.ndarray, "N D"],
    shape: tuple[int, ...],
) -> dict[str, float]:
    """The means of :func:`per_image_metrics` over the images of a split.

    Raises:
        ValueError: the two shapes differ, ``shape`` does not fit, or N is 0.

    Example:
        >>> black, grey = np.zeros((2, 64)), np.full((2, 64), 0.1)
        >>> metrics = image_metrics(grey, black, (8, 8))
        >>> {name: round(value, 4) for name, value in metrics.items()}
        {'mse': 0.01, 'psnr_db': 20.0, 'ssim': 0.0099}
    """
    if len(target) == 0:
        raise ValueError("there are no images to score")
    return mean_metrics(per_image_metrics(recon, target, shape))


def _check_same_shape(
    recon: Float[np.ndarray, "..."], target: Float[np.ndarray, "..."]
) -> None:
    if recon.shape != target.shape:
        raise ValueError(
            f"recon has shape {recon.shape}, target {target.shape}: they must be equal"
        )


def dead_units(codes: Float[np.ndarray, "N K"]) -> Bool[np.ndarray, "K"]:
    """Which units of the code are dead: zero for every image of the split.

    Example:
        >>> dead_units(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])).tolist()
        [True, False, False]
    """
    return np.logical_not(codes.any(axis=0))


OUTCOMES = ("healthy", "part-dead", "collapsed")


def outcome(dead_units: int, code_width: int) -> str:
    """What has become of a run: healthy, part-dead or collapsed.

    Example:
        >>> [outcome(dead, code_width=3) for dead in range(4)]
        ['healthy', 'part-dead', 'part-dead', 'collapsed']
    """
    return OUTCOMES[(dead_units > 0) + (dead_units == code_width)]


def median_interval(values: Float[np.ndarray, "N"]) -> tuple[float, float]:
    """Interval for the median that such values come from, at 95 % (bootstrap).

    Source:
        Efron and Tibshirani, "An introduction to the bootstrap", 1993, section 13.3
        (percentiles), as ``scipy.stats.bootstrap`` has it.
    """
    from scipy import stats

    if len(values) < 2:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.median, method="percentile", rng=0)
    low, high = found.confidence_interval
    return float(low), float(high)


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's interval for a share, at 95 %.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference",
        JASA 22 (1927).

    Example:
        >>> low, high = share_interval(19, 64)
        >>> round(low, 3), round(high, 3)
        (0.199, 0.418)
    """
    from scipy import stats

    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def summarise_runs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What has become of runs that differ in their seed only, with 95 % intervals.

    Args:
        rows: of each run ``outcome``, see :func:`outcome`, and ``test/mse``.

    Returns:
        ``num_seeds``; ``test/mse/median`` of all of them, with ``…_low`` and
        ``…_high``; of each outcome, ``healthy`` say, its number, ``share_healthy`` with
        ``…_low`` and ``…_high``, and ``test/mse/healthy``, the median of those runs.
    """
    scores = np.array([row["test/mse"] for row in rows])
    low, high = median_interval(scores)
    found: dict[str, Any] = {
        "num_seeds": len(rows),
        "test/mse/median": float(np.median(scores)),
        "test/mse/median_low": low,
        "test/mse/median_high": high,
    }
    for name in OUTCOMES:
        of_it = scores[[row["outcome"] == name for row in rows]]
        low, high = share_interval(len(of_it), len(rows))
        key = name.replace("-", "_")
        found |= {key: len(of_it), f"share_{key}": len(of_it) / len(rows)}
        found |= {f"share_{key}_low": low, f"share_{key}_high": high}
        found[f"test/mse/{key}"] = float(np.median(of_it)) if len(of_it) else None
    return found


def diagnose(dead_counts: Sequence[int], code_width: int) -> str | None:
    """One sentence about the dead units of a run, and what to try; None if all live.

    A ReLU whose input is negative for every image has no gradient, so a unit seldom
    comes back once it is dead. Most die within the first epoch, so it is mainly the
    initial weights that decide, and another seed that helps.

    Args:
        dead_counts: dead units at the end of each epoch so far, the first epoch first.
        code_width: units of the code.

    Example:
        >>> diagnose([1, 2, 2], code_width=3)  # doctest: +ELLIPSIS
        '2 of 3 code units have been dead since epoch 2: try another --train.seed, ...'
        >>> diagnose([1, 0], code_width=3)
    """
    dead = dead_counts[-1] if dead_counts else 0
    if dead == 0:
        return None
    fewer = [epoch for epoch, count in enumerate(dead_counts, start=1) if count < dead]
    since = f"dead since epoch {max(fewer, default=0) + 1}"
    remedy = "try another --train.seed, or --model.code-activation leaky_relu."
    if dead < code_width:
        have = "has" if dead == 1 else "have"
        return f"{dead} of {code_width} code units {have} been {since}: {remedy}"
    units = "the only code unit has" if dead == 1 else f"all {dead} code units have"
    collapse = "the run has collapsed and predicts one image"
    return f"{units} been {since}: {collapse}; {remedy}"


def mean_image_mse(train: Images, test: Images) -> float:
    """Error of predicting the training split's mean image for every test image.

    The score of a collapsed run, near enough: a model must beat it to have learnt
    anything about single images.

    Args:
        train: stored pixels [N, D], 0 to 255.
        test: stored pixels [M, D], 0 to 255.

    Returns:
        Mean over all pixels of ``test``, in squared pixel units of [0, 1].

    Example:
        >>> train = np.array([[0, 255], [255, 255]], np.uint8)
        >>> mean_image_mse(train, np.array([[255, 255]], np.uint8))
        0.125
    """
    return _residual_mse(test, _mean_image(train), np.empty((train.shape[1], 0)))


def _mean_image(images: Images) -> Float[np.ndarray, "D"]:
    """The mean of the images; their sums are integers, and exact in any order."""
    total = np.zeros(images.shape[1])
    for block in _blocks(len(images)):
        total += images[block].sum(axis=0, dtype=np.float64)
    return total / len(images)


def pca_mse(train: Images, test: Images, num_components: int) -> float:
    """Error on the test split of PCA, the best linear autoencoder of this code width.

    Args:
        train: stored pixels [N, D], 0 to 255; mean and components are fitted on them.
        test: stored pixels [M, D], 0 to 255.
        num_components: at least 1; from D on the reconstruction is perfect.

    Returns:
        Mean over all pixels of ``test``, in squared pixel units of [0, 1].

    Raises:
        ValueError: ``num_components`` is below 1.

    Above ``DENSE`` pixels the components are those of subspace iteration; of patches of
    photographs the error was within a hundred-thousandth of the exact one.

    Source:
        Baldi and Hornik, "Neural networks and principal component analysis: learning
        from examples without local minima", Neural Networks 2 (1989): a linear
        autoencoder can do no better on the split that it is fitted on.

    Example:
        >>> line = np.array([[0, 0], [100, 100], [200, 200]], np.uint8)
        >>> round(pca_mse(line, line, num_components=1), 12)
        0.0
    """
    from scipy.sparse.linalg import eigsh

    if num_components < 1:
        raise ValueError(f"num_components: k must be above 0, got {num_components}")
    if num_components >= train.shape[1]:
        return 0.0
    mean = _mean_image(train)
    if train.shape[1] > DENSE:
        return _residual_mse(test, mean, _iterate(train, mean, num_components))
    covariance = _second_moment(train) - np.outer(mean, mean)
    if not covariance.any():  # all images are the same one; ARPACK refuses zeros
        return mean_image_mse(train, test)
    # The seed fixes ARPACK's starting vector, and with it the last bits.
    _, components = eigsh(covariance, num_components, which="LA", rng=0)
    return _residual_mse(test, mean, components)


def _second_moment(images: Images) -> Float[np.ndarray, "D D"]:
    """Mean over the images of x xᵀ, exact but for the division.

    A block's sums are integers below 256 · 255² < 2²⁴, which float32 holds exactly:
    the fast single-precision product loses nothing, in whatever order it adds.
    """
    total = np.zeros((images.shape[1], images.shape[1]))
    for block in _blocks(len(images)):
        pixels = images[block].astype(np.float32)
        total += pixels.T @ pixels
    return total / len(images)


def _iterate(
    images: Images, mean: Float[np.ndarray, "D"], num_components: int
) -> Float[np.ndarray, "D K"]:
    """The first principal components, near enough, without the covariance as a matrix.

    Source:
        Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53
        (2011), algorithm 4.4, from more than twice as many random directions.
    """
    shift = mean.astype(np.float32)

    def scatter(basis: Float[np.ndarray, "D k"]) -> Float[np.ndarray, "D k"]:
        total, factor = np.zeros(basis.shape), basis.astype(np.float32)
        for block in _blocks(len(images)):
            centred = images[block] - shift
            total += centred.T @ (centred @ factor)
        return total

    width = min(2 * num_components + 10, len(mean))
    basis = np.random.default_rng(0).standard_normal((len(mean), width))
    for _ in range(NUM_PASSES):
        basis, _ = np.linalg.qr(scatter(basis))
    _, directions = np.linalg.eigh(basis.T @ scatter(basis))
    components: np.ndarray = basis @ directions[:, -num_components:]
    return components


def _residual_mse(
    images: Images,
    mean: Float[np.ndarray, "D"],
    components: Float[np.ndarray, "D K"],
) -> float:
    """Mean squared part of the pixels, in [0, 1], outside ``mean + span(components)``.

    Args:
        images: stored pixels, 0 to 255.
        mean: a point of the subspace, in stored pixels.
        components: orthonormal columns.
    """
    total = 0.0
    for block in _blocks(len(images)):
        centred = images[block] - mean
        residual = centred - centred @ components @ components.T
        total += float(np.sum(residual**2))
    return total / (math.prod(images.shape) * WHITE**2)
