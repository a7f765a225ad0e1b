"""Tensors that stay on the device; a federation with some is in tests/integration/test_fedbn."""

from __future__ import annotations

import numpy as np
import pytest

from petalfl.errors import ModelError
from petalfl.private_tensors import (
    check_tensors,
    private_values,
    put_back,
    tensors_of,
    withhold,
)
from petalfl.vectors import Vector
from tests.petalfl.builders import rich_manifest

RICH = rich_manifest()
FUSION = RICH.block("fusion")  # weight (5, 3), bias (3,), running_mean (3,)
NAMES = {"fusion/bias", "fusion/running_mean", "head-p/bias"}
VECTOR: Vector = np.arange(1, 22, dtype=np.float32)


def test_statistics_are_tensors_too() -> None:
    assert tensors_of(FUSION) == {
        "fusion/weight": slice(0, 15),
        "fusion/bias": slice(15, 18),
        "fusion/running_mean": slice(18, 21),
    }


def test_what_is_withheld_is_zero() -> None:
    kept = VECTOR.copy()
    found = withhold(FUSION, NAMES, VECTOR)
    np.testing.assert_array_equal(found, [*range(1, 16), 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(VECTOR, kept)
    assert withhold(FUSION, {"head-p/bias"}, VECTOR) is VECTOR
    of_parameters = withhold(FUSION, NAMES, VECTOR[:18])  # as a residual is
    np.testing.assert_array_equal(of_parameters, [*range(1, 16), 0, 0, 0])


def test_own_values_are_put_back() -> None:
    own = private_values(FUSION, NAMES, VECTOR)
    assert own.keys() == NAMES - {"head-p/bias"}
    theirs = np.zeros(21, np.float32)
    found = put_back(FUSION, own, theirs)
    np.testing.assert_array_equal(found, [0] * 15 + [16, 17, 18, 19, 20, 21])
    assert not theirs.any()
    some = put_back(FUSION, {"fusion/bias": own["fusion/bias"]}, theirs)
    np.testing.assert_array_equal(some, [0] * 15 + [16, 17, 18, 0, 0, 0])
    assert put_back(FUSION, {"head-p/bias": VECTOR[:2]}, theirs) is theirs


def test_values_of_another_size() -> None:
    with pytest.raises(ModelError, match="fusion/bias has 2 values here, the model's 3"):
        put_back(FUSION, {"fusion/bias": VECTOR[:2]}, VECTOR)


def test_a_model_without_the_tensor() -> None:
    check_tensors(RICH, NAMES)
    with pytest.raises(ModelError, match="the tensor fusion/gamma is private on this device"):
        check_tensors(RICH, {*NAMES, "fusion/gamma"})
