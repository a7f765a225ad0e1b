"""Small models of blocks, exported in tenths of a second, and PyTorch's own step on them.

PyTorch's side is written anew here, not taken from `export.law`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from export import BlockModel
from export.models.har import AttentionFusion, MlpHead
from petalfl import steps
from petalfl.engine import OrtEngine
from petalfl.model import ModelManifest
from petalfl.steps import predict_outputs, step_gradients
from petalfl.vectors import Vector
from tests.export.layer_law import Masked

CLASSES = ("x", "y", "z")
TOLERANCE = 1e-5

Arrays = dict[str, NDArray[Any]]


def wider() -> BlockModel:
    """As `small`, but that its head is wider: another layout for the same data."""
    return small(hidden=9)


def personal() -> BlockModel:
    """As `small`, with a personal head."""
    return small(personal_head=True)


def small(hidden: int = 8, **options: Any) -> BlockModel:
    """Two encoders, the reference fusion and head; a dropout in three of the four blocks."""
    torch.manual_seed(0)
    return BlockModel(
        name="small",
        encoders={
            "a": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5)),
            "b": nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
                               nn.Linear(18, 4)),
        },
        fusion=AttentionFusion(("a", "b"), d=4, out=6),
        head=MlpHead(6, len(CLASSES), hidden=hidden, dropout=0.25),
        examples={"a": torch.randn(2, 5), "b": torch.randn(2, 2, 8)},
        class_names=CLASSES,
        **options,
    )  # fmt: skip


class Lambda(nn.Module):
    """A module given as a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class SumFusion(nn.Module):
    """The sum of a projection of each modality present: 4 wide."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(d, 4) for name, d in widths.items()})

    def forward(self, embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:
        parts = [
            projection(embeddings[name]) * present[:, i : i + 1]
            for i, (name, projection) in enumerate(self.projections.items())
        ]
        return torch.stack(parts).sum(0)


def tiny(encoder: nn.Module, shape: tuple[int, ...] = (3, 8), **changes: Any) -> BlockModel:
    """A model whose encoder of modality ``a``, ``(b, *shape)`` to ``(b, 4)``, is under test."""
    defaults: dict[str, Any] = {
        "name": "tiny",
        "encoders": {"a": encoder, "b": nn.Linear(5, 4)},
        "fusion": SumFusion({"a": 4, "b": 4}),
        "head": nn.Linear(4, 3),
        "examples": {"a": torch.randn(2, *shape), "b": torch.randn(2, 5)},
        "class_names": CLASSES,
    }
    return BlockModel(**{**defaults, **changes})


def lone(
    encoder: nn.Module | Mapping[str, nn.Module], example: Tensor, **changes: Any
) -> BlockModel:
    """A model of one modality ``a``, whose encoder, 4 wide, is under test."""
    defaults: dict[str, Any] = {
        "name": "lone",
        "encoders": {"a": encoder},
        "head": nn.Linear(4, 3),
        "examples": {"a": example},
    }
    return BlockModel(**{**defaults, **changes})


# --- PyTorch's own step ---


class Batch(NamedTuple):
    """A random batch: inputs by modality, labels by task, masks by block."""

    inputs: Arrays
    labels: Arrays
    masks: dict[str, dict[str, NDArray[np.float32]]]


class Step(NamedTuple):
    """A step of PyTorch on the whole model; by block, then by parameter or running average."""

    loss: float
    gradients: dict[str, Arrays]
    statistics: dict[str, Arrays]


def averages_of(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics, by name."""
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def vectors_of(model: BlockModel) -> dict[str, Vector]:
    """Every block's flat vector, as its manifest lays it out."""
    return {
        block.name: np.concatenate(
            [np.zeros(0, np.float32)]
            + [
                tensor.detach().numpy().ravel()
                for tensor in (*block.module.parameters(), *averages_of(block.module).values())
            ]
        )
        for block in model.blocks()
    }


def draw(
    model: BlockModel, manifest: ModelManifest, modalities: Sequence[str], length: int, seed: int
) -> Batch:
    """Normal inputs, or integers in their range; lengths that may vary are 1 to 12."""
    rng = np.random.default_rng(seed)
    inputs: Arrays = {}
    for name in modalities:
        modality = manifest.modalities[name]
        shape = [length, *(dim or int(rng.integers(1, 13)) for dim in modality.shape)]
        if modality.num_values is None:
            inputs[name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            inputs[name] = rng.integers(0, modality.num_values, shape)
    labels: Arrays = {}
    for task, output in torch_outputs(model, inputs).items():
        loss = model.tasks[task].loss
        labels[task] = (
            rng.integers(0, output.shape[1], length)
            if loss == "cross_entropy"
            else rng.integers(0, 2, output.shape).astype(np.float32)
            if loss == "bce_with_logits"
            else rng.standard_normal(output.shape, dtype=np.float32)
        )
    axes = {f"{name}.{i}": size for name, x in inputs.items() for i, size in enumerate(x.shape)}
    masks: dict[str, dict[str, NDArray[np.float32]]] = {}
    for block in manifest.blocks_for(modalities):
        masks[block.name] = {}
        for d in block.dropouts:
            is_kept = rng.random((length, *d.sizes(axes))) > d.rate
            masks[block.name][d.name] = (is_kept / (1 - d.rate)).astype(np.float32)
    return Batch(inputs, labels, masks)


def tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Copies, because a model may write its inputs."""
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def torch_outputs(model: BlockModel, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
    """The heads' outputs in evaluation, by task."""
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(tensors(inputs))
    by_task = {"head": outputs} if isinstance(outputs, Tensor) else outputs
    return {task: output.numpy() for task, output in by_task.items()}


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
}


def torch_step(model: BlockModel, batch: Batch) -> Step:
    """The loss and its gradients as autograd has them, with the batch's dropout masks.

    Leaves the gradients in the model's parameters, and its running statistics moved.
    """
    masks = [torch.from_numpy(m) for by_name in batch.masks.values() for m in by_name.values()]
    model.train().zero_grad()
    with Masked(masks) as dropouts:
        outputs = model(tensors(batch.inputs))
    assert len(dropouts.rates) == len(masks), "a mask that PyTorch has no dropout for"
    by_task = {"head": outputs} if isinstance(outputs, Tensor) else outputs
    loss = torch.zeros(())
    for task, y in tensors(batch.labels).items():
        weight = model.tasks[task].weight if len(by_task) > 1 else 1.0
        loss = loss + weight * _LOSSES[model.tasks[task].loss](by_task[task], y)
    torch.autograd.backward(loss)
    held = [block for block in model.blocks() if block.name in batch.masks]
    return Step(
        loss.item(),
        {
            block.name: {
                name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy().copy()
                for name, p in block.module.named_parameters()
            }
            for block in held
            if not block.is_frozen
        },
        {
            block.name: {n: b.numpy().copy() for n, b in averages_of(block.module).items()}
            for block in held
            if not block.is_frozen and averages_of(block.module)
        },
    )


def largest_error(found: NDArray[Any], expected: NDArray[Any], at_least: float = 0.0) -> float:
    """Relative to the largest expected entry, or to ``at_least`` where that is more."""
    assert found.size == expected.size
    if not expected.size:
        return 0.0
    with np.errstate(invalid="ignore"):  # an infinite result is off by NaN
        error = float(np.abs(found.ravel() - expected.ravel()).max())
    scale = max(float(np.abs(expected).max()), at_least)
    return error / scale if error else 0.0


def step_errors(found: steps.Step, expected: Step) -> dict[str, float]:
    """By what is compared.

    A gradient's error is relative to 1e-3 of its block's largest, if its own entries are smaller:
    that of a bias before a softmax is rounding noise alone.
    """
    assert found.gradients.keys() == expected.gradients.keys()
    assert found.statistics.keys() == expected.statistics.keys()
    errors = {"loss": abs(found.loss - expected.loss) / abs(expected.loss)}
    for wanted, vectors in (
        (expected.gradients, found.gradients),
        (expected.statistics, found.statistics),
    ):
        for block, by_name in wanted.items():
            sizes = [array.size for array in by_name.values()]
            assert vectors[block].size == sum(sizes)
            floor = 1e-3 * max(float(np.abs(array).max(initial=0)) for array in by_name.values())
            parts = np.split(vectors[block], np.cumsum(sizes)[:-1])
            for (name, array), part in zip(by_name.items(), parts, strict=True):
                errors[f"{block}.{name}"] = largest_error(part, array, floor)
    return errors


def law_errors(
    model: BlockModel, folder: Path, modalities: Sequence[str], length: int, seed: int = 0
) -> dict[str, float]:
    """What misses `TOLERANCE` in a training step and in a prediction on a random batch."""
    manifest, engine = ModelManifest.load(folder), OrtEngine(folder)
    vectors = vectors_of(model)
    batch = draw(model, manifest, modalities, length, seed)
    errors: dict[str, float] = {}
    predicted = predict_outputs(engine, manifest, vectors, batch.inputs)
    for task, output in torch_outputs(model, batch.inputs).items():
        errors[f"output {task}"] = largest_error(predicted[task], output)
    found = step_gradients(engine, manifest, vectors, *batch)
    errors |= step_errors(found, torch_step(copy.deepcopy(model), batch))
    return {what: error for what, error in errors.items() if not error <= TOLERANCE}
