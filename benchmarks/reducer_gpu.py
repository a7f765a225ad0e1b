"""Rows of `benchmarks.bench_reducer` for a GPU, next to what its copies make.

Sums of updates that lie in the GPU's memory, and of updates that are streamed to it from pinned
memory of the host. Without a GPU, or without triton, each row says so and has no figures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.bench_canonical import table

NUM_UPDATES, SIZE = 1000, 10_000_000
STREAMED_BYTES = 8 << 30  # pinned at a time
NOTES = """\
Read: the updates' bytes by the least time. Copy: device to device, where a byte is read and another
written, both counted; or from pinned host memory. Share: of the row's read and its copy's."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sum on a GPU; ``refused`` says why there are no figures."""

    work: str
    updates: str
    num_updates: int
    size: int
    refused: str | None = None
    least_s: float | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    peak_bytes: int | None = None


def rows(repeats: int) -> list[Row]:
    """All of them."""
    cases = [(work, codec) for work in ("resident", "streamed") for codec in ("int8", "f32")]
    refused = missing()
    found = []
    for work, codec in cases:
        blank = Row(work, codec, NUM_UPDATES, SIZE, refused)
        run = _resident if work == "resident" else _streamed
        found.append(blank if refused else run(blank, repeats))
    return found


def missing() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "no torch"
    import torch

    if not torch.cuda.is_available():
        return "no GPU"
    return None if importlib.util.find_spec("triton") else "no triton"


def _resident(blank: Row, repeats: int) -> Row:
    import torch

    from server.reducer import triton_kernels

    torch.cuda.reset_peak_memory_stats()
    values, scales = _updates(blank, blank.num_updates, "cuda")
    factors = torch.ones(blank.num_updates, dtype=torch.float64, device="cuda")
    total = torch.zeros(blank.size, dtype=torch.float64, device="cuda")
    least_s = _least(lambda: triton_kernels.add_dense(total, factors, values, scales), repeats)
    num_bytes = values.nbytes + scales.nbytes
    peak = torch.cuda.max_memory_allocated() - num_bytes
    source = values.view(torch.uint8).view(-1)[: 4 << 30]
    target = torch.empty_like(source)
    copy_s = _least(lambda: target.copy_(source), repeats)
    return _filled(blank, least_s, num_bytes, 2 * source.nbytes / copy_s, peak)


def _streamed(blank: Row, repeats: int) -> Row:
    """In portions that fit the host's pinned memory, each copied and summed in two streams."""
    import torch

    from server.reducer import triton_kernels

    item = 1 if blank.updates == "int8" else 4
    count = min(blank.num_updates, STREAMED_BYTES // (item * blank.size))
    values, scales = (one.pin_memory() for one in _updates(blank, count, "cpu"))
    rows_at_once = max(1, count // 16)
    total = torch.zeros(blank.size, dtype=torch.float64, device="cuda")
    factors = torch.ones(rows_at_once, dtype=torch.float64, device="cuda")
    copies, sums = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    ring = [
        (torch.empty_like(values[:rows_at_once], device="cuda"),
         torch.empty_like(scales[:rows_at_once], device="cuda"),
         torch.cuda.Event(), torch.cuda.Event())  # type: ignore[no-untyped-call]
        for _ in range(3)
    ]  # fmt: skip

    def run() -> None:
        for k, first in enumerate(range(0, count - rows_at_once + 1, rows_at_once)):
            device_values, device_scales, is_sent, is_summed = ring[k % len(ring)]
            with torch.cuda.stream(copies):
                copies.wait_event(is_summed)
                part = slice(first, first + rows_at_once)
                device_values.copy_(values[part], non_blocking=True)
                device_scales.copy_(scales[part], non_blocking=True)
                is_sent.record(copies)
            with torch.cuda.stream(sums):
                sums.wait_event(is_sent)
                triton_kernels.add_dense(total, factors, device_values, device_scales)
                is_summed.record(sums)
        copies.synchronize()
        sums.synchronize()

    least_s = _least(run, repeats)
    num_summed = count // rows_at_once * rows_at_once
    num_bytes = (values.nbytes + scales.nbytes) * num_summed // count
    target = ring[0][0]
    copy_s = _least(lambda: target.copy_(values[:rows_at_once], non_blocking=True), repeats)
    peak = sum(one.nbytes for stage in ring for one in stage[:2]) + total.nbytes
    return _filled(blank, least_s, num_bytes, target.nbytes / copy_s, peak)


def _updates(blank: Row, count: int, device: str) -> tuple[Any, Any]:
    import torch

    if blank.updates == "f32":
        values = torch.empty((count, blank.size), device=device).normal_()
        return values, torch.empty((count, 0), device=device)
    levels = torch.randint(-127, 128, (count, blank.size), dtype=torch.int8, device=device)
    return levels, torch.rand((count, -(-blank.size // 256)), device=device)


def _least(function: Callable[[], object], repeats: int) -> float:
    import torch

    times = []
    for _ in range(repeats + 1):  # the first one compiles
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return float(np.min(times[1:]))


def _filled(blank: Row, least_s: float, num_bytes: int, copy_rate: float, peak: int) -> Row:
    return Row(blank.work, blank.updates, blank.num_updates, blank.size, None, least_s,
               1e-9 * num_bytes / least_s, 1e-9 * copy_rate, peak)  # fmt: skip


def report(found: Sequence[Row], *, is_markdown: bool) -> str:
    """The table."""
    header = ("on a GPU", "codec", "updates x values", "ms", "read GB/s", "copy GB/s", "share",
              "memory MB")  # fmt: skip
    cells = []
    for row in found:
        case = (row.work, row.updates, f"{row.num_updates} x {row.size:,}")
        if row.least_s is None or row.gb_per_s is None or row.copy_gb_per_s is None:
            cells.append((*case, row.refused or "", "", "", "", ""))
        else:
            cells.append((*case, f"{1e3 * row.least_s:.1f}", f"{row.gb_per_s:.0f}",
                          f"{row.copy_gb_per_s:.0f}", f"{row.gb_per_s / row.copy_gb_per_s:.0%}",
                          f"{1e-6 * (row.peak_bytes or 0):.0f}"))  # fmt: skip
    return table([header, *cells], is_markdown)
