"""What holds of every codec."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.codecs import CODECS, parse_codec
from petalfl.errors import WireError
from petalfl.vectors import Vector
from tests.petalfl.codecs.vectors import NAMES, deltas, sizes, vectors

RNG = np.random.default_rng(0)


def bound(name: str, vector: Vector) -> Vector:
    """How far off each value may be, as docs/protocol.md has it."""
    magnitude = np.abs(vector).astype(np.float64)
    if name == "f32":
        return np.zeros_like(vector)
    if name == "f16":
        return np.maximum(magnitude * 2.0**-11, 2.0**-25)
    if name == "bf16":
        return np.maximum(magnitude * 2.0**-8, 2.0**-134)
    assert name == "int8"
    groups = [magnitude[i : i + 256] for i in range(0, vector.size, 256)]
    return np.concatenate([np.full(g.size, g.max() / 126 + 2.0**-100) for g in groups])


@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "int8"])
@given(data=st.data())
def test_the_error_is_within_its_bound(name: str, data: st.DataObject) -> None:
    vector = data.draw(vectors())
    codec = parse_codec(name)
    payload = codec.encode(vector, RNG)
    assert len(payload) == codec.max_bytes(vector.size)
    found = codec.decode(payload, vector.size)
    assert found.dtype == np.float32 and found.shape == vector.shape
    assert (np.abs(found.astype(np.float64) - vector) <= bound(name, vector)).all()


@pytest.mark.parametrize("name", NAMES)
@given(payload=st.binary(max_size=2200), size=sizes)
def test_any_bytes_are_decoded_or_refused(name: str, payload: bytes, size: int) -> None:
    try:
        found = parse_codec(name).decode(payload, size)
    except WireError as error:
        assert str(error).startswith(name) and len(str(error)) < 200
    else:
        assert found.shape == (size,) and np.isfinite(found).all()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_bytes_of_the_right_length_are_decoded_or_refused(name: str, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300))
    length = parse_codec(name).max_bytes(size)
    payload = data.draw(st.binary(min_size=length, max_size=length))
    with contextlib.suppress(WireError):
        found = parse_codec(name).decode(payload, size)
        assert found.shape == (size,) and np.isfinite(found).all()


@pytest.mark.parametrize("name", NAMES)
@given(where=st.floats(0, 1, exclude_max=True), flipped=st.integers(1, 255))
def test_a_changed_byte_is_decoded_or_refused(name: str, where: float, flipped: int) -> None:
    codec = parse_codec(name)
    payload = bytearray(codec.encode(deltas(1000), RNG))
    payload[int(where * len(payload))] ^= flipped
    with contextlib.suppress(WireError):
        assert np.isfinite(codec.decode(bytes(payload), 1000)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 255, 256, 1000])
def test_a_payload_of_another_length_is_refused(name: str, size: int) -> None:
    codec = parse_codec(name)
    payload = codec.encode(deltas(size), RNG)
    assert len(payload) <= codec.max_bytes(size)
    codec.decode(memoryview(payload), size)
    for wrong in (b"", payload[:-1], payload + b"\0", payload * 2):
        with pytest.raises(WireError, match=r"expected|no zlib stream"):
            codec.decode(wrong, size)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_encoded(name: str, bad: float) -> None:
    vector = deltas(1000)
    vector[789] = bad
    with pytest.raises(ValueError, match="expected none beyond"):
        parse_codec(name).encode(vector, RNG)


BEYOND = {"f16": 65520.0, "bf16": 3.397e38, "int8": 8.6e37, "topk-int8:0.1": 8.6e37}


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_values(name: str) -> None:
    """Either refused, or finite when they arrive."""
    largest = np.nextafter(np.float32(BEYOND.get(name, np.inf)), np.float32(0))
    vector = np.array([largest, -largest, 1.0], np.float32)
    codec = parse_codec(name)
    if name in BEYOND:
        beyond = np.array([1.0, -BEYOND[name]], np.float32)
        with pytest.raises(ValueError, match=r"expected none beyond"):
            codec.encode(beyond, RNG)
        vector *= np.float32(0.98)
    found = codec.decode(codec.encode(vector, RNG), 3)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:1], vector[:1], rtol=1 / 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 300])
def test_zeros(name: str, size: int) -> None:
    codec = parse_codec(name)
    payload = codec.encode(np.zeros(size, np.float32), RNG)
    assert not codec.decode(payload, size).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_is_not_changed_and_need_not_be_contiguous(name: str) -> None:
    vector = deltas(4000)
    part = vector[::2]
    first = parse_codec(name).encode(part, np.random.default_rng(1))
    assert first == parse_codec(name).encode(part.copy(), np.random.default_rng(1))
    np.testing.assert_array_equal(vector, deltas(4000))


@pytest.mark.parametrize(
    "name", ["", "F32", "f32 ", "f64", "int8:3", "topk", "topk:", "topk:1", "topk:1.0", "topk:0",
             "topk:0.6", "topk:0.500001", "topk:0.000000",
             "topk:0.0", "topk:-0.1", "topk:.1", "topk:0.1234567", "topk:1e-3", "topk:nan",
             "topk-f16:0.1", "topk:0.1\n", "x" * 5000],
)  # fmt: skip
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"codec|share") as error:
        parse_codec(name)
    assert len(str(error.value)) < 200


def test_names_are_their_own() -> None:
    assert [parse_codec(name).name for name in NAMES] == list(NAMES)
    for name in ("topk:0.5", "topk:0.50", "topk:0.000001", "topk-int8:0.49"):
        assert parse_codec(name).name == name
    assert tuple(name.replace("0.1", "SHARE") for name in NAMES) == CODECS


@pytest.mark.parametrize(("name", "value"), [("f32", "nan"), ("bf16", "inf"), ("f16", "-inf")])
def test_no_value_that_is_not_finite_comes_in(name: str, value: str) -> None:
    written = {
        "f32": struct.pack("<f", float(value)),
        "f16": struct.pack("<e", float(value)),
        "bf16": struct.pack("<f", float(value))[2:],
    }
    with pytest.raises(WireError, match="NaN or infinite"):
        parse_codec(name).decode(written[name], 1)
