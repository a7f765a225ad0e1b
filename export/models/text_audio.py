"""Emotion from what is said and how: BLOSSOM's model for IEMOCAP and MELD.

The text modality is a frozen language model's features, computed once on the device, and the
speech modality a sequence of acoustic features.

Source: BLOSSOM, arXiv:2603.27552 (a GRU over text features, the sensor encoder for speech); the
    features' widths are our choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model import BlockModel
from .har import AttentionFusion, MlpHead, SensorEncoder

EMOTIONS = ("neutral", "happy", "sad", "angry")


class TextEncoder(nn.Module):
    """A GRU over the features of words, averaged: ``(b, words, features)`` to ``(b, d)``."""

    def __init__(self, features: int = 512, d: int = 64) -> None:
        super().__init__()
        self.gru = nn.GRU(features, d, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Encodes a batch of utterances."""
        x, _ = self.gru(x)  # (b, words, d)
        embedding: Tensor = x.mean(dim=1)
        return embedding


def emotion(seed: int = 0) -> BlockModel:
    """32 words of 512 features each, and 200 frames of 80 acoustic features."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockModel(
            name="emotion",
            encoders={"text": TextEncoder(512, d=64), "speech": SensorEncoder(80, d=64)},
            fusion=AttentionFusion(("text", "speech"), d=64, out=128),
            head=MlpHead(128, len(EMOTIONS)),
            examples={"text": torch.randn(2, 32, 512), "speech": torch.randn(2, 80, 200)},
            class_names=EMOTIONS,
        )
