"""A data set of noise around class means, for the blocks of `tests.export.tiny:small`."""

from __future__ import annotations

import numpy as np

from benchmarks.blossom.datasets import Dataset
from benchmarks.blossom.examples import Examples, Holding

NUM_CLASSES = 3


def examples(recording: int, first: int, num_per_class: int, seed: int = 0) -> Examples:
    """One sample each, ``num_per_class`` after another of a recording for every class."""
    rng = np.random.default_rng([seed, recording, first])
    labels = np.repeat(np.arange(NUM_CLASSES), num_per_class)
    starts = first + np.tile(np.arange(num_per_class), NUM_CLASSES)
    spans = np.stack([recording * NUM_CLASSES + labels, starts, starts + 1], axis=1)
    means = np.random.default_rng(0)
    inputs = {}
    for name, shape in {"a": (5,), "b": (2, 8)}.items():
        centers = means.standard_normal((NUM_CLASSES, *shape))
        noise = rng.standard_normal((len(labels), *shape))
        inputs[name] = (centers[labels] + 0.3 * noise).astype(np.float32)
    return Examples(inputs, labels, dict.fromkeys(inputs, spans))


def holdings() -> list[Holding]:
    """Two devices each of four people."""
    return [
        Holding(
            f"p{n}-{side}", f"p{n}", examples(2 * n + side, 0, 14), examples(2 * n + side, 14, 6)
        )
        for n in range(4)
        for side in range(2)
    ]


TINY = Dataset(
    ("a", "b"), ("x", "y", "z"), "tests.benchmarks.blossom.tiny_model:seeded",
    {"learning_rate": 0.1}, "macro_f1", holdings,
)  # fmt: skip
