"""Operators that act on each element, and constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from ..program import Op, Ref
from ..rewrites import UnsupportedError
from .writer import ONNX_TYPES, TABLE, GraphWriter, Lower, lowers


def _unary(kind: str) -> Lower:
    return lambda g, op, x: g.put(op, kind, [g.value(x, op.dtype)])


for _name, _kind in {
    "abs": "Abs", "neg": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin",
    "cos": "Cos", "tanh": "Tanh", "sigmoid": "Sigmoid", "relu": "Relu", "erf": "Erf",
    "floor": "Floor", "ceil": "Ceil", "reciprocal": "Reciprocal", "sign": "Sign", "sgn": "Sign",
    "logical_not": "Not", "isnan": "IsNaN", "round": "Round", "atan": "Atan", "sinh": "Sinh",
    "cosh": "Cosh", "tan": "Tan", "asin": "Asin", "acos": "Acos",
}.items():  # fmt: skip
    TABLE[f"aten.{_name}.default"] = _unary(_kind)


@lowers("bitwise_not.default")
def _bitwise_not(g: GraphWriter, op: Op, x: Any) -> None:
    if op.dtype != torch.bool:
        raise UnsupportedError("bitwise not of integers")
    g.put(op, "Not", [g.value(x)])


@lowers("rsqrt.default")
def _rsqrt(g: GraphWriter, op: Op, x: Any) -> None:
    g.put(op, "Reciprocal", [g.node("Sqrt", [g.value(x)])])


@lowers("log1p.default")
def _log1p(g: GraphWriter, op: Op, x: Any) -> None:
    """log(1 + x) · x / ((1 + x) − 1) keeps the digits that 1 + x loses of a small x."""
    one = g.value(1, op.dtype)
    u = g.node("Add", [g.value(x), one])
    lost = g.node("Sub", [u, one])
    is_zero = g.node("Equal", [lost, g.value(0, op.dtype)])
    divisor = g.node("Where", [is_zero, one, lost])
    scaled = g.node("Div", [g.node("Mul", [g.node("Log", [u]), g.value(x)]), divisor])
    g.put(op, "Where", [is_zero, g.value(x), scaled])


@lowers("expm1.default")
def _expm1(g: GraphWriter, op: Op, x: Any) -> None:
    g.same(op, _expm1_of(g, g.value(x), op.dtype))


def _expm1_of(g: GraphWriter, x: str, dtype: torch.dtype | None) -> str:
    """2 tanh(x / 2) / (1 − tanh(x / 2)) for small |x|, where e^x − 1 cancels."""
    one = g.value(1, dtype)
    t = g.node("Tanh", [g.node("Mul", [x, g.value(0.5, dtype)])])
    small = g.node("Div", [g.node("Add", [t, t]), g.node("Sub", [one, t])])
    large = g.node("Sub", [g.node("Exp", [x]), one])
    is_small = g.node("Less", [g.node("Abs", [x]), one])
    return g.node("Where", [is_small, small, large])


@lowers("gelu.default")
def _gelu(g: GraphWriter, op: Op, x: Any, approximate: str = "none") -> None:
    value, half = g.value(x), g.value(0.5, op.dtype)
    if approximate == "tanh":
        cube = g.node("Mul", [g.node("Mul", [value, value]), value])
        inner = g.node("Add", [value, g.node("Mul", [cube, g.value(0.044715, op.dtype)])])
        scaled = g.node("Mul", [inner, g.value(math.sqrt(2 / math.pi), op.dtype)])
        gate = g.node("Tanh", [scaled])
    else:
        gate = g.node("Erf", [g.node("Mul", [value, g.value(math.sqrt(0.5), op.dtype)])])
    one_plus = g.node("Add", [gate, g.value(1, op.dtype)])
    g.put(op, "Mul", [g.node("Mul", [value, half]), one_plus])


@lowers("leaky_relu.default")
def _leaky_relu(g: GraphWriter, op: Op, x: Any, negative_slope: float = 0.01) -> None:
    g.put(op, "LeakyRelu", [g.value(x)], alpha=float(negative_slope))


@lowers("elu.default")
def _elu(
    g: GraphWriter, op: Op, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> None:
    value, zero = g.value(x), g.value(0, op.dtype)
    falling = g.node("Min", [g.node("Mul", [value, g.value(input_scale, op.dtype)]), zero])
    negative = g.node("Mul", [_expm1_of(g, falling, op.dtype), g.value(alpha * scale, op.dtype)])
    positive = g.node("Mul", [value, g.value(scale, op.dtype)])
    g.put(op, "Where", [g.node("Greater", [value, zero]), positive, negative])


def _binary(kind: str) -> Lower:
    def lower(g: GraphWriter, op: Op, a: Any, b: Any, alpha: float = 1) -> None:
        right = g.value(b, op.dtype)
        if alpha != 1:
            right = g.node("Mul", [right, g.value(alpha, op.dtype)])
        g.put(op, kind, [g.value(a, op.dtype), right])

    return lower


for _name, _kind in {"add": "Add", "sub": "Sub", "mul": "Mul", "pow": "Pow"}.items():
    for _overload in ("Tensor", "Scalar", "Tensor_Scalar", "Tensor_Tensor"):
        TABLE[f"aten.{_name}.{_overload}"] = _binary(_kind)
for _name, _kind in {"maximum.default": "Max", "minimum.default": "Min",
                     "clamp_min.Tensor": "Max", "clamp_max.Tensor": "Min"}.items():  # fmt: skip
    TABLE[f"aten.{_name}"] = _binary(_kind)


@lowers("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(g: GraphWriter, op: Op, a: Any, b: Any) -> None:
    g.put(op, "Div", [g.value(a, op.dtype), g.value(b, op.dtype)])


@lowers("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(g: GraphWriter, op: Op, a: Any, b: Any, rounding_mode: str | None = None) -> None:
    if op.dtype != torch.float32 or rounding_mode is None:
        raise UnsupportedError(f"{op.target} of {op.dtype} with rounding_mode={rounding_mode!r}")
    quotient = g.node("Div", [g.value(a, op.dtype), g.value(b, op.dtype)])
    if rounding_mode == "floor":
        g.put(op, "Floor", [quotient])
    else:
        whole = g.node("Floor", [g.node("Abs", [quotient])])
        g.put(op, "Mul", [g.node("Sign", [quotient]), whole])


@lowers("rsub.Scalar", "rsub.Tensor")
def _rsub(g: GraphWriter, op: Op, a: Any, b: Any, alpha: float = 1) -> None:
    _binary("Sub")(g, op, b, a, alpha)


def _logical(kind: str, bitwise: bool = False) -> Lower:
    def lower(g: GraphWriter, op: Op, a: Any, b: Any) -> None:
        if bitwise and op.dtype != torch.bool:
            raise UnsupportedError(f"{op.target} of integers")
        g.put(op, kind, [g.value(a, torch.bool), g.value(b, torch.bool)])

    return lower


for _name, _kind in {"and": "And", "or": "Or", "xor": "Xor"}.items():
    TABLE[f"aten.logical_{_name}.default"] = _logical(_kind)
    TABLE[f"aten.bitwise_{_name}.Tensor"] = _logical(_kind, bitwise=True)


def _comparison(kind: str, negate: bool = False) -> Lower:
    def lower(g: GraphWriter, op: Op, a: Any, b: Any) -> None:
        kinds = [g.dtypes[v.name] for v in (a, b) if isinstance(v, Ref)]
        dtype = kinds[0] if len(kinds) == 1 else torch.promote_types(*kinds)
        if len(kinds) == 1 and isinstance(b, float):
            dtype = torch.promote_types(dtype, torch.float32)
        operands = [g.value(a, dtype), g.value(b, dtype)]
        if negate:
            g.put(op, "Not", [g.node(kind, operands)])
        else:
            g.put(op, kind, operands)

    return lower


for _name, (_kind, _negate) in {
    "eq": ("Equal", False), "ne": ("Equal", True), "lt": ("Less", False), "gt": ("Greater", False),
    "le": ("LessOrEqual", False), "ge": ("GreaterOrEqual", False),
}.items():  # fmt: skip
    for _overload in ("Tensor", "Scalar"):
        TABLE[f"aten.{_name}.{_overload}"] = _comparison(_kind, _negate)


@lowers("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(g: GraphWriter, op: Op, condition: Any, a: Any, b: Any) -> None:
    g.put(op, "Where", [g.value(condition), g.value(a, op.dtype), g.value(b, op.dtype)])


@lowers("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(g: GraphWriter, op: Op, x: Any, mask: Any, value: Any) -> None:
    g.put(op, "Where", [g.value(mask), g.value(value, op.dtype), g.value(x)])


@lowers("clamp.default", "hardtanh.default")
def _clamp(g: GraphWriter, op: Op, x: Any, min: Any = None, max: Any = None) -> None:
    if op.target.startswith("aten.hardtanh"):
        min, max = -1.0 if min is None else min, 1.0 if max is None else max
    bounds = ["" if v is None else g.value(v, op.dtype) for v in (min, max)]
    g.put(op, "Clip", [g.value(x, op.dtype), *bounds])


@lowers("_to_copy.default", "to.dtype", "type_as.default")
def _cast(g: GraphWriter, op: Op, x: Any, *rest: Any, **keywords: Any) -> None:
    if op.dtype not in ONNX_TYPES:
        raise UnsupportedError(f"a cast to {op.dtype}")
    g.same(op, g.value(x, op.dtype))


@lowers("full.default", "zeros.default", "ones.default", "scalar_tensor.default",
         "full_like.default", "zeros_like.default", "ones_like.default", "new_zeros.default",
         "new_full.default", "new_ones.default", "empty.memory_format",
         "new_empty.default")  # fmt: skip
def _full(g: GraphWriter, op: Op, *arguments: Any, **keywords: Any) -> None:
    fill: Any = 1 if "ones" in op.target else 0
    if "scalar_tensor" in op.target:
        fill = arguments[0]
    elif "full" in op.target:
        fill = arguments[-1]
    assert op.dtype is not None  # it makes one tensor
    if all(isinstance(d, int) for d in op.shape):
        value = g.value(fill, op.dtype)
        if not op.shape:
            g.same(op, value)
        else:
            g.put(op, "Expand", [value, g.sizes(op.shape)])
        return
    array = np.array([fill], torch.empty((), dtype=op.dtype).numpy().dtype)
    g.put(op, "ConstantOfShape", [g.sizes(op.shape)], value=numpy_helper.from_array(array))


@lowers("arange.start_step", "arange.start", "arange.default")
def _arange(g: GraphWriter, op: Op, *bounds: Any, **keywords: Any) -> None:
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    assert op.dtype is not None  # it makes one tensor
    if all(isinstance(v, (int, float)) for v in (start, end, step)):
        array: NDArray[Any] = torch.arange(start, end, step, dtype=op.dtype).numpy()
        g.same(op, g.constant(array))
    else:
        g.put(op, "Range", [g.value(v, op.dtype) for v in (start, end, step)])
