"""The model as one device has it: its own blocks, and one consistent set of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl import metrics
from petalfl.data import Labels, check_inputs, check_labels
from petalfl.engine import Engine, OrtEngine
from petalfl.errors import DataError
from petalfl.model import Block, ModelManifest
from petalfl.runtime import EngineName
from petalfl.steps import predict_outputs
from petalfl.vectors import Vector


@dataclass(frozen=True, slots=True)
class LocalModel:
    """Frozen, so that a prediction never sees half of an update.

    Attributes:
        held: The blocks of the device's modalities and tasks, in topological order.
        parameters: Of each block held.
    """

    manifest: ModelManifest
    engine: Engine
    held: tuple[Block, ...]
    parameters: Mapping[str, Vector]

    @classmethod
    def open(
        cls,
        manifest: ModelManifest,
        artifacts: Path,
        held: tuple[Block, ...],
        num_threads: int,
        engine: EngineName = "auto",
    ) -> LocalModel:
        """Starts without parameters, on artifacts that lie in a folder."""
        return cls(
            manifest, OrtEngine(artifacts, num_threads, name=engine, is_foreign=True), held, {}
        )

    def with_parameters(self, parameters: Mapping[str, Vector]) -> LocalModel:
        """The same model with some blocks' parameters replaced."""
        return replace(self, parameters={**self.parameters, **parameters})

    def predict(self, inputs: Mapping[str, ArrayLike]) -> Any:
        """What each example is: see `predict_proba` for arguments and errors.

        Returns:
            Of cross_entropy, the most likely class int64 ``(n,)``; of bce_with_logits, 1 where
            the probability is at least 0.5, int64; of a regression, its values. By task for a
            model with several heads, else the array.
        """
        return self._by_task({t: _decide(h, y) for t, (h, y) in self._predict(inputs).items()})

    def predict_proba(self, inputs: Mapping[str, ArrayLike]) -> Any:
        """Probabilities, float32.

        Args:
            inputs: Any of the device's modalities: ``(n, *shape)``, or ``(*shape)`` for one
                example.

        Returns:
            Of cross_entropy, of the classes ``(n, num_classes)``; of bce_with_logits, of each
            label; of a regression, its values; with a personal head, the mean of both heads'. By
            task for a model with several, else the array.

        Raises:
            DataError: The inputs do not fit, or are of a modality that the device lacks.
        """
        return self._by_task({task: y for task, (_, y) in self._predict(inputs).items()})

    def evaluate(self, inputs: Mapping[str, ArrayLike], labels: Labels) -> dict[str, Any]:
        """Metrics on labelled examples; arguments as in training, errors as in `predict_proba`.

        Returns:
            Of cross_entropy, ``accuracy`` and ``macro_f1``; of bce_with_logits, ``macro_f1`` at a
            probability of 0.5; of a regression, ``mae`` and ``mse``; and ``num_examples``. By
            task for a model with several heads.
        """
        predictions = self._predict(inputs)
        num_examples = len(next(iter(predictions.values()))[1])
        truths = check_labels(self.manifest, labels, num_examples)
        if lacking := sorted(truths.keys() - predictions.keys()):
            raise DataError(f"this device does not hold the head of task {lacking[0]!r}")
        return dict(
            self._by_task({t: _score(*predictions[t], truth) for t, truth in truths.items()})
        )

    def _predict(
        self, inputs: Mapping[str, ArrayLike]
    ) -> dict[str, tuple[Block, NDArray[np.float32]]]:
        """By task, its head and what `predict_proba` promises."""
        arrays = check_inputs(self.manifest, self._batched(inputs))
        heads = {task: head for task, head in self.manifest.heads.items() if head in self.held}
        needed = {block.name for block in self.manifest.blocks_for(arrays, heads)}
        if lacking := sorted(needed - self.parameters.keys()):
            raise DataError(f"this device has no parameters of {', '.join(lacking)} yet")
        outputs = predict_outputs(self.engine, self.manifest, self.parameters, arrays, heads)
        found = {task: (head, _activate(head, outputs[task])) for task, head in heads.items()}
        for task, personal in self.manifest.personal_heads.items():
            if personal in self.held:
                head, shared = found[task]
                own = _activate(head, outputs[personal.name.removeprefix("head-")])
                found[task] = head, np.float32(0.5) * (shared + own)
        return found

    def _by_task(self, results: dict[str, Any]) -> Any:
        """The mapping, or its one value where the model has one head."""
        return results if len(self.manifest.heads) > 1 else next(iter(results.values()))

    def _batched(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        modalities = self.manifest.modalities
        if all(n in modalities and modalities[n].fits(a.shape) for n, a in arrays.items()):
            return {name: array[np.newaxis] for name, array in arrays.items()}
        return arrays


def _activate(head: Block, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits to probabilities; a regression's outputs are its values."""
    assert head.task is not None
    if head.task.loss == "cross_entropy":
        exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        probabilities: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
        return probabilities
    if head.task.loss == "bce_with_logits":
        sigmoid: NDArray[np.float32] = np.exp(-np.logaddexp(np.float32(0), -outputs))
        return sigmoid
    return outputs


def _decide(head: Block, probabilities: NDArray[np.float32]) -> NDArray[Any]:
    assert head.task is not None
    if head.task.loss == "cross_entropy":
        classes: NDArray[np.int64] = probabilities.argmax(axis=1)
        return classes
    if head.task.loss == "bce_with_logits":
        return (probabilities >= 0.5).astype(np.int64)
    return probabilities


def _score(
    head: Block, probabilities: NDArray[np.float32], labels: NDArray[Any]
) -> dict[str, float]:
    assert head.task is not None
    found = _decide(head, probabilities)
    if head.task.loss == "cross_entropy":
        scores = {
            "accuracy": metrics.accuracy(labels, found),
            "macro_f1": metrics.macro_f1(labels, found),
        }
    elif head.task.loss == "bce_with_logits":
        scores = {"macro_f1": metrics.multilabel_macro_f1(labels >= 0.5, found)}
    else:
        scores = {"mae": metrics.mae(labels, found), "mse": metrics.mse(labels, found)}
    return {**scores, "num_examples": len(labels)}
