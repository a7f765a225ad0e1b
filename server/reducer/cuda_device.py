"""One GPU: a ring of pinned buffers, copies on one stream, sums on another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .packing import Packed
from .torch_backend import tensors


class CudaStage:
    """A pinned buffer of the host, and its copy on the device.

    Attributes:
        is_sent: The host may fill it anew.
        is_summed: The device may overwrite its copy.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.host: NDArray[np.uint8] = self.pinned.numpy()
        self.data = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.is_sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.is_summed = torch.cuda.Event()  # type: ignore[no-untyped-call]


class CudaDevice:
    """A `Device` over CUDA.

    Args:
        index: Of the GPU.
    """

    tile = 3 << 20  # values: with 8 float32 rows a buffer takes 120 of the 128 MiB torch pins
    rows = 8

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._device = torch.device(self.name)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._sums = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def stage(self, num_bytes: int) -> CudaStage:
        """As of `Device`."""
        return CudaStage(num_bytes, self._device)

    def zeros(self, width: int) -> torch.Tensor:
        """As of `Device`."""
        with torch.cuda.stream(self._sums):
            return torch.zeros(width, dtype=torch.float64, device=self._device)

    def wait(self, stage: Any) -> None:
        """As of `Device`."""
        stage.is_sent.synchronize()

    def add(self, total: torch.Tensor, stage: Any, packed: Packed) -> None:
        """As of `Device`."""
        from . import triton_kernels as kernels

        with torch.cuda.device(self._device):
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(stage.is_summed)
                part = slice(0, packed.num_bytes)
                stage.data[part].copy_(stage.pinned[part], non_blocking=True)
                stage.is_sent.record(self._copies)
            with torch.cuda.stream(self._sums):
                self._sums.wait_event(stage.is_sent)
                if packed.bitmap is None:
                    kernels.add_dense(total, *tensors(stage.data, packed))
                else:
                    kernels.add_sparse(total, *tensors(stage.data, packed), skip=packed.skip)
                stage.is_summed.record(self._sums)

    def fetch(self, total: torch.Tensor) -> NDArray[np.float64]:
        """As of `Device`."""
        with torch.cuda.stream(self._sums):
            found: NDArray[np.float64] = total.cpu().numpy()
        return found
