"""How far updates lie from one another: a bound on their norm, and a report of outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from petalfl.payloads import EncodedDelta
from petalfl.vectors import Vector


class Outlier(NamedTuple):
    """What stands out of one update.

    Attributes:
        norm: Euclidean, of its delta.
        median_norm: Of all updates of the block.
        ratio: ``norm / median_norm``; inf where only the latter is 0, 1 where both are.
        cosine: Of its delta and the aggregate, in [-1, 1]; 0 where either is 0.
    """

    norm: float
    median_norm: float
    ratio: float
    cosine: float


def norm_of(delta: Vector) -> float:
    """The Euclidean norm, summed in float64: no finite delta overflows."""
    return float(np.sqrt(np.einsum("i,i->", delta, delta, dtype=np.float64)))


def clip(delta: EncodedDelta, max_norm: float) -> EncodedDelta:
    """The delta, scaled down to ``max_norm`` where it is longer; itself where it is not.

    Source:
        McMahan et al. 2018, arXiv:1710.06963; against model replacement: Sun et al. 2019,
        arXiv:1911.07963.
    """
    if not max_norm > 0:
        raise ValueError(f"expected max_norm > 0, found {max_norm}")
    return delta if delta.norm <= max_norm else replace(delta, factor=max_norm / delta.norm)


def outlier_report(deltas: Mapping[str, Vector], aggregate: Vector) -> dict[str, Outlier]:
    """By device: norm, ratio to the median norm, and cosine to the block's aggregate."""
    norms = {device: norm_of(delta) for device, delta in deltas.items()}
    median = float(np.median(list(norms.values()))) if norms else 0.0
    length = norm_of(aggregate)
    report = {}
    for device, delta in deltas.items():
        norm = norms[device]
        ratio = norm / median if median else (np.inf if norm else 1.0)
        product = float(np.einsum("i,i->", delta, aggregate, dtype=np.float64))
        cosine = product / (norm * length) if norm and length else 0.0
        report[device] = Outlier(norm, median, ratio, min(1.0, max(-1.0, cosine)))
    return report
