"""Examples by number: the same training from arrays and from a sequence that is read lazily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from petalfl.errors import DataError
from petalfl.local_data import ArrayData, Example, SequenceData
from petalfl.model import Modality
from petalfl.training import Hyperparameters, train
from tests.petalfl.builders import NumpyEngine, draw_vectors, make_block, make_manifest
from tests.petalfl.trainings import PLAIN, RICH, assert_same, data

ONE_HEAD = make_manifest(
    {"a": 2}, make_block("encoder-a", ("a",), 2, 2), make_block("head", ("encoder-a",), 3, 2)
)


class Recorded(Sequence[Example]):
    """A sequence that remembers what is read of it, and fails where it is told to."""

    def __init__(self, inputs: Mapping[str, Any], labels: Mapping[str, Any]) -> None:
        self.inputs, self.labels = inputs, labels
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        row = {name: array[index] for name, array in self.inputs.items()}
        return row, {task: array[index] for task, array in self.labels.items()}


def steps_of(source: Any, hyperparameters: Hyperparameters = PLAIN) -> Any:
    rng = np.random.default_rng(0)
    return train(NumpyEngine(), RICH, draw_vectors(RICH), source, hyperparameters, rng)


def test_a_sequence_trains_as_arrays_do() -> None:
    inputs, labels = data(RICH, 10)
    lazy = SequenceData(RICH, Recorded(inputs, labels))
    assert (lazy.modalities, lazy.tasks, len(lazy)) == (("a", "b"), ("p", "q"), 10)
    found, expected = steps_of(lazy), steps_of(ArrayData(inputs, labels))
    assert_same(found, expected)
    assert (found.losses, found.num_examples) == (expected.losses, 10)


def test_examples_are_read_when_their_batch_has_come() -> None:
    recorded = Recorded(*data(RICH, 10))
    lazy = SequenceData(RICH, recorded)
    assert recorded.read == [0, 0]
    recorded.read.clear()
    known: list[int] = []
    train(
        NumpyEngine(), RICH, draw_vectors(RICH), lazy, PLAIN, np.random.default_rng(0),
        on_batch=lambda done, total: known.append(len(recorded.read)),
    )  # fmt: skip
    assert known == [4, 8, 10]
    assert sorted(recorded.read) == list(range(10))


def test_less_of_each_example() -> None:
    inputs, labels = data(RICH, 10)
    lazy = SequenceData(RICH, Recorded(inputs, labels)).only({"a"}, {"q"})
    assert (lazy.modalities, lazy.tasks) == (("a",), ("q",))
    assert_same(steps_of(lazy), steps_of(ArrayData(inputs, labels).only({"a"}, {"q"})))


def test_it_may_grow_between_rounds() -> None:
    inputs, labels = data(ONE_HEAD, 4)
    examples: list[Example] = [({"a": inputs["a"][0]}, labels["head"][0])]
    lazy = SequenceData(ONE_HEAD, examples)
    examples.append(({"a": inputs["a"][1]}, labels["head"][1]))
    assert len(lazy) == 2
    batch = lazy.take(np.array([1, 0]))
    np.testing.assert_array_equal(batch.inputs["a"], inputs["a"][[1, 0]])
    np.testing.assert_array_equal(batch.labels["head"], labels["head"][[1, 0]])


ROW: Any = np.zeros(2, np.float32)
GOOD: Example = ({"a": ROW}, np.zeros(3))
REFUSED: dict[str, tuple[Any, str]] = {
    "no example": ([], "expected at least 1 example, found an empty sequence"),
    "no pair": ([GOOD, 7], "number 1 of the sequence cannot be read: cannot unpack"),
    "no mapping": ([GOOD, (ROW, 0)], "number 1 .*found ndarray for the inputs"),
    "another shape": (
        [GOOD, ({"a": np.zeros(3)}, np.zeros(3))],
        r"number 1 of the sequence, alone: modality a: found shape \(1, 3\), expected \(n, 2\)",
    ),
    "a NaN": ([GOOD, ({"a": ROW + np.nan}, np.zeros(3))], "number 1 .*modality a: .*NaN"),
    "no such modality": ([({"x": ROW}, np.zeros(3))], "number 0 .*unknown modality 'x'"),
    "a modality less": ([GOOD, ({"b": ROW}, np.zeros(3))], "number 1 .*modality a: it is not"),
    "a label less": ([GOOD, ({"a": ROW}, {"other": 1})], "number 1 .*labels of head: it is not"),
    "a label too long": ([GOOD, ({"a": ROW}, np.zeros(4))], "number 1 .*labels of head: found"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    examples, reason = REFUSED[case]
    with pytest.raises(DataError, match=reason):
        SequenceData(ONE_HEAD, examples).take(np.array([0, 1]))


def test_labels_without_a_task_of_a_model_with_several() -> None:
    inputs, _ = data(RICH, 1)
    row = {name: array[0] for name, array in inputs.items()}
    with pytest.raises(DataError, match=r"number 0 .*expected labels by task, of some of p, q"):
        SequenceData(RICH, [(row, 0)])


def test_lengths_that_may_vary_must_agree_in_a_batch() -> None:
    varying = make_manifest(
        {"a": Modality((None, 2), ranges=((1, 5),))},
        make_block("encoder-a", ("a",), 2, 2),
        make_block("head", ("encoder-a",), 3, 2),
    )
    lazy = SequenceData(varying, [({"a": np.zeros((n, 2))}, np.zeros(3)) for n in (1, 1, 4)])
    assert lazy.take(np.array([2])).inputs["a"].shape == (1, 4, 2)
    with pytest.raises(DataError, match="modality a: the examples of a batch differ in shape"):
        lazy.take(np.array([0, 1, 2]))
