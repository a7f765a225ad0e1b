"""Human activity from body-worn sensors: BLOSSOM's late-fusion model.

Source: BLOSSOM, arXiv:2603.27552 (sensor encoder, attention fusion, MLP head).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..model import BlockModel

WATCH_CLASSES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")


class SensorEncoder(nn.Module):
    """Three convolutions and a GRU, averaged over time: ``(b, channels, t)`` to ``(b, d)``."""

    def __init__(self, channels: int, d: int = 128, dropout: float = 0.1) -> None:
        super().__init__()
        widths = (channels, 32, 64, 128)
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv1d(narrow, wide, 5, padding=2),
                    nn.ReLU(),
                    nn.MaxPool1d(2),
                    nn.Dropout(dropout),
                )
                for narrow, wide in itertools.pairwise(widths)
            )
        )
        self.gru = nn.GRU(widths[-1], d, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes a batch of windows."""
        x = self.convolutions(x)  # (b, 128, t / 8)
        x, _ = self.gru(x.transpose(1, 2))  # (b, t / 8, d)
        embedding: Tensor = x.mean(dim=1)
        return embedding


class AttentionFusion(nn.Module):
    """Attention over the modalities present: each ``(b, d)``, fused ``(b, out)``.

    An absent modality is masked out of the softmax, so that its weight is exactly zero.

    Args:
        d: The width of every embedding, or of each in the order of ``modalities``.
    """

    def __init__(
        self, modalities: tuple[str, ...], d: int | tuple[int, ...] = 128, out: int = 256
    ) -> None:
        super().__init__()
        self.modalities = modalities
        widths = (d,) * len(modalities) if isinstance(d, int) else d
        self.attention = nn.Linear(sum(widths), len(modalities))
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, out) for name, width in zip(modalities, widths, strict=True)}
        )

    def forward(self, embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """Fuses; ``present`` is ``(b, M)``, 1 where the modality is there, else 0."""
        z = [embeddings[name] for name in self.modalities]
        scores = self.attention(torch.cat(z, dim=1))  # (b, M)
        weights = scores.masked_fill(present < 0.5, float("-inf")).softmax(dim=1)
        projected = [self.projections[name](embeddings[name]) for name in self.modalities]
        fused: Tensor = (torch.stack(projected, dim=1) * weights.unsqueeze(2)).sum(dim=1)
        return fused


class MlpHead(nn.Sequential):
    """``(b, d)`` to logits ``(b, num_classes)``."""

    def __init__(self, d: int, num_classes: int, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__(
            nn.Linear(d, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
        )


def watch(seed: int = 0, personal_head: bool = False) -> BlockModel:
    """Accelerometer and gyroscope of a watch, 2 s at 50 Hz, seven shoulder exercises."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockModel(
            name="watch",
            encoders={"acc": SensorEncoder(3), "gyro": SensorEncoder(3)},
            fusion=AttentionFusion(("acc", "gyro")),
            head=MlpHead(256, len(WATCH_CLASSES)),
            examples={"acc": torch.randn(2, 3, 100), "gyro": torch.randn(2, 3, 100)},
            class_names=WATCH_CLASSES,
            personal_head=personal_head,
        )
