"""Personal heads: beside each head a private one, which learns the same task."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from petalfl.errors import ModelError
from petalfl.model import PERSONAL_LOSSES

from .block import BlockSpec


def personal_twin(head: BlockSpec) -> BlockSpec:
    """A copy of a head whose last layer is zero, under the name of its personal head.

    Raises:
        ModelError: The head is frozen, or of a loss whose outputs are no probabilities.
    """
    assert head.task is not None  # a head has one
    if head.is_frozen:
        raise ModelError(f"block {head.name}: it is frozen; a personal head beside it cannot be")
    if head.task.loss not in PERSONAL_LOSSES:
        raise ModelError(
            f"block {head.name}: a personal head needs a loss whose outputs are probabilities, "
            f"{' or '.join(PERSONAL_LOSSES)}; found {head.task.loss}"
        )
    module = copy.deepcopy(head.module)
    layers = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    for parameter in layers[-1].parameters(recurse=False):
        nn.init.zeros_(parameter)
    name = f"{head.name}-personal"
    return replace(
        head,
        name=name,
        module=module,
        state_prefix=f"personal_heads.{name.removeprefix('head-')}.",
        task=head.task._replace(personalizes=head.name.removeprefix("head-")),
    )


def check_silent(twin: BlockSpec, output: Tensor) -> None:
    """Refuses a personal head that says something before it is trained.

    Args:
        output: On examples.

    Raises:
        ModelError: Not all of it is 0.
    """
    if not torch.equal(output, torch.zeros_like(output)):
        raise ModelError(
            f"block {twin.name}: with its last layer's parameters at 0 its outputs are not 0; a "
            "personal head needs a head that ends in a linear layer or convolution"
        )
