"""Operators that move, cut, repeat and index."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..program import Op, Ref
from ..rewrites import UnsupportedError
from .writer import Dim, GraphWriter, lowers

END = np.iinfo(np.int64).max


@lowers("view.default", "reshape.default", "_unsafe_view.default")
def _view(g: GraphWriter, op: Op, x: Any, shape: Any) -> None:
    g.same(op, g.reshape(g.value(x), op.shape))


@lowers("permute.default")
def _permute(g: GraphWriter, op: Op, x: Any, dims: Any) -> None:
    order = [g.axis(x, d) for d in dims]
    if order == sorted(order):
        g.same(op, g.value(x))
    else:
        g.put(op, "Transpose", [g.value(x)], perm=order)


@lowers("t.default", "transpose.int")
def _transpose(g: GraphWriter, op: Op, x: Any, a: int = 0, b: int = -1) -> None:
    order = list(range(g.rank(x)))
    if len(order) > 1:
        a, b = g.axis(x, a), g.axis(x, b)
        order[a], order[b] = order[b], order[a]
    _permute(g, op, x, order)


@lowers("unsqueeze.default")
def _unsqueeze(g: GraphWriter, op: Op, x: Any, dim: int) -> None:
    at = dim % (g.rank(x) + 1)
    g.put(op, "Unsqueeze", [g.value(x), g.constant([at], np.int64)])


@lowers("squeeze.dims", "squeeze.dim", "squeeze.default")
def _squeeze(g: GraphWriter, op: Op, x: Any, dims: Any = None) -> None:
    wanted = [] if dims == () else g.axes(x, dims)
    axes = [a for a in wanted if g.shape(x)[a] == 1]
    if axes:
        g.put(op, "Squeeze", [g.value(x), g.constant(axes, np.int64)])
    else:
        g.same(op, g.value(x))


@lowers("expand.default")
def _expand(g: GraphWriter, op: Op, x: Any, shape: Any, implicit: bool = False) -> None:
    before = (1,) * (len(op.shape) - g.rank(x)) + g.shape(x)
    if before == op.shape:
        g.same(op, g.reshape(g.value(x), op.shape) if g.rank(x) < len(op.shape) else g.value(x))
        return
    # A 1 keeps the length that is there: no length need be known that does not change.
    dims = [1 if old == new else new for old, new in zip(before, op.shape, strict=True)]
    g.put(op, "Expand", [g.value(x), g.sizes(dims)])


@lowers("copy.default")
def _copy(g: GraphWriter, op: Op, x: Any, source: Any, *rest: Any) -> None:
    """Also in place, of a whole tensor; the law catches a copy into a part of another."""
    value = g.value(source, op.dtype)
    if isinstance(source, Ref) and g.shape(source) == op.shape:
        g.same(op, value)
    else:
        g.put(op, "Expand", [value, g.sizes(op.shape)])


@lowers("cat.default")
def _cat(g: GraphWriter, op: Op, tensors: Any, dim: int = 0) -> None:
    parts = [t for t in tensors if g.shape(t) != (0,)]
    if len(parts) == 1:
        g.same(op, g.value(parts[0], op.dtype))
    else:
        axis = dim % len(op.shape)
        g.put(op, "Concat", [g.value(t, op.dtype) for t in parts], axis=axis)


@lowers("stack.default")
def _stack(g: GraphWriter, op: Op, tensors: Any, dim: int = 0) -> None:
    axis = dim % len(op.shape)
    at = g.constant([axis], np.int64)
    parts = [g.node("Unsqueeze", [g.value(t), at]) for t in tensors]
    g.put(op, "Concat", parts, axis=axis)


@lowers("slice.Tensor")
def _slice(
    g: GraphWriter, op: Op, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> None:
    axis = g.axis(x, dim)
    size = g.shape(x)[axis]
    start = 0 if start is None else start
    end = END if end is None or end == size else end
    if isinstance(end, int) and isinstance(size, int) and end >= size:
        end = END
    if (start, end, step) == (0, END, 1):
        g.same(op, g.value(x))
        return
    source, cuts = g.slices.get(g.value(x), (g.value(x), {}))
    if axis in cuts:
        source, cuts = g.value(x), {}
    cuts = {**cuts, axis: (start, end, step)}  # several axes in one node
    starts, ends, steps = (g.sizes(v) for v in zip(*cuts.values(), strict=True))
    g.put(op, "Slice", [source, starts, ends, g.sizes(list(cuts)), steps])
    g.slices[op.name] = source, cuts


@lowers("select.int")
def _select(g: GraphWriter, op: Op, x: Any, dim: int, index: Any) -> None:
    at = g.value(index, torch.int64)
    g.put(op, "Gather", [g.value(x), at], axis=g.axis(x, dim))


@lowers("index_select.default")
def _index_select(g: GraphWriter, op: Op, x: Any, dim: int, index: Any) -> None:
    g.put(op, "Gather", [g.value(x), g.value(index)], axis=g.axis(x, dim))


@lowers("split_with_sizes.default", "split.Tensor")
def _split(g: GraphWriter, op: Op, x: Any, sizes: Any, dim: int = 0) -> None:
    if op.target == "aten.split.Tensor":
        raise UnsupportedError("split of an axis whose length may vary")
    outputs = [f"{op.name}.{i}" for i in range(len(sizes))]
    if len(sizes) == 1:
        g.names[op.name] = [g.value(x)]
        return
    axis = g.axis(x, dim)
    g.names[op.name] = g.nodes("Split", [g.value(x), g.sizes(sizes)], outputs, axis=axis)


@lowers("getitem")
def _getitem(g: GraphWriter, op: Op, x: Any, index: int) -> None:
    g.same(op, g.names[x.name][index])


@lowers("constant_pad_nd.default")
def _pad(g: GraphWriter, op: Op, x: Any, widths: Any, value: float = 0.0) -> None:
    rank, n = g.rank(x), len(widths) // 2
    before, after = [0] * rank, [0] * rank
    for i in range(n):
        before[rank - 1 - i], after[rank - 1 - i] = widths[2 * i], widths[2 * i + 1]
    inputs = [g.value(x), g.sizes([*before, *after]), g.value(value, op.dtype)]
    g.put(op, "Pad", inputs, mode="constant")


@lowers("flip.default")
def _flip(g: GraphWriter, op: Op, x: Any, dims: Any) -> None:
    axes = g.axes(x, dims) if dims else []
    n = len(axes)
    at = [g.constant(v, np.int64) for v in ([-1] * n, [-END] * n, axes, [-1] * n)]
    g.put(op, "Slice", [g.value(x), *at])


@lowers("gather.default")
def _gather(
    g: GraphWriter, op: Op, x: Any, dim: int, index: Any, sparse_grad: bool = False
) -> None:
    g.put(op, "GatherElements", [g.value(x), g.value(index)], axis=g.axis(x, dim))


@lowers("scatter_add.default")
def _scatter_add(g: GraphWriter, op: Op, x: Any, dim: int, index: Any, source: Any) -> None:
    inputs = [g.value(x), g.value(index), g.value(source)]
    g.put(op, "ScatterElements", inputs, axis=g.axis(x, dim), reduction="add")


@lowers("scatter.src", "scatter.value")
def _scatter(g: GraphWriter, op: Op, x: Any, dim: int, index: Any, source: Any) -> None:
    if not isinstance(source, Ref):
        shape = g.node("Shape", [g.value(index)])
        updates = g.node("Expand", [g.value(source, op.dtype), shape])
    else:
        updates = g.value(source)
    inputs = [g.value(x), g.value(index), updates]
    g.put(op, "ScatterElements", inputs, axis=g.axis(x, dim))


@lowers("embedding.default")
def _embedding(g: GraphWriter, op: Op, weight: Any, indices: Any, *rest: Any) -> None:
    g.put(op, "Gather", [g.value(weight), g.value(indices)], axis=0)


@lowers("index.Tensor", "_unsafe_index.Tensor")
def _index(g: GraphWriter, op: Op, x: Any, indices: Any) -> None:
    axes = _indexed_axes(g, op, indices)
    if len(axes) == 1:
        index = g.value(indices[axes[0]], torch.int64)
        g.put(op, "Gather", [g.value(x), index], axis=axes[0])
        return
    order, width = _front(g, x, axes), len(_index_shape(g, indices))
    value = g.node("Transpose", [g.value(x)], perm=order)
    found = g.node("GatherND", [value, _coordinates(g, indices)])
    # The indices' axes are in front; they belong where the first indexed axis was.
    before = axes[0]
    back = [*range(width, width + before), *range(width), *range(width + before, len(op.shape))]
    g.put(op, "Transpose", [found], perm=back)


@lowers("index_put.default", "_index_put_impl.default")
def _index_put(
    g: GraphWriter, op: Op, x: Any, indices: Any, values: Any, accumulate: bool = False, *rest: Any
) -> None:
    axes = _indexed_axes(g, op, indices)
    order, shape = _front(g, x, axes), _index_shape(g, indices)
    width, before = len(shape), axes[0]
    updates = g.value(values, op.dtype)
    rank = width + g.rank(x) - len(axes)
    target = [*_rest(g, x, axes)[:before], *shape, *_rest(g, x, axes)[before:]]
    if g.shape(values) != tuple(target):
        updates = g.node("Expand", [updates, g.sizes(target)])
    to_front = [*range(before, before + width), *range(before), *range(before + width, rank)]
    value = g.node("Transpose", [g.value(x)], perm=order)
    updates = g.node("Transpose", [updates], perm=to_front)
    reduction = {"reduction": "add"} if accumulate else {}
    done = g.node("ScatterND", [value, _coordinates(g, indices), updates], **reduction)
    g.put(op, "Transpose", [done], perm=[order.index(a) for a in range(g.rank(x))])


def _indexed_axes(g: GraphWriter, op: Op, indices: Any) -> list[int]:
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if any(g.dtypes[indices[a].name] == torch.bool for a in axes):
        raise UnsupportedError("indexing by a bool mask: its result has no fixed size; multiply")
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise UnsupportedError(f"{op.target} of axes {axes}, which are not neighbors")
    return axes


def _front(g: GraphWriter, x: Any, axes: list[int]) -> list[int]:
    return [*axes, *(a for a in range(g.rank(x)) if a not in axes)]


def _rest(g: GraphWriter, x: Any, axes: list[int]) -> list[Dim]:
    return [size for a, size in enumerate(g.shape(x)) if a not in axes]


def _index_shape(g: GraphWriter, indices: Any) -> tuple[Dim, ...]:
    """What the index tensors broadcast to."""
    shapes = [g.shape(index) for index in indices if index is not None]
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    return tuple(next((d for d in dims if d != 1), 1) for dims in zip(*padded, strict=True))


def _coordinates(g: GraphWriter, indices: Any) -> str:
    """The index tensors as one ``(..., n)``; negative ones count from the end, as in PyTorch."""
    shape = _index_shape(g, indices)
    last = g.constant([-1], np.int64)
    parts = []
    for index in indices:
        if index is not None:
            name = g.value(index, torch.int64)
            if g.shape(index) != shape:
                name = g.node("Expand", [name, g.sizes(shape)])
            parts.append(g.node("Unsqueeze", [name, last]))
    return parts[0] if len(parts) == 1 else g.node("Concat", parts, axis=-1)


@lowers("repeat.default")
def _repeat(g: GraphWriter, op: Op, x: Any, repeats: Any) -> None:
    value = g.value(x)
    if g.rank(x) < len(repeats):
        value = g.reshape(value, [*(1 for _ in range(len(repeats) - g.rank(x))), *g.shape(x)])
    g.put(op, "Tile", [value, g.sizes(repeats)])


@lowers("max.dim", "min.dim")
def _max_dim(g: GraphWriter, op: Op, x: Any, dim: int, keepdim: bool = False) -> None:
    kind, axis = "Max" if "max" in op.target else "Min", g.axis(x, dim)
    value, keep = g.value(x), int(keepdim)
    g.names[op.name] = [
        g.node(f"Reduce{kind}", [value], axes=[axis], keepdims=keep),
        g.node(f"Arg{kind}", [value], axis=axis, keepdims=keep),
    ]


@lowers("fmod.Scalar", "fmod.Tensor")
def _fmod(g: GraphWriter, op: Op, a: Any, b: Any) -> None:
    g.put(op, "Mod", [g.value(a, op.dtype), g.value(b, op.dtype)], fmod=1)


@lowers("remainder.Scalar", "remainder.Tensor")
def _remainder(g: GraphWriter, op: Op, a: Any, b: Any) -> None:
    """Has the sign of the divisor."""
    left, right = g.value(a, op.dtype), g.value(b, op.dtype)
    if op.dtype == torch.int64:
        g.put(op, "Mod", [left, right], fmod=0)
        return
    whole = g.node("Floor", [g.node("Div", [left, right])])
    g.put(op, "Sub", [left, g.node("Mul", [whole, right])])
