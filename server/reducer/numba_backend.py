"""Sums with kernels that numba compiles: one pass over the payloads as they came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import Encoded, parse_codec
from petalfl.codecs.encoded import GROUP

from . import numba_kernels as kernels
from .rules.numba_rules import NumbaRules
from .rules.tiles import num_cores

SHARES = 4  # of a thread: who is done with one takes another's
Sum: TypeAlias = NDArray[np.float64]


class NumbaBackend:
    """A `Backend` as fast as one product of the BLAS, and faster where less is to be read.

    Args:
        num_threads: That compute; the default is one for each core.
    """

    name = "numba"

    def __init__(self, num_threads: int = 0) -> None:
        self._num_threads = num_threads or num_cores()
        self._pool = ThreadPoolExecutor(self._num_threads, "reducer")  # beside the caller's
        _warm_up(self)

    @property
    def description(self) -> str:
        """Library, version and threads."""
        return f"numba {numba.__version__}, {self._num_threads} threads"

    def fold(self, total: Sum, vectors: Sequence[Encoded], factors: NDArray[np.float64]) -> None:
        """As of `Backend`; every value is summed in the order of ``vectors``, by form.

        Raises:
            ValueError: A vector is of another length.
        """
        if any(vector.size != total.size for vector in vectors):
            sizes = sorted({vector.size for vector in vectors})
            raise ValueError(f"vectors of {sizes} values, expected {total.size}")
        passes = [
            _pass([vectors[k] for k in chosen], factors[chosen]) for chosen in _by_form(vectors)
        ]
        num_tiles = math.ceil(total.size / kernels.TILE)
        width = kernels.TILE * max(1, math.ceil(num_tiles / (SHARES * self._num_threads)))
        starts = range(0, total.size, width)
        left = iter(starts)

        def work() -> None:
            for start in left:  # of which every thread takes the next
                for add in passes:
                    add(total, start, min(start + width, total.size))

        num_helpers = min(self._num_threads, len(starts)) - 1
        helpers = [self._pool.submit(work) for _ in range(num_helpers)]
        try:
            work()
        finally:
            wait(helpers)  # they read the vectors' memory
        for helper in helpers:
            helper.result()


def _by_form(vectors: Sequence[Encoded]) -> list[list[int]]:
    """Which vectors a kernel takes together."""
    found: dict[tuple[str, bool], list[int]] = {}
    for k, vector in enumerate(vectors):
        found.setdefault((vector.form, vector.bitmap is None), []).append(k)
    return list(found.values())


def _pass(
    vectors: Sequence[Encoded], factors: NDArray[np.float64]
) -> Callable[[Sum, int, int], None]:
    """What adds vectors of one form to a sum, from a multiple of `kernels.TILE` on."""
    is_dense, dtype = vectors[0].bitmap is None, kernels.FORMS[vectors[0].form]
    values = _addresses([vector.values for vector in vectors])
    has_scales = vectors[0].form == "int8"
    scales = _addresses([vector.scales for vector in vectors]) if has_scales else values
    if is_dense:
        fill = [0] * (-len(vectors) % kernels.ROWS)  # with the first vector, times 0
        places = [*range(len(vectors)), *fill]
        values, scales = values[places], scales[places]
        factors = np.concatenate([factors, fill])
        return lambda total, start, stop: kernels.fold_dense(
            total, values, scales, factors, start, stop, dtype
        )
    bitmaps = _addresses([vector.bitmap for vector in vectors])
    starts = _addresses([vector.starts for vector in vectors])
    return lambda total, start, stop: kernels.fold_sparse(
        total, bitmaps, starts, values, scales, factors, start, stop, dtype
    )


def _addresses(arrays: Sequence[NDArray[Any] | None]) -> NDArray[np.uint64]:
    """The memory of each, which must have no gaps."""
    if not all(array is not None and array.flags.c_contiguous for array in arrays):
        raise ValueError("an encoded vector has an array with gaps, or has none")
    return np.array([kernels.address(array) for array in arrays], np.uint64)


def _warm_up(backend: NumbaBackend) -> None:
    """Compiles everything, or loads it as it was compiled before: later, devices would wait."""
    NumbaRules()
    vector = np.ones(GROUP + 1, np.float32)
    for name in ("f32", "f16", "bf16", "int8", "topk:0.5", "topk-int8:0.5"):
        codec = parse_codec(name)
        payload = codec.encode(vector, np.random.default_rng(0))
        backend.fold(np.zeros(vector.size), [codec.parse(payload, vector.size)], np.ones(1))
