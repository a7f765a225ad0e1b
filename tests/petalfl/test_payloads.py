from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.codecs import parse_codec
from petalfl.errors import WireError
from petalfl.payloads import (
    check_payload_bytes,
    encode_payload,
    max_payload_bytes,
    parse_payload,
)
from petalfl.vectors import Vector
from tests.petalfl.builders import make_block
from tests.petalfl.codecs.vectors import NAMES, deltas

PLAIN = make_block("head", ("fusion",), 4, 9)  # 40 parameters
NORMED = make_block("encoder-acc", ("acc",), 4, 9, statistics=8)
RNG = np.random.default_rng(0)


def delta_of(block: str) -> Vector:
    """Of `NORMED`, large parameters and a running variance that falls to next to nothing."""
    if block == "plain":
        return deltas(40)
    return np.concatenate([100 * deltas(40), np.full(8, 1e-6 - 0.3700001, np.float32)])


@pytest.mark.parametrize("name", NAMES)
def test_statistics_come_back_as_they_are(name: str) -> None:
    codec, delta = parse_codec(name), delta_of("normed")
    payload, left = encode_payload(codec, NORMED, delta, None, RNG)
    found = parse_payload(codec, NORMED, payload).decode()
    np.testing.assert_array_equal(found[40:], delta[40:])
    np.testing.assert_array_equal(found[:40], codec.decode(payload[:-32], 40))
    check_payload_bytes(codec, len(payload), NORMED)
    if left is None:
        np.testing.assert_allclose(found, delta, atol=np.abs(delta).max() / 120)
    else:
        np.testing.assert_allclose(found[:40] + left, delta[:40], rtol=1e-5)


def test_f32_is_the_vector_itself() -> None:
    delta = delta_of("normed")
    payload, _ = encode_payload(parse_codec("f32"), NORMED, delta, None, RNG)
    assert payload == delta.astype("<f4").tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [PLAIN, NORMED], ids=["plain", "normed"])
@given(payload=st.binary(max_size=250))
def test_any_bytes_are_decoded_or_refused(name: str, block: object, payload: bytes) -> None:
    known = NORMED if block is NORMED else PLAIN
    try:
        found = parse_payload(parse_codec(name), known, payload).decode()
    except WireError:
        return
    assert found.shape == (known.size,) and np.isfinite(found).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_are_finite_on_both_sides(bad: float) -> None:
    delta, codec = delta_of("normed"), parse_codec("int8")
    payload, _ = encode_payload(codec, NORMED, delta, None, RNG)
    delta[-1] = bad
    with pytest.raises(ValueError, match="a running statistic is NaN or infinite"):
        encode_payload(codec, NORMED, delta, None, RNG)
    with pytest.raises(WireError, match="statistics: a value is NaN or infinite"):
        parse_payload(codec, NORMED, payload[:-4] + np.array([bad], "<f4").tobytes())


@pytest.mark.parametrize("name", NAMES)
def test_how_long_a_payload_may_be(name: str) -> None:
    codec = parse_codec(name)
    most = max_payload_bytes(codec, NORMED)
    assert most == codec.max_bytes(40) + 32
    check_payload_bytes(codec, most, NORMED)
    for wrong in (most + 1, *([most - 1, 1] if codec.has_fixed_length else [])):
        with pytest.raises(WireError, match=f"{wrong} bytes of {name} announced, expected {most}"):
            check_payload_bytes(codec, wrong, NORMED)
