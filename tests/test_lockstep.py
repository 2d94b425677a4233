"""The yardstick itself: what two trainings' differences are, and that no NaN passes."""

import math

import numpy as np
import pytest

from ae_jax.parity import lockstep


def snapshot(value, losses=(1.0, 2.0)):
    arrays = {"w": np.full((2, 2), value), "b": np.zeros(2)}
    return lockstep.Snapshot(np.array(losses), arrays, arrays, arrays)


def test_differences_are_those_of_the_joined_arrays():
    row = lockstep.differences(snapshot(1.5), snapshot(1.0, losses=(1.0, 4.0)))
    assert row["params_abs"] == row["mu_nrel"] == row["loss_rel"] == 0.5
    zeros = {"w": np.zeros(3)}
    assert lockstep.norm_relative(zeros, zeros) == 0


def test_a_difference_below_float32_is_seen():
    one = {"w": np.ones(1, np.float32)}
    assert lockstep.largest({"w": np.ones(1) + 1e-12}, one) > 0


def test_the_largest_difference_is_of_any_epoch_and_lets_no_nan_pass():
    good = [snapshot(1.0)] * 3
    assert lockstep.max_difference(good, good) == 0
    assert lockstep.max_difference([good[0], snapshot(0.75), good[0]], good) == 0.25
    for name in lockstep.TREES:
        other = good[0]._replace(**{name: snapshot(0.75).params})
        assert lockstep.max_difference([other], good[:1]) == 0.25
    for place in range(3):
        bad = [*good]
        bad[place] = snapshot(math.nan)
        assert math.isnan(lockstep.max_difference(bad, good))


def test_other_names_or_another_number_of_epochs_are_refused():
    one = {"w": np.zeros(2)}
    with pytest.raises(ValueError, match=r"not the same arrays: \['b'\]"):
        lockstep.largest(one, {**one, "b": np.zeros(2)})
    with pytest.raises(ValueError, match="zip"):
        lockstep.max_difference([snapshot(1.0)], [snapshot(1.0)] * 2)


@pytest.mark.parametrize("worse", [1e-9, math.nan])
def test_one_bad_number_fails_its_check_alone(worse):
    def row(step, **fields):
        return {
            "step": step,
            **lockstep.differences(snapshot(1), snapshot(1)),
            **fields,
        }

    mini, whole = [row(4), row(8)], [row(23), row(46)]
    checks = lockstep.check_lockstep(mini, whole)
    assert [check["name"] for check in checks] == [
        "lockstep_f64_8_abs", "lockstep_f64_23_nrel", "lockstep_f64_46_nrel",
    ]  # fmt: skip
    assert all(check["passed"] for check in checks)
    checks = lockstep.check_lockstep([row(4, mu_abs=worse), row(8)], whole)
    assert [check["passed"] for check in checks] == [False, True, True]
    checks = lockstep.check_lockstep(mini, [row(23, params_nrel=worse)])
    assert [check["passed"] for check in checks] == [True, False]
