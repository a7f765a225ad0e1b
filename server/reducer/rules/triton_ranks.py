"""Median and trimmed mean of every column on a GPU: values are read once and stay in registers.

The k-th least of a column is found bit by bit, from the highest: of how many values the key is
below a candidate says whether the bit is set. torch would sort the column in memory. The kernels
also run on the CPU under Triton's interpreter (TRITON_INTERPRET=1), as in the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_ROWS = 1024  # of what a program holds
_VALUES = 4096  # of a program, all rows together
_VALUES_PER_WARP = 1024  # 32 of each thread: twice as many do not fit its registers


@triton.jit
def _keys(values, rows, columns, num_rows, width, stride):
    """The values, and unsigned integers of the same order; the greatest for rows that are none."""
    is_there = (rows < num_rows)[:, None] & (columns < width)[None, :]
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]
    found = tl.load(values + at, mask=is_there, other=0.0) + 0.0  # -0 is 0
    bits = found.to(tl.uint32, bitcast=True)
    keys = bits ^ tl.where((bits >> 31) == 1, 0xFFFFFFFF, 0x80000000)
    return found, tl.where((rows < num_rows)[:, None], keys, 0xFFFFFFFF)


@triton.jit
def _float_of(key):
    """The value that a key stands for."""
    bits = key ^ tl.where((key >> 31) == 1, 0x80000000, 0xFFFFFFFF)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _ranked(keys, rank, block_size: tl.constexpr):
    """Of each column the key of that rank, from 0."""
    found = tl.zeros((block_size,), tl.uint32)
    bit = tl.full((block_size,), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = found | bit
        num_below = tl.sum((keys < candidate[None, :]).to(tl.int32), axis=0)
        found = tl.where(num_below <= rank, candidate, found)
        bit = bit >> 1
    return found


@triton.jit
def _median(values, out, num_rows, width, stride, padded: tl.constexpr, block_size: tl.constexpr):
    rows = tl.arange(0, padded)
    columns = tl.program_id(0) * block_size + tl.arange(0, block_size)
    _, keys = _keys(values, rows, columns, num_rows, width, stride)
    rank = (num_rows - 1) // 2
    low = _ranked(keys, rank, block_size)
    num_up_to = tl.sum((keys <= low[None, :]).to(tl.int32), axis=0)
    above = tl.min(tl.where(keys > low[None, :], keys, 0xFFFFFFFF), axis=0)
    high = tl.where(num_up_to > num_rows // 2, low, above)
    mean = _float_of(low).to(tl.float64) / 2 + _float_of(high).to(tl.float64) / 2
    tl.store(out + columns, mean.to(tl.float32), mask=columns < width)


@triton.jit
def _trimmed_mean(
    values, weights, out, num_rows, width, stride, cut, padded: tl.constexpr,
    block_size: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, padded)
    columns = tl.program_id(0) * block_size + tl.arange(0, block_size)
    found, keys = _keys(values, rows, columns, num_rows, width, stride)
    least = _ranked(keys, cut, block_size)[None, :]
    greatest = _ranked(keys, num_rows - 1 - cut, block_size)[None, :]
    is_least, is_greatest = (keys == least).to(tl.int32), (keys == greatest).to(tl.int32)
    # Of equals the first is the least: how many lie up to and with each.
    up_to_least = tl.sum((keys < least).to(tl.int32), axis=0)[None, :] + tl.cumsum(is_least, 0)
    below = tl.sum((keys < greatest).to(tl.int32), axis=0)[None, :]
    up_to_greatest = below + tl.cumsum(is_greatest, 0)
    goes = (is_least == 1) & (up_to_least <= cut)
    goes |= (is_greatest == 1) & (up_to_greatest > num_rows - cut)
    kept = (keys >= least) & (keys <= greatest) & (goes == 0)
    weight = tl.load(weights + rows, mask=rows < num_rows, other=0.0)[:, None]
    shares = tl.where(kept, weight, 0.0)
    mean = tl.sum(found.to(tl.float64) * shares, axis=0) / tl.sum(shares, axis=0)
    tl.store(out + columns, mean.to(tl.float32), mask=columns < width)


def median(values: torch.Tensor) -> torch.Tensor:
    """As of `torch_rules`; of `MAX_ROWS` rows at most."""
    num_rows, width = values.shape
    out, grid, sizes = _plan(values)
    _median[grid](values, out, num_rows, width, values.stride(0), **sizes)
    return out


def trimmed_mean(values: torch.Tensor, weights: torch.Tensor, cut: int) -> torch.Tensor:
    """As of `torch_rules`; of `MAX_ROWS` rows at most."""
    num_rows, width = values.shape
    out, grid, sizes = _plan(values)
    _trimmed_mean[grid](values, weights, out, num_rows, width, values.stride(0), cut, **sizes)
    return out


def _plan(values: torch.Tensor) -> tuple[torch.Tensor, tuple[int], dict[str, int]]:
    """The result, how many programs there are, and their sizes."""
    assert values.stride(1) == 1
    num_rows, width = values.shape
    padded = triton.next_power_of_2(num_rows)
    block_size = min(64, max(8, _VALUES // padded))
    num_warps = max(1, padded * block_size // _VALUES_PER_WARP)
    out = torch.empty(width, dtype=torch.float32, device=values.device)
    sizes = {"padded": padded, "block_size": block_size, "num_warps": num_warps}
    return out, (triton.cdiv(width, block_size),), sizes
