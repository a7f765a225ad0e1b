from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from petalfl.vectors import Vector, from_bytes, to_bytes

finite_vectors = st_numpy.arrays(
    np.float32,
    st.integers(0, 50),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(finite_vectors)
def test_from_bytes_inverts_to_bytes(vector: Vector) -> None:
    found = from_bytes(to_bytes(vector), vector.size)
    assert found.dtype == np.float32
    assert found.tobytes() == vector.tobytes()  # to the bit: -0.0 and denormals too


def test_bytes_are_little_endian_float32() -> None:
    assert to_bytes(np.array([1.0, -2.5], np.float32)) == bytes.fromhex("0000803f 000020c0")


@pytest.mark.parametrize("dtype", [">f4", "f8"])
def test_other_layouts_are_converted(dtype: str) -> None:
    vector = np.array([1.0, -2.5], dtype)
    assert to_bytes(vector) == bytes.fromhex("0000803f 000020c0")


def test_a_strided_vector_is_written_in_order() -> None:
    assert from_bytes(to_bytes(np.arange(6, dtype=np.float32)[::2]), 3).tolist() == [0, 2, 4]


def test_what_was_read_cannot_be_written() -> None:
    vector = from_bytes(bytes(8), 2)
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 1


@pytest.mark.parametrize("num_bytes", [0, 7, 9, 12])
def test_wrong_length(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{num_bytes} bytes, expected 8 for 2 parameters"):
        from_bytes(bytes(num_bytes), 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        from_bytes(np.array([0, bad], "<f4").tobytes(), 2)
