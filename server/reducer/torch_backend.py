"""Sums with PyTorch, on the CPU or on GPUs: tile by tile, through a ring of staging buffers.

The sum itself stays in the host's memory. A pass computes what its updates add to it, and adds
that only when all of it is there: a GPU that is lost in between loses nothing, for the same pass is
made again on the CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from petalfl.codecs import Encoded
from petalfl.codecs.encoded import ALIGN, GROUP

from .packing import Packed, pack, room_for
from .rules.tiles import num_cores

log = logging.getLogger("petalfl.server.reducer")

MIN_TILE = ALIGN  # values: with less memory than for this, a device is of no use
RING = 3  # staging buffers: one is filled, one sent, one summed


class Stage(Protocol):
    """A buffer of the host and one of the device.

    Attributes:
        host: What is filled next; it may be written to after `Device.wait`.
    """

    host: NDArray[np.uint8]


class Device(Protocol):
    """What computes. Work is queued, in order, and may not be over when a method returns.

    Any of them may raise: `torch.OutOfMemoryError` where memory is short, and RuntimeError where
    the device is lost.
    """

    @property
    def name(self) -> str:
        """As in ``--reducer``."""

    @property
    def tile(self) -> int:
        """Values that are summed at a time, a multiple of `ALIGN`."""

    @property
    def rows(self) -> int:
        """float32 vectors that a staging buffer takes."""

    def stage(self, num_bytes: int) -> Stage:
        """A new staging buffer."""

    def zeros(self, width: int) -> Any:
        """A new sum on the device, float64 ``(width,)``."""

    def wait(self, stage: Stage) -> None:
        """Until the device no longer needs what the buffer holds."""

    def add(self, total: Any, stage: Stage, packed: Packed) -> None:
        """Adds what the buffer holds."""

    def fetch(self, total: Any) -> NDArray[np.float64]:
        """The sum, in the host's memory."""


class TorchBackend:
    """A `Backend` on one or several devices, each of which takes a share of the block.

    Args:
        fallback: Takes over where no device is left.
    """

    def __init__(self, name: str, devices: Sequence[Device], fallback: Any) -> None:
        self._name = name
        self._devices = list(devices)
        self._fallback = fallback
        self._tiles = {device.name: device.tile for device in devices}
        self._pool = ThreadPoolExecutor(len(devices), "reducer")

    @property
    def name(self) -> str:
        """As of `Backend`."""
        return self._name if self._devices else f"{self._fallback.name}, {self._name} is lost"

    @property
    def description(self) -> str:
        """As of `Backend`."""
        names = ", ".join(device.name for device in self._devices)
        return f"torch {torch.__version__} on {names}" if names else self._fallback.description

    def fold(
        self, total: NDArray[np.float64], vectors: Sequence[Encoded], factors: NDArray[np.float64]
    ) -> None:
        """As of `Backend`."""
        devices = list(self._devices)
        if devices:
            found = np.empty_like(total)
            share = -(-total.size // len(devices) // ALIGN) * ALIGN + ALIGN
            edges = [min(k * share, total.size) for k in range(len(devices) + 1)]
            work = [
                self._pool.submit(
                    self._sum, device, vectors, factors, found[start:stop], start
                )
                for device, start, stop in zip(devices, edges, edges[1:], strict=False)
                if start < stop
            ]  # fmt: skip
            is_done = [one.result() for one in work]
            if all(is_done):
                total += found
                return
        self._fallback.fold(total, vectors, factors)

    def _sum(
        self,
        device: Device,
        vectors: Sequence[Encoded],
        factors: NDArray[np.float64],
        out: NDArray[np.float64],
        offset: int,
    ) -> bool:
        """Whether the device has written its share."""
        while True:
            tile = self._tiles[device.name]
            try:
                _sum_tiles(device, tile, vectors, factors, out, offset)
                return True
            except torch.OutOfMemoryError as error:
                if tile <= MIN_TILE:
                    self._lose(device, error)
                    return False
                self._tiles[device.name] = max(MIN_TILE, tile // 2 // ALIGN * ALIGN)
                log.warning("%s has no memory for tiles of %d values: half of that", device.name,
                            tile)  # fmt: skip
            except RuntimeError as error:
                self._lose(device, error)
                return False

    def _lose(self, device: Device, error: Exception) -> None:
        if device in self._devices:
            self._devices.remove(device)
        left = ", ".join(one.name for one in self._devices) or self._fallback.name
        log.error("%s is lost, %s goes on: %s", device.name, left, error)


def _sum_tiles(
    device: Device,
    tile: int,
    vectors: Sequence[Encoded],
    factors: NDArray[np.float64],
    out: NDArray[np.float64],
    offset: int,
) -> None:
    order = sorted(range(len(vectors)), key=lambda k: _kind(vectors[k]))  # stable
    vectors, factors = [vectors[k] for k in order], factors[order]
    ring = [device.stage(room_for(tile, device.rows)) for _ in range(RING)]
    num_staged = 0
    for start in range(0, out.size, tile):
        stop = min(start + tile, out.size)
        total, first = device.zeros(stop - start), 0
        while first < len(vectors):
            stage = ring[num_staged % RING]
            device.wait(stage)
            count, packed = pack(
                vectors[first:], factors[first:], offset + start, offset + stop, stage.host
            )
            device.add(total, stage, packed)
            first, num_staged = first + count, num_staged + 1
        out[start:stop] = device.fetch(total)


def _kind(vector: Encoded) -> tuple[str, bool]:
    return vector.form, vector.bitmap is not None


_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def tensors(data: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, ...]:
    """Factors, values, scales, bitmap and starts of what was packed, as views of ``data``."""
    found = []
    types = (torch.float64, _TYPES[packed.form], torch.float32, torch.uint8, torch.int64)
    arrays = (packed.factors, packed.values, packed.scales, packed.bitmap, packed.starts)
    for dtype, array in zip(types, arrays, strict=True):
        if array is not None:
            part = data[array.offset : array.offset + array.num_bytes]
            found.append(part.view(dtype).view(array.shape))
    return tuple(found)


class CpuStage:
    """Host and device are the same memory."""

    def __init__(self, num_bytes: int) -> None:
        self.host = np.empty(num_bytes, np.uint8)
        self.data = torch.from_numpy(self.host)


class CpuDevice:
    """PyTorch on a core of this machine.

    Args:
        name: Of the core.
    """

    tile = 1 << 14  # eight rows of float64 are 1 MiB, the L2 cache of a core
    rows = 8

    def __init__(self, name: str) -> None:
        self.name = name

    def stage(self, num_bytes: int) -> CpuStage:
        """As of `Device`."""
        return CpuStage(num_bytes)

    def zeros(self, width: int) -> torch.Tensor:
        """As of `Device`."""
        return torch.zeros(width, dtype=torch.float64)

    def wait(self, stage: Stage) -> None:
        """It never does: work is over when `add` returns."""

    def add(self, total: torch.Tensor, stage: Any, packed: Packed) -> None:
        """As of `Device`."""
        if packed.bitmap is None:
            add_dense(total, *tensors(stage.data, packed))
        else:
            add_sparse(total, *tensors(stage.data, packed), skip=packed.skip)

    def fetch(self, total: torch.Tensor) -> NDArray[np.float64]:
        """As of `Device`."""
        found: NDArray[np.float64] = total.numpy()
        return found


def cpu_devices() -> list[CpuDevice]:
    """One for each core that this process may use; a tile is too small for several."""
    torch.set_num_threads(1)
    return [CpuDevice(f"cpu:{k}") for k in range(num_cores())]


def add_dense(
    total: torch.Tensor, factors: torch.Tensor, values: torch.Tensor, scales: torch.Tensor
) -> None:
    """Adds Σ factors[k] · values[k], and · scales[k] by group where there are any."""
    rows = values.to(torch.float64)
    if scales.numel():
        num_full = values.shape[1] // GROUP
        groups = torch.unflatten(rows[:, : num_full * GROUP], 1, (-1, GROUP))
        groups.mul_(scales[:, :num_full, None])
        rows[:, num_full * GROUP :].mul_(scales[:, num_full:])
    total.addmv_(rows.t(), factors)


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
    bits = (bitmap[:, None] >> torch.arange(8, device=bitmap.device)) & 1
    positions = bits.view(-1)[: total.numel()].nonzero().view(-1)
    kept = values.to(torch.float64) * factors
    if scales.numel():
        kept *= scales[(torch.arange(values.numel(), device=values.device) + skip) // GROUP]
    total[positions] += kept
