"""A PyTorch model with everything that the reference model lacks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from export import BlockModel


class BagOfWords(nn.Module):
    """The mean embedding of words int64 ``(b, t)``: ``(b, d)``."""

    def __init__(self, num_words: int, d: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, d)

    def forward(self, words: Tensor) -> Tensor:
        embedding: Tensor = self.embedding(words).mean(dim=1)
        return embedding


class ConcatFusion(nn.Module):
    """A normalized projection of the embeddings side by side."""

    def __init__(self, d: int, out: int) -> None:
        super().__init__()
        self.projection = nn.Linear(d, out)
        self.norm = nn.BatchNorm1d(out)

    def forward(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        fused: Tensor = self.norm(self.projection(torch.cat(list(embeddings.values()), dim=1)))
        return fused


def several() -> BlockModel:
    """Words of any number, a frozen stage, running statistics, three tasks, zeros for absence."""
    torch.manual_seed(0)
    return BlockModel(
        name="several",
        encoders={
            "motion": {
                "backbone": nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh()),
                "projector": nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.25)),
            },
            "text": BagOfWords(11, 4),
        },
        fusion=ConcatFusion(8, 6),
        head={"kind": nn.Linear(6, 3), "tags": nn.Linear(6, 4), "pace": nn.Linear(6, 2)},
        examples={"motion": torch.randn(3, 5), "text": torch.randint(0, 11, (3, 7))},
        loss={"kind": "cross_entropy", "tags": "bce_with_logits", "pace": "mse"},
        loss_weights={"tags": 0.5},
        class_names={"kind": ("x", "y", "z"), "tags": ("p", "q", "r", "s")},
        frozen_blocks=("backbone-motion",),
        missing="zero",
        num_values={"text": 11},
        dynamic_axes={"text": {1: (1, 64)}},
    )


class SumFusion(nn.Module):
    """The sum of the embeddings: a block without parameters."""

    def forward(self, embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:
        return torch.stack(list(embeddings.values())).sum(dim=0)


def bare() -> BlockModel:
    """A fusion without parameters, a normalization without weights in front, a regression."""
    torch.manual_seed(0)
    return BlockModel(
        name="bare",
        encoders={
            "a": nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.Linear(5, 4)),
            "b": nn.Linear(4, 4),
        },
        fusion=SumFusion(),
        head=nn.Linear(4, 1),
        examples={"a": torch.randn(3, 5), "b": torch.randn(3, 4)},
        loss="l1",
        private_blocks=(),
    )
