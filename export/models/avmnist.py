"""Digits seen and heard: BLOSSOM's model for AV-MNIST, with batch normalization.

Source: BLOSSOM, arXiv:2603.27552 (layers and widths; kernels of the audio encoder are ours);
    AV-MNIST, Vielzeuf et al. 2018, arXiv:1808.07275.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ..model import BlockModel
from .har import AttentionFusion

DIGITS = tuple("0123456789")


class ImageEncoder(nn.Sequential):
    """Three convolutions, each halving the image: ``(b, 1, side, side)`` to ``(b, d)``."""

    def __init__(self, d: int = 32, side: int = 28) -> None:
        super().__init__(
            *(
                nn.Sequential(
                    nn.Conv2d(narrow, wide, 3, padding=1),
                    nn.ReLU(),
                    nn.BatchNorm2d(wide),
                    nn.MaxPool2d(2),
                )
                for narrow, wide in itertools.pairwise((1, 8, 16, 32))
            ),
            nn.Flatten(),
            nn.Linear(32 * (side // 8) ** 2, d),
        )


class AudioEncoder(nn.Module):
    """Four strided convolutions, averaged: a spectrogram ``(b, 1, 64, t)`` to ``(b, d)``."""

    def __init__(self, d: int = 256) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
                    nn.ReLU(),
                    nn.BatchNorm2d(wide),
                )
                for narrow, wide in itertools.pairwise((1, 8, 16, 32, 64))
            )
        )
        self.out = nn.Linear(64, d)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes a batch of spectrograms."""
        x = self.convolutions(x)  # (b, 64, 4, t / 16)
        embedding: Tensor = self.out(x.mean(dim=(2, 3)))
        return embedding


class NormalizedHead(nn.Sequential):
    """Two hidden layers with batch normalization: ``(b, d)`` to ``(b, num_classes)``."""

    def __init__(self, d: int, num_classes: int, dropout: float = 0.3) -> None:
        super().__init__(
            *(
                nn.Sequential(
                    nn.Linear(wide, narrow),
                    nn.BatchNorm1d(narrow),
                    nn.ReLU(),
                    nn.Dropout(dropout),
                )
                for wide, narrow in itertools.pairwise((d, 256, 128))
            ),
            nn.Linear(128, num_classes),
        )


def digits(seed: int = 0) -> BlockModel:
    """An image 28 × 28, and a spectrogram of 64 mel bands and 64 frames."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockModel(
            name="digits",
            encoders={"image": ImageEncoder(32), "audio": AudioEncoder(256)},
            fusion=AttentionFusion(("image", "audio"), d=(32, 256), out=128),
            head=NormalizedHead(128, len(DIGITS)),
            examples={"image": torch.randn(2, 1, 28, 28), "audio": torch.randn(2, 1, 64, 64)},
            class_names=DIGITS,
        )
