"""From modules to blocks: what they are called, who feeds whom, what the heads are trained for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from petalfl.errors import ModelError

from .block import BlockSpec, TaskSpec
from .checks import LOSSES, check_known, check_names


def named(given: Any, default: str) -> list[tuple[str, Any]]:
    """A mapping's items; anything else is the only one, of that name."""
    is_mapping = isinstance(given, (Mapping, nn.ModuleDict))
    return list(given.items()) if is_mapping else [(default, given)]


def lay_out(
    encoders: Mapping[str, Any],
    fusion: nn.Module | None,
    head: Any,
    tasks: Mapping[str, TaskSpec],
    takes_present: bool,
    frozen_blocks: Collection[str],
) -> Iterator[BlockSpec]:
    """The blocks in topological order; the arguments are those of `BlockModel`."""

    def block(
        kind: Literal["encoder", "fusion", "head"],
        name: str,
        module: nn.Module,
        inputs: tuple[str, ...],
        path: Sequence[str],
        modalities: tuple[str, ...] = (),
        task: TaskSpec | None = None,
    ) -> BlockSpec:
        if not isinstance(module, nn.Module):
            found = type(module).__name__
            raise ModelError(f"block {name}: found {found}, expected a torch.nn.Module")
        is_frozen = name in frozen_blocks or next(module.parameters(), None) is None
        prefix = "".join(f"{part}." for part in path)
        present = takes_present and bool(modalities)
        return BlockSpec(name, kind, module, inputs, modalities, present, is_frozen, prefix, task)

    last: list[str] = []
    for modality, given in encoders.items():
        before = modality
        stages = named(given, "encoder")
        if not stages:
            raise ModelError(f"modality {modality}: its encoder has no stage")
        for stage, module in stages:
            path = ["encoders", modality, *([] if module is given else [stage])]
            yield block("encoder", f"{stage}-{modality}", module, (before,), path)
            before = f"{stage}-{modality}"
        last.append(before)
    inputs, modalities = tuple(last), tuple(encoders)
    if fusion is not None:
        yield block("fusion", "fusion", fusion, inputs, ["fusion"], modalities)
        inputs, modalities = ("fusion",), ()
    elif len(modalities) == 1:
        modalities = ()
    heads = named(head, "head")
    for task, module in heads:
        name = "head" if len(heads) == 1 else f"head-{task}"
        path = ["head", *([] if module is head else [task])]
        yield block("head", name, module, inputs, path, modalities, tasks[task])


def make_tasks(
    names: Collection[str],
    loss: str | Mapping[str, str],
    weights: Mapping[str, float] | None,
    class_names: tuple[str, ...] | Mapping[str, tuple[str, ...]],
) -> dict[str, TaskSpec]:
    """Of each head; the arguments are those of `BlockModel`."""
    if not names:
        raise ModelError("there is no head")
    check_names("task", names)
    losses = loss if isinstance(loss, Mapping) else dict.fromkeys(names, loss)
    classes = class_names if isinstance(class_names, Mapping) else dict.fromkeys(names, class_names)
    weights = weights or {}
    for what, given in (("loss", losses), ("loss_weights", weights), ("class_names", classes)):
        check_known(what, given, names)
    tasks = {}
    for name in names:
        check_known(f"the loss of {name}", [losses.get(name, "")], LOSSES)
        weight = weights.get(name, 1.0)
        if not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ModelError(f"loss_weights of {name}: {weight!r}, expected a positive number")
        tasks[name] = TaskSpec(losses[name], float(weight), tuple(classes.get(name, ())))
    return tasks
