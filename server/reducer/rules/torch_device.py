"""One device of torch, and how updates get there.

Tiles are filled by threads into two buffers of the host, pinned for a GPU: while the device works
on one, the next is filled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from petalfl.codecs.encoded import ALIGN
from petalfl.payloads import EncodedDelta

from ...matrices import Matrix
from .tiles import num_cores, parts, read, within_budget

TILE_VALUES = 1 << 24  # of all updates together: two buffers of 64 MiB


class TorchDevice:
    """A device that reads updates tile by tile.

    Args:
        name: As torch has it, such as ``cuda:0``.
        num_devices: That share the host's threads and its budget of memory.

    Attributes:
        tile_values: Of all updates together, in a tile.
    """

    def __init__(self, name: str, num_devices: int = 1) -> None:
        self.device = torch.device(name)
        self.tile_values = TILE_VALUES
        self._num_devices = num_devices

    def __str__(self) -> str:
        return str(self.device)

    def active(self) -> AbstractContextManager[object]:
        """Within it, kernels of Triton run on this device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def tensor(self, values: NDArray[np.float64]) -> torch.Tensor:
        """A copy on the device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def zeros(self, *shape: int) -> torch.Tensor:
        """float64."""
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def tiles(
        self, deltas: Sequence[EncodedDelta], share: slice
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The parts of a share, with all updates' values in them: float32 ``(n, part)``."""
        num_updates, size = len(deltas), share.stop - share.start
        width = max(ALIGN, self.tile_values // num_updates // ALIGN * ALIGN)
        width = within_budget(size, width, 2 * 4 * num_updates * self._num_devices).width
        found = list(parts(share.start, share.stop, width))
        jobs = [[(delta, part) for delta in deltas] for part in found]
        for part, values in zip(found, self._filled(jobs, width), strict=True):
            yield part, values[:, : part.stop - part.start]

    def matrices(
        self, matrix: Matrix, deltas: Sequence[EncodedDelta], scale: float
    ) -> Iterator[torch.Tensor]:
        """The matrix of each delta in turn, over the scale: float32 ``(m, n)``."""
        part = slice(matrix.start, matrix.start + matrix.size)
        for values in self._filled([[(delta, part)] for delta in deltas], matrix.size):
            whole = (values / scale).reshape(matrix.shape)
            yield whole.T if matrix.is_turned else whole

    def _filled(
        self, jobs: Sequence[Sequence[tuple[EncodedDelta, slice]]], width: int
    ) -> Iterator[torch.Tensor]:
        """For every job what it reads, a row each: float32 ``(rows, width)`` on the device."""
        is_pinned = self.device.type == "cuda"
        buffers = [torch.empty((len(jobs[0]), width), pin_memory=is_pinned) for _ in range(2)]
        with ThreadPoolExecutor(max(1, num_cores() // self._num_devices), "rules") as pool:

            def fill(k: int) -> list[Future[None]]:
                rows = buffers[k % 2].numpy()
                return [
                    pool.submit(read, delta, part, row[: part.stop - part.start])
                    for (delta, part), row in zip(jobs[k], rows, strict=True)
                ]

            waiting = fill(0)
            for k in range(len(jobs)):
                for one in waiting:
                    one.result()
                waiting = fill(k + 1) if k + 1 < len(jobs) else []
                yield buffers[k % 2].to(self.device)
