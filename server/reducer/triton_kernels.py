"""Kernels for CUDA: packed vectors into a float64 sum, each value read once and never expanded.

torch's own operators would write what they decode to the device's memory, at 8 bytes a value, and
read it again. They also run on the CPU under Triton's interpreter (TRITON_INTERPRET=1), which is
how they are tested where there is no GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048  # values of a program, eight groups of int8; also `petalfl.codecs.encoded.ALIGN`


@triton.jit
def _dense(
    total, factors, values, scales, num_rows, width, groups, has_scales: tl.constexpr,
    block_size: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * block_size + tl.arange(0, block_size)
    inside = at < width
    found = tl.load(total + at, mask=inside, other=0.0)
    for row in range(num_rows):
        value = tl.load(values + at, mask=inside, other=0).to(tl.float32).to(tl.float64)
        factor = tl.load(factors + row)
        if has_scales:
            scale = tl.load(scales + at // 256, mask=inside, other=0.0)
            found += value * (factor * scale.to(tl.float64))
        else:
            found += value * factor
        values += width  # the next row's, which may lie beyond what an int32 counts
        scales += groups
    tl.store(total + at, found, mask=inside)


@triton.jit
def _sparse(
    total, factors, values, scales, bitmap, starts, width, skip, has_scales: tl.constexpr,
    block_size: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    at = block * block_size + tl.arange(0, block_size)
    inside = at < width
    bits = tl.load(bitmap + at // 8, mask=inside, other=0).to(tl.int32)
    is_kept = (bits >> (at % 8)) & 1
    place = tl.load(starts + block) + tl.cumsum(is_kept, 0) - 1
    reads = inside & (is_kept == 1)
    value = tl.load(values + place, mask=reads, other=0).to(tl.float32).to(tl.float64)
    factor = tl.load(factors)
    if has_scales:
        scale = tl.load(scales + (place + skip) // 256, mask=reads, other=0.0)
        value *= scale.to(tl.float64)
    before = tl.load(total + at, mask=inside, other=0.0)
    tl.store(total + at, before + value * factor, mask=inside)


def add_dense(
    total: torch.Tensor, factors: torch.Tensor, values: torch.Tensor, scales: torch.Tensor
) -> None:
    """Adds Σ factors[k] · values[k], and · scales[k] by group where there are any."""
    num_rows, width = values.shape
    _dense[(triton.cdiv(width, BLOCK),)](
        total, factors, values, scales, num_rows, width, scales.shape[1],
        has_scales=bool(scales.numel()), block_size=BLOCK,
    )  # fmt: skip


def add_sparse(
    total: torch.Tensor,
    factors: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor,
    bitmap: torch.Tensor,
    starts: torch.Tensor,
    *,
    skip: int,
) -> None:
    """Adds factors[0] · values at the positions that the bitmap has."""
    width = total.numel()
    _sparse[(triton.cdiv(width, BLOCK),)](
        total, factors, values, scales, bitmap, starts, width, skip,
        has_scales=bool(scales.numel()), block_size=BLOCK,
    )  # fmt: skip
