"""Two implementations of one training, in lockstep: how much do they differ?

From the same weights and batches each side gives a :class:`Snapshot` after every epoch.
In exact arithmetic the two would be equal for ever; in float64 they part by rounding
alone, and any porting bug known to us parts them by far more than the limits below.
NumPy alone: who trains, and with what, is not asked here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ae_jax.weights import StateDict

LIMITS = {"mini": 1e-10, "epoch": 1e-12, "end": 1e-6}
"""Largest difference allowed: of any entry on the mini set; relative to the norm of all
parameters after an epoch, and after up to ten."""


class Snapshot(NamedTuple):
    """Where a training stands at the end of an epoch, in PyTorch's names and layout.

    Attributes:
        losses: of each batch of the epoch, before its update.
        params: weights and biases.
        mu: Adam's first moment of each (PyTorch's ``exp_avg``).
        nu: Adam's second (``exp_avg_sq``).
    """

    losses: Float[np.ndarray, " T"]
    params: StateDict
    mu: StateDict
    nu: StateDict


TREES = ("params", "mu", "nu")
"""The parts of a snapshot that are arrays by name."""


def largest(ours: StateDict, theirs: StateDict) -> float:
    """The largest difference of two entries, over all arrays.

    Example:
        >>> largest({"w": np.array([1.0, 2.0])}, {"w": np.array([1.0, 2.5])})
        0.5
    """
    a, b = _joined(ours, theirs)
    return float(np.abs(a - b).max())


def norm_relative(ours: StateDict, theirs: StateDict) -> float:
    """‖a − b‖₂ / ‖b‖₂, all arrays joined; 0 if nothing differs.

    Example:
        >>> norm_relative({"w": np.array([3.0, 4.0])}, {"w": np.array([3.0, 0.0])})
        1.3333333333333333
    """
    a, b = _joined(ours, theirs)
    apart = np.linalg.norm(a - b)
    return float(apart / np.linalg.norm(b)) if apart else 0.0


def _joined(ours: StateDict, theirs: StateDict) -> tuple[np.ndarray, np.ndarray]:
    """Both as one vector of float64, so that a difference is not rounded away."""
    if set(ours) != set(theirs):
        raise ValueError(f"not the same arrays: {sorted(set(ours) ^ set(theirs))}")
    a, b = (
        np.concatenate([side[name].ravel().astype(np.float64) for name in theirs])
        for side in (ours, theirs)
    )
    return a, b


def compare_arrays(ours: StateDict, theirs: StateDict) -> list[dict[str, Any]]:
    """Of each array its ``name``, the largest and the norm-relative difference."""
    rows = []
    for name, b in theirs.items():
        pair = {name: ours[name]}, {name: b}
        rows.append({"name": name, "abs": largest(*pair), "nrel": norm_relative(*pair)})
    return rows


def relative_losses(
    ours: Float[np.ndarray, " T"], theirs: Float[np.ndarray, " T"]
) -> Float[np.ndarray, " T"]:
    """``|a − b| / |b|`` of each batch's loss."""
    return np.asarray(np.abs(ours - theirs) / np.abs(theirs))


def differences(ours: Snapshot, theirs: Snapshot) -> dict[str, float]:
    """How much two trainings differ at the end of an epoch.

    Returns:
        Of ``params``, ``mu`` and ``nu`` the largest difference (``params_abs``) and
        the norm-relative one (``params_nrel``); ``loss_rel``, the largest relative
        difference of a batch's loss.
    """
    row = {"loss_rel": float(relative_losses(ours.losses, theirs.losses).max())}
    for name in TREES:
        pair = getattr(ours, name), getattr(theirs, name)
        row[f"{name}_abs"] = largest(*pair)
        row[f"{name}_nrel"] = norm_relative(*pair)
    return row


def max_difference(ours: Iterable[Snapshot], theirs: Iterable[Snapshot]) -> float:
    """The largest difference of any parameter or moment at the end of any epoch.

    The check of a port: from the same weights and batches, in float64, a right one
    stays below 1e-10 over some short epochs, and no porting bug known to us does.
    """
    apart = [
        largest(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in TREES
    ]
    return float(np.max(apart))  # unlike Python's max, it lets no NaN pass


def check_lockstep(
    mini: Sequence[Mapping[str, Any]], whole: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Hold a lockstep to its limits: on the mini set, after an epoch, at the end.

    Args:
        mini: of each epoch on the mini set, ``step`` and :func:`differences`.
        whole: the same on the whole training split.

    Returns:
        Of each check its ``name`` in the headline, ``what`` it is in words, the
        ``step``, the ``value``, the ``limit``, and whether it ``passed``.
    """
    entries = [[row[f"{name}_abs"] for name in TREES] for row in mini]
    largest_of = "largest difference of a parameter or a moment"
    relative = "norm-relative difference of the parameters"
    found = [
        (mini[-1]["step"], "abs", largest_of, float(np.max(entries)), LIMITS["mini"])
    ]
    for row, limit in ((whole[0], "epoch"), (whole[-1], "end"))[: len(whole)]:
        value = row["params_nrel"]
        found.append((row["step"], "nrel", relative, value, LIMITS[limit]))
    return [
        {
            "name": f"lockstep_f64_{step}_{measure}",
            "what": f"float64, {step:,} steps: {what}",
            "step": step,
            "value": value,
            "limit": limit,
            "passed": value <= limit,
        }
        for step, measure, what, value, limit in found
    ]
