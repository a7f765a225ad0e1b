"""Local training: what a device does with its blocks and its data in one round."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.control_variates import Corrections
from petalfl.engine import Engine, memory_bytes
from petalfl.errors import DataError, ModelError
from petalfl.local_data import ExampleError, LocalData
from petalfl.model import Block, ModelManifest, differentiated
from petalfl.optimizers import ClientOptimizer, OptimizerState, Scalars, adamw, sgd
from petalfl.schema import Limit
from petalfl.steps import (
    Parameters,
    axis_lengths,
    draw_masks,
    joined,
    replace_statistics,
    step_in_parts,
)
from petalfl.vectors import Vector

MAX_EPOCHS = 1000


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
    epochs: Annotated[int, Limit(1, MAX_EPOCHS)] = 1
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
        mean_gradients: By block with a correction: of its steps, ``(block.num_trainable,)``.
    """

    parameters: dict[str, Vector]
    num_examples: int
    losses: tuple[float, ...]
    is_complete: bool = True
    mean_gradients: Mapping[str, Vector] = MappingProxyType({})

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


def train(
    engine: Engine,
    manifest: ModelManifest,
    parameters: Parameters,
    data: LocalData,
    hyperparameters: Hyperparameters,
    rng: np.random.Generator,
    *,
    shared: Collection[str] = (),
    corrections: Mapping[str, Vector] = MappingProxyType({}),
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    should_train: Callable[[], bool] = lambda: True,
    max_seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainingResult:
    """Trains the blocks of the data's modalities and tasks.

    It is stopped, within a batch, by ``should_train`` or ``max_seconds``, and then returns what
    has been trained until there.

    Args:
        parameters: Start values; not changed.
        data: Of which every batch takes its examples when its turn has come.
        rng: Orders the examples and draws the dropout masks: same generator, same result.
        shared: The blocks that others train as well: ``proximal_mu`` acts on them, and
            ``fedalt`` trains them after the others.
        corrections: By block: added to every gradient after clipping, as SCAFFOLD does; see
            `petalfl.control_variates`.
        on_batch: Told the batches done and their total, of all phases.
        should_train: Asked before every batch; False stops.
        max_seconds: By ``clock``, from the call on: no batch begins later; None: no limit.
        clock: Monotonic, in seconds.

    Raises:
        DataError: Too few examples, nothing to train, an example that is not as it should be, or
            the loss is no longer finite.
        ValueError: ``max_seconds`` is below 0 or NaN.
    """
    if max_seconds is not None and not max_seconds >= 0:
        raise ValueError(f"expected max_seconds of at least 0, found {max_seconds}")
    start_s = clock()
    held = manifest.blocks_for(data.modalities, data.tasks)
    if not differentiated(held):
        raise DataError(
            f"with {', '.join(data.modalities)} there is nothing to train: all is frozen"
        )
    num_examples = len(data)
    phases = [
        (trained, _Batches(num_examples, held, hyperparameters, rng))
        for trained in _phases(held, shared, hyperparameters.method)
    ]
    num_steps = sum(len(batches) for _, batches in phases)
    _check_memory(manifest, min(num_examples, hyperparameters.batch_size), hyperparameters)
    optimizer = _optimizer(engine, manifest, hyperparameters)
    current = {block.name: parameters[block.name] for block in held}
    states = {b.name: optimizer.init(current[b.name][: b.num_trainable]) for b in held}
    controls = Corrections(corrections)
    losses: list[float] = []
    for done, (trained, batch) in enumerate(_steps(phases)):
        if not should_train() or (max_seconds is not None and clock() - start_s >= max_seconds):
            break
        inputs, labels = data.take(batch)
        masks = draw_masks(held, len(batch), rng, axis_lengths(inputs))
        num_parts = min(hyperparameters.accumulation, len(batch) // min_batch(held))
        step = step_in_parts(engine, manifest, current, inputs, labels, masks, trained, num_parts)
        if not np.isfinite(step.loss):
            raise _diverged(f" at batch {done + 1}: the loss is {step.loss}", hyperparameters)
        _descend(current, states, optimizer, step.gradients, hyperparameters, shared, controls)
        replace_statistics(current, step.statistics)
        losses.append(step.loss)
        on_batch(done + 1, num_steps)
    if not all(np.isfinite(vector).all() for vector in current.values()):
        raise _diverged(": a parameter is NaN or infinite", hyperparameters)
    is_complete = len(losses) == num_steps
    if not is_complete:
        seen = itertools.islice(_steps(phases), len(losses))
        num_examples = _num_seen(seen, phases[-1][0])
    return TrainingResult(
        current, num_examples, tuple(losses), is_complete, controls.mean_gradients
    )


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


def _num_seen(steps: Iterable[_Step], phase: frozenset[str]) -> int:
    """The examples that the blocks of a phase were trained on, each counted once."""
    return len({i for trained, batch in steps if trained == phase for i in batch.tolist()})


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
    controls: Corrections,
) -> None:
    """One optimizer step of every block with a gradient; replaces its vector and its state."""
    clipping = _clipping_scale(gradients, hyperparameters.max_grad_norm)
    for name, gradient in gradients.items():
        scale = clipping
        if name in controls:  # no input of the optimizers' graphs
            scale, gradient = 1.0, controls.apply(name, gradient * np.float32(clipping))
        mu = hyperparameters.proximal_mu if name in shared else 0.0
        scalars = Scalars(hyperparameters.learning_rate, scale, mu)
        vector, end = current[name], gradient.size
        moved, states[name] = optimizer.update(vector[:end], gradient, states[name], scalars)
        current[name] = joined(moved, vector[end:])


def _diverged(what: str, hyperparameters: Hyperparameters) -> DataError:
    advice = f"lower the learning rate (now {hyperparameters.learning_rate:g})"
    return DataError(f"training diverged{what}; {advice}")


def _clipping_scale(gradients: Mapping[str, Vector], max_norm: float) -> float:
    """As `torch.nn.utils.clip_grad_norm_` on the device's whole model."""
    if not max_norm:
        return 1.0
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values()))
    return float(min(1.0, max_norm / (norm + 1e-6)))


class _Batches:
    """Indices of every epoch's batches, but for those too short to train on.

    All epochs are drawn from ``rng`` here, also behind ``max_steps``: it changes no mask that is
    drawn later. They are drawn again, each when its turn has come: at once they might take more
    memory than the device has, of however many epochs and batches the server asks for.

    Raises:
        ExampleError: There is none.
    """

    def __init__(
        self,
        num_examples: int,
        held: tuple[Block, ...],
        hyperparameters: Hyperparameters,
        rng: np.random.Generator,
    ) -> None:
        self._num_examples, self._hyperparameters = num_examples, hyperparameters
        self._shortest = min_batch(held)
        self._rng = copy.deepcopy(rng)
        size, num_epochs = hyperparameters.batch_size, hyperparameters.epochs
        for _ in range(num_epochs):
            rng.permutation(num_examples)
        num_whole, rest = divmod(num_examples, size)
        self._per_epoch = num_whole * (size >= self._shortest) + (rest >= self._shortest)
        if not self._per_epoch:
            needs = next(block.name for block in held if block.min_batch == self._shortest)
            raise ExampleError(
                f"block {needs} trains on batches of at least {self._shortest}, found "
                f"{num_examples} examples in batches of {size}"
            )

    def __len__(self) -> int:
        whole = self._per_epoch * self._hyperparameters.epochs
        return min(whole, self._hyperparameters.max_steps or whole)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return itertools.islice(self._all(), len(self))

    def _all(self) -> Iterator[NDArray[np.int64]]:
        rng, size = copy.deepcopy(self._rng), self._hyperparameters.batch_size
        for _ in range(self._hyperparameters.epochs):
            order = rng.permutation(self._num_examples)
            for start in range(0, self._num_examples, size):
                if len(batch := order[start : start + size]) >= self._shortest:
                    yield batch


_Step: TypeAlias = tuple[frozenset[str], NDArray[np.int64]]  # the blocks that train, the batch


def _steps(phases: Iterable[tuple[frozenset[str], _Batches]]) -> Iterator[_Step]:
    return ((trained, batch) for trained, batches in phases for batch in batches)


def _check_memory(
    manifest: ModelManifest, batch_size: int, hyperparameters: Hyperparameters
) -> None:
    """Refuses batches whose tensors alone would fill half of the machine's memory."""
    masks = sum(_size(d.shape) for b in manifest.blocks for d in b.dropouts)  # of the whole batch
    outputs = sum(_size(t.shape) for b in manifest.blocks for t in b.outputs)
    part = -(-batch_size // hyperparameters.accumulation)
    num_bytes = 4 * (batch_size * masks + part * outputs)
    if num_bytes > (most := memory_bytes() // 2):
        raise ModelError(
            f"the tensors of a batch of {batch_size} take {num_bytes} bytes, this device has room "
            f"for {most}; lower the batch size, or use a smaller model"
        )


def _size(shape: tuple[int | None, ...]) -> int:
    return math.prod(dim or 1 for dim in shape)


def min_batch(held: Sequence[Block]) -> int:
    """The fewest examples that all of them can train on."""
    return max(block.min_batch for block in held)
