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
    """The kernels that go with the active backend: on a CPU those of numpy, whatever it sums with.

    Of several GPUs the first.
    """
    name = backend.active().name
    if name.startswith("cuda"):
        return _on(name if ":" in name else "cuda:0")
    return _numpy


@functools.cache
def _on(device: str) -> Rules:
    """Loaded when it is wanted alone: torch takes seconds, where it is there."""
    made: Rules = importlib.import_module(".torch_rules", __package__).TorchRules(device)
    return made
