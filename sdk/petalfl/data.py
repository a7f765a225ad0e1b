"""Checks a device's arrays against the model before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl.errors import DataError
from petalfl.model import Block, Modality, ModelManifest

Labels: TypeAlias = ArrayLike | Mapping[str, ArrayLike]  # of the one head, or by task


def check_inputs(
    manifest: ModelManifest, inputs: Mapping[str, ArrayLike]
) -> dict[str, NDArray[Any]]:
    """The inputs as C-contiguous arrays ``(n, *shape)`` of the modality's dtype, of one length.

    Raises:
        DataError: No array, an unknown modality, a wrong shape or dtype, a NaN, an integer out
            of range, unequal lengths.
    """
    if not inputs:
        raise DataError(f"no modality was given, the model has {', '.join(manifest.modalities)}")
    arrays = {name: _check_input(manifest, name, array) for name, array in inputs.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"expected the same number of examples, at least 1, found {lengths}")
    return arrays


def check_labels(
    manifest: ModelManifest, labels: Labels, num_examples: int
) -> dict[str, NDArray[Any]]:
    """The labels by task, each ``(n, …)``.

    Int64 ``(n,)`` in [0, classes) for cross_entropy, else float32 of the shape of the head's
    output, for bce_with_logits in [0, 1].

    Args:
        labels: Of some tasks or all; of a model with one head, the array will do.

    Raises:
        DataError: No or an unknown task, a wrong shape, dtype, length or value.
    """
    heads = manifest.heads
    if not isinstance(labels, Mapping):
        if len(heads) > 1:
            raise DataError(f"labels: expected a mapping by task, of some of {', '.join(heads)}")
        (task,) = heads
        return {task: _check_task(heads[task], "labels", labels, num_examples)}
    if not labels or (unknown := sorted(labels.keys() - heads.keys())):
        found = f"unknown task {unknown[0]!r}" if labels else "found no task"
        raise DataError(f"labels: {found}, the model has {', '.join(heads)}")
    return {
        task: _check_task(heads[task], f"labels of {task}", array, num_examples)
        for task, array in labels.items()
    }


def fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether a shape is the expected one, whose None stand for any length from 1."""
    return len(shape) == len(expected) and all(
        size >= 1 if dim is None else size == dim for size, dim in zip(shape, expected, strict=True)
    )


def _check_input(manifest: ModelManifest, name: str, value: ArrayLike) -> NDArray[Any]:
    modality = manifest.modalities.get(name)
    if modality is None:
        raise DataError(
            f"unknown modality {name!r}, the model has {', '.join(manifest.modalities)}"
        )
    array = _array(f"modality {name}", value)
    if array.ndim == 0 or not modality.fits(array.shape[1:]):
        lengths = f" of lengths {modality.ranges}" if modality.ranges else ""
        raise DataError(
            f"modality {name}: found shape {array.shape}, "
            f"expected {_shown('n', modality.shape)}{lengths}"
        )
    if modality.dtype == "int64":
        return _check_integers(name, modality, array)
    return _check_floats(f"modality {name}", array)


def _check_integers(name: str, modality: Modality, array: NDArray[Any]) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu":
        raise DataError(f"modality {name}: found {array.dtype}, expected integers")
    assert modality.num_values is not None  # the manifest was checked
    if array.size and (array.min() < 0 or array.max() >= modality.num_values):
        raise DataError(
            f"modality {name}: found {array.min()} to {array.max()}, "
            f"expected 0 to {modality.num_values - 1}"
        )
    return np.ascontiguousarray(array, dtype=np.int64)


def _check_task(head: Block, where: str, value: ArrayLike, num_examples: int) -> NDArray[Any]:
    assert head.task is not None  # the manifest was checked
    array, shape = _array(where, value), head.outputs[0].shape
    if head.task.loss == "cross_entropy":
        return _check_classes(where, array, num_examples, shape[0] or 0)
    if array.ndim == 0 or len(array) != num_examples or not fits(array.shape[1:], shape):
        raise DataError(
            f"{where}: found {array.dtype} {array.shape}, "
            f"expected numbers {_shown(num_examples, shape)}"
        )
    array = _check_floats(where, array.astype(np.float32) if array.dtype == bool else array)
    if head.task.loss == "bce_with_logits" and (array.min() < 0 or array.max() > 1):
        raise DataError(f"{where}: found {array.min():g} to {array.max():g}, expected 0 to 1")
    return array


def _check_classes(
    where: str, array: NDArray[Any], num_examples: int, num_classes: int
) -> NDArray[np.int64]:
    if array.shape != (num_examples,) or array.dtype.kind not in "iu":
        raise DataError(
            f"{where}: found {array.dtype} {array.shape}, expected integers ({num_examples},)"
        )
    if array.min() < 0 or array.max() >= num_classes:
        raise DataError(
            f"{where}: found {array.min()} to {array.max()}, expected 0 to {num_classes - 1}"
        )
    return array.astype(np.int64, copy=False)


def _check_floats(where: str, array: NDArray[Any]) -> NDArray[np.float32]:
    if array.dtype.kind not in "fiu":
        raise DataError(f"{where}: found {array.dtype}, expected numbers")
    with np.errstate(over="ignore"):  # what overflows is found to be infinite
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise DataError(f"{where}: example {bad} holds NaN or infinity")
    return array


def _array(where: str, value: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of unequal lengths
        raise DataError(f"{where}: found no array: {error}") from error


def _shown(length: int | str, shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if dim is None else str(dim) for dim in (length, *shape))})"
