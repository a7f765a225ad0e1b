"""Checks a device's arrays against the model before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl.errors import DataError
from petalfl.model import ModelManifest


def check_inputs(
    manifest: ModelManifest, inputs: Mapping[str, ArrayLike]
) -> dict[str, NDArray[np.float32]]:
    """The inputs as C-contiguous float32 ``(n, *shape)``, by modality, all of one length.

    Raises:
        DataError: No array, an unknown modality, a wrong shape or dtype, a NaN, unequal lengths.
    """
    if not inputs:
        raise DataError(f"no modality was given, the model has {', '.join(manifest.modalities)}")
    arrays = {name: _check_input(manifest, name, array) for name, array in inputs.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"expected the same number of examples, at least 1, found {lengths}")
    return arrays


def check_labels(
    manifest: ModelManifest, labels: ArrayLike, num_examples: int
) -> NDArray[np.int64]:
    """The labels as int64 ``(n,)`` in ``[0, num_classes)``.

    Raises:
        DataError: A wrong shape, dtype, length or class.
    """
    try:
        array = np.asarray(labels)
    except ValueError as error:  # lists of unequal lengths
        raise DataError(f"labels: found no array: {error}") from error
    if array.shape != (num_examples,) or array.dtype.kind not in "iu":
        raise DataError(
            f"labels: found {array.dtype} {array.shape}, expected integers ({num_examples},)"
        )
    if array.min() < 0 or array.max() >= manifest.num_classes:
        raise DataError(
            f"labels: found {array.min()} to {array.max()}, "
            f"expected 0 to {manifest.num_classes - 1}"
        )
    return array.astype(np.int64, copy=False)


def _check_input(manifest: ModelManifest, name: str, value: ArrayLike) -> NDArray[np.float32]:
    modality = manifest.modalities.get(name)
    if modality is None:
        raise DataError(
            f"unknown modality {name!r}, the model has {', '.join(manifest.modalities)}"
        )
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of unequal lengths
        raise DataError(f"modality {name}: found no array: {error}") from error
    if array.shape[1:] != modality.shape or array.ndim == 0:
        expected = ", ".join(map(str, ("n", *modality.shape)))
        raise DataError(f"modality {name}: found shape {array.shape}, expected ({expected})")
    if array.dtype.kind not in "fiu":
        raise DataError(f"modality {name}: found {array.dtype}, expected numbers")
    with np.errstate(over="ignore"):  # what overflows is found to be infinite
        array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0])
        raise DataError(f"modality {name}: example {bad} holds NaN or infinity")
    return array
