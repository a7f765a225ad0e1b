"""Every backend gives the same sums, of every codec, whatever the order."""

from __future__ import annotations

import importlib.util
import sys
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from petalfl.codecs import Encoded, parse_codec
from petalfl.codecs.encoded import ALIGN, plain
from server.reducer import FORMS, Backend, active, choose, parse_reducer, use

NAMES = ("numpy", "numba", "torch")
CODECS = ("f32", "f16", "bf16", "int8", "topk:0.1", "topk:0.5", "topk-int8:0.3")
SIZES = (1, 2, 255, 256, 257, ALIGN, ALIGN + 1, (1 << 17) - 1, (1 << 17) + 300)


@pytest.fixture(params=NAMES, scope="module")
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param != "numpy":
        pytest.importorskip(request.param)
    return choose(request.param)


def encoded(codec: str, size: int, rng: np.random.Generator, scale: float = 1.0) -> Encoded:
    vector = (scale * rng.standard_normal(size)).astype(np.float32)
    return parse_codec(codec).parse(parse_codec(codec).encode(vector, rng), size)


def summed(
    backend: Backend, vectors: Sequence[Encoded], factors: NDArray[np.float64]
) -> NDArray[np.float64]:
    total = np.zeros(vectors[0].size)
    backend.fold(total, vectors, factors)
    return total


def assert_sum(
    found: NDArray[np.float64],
    vectors: Sequence[Encoded],
    factors: NDArray[np.float64],
    tolerance: float,
) -> None:
    """Within ``tolerance`` of Σ |factor · value|."""
    terms = [f * v.decode().astype(np.float64) for f, v in zip(factors, vectors, strict=True)]
    bound = tolerance * np.sum(np.abs(terms), axis=0)
    assert (np.abs(found - np.sum(terms, axis=0)) <= bound).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_is_that_of_what_the_codec_decodes(backend: Backend, codec: str, size: int) -> None:
    """To the rounding of one float32 product, level times scale, where there is one."""
    rng = np.random.default_rng(size)
    vectors = [encoded(codec, size, rng) for _ in range(11)]  # eight, and three
    factors = rng.uniform(0.1, 1000, 11)
    tolerance = 1e-7 if "int8" in codec else 1e-14
    assert_sum(summed(backend, vectors, factors), vectors, factors, tolerance)


def test_a_sum_of_no_values(backend: Backend) -> None:
    assert summed(backend, [plain(np.zeros(0, np.float32))] * 2, np.ones(2)).size == 0


@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1e4])
def test_every_f16_is_read_as_it_is(backend: Backend, scale: float) -> None:
    """Subnormal ones, too."""
    vectors = [encoded("f16", 3000, np.random.default_rng(0), scale)]
    np.testing.assert_array_equal(summed(backend, vectors, np.ones(1)), vectors[0].decode())


def test_codecs_may_be_mixed(backend: Backend) -> None:
    rng = np.random.default_rng(1)
    vectors = [encoded(codec, 5000, rng) for codec in CODECS for _ in range(9)]
    factors = rng.uniform(1, 2, len(vectors))
    order = rng.permutation(len(vectors))
    vectors, factors = [vectors[k] for k in order], factors[order]
    assert_sum(summed(backend, vectors, factors), vectors, factors, 1e-7)


def test_a_thousand_float32_updates_in_any_order(backend: Backend) -> None:
    """The law of all backends is 1e-6; float64 gives far better."""
    rng = np.random.default_rng(2)
    vectors = [encoded("f32", 700, rng) for _ in range(1000)]
    factors = rng.integers(1, 500, 1000).astype(np.float64)
    assert_sum(summed(backend, vectors, factors), vectors, factors, 1e-13)
    order = rng.permutation(1000)
    shuffled = summed(backend, [vectors[k] for k in order], factors[order])
    assert_sum(shuffled, vectors, factors, 1e-13)


def test_the_same_order_gives_the_same_bits(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    vectors = [encoded(codec, 200_000, rng) for codec in CODECS * 2]
    factors = rng.uniform(1, 2, len(vectors))
    first = summed(backend, vectors, factors)
    for _ in range(3):
        assert summed(backend, vectors, factors).tobytes() == first.tobytes()


def test_what_is_summed_is_added(backend: Backend) -> None:
    rng = np.random.default_rng(4)
    vectors, factors = [encoded("f32", 300, rng)], np.array([2.0])
    total = np.full(300, 5.0)
    backend.fold(total, vectors, factors)
    np.testing.assert_allclose(total, 5 + summed(backend, vectors, factors), rtol=1e-15)


def test_compiled_sums_are_the_same_bits_whatever_the_threads() -> None:
    pytest.importorskip("numba")
    from server.reducer.numba_backend import NumbaBackend

    rng = np.random.default_rng(8)
    vectors = [encoded(codec, 70_001, rng) for codec in CODECS * 3]
    factors = rng.uniform(1, 2, len(vectors))
    found = {summed(NumbaBackend(k), vectors, factors).tobytes() for k in (1, 2, 3, 5)}
    assert len(found) == 1


def test_compiled_kernels_read_no_vector_beyond_its_end() -> None:
    pytest.importorskip("numba")
    backend, rng = choose("numba"), np.random.default_rng(7)
    vectors = [encoded("f32", size, rng) for size in (300, 200)]
    with pytest.raises(ValueError, match=r"vectors of \[200, 300\] values, expected 300"):
        backend.fold(np.zeros(300), vectors, np.ones(2))
    gaps = replace(vectors[0], values=np.ones(600, np.float32)[::2])
    with pytest.raises(ValueError, match="an array with gaps"):
        backend.fold(np.zeros(300), [gaps], np.ones(1))


@pytest.mark.parametrize("codec", ["int8", "topk-int8:0.1"])
def test_updates_are_not_expanded_in_memory(backend: Backend, codec: str) -> None:
    rng, size = np.random.default_rng(5), 2_000_000
    vectors = [encoded(codec, size, rng) for _ in range(8)]
    total, factors = np.zeros(size), np.ones(8)
    tracemalloc.start()
    try:
        backend.fold(total, vectors, factors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    second_sum = 8 * size if backend.name == "torch" else 0
    assert peak < 4 * size + second_sum, "less than one of them as float32"


def test_several_sums_at_a_time(backend: Backend) -> None:
    rng = np.random.default_rng(6)
    sums = [[encoded("f32", 150_000, rng) for _ in range(5)] for _ in range(4)]
    factors = rng.uniform(1, 2, 5)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda vectors: summed(backend, vectors, factors), sums))
    for one, vectors in zip(found, sums, strict=True):
        assert_sum(one, vectors, factors, 1e-14)


@given(data=st.data(), size=st.integers(1, 3 * ALIGN))
def test_a_vector_is_read_in_pieces(data: st.DataObject, size: int) -> None:
    codec = data.draw(st.sampled_from(CODECS))
    vector = encoded(codec, size, np.random.default_rng(size))
    whole = vector.decode()
    start = ALIGN * data.draw(st.integers(0, (size - 1) // ALIGN))
    stop = data.draw(st.integers(start + 1, size))
    out = np.empty(stop - start, np.float32)
    vector.read(start, stop, out)
    np.testing.assert_array_equal(out, whole[start:stop])


# The choice


def test_auto_takes_what_is_there() -> None:
    expected = "numba" if importlib.util.find_spec("numba") else "numpy"
    assert choose("auto").name == expected


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose("auto").name == "numpy"
    with pytest.raises(ValueError, match=r"numba is not installed; pip install petalfl\[fast\]"):
        choose("numba")


def test_a_numba_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("numba")
    monkeypatch.setitem(sys.modules, "server.reducer.numba_backend", None)
    with pytest.raises(ValueError, match=r"reducer numba: import of .*numba_backend"):
        choose("numba")
    assert choose("auto").name == "numpy"
    assert "numpy sums up" in caplog.text


@pytest.mark.parametrize("text", ["", "gpu", "Numpy", "cuda:", "cuda:x", "cuda:-1"])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"reducer {text!r} is not known; choose of auto, numpy"):
        parse_reducer(text)
    assert all(parse_reducer(form.partition("[")[0]) for form in FORMS)


def test_one_is_active_for_as_long_as_it_is_used() -> None:
    before, other = active(), choose("numpy")
    with use(other):
        assert active() is other
    assert active() is before
