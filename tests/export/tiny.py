"""Small models of blocks, exported in a tenth of a second, and PyTorch's own step on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import BlockModel
from export.models.har import AttentionFusion, MlpHead

CLASSES = ("x", "y", "z")


def small() -> BlockModel:
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
        head=MlpHead(6, len(CLASSES), hidden=8, dropout=0.25),
        examples={"a": torch.randn(2, 5), "b": torch.randn(2, 2, 8)},
        class_names=CLASSES,
    )  # fmt: skip


class Lambda(nn.Module):
    """A module given as a function of itself and its input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


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


class Step(NamedTuple):
    """A step of PyTorch on the whole model: gradients by block and parameter name."""

    loss: float
    gradients: dict[str, dict[str, NDArray[np.float32]]]


def blocks_of(model: BlockModel, modalities: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a device with these modalities, by the block's name."""
    encoders = {f"encoder-{m}": model.encoders[m] for m in modalities}
    return encoders | {"fusion": model.fusion, "head": model.head}


def torch_step(
    model: BlockModel, inputs: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64]
) -> Step:
    """The loss and the gradients as autograd has them; dropout is the caller's business."""
    model.train().zero_grad()
    logits = model({name: torch.from_numpy(x) for name, x in inputs.items()})
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    torch.autograd.backward(loss)
    gradients = {
        block: {
            name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy().copy()
            for name, p in module.named_parameters()
        }
        for block, module in blocks_of(model, list(inputs)).items()
    }
    return Step(loss.item(), gradients)


def largest_error(step: Step, loss: float, found: Mapping[str, NDArray[np.float32]]) -> float:
    """The largest relative error of the loss and of each parameter's gradient.

    Relative to the parameter's largest entry, or to 1e-3 of its block's where that is more: a
    bias before a softmax has a gradient of rounding noise alone.
    """
    assert found.keys() == step.gradients.keys()
    errors = [abs(loss - step.loss) / step.loss]
    for block, gradients in step.gradients.items():
        floor = 1e-3 * max(float(np.abs(g).max()) for g in gradients.values())
        parts = np.split(found[block], np.cumsum([g.size for g in gradients.values()]))
        assert parts.pop().size == 0
        for part, gradient in zip(parts, gradients.values(), strict=True):
            error = float(np.abs(part - gradient.ravel()).max())
            scale = max(float(np.abs(gradient).max()), floor)
            errors.append(error / scale if error else 0.0)
    return max(errors)
