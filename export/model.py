"""The PyTorch side of a model of blocks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from petalfl.errors import ModelError

from .block import BlockSpec, TaskSpec, Value, flatten, unflatten
from .checks import (
    LOSSES,
    check_blocks,
    check_examples,
    check_known,
    check_names,
    check_output,
    training_layers,
)
from .layout import lay_out, make_tasks, named
from .personal import check_silent, personal_twin

__all__ = ["LOSSES", "BlockModel", "BlockSpec", "TaskSpec", "Value", "flatten", "unflatten"]

ByTask: TypeAlias = Tensor | Mapping[str, Tensor]  # of a single head, or of several by task

TOLERANCE = 1e-5  # between a cut model's output and the module's, relative to the largest entry


class BlockModel(nn.Module):
    """Encoders by modality, a fusion and one or more heads, each a module of the user's own.

    What passes between blocks are float32 tensors ``(b, ...)``, or tuples or dicts of them.

    Args:
        name: Lower case, digits and dashes; names the federation's model.
        encoders: By modality: a module, or a chain of them by stage. The first is called with the
            batch ``(b, ...)``, each next one with what the one before it returned.
        head: A module, or modules by task. Called with what the fusion returned; without a
            fusion as the fusion would be, or with the embedding if there is one modality.
        examples: By modality: one example batch ``(b, ...)``, all of one length.
        fusion: Called with the embeddings by modality, zeros for the absent ones, and
            ``present`` float32 ``(b, M)``: 1 for the modalities there, in ``encoders``' order.
        loss: A key of `LOSSES`, or one by task.
        loss_weights: By task, 1 for those not named; the loss is the weighted sum.
        class_names: One per class, or such a tuple by task.
        frozen_blocks: These keep their parameters and stay in evaluation mode.
        private_blocks: The default sharing policy: blocks that never leave a device. None means
            the fusion and the heads.
        personal_head: With a second, private head beside each one, which learns the same task;
            on a device, predictions are the mean of both. It begins as a copy whose outputs are 0,
            so that it says nothing before it is trained. Nothing else is private by default then.
            The idea is FedRoD's (Chen and Chao 2022, arXiv:2107.00778).
        missing: "mask" is as above; with "zero", there is no argument ``present``.
        num_values: By int64 modality: its values lie in ``[0, num_values)``.
        dynamic_axes: By modality: the axes, from 1, whose length may vary between batches, with
            the shortest and the longest length, as in ``{"words": {1: (4, 64)}}``.

    Attributes:
        tasks: By task; that of a single head given as a module is called "head". Those of
            personal heads are not among them.
        example_values: By modality and block: what it gives on the examples, in evaluation mode.

    Raises:
        ModelError: The model cannot be exported; says which block or modality, and why.
    """

    def __init__(
        self,
        *,
        name: str,
        encoders: Mapping[str, nn.Module | Mapping[str, nn.Module]],
        head: nn.Module | Mapping[str, nn.Module],
        examples: Mapping[str, Tensor],
        fusion: nn.Module | None = None,
        loss: str | Mapping[str, str] = "cross_entropy",
        loss_weights: Mapping[str, float] | None = None,
        class_names: tuple[str, ...] | Mapping[str, tuple[str, ...]] = (),
        frozen_blocks: Collection[str] = (),
        private_blocks: tuple[str, ...] | None = None,
        personal_head: bool = False,
        missing: Literal["mask", "zero"] = "mask",
        num_values: Mapping[str, int] | None = None,
        dynamic_axes: Mapping[str, Mapping[int, tuple[int, int]]] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.examples = {name: _own(x) for name, x in examples.items()}
        self.missing = missing
        self.num_values = dict(num_values or {})
        self.dynamic_axes = dict(dynamic_axes or {})
        check_names("model", [name])
        check_names("modality", encoders)
        if encoders.keys() != examples.keys() or not encoders:
            raise ModelError(f"encoders are given for {[*encoders]}, examples for {[*examples]}")
        check_examples(self.examples, self.num_values, self.dynamic_axes)
        check_known("missing", [missing], ("mask", "zero"))

        self.tasks = make_tasks(dict(named(head, "head")), loss, loss_weights, class_names)
        self._blocks = tuple(
            lay_out(encoders, fusion, head, self.tasks, missing == "mask", frozen_blocks)
        )
        names = [block.name for block in self._blocks]
        check_known("frozen_blocks", frozen_blocks, names)
        check_blocks(self._blocks, encoders, frozen_blocks)
        if private_blocks is None:
            kept = () if personal_head else ("fusion", "head")
            private_blocks = tuple(b.name for b in self._blocks if b.kind in kept)
        check_known("private_blocks", private_blocks, names)
        self.private_blocks = tuple(private_blocks)

        self.encoders: nn.ModuleDict = _registered("modality or stage", encoders)
        self.fusion = fusion
        self.head: nn.Module = _registered("task", head)
        for block in self._blocks:
            if block.is_frozen:
                block.module.requires_grad_(False).eval()
        self.example_values = self._run_examples()
        self._cut_from: tuple[nn.Module, ...] = ()  # in a tuple: no submodule of this one
        if personal_head:
            self._add_personal_heads()

    def _add_personal_heads(self) -> None:
        """Behind the heads; a module that this one was cut from has them not."""
        personal = tuple(personal_twin(b) for b in self._blocks if b.kind == "head")
        modules = {block.state_prefix.split(".")[1]: block.module for block in personal}
        self.personal_heads: nn.ModuleDict = _registered("task", modules)
        self._blocks += personal
        self.private_blocks += tuple(block.name for block in personal)
        self.example_values = self._run_examples()
        for block in personal:
            check_silent(block, self.example_values[block.name])

    @classmethod
    def cut(
        cls,
        module: nn.Module,
        *,
        encoders: Mapping[str, str | Mapping[str, str]],
        head: str | Mapping[str, str],
        fusion: str | None = None,
        call: Callable[[Any, dict[str, Tensor]], Any] = lambda module, inputs: module(**inputs),
        personal_head: bool = False,
        **options: Any,
    ) -> BlockModel:
        """Cuts a module of the user's own into blocks: strings are paths of its submodules.

        The blocks are the module's own parts, not copies. Chained as `BlockModel` says, they must
        give what the module gives: all of its computation lies in them, and all its parameters.

        Args:
            call: Runs the module on all modalities; several heads' outputs as a dict by task, or
                a tuple in the order of ``head``.
            personal_head: As of `BlockModel`; the module knows nothing of it.
            options: As of `BlockModel`, among them ``name`` and ``examples``.

        Raises:
            ModelError: As `BlockModel`; or something of the module lies in none of the blocks.
        """

        def take(paths: Any) -> Any:
            if isinstance(paths, Mapping):
                return {name: take(path) for name, path in paths.items()}
            try:
                return module.get_submodule(paths)
            except AttributeError as error:
                raise ModelError(f"{type(module).__name__} has no submodule {paths!r}") from error

        model = cls(
            encoders=take(encoders),
            head=take(head),
            fusion=None if fusion is None else take(fusion),
            **options,
        )
        paths = [*_leaves(encoders), *([] if fusion is None else [fusion]), *_leaves(head)]
        model._blocks = tuple(
            dataclasses.replace(block, state_prefix=f"{path}.")
            for block, path in zip(model._blocks, paths, strict=True)
        )
        _check_cut(model, module, call)
        model._cut_from = (module,)
        if personal_head:
            model._add_personal_heads()
        return model

    def whole(self) -> nn.Module:
        """The user's own module that this one was cut from, or else this one."""
        return self._cut_from[0] if self._cut_from else self

    def blocks(self) -> tuple[BlockSpec, ...]:
        """The blocks in topological order: encoders stage by stage, fusion, heads."""
        return self._blocks

    def train(self, mode: bool = True) -> BlockModel:
        """Sets training or evaluation mode; frozen blocks stay in the latter."""
        super().train(mode)
        for block in self._blocks:
            if block.is_frozen:
                block.module.eval()
        return self

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """The whole model on any subset of its modalities.

        An absent modality's encoder is not run: its embedding is zeros in the shape of the
        example's. This is the reference that the exported blocks, chained, must equal.

        Returns:
            The head's output ``(b, ...)``; of several heads, a dict by task, in which a personal
            head goes by what follows ``head-`` in its name.

        Raises:
            ModelError: None of the modalities, an unknown one, or a block fails.
        """
        values = self._run(inputs)
        outputs = {key: values[block.name] for key, _, block in self._heads()}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def _heads(self) -> Iterator[tuple[str, str, BlockSpec]]:
        """What `forward` calls a head's output, the task whose labels it learns, and the head."""
        heads = [block for block in self._blocks if block.kind == "head"]
        tasks = dict(zip((block.name for block in heads), self.tasks, strict=False))
        for block in heads:
            if block.name in tasks:
                yield tasks[block.name], tasks[block.name], block
            else:
                task = tasks[block.name.removesuffix("-personal")]
                yield block.name.removeprefix("head-"), task, block

    def losses(self, outputs: ByTask, labels: ByTask) -> dict[str, Tensor]:
        """The mean losses, unweighted, as `forward` names heads; without labels, none.

        Args:
            outputs: As `forward` returns them.
            labels: Of the one task, or by task: int64 ``(b,)`` for cross_entropy, else float32,
                shaped as the outputs.
        """
        outputs, labels = self._by_task(outputs), self._by_task(labels)
        check_known("labels", labels, self.tasks)
        return {
            key: LOSSES[self.tasks[task].loss](outputs[key], labels[task])
            for key, task, _ in self._heads()
            if task in labels
        }

    def loss(self, outputs: ByTask, labels: ByTask) -> Tensor:
        """What is minimized: the weighted sum over the heads' losses."""
        losses = self.losses(outputs, labels)
        weights = {key: self.tasks[task].weight for key, task, _ in self._heads()}
        return torch.stack([weights[key] * loss for key, loss in losses.items()]).sum()

    def _by_task(self, value: ByTask) -> Mapping[str, Tensor]:
        return dict.fromkeys(self.tasks, value) if isinstance(value, Tensor) else value

    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Value]:
        """By modality and block; encoders of absent modalities are left out, but for zeros."""
        check_known("inputs", inputs, self.examples)
        if not inputs:
            raise ModelError(f"no modality, the model has {', '.join(self.examples)}")
        some = next(iter(inputs.values()))
        there = [float(modality in inputs) for modality in self.examples]
        present = torch.tensor(there, device=some.device)  # of the default dtype
        present = present.expand(len(some), -1)
        values: dict[str, Value] = dict(inputs)
        for block in self._blocks:
            if block.kind == "encoder" and block.inputs[0] not in values:
                continue
            for name in block.inputs:
                if name not in values:
                    values[name] = self._zeros(name, present)
            try:
                values[block.name] = block(values, present)
            except Exception as error:  # whatever the user's own code raises
                raise ModelError(
                    f"block {block.name}: its forward pass fails: {error!r}"[:500]
                ) from error
            check_output(block, values[block.name], len(some))
        return values

    def _zeros(self, name: str, like: Tensor) -> Value:
        example = self.example_values[name]
        tensors = flatten(name, example).values()
        return unflatten(example, [like.new_zeros(len(like), *t.shape[1:]) for t in tensors])

    @torch.no_grad()
    def _run_examples(self) -> dict[str, Value]:
        with _modes_kept(self):
            return self.eval()._run({name: _own(x) for name, x in self.examples.items()})


def _own(example: Any) -> Any:
    """A copy, which a block may write to."""
    return example.detach().clone() if isinstance(example, Tensor) else example


@contextlib.contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    """Leaves every layer in the mode that it was in."""
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def _leaves(paths: str | Mapping[str, Any]) -> Iterator[str]:
    if isinstance(paths, str):
        yield paths
    else:
        for path in paths.values():
            yield from _leaves(path)


def _registered(what: str, given: Any) -> Any:
    """Mappings become modules, for state_dict's sake."""
    if isinstance(given, nn.Module):
        return given
    modules = nn.ModuleDict()
    for name, item in given.items():
        try:
            modules[name] = _registered(what, item)
        except KeyError as error:
            raise ModelError(f"{what} {name!r}: torch.nn.ModuleDict refuses the name") from error
    return modules


@torch.no_grad()
def _check_cut(
    model: BlockModel, module: nn.Module, call: Callable[[Any, dict[str, Tensor]], Any]
) -> None:
    modules = nn.ModuleList(block.module for block in model.blocks())
    owned = {*modules.parameters()}
    for path, parameter in module.named_parameters():
        if parameter not in owned:
            raise ModelError(f"parameter {path} belongs to no block; name a block that holds it")
    for layer in training_layers(module):
        if layer not in {*modules.modules()}:
            raise ModelError(f"{layer} belongs to no block, and would not act in training")
    with _modes_kept(module), _modes_kept(model):
        module.eval()
        model.eval()
        try:
            expected = call(module, {name: _own(x) for name, x in model.examples.items()})
        except Exception as error:  # whatever the user's own code raises
            raise ModelError(f"calling {type(module).__name__} fails: {error!r}"[:500]) from error
        found = model({name: _own(x) for name, x in model.examples.items()})
    if isinstance(found, Tensor):
        found, expected = {"": found}, {"": expected}
    elif isinstance(expected, (tuple, list)):
        expected = dict(zip(found, expected, strict=False))
    for task, output in found.items():
        _check_equal(task, output, expected.get(task) if isinstance(expected, dict) else expected)


def _check_equal(task: str, found: Tensor, expected: Any) -> None:
    what = f"the module's output {task}".rstrip()
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        shape = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        raise ModelError(f"{what} is {shape}, the blocks give {tuple(found.shape)}")
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:
        raise ModelError(
            f"{what} and that of its blocks differ by {error:.1e}: there is computation between "
            "the blocks that belongs to none of them; make it part of a submodule"
        )
