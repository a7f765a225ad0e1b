"""What computes: numpy, or whatever else is chosen at start, for the whole process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import Encoded

from .numpy_backend import NumpyBackend

Sum = NDArray[np.float64]  # (size,); of a backend on a device, whatever stands for it there


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


BACKENDS = {"numpy": NumpyBackend}

_active: list[Backend] = [NumpyBackend()]


def active() -> Backend:
    """The backend of this process."""
    return _active[-1]


def choose(spec: str) -> Backend:
    """The backend that a text such as ``numpy`` names, ready to compute.

    Raises:
        ValueError: There is none such here; the message says what is missing.
    """
    if spec == "auto":
        spec = "numpy"
    if spec not in BACKENDS:
        raise ValueError(f"reducer {spec!r}: expected auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[spec]()


@contextmanager
def use(backend: Backend) -> Iterator[Backend]:
    """Makes a backend the active one within the block."""
    _active.append(backend)
    try:
        yield backend
    finally:
        _active.remove(backend)
