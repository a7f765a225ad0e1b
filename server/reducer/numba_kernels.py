"""Compiled kernels: encoded vectors into a float64 sum, at the speed of memory.

Needs numba (``pip install petalfl[fast]``). They take the addresses of what is summed, uint64
``(n,)``, for a list of arrays would have numba compile anew for every length; the caller keeps the
arrays alive. Numba compiles for types, so that a form is told by one: `FORMS`. All release the GIL.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numba.np.unsafe.ndarray import to_fixed_tuple

from petalfl.codecs.encoded import ALIGN, GROUP

TILE = 1 << 14  # values: the sum's part is 128 KiB, and stays in the L2 cache for all vectors
ROWS = 16  # vectors at a time: streams that the CPU prefetches; 8 took 7 to 11 % longer
AHEAD = 512  # bytes: int8 is prefetched by hand besides, which takes a third off
FORMS = {  # the bits of an f16 and of a bf16 differ in nothing but this type
    "f32": np.dtype(np.float32), "f16": np.dtype(np.uint16),
    "bf16": np.dtype(np.int16), "int8": np.dtype(np.int8),
}  # fmt: skip
_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}, "cache": True}
_FLOAT, _DOUBLE, _WORD = ir.FloatType(), ir.DoubleType(), ir.IntType(32)
_HALF_BIAS = _FLOAT(2.0**112)  # between the exponents of an f16 and of a float32


def _decoded(builder, bits, dtype):  # type: ignore[no-untyped-def]
    """The IR of a value as float64, exactly; not of infinities and NaN, which the door refuses."""
    if dtype == types.float32:
        return builder.fpext(bits, _DOUBLE)
    if dtype == types.int8:  # without the int32, LLVM does not vectorize it well
        return builder.sitofp(builder.sext(bits, _WORD), _DOUBLE)
    wide = builder.zext(bits, _WORD)
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(builder.shl(wide, _WORD(16)), _FLOAT), _DOUBLE)
    magnitude = builder.shl(builder.and_(wide, _WORD(0x7FFF)), _WORD(13))
    sign = builder.shl(builder.and_(wide, _WORD(0x8000)), _WORD(16))
    small = builder.bitcast(builder.or_(magnitude, sign), _FLOAT)  # subnormal numbers included
    return builder.fpext(builder.fmul(small, _HALF_BIAS), _DOUBLE)


def _loaded(builder, address, index, llvm_type):  # type: ignore[no-untyped-def]
    """The IR of an array's item, wherever a payload has it: aligned to nothing."""
    start = builder.inttoptr(address, llvm_type.as_pointer())
    found = builder.load(builder.gep(start, [index]), align=1)
    found.set_metadata("alias.scope", _payloads(builder.module))
    return found


def _payloads(module):  # type: ignore[no-untyped-def]
    """The memory that is only read: LLVM need not ask whether a sum lies in it."""
    domain = module.add_metadata(["petalfl reducer"])
    return module.add_metadata([module.add_metadata(["petalfl payloads", domain])])


@intrinsic
def _item(typing_context, address, index, dtype):  # type: ignore[no-untyped-def]
    """What an array at an address has at an index."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return _loaded(builder, *arguments[:2], context.get_value_type(dtype.dtype))

    return dtype.dtype(address, types.intp, dtype), generate


@intrinsic
def _value(typing_context, address, index, dtype):  # type: ignore[no-untyped-def]
    """The same as float64."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        bits = _loaded(builder, *arguments[:2], context.get_value_type(dtype.dtype))
        return _decoded(builder, bits, dtype.dtype)

    return types.float64(address, types.intp, dtype), generate


@intrinsic
def _weighted_sum(typing_context, addresses, weights, index, dtype):  # type: ignore[no-untyped-def]
    """Σ weights[k] · values[k][index] of the arrays at so many addresses."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        found, llvm_type = _DOUBLE(0.0), context.get_value_type(dtype.dtype)
        for k in range(len(addresses)):
            address = builder.extract_value(arguments[0], k)
            value = _decoded(
                builder, _loaded(builder, address, arguments[2], llvm_type), dtype.dtype
            )
            term = builder.fmul(builder.extract_value(arguments[1], k), value, flags=["contract"])
            found = builder.fadd(found, term, flags=["contract"]) if k else term
        return found

    return types.float64(addresses, weights, types.intp, dtype), generate


@intrinsic
def _prefetch(typing_context, addresses, offset):  # type: ignore[no-untyped-def]
    """Has the cache read a line of each array."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        line = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [line, _WORD, _WORD, _WORD])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [line], kind)
        for k in range(len(addresses)):
            place = builder.add(builder.extract_value(arguments[0], k), arguments[1])
            builder.call(prefetch, [builder.inttoptr(place, line), _WORD(0), _WORD(3), _WORD(1)])
        return context.get_dummy_value()

    return types.void(addresses, types.intp), generate


@intrinsic
def _add(typing_context, total, index, value):  # type: ignore[no-untyped-def]
    """``total[index] += value`` of the float64 at an address."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        place = builder.gep(builder.inttoptr(arguments[0], _DOUBLE.as_pointer()), [arguments[1]])
        before = builder.load(place)
        after = builder.store(builder.fadd(before, arguments[2], flags=["contract"]), place)
        for one in (before, after):
            one.set_metadata("noalias", _payloads(builder.module))
        return context.get_dummy_value()

    return types.void(total, types.intp, types.float64), generate


@intrinsic
def _lowest_bit(typing_context, word):  # type: ignore[no-untyped-def]
    """Which is set, of one at least."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.intp(types.uint64), generate


def _share(factor, scales, group, dtype):  # type: ignore[no-untyped-def]
    """By what the values of a group are multiplied."""


@overload(_share, inline="always")
def _share_of(factor, scales, group, dtype):  # type: ignore[no-untyped-def]
    if dtype.dtype == types.int8:
        return lambda factor, scales, group, dtype: factor * _item(scales, group, np.float32)
    return lambda factor, scales, group, dtype: factor


@njit(**_OPTIONS)
def fold_dense(total, values, scales, factors, start, stop, dtype):  # type: ignore[no-untyped-def]
    """Adds Σ factors[k] · values[k] from ``start``, a multiple of `TILE`, to ``stop``.

    A multiple of `ROWS` vectors; those of factor 0 fill up.
    """
    shares, has_scales = np.empty(ROWS), np.empty(0, dtype).itemsize == 1
    width = GROUP if has_scales else TILE
    for tile in range(start, stop, TILE):
        for k in range(0, factors.size, ROWS):
            addresses = to_fixed_tuple(values[k : k + ROWS], ROWS)
            for first in range(tile, min(tile + TILE, stop), width):
                for row in range(ROWS):
                    shares[row] = _share(factors[k + row], scales[k + row], first // GROUP, dtype)
                weights = to_fixed_tuple(shares, ROWS)
                if has_scales:
                    for line in range(first + AHEAD, first + AHEAD + GROUP, 64):
                        _prefetch(addresses, line)
                for i in range(first, min(first + width, stop)):
                    _add(total.ctypes.data, i, _weighted_sum(addresses, weights, i, dtype))


@njit(**_OPTIONS)
def fold_sparse(  # type: ignore[no-untyped-def]
    total, bitmaps, starts, values, scales, factors, start, stop, dtype
):
    """The same of vectors whose bitmaps say what is there; ``start`` is a multiple of `ALIGN`."""
    for tile in range(start, stop, TILE):
        end = -(-min(tile + TILE, stop) // 8)
        for k in range(factors.size):
            place = _item(starts[k], tile // ALIGN, np.int64)
            for byte in range(tile // 8, end, 8):
                word, out = _bits(bitmaps[k], byte, end), total[8 * byte :]
                while word:
                    share = _share(factors[k], scales[k], place // GROUP, dtype)
                    out[_lowest_bit(word)] += share * _value(values[k], place, dtype)
                    word &= word - np.uint64(1)
                    place += 1


@njit(inline="always")
def _bits(bitmap, byte, end):  # type: ignore[no-untyped-def]
    """64 of a bitmap, from a byte; those from ``end`` are none."""
    if byte + 8 <= end:
        return _item(bitmap, byte // 8, np.uint64)
    word = np.uint64(0)
    for k in range(byte, end):
        word |= np.uint64(_item(bitmap, k, np.uint8)) << np.uint64(8 * (k - byte))
    return word


@njit(**_OPTIONS)
def address(array):  # type: ignore[no-untyped-def]
    """Where its values begin; numpy itself takes four times as long to say so."""
    return array.ctypes.data
