"""Local training: a device's blocks, chained by vector-Jacobian products.

The forward pass runs encoders, fusion and head; the backward pass hands each block the gradient
of its output. One chained step equals one PyTorch step on the whole model (tests/export/test_law).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl.engine import Arrays, Engine
from petalfl.errors import DataError
from petalfl.model import Block, ModelManifest
from petalfl.optimizers import sgd
from petalfl.schema import Limit
from petalfl.vectors import Vector

Parameters = Mapping[str, Vector]  # by block
Masks = Mapping[str, Mapping[str, NDArray[np.float32]]]  # by block, by mask input


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """How a device trains in one round; the server sends them with every task."""

    learning_rate: Annotated[float, Limit(0.0, 1e3)]
    momentum: Annotated[float, Limit(0.0, 0.9999)] = 0.9
    weight_decay: Annotated[float, Limit(0.0, 1.0)] = 1e-5
    batch_size: Annotated[int, Limit(1, 1 << 16)] = 16
    epochs: Annotated[int, Limit(1, 1000)] = 1


class TrainingResult(NamedTuple):
    """What one round of local training leaves.

    Attributes:
        parameters: New vectors of every block held.
        num_examples: Examples of the local data set: the device's weight in the mean.
        loss: Mean over the round's batches.
    """

    parameters: dict[str, Vector]
    num_examples: int
    loss: float


def train(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    inputs: Arrays,
    labels: NDArray[np.int64],
    hyperparameters: Hyperparameters,
    rng: np.random.Generator,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> TrainingResult:
    """Trains the blocks of the modalities in ``inputs`` for some epochs.

    Args:
        parameters: Start values; not changed.
        inputs: By modality: float32 ``(n, *shape)``.
        labels: int64 ``(n,)`` in ``[0, num_classes)``.
        rng: Orders the examples and draws the dropout masks: same generator, same result.
        on_batch: Told the batches done and their total.

    Raises:
        DataError: The loss is no longer finite.
    """
    held = manifest.blocks_for(inputs)
    optimizer = sgd(hyperparameters.momentum, hyperparameters.weight_decay)
    current = {block.name: parameters[block.name] for block in held}
    states = {name: optimizer.init(vector) for name, vector in current.items()}
    batches = list(_batches(len(labels), hyperparameters, rng))
    losses = []
    for done, batch in enumerate(batches):
        masks = draw_masks(held, len(batch), rng)
        batch_inputs = {name: array[batch] for name, array in inputs.items()}
        loss, gradients = step_gradients(
            engine, manifest, current, batch_inputs, labels[batch], masks
        )
        if not np.isfinite(loss):
            raise DataError(
                f"training diverged at batch {done + 1}: the loss is {loss}; "
                f"lower the learning rate (now {hyperparameters.learning_rate:g})"
            )
        for name, gradient in gradients.items():
            current[name], states[name] = optimizer.update(
                current[name], gradient, states[name], hyperparameters.learning_rate
            )
        losses.append(loss)
        on_batch(done + 1, len(batches))
    if not all(np.isfinite(vector).all() for vector in current.values()):
        raise DataError(
            "training diverged: a parameter is NaN or infinite; "
            f"lower the learning rate (now {hyperparameters.learning_rate:g})"
        )
    return TrainingResult(current, len(labels), float(np.mean(losses)))


def step_gradients(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    inputs: Arrays,
    labels: NDArray[np.int64],
    masks: Masks,
) -> tuple[float, dict[str, Vector]]:
    """The mean loss of one batch, and its gradient by every block held."""
    held = manifest.blocks_for(inputs)
    fed = _run_forward(engine, manifest, parameters, inputs, masks, held[:-1])
    head = held[-1]
    result = engine.backward(head, parameters[head.name], fed[head.name] | {"labels": labels})
    gradients = {head.name: result.parameters}
    upstream = dict(result.inputs)
    for block in reversed(held[:-1]):
        g = upstream[block.name]
        back = engine.backward(block, parameters[block.name], fed[block.name] | {"g": g})
        gradients[block.name] = back.parameters
        upstream.update(back.inputs)
    assert result.loss is not None  # a head always has one
    return result.loss, gradients


def predict_logits(
    engine: Engine, manifest: ModelManifest, parameters: Parameters, inputs: Arrays
) -> NDArray[np.float32]:
    """Logits ``(n, num_classes)`` for the modalities in ``inputs``, dropout off."""
    held = manifest.blocks_for(inputs)
    fed = _run_forward(engine, manifest, parameters, inputs, {}, held[:-1])
    head = held[-1]
    return engine.forward(head, parameters[head.name], fed[head.name])


def draw_masks(
    blocks: tuple[Block, ...], batch_size: int, rng: np.random.Generator
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """One dropout mask per layer and block: 0 with the layer's rate, else 1 / (1 - rate)."""
    masks: dict[str, dict[str, NDArray[np.float32]]] = {}
    for block in blocks:
        masks[block.name] = {}
        for d in block.dropouts:
            is_kept = rng.random((batch_size, *d.shape), dtype=np.float32) >= d.rate
            masks[block.name][d.name] = is_kept * np.float32(1 / (1 - d.rate))
    return masks


def _run_forward(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    inputs: Arrays,
    masks: Masks,
    blocks: tuple[Block, ...],
) -> dict[str, dict[str, NDArray[Any]]]:
    """Runs ``blocks`` and returns what every block, and the head after them, is fed."""
    values = dict(inputs)
    fed = {}
    for block in blocks:
        fed[block.name] = _feed(manifest, block, values, masks)
        values[block.name] = engine.forward(block, parameters[block.name], fed[block.name])
    head = manifest.blocks[-1]
    fed[head.name] = _feed(manifest, head, values, masks)
    return fed


def _feed(
    manifest: ModelManifest, block: Block, values: Arrays, masks: Masks
) -> dict[str, NDArray[Any]]:
    length = len(next(iter(values.values())))
    feed = {
        name: values[name]
        if name in values
        else np.zeros((length, *manifest.block(name).output_shape), np.float32)
        for name in block.inputs
    }
    if block.kind == "fusion":
        row = np.array([name in values for name in block.inputs], np.float32)
        feed["present"] = np.tile(row, (length, 1))  # (b, M)
    return feed | dict(masks.get(block.name, {}))


def _batches(
    num_examples: int, hyperparameters: Hyperparameters, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    batches: list[NDArray[np.int64]] = []
    for _ in range(hyperparameters.epochs):
        order = rng.permutation(num_examples)
        splits = range(hyperparameters.batch_size, num_examples, hyperparameters.batch_size)
        batches.extend(np.split(order, splits))
    return batches
