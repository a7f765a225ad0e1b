"""The kernels on PyTorch: for GPUs. On a CPU its sort takes ten times as long as numpy's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from .tiles import parts
from .torch_device import TorchDevice

log = logging.getLogger("petalfl.server.reducer")

MIN_TILE_VALUES = 1 << 18  # with less memory than for this, a device is of no use
Array = NDArray[np.float64]
R = TypeVar("R")


class _NoDeviceError(Exception):
    """None is left for a rule."""


class TorchRules:
    """`Rules` on one or several devices, each of which takes a share of every block.

    Where a device's memory is short, its tiles are halved. Where a device is lost, those that are
    left compute the rule from the updates anew, or the fallback does.

    Args:
        devices: As torch names them, such as ``cuda:0``.
    """

    def __init__(self, devices: Sequence[str], fallback: Rules | None = None) -> None:
        self._devices = [TorchDevice(name, len(devices)) for name in devices]
        self._fallback: Rules = fallback or NumpyRules()

    def median(self, deltas: Sequence[EncodedDelta]) -> Vector:
        """As of `Rules`."""
        return _either(
            lambda: self._by_coordinate(deltas, lambda device, values: median(values)),
            lambda: self._fallback.median(deltas),
        )

    def trimmed_mean(self, deltas: Sequence[EncodedDelta], weights: Array, cut: int) -> Vector:
        """As of `Rules`."""
        return _either(
            lambda: self._by_coordinate(
                deltas,
                lambda device, values: trimmed_mean(values, device.tensor(weights), cut),
            ),
            lambda: self._fallback.trimmed_mean(deltas, weights, cut),
        )

    def inner_products(self, deltas: Sequence[EncodedDelta]) -> Array:
        """As of `Rules`."""
        return _either(
            lambda: self._inner_products(deltas),
            lambda: self._fallback.inner_products(deltas),
        )

    def canonical(
        self,
        matrix: Matrix,
        deltas: Sequence[EncodedDelta],
        shares: Array,
        temperature: float,
        energy: float,
    ) -> Array:
        """As of `Rules`."""
        return _either(
            lambda: self._canonical(matrix, deltas, shares, temperature, energy),
            lambda: self._fallback.canonical(matrix, deltas, shares, temperature, energy),
        )

    # How

    def _by_coordinate(
        self,
        deltas: Sequence[EncodedDelta],
        kernel: Callable[[TorchDevice, torch.Tensor], torch.Tensor],
    ) -> Vector:
        found = np.empty(deltas[0].size, np.float32)

        def work(device: TorchDevice, share: slice) -> None:
            for part, values in device.tiles(deltas, share):
                found[part] = kernel(device, values).cpu().numpy()

        self._shared(found.size, ALIGN, work)
        return found

    def _inner_products(self, deltas: Sequence[EncodedDelta]) -> Array:
        origin, shape = median_norm(deltas), (len(deltas), len(deltas))

        def work(device: TorchDevice, share: slice) -> Array:
            products = device.zeros(*shape)
            for _, values in device.tiles(deltas, share):
                rows = values.double()
                rows -= rows[origin].clone()
                products += rows @ rows.T
            return np.asarray(products.cpu().numpy())

        return sum(self._shared(deltas[0].size, ALIGN, work), np.zeros(shape))

    def _canonical(
        self,
        matrix: Matrix,
        deltas: Sequence[EncodedDelta],
        shares: Array,
        temperature: float,
        energy: float,
    ) -> Array:
        """Devices share the clients of G, then the directions of the basis."""
        scale, num_rows = power_of_two_above(deltas), matrix.num_rows

        def gram_of(device: TorchDevice, clients: slice) -> Array:
            gram = device.zeros(num_rows, num_rows)
            for values in device.matrices(matrix, deltas[clients], scale):
                gram += values @ values.T
            return np.asarray(gram.cpu().numpy())

        def basis_of(device: TorchDevice, _: slice) -> Array:
            eigenvalues, vectors = torch.linalg.eigh(device.tensor(gram))
            rank = num_directions(eigenvalues.flip(0).cpu().numpy(), energy)
            return np.asarray(vectors.flip(1)[:, :rank].cpu().numpy())

        def merged_along(device: TorchDevice, directions: slice) -> Array:
            found = device.zeros(num_rows, matrix.num_columns)
            some, weights = device.tensor(basis[:, directions]), device.tensor(shares)
            count = max(1, 8 * device.tile_values // (len(deltas) * matrix.num_columns))
            for group in parts(0, some.shape[1], count):
                rows = some[:, group].T.float()
                coefficients = device.zeros(len(deltas), len(rows), matrix.num_columns)
                for one, values in zip(
                    coefficients, device.matrices(matrix, deltas, scale), strict=True
                ):
                    one[:] = rows @ values
                found += some[:, group] @ _fuse(coefficients, weights, temperature)
            return np.asarray(found.cpu().numpy())

        gram = sum(self._shared(len(deltas), 1, gram_of), np.zeros((num_rows, num_rows)))
        [basis] = self._shared(1, 1, basis_of)
        merged = self._shared(basis.shape[1], 1, merged_along)
        return sum(merged, np.zeros((num_rows, matrix.num_columns))) * scale

    def _shared(self, size: int, align: int, work: Callable[[TorchDevice, slice], R]) -> list[R]:
        """``work`` on every device's share of ``range(size)``, in order.

        Raises:
            _NoDeviceError: None is left that has memory enough.
        """
        devices = list(self._devices)
        while devices:
            width = -(-size // len(devices) // align) * align
            shares = list(parts(0, size, max(1, width)))
            with ThreadPoolExecutor(len(devices), "rules") as pool:
                done = list(pool.map(lambda *one: self._guarded(work, *one), devices, shares))
            if all(done):
                return [found for one in done for found in one]
            failed = [device for device, one in zip(devices, done, strict=False) if not one]
            devices = [device for device in devices if device not in failed]
        raise _NoDeviceError

    def _guarded(
        self, work: Callable[[TorchDevice, slice], R], device: TorchDevice, share: slice
    ) -> list[R]:
        """What ``work`` returns, alone; nothing where the device is lost, or has no memory."""
        while True:
            try:
                with device.active():
                    return [work(device, share)]
            except torch.OutOfMemoryError as error:
                if device.tile_values <= MIN_TILE_VALUES:
                    log.error("%s has no memory for a rule, another computes it: %s",
                              device, error)  # fmt: skip
                    return []
                device.tile_values //= 2
                log.warning("%s has no memory for tiles of %d values: half of that",
                            device, 2 * device.tile_values)  # fmt: skip
            except RuntimeError as error:
                if device.device.type == "cpu":
                    raise
                log.error("%s is lost to the rules: %s", device, error)
                self._devices = [one for one in self._devices if one is not device]
                return []


def rules_on(backend: str) -> TorchRules:
    """Those of a backend by its name: on the GPU that it has, or on all of them."""
    gpus = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    return TorchRules([backend] if ":" in backend else gpus)


def _either(run: Callable[[], R], instead: Callable[[], R]) -> R:
    try:
        return run()
    except _NoDeviceError:
        return instead()


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
