"""How well images are reconstructed: squared error, PSNR and SSIM.

From arrays to numbers in NumPy and SciPy alone, so that the output of any framework is
scored by the same code. Images are floats [N, H, W, C], C = 1 or 3; the arithmetic is
float64 whatever the input. SciPy is imported where it is used: it takes most of a
second, and a run starts without it.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float

BLOCK = 100
"""Images worked on at once, so that temporaries stay in the processor's cache."""


def squared_error(
    recon: Float[np.ndarray, "N H W C"], target: Float[np.ndarray, "N H W C"]
) -> Float[np.ndarray, "N"]:
    """Mean squared pixel error of each image.

    Args:
        recon: reconstructions, in the pixel scale of ``target``.
        target: pixels in [0, 1].

    Returns:
        Mean over H, W and C (not the sum), in squared pixel units, float64.

    Raises:
        ValueError: the two shapes differ; broadcasting is never wanted here.

    Source:
        PyTorch ``nn.MSELoss(reduction="none")`` averaged over all axes but the first.

    Example:
        >>> recon, target = np.array([[0.0, 1.0]]), np.array([[0.5, 1.0]])
        >>> squared_error(recon[..., None, None], target[..., None, None]).tolist()
        [0.125]
    """
    _check_same_shape(recon, target)
    errors = np.empty(len(target))
    for block in _blocks(len(target)):
        difference = np.subtract(recon[block], target[block], dtype=np.float64)
        errors[block] = np.mean(difference**2, axis=(1, 2, 3))
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
    recon: Float[np.ndarray, "N H W C"], target: Float[np.ndarray, "N H W C"]
) -> Float[np.ndarray, "N"]:
    """Structural similarity of each image to its target.

    Means, variances and the covariance are taken under a Gaussian window of σ 1.5,
    11 pixels wide or, if a side is shorter, the largest odd number that it holds. The
    border, where the window would hang over the edge, is left out. Each channel counts
    as an image.

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
        use_sample_covariance=False, channel_axis=-1)`` where that is defined, on sides
        of 11 or more.

    Example:
        >>> image = np.linspace(0, 1, 64).reshape(1, 8, 8, 1)
        >>> ssim(image, image).tolist()
        [1.0]
    """
    _check_same_shape(recon, target)
    scores = np.empty(len(target))
    for block in _blocks(len(target)):
        similarity = _ssim_map(
            recon[block].astype(np.float64), target[block].astype(np.float64)
        )
        scores[block] = similarity.mean(axis=(1, 2, 3))
    return scores


def _ssim_map(
    x: Float[np.ndarray, "n H W C"], y: Float[np.ndarray, "n H W C"]
) -> Float[np.ndarray, "n h w C"]:
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
    contrast = (2 * covariance + flat) / (variances + flat)
    return np.asarray(luminance * contrast)


def per_image_metrics(
    recon: Float[np.ndarray, "N H W C"], target: Float[np.ndarray, "N H W C"]
) -> dict[str, Float[np.ndarray, "N"]]:
    """How well each image is reconstructed.

    Args:
        recon: reconstructions, in the pixel scale of ``target``.
        target: pixels in [0, 1].

    Returns:
        ``mse``, ``psnr_db`` and ``ssim``; none depends on the other images.

    Raises:
        ValueError: the two shapes differ.
    """
    errors = squared_error(recon, target)
    return {"mse": errors, "psnr_db": psnr(errors), "ssim": ssim(recon, target)}


def mean_metrics(per_image: Mapping[str, Float[np.ndarray, "N"]]) -> dict[str, float]:
    """The means over the images of a split.

    Args:
        per_image: scores of each image by name, as :func:`per_image_metrics` has them.

    Returns:
        The mean of each. As ``mse`` it is the mean over all pixels of all images, as
        ``psnr_db`` the mean of the images' own PSNR (not the PSNR of the mean). The
        sums are rounded once, so the order of the images changes no bit of them.

    Raises:
        ValueError: there are no images.

    Example:
        >>> mean_metrics({"psnr_db": np.array([20.0, 40.0])})
        {'psnr_db': 30.0}
    """
    if not all(map(len, per_image.values())):
        raise ValueError("there are no images to score")
    return {name: math.fsum(values) / len(values) for name, values in per_image.items()}


def _blocks(num_images: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, num_images, BLOCK))


def _check_same_shape(
    recon: Float[np.ndarray, "..."], target: Float[np.ndarray, "..."]
) -> None:
    if recon.shape != target.shape:
        raise ValueError(
            f"recon has shape {recon.shape}, target {target.shape}: they must be equal"
        )
