"""Updates as they come over the wire, and what the kernels find, computed plainly in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import parse_codec
from petalfl.model import Block
from petalfl.payloads import EncodedDelta, encode_payload, parse_payload, plain_delta
from petalfl.vectors import Vector
from server.matrices import Matrix
from tests.server.builders import make_block

Array: TypeAlias = NDArray[np.float64]
CODECS = ("f32", "f16", "bf16", "int8", "topk:0.3", "topk-int8:0.3")


def block_of(num_trainable: int, num_statistics: int) -> Block:
    return make_block(
        "head", "head", ("acc",), {"w": (num_trainable,)}, {"var": (num_statistics,)}
    )[0]


def encoded(values: NDArray[np.floating], codec: str, num_statistics: int = 0) -> EncodedDelta:
    """A delta as a device would send it."""
    block, known = block_of(values.size - num_statistics, num_statistics), parse_codec(codec)
    vector = values.astype(np.float32)
    payload, _ = encode_payload(known, block, vector, None, np.random.default_rng(0))
    return parse_payload(known, block, payload)


def mixed(num_updates: int, size: int, seed: int = 0) -> list[EncodedDelta]:
    """Updates of all codecs with running statistics, some of them clipped."""
    rng = np.random.default_rng(seed)
    deltas = []
    for k in range(num_updates):
        delta = encoded(rng.normal(size=size), CODECS[k % len(CODECS)], num_statistics=17)
        deltas.append(replace(delta, factor=0.5) if k % 4 == 1 else delta)
    return deltas


def plain(values: NDArray[np.floating]) -> list[EncodedDelta]:
    """Of ``(n, size)``."""
    return [plain_delta(row.astype(np.float32)) for row in values]


def decoded(deltas: Sequence[EncodedDelta]) -> Array:
    return np.stack([delta.decode() for delta in deltas]).astype(np.float64)


def trimmed_plainly(values: Array, weights: Array, cut: int) -> Array:
    """Coordinate by coordinate; of equals the first is the least."""
    found = []
    for column in values.T:
        order = sorted(range(column.size), key=lambda k: (column[k], k))[cut : column.size - cut]
        found.append(np.average(column[order], weights=weights[order]))
    return np.array(found)


def distances_plainly(values: Array) -> Array:
    """‖Δ_j − Δ_k‖²: ``(n, n)``."""
    return np.stack([((values - row) ** 2).sum(axis=1) for row in values])


def canonical_plainly(
    matrix: Matrix, deltas: Sequence[Vector], shares: Array, temperature: float, energy: float
) -> Array:
    """As the formulas in docs/strategies.md have it, by the singular vectors of [D_1 | … | D_K]."""
    views = [matrix.view(delta).astype(np.float64) for delta in deltas]
    left, singular, _ = np.linalg.svd(np.concatenate(views, axis=1), full_matrices=False)
    sums = np.cumsum(singular**2)
    basis = left[:, : int(np.searchsorted(sums, energy * sums[-1])) + 1]
    coefficients = np.stack([basis.T @ view for view in views])
    norms = np.linalg.norm(coefficients, axis=2)
    consensus = np.einsum("kr,krn->rn", shares[:, None] / norms, coefficients)
    lengths = np.linalg.norm(consensus, axis=1)
    cosines = np.einsum("krn,rn->kr", coefficients, consensus) / norms / lengths
    weights = shares[:, None] * np.exp(cosines / temperature)
    merged = np.einsum("kr,krn->rn", weights / weights.sum(axis=0), coefficients)
    return np.asarray(basis @ merged)
