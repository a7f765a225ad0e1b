"""Sums with kernels that numba compiles: one pass over the payloads as they came."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import Encoded, parse_codec
from petalfl.codecs.encoded import ALIGN, GROUP
from petalfl.vectors import Vector

from . import numba_kernels as kernels
from .rules.tiles import num_cores

TILE = 1 << 17  # values: the sum's part is 1 MiB, the L2 cache of a core
ROWS = 8  # vectors that a kernel takes
_DENSE = {"f32": kernels.fold_f32, "f16": kernels.fold_f16, "bf16": kernels.fold_bf16}


class NumbaBackend:
    """A `Backend` as fast as one product of the BLAS, and faster where less is to be read.

    Args:
        num_threads: That compute; the default is one for each core.
    """

    name = "numba"

    def __init__(self, num_threads: int = 0) -> None:
        self._num_threads = num_threads or num_cores()
        self._pool = ThreadPoolExecutor(self._num_threads, "reducer")
        _warm_up(self)

    @property
    def description(self) -> str:
        """Library, version and threads."""
        return f"numba {numba.__version__}, {self._num_threads} threads"

    def fold(
        self, total: NDArray[np.float64], vectors: Sequence[Encoded], factors: NDArray[np.float64]
    ) -> None:
        """As of `Backend`; every value is summed in the order of ``vectors``, by form."""
        batches = _batches(vectors)
        starts = range(0, total.size, TILE)
        if len(starts) == 1 or self._num_threads == 1:
            for start in starts:
                _fold_tile(total, start, batches, vectors, factors)
        else:
            work = self._pool.map(
                _fold_tile, repeat(total), starts, repeat(batches), repeat(vectors), repeat(factors)
            )
            for _ in work:
                pass


def _batches(vectors: Sequence[Encoded]) -> list[list[int]]:
    """Which vectors go into a kernel together: dense ones of a form, or a sparse one alone."""
    by_form: dict[str, list[int]] = {}
    for k, vector in enumerate(vectors):
        form = vector.form if vector.bitmap is None else f"sparse {k}"
        by_form.setdefault(form, []).append(k)
    return [ks[i : i + ROWS] for ks in by_form.values() for i in range(0, len(ks), ROWS)]


def _fold_tile(
    total: NDArray[np.float64],
    start: int,
    batches: Sequence[Sequence[int]],
    vectors: Sequence[Encoded],
    factors: NDArray[np.float64],
) -> None:
    stop = min(start + TILE, total.size)
    for batch in batches:
        if vectors[batch[0]].bitmap is None:
            _fold_dense(total, start, stop, [vectors[k] for k in batch], factors[batch])
        else:
            _fold_sparse(total, start, stop, vectors[batch[0]], factors[batch[0]])


def _fold_dense(
    total: NDArray[np.float64],
    start: int,
    stop: int,
    vectors: Sequence[Encoded],
    factors: NDArray[np.float64],
) -> None:
    weights = np.zeros(ROWS)
    weights[: len(vectors)] = factors
    rows = [*vectors, *[vectors[0]] * (ROWS - len(vectors))]  # of weight 0
    values = [_read_only(row.values[start:stop]) for row in rows]
    if rows[0].form == "int8":
        scales = [row.scales[start // GROUP :] for row in rows]
        _fold_int8(total[start:stop], values, scales, weights)
    else:
        _DENSE[rows[0].form](total[start:stop], *values, weights)


def _fold_int8(
    total: NDArray[np.float64],
    levels: Sequence[NDArray[np.int8]],
    scales: Sequence[Vector],
    weights: NDArray[np.float64],
) -> None:
    num_full = total.size // GROUP
    end = num_full * GROUP
    shares = np.stack([s[:num_full] for s in scales], axis=1) * weights
    kernels.fold_int8_groups(total[:end], *[one[:end] for one in levels], shares)
    if end < total.size:
        last = weights * [s[num_full] for s in scales]
        kernels.fold_int8(total[end:], *[one[end:] for one in levels], last)


def _fold_sparse(
    total: NDArray[np.float64], start: int, stop: int, vector: Encoded, factor: float
) -> None:
    assert vector.bitmap is not None and vector.starts is not None
    bitmap = _read_only(vector.bitmap[start // 8 : -(-stop // 8)])
    values, first = _read_only(vector.values[:]), vector.starts[start // ALIGN]
    if vector.form == "int8":
        scales = _read_only(vector.scales[:])
        kernels.fold_sparse_int8(total[start:stop], bitmap, values, scales, first, factor)
    else:
        kernels.fold_sparse_f32(total[start:stop], bitmap, values, first, factor)


def _read_only(view: NDArray[Any]) -> NDArray[Any]:
    """The same view: numba compiles anew for every mixture of arrays that can be written to."""
    view.flags.writeable = False
    return view


def _warm_up(backend: NumbaBackend) -> None:
    """Compiles everything, or loads it as it was compiled before: later, devices would wait."""
    vector = np.ones(GROUP + 1, np.float32)
    for name in ("f32", "f16", "bf16", "int8", "topk:0.5", "topk-int8:0.5"):
        codec = parse_codec(name)
        payload = codec.encode(vector, np.random.default_rng(0))
        backend.fold(np.zeros(vector.size), [codec.parse(payload, vector.size)], np.ones(1))
