from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given

from petalfl.codecs import encode_with_feedback, parse_codec
from petalfl.codecs.lossless import deflate, inflate
from petalfl.errors import WireError
from petalfl.vectors import Vector
from tests.petalfl.codecs.vectors import deltas, vectors

RNG = np.random.default_rng(0)


def through(name: str, vector: Vector) -> Vector:
    codec = parse_codec(name)
    return codec.decode(codec.encode(vector, RNG), vector.size)


def test_topk_by_hand() -> None:
    vector = np.array([0.5, -3, 1, 0, 2, -1, 0.25, 1], np.float32)
    assert through("topk:0.25", vector).tolist() == [0, -3, 0, 0, 2, 0, 0, 0]
    assert through("topk:0.5", vector).tolist() == [0, -3, 1, 0, 2, -1, 0, 0]  # the first of equals
    assert through("topk:0.01", vector).tolist() == [0, -3, 0, 0, 0, 0, 0, 0]  # one at least


@given(vectors())
def test_topk_keeps_the_largest_as_they_are(vector: Vector) -> None:
    found = through("topk:0.1", vector)
    kept = found != 0
    assert np.count_nonzero(kept) <= max(1, int(0.1 * vector.size + 0.5))
    np.testing.assert_array_equal(found[kept], vector[kept])
    assert np.abs(vector[~kept]).max(initial=0) <= np.abs(vector[kept]).min(initial=np.inf)


@given(vectors())
def test_topk_int8_is_the_int8_of_topk(vector: Vector) -> None:
    found, exact = through("topk-int8:0.1", vector), through("topk:0.1", vector)
    assert not found[exact == 0].any()
    assert (np.abs(found - exact) <= np.abs(vector).max() / 126 + 2.0**-100).all()


@pytest.mark.parametrize("share", [0.0, 0.51, 1.0, -0.1])
def test_a_share_is_in_between(share: float) -> None:
    from petalfl.codecs.topk import topk

    with pytest.raises(ValueError, match="a share of"):
        topk("topk", share, parse_codec("f32"))


BITMAPS = {
    "a bit more": (b"\x07", "3 bits are set, expected 2"),
    "a bit less": (b"\x10", "1 bits are set, expected 2"),
    "none": (b"\x00", "0 bits are set, expected 2"),
    "beyond the last": (b"\x81", "beyond the last of 7"),
}


@pytest.mark.parametrize("name", BITMAPS)
def test_bitmaps_are_checked(name: str) -> None:
    bitmap, message = BITMAPS[name]
    with pytest.raises(WireError, match=message):
        parse_codec("topk:0.25").decode(bitmap + bytes(8), 7)


@pytest.mark.parametrize(
    ("name", "value"), [("topk:0.25", "f32: a value"), ("topk-int8:0.25", "scale")]
)
def test_what_is_kept_is_checked(name: str, value: str) -> None:
    nan = np.array([np.nan], "<f4").tobytes()
    rest = bytes(4) if name == "topk:0.25" else bytes(2)
    with pytest.raises(WireError, match=value):
        parse_codec(name).decode(b"\x03" + nan + rest, 7)


# Lossless


def test_what_does_not_get_shorter_goes_as_it_is() -> None:
    noise = np.random.default_rng(0).bytes(1000)
    assert deflate(noise) == noise
    assert len(deflate(bytes(1000))) < 20
    for content in (noise, bytes(1000)):
        assert bytes(inflate("x", deflate(content), 1000)) == content


STREAM = zlib.compress(bytes(1000))
STREAMS = {
    "one byte more": zlib.compress(bytes(1001)),
    "one byte less": zlib.compress(bytes(999)),
    "cut off": STREAM[:-1],
    "cut off before its checksum": STREAM[:-4],
    "wrong checksum": STREAM[:-1] + b"\x7f",
    "something behind": STREAM + b"\0",
    "empty": b"",
    "no stream": b"hello",
    "a bomb": zlib.compress(bytes(500_000), 9),
    "needs a dictionary": b"\x78\xbb\x00\x00\x00\x01" + bytes(9),
    "too long": bytes(1001),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_checked(name: str) -> None:
    with pytest.raises(WireError, match=r"^x: .*(expected|no zlib stream)"):
        inflate("x", STREAMS[name], 1000)


def test_a_bomb_takes_no_memory() -> None:
    size = 1 << 20
    bomb = zlib.compress(bytes(200 << 20), 9)
    codec = parse_codec("topk:0.1")
    assert len(bomb) < codec.max_bytes(size)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="zlib"):
            codec.decode(bomb, size)
        assert tracemalloc.get_traced_memory()[1] < 3 * codec.max_bytes(size)
    finally:
        tracemalloc.stop()


# Error feedback


@pytest.mark.parametrize("name", ["topk:0.05", "topk-int8:0.05"])
def test_nothing_is_lost(name: str) -> None:
    """What arrived and the last residual are what went in."""
    codec, size = parse_codec(name), 3000
    residual: Vector | None = None
    arrived, went_in = np.zeros(size), np.zeros(size)
    for seed in range(50):
        delta = deltas(size, seed)
        payload, residual = encode_with_feedback(codec, delta, residual, RNG)
        arrived += codec.decode(payload, size)
        went_in += delta
    assert residual is not None
    np.testing.assert_allclose(arrived + residual, went_in, atol=1e-6 * np.abs(went_in).max())
    assert np.linalg.norm(residual) < 0.5 * np.linalg.norm(went_in)


def test_what_is_small_arrives_in_the_end() -> None:
    codec = parse_codec("topk:0.1")
    delta = np.linspace(1, 2, 10, dtype=np.float32)
    residual: Vector | None = None
    arrived = np.zeros(10, np.float32)
    for _ in range(40):
        payload, residual = encode_with_feedback(codec, delta, residual, RNG)
        arrived += codec.decode(payload, 10)
    assert residual is not None
    assert (arrived > 0).all()  # without feedback: the last one alone
    np.testing.assert_allclose(arrived + residual, 40 * delta, rtol=1e-5)


@pytest.mark.parametrize("name", ["f32", "int8"])
def test_a_codec_without_residual_sends_what_is_left(name: str) -> None:
    codec, delta, residual = parse_codec(name), deltas(1000, 1), deltas(1000, 2)
    payload, left = encode_with_feedback(codec, delta, residual, RNG)
    assert left is None
    total = delta + residual
    np.testing.assert_allclose(codec.decode(payload, 1000), total, atol=np.abs(total).max() / 100)


def test_the_residual_stays_bounded() -> None:
    """Top-k leaves at most 1 - k/n of the energy, so that residuals cannot pile up for good."""
    codec, size = parse_codec("topk:0.05"), 2000
    residual: Vector | None = None
    norms = []
    for seed in range(300):
        _, residual = encode_with_feedback(codec, deltas(size, seed), residual, RNG)
        assert residual is not None
        norms.append(float(np.linalg.norm(residual)))
    assert max(norms[150:]) < 1.5 * max(norms[:150])
