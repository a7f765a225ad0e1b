"""What a model must be before it is exported: one check each, one line when it fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from petalfl.errors import ModelError
from petalfl.schema import NAME_REGEX

from .block import BlockSpec, TaskSpec, Value, flatten

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": nn.functional.cross_entropy,
    "bce_with_logits": nn.functional.binary_cross_entropy_with_logits,
    "mse": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
}

# Tensors that the graphs have of their own.
_TAKEN = ("parameters", "present", "labels", "loss", "gradient", "statistics")


def check_names(what: str, names: Collection[str]) -> None:
    """They can be an MQTT level, a URL's and a path's."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(NAME_REGEX, name):
            raise ModelError(f"{what} {name!r} does not match {NAME_REGEX}")


def check_known(what: str, names: Collection[str], known: Collection[str]) -> None:
    """``names`` are all among ``known``."""
    if isinstance(names, str):
        raise ModelError(f"{what} is the string {names!r}, expected a collection of names")
    for name in names:
        if name not in known:
            raise ModelError(f"{what} names {name!r}, expected one of {', '.join(known)}")


def check_examples(
    examples: Mapping[str, Tensor],
    num_values: Mapping[str, int],
    dynamic_axes: Mapping[str, Mapping[int, tuple[int, int]]],
) -> None:
    """Equally long batches of float32, or of int64 with a known range."""
    check_known("num_values", num_values, examples)
    check_known("dynamic_axes", dynamic_axes, examples)
    for name, x in examples.items():
        if name in _TAKEN:
            raise ModelError(f"modality {name}: the graphs have a tensor of that name")
        if not isinstance(x, Tensor) or x.dim() == 0 or x.numel() == 0:
            raise ModelError(f"modality {name}: the example is no batch (b, ...) of tensors")
        if x.dtype not in (torch.float32, torch.int64):
            raise ModelError(
                f"modality {name}: the example is {x.dtype}, expected torch.float32 or torch.int64"
            )
        _check_range(name, x, num_values.get(name))
        _check_axes(name, x, dynamic_axes.get(name, {}))
    if len({len(x) for x in examples.values()}) != 1:
        found = ", ".join(f"{name} {len(x)}" for name, x in examples.items())
        raise ModelError(f"the example batches differ in length: {found}")


def _check_axes(name: str, x: Tensor, axes: Any) -> None:
    if not isinstance(axes, Mapping):
        raise ModelError(
            f"modality {name}: dynamic_axes {axes!r}, expected the shortest and longest length by "
            "axis, as in {1: (10, 200)}"
        )
    for axis, ends in axes.items():
        if axis not in range(1, x.dim()):
            raise ModelError(
                f"modality {name}: dynamic axis {axis}, expected one of 1 to {x.dim() - 1} "
                "(0 is the batch, which always is)"
            )
        is_range = isinstance(ends, Sequence) and len(ends) == 2 and all(
            type(end) is int for end in ends
        )  # fmt: skip
        if not is_range or not 1 <= ends[0] < ends[1] or not ends[0] <= x.shape[axis] <= ends[1]:
            raise ModelError(
                f"modality {name}: axis {axis} from {ends!r}, expected (shortest, longest) with "
                f"the example's {x.shape[axis]} between them"
            )


def _check_range(name: str, x: Tensor, num_values: int | None) -> None:
    is_integer = x.dtype == torch.int64
    if is_integer == (num_values is None):
        needs = "int64 needs num_values" if is_integer else "num_values is for int64"
        raise ModelError(f"modality {name}: the example is {x.dtype}; {needs}")
    if num_values is not None and not 0 <= int(x.min()) <= int(x.max()) < num_values:
        low, high = int(x.min()), int(x.max())
        raise ModelError(
            f"modality {name}: the example holds {low if low < 0 else high}, "
            f"outside [0, {num_values})"
        )


def check_blocks(
    blocks: Sequence[BlockSpec], modalities: Collection[str], frozen_blocks: Collection[str]
) -> None:
    """Distinct names; parameters that are float32, of one block, and all trained or none."""
    taken = set(modalities)
    owners: dict[int, BlockSpec] = {}
    for block in blocks:
        check_names("block", [block.name])
        if block.name in taken:
            raise ModelError(f"block {block.name}: the name is used twice")
        taken.add(block.name)
        for path, parameter in block.module.named_parameters():
            if parameter.dtype != torch.float32:
                raise ModelError(
                    f"block {block.name}: {path} is {parameter.dtype}, expected torch.float32"
                )
            owner = owners.setdefault(id(parameter), block)
            if owner is not block and not (owner.is_frozen and block.is_frozen):
                raise ModelError(
                    f"blocks {owner.name} and {block.name} share the parameter {path}; a block is "
                    "trained and averaged by itself, so give each its own"
                )
        if block.name not in frozen_blocks:
            _check_trained(block)
    if all(block.is_frozen for block in blocks):
        raise ModelError("every block is frozen, there is nothing to train")


def _check_trained(block: BlockSpec) -> None:
    """Nothing in it stands still that the user has not named."""
    frozen = [path for path, p in block.module.named_parameters() if not p.requires_grad]
    if frozen and len(frozen) == len(list(block.module.parameters())):
        raise ModelError(
            f"block {block.name}: no parameter has requires_grad; name it in frozen_blocks"
        )
    if frozen:
        raise ModelError(
            f"block {block.name}: {frozen[0]} has requires_grad False; give the frozen part a "
            "stage of its own and name it in frozen_blocks"
        )
    if block.is_frozen and (layers := training_layers(block.module)):
        raise ModelError(
            f"block {block.name}: it has no parameters and so is frozen, which switches "
            f"{type(layers[0]).__name__} off; move that to a block that trains, or name this one "
            "in frozen_blocks"
        )


def training_layers(module: nn.Module) -> list[nn.Module]:
    """What acts otherwise in training than in evaluation: dropout and batch normalization."""
    return [layer for layer in module.modules() if isinstance(layer, (_BatchNorm, _DropoutNd))]


def check_output(block: BlockSpec, value: Value, length: int) -> None:
    """Float32 tensors ``(length, ...)``; of a head, one that fits its loss."""
    tensors = flatten(block.name, value)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.get_default_dtype():  # the one-step law also runs in float64
            raise ModelError(
                f"block {block.name}: {name} is {tensor.dtype}, expected torch.float32"
            )
        if tensor.dim() == 0 or len(tensor) != length:
            raise ModelError(
                f"block {block.name}: {name} has shape {tuple(tensor.shape)}, expected "
                f"{length} examples first, as in its input"
            )
    if block.task is not None:
        if not isinstance(value, Tensor):
            raise ModelError(f"block {block.name}: {len(tensors)} outputs, a head has one tensor")
        _check_task(block, block.task, value)


def _check_task(block: BlockSpec, task: TaskSpec, output: Tensor) -> None:
    shape = tuple(output.shape)
    if task.loss == "cross_entropy" and (len(shape) != 2 or shape[1] < 2):
        raise ModelError(
            f"block {block.name}: output of shape {shape}, expected (b, num_classes) with two "
            "classes or more for cross_entropy"
        )
    width = shape[-1] if len(shape) > 1 else 1
    if task.class_names and len(task.class_names) != width:
        raise ModelError(
            f"block {block.name}: output of shape {shape} for {len(task.class_names)} class names"
        )
