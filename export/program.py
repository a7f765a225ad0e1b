"""A traced computation: PyTorch's operators in order, sizes as functions of the batch length.

A function is traced twice, with batches of two lengths (and with two lengths of every other axis
that may vary). Where the traces differ in a number, that number depends on the lengths, and how is
solved from the values: it must be a sum of products of them. Nothing is assumed of the operators,
as it would be with symbolic shapes, on which many of PyTorch's own decompositions insist on a
number.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from .decompositions import decomposition_table
from .rewrites import UnsupportedError

BATCH = "batch"
_LENGTHS = (61, 64)  # of the batch, in the two traces: odd and even, and unlike most others


@dataclass(frozen=True, slots=True)
class Size:
    """A length that depends on others: the sum of coefficient × product of the named axes."""

    terms: tuple[tuple[int, tuple[str, ...]], ...]

    def at(self, lengths: dict[str, int]) -> int:
        """The value for these lengths of the axes."""
        return sum(c * math.prod(lengths[name] for name in names) for c, names in self.terms)


@dataclass(frozen=True, slots=True)
class Ref:
    """A value: the result of an operation, or an input or a constant, by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Op:
    """One operator's call.

    Attributes:
        target: Its name in PyTorch, e.g. ``aten.mul.Tensor``, or ``getitem``.
        arguments: Nested tuples of `Ref`, `Size` and plain values; keyword arguments as pairs.
        shape: Of the result; empty for an operator with several.
    """

    name: str
    target: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    shape: tuple[int | Size, ...]
    dtype: torch.dtype | None

    def refs(self) -> Iterator[str]:
        """Names of the values that it reads."""
        yield from _refs((self.arguments, self.keywords))


@dataclass(frozen=True, slots=True)
class Value:
    """Shape and dtype of an input or a constant."""

    shape: tuple[int | Size, ...]
    dtype: torch.dtype


@dataclass(slots=True)
class Program:
    """Straight-line code.

    Attributes:
        outputs: By the outputs' names: those of values.
        available: What was an input of the trace, and is one here only if it is read.
    """

    inputs: dict[str, Value]
    constants: dict[str, NDArray[Any]]
    ops: list[Op]
    outputs: dict[str, str] = field(default_factory=dict)
    available: dict[str, Value] = field(default_factory=dict)

    def restricted_to(self, outputs: dict[str, str], given: dict[str, Value]) -> Program:
        """What computes ``outputs`` when the values in ``given`` come from outside."""
        needed = set(outputs.values()) - given.keys()
        ops: list[Op] = []
        for op in reversed(self.ops):
            if op.name in needed and op.name not in given:
                ops.append(op)
                needed |= set(op.refs()) - given.keys()
        read = needed | {r for op in ops for r in op.refs()} | set(outputs.values())
        every_input = self.inputs | given
        return Program(
            {n: v for n, v in every_input.items() if n in read},
            {n: c for n, c in self.constants.items() if n in read},
            ops[::-1],
            outputs,
            self.available | self.inputs,
        )

    def renamed(self, names: dict[str, str]) -> Program:
        """The same with some inputs called otherwise."""
        aliases = {name: names.get(name, name) for name in self._values()}
        ops = [
            dataclasses.replace(
                op,
                arguments=_renamed(op.arguments, aliases),
                keywords=_renamed(op.keywords, aliases),
            )
            for op in self.ops
        ]
        inputs = {aliases[name]: value for name, value in self.inputs.items()}
        outputs = {name: aliases[value] for name, value in self.outputs.items()}
        return Program(inputs, self.constants, ops, outputs, self.available)

    def _values(self) -> list[str]:
        return [*self.inputs, *self.constants, *(op.name for op in self.ops)]


def trace(
    function: Callable[..., dict[str, Tensor]],
    make_inputs: Callable[[dict[str, int]], dict[str, Tensor]],
    axes: dict[str, tuple[int, int]],
) -> Program:
    """Traces ``function(**make_inputs(lengths))``.

    Args:
        function: Takes tensors and returns tensors by name; may call `torch.autograd.grad`.
        make_inputs: Gives inputs for these lengths of the axes.
        axes: Two lengths to trace with, of every axis that may vary besides the batch.

    Raises:
        UnsupportedError: An operation depends on a length in a way that cannot be exported.
    """
    lengths = {BATCH: _LENGTHS} | axes
    corners = corners_of(lengths)
    graphs: list[fx.GraphModule] = []
    names: list[str] = []
    constants: dict[str, NDArray[Any]] = {}
    for corner in corners:
        inputs = make_inputs(corner)
        module, names = _trace_once(function, inputs)
        graphs.append(module)
    module = graphs[0]
    nodes = [list(g.graph.nodes) for g in graphs]
    if len({len(n) for n in nodes}) > 1:
        raise UnsupportedError(f"the number of operations depends on {_varying(axes)}")
    unify = Unifier(corners)
    program = Program({}, constants, [])
    input_names = iter(inputs)
    aliases: dict[str, str] = {}
    views = _Views({}, set())
    for same in zip(*nodes, strict=True):
        _add(program, unify, same, graphs, input_names, aliases, views)
    _check_stale(same[0], views)
    output = same[0].args[0]
    program.outputs = {name: aliases[node.name] for name, node in zip(names, output, strict=True)}
    return _without_repetition(program)


def corners_of(lengths: dict[str, tuple[int, int]]) -> list[dict[str, int]]:
    """Every combination of the two lengths of each axis."""
    return [dict(zip(lengths, c, strict=True)) for c in itertools.product(*lengths.values())]


def _varying(axes: dict[str, tuple[int, int]]) -> str:
    return "the length of " + (" or ".join(axes) if axes else "the batch")


def _trace_once(
    function: Callable[..., dict[str, Tensor]], inputs: dict[str, Tensor]
) -> tuple[fx.GraphModule, list[str]]:
    names: list[str] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        result = function(**dict(zip(inputs, tensors, strict=True)))
        names.extend(result)
        return list(result.values())

    traced = make_fx(flat, decomposition_table(), tracing_mode="fake", _allow_non_fake_inputs=True)(
        *inputs.values()
    )
    return traced, names


def _add(
    program: Program,
    unify: Unifier,
    same: Sequence[fx.Node],
    graphs: Sequence[fx.GraphModule],
    input_names: Iterator[str],
    aliases: dict[str, str],
    views: _Views,
) -> None:
    """Adds what all traces have at one place."""
    node = same[0]
    if node.op == "placeholder":
        name = next(input_names)
        aliases[node.name] = name
        program.inputs[name] = Value(unify(_shapes(same)), node.meta["val"].dtype)
    elif node.op == "get_attr":
        values = [_attribute(g, n) for g, n in zip(graphs, same, strict=True)]
        if any(v.shape != values[0].shape or not torch.equal(v, values[0]) for v in values):
            raise UnsupportedError("a constant table depends on a length that may vary")
        aliases[node.name] = _own_name(node)
        program.constants[_own_name(node)] = values[0].detach().numpy()
    elif node.op == "call_function":
        if len({str(n.target) for n in same}) > 1:
            raise UnsupportedError(f"which operator runs depends on a length: {node.target}")
        arguments = _renamed(unify([n.args for n in same]), aliases)
        keywords = _renamed(unify([tuple(sorted(n.kwargs.items())) for n in same]), aliases)
        target = "getitem" if "getitem" in str(node.target) else str(node.target)
        value = node.meta.get("val")
        _check_aliases(node, target, views)
        if _is_identity(target, arguments):
            aliases[node.name] = arguments[0].name
            return
        aliases[node.name] = _own_name(node)
        shape = unify(_shapes(same)) if isinstance(value, Tensor) else ()
        dtype = value.dtype if isinstance(value, Tensor) else None
        program.ops.append(Op(_own_name(node), target, arguments, keywords, shape, dtype))


class _Views(NamedTuple):
    """Which tensors share memory, and which of them have been overwritten since."""

    roots: dict[str, str]
    stale: set[str]


def _check_stale(node: fx.Node, views: _Views) -> None:
    """Refuses what reads a tensor after a part of it was written in place: values do not change."""
    if any(source.name in views.stale for source in node.all_input_nodes):
        raise UnsupportedError(
            "a tensor is read after a part of it was written in place; make a new one with "
            "torch.cat, torch.stack or torch.where"
        )


def _check_aliases(node: fx.Node, target: str, views: _Views) -> None:
    """Keeps account of views, and of what an operator in place has made of them."""
    _check_stale(node, views)
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return
    root = views.roots.get(first.name, first.name)
    if is_view(target) or target.startswith(("aten.alias", "aten.detach")):
        views.roots[node.name] = root
    elif target.split(".")[-2:-1] and target.split(".")[-2].endswith("_"):
        views.stale.update(n for n, r in views.roots.items() if r == root)
        views.stale.add(root)


_VIEWS = ("aten.view", "aten.permute", "aten.transpose", "aten.t.", "aten.unsqueeze",
          "aten.squeeze", "aten.expand", "aten.slice.", "aten.select.", "aten.split",
          "aten._unsafe_view", "aten.diagonal", "aten.as_strided", "aten.unfold")  # fmt: skip


def is_view(target: str) -> bool:
    """Whether an operator moves or repeats what is there, and computes nothing."""
    return target.startswith(_VIEWS) or target == "getitem"


_IDENTITIES = ("aten.alias", "aten.detach", "aten.clone", "aten.lift_fresh", "aten.contiguous")


def _is_identity(target: str, arguments: tuple[Any, ...]) -> bool:
    return target.startswith(_IDENTITIES) and isinstance(arguments[0], Ref)


def _own_name(node: fx.Node) -> str:
    """No input is called so: names of modalities and blocks start with a letter or digit."""
    return f"_{node.name}"


def _shapes(nodes: Sequence[fx.Node]) -> list[tuple[int, ...]]:
    return [tuple(n.meta["val"].shape) for n in nodes]


def _attribute(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


class Unifier:
    """Finds what the same place of several traces holds, as a function of the lengths.

    Called with one value per corner: numbers, tuples of them, or nodes of a trace.
    """

    def __init__(self, corners: Sequence[dict[str, int]]) -> None:
        names = list(corners[0])
        self._monomials = [
            subset for n in range(len(names) + 1) for subset in itertools.combinations(names, n)
        ]
        self._varying = " or ".join(f"the length of {name}" for name in names)
        self._matrix = np.array(
            [[math.prod(c[name] for name in m) for m in self._monomials] for c in corners], float
        )

    def __call__(self, values: Sequence[Any]) -> Any:
        """What all the values are, with a `Size` where numbers differ."""
        first = values[0]
        if isinstance(first, fx.Node):
            return Ref(first.name)
        if isinstance(first, (tuple, list, torch.Size)):
            if len({len(v) for v in values}) > 1:
                raise UnsupportedError("the number of arguments depends on a length")
            return tuple(self(items) for items in zip(*values, strict=True))
        if all(type(v) is type(first) and v == first for v in values):
            return first
        if isinstance(first, (int, float)) and not isinstance(first, bool):
            return self._solve(values)
        raise UnsupportedError(f"an argument depends on a length: {first!r} or {values[-1]!r}")

    def _solve(self, values: Sequence[float]) -> Size:
        coefficients = np.linalg.solve(self._matrix, np.array(values, float))
        rounded = np.round(coefficients)
        if np.abs(coefficients - rounded).max() > 1e-6:
            raise UnsupportedError(
                f"a number depends on {self._varying} otherwise than as a sum of products: it is "
                f"{values[0]} and {values[-1]}; compute with tensors, or fix that length"
            )
        terms = zip(rounded.astype(int).tolist(), self._monomials, strict=True)
        return Size(tuple((c, m) for c, m in terms if c))


def _renamed(value: Any, aliases: dict[str, str]) -> Any:
    if isinstance(value, Ref):
        return Ref(aliases[value.name])
    return tuple(_renamed(v, aliases) for v in value) if isinstance(value, tuple) else value


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, tuple):
        for item in value:
            yield from _refs(item)


def _without_repetition(program: Program) -> Program:
    """Computes what occurs twice once, and drops what no output needs."""
    seen: dict[Any, str] = {}
    aliases = {name: name for name in [*program.inputs, *program.constants]}
    ops = []
    for op in program.ops:
        arguments, keywords = _renamed(op.arguments, aliases), _renamed(op.keywords, aliases)
        key = (op.target, _hashable(arguments), _hashable(keywords))
        aliases[op.name] = seen.setdefault(key, op.name)
        if aliases[op.name] == op.name:
            ops.append(Op(op.name, op.target, arguments, keywords, op.shape, op.dtype))
    outputs = {name: aliases[value] for name, value in program.outputs.items()}
    short = Program(program.inputs, program.constants, ops)
    return short.restricted_to(outputs, {})


def _hashable(value: Any) -> Any:
    """Types count, too: 1, 1.0 and True are equal, but no the same argument."""
    return tree_map(lambda v: (type(v).__name__, str(v)), value)
