"""What tests of local training have in common: models, data and a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petalfl.local_data import ArrayData
from petalfl.model import ModelManifest
from petalfl.training import Hyperparameters, TrainingResult, train
from tests.petalfl.builders import (
    NumpyEngine,
    draw_vectors,
    fusionless_manifest,
    rich_manifest,
)

RICH = rich_manifest()
FUSIONLESS = fusionless_manifest()
MANIFESTS = {"rich": RICH, "fusionless": FUSIONLESS}
SUBSETS = [("a",), ("b",), ("a", "b")]
PLAIN = Hyperparameters(0.1, momentum=0.0, weight_decay=0.0, batch_size=4)


def data(manifest: ModelManifest, length: int = 10, seed: int = 5) -> tuple[Any, Any]:
    """Inputs by modality and labels by task."""
    rng = np.random.default_rng(seed)
    inputs = {
        name: rng.standard_normal((length, *modality.shape), dtype=np.float32)  # type: ignore[arg-type]
        for name, modality in manifest.modalities.items()
    }
    labels: dict[str, NDArray[Any]] = {}
    for task, head in manifest.heads.items():
        assert head.task is not None
        width = head.outputs[0].shape[0] or 0
        if head.task.loss == "cross_entropy":
            labels[task] = rng.integers(0, width, length)
        else:
            labels[task] = rng.random((length, width), dtype=np.float32)
    return inputs, labels


def run(
    hyperparameters: Hyperparameters,
    *,
    manifest: ModelManifest = RICH,
    engine: Any = None,
    length: int = 10,
    modalities: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    seed: int = 0,
    **more: Any,
) -> TrainingResult:
    inputs, labels = data(manifest, length)
    return train(
        engine or NumpyEngine(),
        manifest,
        draw_vectors(manifest),
        ArrayData(inputs, labels).only(modalities or tuple(inputs), tasks or tuple(labels)),
        hyperparameters,
        np.random.default_rng(seed),
        **more,
    )


def assert_same(one: TrainingResult, other: TrainingResult) -> None:
    assert one.parameters.keys() == other.parameters.keys()
    for name, vector in one.parameters.items():
        np.testing.assert_array_equal(vector, other.parameters[name])


def stopping_after(num_batches: int) -> Callable[[], bool]:
    """A policy that says yes so many times."""
    answers = iter([True] * num_batches)
    return lambda: next(answers, False)
