"""Kernels of the rules that need all updates at once: read in tiles, on all cores or a GPU."""

from __future__ import annotations

import functools
import importlib

from .. import backend
from .numpy_rules import NumpyRules
from .rules import Rules

__all__ = ["Rules", "active"]

_numpy = NumpyRules()


def active() -> Rules:
    """The kernels that go with the active backend: torch's on a GPU alone, else numpy's."""
    name = backend.active().name
    if name.startswith("cuda"):
        return _on(name)
    return _numba() if name.startswith("numba") else _numpy


@functools.cache
def _numba() -> Rules:
    made: Rules = importlib.import_module(".numba_rules", __package__).NumbaRules()
    return made


@functools.cache
def _on(backend: str) -> Rules:
    """Loaded when it is wanted alone: torch takes seconds, where it is there."""
    made: Rules = importlib.import_module(".torch_rules", __package__).rules_on(backend)
    return made
