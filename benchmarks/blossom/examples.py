"""Labeled examples that know which part of which recording they were cut from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples of one or more modalities.

    Attributes:
        inputs: float32 ``(n, *shape)`` by modality.
        labels: int64 ``(n,)``.
        spans: By modality int64 ``(n, 3)``: recording, first sample, and the one behind the last.
    """

    inputs: dict[str, NDArray[np.float32]]
    labels: Indices
    spans: dict[str, Indices]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> Examples:
        """Those at ``indices``, in that order."""
        return Examples(
            {name: values[indices] for name, values in self.inputs.items()},
            self.labels[indices],
            {name: spans[indices] for name, spans in self.spans.items()},
        )

    def only(self, modalities: Sequence[str]) -> Examples:
        """The same seen through fewer sensors."""
        return Examples(
            {name: self.inputs[name] for name in modalities},
            self.labels,
            {name: self.spans[name] for name in modalities},
        )


@dataclass(frozen=True, slots=True)
class Holding:
    """What one device has.

    Attributes:
        name: As a server takes it: lower case, digits and dashes.
        person: Whose; the unit that is left out to test on unseen people.
        train: It learns from these.
        test: These share no sample with ``train``, of any modality.

    Raises:
        ValueError: They do.
    """

    name: str
    person: str
    train: Examples
    test: Examples

    def __post_init__(self) -> None:
        if overlaps := count_overlaps(self.train, self.test):
            raise ValueError(
                f"{self.name}: {overlaps} pairs of a training and a test example share samples, "
                "expected none"
            )


def concatenate(parts: Sequence[Examples]) -> Examples:
    """One after another; all of the modalities of the first."""
    return Examples(
        {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs},
        np.concatenate([part.labels for part in parts]),
        {name: np.concatenate([part.spans[name] for part in parts]) for name in parts[0].spans},
    )


def overlaps_with(a: Examples, b: Examples) -> NDArray[np.bool_]:
    """Which of ``a`` share a sample of some modality with one of ``b``: ``(len(a),)``.

    Takes O(len(a) × len(b)) memory.
    """
    found: NDArray[np.bool_] = np.asarray(_shared(a, b).any(axis=1))
    return found


def count_overlaps(a: Examples, b: Examples) -> int:
    """Count the pairs of one of ``a`` and one of ``b`` that share a sample of some modality."""
    return int(_shared(a, b).sum())


def _shared(a: Examples, b: Examples) -> NDArray[np.bool_]:
    shared = np.zeros((len(a), len(b)), np.bool_)
    for name, spans in a.spans.items():
        x, y = spans[:, np.newaxis], b.spans[name][np.newaxis]  # (n, 1, 3), (1, m, 3)
        is_same = x[..., 0] == y[..., 0]
        shared |= is_same & (x[..., 1] < y[..., 2]) & (y[..., 1] < x[..., 2])
    return shared


def hold_out(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Splits off, of every class, the last ``share`` in their order, at least one.

    What overlaps with them is in neither part. A class with a single example stays whole in the
    first part.

    Returns:
        What to train on, and what to choose by.
    """
    chosen = np.zeros(len(examples), np.bool_)
    for label in np.unique(examples.labels):
        of_class = np.flatnonzero(examples.labels == label)
        if len(of_class) > 1:
            chosen[of_class[-max(round(share * len(of_class)), 1) :]] = True
    held_out = examples.take(np.flatnonzero(chosen))
    if not len(held_out):
        raise ValueError("every class has a single example, expected two of some")
    rest = examples.take(np.flatnonzero(~chosen))
    return rest.take(np.flatnonzero(~overlaps_with(rest, held_out))), held_out
