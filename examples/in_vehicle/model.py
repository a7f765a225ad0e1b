"""What the vehicle is doing, from two seconds of its sensors."""

from __future__ import annotations

import torch
from torch import nn

from export import BlockModel
from export.models.har import AttentionFusion, MlpHead

from .drive import CHANNELS, EVENTS, WINDOW_SAMPLES

MODALITIES = tuple(CHANNELS)


def build() -> BlockModel:
    """An encoder per sensor; fusion and head stay in the vehicle.

    Every unit is mounted at its own angle, in a vehicle with its own springs: what an encoder
    finds is shared, what it means here is not.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BlockModel(
            name="in-vehicle",
            encoders={name: _encoder(len(columns)) for name, columns in CHANNELS.items()},
            fusion=AttentionFusion(MODALITIES, d=32, out=64),
            head=MlpHead(64, num_classes=len(EVENTS)),
            examples={
                name: torch.randn(2, len(columns), WINDOW_SAMPLES)
                for name, columns in CHANNELS.items()
            },
            class_names=EVENTS,
            private_blocks=("fusion", "head"),
        )


def _encoder(channels: int) -> nn.Module:
    """``(b, channels, 100)`` to ``(b, 32)``."""
    return nn.Sequential(
        nn.Conv1d(channels, 16, 5, padding=2), nn.ReLU(), nn.MaxPool1d(4),  # (b, 16, 25)
        nn.Conv1d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool1d(5),  # (b, 32, 5)
        nn.Flatten(), nn.Linear(32 * 5, 32),
    )  # fmt: skip
