"""A data set as arrays: prepared once, checked on every load, filtered and split.

A data set is a class whose fields are its options and whose ``load()`` returns
:class:`Arrays`; what holds for all of them is done here, by :func:`load`. To add one,
add a line to :data:`DATASETS`; a notebook's own class need not be there, nor inherit::

    @dataclass(frozen=True)
    class Blobs:
        num: int = 1000

        def load(self):
            images = ...  # uint8 [N, H, W, C]
            return Arrays(images, labels, test_images, test_labels)

    dataset = data.load(Blobs(num=500))
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Integer

from ae_jax.data.mnist import FashionMnist, Kmnist, Mnist
from ae_jax.data.own import Folder, Npz
from ae_jax.data.stored import (
    Arrays,
    DataOptions,
    ImageFile,
    Source,
    check_images,
    check_labels,
    compute_fingerprint,
    take,
)
from ae_jax.errors import UserError
from ae_jax.options import options

__all__ = [
    "DATASETS",
    "Arrays",
    "DataOptions",
    "Dataset",
    "Digits",
    "FashionMnist",
    "Folder",
    "ImageFile",
    "Kmnist",
    "Mnist",
    "Npz",
    "Source",
    "Split",
    "compute_fingerprint",
    "load",
]


@options
class Digits(DataOptions):
    """The 8×8 digits that scikit-learn bundles: nothing to download.

    Source:
        ``sklearn.datasets.load_digits``; the first 1,437 rows train, 360 test. Their
        17 grey levels are spread to 256.
    """

    fingerprint: ClassVar[str] = (
        "4853aa001c6233313199ea342396329453a170c86db745938769136af141c29d"
    )

    def load(self) -> Arrays:
        """Training and test images, in the stored order."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        labels = digits.target.astype(np.uint8)
        parts = images[:1437], labels[:1437], images[1437:], labels[1437:]
        arrays = Arrays(*parts, fingerprint=self.fingerprint)
        if compute_fingerprint(arrays) != self.fingerprint:
            raise UserError("digits: not the known images; reinstall scikit-learn")
        return arrays


DATASETS: dict[str, type[DataOptions]] = {
    "mnist": Mnist,
    "fashion_mnist": FashionMnist,
    "kmnist": Kmnist,
    "digits": Digits,
    "folder": Folder,
    "npz": Npz,
}
"""Every data set by its name; the fields of its class are its options."""


class Split(NamedTuple):
    """A part of a data set; row i of both belongs together."""

    images: Any
    """uint8 [N, H, W, C]: an array or, streamed, an :class:`ImageFile`."""
    labels: Integer[np.ndarray, "N"]


@dataclass(frozen=True)
class Dataset:
    """A data set, ready to train on."""

    train: Split
    validation: Split
    """The last images of the stored training split; empty if none are held out."""
    test: Split
    fingerprint: str
    """sha256 of the images and labels of both splits, all classes, nothing held out."""
    source: Source
    """Where this load had them from; ``prepared``: an earlier one left them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image: (H, W, C)."""
        return tuple(self.test.images.shape[1:])

    def describe(self) -> dict[str, Any]:
        """What a run's config.json says of its data."""
        return {
            "fingerprint": self.fingerprint,
            "source": self.source,
            "num_train": len(self.train.labels),
            "shape": list(self.shape),
        }


def load(dataset: Any) -> Dataset:
    """The splits of a data set; the first time it is fetched and prepared.

    Args:
        dataset: an instance of a class in DATASETS, or of any with ``load()``.

    Returns:
        The splits in their stored order. That of tfds's sets is tfds's own, shuffled by
        a hash of each image's number, the same on every machine.

    Raises:
        UserError: arrays of another form; labels that do not exist; too many images
            held out; damaged files, with the folder to delete; a bad file in
            ``source``; no source left.
        OSError: the disk's refusal (full, not writable). Call again later.
    """
    arrays = _check(dataset.load())
    train = Split(arrays.train_images, arrays.train_labels)
    test = Split(arrays.test_images, arrays.test_labels)
    train = _keep_classes(train, getattr(dataset, "classes", ()))
    train, validation = _hold_out(train, getattr(dataset, "num_validation", 0))
    train = train._replace(images=_align(train.images))
    fingerprint = arrays.fingerprint or compute_fingerprint(arrays)
    return Dataset(train, validation, test, fingerprint, arrays.source)


def _align(images: Any) -> Any:
    """Images where JAX takes them as they are: a CPU's devices all share this copy."""
    if isinstance(images, ImageFile) or images.ctypes.data % 64 == 0:
        return images
    buffer = np.empty(images.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    aligned = buffer[start : start + images.nbytes].reshape(images.shape)
    aligned[...] = images
    return aligned


def _check(arrays: Arrays) -> Arrays:
    train = check_images("train_images", arrays.train_images)
    test = check_images("test_images", arrays.test_images)
    check_labels("train_labels", arrays.train_labels, len(train))
    check_labels("test_labels", arrays.test_labels, len(test))
    if train.shape[1:] != test.shape[1:]:
        raise UserError(
            "train_images and test_images differ in size: "
            f"{train.shape[1:]} and {test.shape[1:]}"
        )
    return arrays._replace(train_images=train, test_images=test)


def _keep_classes(train: Split, classes: tuple[int, ...]) -> Split:
    if not classes:
        return train
    known = np.unique(train.labels).tolist()
    if unknown := sorted(set(classes) - set(known)):
        raise UserError(
            f"data.classes: no training image has the label {unknown[0]}; there are "
            f"{len(known)} labels, from {known[0]} to {known[-1]}"
        )
    return _take(train, np.flatnonzero(np.isin(train.labels, classes)))


def _hold_out(train: Split, count: int) -> tuple[Split, Split]:
    size = len(train.labels)
    if count >= size:
        raise UserError(
            f"data.num_validation: must be below {size}, the number of training "
            f"images, got {count}"
        )
    kept = _take(train, slice(size - count))
    return kept, _take(train, np.arange(size - count, size))


def _take(split: Split, rows: slice | Integer[np.ndarray, "n"]) -> Split:
    return Split(take(split.images, rows), split.labels[rows])
