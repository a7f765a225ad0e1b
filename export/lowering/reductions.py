"""Products, convolutions, pooling, sums and other reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from ..program import Op, Size
from ..rewrites import UnsupportedError
from .writer import TABLE, Dim, GraphWriter, Lower, lowers


@lowers("mm.default", "bmm.default", "matmul.default")
def _matmul(g: GraphWriter, op: Op, a: Any, b: Any) -> None:
    g.put(op, "MatMul", [g.value(a), g.value(b)])


@lowers("addmm.default")
def _addmm(
    g: GraphWriter, op: Op, c: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1
) -> None:
    operands = [g.value(a), g.value(b), g.value(c)]
    g.put(op, "Gemm", operands, alpha=float(alpha), beta=float(beta))


@lowers("convolution.default")
def _convolution(
    g: GraphWriter, op: Op, x: Any, weight: Any, bias: Any, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> None:  # fmt: skip
    n = g.rank(weight) - 2
    strides, pads, dilations, extra = (
        list(v) if len(v) == n else [v[0]] * n
        for v in (stride, padding, dilation, output_padding or (0,))
    )
    kind = "ConvTranspose" if transposed else "Conv"
    attributes = {"output_padding": extra} if transposed else {}
    inputs = [g.value(x), g.value(weight)]
    g.put(
        op, kind, inputs if bias is None else [*inputs, g.value(bias)], strides=strides,
        pads=[*pads, *pads], dilations=dilations, group=groups, **attributes,
    )  # fmt: skip


def _reduction(kind: str) -> Lower:
    def lower(
        g: GraphWriter, op: Op, x: Any, dims: Any = None, keepdim: bool = False, **keywords: Any
    ) -> None:
        axes = g.axes(x, dims)
        g.put(op, kind, [g.value(x, op.dtype)], axes=axes, keepdims=int(keepdim))

    return lower


for _target, _kind in {
    "mean.dim": "ReduceMean", "mean.default": "ReduceMean", "amax.default": "ReduceMax",
    "amin.default": "ReduceMin", "prod.dim_int": "ReduceProd", "prod.default": "ReduceProd",
    "max.default": "ReduceMax", "min.default": "ReduceMin",
}.items():  # fmt: skip
    TABLE[f"aten.{_target}"] = _reduction(_kind)


@lowers("sum.dim_IntList", "sum.default")
def _sum(
    g: GraphWriter, op: Op, x: Any, dims: Any = None, keepdim: bool = False, **keywords: Any
) -> None:
    axes = g.constant(g.axes(x, dims), np.int64)
    g.put(op, "ReduceSum", [g.value(x, op.dtype), axes], keepdims=int(keepdim))


@lowers("any.dim", "any.default", "any.dims")
def _any(g: GraphWriter, op: Op, x: Any, dims: Any = None, keepdim: bool = False) -> None:
    number = g.value(x, torch.float32)
    largest = g.node("ReduceMax", [number], axes=g.axes(x, dims), keepdims=int(keepdim))
    g.put(op, "Cast", [largest], to=TensorProto.BOOL)


@lowers("var.correction", "var.dim")
def _var(
    g: GraphWriter, op: Op, x: Any, dims: Any = None, correction: float | None = None,
    keepdim: bool = False, **keywords: Any,
) -> None:  # fmt: skip
    axes = g.axes(x, dims)
    value = g.value(x)
    centered = g.node("Sub", [value, g.node("ReduceMean", [value], axes=axes, keepdims=1)])
    squares = g.node("Mul", [centered, centered])
    total = g.node("ReduceSum", [squares, g.constant(axes, np.int64)], keepdims=int(keepdim))
    count = _product([g.shape(x)[a] for a in axes])
    divisor = g.value(count, torch.float32)
    lost = 1.0 if correction is None else float(correction)
    if lost:
        divisor = g.node("Sub", [divisor, g.value(lost, torch.float32)])
    g.put(op, "Div", [total, divisor])


def _product(dims: Sequence[Dim]) -> Dim:
    number, terms = 1, ((1, ()),)
    for dim in dims:
        if isinstance(dim, int):
            number *= dim
        else:
            terms = tuple((a * b, (*m, *n)) for a, m in terms for b, n in dim.terms)  # type: ignore[assignment]
    if terms == ((1, ()),):
        return number
    return Size(tuple((c * number, m) for c, m in terms))


@lowers("cumsum.default")
def _cumsum(g: GraphWriter, op: Op, x: Any, dim: int, **keywords: Any) -> None:
    at = g.constant(g.axis(x, dim), np.int64)
    g.put(op, "CumSum", [g.value(x, op.dtype), at])


@lowers("argmax.default", "argmin.default")
def _argmax(g: GraphWriter, op: Op, x: Any, dim: int | None = None, keepdim: bool = False) -> None:
    kind = "ArgMax" if "argmax" in op.target else "ArgMin"
    value, axis = g.value(x), 0 if dim is None else g.axis(x, dim)
    if dim is None:
        value = g.reshape(value, [-1])
    g.put(op, kind, [value], axis=axis, keepdims=int(keepdim))


@lowers("_softmax.default", "_log_softmax.default", "softmax.int", "log_softmax.int")
def _softmax(g: GraphWriter, op: Op, x: Any, dim: int, *rest: Any) -> None:
    kind = "LogSoftmax" if "log" in op.target else "Softmax"
    g.put(op, kind, [g.value(x)], axis=g.axis(x, dim))


@lowers("max_pool2d_with_indices.default")
def _max_pool(
    g: GraphWriter, op: Op, x: Any, kernel: Any, stride: Any = (), padding: Any = (0,),
    dilation: Any = (1,), ceil_mode: bool = False,
) -> None:  # fmt: skip
    kernel, padding, dilation = (
        list(v) if len(v) == 2 else [v[0]] * 2 for v in (kernel, padding, dilation)
    )
    stride = list(stride) if len(stride) == 2 else [stride[0]] * 2 if stride else kernel
    sizes = g.shape(x)[-2:]
    after = []
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        if not isinstance(size, int):
            if ceil_mode:
                raise UnsupportedError("pooling with ceil_mode over an axis that may vary")
            after.append(p)
            continue
        extra = s - 1 if ceil_mode else 0
        places = (size + 2 * p - d * (k - 1) - 1 + extra) // s + 1
        if ceil_mode and (places - 1) * s >= size + p:
            places -= 1
        after.append(max(p, (places - 1) * s + d * (k - 1) + 1 - size - p))
    value, is_flat = g.value(x), g.rank(x) == 3
    if is_flat:
        value = g.node("Unsqueeze", [value, g.constant([0], np.int64)])
    if any(n >= d * (k - 1) + 1 for n, d, k in zip(after, dilation, kernel, strict=True)):
        raise UnsupportedError("pooling padded by more than its kernel")
    pads = [*padding, *after]
    pooled = g.node(
        "MaxPool", [value], kernel_shape=kernel, strides=stride, pads=pads, dilations=dilation
    )
    if is_flat:
        pooled = g.node("Squeeze", [pooled, g.constant([0], np.int64)])
    g.names[op.name] = [pooled]
