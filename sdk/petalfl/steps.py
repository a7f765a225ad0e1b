"""One chained step: a device's blocks, run forward and backward on one batch.

The forward pass runs encoders, fusion and heads; the backward pass hands each block the gradient
of its outputs. One chained step equals one PyTorch step on the whole model (tests/export/test_law).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl.engine import Arrays, Engine
from petalfl.model import Block, ModelManifest, differentiated
from petalfl.vectors import Vector

Parameters = Mapping[str, Vector]  # by block
Masks = Mapping[str, Mapping[str, NDArray[np.float32]]]  # by block, by mask input


class Step(NamedTuple):
    """One chained step on one batch.

    Attributes:
        loss: The tasks' losses, weighted and added.
        losses: By task, or as in `predict_outputs`; each the mean over the batch, unweighted.
        gradients: Of ``loss``, by block that trains: ``(block.num_trainable,)``.
        statistics: By block that has some: the running statistics after the step.
    """

    loss: float
    losses: dict[str, float]
    gradients: dict[str, Vector]
    statistics: dict[str, Vector]


def step_gradients(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    inputs: Arrays,
    labels: Arrays,
    masks: Masks,
    trained: Collection[str] | None = None,
) -> Step:
    """The loss of one batch, and its gradient by every block held that trains.

    Args:
        inputs: By modality.
        labels: By task; a head without labels is not run, and a personal one has its task's.
        masks: Of `draw_masks`.
        trained: Blocks that a gradient and new statistics are wanted of; None: of all.
    """
    held = manifest.blocks_for(inputs, labels)
    if trained is None:
        trained = {block.name for block in held}
    reached = _reached(held, trained)
    values, feeds, statistics = _run_forward(engine, manifest, held, parameters, inputs, masks)
    upstream: dict[str, NDArray[np.float32]] = {}  # the gradient by tensor name
    losses, gradients, total = {}, {}, 0.0
    for block in reversed(held):
        feed = feeds.pop(block.name)  # what it saved is let go of when its turn is over
        if block.name not in reached:
            continue
        if block.kind == "head":
            feed["labels"] = labels[block.label_task]
        else:
            feed |= _upstream_of(block, upstream, values)
        back = engine.backward(block, parameters[block.name], feed)
        weight = block.task.weight if block.task else 1.0
        if back.loss is not None:
            losses[block.name.removeprefix("head-")] = back.loss
            total += weight * back.loss
        if back.parameters is not None and block.name in trained:
            gradients[block.name] = _times(weight, back.parameters)
        if back.statistics is not None:
            statistics[block.name] = back.statistics
        for name, gradient in back.inputs.items():
            _add(upstream, name, _times(weight, gradient))
    kept = {name: tail for name, tail in statistics.items() if name in trained}
    return Step(total, losses, gradients, kept)


def predict_outputs(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    inputs: Arrays,
    tasks: Collection[str] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """What the heads put out for the modalities in ``inputs``, in inference.

    By task; of a personal head, by what follows ``head-`` in its name.
    """
    held = manifest.blocks_for(inputs, tasks)
    values = dict(inputs)
    for block in held:
        feed = _feed(manifest, block, values, {})
        values.update(engine.evaluate(block, parameters[block.name], feed))
    return {
        head.name.removeprefix("head-"): values[head.outputs[0].name]
        for head in held
        if head.kind == "head"
    }


def draw_masks(
    blocks: tuple[Block, ...],
    batch_size: int,
    rng: np.random.Generator,
    lengths: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """One dropout mask per layer and block: 0 with the layer's rate, else 1 / (1 - rate).

    Args:
        lengths: Of the inputs' axes, for masks of varying shape; see `axis_lengths`.
    """
    masks: dict[str, dict[str, NDArray[np.float32]]] = {}
    for block in blocks:
        masks[block.name] = {}
        for d in block.dropouts:
            shape = (batch_size, *d.sizes(lengths))
            is_kept = rng.random(shape, dtype=np.float32) >= d.rate
            masks[block.name][d.name] = is_kept * np.float32(1 / (1 - d.rate))
    return masks


def axis_lengths(inputs: Arrays) -> dict[str, int]:
    """By ``MODALITY.AXIS``: the length of every axis of the inputs but the batch."""
    return {
        f"{name}.{axis}": length
        for name, array in inputs.items()
        for axis, length in enumerate(array.shape)
        if axis
    }


def step_in_parts(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    inputs: Arrays,
    labels: Arrays,
    masks: Masks,
    trained: Collection[str],
    num_parts: int,
) -> Step:
    """A step on a batch in ``num_parts``: weighted by length, their mean is the whole batch's."""
    if num_parts == 1:
        return step_gradients(engine, manifest, parameters, inputs, labels, masks, trained)
    current = dict(parameters)
    num_examples = len(next(iter(inputs.values())))
    losses: dict[str, float] = {}
    gradients: dict[str, Vector] = {}
    statistics: dict[str, Vector] = {}
    total = 0.0
    for part in np.array_split(np.arange(num_examples), num_parts):
        part_masks = {block: take(by_name, part) for block, by_name in masks.items()}
        step = step_gradients(
            engine, manifest, current, take(inputs, part), take(labels, part), part_masks, trained
        )
        statistics |= step.statistics
        replace_statistics(current, step.statistics)
        share = len(part) / num_examples
        total += share * step.loss
        for task, loss in step.losses.items():
            losses[task] = losses.get(task, 0.0) + share * loss
        for name, gradient in step.gradients.items():
            _add(gradients, name, _times(share, gradient))
    return Step(total, losses, gradients, statistics)


def _reached(held: tuple[Block, ...], trained: Collection[str]) -> frozenset[str]:
    """Those whose backward pass is run: what training reaches, and every head for its loss."""
    reached = differentiated(held)
    frozen = (b if b.name in trained else replace(b, num_trainable=0) for b in held)
    return differentiated(frozen) | {b.name for b in held if b.task and b.name in reached}


def _run_forward(
    engine: Engine,
    manifest: ModelManifest,
    held: tuple[Block, ...],
    parameters: Parameters,
    inputs: Arrays,
    masks: Masks,
) -> tuple[dict[str, NDArray[Any]], dict[str, dict[str, NDArray[Any]]], dict[str, Vector]]:
    """Runs all but the heads.

    Returns:
        Every tensor by its name; by block, what its backward pass is fed; new statistics.
    """
    values = dict(inputs)
    feeds: dict[str, dict[str, NDArray[Any]]] = {}
    statistics: dict[str, Vector] = {}
    for block in held:
        feeds[block.name] = _feed(manifest, block, values, masks)
        if block.kind == "head":
            continue
        result = engine.forward(block, parameters[block.name], feeds[block.name])
        values |= result.outputs
        feeds[block.name] |= result.saved
        if result.statistics is not None:
            statistics[block.name] = result.statistics
    return values, feeds, statistics


def _feed(
    manifest: ModelManifest, block: Block, values: Arrays, masks: Masks
) -> dict[str, NDArray[Any]]:
    """What a block is fed; zeros stand in for blocks that the device lacks."""
    length = len(next(iter(values.values())))
    feed: dict[str, NDArray[Any]] = {}
    is_present = []
    for name in block.inputs:
        if name in manifest.modalities:
            feed[name] = values[name]
            continue
        outputs = manifest.block(name).outputs
        is_present.append(outputs[0].name in values)
        for tensor in outputs:
            shape = (length, *(dim or 1 for dim in tensor.shape))
            feed[tensor.name] = (
                values[tensor.name] if is_present[-1] else np.zeros(shape, np.float32)
            )
    if block.is_joint and manifest.missing == "mask":
        feed["present"] = np.tile(np.array(is_present, np.float32), (length, 1))  # (b, M)
    return feed | dict(masks.get(block.name, {}))


def _upstream_of(
    block: Block, upstream: Mapping[str, NDArray[np.float32]], values: Arrays
) -> dict[str, NDArray[np.float32]]:
    """The gradient by each output; zeros by one that no loss depends on."""
    return {
        f"d_{tensor.name}": upstream[tensor.name]
        if tensor.name in upstream
        else np.zeros_like(values[tensor.name])
        for tensor in block.outputs
    }


def replace_statistics(current: dict[str, Vector], statistics: Mapping[str, Vector]) -> None:
    """Puts the running statistics after a step in place of those before."""
    for name, tail in statistics.items():
        current[name] = joined(current[name][: current[name].size - tail.size], tail)


def joined(parameters: Vector, statistics: Vector) -> Vector:
    """A block's whole vector."""
    return np.concatenate([parameters, statistics]) if statistics.size else parameters


def _add(sums: dict[str, NDArray[np.float32]], name: str, summand: NDArray[np.float32]) -> None:
    sums[name] = sums[name] + summand if name in sums else summand


def take(arrays: Arrays, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Those rows of every array."""
    return {name: array[indices] for name, array in arrays.items()}


def _times(factor: float, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector if factor == 1 else vector * np.float32(factor)
