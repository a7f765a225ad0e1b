"""The one-step law: a chained step on the artifacts equals PyTorch's on the whole model.

Every export proves it on random batches before the folder moves into place, for all modalities
together and for each alone; `python -m export verify` proves it again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from petalfl.engine import Forward, OrtEngine
from petalfl.errors import ModelError
from petalfl.model import Block, ModelManifest, Parameter, differentiated, read_artifact
from petalfl.steps import Masks, axis_lengths, draw_masks, predict_outputs, step_gradients
from petalfl.vectors import Vector, from_bytes

from .block import flatten
from .model import BlockModel
from .rewrites import Mask, Rewrites, dropouts_only, statistics_of

TOLERANCE = 1e-5  # largest error, relative to the largest entry
OWN_TIMES, OWN_MOST = 4, 1e-3  # see `Error`
COINCIDENCE = 1e-2  # a larger error is no rounding, nor a tie of a ReLU or maximum
NUM_TRIES = 3
LENGTHS = (5, 1, 4)  # of batches: a length that a model has taken from elsewhere does not fit all
MIN_STATISTICS = 8  # examples more for a batch norm: over two or three, float32 has few digits left


class Error(float):
    """A relative error, and the limit it must keep.

    The limit is `TOLERANCE`. Only where PyTorch's own float32 result is about that far from its
    float64 result, or further, an artifact may be off the latter by `OWN_TIMES` as much; but where
    PyTorch is off by more than `OWN_MOST`, nothing can be proved, and the limit stays.
    """

    limit = TOLERANCE

    @property
    def is_kept(self) -> bool:
        """Whether the error is within its limit; NaN never is."""
        return self <= self.limit


Errors = dict[tuple[str, str], Error]  # by block ("" for the loss) and what differs


class Batch(NamedTuple):
    """A random batch of some modalities, with labels and the masks of the blocks it runs.

    Attributes:
        batch_axes: By block: of its dropouts, in order.
    """

    inputs: dict[str, NDArray[Any]]
    labels: dict[str, NDArray[Any]]
    masks: Masks
    batch_axes: Mapping[str, tuple[int, ...]]


def check_one_step(model: BlockModel, folder: Path) -> None:
    """Compares training gradients, statistics and evaluation outputs with PyTorch's.

    A sum that nearly cancels may miss the tolerance by float32 rounding alone, on a rare batch;
    a gradient that is wrong is wrong on all. So what misses it is tried on fresh batches, and
    refused when it misses it on every one of `NUM_TRIES`.

    Raises:
        ModelError: One differs by more than `TOLERANCE`, or the runtime cannot run a block.
    """
    suspects = _misses(model, folder, seed=0)
    for seed in range(1, NUM_TRIES):
        if not max(suspects.values(), default=np.nan) <= COINCIDENCE:
            break  # nothing is wrong, or too much for chance
        again = _misses(model, folder, seed)
        suspects = {key: again[key] for key in suspects if key in again}
    for (block, what), error in suspects.items():
        raise ModelError(
            f"{f'block {block}: its ' if block else ''}{what} differs from PyTorch's by "
            f"{error:.1e} (limit {error.limit:.1g}); one of its layers cannot be exported exactly"
        )


def _misses(model: BlockModel, folder: Path, seed: int) -> Errors:
    return {
        key: error for key, error in worst_errors(model, folder, seed).items() if not error.is_kept
    }


def worst_errors(
    model: BlockModel,
    folder: Path,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Errors:
    """The law's largest relative errors over random batches of all modalities and of each alone.

    An error is relative to the largest entry of what is compared; of a gradient, or to 1e-3 of the
    block's largest one where that is more, or to that one itself where float64 shows that the
    gradient is 0 but for rounding, as that of a bias before a batch norm.

    Args:
        folder: Artifacts of ``model``, with its present parameters.
        progress: Told the batches done and their total.

    Raises:
        ModelError: The runtime cannot run a block, or a forward pass fails in PyTorch.
    """
    manifest = ModelManifest.load(folder)
    engine = _Recorder(folder)
    vectors = {
        b.name: from_bytes(read_artifact(folder, b.artifacts.parameters), b.size)
        for b in manifest.blocks
    }
    subsets = dict.fromkeys([tuple(manifest.modalities), *((m,) for m in manifest.modalities)])
    rng = np.random.default_rng(seed)
    runs = list(itertools.product(subsets, LENGTHS))
    worst: Errors = {}
    for done, (subset, length) in enumerate(runs):
        batch = draw_batch(model, manifest, subset, length, rng)
        for key, error in one_step_errors(model, manifest, engine, vectors, batch).items():
            if key not in worst or not error / error.limit <= worst[key] / worst[key].limit:
                worst[key] = error
        progress(done + 1, len(runs))
    return worst


def draw_batch(
    model: BlockModel,
    manifest: ModelManifest,
    modalities: tuple[str, ...],
    length: int,
    rng: np.random.Generator,
) -> Batch:
    """Normal inputs, or integers within their range; random labels, masks and axis lengths."""
    held = manifest.blocks_for(modalities)
    if any(block.statistics for block in held):
        length += MIN_STATISTICS
    inputs = {}
    for name in modalities:
        shape = [length, *model.examples[name].shape[1:]]
        for axis, (low, high) in model.dynamic_axes.get(name, {}).items():
            shape[axis] = (low, high, int(rng.integers(low, high + 1)))[rng.integers(3)]
        modality = manifest.modalities[name]
        if modality.num_values is None:
            inputs[name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            inputs[name] = rng.integers(0, modality.num_values, shape)  # type: ignore[assignment]
            inputs[name][-1] = 0  # of tokens often the padding
    outputs = _torch_outputs(model, Batch(inputs, {}, {}, {}))
    labels = {
        task: _draw_labels(head, outputs[_evaluated(head)].shape, rng)
        for task, head in manifest.heads.items()
    }
    masks = draw_masks(held, length, rng, axis_lengths(inputs))
    axes = {block.name: tuple(d.batch_axis for d in block.dropouts) for block in held}
    return Batch(inputs, labels, masks, axes)


def _evaluated(head: Block) -> tuple[str, str]:
    return head.name, f"output {head.outputs[0].name} in evaluation"


def _draw_labels(
    head: Block, shape: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.int64] | NDArray[np.float32]:
    assert head.task is not None  # a head has one
    if head.task.loss == "cross_entropy":
        return rng.integers(0, shape[1], shape[0])
    if head.task.loss == "bce_with_logits":
        return rng.integers(0, 2, shape).astype(np.float32)
    return rng.standard_normal(shape, dtype=np.float32)


def one_step_errors(
    model: BlockModel,
    manifest: ModelManifest,
    engine: _Recorder,
    vectors: Mapping[str, Vector],
    batch: Batch,
) -> Errors:
    """The errors of one batch, in topological order of the blocks; see `worst_errors`."""
    errors = _errors(_found_outputs(manifest, engine, vectors, batch), _torch_outputs, model, batch)
    if differentiated(manifest.blocks_for(batch.inputs)):
        found = _found_step(manifest, engine, vectors, batch)
        errors |= _errors(found, _torch_step, model, batch)
    return errors


Results = dict[tuple[str, str], NDArray[Any]]  # keys as of `Errors`


def _errors(
    found: Results, run: Callable[[BlockModel, Batch], Results], model: BlockModel, batch: Batch
) -> Errors:
    expected, precise = run(model, batch), _in_float64(run, model, batch)
    largest: dict[str, float] = {}
    for (block, what), value in expected.items():
        if what.startswith("gradient"):
            largest[block] = max(largest.get(block, 0.0), float(np.abs(value).max(initial=0)))
    errors = {}
    for key, value in expected.items():
        scale = float(np.abs(value).max(initial=0))
        if key[1].startswith("gradient"):
            scale = max(scale, 1e-3 * largest[key[0]])
            if key in precise and np.abs(precise[key]).max(initial=0) <= 1e-6 * largest[key[0]]:
                scale = largest[key[0]]
        errors[key] = _error(found[key], value, precise.get(key), scale)
    return errors


def _error(
    found: NDArray[Any], expected: NDArray[Any], precise: NDArray[Any] | None, scale: float
) -> Error:
    error = Error(_distance(found, expected, scale))
    if error.is_kept or precise is None:
        return error
    own = _distance(expected, precise, scale)
    if TOLERANCE / OWN_TIMES < own <= OWN_MOST:
        error = Error(_distance(found, precise, scale))
        error.limit = OWN_TIMES * own
    return error


def _distance(a: NDArray[Any], b: NDArray[Any], scale: float) -> float:
    if a.size != b.size:
        return np.inf
    error = float(np.abs(a.reshape(-1) - b.reshape(-1)).max(initial=0))
    return error / scale if scale else error


def _found_outputs(
    manifest: ModelManifest, engine: _Recorder, vectors: Mapping[str, Vector], batch: Batch
) -> Results:
    engine.outputs.clear()
    predict_outputs(engine, manifest, vectors, batch.inputs)
    return {
        (block, f"output {name} in evaluation"): output
        for block, outputs in engine.outputs.items()
        for name, output in outputs.items()
    }


def _found_step(
    manifest: ModelManifest, engine: _Recorder, vectors: Mapping[str, Vector], batch: Batch
) -> Results:
    engine.outputs.clear()
    step = step_gradients(engine, manifest, vectors, batch.inputs, batch.labels, batch.masks)
    results: Results = {("", "loss"): np.array(step.loss)}
    for block in manifest.blocks_for(batch.inputs):
        for name, output in engine.outputs.get(block.name, {}).items():
            results[block.name, f"output {name} in training"] = output
        if block.num_trainable:
            gradient = step.gradients[block.name]
            for name, part in _parts(block.parameters, gradient).items():
                results[block.name, f"gradient of {name}"] = part
        for name, part in _parts(block.statistics, step.statistics.get(block.name)).items():
            results[block.name, f"running statistic {name}"] = part
    return results


def _parts(tensors: tuple[Parameter, ...], vector: Vector | None) -> dict[str, NDArray[Any]]:
    if vector is None:
        return {}
    splits = np.split(vector, np.cumsum([t.size for t in tensors])[:-1]) if tensors else []
    return {t.name: part for t, part in zip(tensors, splits, strict=True)}


class _Recorder(OrtEngine):
    """Keeps every block's last outputs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.outputs: dict[str, dict[str, NDArray[np.float32]]] = {}

    def evaluate(self, block: Block, vector: Vector, inputs: Any) -> dict[str, NDArray[np.float32]]:
        self.outputs[block.name] = super().evaluate(block, vector, inputs)
        return self.outputs[block.name]

    def forward(self, block: Block, vector: Vector, inputs: Any) -> Forward:
        result = super().forward(block, vector, inputs)
        self.outputs[block.name] = result.outputs
        return result


def _torch_step(model: BlockModel, batch: Batch) -> Results:
    """PyTorch's own, on a copy, with the batch's dropout masks."""
    model = copy.deepcopy(model).train()
    model.zero_grad()
    outputs = _recorded_outputs(model)
    for spec in model.blocks():
        masks = batch.masks.get(spec.name, {})
        axes = batch.batch_axes.get(spec.name, ())
        _force_dropout(spec.module, [
            Mask(torch.from_numpy(masks[f"mask.{i}"]), axis) for i, axis in enumerate(axes)
        ])  # fmt: skip
    labels = {task: torch.from_numpy(y) for task, y in batch.labels.items()}
    with torch.inference_mode(False), torch.enable_grad():
        loss = model.loss(_forward(model, batch), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    results: Results = {}
    held = [spec for spec in model.blocks() if spec.name in batch.masks]
    for spec in held:
        if spec.kind != "head":
            for name, output in outputs[spec.name].items():
                results[spec.name, f"output {name} in training"] = output
        if spec.is_frozen:
            continue
        for name, p in spec.module.named_parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            results[spec.name, f"gradient of {name}"] = gradient.numpy()
        for name, value in statistics_of(spec.module).items():
            results[spec.name, f"running statistic {name}"] = value.numpy()
    return results | {("", "loss"): loss.detach().numpy()}  # last: blocks tell more


def _torch_outputs(model: BlockModel, batch: Batch) -> Results:
    """Every block's outputs in evaluation mode."""
    model = copy.deepcopy(model).eval()
    outputs = _recorded_outputs(model)
    with torch.no_grad():
        _forward(model, batch)
    return {
        (block, f"output {name} in evaluation"): output
        for block, by_name in outputs.items()
        for name, output in by_name.items()
    }


def _in_float64(
    run: Callable[[BlockModel, Batch], Results], model: BlockModel, batch: Batch
) -> Results:
    """The same in double precision; nothing, if the model insists on single."""

    def doubled(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: doubled(value) for key, value in x.items()}
        return x.astype(np.float64) if x.dtype == np.float32 else x

    doubled_batch = batch._replace(inputs=doubled(batch.inputs), labels=doubled(batch.labels),
                                   masks=doubled(batch.masks))  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return run(copy.deepcopy(model).double(), doubled_batch)
    except Exception:  # a model that insists on float32 is held to the plain limit
        return {}
    finally:
        torch.set_default_dtype(before)


def _forward(model: BlockModel, batch: Batch) -> Any:
    return model({name: torch.from_numpy(x) for name, x in batch.inputs.items()})


def _recorded_outputs(model: BlockModel) -> dict[str, dict[str, NDArray[Any]]]:
    """Filled by the blocks as they run, by block and name."""
    recorded: dict[str, dict[str, NDArray[Any]]] = {}
    for spec in model.blocks():

        def record(module: nn.Module, args: Any, output: Any, name: str = spec.name) -> None:
            tensors = flatten(name, output)
            # Copies: the block after it may write to them in place.
            recorded[name] = {n: t.detach().numpy().copy() for n, t in tensors.items()}

        spec.module.register_forward_hook(record)
    return recorded


def _force_dropout(module: nn.Module, masks: Sequence[Mask]) -> None:
    """The module's dropout uses the given masks instead of drawing them."""
    forward = module.forward

    def forced(*args: Any, **kwargs: Any) -> Any:
        with Rewrites(masks, dropouts_only):
            return forward(*args, **kwargs)

    module.forward = forced
