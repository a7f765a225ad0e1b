"""One block as ONNX graphs: inference, the training-mode forward pass, and its gradient.

PyTorch runs the block and its own autograd under a trace (`program`); the trace is cut into a
forward and a backward part and written as ONNX (`lowering`). All graphs take the block's
parameters and running statistics as one flat float32 vector, and the gradient is one flat vector,
too: a device trains, sends and stores a block as a single array.

What the backward part needs of the forward part leaves it as ``saved.0``, ``saved.1``, …: nothing
is computed twice but views, and both see the same dropout masks and batch statistics. A head's
graph is one: the loss follows its forward pass at once.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from petalfl.errors import ModelError
from petalfl.model import Dropout, Parameter

from .block import BlockSpec, flatten, unflatten
from .block import Value as Tree
from .checks import LOSSES
from .lowering import to_onnx
from .program import BATCH, Op, Program, Size, Unifier, Value, corners_of, is_view, trace
from .rewrites import (
    Mask,
    Rewrites,
    UnsupportedError,
    attention_in_python,
    statistics_of,
)

PARAMETERS, GRADIENT, STATISTICS, LABELS, LOSS = (
    "parameters", "gradient", "statistics", "labels", "loss",
)  # fmt: skip
PRESENT = "present"
BATCH_SIZE = Size(((1, (BATCH,)),))

# Besides views, cheaper to do again in the backward graph than to keep.
_CHEAP = ("aten.full", "aten.arange", "aten.scalar_tensor", "aten.flip")


@dataclass(frozen=True, slots=True)
class BlockGraphs:
    """What becomes of one block.

    Attributes:
        outputs: Shape and dtype of its outputs by name, with the batch.
        training_forward: None of a head, whose backward graph runs it, and of a frozen block.
        training_backward: None when neither it nor a block before it trains.
        vector: Initial values, flat float32: the parameters, then the running statistics.
        min_batch: Smallest batch that it can train on.
        num_flops: Of one example's forward pass, multiplications and additions both counted, in
            matrix products and convolutions.
        activation_bytes: What one example keeps between forward and backward pass.
    """

    outputs: dict[str, Value]
    eval_model: bytes
    training_forward: bytes | None
    training_backward: bytes | None
    vector: NDArray[np.float32]
    parameters: tuple[Parameter, ...]
    statistics: tuple[Parameter, ...]
    dropouts: tuple[Dropout, ...]
    min_batch: int
    num_flops: int
    activation_bytes: int


def build_graphs(
    spec: BlockSpec,
    inputs: Mapping[str, Value],
    examples: Mapping[str, Tree],
    *,
    num_modalities: int,
    differentiate_by: Collection[str],
    axes: Mapping[str, tuple[int, int]] | None = None,
) -> BlockGraphs:
    """Traces one block and its gradient.

    Args:
        spec: The block; its module is copied, not changed.
        inputs: Shape and dtype of every tensor that it takes, by name: its modality's, or the
            outputs of the blocks before it.
        examples: By the names in ``spec.inputs``: values that show how those tensors are nested.
        num_modalities: M, for ``present`` ``(b, M)``.
        differentiate_by: Names of the input tensors whose gradient goes on to a block before.
        axes: Two lengths to trace with, of every axis that may vary besides the batch.

    Raises:
        ModelError: The block cannot be exported exactly; says what and why.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            builder = _Builder(spec, inputs, examples, num_modalities, axes or {})
            return builder.build(differentiate_by)
    except UnsupportedError as error:
        raise ModelError(f"block {spec.name}: {error}") from error
    except ModelError:
        raise
    except Exception as error:  # PyTorch's own kinds, and what the user's code raises
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ModelError(f"block {spec.name}: PyTorch cannot trace it: {reason}"[:500]) from error


def input_names(spec: BlockSpec, examples: Mapping[str, Tree]) -> dict[str, tuple[str, ...]]:
    """By each of ``spec.inputs``: the names of its tensors."""
    return {name: tuple(flatten(name, examples[name])) for name in spec.inputs}


class _Builder:
    def __init__(
        self,
        spec: BlockSpec,
        inputs: Mapping[str, Value],
        examples: Mapping[str, Tree],
        num_modalities: int,
        axes: Mapping[str, tuple[int, int]],
    ) -> None:
        self._spec = spec
        self._axes = dict(axes)
        self._examples = examples
        self._tensor_names = input_names(spec, examples)
        self._inputs = {n: inputs[n] for names in self._tensor_names.values() for n in names}
        if spec.takes_present:
            self._inputs[PRESENT] = Value((BATCH_SIZE, num_modalities), torch.float32)
        self._module = _prepared(spec)
        self._tensors = dict(self._module.named_parameters()) | statistics_of(self._module)
        self._num_trainable = (
            0 if spec.is_frozen else sum(p.numel() for p in self._module.parameters())
        )
        size = sum(t.numel() for t in self._tensors.values())
        if size:
            self._inputs[PARAMETERS] = Value((size,), torch.float32)
        self._used = {axis: self._axes[axis] for axis in self._axes if self._varies_with(axis)}

    def build(self, differentiate_by: Collection[str]) -> BlockGraphs:
        dropouts, min_batch = self._dry_run()
        evaluation = trace(self._evaluate, self._zeros(self._inputs), self._used)
        outputs = {name: _type_of(evaluation, value) for name, value in evaluation.outputs.items()}
        forward, backward = self._training(outputs, dropouts, list(differentiate_by))
        return BlockGraphs(
            outputs=outputs,
            eval_model=self._lower(evaluation),
            training_forward=None if forward is None else self._lower(forward),
            training_backward=None if backward is None else self._lower(backward),
            vector=np.concatenate(
                [np.zeros(0, np.float32)]
                + [t.detach().numpy().ravel() for t in self._tensors.values()]
            ),
            parameters=_layout(self._module.named_parameters()),
            statistics=_layout(statistics_of(self._module).items()),
            dropouts=dropouts,
            min_batch=min_batch,
            num_flops=_num_flops(evaluation, self._axes),
            activation_bytes=_saved_bytes(backward, self._axes) if backward else 0,
        )

    def _lower(self, program: Program) -> bytes:
        data: bytes = to_onnx(self._spec.name, program).SerializeToString(deterministic=True)
        return data

    def _varies_with(self, axis: str) -> bool:
        return any(
            axis in names
            for value in self._inputs.values()
            for dim in value.shape
            if isinstance(dim, Size)
            for _, names in dim.terms
        )

    def _zeros(self, values: Mapping[str, Value]) -> Any:
        def make(lengths: dict[str, int]) -> dict[str, Tensor]:
            return {
                name: torch.zeros(
                    [d if isinstance(d, int) else d.at(lengths) for d in value.shape],
                    dtype=value.dtype,
                )
                for name, value in values.items()
            }

        return make

    def _call(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The block's outputs by name, and its parameters and statistics as they were used."""
        own = self._cut(tensors[PARAMETERS]) if PARAMETERS in tensors else {}
        values = {
            name: unflatten(self._examples[name], [tensors[n] for n in names])
            for name, names in self._tensor_names.items()
        }
        spec = dataclasses.replace(self._spec, module=_WithTensors(self._module, own))
        return flatten(self._spec.name, spec(values, tensors.get(PRESENT))), own

    def _cut(self, vector: Tensor) -> dict[str, Tensor]:
        parts = torch.split(vector, [t.numel() for t in self._tensors.values()])
        return {
            name: part.view(t.shape)
            for (name, t), part in zip(self._tensors.items(), parts, strict=True)
        }

    def _evaluate(self, **tensors: Tensor) -> dict[str, Tensor]:
        self._module.eval()
        with torch.no_grad(), attention_in_python(), Rewrites() as rewrites:
            outputs = self._call(tensors)[0]
        if rewrites.dropouts:
            raise UnsupportedError(
                "dropout is active in evaluation, too; pass training=self.training to it"
            )
        return outputs

    def _dry_run(self) -> tuple[tuple[Dropout, ...], int]:
        """Runs the training mode at several lengths.

        Returns:
            The dropouts that act in it, and the smallest batch that it can train on.
        """
        layers = any(isinstance(layer, _DropoutNd) for layer in self._module.modules())
        if not self._tensors and not layers and self._noted({BATCH: 2}, is_training=True).dropouts:
            raise UnsupportedError(
                "it has no parameters and so is frozen, which switches its dropout off; move that "
                "to a block that trains"
            )
        corners = corners_of({BATCH: (2, 3)} | self._used)
        self._check_state(corners[0])
        runs = [self._noted(corner) for corner in corners]
        if len({len(run.dropouts) for run in runs}) > 1:
            raise UnsupportedError("the number of dropouts depends on a length")
        unify = Unifier(corners)
        dropouts = [
            _dropout(f"mask.{i}", unify([shape for shape, _ in same]), same[0][1])
            for i, same in enumerate(zip(*(run.dropouts for run in runs), strict=True))
        ]
        return tuple(dropouts), 2 if runs[0].needs_two else 1

    def _check_state(self, lengths: dict[str, int]) -> None:
        """Two runs must leave the same behind: a cache may fill, but nothing may move on."""
        generators = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        self._noted(lengths)
        before = _attributes(self._module)
        self._noted(lengths, fill=1)
        for name, value in _attributes(self._module).items():
            if name not in before or not _is_same(before[name], value):
                raise UnsupportedError(
                    f"attribute {name} changes in the forward pass; a graph keeps no state"
                )
        if generators != (
            random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
        ):  # fmt: skip
            raise UnsupportedError(
                "the forward pass draws random numbers; nn.Dropout is all that may"
            )

    def _noted(
        self, lengths: dict[str, int], is_training: bool | None = None, fill: int = 0
    ) -> Rewrites:
        """A run on zeros, or on ``fill``; refused if it writes a buffer besides the statistics."""
        self._module.train(not self._spec.is_frozen if is_training is None else is_training)
        lengths = {axis: pair[0] for axis, pair in self._axes.items()} | lengths
        before = {name: b.clone() for name, b in self._module.named_buffers()}
        rewrites = Rewrites()
        with torch.no_grad(), attention_in_python(), rewrites:
            inputs = self._zeros(self._inputs)(lengths)
            self._call({n: x + fill if x.is_floating_point() else x for n, x in inputs.items()})
        for name, buffer in self._module.named_buffers():
            if not torch.equal(buffer, before[name]):
                raise UnsupportedError(
                    f"buffer {name} is written in the forward pass; only the running averages of "
                    "batch norm can be"
                )
        return rewrites

    def _training(
        self, outputs: dict[str, Value], dropouts: Sequence[Dropout], differentiate_by: list[str]
    ) -> tuple[Program | None, Program | None]:
        """Forward and backward programs, each where there is one."""
        spec = self._spec
        trains = self._num_trainable > 0
        if not trains and not differentiate_by:
            return None, None
        inputs = self._inputs | {d.name: _mask(d) for d in dropouts}
        if spec.task is not None:
            (output,) = outputs.values()
            inputs[LABELS] = (
                Value((BATCH_SIZE,), torch.int64) if spec.task.loss == "cross_entropy" else output
            )
        else:
            inputs |= {f"d_{name}": value for name, value in outputs.items()}

        def run(**tensors: Tensor) -> dict[str, Tensor]:
            return self._differentiate(tensors, dropouts, differentiate_by)

        joint = trace(run, self._zeros(inputs), self._used)
        gradients = {
            name: value
            for name, value in joint.outputs.items()
            if name.startswith("d_") or name in (GRADIENT, LOSS)
        }
        rest = {name: value for name, value in joint.outputs.items() if name not in gradients}
        if spec.task is not None:
            return None, joint.restricted_to(gradients | _only(rest, STATISTICS), {})
        if spec.is_frozen:
            return None, joint.restricted_to(gradients, {})
        return _partition(joint, rest, gradients)

    def _differentiate(
        self,
        tensors: dict[str, Tensor],
        dropouts: Sequence[Dropout],
        differentiate_by: list[str],
    ) -> dict[str, Tensor]:
        for name in [PARAMETERS] * (self._num_trainable > 0) + differentiate_by:
            tensors[name] = tensors[name].detach().requires_grad_()
        self._module.train(not self._spec.is_frozen)
        # Not the leaves themselves, which a block that begins in place may not write to.
        given = {n: t.clone() if n in differentiate_by else t for n, t in tensors.items()}
        masks = [Mask(tensors[d.name], d.batch_axis) for d in dropouts]
        with attention_in_python(), Rewrites(masks) as rewrites:
            found, own = self._call(given)
        results = {name: value.detach() for name, value in found.items()}
        if task := self._spec.task:
            (output,) = found.values()
            targets = [_mean_loss(task.loss, output, tensors[LABELS])]
            results[LOSS] = targets[0].detach()
            upstream: list[Tensor | None] = [None]
        else:
            if missing := [name for name in found if f"d_{name}" not in tensors]:
                raise UnsupportedError(f"output {missing[0]} is there in training alone")
            reached = {name: value for name, value in found.items() if value.requires_grad}
            targets = list(reached.values())
            upstream = [tensors[f"d_{name}"] for name in reached]
        if not any(t.requires_grad for t in targets):
            raise UnsupportedError("no output depends on a parameter or on another block's output")
        trained = {n: own[n] for n, _ in self._module.named_parameters() if self._num_trainable}
        wanted = [*trained.values(), *(tensors[n] for n in differentiate_by)]
        found_gradients = torch.autograd.grad(targets, wanted, upstream, allow_unused=True)
        for name, gradient in zip(trained, found_gradients, strict=False):
            if gradient is None:
                raise UnsupportedError(f"parameter {name} is not used in the forward pass")
        gradients = [
            torch.zeros_like(x) if g is None else g
            for x, g in zip(wanted, found_gradients, strict=True)
        ]
        if trained:
            flat = [g.reshape(-1) for g in gradients[: len(trained)]]
            results[GRADIENT] = torch.cat(flat) if len(flat) > 1 else flat[0]
        for name, gradient in zip(differentiate_by, gradients[len(trained) :], strict=True):
            results[f"d_{name}"] = gradient
        statistics = statistics_of(self._module)
        if statistics and self._num_trainable:
            new = [rewrites.statistics.get(id(own[n]), own[n]).detach() for n in statistics]
            results[STATISTICS] = torch.cat(new)
        return results


def _dropout(name: str, acts_on: tuple[int | Size, ...], rate: float) -> Dropout:
    """A dropout whose mask has the batch first, wherever in ``acts_on`` it is."""
    dims: list[int | None] = []
    varying: list[str] = []
    batch_axis = -1
    for axis, dim in enumerate(acts_on):
        if isinstance(dim, int):
            dims.append(dim)
            continue
        (times, axes), *others = dim.terms
        if others or len(axes) != 1 or (axes[0] == BATCH and batch_axis >= 0):
            raise UnsupportedError("a dropout acts on a tensor whose axes mix lengths that vary")
        if axes[0] == BATCH:
            batch_axis = axis
            dims += [] if times == 1 else [times]
        elif times == 1:
            dims.append(None)
            varying.append(axes[0])
        else:
            raise UnsupportedError(f"a dropout acts on {times} times the length of {axes[0]}")
    if rate >= 1:
        raise UnsupportedError(f"a dropout of {rate:g} leaves nothing")
    if batch_axis < 0:
        raise UnsupportedError(f"a dropout acts on {acts_on}, which has no batch in it")
    return Dropout(name, tuple(dims), rate, tuple(varying), batch_axis)


def _mask(dropout: Dropout) -> Value:
    varying = iter(dropout.varying)
    dims = (Size(((1, (next(varying),)),)) if d is None else d for d in dropout.shape)
    return Value((BATCH_SIZE, *dims), torch.float32)


def _only(values: dict[str, str], name: str) -> dict[str, str]:
    return {name: values[name]} if name in values else {}


class _WithTensors(nn.Module):
    """Calls a module with its parameters and statistics replaced."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._called = (module,)  # in a tuple, so that it is not registered
        self._own = tensors

    def forward(self, *args: Any) -> Any:
        return torch.func.functional_call(self._called[0], self._own, args)


def _prepared(spec: BlockSpec) -> nn.Module:
    """A copy that writes nothing in place of its own accord."""
    module = copy.deepcopy(spec.module).requires_grad_(False)
    for name, tensor in module.named_parameters():
        if not torch.isfinite(tensor).all():
            raise UnsupportedError(f"parameter {name} holds NaN or infinity")
    for layer in module.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            raise UnsupportedError("SyncBatchNorm is for several processes; use BatchNorm")
        if isinstance(layer, nn.TransformerEncoder) and layer.use_nested_tensor:
            layer.register_forward_pre_hook(_refuse_nested, with_kwargs=True)
    for path, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats:
            if layer.momentum is None and not spec.is_frozen:
                raise UnsupportedError(
                    f"layer {path} ({type(layer).__name__}) has momentum=None, an average over all "
                    "steps ever made; give it a momentum"
                )
            layer.num_batches_tracked = None
    return module


def _refuse_nested(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None) is not None:
        raise UnsupportedError(
            "nn.TransformerEncoder with a padding mask zeros what is padding in evaluation alone; "
            "pass enable_nested_tensor=False to it"
        )


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What the user's code may have put into the layers, besides what PyTorch keeps there."""
    return {
        f"{path}.{name}" if path else name: copy.copy(value)
        for path, layer in module.named_modules()
        for name, value in vars(layer).items()
        if name not in _OWN and not name.startswith("__")
    }


_OWN = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, the mode


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    try:
        return a is b or type(a) is not type(b) or bool(a == b)
    except Exception:  # whatever does not compare
        return True


def _type_of(program: Program, name: str) -> Value:
    for op in program.ops:
        if op.name == name:
            assert op.dtype is not None  # an output is one tensor
            return Value(op.shape, op.dtype)
    return program.inputs[name]


def _layout(tensors: Any) -> tuple[Parameter, ...]:
    return tuple(Parameter(name, tuple(t.shape)) for name, t in tensors)


def _mean_loss(loss: str, output: Tensor, labels: Tensor) -> Tensor:
    if loss == "cross_entropy":  # by comparison: a gather's gradient would be a scatter
        classes = torch.arange(output.shape[1])
        is_label = labels.unsqueeze(1) == classes
        # Chosen, not multiplied: a class may be masked by a logit of minus infinity.
        return -torch.where(is_label, output.log_softmax(1), 0.0).sum() / output.shape[0]
    if loss == "mse":  # PyTorch's own gradient multiplies by 2 / n, which is no product of lengths
        return (output - labels).square().mean()
    return LOSSES[loss](output, labels)


def _partition(
    joint: Program, outputs: dict[str, str], gradients: dict[str, str]
) -> tuple[Program, Program]:
    """Cuts a joint program where the backward part first needs a result of the forward part."""
    made = {op.name: op for op in joint.ops}
    forward_names = {op.name for op in joint.restricted_to(outputs, {}).ops}
    forward_names |= {
        op.name
        for op in joint.ops
        if op.target == "getitem" and op.arguments[0].name in forward_names
    }
    for op in joint.ops:  # one tensor to keep instead of its many parts
        if op.target.startswith("aten.cat") and forward_names.issuperset(op.refs()):
            forward_names.add(op.name)
    saved: dict[str, Value] = {}

    def save(name: str) -> None:
        if name not in forward_names or name in saved:
            return
        op = made[name]
        if _is_view(op, made):
            for source in op.refs():
                save(source)
        else:
            assert op.dtype is not None  # only a tensor is a value
            saved[name] = Value(op.shape, op.dtype)

    backward = joint.restricted_to(gradients, {})
    for op in backward.ops:
        if op.name not in forward_names:
            for source in op.refs():
                save(source)
    for value in gradients.values():
        save(value)
    labels = {name: f"saved.{i}" for i, name in enumerate(saved)}
    forward = joint.restricted_to(outputs | {labels[n]: n for n in saved}, {})
    return forward, joint.restricted_to(gradients, saved).renamed(labels)


def _is_view(op: Op, made: Mapping[str, Op]) -> bool:
    if op.target == "getitem":
        return _is_view(made[op.arguments[0].name], made)
    return is_view(op.target) or op.target.startswith(_CHEAP)


def _num_flops(program: Program, axes: Mapping[str, tuple[int, int]]) -> int:
    """Of one example, at the shorter lengths of the axes that may vary."""
    shapes = {n: v.shape for n, v in program.inputs.items()}
    shapes |= {n: c.shape for n, c in program.constants.items()}
    shapes |= {op.name: op.shape for op in program.ops}
    total = 0
    for op in program.ops:
        inner = 0
        if op.target in ("aten.mm.default", "aten.bmm.default"):
            inner = _at_one(shapes[op.arguments[0].name][-1:], axes)
        elif op.target == "aten.addmm.default":
            inner = _at_one(shapes[op.arguments[1].name][-1:], axes)
        elif op.target == "aten.convolution.default":
            weight = shapes[op.arguments[1].name]
            inner = _at_one(weight[1:], axes)  # of a transposed one, too: per element read
            if op.arguments[6]:
                total += 2 * _at_one(shapes[op.arguments[0].name], axes) * inner
                continue
        total += 2 * _at_one(op.shape, axes) * inner
    return total


def _saved_bytes(backward: Program, axes: Mapping[str, tuple[int, int]]) -> int:
    return sum(
        _at_one(value.shape, axes) * value.dtype.itemsize
        for name, value in backward.inputs.items()
        if name.startswith("saved.")
    )


def _at_one(shape: Sequence[int | Size], axes: Mapping[str, tuple[int, int]]) -> int:
    lengths = {BATCH: 1} | {axis: pair[0] for axis, pair in axes.items()}
    return math.prod(d if isinstance(d, int) else d.at(lengths) for d in shape)
