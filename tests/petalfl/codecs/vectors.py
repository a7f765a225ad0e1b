"""Vectors for the tests of codecs."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from petalfl.vectors import Vector

NAMES = ("f32", "f16", "bf16", "int8", "topk:0.1", "topk-int8:0.1")

sizes = st.one_of(st.integers(1, 20), st.sampled_from([255, 256, 257, 511, 512, 1000, 16385]))


def vectors(
    limit: float = 65504, size: st.SearchStrategy[int] = sizes
) -> st.SearchStrategy[Vector]:
    """Vectors within ±limit, with zeros, denormals and equal values among them."""
    elements = st.floats(-np.float32(limit), np.float32(limit), width=32)
    return st_numpy.arrays(np.float32, size, elements=elements)


def deltas(size: int, seed: int = 0) -> Vector:
    """As training leaves them: few large ones, many small ones."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(size, np.float32)
    return (normal * np.exp(2 * rng.standard_normal(size)) * 1e-4).astype(np.float32)
