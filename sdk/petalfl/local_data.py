"""What a device trains on: examples by number, in arrays or read when a batch needs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl.data import Labels, check_inputs, check_labels
from petalfl.errors import DataError
from petalfl.model import ModelManifest

Example: TypeAlias = tuple[Mapping[str, ArrayLike], Labels]  # inputs by modality, without a batch


class ExampleError(DataError):
    """An example of a sequence that cannot be read, or does not fit the model."""


class Batch(NamedTuple):
    """Checked: inputs by modality and labels by task, all of one length."""

    inputs: dict[str, NDArray[Any]]
    labels: dict[str, NDArray[Any]]


class LocalData(Protocol):
    """A device's examples, all of the same modalities and tasks."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of every example."""
        ...

    @property
    def tasks(self) -> tuple[str, ...]:
        """That every example has labels of."""
        ...

    def __len__(self) -> int:
        """The number of examples now."""
        ...

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """Some of the examples.

        Raises:
            ExampleError: One cannot be read, or is not as the model has it.
        """
        ...

    def only(self, modalities: Collection[str], tasks: Collection[str]) -> LocalData:
        """The same examples with less of each."""
        ...


@dataclass(frozen=True, slots=True)
class ArrayData:
    """Examples in memory.

    Attributes:
        inputs: By modality, as `petalfl.data.check_inputs` returns them.
        labels: By task, as `petalfl.data.check_labels` returns them.
    """

    inputs: Mapping[str, NDArray[Any]]
    labels: Mapping[str, NDArray[Any]]

    @classmethod
    def checked(
        cls, manifest: ModelManifest, inputs: Mapping[str, ArrayLike], labels: Labels | None
    ) -> ArrayData:
        """Of arrays as an app has them.

        Raises:
            DataError: They do not fit the model.
        """
        arrays = check_inputs(manifest, inputs)
        length = len(next(iter(arrays.values())))
        given = labels if labels is not None else np.empty(0)
        return cls(arrays, check_labels(manifest, given, length))

    @property
    def modalities(self) -> tuple[str, ...]:
        """See `LocalData`."""
        return tuple(self.inputs)

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `LocalData`."""
        return tuple(self.labels)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values()), ()))

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """See `LocalData`."""
        return Batch(
            {name: array[indices] for name, array in self.inputs.items()},
            {task: array[indices] for task, array in self.labels.items()},
        )

    def only(self, modalities: Collection[str], tasks: Collection[str]) -> ArrayData:
        """See `LocalData`."""
        return ArrayData(
            {name: array for name, array in self.inputs.items() if name in modalities},
            {task: array for task, array in self.labels.items() if task in tasks},
        )


class SequenceData:
    """Examples of a sequence, each read when a batch needs it and not kept: it may be on disk.

    Args:
        examples: ``(inputs by modality, labels)`` by number; inputs and labels are as in
            `petalfl.data`, but of one example, without the leading axis. It may grow between
            rounds.
        modalities: What is taken of each example; None: what the first one has. ``tasks`` likewise.

    Raises:
        DataError: It is empty, or the first example does not fit the model.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        examples: Sequence[Example],
        modalities: Collection[str] | None = None,
        tasks: Collection[str] | None = None,
    ) -> None:
        self._manifest = manifest
        self._examples = examples
        if not len(examples):
            raise DataError("expected at least 1 example, found an empty sequence")
        inputs, labels = self._read(0)
        self._modalities = tuple(inputs if modalities is None else modalities)
        self._tasks = tuple(labels if tasks is None else tasks)
        self.take(np.zeros(1, np.int64))

    @property
    def modalities(self) -> tuple[str, ...]:
        """See `LocalData`."""
        return self._modalities

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `LocalData`."""
        return self._tasks

    def __len__(self) -> int:
        return len(self._examples)

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """See `LocalData`."""
        examples = [self._read(int(index)) for index in indices]
        try:
            return self._batch(examples)
        except DataError:
            for index, example in zip(indices, examples, strict=True):
                try:
                    self._batch([example])
                except DataError as error:
                    raise ExampleError(f"number {index} of the sequence, alone: {error}") from error
            raise

    def only(self, modalities: Collection[str], tasks: Collection[str]) -> SequenceData:
        """See `LocalData`."""
        return SequenceData(
            self._manifest,
            self._examples,
            [name for name in self._modalities if name in modalities],
            [task for task in self._tasks if task in tasks],
        )

    def _read(self, index: int) -> tuple[Mapping[str, ArrayLike], Mapping[str, ArrayLike]]:
        """An example's inputs by modality and labels by task."""
        inputs, labels = read_example(self._examples, index)
        if not isinstance(labels, Mapping):
            heads = self._manifest.heads
            if len(heads) > 1:
                raise ExampleError(
                    f"number {index} of the sequence: expected labels by task, of some of "
                    f"{', '.join(heads)}"
                )
            labels = dict.fromkeys(heads, labels)
        return inputs, labels

    def _batch(
        self, examples: Sequence[tuple[Mapping[str, ArrayLike], Mapping[str, ArrayLike]]]
    ) -> Batch:
        inputs = {
            name: _stacked(f"modality {name}", [one.get(name) for one, _ in examples])
            for name in self._modalities
        }
        labels = {
            task: _stacked(f"labels of {task}", [one.get(task) for _, one in examples])
            for task in self._tasks
        }
        arrays = check_inputs(self._manifest, inputs)
        return Batch(arrays, check_labels(self._manifest, labels, len(examples)))


def _stacked(where: str, values: Sequence[ArrayLike | None]) -> NDArray[Any]:
    if any(value is None for value in values):
        raise DataError(f"{where}: it is not there, and the first example of the sequence has it")
    try:
        return np.stack([np.asarray(value) for value in values])
    except ValueError as error:
        raise ExampleError(f"{where}: the examples of a batch differ in shape: {error}") from error


def read_example(examples: Sequence[Example], index: int) -> Example:
    """An example of an app's sequence.

    Raises:
        ExampleError: It is not there, cannot be read, or is no pair of inputs and labels.
    """
    try:
        inputs, labels = examples[index]
        if isinstance(inputs, Mapping):  # which may read, too
            inputs = {name: np.asarray(value) for name, value in inputs.items()}
        if isinstance(labels, Mapping):
            labels = {name: np.asarray(value) for name, value in labels.items()}
    except Exception as error:  # the app's own code
        raise ExampleError(f"number {index} of the sequence cannot be read: {error}") from error
    if not isinstance(inputs, Mapping):
        raise ExampleError(
            f"number {index} of the sequence: expected (inputs by modality, labels), found "
            f"{type(inputs).__name__} for the inputs"
        )
    return inputs, labels
