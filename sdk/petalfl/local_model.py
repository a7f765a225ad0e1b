"""The model as one device has it: its own blocks, and one consistent set of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl.data import check_inputs, check_labels
from petalfl.engine import Engine, OrtTrainingEngine
from petalfl.errors import DataError
from petalfl.metrics import accuracy, macro_f1
from petalfl.model import Block, ModelManifest
from petalfl.training import predict_logits
from petalfl.vectors import Vector


@dataclass(frozen=True, slots=True)
class LocalModel:
    """Frozen, so that a prediction never sees half of an update.

    Attributes:
        held: The blocks of the device's modalities, in topological order.
        parameters: Of each block held.
    """

    manifest: ModelManifest
    engine: Engine
    held: tuple[Block, ...]
    parameters: Mapping[str, Vector]

    @classmethod
    def open(
        cls, manifest: ModelManifest, artifacts: Path, held: tuple[Block, ...], num_threads: int
    ) -> LocalModel:
        """Starts without parameters, on artifacts that lie in a folder."""
        return cls(manifest, OrtTrainingEngine(artifacts, num_threads), held, {})

    def with_parameters(self, parameters: Mapping[str, Vector]) -> LocalModel:
        """The same model with some blocks' parameters replaced."""
        return replace(self, parameters={**self.parameters, **parameters})

    def predict_proba(self, inputs: Mapping[str, ArrayLike]) -> NDArray[np.float32]:
        """Class probabilities ``(n, num_classes)``.

        Args:
            inputs: Any of the device's modalities: ``(n, *shape)``, or ``(*shape)`` for one
                example.

        Raises:
            DataError: The inputs do not fit, or are of a modality that the device lacks.
        """
        arrays = check_inputs(self.manifest, self._batched(inputs))
        lacking = {b.name for b in self.manifest.blocks_for(arrays)} - self.parameters.keys()
        if lacking:
            raise DataError(f"this device has no parameters of {', '.join(sorted(lacking))} yet")
        logits = predict_logits(self.engine, self.manifest, self.parameters, arrays)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities

    def evaluate(self, inputs: Mapping[str, ArrayLike], labels: ArrayLike) -> dict[str, float]:
        """Accuracy and macro-F1, both in [0, 1], and the number of examples."""
        predictions = self.predict_proba(inputs).argmax(axis=1)
        truth = check_labels(self.manifest, labels, len(predictions))
        return {
            "accuracy": accuracy(truth, predictions),
            "macro_f1": macro_f1(truth, predictions),
            "num_examples": len(truth),
        }

    def _batched(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float32]]:
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        modalities = self.manifest.modalities
        if all(n in modalities and a.shape == modalities[n].shape for n, a in arrays.items()):
            return {name: array[np.newaxis] for name, array in arrays.items()}
        return arrays
