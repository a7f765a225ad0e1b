"""Models that onnxruntime-training can train in part, or not at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export import BlockModel


class Normalized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, 2)


def grouped() -> BlockModel:
    """A model that onnxruntime-training has no gradient of."""
    torch.manual_seed(0)
    return BlockModel(
        name="grouped",
        encoders={"a": nn.Sequential(nn.Linear(5, 4), Normalized())},
        head=nn.Linear(4, 3),
        examples={"a": torch.randn(2, 5)},
    )


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(7, 3)

    def forward(self, embeddings: dict[str, Tensor], present: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.cat(list(embeddings.values()), 1) + present[:, :1])
        return logits


def normalized() -> BlockModel:
    """Modalities out of alphabetical order, and a batch norm."""
    torch.manual_seed(0)
    return BlockModel(
        name="normalized",
        encoders={"b": nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), "a": nn.Linear(2, 3)},
        head=Joined(),
        examples={"b": torch.randn(2, 5), "a": torch.randn(2, 2)},
    )
