"""What computes: numpy, or whatever else is chosen at start, for the whole process."""

from __future__ import annotations

import importlib
import importlib.util
import re
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


FORMS = ("auto", "numpy", "numba")  # of ``--reducer``
_REGEX = r"auto|numpy|numba"

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

    ``auto`` takes what was measured to be the fastest of what is installed: docs/reducer.md.

    Raises:
        ValueError: There is none such here; the message says what is missing.
    """
    kind = parse_reducer(text)
    if kind == "auto":
        kind = "numba" if importlib.util.find_spec("numba") else "numpy"
    if kind == "numpy":
        return NumpyBackend()
    if importlib.util.find_spec("numba") is None:
        raise ValueError("reducer numba: numba is not installed; pip install petalfl[fast]")
    module = importlib.import_module(".numba_backend", __package__)
    backend: Backend = module.NumbaBackend()
    return backend


@contextmanager
def use(backend: Backend) -> Iterator[Backend]:
    """Makes a backend the active one within the block."""
    _active.append(backend)
    try:
        yield backend
    finally:
        _active.remove(backend)
