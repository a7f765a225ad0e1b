"""Compiled kernels: encoded vectors into a float64 sum, at the speed of memory.

Needs numba (``pip install petalfl[fast]``). They take slices of one tile: ``total`` float64
``(n,)``, the values of eight vectors, and their factors float64 ``(8,)``; the sparse ones take a
tile's part of one bitmap, all values, and where among them the tile's first is. All release the
GIL.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, "cache": True}
_HALF_BIAS = np.float32(2.0**112)  # between the exponents of an f16 and of a float32


@intrinsic
def _as_float(typing_context, bits):
    """The float32 that has these 32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit(inline="always")
def _float_of_f16(bits):
    """Exact, subnormal numbers included; not of infinities and NaN, which the door refuses."""
    wide = np.uint32(bits)
    magnitude = np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13))
    sign = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
    return _as_float(np.uint32(magnitude | sign)) * _HALF_BIAS


@njit(inline="always")
def _float_of_bf16(bits):
    return _as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@njit(**_OPTIONS)
def fold_f32(total, a, b, c, d, e, f, g, h, w):
    """Adds eight float32 vectors."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for i in range(total.size):
        total[i] += (
            w0 * a[i] + w1 * b[i] + w2 * c[i] + w3 * d[i]
            + w4 * e[i] + w5 * f[i] + w6 * g[i] + w7 * h[i]
        )  # fmt: skip


@njit(**_OPTIONS)
def fold_f16(total, a, b, c, d, e, f, g, h, w):
    """Adds eight vectors of f16 bits."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for i in range(total.size):
        total[i] += (
            w0 * _float_of_f16(a[i]) + w1 * _float_of_f16(b[i])
            + w2 * _float_of_f16(c[i]) + w3 * _float_of_f16(d[i])
            + w4 * _float_of_f16(e[i]) + w5 * _float_of_f16(f[i])
            + w6 * _float_of_f16(g[i]) + w7 * _float_of_f16(h[i])
        )  # fmt: skip


@njit(**_OPTIONS)
def fold_bf16(total, a, b, c, d, e, f, g, h, w):
    """Adds eight vectors of bf16 bits."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for i in range(total.size):
        total[i] += (
            w0 * _float_of_bf16(a[i]) + w1 * _float_of_bf16(b[i])
            + w2 * _float_of_bf16(c[i]) + w3 * _float_of_bf16(d[i])
            + w4 * _float_of_bf16(e[i]) + w5 * _float_of_bf16(f[i])
            + w6 * _float_of_bf16(g[i]) + w7 * _float_of_bf16(h[i])
        )  # fmt: skip


@njit(inline="always")
def _float_of_int8(level):
    return np.float64(np.int32(level))  # without the int32, LLVM does not vectorize it well


@njit(**_OPTIONS)
def fold_int8(total, a, b, c, d, e, f, g, h, w):  # type: ignore[no-untyped-def]
    """Adds up to one group of eight int8 vectors; ``w`` are the factors times the scales."""
    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
    for i in range(total.size):
        total[i] += (
            w0 * _float_of_int8(a[i]) + w1 * _float_of_int8(b[i])
            + w2 * _float_of_int8(c[i]) + w3 * _float_of_int8(d[i])
            + w4 * _float_of_int8(e[i]) + w5 * _float_of_int8(f[i])
            + w6 * _float_of_int8(g[i]) + w7 * _float_of_int8(h[i])
        )  # fmt: skip


@njit(**_OPTIONS)
def fold_int8_groups(total, a, b, c, d, e, f, g, h, w):  # type: ignore[no-untyped-def]
    """Adds whole groups of eight int8 vectors; ``w`` ``(groups, 8)``: factors times scales."""
    for k in range(w.shape[0]):
        w0, w1, w2, w3 = w[k, 0], w[k, 1], w[k, 2], w[k, 3]
        w4, w5, w6, w7 = w[k, 4], w[k, 5], w[k, 6], w[k, 7]
        j = 256 * k
        out = total[j : j + 256]
        a_, b_, c_, d_ = a[j : j + 256], b[j : j + 256], c[j : j + 256], d[j : j + 256]
        e_, f_, g_, h_ = e[j : j + 256], f[j : j + 256], g[j : j + 256], h[j : j + 256]
        for i in range(256):
            out[i] += (
                w0 * _float_of_int8(a_[i]) + w1 * _float_of_int8(b_[i])
                + w2 * _float_of_int8(c_[i]) + w3 * _float_of_int8(d_[i])
                + w4 * _float_of_int8(e_[i]) + w5 * _float_of_int8(f_[i])
                + w6 * _float_of_int8(g_[i]) + w7 * _float_of_int8(h_[i])
            )  # fmt: skip


@njit(**_OPTIONS)
def fold_sparse_f32(total, bitmap, values, first, factor):
    """Adds what a bitmap says is there."""
    j = first
    for k in range(bitmap.size):
        bits = bitmap[k]
        if bits:
            for i in range(8):
                if bits >> i & 1:
                    total[8 * k + i] += factor * values[j]
                    j += 1


@njit(**_OPTIONS)
def fold_sparse_int8(total, bitmap, levels, scales, first, factor):
    """The same of int8 levels."""
    j = first
    for k in range(bitmap.size):
        bits = bitmap[k]
        if bits:
            for i in range(8):
                if bits >> i & 1:
                    total[8 * k + i] += factor * scales[j >> 8] * np.float64(np.int32(levels[j]))
                    j += 1
