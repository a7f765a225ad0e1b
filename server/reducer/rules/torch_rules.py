"""The kernels on PyTorch: for GPUs. On a CPU its sort takes ten times as long as numpy's.

Tiles are filled by threads into two buffers of the host, pinned for a GPU: while the device works
on one, the next is filled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from petalfl.codecs.encoded import ALIGN
from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector

from ...matrices import Matrix
from .bases import num_directions, power_of_two_above
from .numpy_rules import NumpyRules
from .products import median_norm
from .rules import Rules
from .tiles import num_cores, read, within_budget

log = logging.getLogger("petalfl.server.reducer")

TILE_VALUES = 1 << 24  # of all updates together: two buffers of 64 MiB
MIN_TILE_VALUES = 1 << 18  # with less memory than for this, a device is of no use
R = TypeVar("R")


class TorchRules:
    """`Rules` on a device.

    Where its memory is short, tiles are halved; where it is lost, the fallback computes the rule
    from the updates anew.

    Args:
        device: As torch names it, such as ``cuda:0``.
    """

    def __init__(self, device: str, fallback: Rules | None = None) -> None:
        self._device = torch.device(device)
        self._fallback: Rules = fallback or NumpyRules()
        self._tile_values = TILE_VALUES
        self._is_lost = False

    def median(self, deltas: Sequence[EncodedDelta]) -> Vector:
        """As of `Rules`."""
        return self._guarded(
            lambda: self._by_coordinate(deltas, median),
            lambda: self._fallback.median(deltas),
        )

    def trimmed_mean(
        self, deltas: Sequence[EncodedDelta], weights: NDArray[np.float64], cut: int
    ) -> Vector:
        """As of `Rules`."""
        return self._guarded(
            lambda: self._by_coordinate(
                deltas, partial(trimmed_mean, weights=self._tensor(weights), cut=cut)
            ),
            lambda: self._fallback.trimmed_mean(deltas, weights, cut),
        )

    def inner_products(self, deltas: Sequence[EncodedDelta]) -> NDArray[np.float64]:
        """As of `Rules`."""
        return self._guarded(
            lambda: self._inner_products(deltas),
            lambda: self._fallback.inner_products(deltas),
        )

    def canonical(
        self,
        matrix: Matrix,
        deltas: Sequence[EncodedDelta],
        shares: NDArray[np.float64],
        temperature: float,
        energy: float,
    ) -> NDArray[np.float64]:
        """As of `Rules`."""
        return self._guarded(
            lambda: self._canonical(matrix, deltas, shares, temperature, energy),
            lambda: self._fallback.canonical(matrix, deltas, shares, temperature, energy),
        )

    def _guarded(self, run: Callable[[], R], instead: Callable[[], R]) -> R:
        while not self._is_lost:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                if self._tile_values <= MIN_TILE_VALUES:
                    log.error("%s has no memory for a rule, another computes it: %s",
                              self._device, error)  # fmt: skip
                    return instead()
                self._tile_values //= 2
                log.warning("%s has no memory for tiles of %d values: half of that",
                            self._device, 2 * self._tile_values)  # fmt: skip
            except RuntimeError as error:
                if self._device.type == "cpu":
                    raise
                log.error("%s is lost to the rules: %s", self._device, error)
                self._is_lost = True
        return instead()

    def _tensor(self, values: NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def _by_coordinate(
        self, deltas: Sequence[EncodedDelta], kernel: Callable[[torch.Tensor], torch.Tensor]
    ) -> Vector:
        found = np.empty(deltas[0].size, np.float32)
        for part, values in self._tiles(deltas):
            found[part] = kernel(values).cpu().numpy()
        return found

    def _inner_products(self, deltas: Sequence[EncodedDelta]) -> NDArray[np.float64]:
        origin = median_norm(deltas)
        shape = (len(deltas), len(deltas))
        products = torch.zeros(shape, dtype=torch.float64, device=self._device)
        for _, values in self._tiles(deltas):
            rows = values.double()
            rows -= rows[origin].clone()
            products += rows @ rows.T
        return np.asarray(products.cpu().numpy())

    def _canonical(
        self,
        matrix: Matrix,
        deltas: Sequence[EncodedDelta],
        shares: NDArray[np.float64],
        temperature: float,
        energy: float,
    ) -> NDArray[np.float64]:
        scale = power_of_two_above(deltas)
        num_clients, num_columns = len(deltas), matrix.num_columns
        gram = torch.zeros((matrix.num_rows,) * 2, dtype=torch.float64, device=self._device)
        for values in self._matrices(matrix, deltas, scale):
            gram += values @ values.T
        eigenvalues, vectors = torch.linalg.eigh(gram)
        rank = num_directions(eigenvalues.flip(0).cpu().numpy(), energy)
        basis = vectors.flip(1)[:, :rank]
        merged = torch.zeros((rank, num_columns), dtype=torch.float64, device=self._device)
        count = max(1, 8 * self._tile_values // (num_clients * num_columns))
        for start in range(0, rank, count):
            rows = basis[:, start : start + count].T.float()
            shape = (num_clients, len(rows), num_columns)
            coefficients = torch.empty(shape, dtype=torch.float64, device=self._device)
            for k, values in enumerate(self._matrices(matrix, deltas, scale)):
                coefficients[k] = rows @ values
            merged[start : start + count] = _fuse(coefficients, self._tensor(shares), temperature)
        return np.asarray((basis @ merged * scale).cpu().numpy())

    def _tiles(self, deltas: Sequence[EncodedDelta]) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the block, with all updates' values in them: float32 ``(n, slice)``."""
        num_updates, size = len(deltas), deltas[0].size
        width = max(ALIGN, self._tile_values // num_updates // ALIGN * ALIGN)
        width = within_budget(size, width, 2 * 4 * num_updates).width
        parts = [slice(k, min(k + width, size)) for k in range(0, size, width)]
        jobs = [[(delta, part) for delta in deltas] for part in parts]
        for part, values in zip(parts, self._filled(jobs, width), strict=True):
            yield part, values[:, : part.stop - part.start]

    def _matrices(
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
        is_pinned = self._device.type == "cuda"
        buffers = [torch.empty((len(jobs[0]), width), pin_memory=is_pinned) for _ in range(2)]
        with ThreadPoolExecutor(num_cores(), "rules") as pool:

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
                yield buffers[k % 2].to(self._device)


def median(values: torch.Tensor) -> torch.Tensor:
    """Of every column of ``(n, w)``: ``(w,)``."""
    kernels = _triton(values)
    if kernels is not None:
        found: torch.Tensor = kernels.median(values)
        return found
    ranked = values.sort(dim=0).values
    low, high = (len(values) - 1) // 2, len(values) // 2
    return (ranked[low].double() / 2 + ranked[high].double() / 2).float()


def trimmed_mean(values: torch.Tensor, weights: torch.Tensor, cut: int) -> torch.Tensor:
    """Of every column of ``(n, w)``: ``(w,)``; weights float64 ``(n,)``."""
    kernels = _triton(values)
    if kernels is not None:
        found: torch.Tensor = kernels.trimmed_mean(values, weights, cut)
        return found
    ranked, places = values.sort(dim=0, stable=True)
    shares = weights[places[cut:-cut]]
    return ((ranked[cut:-cut].double() * shares).sum(dim=0) / shares.sum(dim=0)).float()


def _triton(values: torch.Tensor) -> Any:
    """The kernels for CUDA, where they are for so many rows."""
    if not values.is_cuda:
        return None
    from . import triton_ranks

    return triton_ranks if len(values) <= triton_ranks.MAX_ROWS else None


def _fuse(coefficients: torch.Tensor, shares: torch.Tensor, temperature: float) -> torch.Tensor:
    """Σ ρ_k C_k of ``(clients, r, n)``: `bases.reliabilities`, and what is merged by them."""
    norms = coefficients.norm(dim=2).clamp_min(1e-150)
    consensus = torch.einsum("kr,krn->rn", shares[:, None] / norms, coefficients)
    lengths = consensus.norm(dim=1).clamp_min(1e-150)
    cosines = torch.einsum("krn,rn->kr", coefficients, consensus) / (norms * lengths)
    scores = shares[:, None] * torch.exp((cosines - 1) / temperature)
    return torch.einsum("kr,krn->rn", scores / scores.sum(dim=0), coefficients)
