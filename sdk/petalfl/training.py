"""Local training: a device's blocks, chained by vector-Jacobian products.

The forward pass runs encoders, fusion and heads; the backward pass hands each block the gradient
of its outputs. One chained step equals one PyTorch step on the whole model (tests/export/test_law).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl.engine import Arrays, Engine
from petalfl.errors import DataError
from petalfl.model import Block, ModelManifest, differentiated
from petalfl.optimizers import ClientOptimizer, OptimizerState, Scalars, adamw, sgd
from petalfl.schema import Limit
from petalfl.vectors import Vector

Parameters = Mapping[str, Vector]  # by block
Masks = Mapping[str, Mapping[str, NDArray[np.float32]]]  # by block, by mask input


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """How a device trains in one round; the server sends them with every task.

    Attributes:
        momentum: Of sgd, as ``nesterov``; adamw has ``beta1``, ``beta2`` and ``epsilon``.
        max_grad_norm: The gradient of all the device's blocks together is scaled down to this
            Euclidean norm; 0 leaves it as it is.
        accumulation: A batch is computed in so many parts, one after another, to save memory.
        proximal_mu: FedProx's μ: pulls shared blocks towards the start of the round by
            μ · (parameters − start); Li et al. 2020, arXiv:1812.06127.
        max_steps: The round ends after so many batches, if ``epochs`` have as many; 0: no limit.
        method: ``fedsim`` trains private and shared blocks together; ``fedalt`` first the private
            ones with the shared ones as they are, then the other way round, each for ``epochs``
            and ``max_steps``; Pillutla et al. 2022, arXiv:2204.03809.
    """

    learning_rate: Annotated[float, Limit(0.0, 1e3)]
    momentum: Annotated[float, Limit(0.0, 0.9999)] = 0.9
    weight_decay: Annotated[float, Limit(0.0, 1.0)] = 1e-5
    batch_size: Annotated[int, Limit(1, 1 << 16)] = 16
    epochs: Annotated[int, Limit(1, 1000)] = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    nesterov: bool = False
    beta1: Annotated[float, Limit(0.0, 0.9999)] = 0.9
    beta2: Annotated[float, Limit(0.0, 0.99999)] = 0.999
    epsilon: Annotated[float, Limit(1e-16, 1.0)] = 1e-8
    max_grad_norm: Annotated[float, Limit(0.0, 1e6)] = 0.0
    accumulation: Annotated[int, Limit(1, 1 << 16)] = 1
    proximal_mu: Annotated[float, Limit(0.0, 1e3)] = 0.0
    max_steps: Annotated[int, Limit(0, 1_000_000)] = 0
    method: Literal["fedsim", "fedalt"] = "fedsim"


class TrainingResult(NamedTuple):
    """What one round of local training leaves.

    Attributes:
        parameters: New vectors of every block held.
        num_examples: The device's weight in the mean: the examples of the local data set; where
            training was stopped, those of them that it has seen, each counted once, in ``fedalt``
            by the shared blocks. 0: there is nothing to send.
        losses: Of each step, in order.
        is_complete: Whether training went on to its end.
    """

    parameters: dict[str, Vector]
    num_examples: int
    losses: tuple[float, ...]
    is_complete: bool = True

    @property
    def num_steps(self) -> int:
        """Batches trained on."""
        return len(self.losses)

    @property
    def loss(self) -> float:
        """Mean over the round's steps.

        Raises:
            ValueError: There was none: training was stopped before.
        """
        if not self.losses:
            raise ValueError("training was stopped before its first batch: there is no loss")
        return float(np.mean(self.losses))


class Step(NamedTuple):
    """One chained step on one batch.

    Attributes:
        loss: The tasks' losses, weighted and added.
        losses: By task, each the mean over the batch, without its weight.
        gradients: Of ``loss``, by block that trains: ``(block.num_trainable,)``.
        statistics: By block that has some: the running statistics after the step.
    """

    loss: float
    losses: dict[str, float]
    gradients: dict[str, Vector]
    statistics: dict[str, Vector]


def train(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    inputs: Arrays,
    labels: Arrays,
    hyperparameters: Hyperparameters,
    rng: np.random.Generator,
    *,
    shared: Collection[str] = (),
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    should_train: Callable[[], bool] = lambda: True,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Trains the blocks of the modalities in ``inputs`` and the tasks in ``labels``.

    It is stopped, within a batch, by ``should_train`` or ``max_seconds``, and then returns what
    has been trained until there.

    Args:
        parameters: Start values; not changed.
        inputs: By modality, as `petalfl.data.check_inputs` returns them.
        labels: By task, as `petalfl.data.check_labels` returns them.
        rng: Orders the examples and draws the dropout masks: same generator, same result.
        shared: The blocks that others train as well: ``proximal_mu`` acts on them, and
            ``fedalt`` trains them after the others.
        on_batch: Told the batches done and their total, of all phases.
        should_train: Asked before every batch; False stops.
        max_seconds: By ``clock``, from the call on: no batch begins later; None: no limit.
        clock: Monotonic, in seconds.

    Raises:
        DataError: Too few examples, nothing to train, or the loss is no longer finite.
        ValueError: ``max_seconds`` is below 0 or NaN.
    """
    if max_seconds is not None and not max_seconds >= 0:
        raise ValueError(f"expected max_seconds of at least 0, found {max_seconds}")
    start_s = clock()
    held = manifest.blocks_for(inputs, labels)
    if not differentiated(held):
        raise DataError(f"with {', '.join(inputs)} there is nothing to train: all is frozen")
    num_examples = len(next(iter(inputs.values())))
    steps = [
        (trained, batch)
        for trained in _phases(held, shared, hyperparameters.method)
        for batch in _batches(num_examples, held, hyperparameters, rng)
    ]
    optimizer = _optimizer(engine, manifest, hyperparameters)
    current = {block.name: parameters[block.name] for block in held}
    states = {b.name: optimizer.init(current[b.name][: b.num_trainable]) for b in held}
    losses: list[float] = []
    for done, (trained, batch) in enumerate(steps):
        if not should_train() or (max_seconds is not None and clock() - start_s >= max_seconds):
            break
        masks = draw_masks(held, len(batch), rng, axis_lengths(inputs))
        num_parts = min(hyperparameters.accumulation, len(batch) // _min_batch(held))
        step = _step_in_parts(
            engine, manifest, current, _take(inputs, batch), _take(labels, batch), masks,
            trained, num_parts,
        )  # fmt: skip
        if not np.isfinite(step.loss):
            raise _diverged(f" at batch {done + 1}: the loss is {step.loss}", hyperparameters)
        _descend(current, states, optimizer, step.gradients, hyperparameters, shared)
        _replace_statistics(current, step.statistics)
        losses.append(step.loss)
        on_batch(done + 1, len(steps))
    if not all(np.isfinite(vector).all() for vector in current.values()):
        raise _diverged(": a parameter is NaN or infinite", hyperparameters)
    is_complete = len(losses) == len(steps)
    if not is_complete:
        num_examples = _num_seen(steps[: len(losses)], steps[-1][0])
    return TrainingResult(current, num_examples, tuple(losses), is_complete)


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
        labels: By task; a head without labels is not run.
        masks: Of `draw_masks`.
        trained: Blocks that a gradient and new statistics are wanted of; None: of all.
    """
    held = manifest.blocks_for(inputs, labels)
    if trained is None:
        trained = {block.name for block in held}
    reached = _reached(held, trained)
    values, feeds, statistics = _run_forward(engine, manifest, held, parameters, inputs, masks)
    tasks = {head.name: task for task, head in manifest.heads.items()}
    upstream: dict[str, NDArray[np.float32]] = {}  # the gradient by tensor name
    losses, gradients, total = {}, {}, 0.0
    for block in reversed(held):
        feed = feeds.pop(block.name)  # what it saved is let go of when its turn is over
        if block.name not in reached:
            continue
        if block.name in tasks:
            feed["labels"] = labels[tasks[block.name]]
        else:
            feed |= _upstream_of(block, upstream, values)
        back = engine.backward(block, parameters[block.name], feed)
        weight = block.task.weight if block.task else 1.0
        if back.loss is not None:
            losses[tasks[block.name]] = back.loss
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
    """What the heads put out for the modalities in ``inputs``, by task; in inference."""
    held = manifest.blocks_for(inputs, tasks)
    values = dict(inputs)
    for block in held:
        feed = _feed(manifest, block, values, {})
        values.update(engine.evaluate(block, parameters[block.name], feed))
    return {
        task: values[head.outputs[0].name] for task, head in manifest.heads.items() if head in held
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


def _step_in_parts(
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
        part_masks = {block: _take(by_name, part) for block, by_name in masks.items()}
        step = step_gradients(
            engine, manifest, current, _take(inputs, part), _take(labels, part), part_masks, trained
        )
        statistics |= step.statistics
        _replace_statistics(current, step.statistics)
        share = len(part) / num_examples
        total += share * step.loss
        for task, loss in step.losses.items():
            losses[task] = losses.get(task, 0.0) + share * loss
        for name, gradient in step.gradients.items():
            _add(gradients, name, _times(share, gradient))
    return Step(total, losses, gradients, statistics)


def _phases(held: tuple[Block, ...], shared: Collection[str], method: str) -> list[frozenset[str]]:
    """The blocks that train together, phase by phase; no block is in two."""
    parts = [held]
    if method == "fedalt":
        private = tuple(block for block in held if block.name not in shared)
        parts = [private, tuple(block for block in held if block.name in shared)]
    return [
        frozenset(block.name for block in part)
        for part in parts
        if any(block.num_trainable for block in part)
    ]


def _num_seen(
    steps: Sequence[tuple[frozenset[str], NDArray[np.int64]]], phase: frozenset[str]
) -> int:
    """The examples that the blocks of a phase were trained on, each counted once."""
    return len({i for trained, batch in steps if trained == phase for i in batch.tolist()})


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


def _optimizer(
    engine: Engine, manifest: ModelManifest, hyperparameters: Hyperparameters
) -> ClientOptimizer:
    h, graph = hyperparameters, manifest.optimizers[hyperparameters.optimizer]
    if h.optimizer == "sgd":
        return sgd(
            engine,
            graph,
            momentum=h.momentum,
            nesterov=h.nesterov,
            weight_decay=h.weight_decay,
        )
    return adamw(
        engine,
        graph,
        beta1=h.beta1,
        beta2=h.beta2,
        epsilon=h.epsilon,
        weight_decay=h.weight_decay,
    )


def _descend(
    current: dict[str, Vector],
    states: dict[str, OptimizerState],
    optimizer: ClientOptimizer,
    gradients: Mapping[str, Vector],
    hyperparameters: Hyperparameters,
    shared: Collection[str],
) -> None:
    """One optimizer step of every block with a gradient; replaces its vector and its state."""
    scale = _clipping_scale(gradients, hyperparameters.max_grad_norm)
    for name, gradient in gradients.items():
        mu = hyperparameters.proximal_mu if name in shared else 0.0
        scalars = Scalars(hyperparameters.learning_rate, scale, mu)
        vector, end = current[name], gradient.size
        moved, states[name] = optimizer.update(vector[:end], gradient, states[name], scalars)
        current[name] = _joined(moved, vector[end:])


def _diverged(what: str, hyperparameters: Hyperparameters) -> DataError:
    advice = f"lower the learning rate (now {hyperparameters.learning_rate:g})"
    return DataError(f"training diverged{what}; {advice}")


def _clipping_scale(gradients: Mapping[str, Vector], max_norm: float) -> float:
    """As `torch.nn.utils.clip_grad_norm_` on the device's whole model."""
    if not max_norm:
        return 1.0
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values()))
    return float(min(1.0, max_norm / (norm + 1e-6)))


def _replace_statistics(current: dict[str, Vector], statistics: Mapping[str, Vector]) -> None:
    for name, tail in statistics.items():
        current[name] = _joined(current[name][: current[name].size - tail.size], tail)


def _joined(parameters: Vector, statistics: Vector) -> Vector:
    return np.concatenate([parameters, statistics]) if statistics.size else parameters


def _add(sums: dict[str, NDArray[np.float32]], name: str, summand: NDArray[np.float32]) -> None:
    sums[name] = sums[name] + summand if name in sums else summand


def _batches(
    num_examples: int,
    held: tuple[Block, ...],
    hyperparameters: Hyperparameters,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Indices of every epoch's batches, but for those too short to train on.

    All epochs are drawn, also behind ``max_steps``: it changes no mask that is drawn later.
    """
    batches: list[NDArray[np.int64]] = []
    shortest = _min_batch(held)
    for _ in range(hyperparameters.epochs):
        order = rng.permutation(num_examples)
        splits = range(hyperparameters.batch_size, num_examples, hyperparameters.batch_size)
        batches.extend(batch for batch in np.split(order, splits) if len(batch) >= shortest)
        if hyperparameters.max_steps:
            del batches[hyperparameters.max_steps :]
    if not batches:
        needs = next(block.name for block in held if block.min_batch == shortest)
        raise DataError(
            f"block {needs} trains on batches of at least {shortest}, found "
            f"{num_examples} examples in batches of {hyperparameters.batch_size}"
        )
    return batches


def _min_batch(held: tuple[Block, ...]) -> int:
    return max(block.min_batch for block in held)


def _take(arrays: Arrays, indices: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return {name: array[indices] for name, array in arrays.items()}


def _times(factor: float, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    return vector if factor == 1 else vector * np.float32(factor)
