"""PyTorch eager: the whole model, autograd, `torch.optim.SGD` with momentum."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.contenders.case import LEARNING_RATE, MOMENTUM, SEED, WEIGHT_DECAY, AfterStep, Case
from export.model import BlockModel


class Whole(nn.Module):
    """A model of blocks on all of its modalities, without the checks of `BlockModel.forward`."""

    def __init__(self, model: BlockModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        """The last block's output, of one tensor per modality."""
        values = dict(zip(self.model.examples, inputs, strict=True))
        present = torch.ones(inputs[0].shape[0], len(inputs))
        for block in self.model.blocks():
            values[block.name] = block(values, present)
        return values[block.name]


def build(factory: str) -> BlockModel:
    """Calls ``MODULE:FACTORY``."""
    module_name, _, name = factory.partition(":")
    return cast(BlockModel, getattr(importlib.import_module(module_name), name)())


def train(case: Case, after_step: AfterStep) -> None:
    """Trains for ever, in training mode; frozen blocks stay in evaluation mode.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    torch.manual_seed(SEED)
    model = build(case.factory).train()
    model.load_state_dict(torch.load(case.state_dict, weights_only=True))
    whole = Whole(model)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    inputs, labels = (_tensors(arrays) for arrays in case.load())
    while True:
        order = torch.randperm(case.batch_size)
        outputs = whole(*(inputs[name][order] for name in model.examples))
        loss = model.loss(outputs, {task: y[order] for task, y in labels.items()})
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()}")
        after_step()


def _tensors(arrays: Mapping[str, object]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(array) for name, array in arrays.items()}
