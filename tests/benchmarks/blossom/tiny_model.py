"""The model of the tiny data set, with the initial values of a seed."""

from __future__ import annotations

import torch
from torch import nn

from export import BlockModel
from tests.export.tiny import small


def seeded(seed: int = 0) -> BlockModel:
    """`tests.export.tiny:small` with other values."""
    model = small()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return model
