"""Diagnosis from a 12-lead electrocardiogram: BLOSSOM's model for PTB-XL.

The leads are two modalities of six: limb and chest leads. A recording can show several of the
five diagnostic superclasses at once, so that each has a probability of its own.

Source: BLOSSOM, arXiv:2603.27552; classes and leads of PTB-XL, Wagner et al. 2020,
    doi:10.1038/s41597-020-0495-6.
"""

from __future__ import annotations

import torch

from ..model import BlockModel
from .har import AttentionFusion, MlpHead, SensorEncoder

CLASSES = ("NORM", "MI", "STTC", "CD", "HYP")


def ecg(seed: int = 0) -> BlockModel:
    """Limb leads (I, II, III, aVR, aVL, aVF) and chest leads (V1 to V6), 10 s at 100 Hz."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockModel(
            name="ecg",
            encoders={"limb": SensorEncoder(6, d=64), "chest": SensorEncoder(6, d=64)},
            fusion=AttentionFusion(("limb", "chest"), d=64, out=128),
            head=MlpHead(128, len(CLASSES)),
            examples={"limb": torch.randn(2, 6, 1000), "chest": torch.randn(2, 6, 1000)},
            loss="bce_with_logits",
            class_names=CLASSES,
        )
