"""What computes: numpy, or whatever else is chosen at start, for the whole process."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import Encoded

from .numpy_backend import NumpyBackend

log = logging.getLogger("petalfl.server.reducer")

Sum = NDArray[np.float64]  # (size,)


class Backend(Protocol):
    """Weighted sums of encoded vectors; products and sums are in float64 on every one.

    Attributes:
        name: As in ``--reducer``, with the device's number.
        description: For the log: library, version, threads or device.
    """

    @property
    def name(self) -> str:
        """Which one."""

    @property
    def description(self) -> str:
        """What it runs on."""

    def fold(self, total: Sum, vectors: Sequence[Encoded], factors: NDArray[np.float64]) -> None:
        """Adds Σ factors[k] · vectors[k] to ``total``, all ``(size,)``."""


FORMS = ("auto", "numpy", "numba", "torch", "cuda[:N]")  # of ``--reducer``
_REGEX = r"auto|numpy|numba|torch|cuda(:[0-9]{1,3})?"

_active: list[Backend] = [NumpyBackend()]


def active() -> Backend:
    """The backend of this process."""
    return _active[-1]


def parse_reducer(text: str) -> str:
    """The text itself, where it is a form of ``--reducer``.

    Raises:
        ValueError: It is not.
    """
    if not re.fullmatch(_REGEX, text):
        raise ValueError(f"reducer {text!r} is not known; choose of {', '.join(FORMS)}")
    return text


def choose(text: str) -> Backend:
    """The backend that a form of ``--reducer`` names, ready to compute.

    ``auto`` takes a GPU where there is one, then what was measured to be the fastest of what is
    installed: docs/reducer.md.

    Raises:
        ValueError: There is none such here; the message says what is missing.
    """
    kind, _, index = parse_reducer(text).partition(":")
    if kind == "auto":
        return _best()
    if kind == "numpy":
        return NumpyBackend()
    if kind == "numba":
        _expect("numba", "numba", "pip install petalfl[fast]")
        return _made(".numba_backend", "NumbaBackend")
    _expect(kind, "torch", "https://pytorch.org says how")
    if kind == "torch":
        module = importlib.import_module(".torch_backend", __package__)
        return _made(
            ".torch_backend", "TorchBackend", "torch", module.cpu_devices(), _best_of_cpu()
        )
    return _cuda(text, index)


def _best() -> Backend:
    if num_gpus() and importlib.util.find_spec("torch"):
        try:
            return choose("cuda")
        except ValueError as error:
            log.warning("there is a GPU, but --%s; the CPU sums up", error)
    return _best_of_cpu()


def _best_of_cpu() -> Backend:
    if importlib.util.find_spec("numba"):
        try:
            return choose("numba")
        except ValueError as error:  # it is older than the numpy beside it, say
            log.warning("%s; numpy sums up", error)
    return NumpyBackend()


def _cuda(text: str, index: str) -> Backend:
    import torch

    found = torch.cuda.device_count() if torch.version.cuda else 0
    if torch.version.cuda is None:
        raise ValueError(f"reducer {text}: torch {torch.__version__} is built without CUDA")
    if not found or (index and int(index) >= found):
        raise ValueError(f"reducer {text}: torch finds {found} GPUs; choose auto, or another")
    _expect(text, "triton", "pip install triton")
    module = importlib.import_module(".cuda_device", __package__)
    devices = [module.CudaDevice(k) for k in ([int(index)] if index else range(found))]
    return _made(".torch_backend", "TorchBackend", text, devices, _best_of_cpu())


def num_gpus() -> int:
    """As the driver counts them, without loading torch."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        return count.value if not driver.cuInit(0) | driver.cuDeviceGetCount(count) else 0
    except (OSError, AttributeError):
        return 0


def _expect(text: str, package: str, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"reducer {text}: {package} is not installed; {remedy}")


def _made(module: str, name: str, *arguments: object) -> Backend:
    """Loaded when it is wanted alone: it may take seconds, and need what is not installed."""
    try:
        made: Backend = getattr(importlib.import_module(module, __package__), name)(*arguments)
    except ImportError as error:
        raise ValueError(f"reducer {module[1:].partition('_')[0]}: {error}") from error
    return made


@contextmanager
def use(backend: Backend) -> Iterator[Backend]:
    """Makes a backend the active one within the block."""
    _active.append(backend)
    try:
        yield backend
    finally:
        _active.remove(backend)
