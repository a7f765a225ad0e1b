"""Kernels of the rules that need all updates at once: read in tiles, on all cores."""

from __future__ import annotations

from .numpy_rules import NumpyRules
from .rules import Rules

__all__ = ["Rules", "active"]

_numpy = NumpyRules()


def active() -> Rules:
    """The kernels that go with the active backend."""
    return _numpy
