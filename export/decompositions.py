"""Gradients of PyTorch's operators, written with operators that the lowering knows.

PyTorch's own decompositions come first; the functions here stand in where it has none, or one that
is slow on ONNX Runtime. Each is an ``aten`` operator with that operator's own arguments.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions

from .rewrites import UnsupportedError

aten = torch.ops.aten


@functools.cache
def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """PyTorch's table with ours over it, without what the lowering runs as one operator."""
    table = dict(core_aten_decompositions())
    for kept in _KEPT:
        table.pop(kept, None)
    return table | _TABLE


def pad(x: Tensor, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pads the last ``len(widths)`` axes, each with (before, after)."""
    if not any(a or b for a, b in widths):
        return x
    flat = [n for before_after in reversed(widths) for n in before_after]
    padded: Tensor = aten.constant_pad_nd(x, flat, value)
    return padded


def _strided(
    x: Tensor, starts: Sequence[int], steps: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """Windows' elements at one place: of each of the last axes, ``sizes`` from ``starts`` on."""
    for axis, (start, step, size) in enumerate(zip(starts, steps, sizes, strict=True)):
        dim = x.dim() - len(sizes) + axis
        if (start, step, size) != (0, 1, x.shape[dim]):
            x = aten.slice.Tensor(x, dim, start, start + (size - 1) * step + 1, step)
    return x


def _stuffed(x: Tensor, axis: int, step: int) -> Tensor:
    """Puts ``step - 1`` zeros between neighbors along one axis."""
    if step == 1:
        return x
    axis %= x.dim()
    wide = pad(x.unsqueeze(axis + 1), [(0, step - 1)] + [(0, 0)] * (x.dim() - axis - 1))
    shape = [*x.shape[:axis], x.shape[axis] * step, *x.shape[axis + 1 :]]
    size = (x.shape[axis] - 1) * step + 1
    stuffed: Tensor = aten.slice.Tensor(wide.reshape(shape), axis, 0, size)
    return stuffed


def _scattered(
    x: Tensor, starts: Sequence[int], steps: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """The transpose of `_strided`: zeros of ``sizes`` with ``x`` at those places."""
    widths = []
    for axis, (start, step, size) in enumerate(zip(starts, steps, sizes, strict=True)):
        dim = x.dim() - len(sizes) + axis
        x = _stuffed(x, dim, step)
        widths.append((start, size - start - x.shape[dim]))
    return pad(x, widths)


def _kept_where(mask: Tensor, grad: Tensor) -> Tensor:
    """Zero where the mask is False; ONNX Runtime multiplies faster than it chooses."""
    return grad * mask.to(grad.dtype)


def _threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    return _kept_where(x > threshold, grad)


def _slice_backward(
    grad: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    size = input_sizes[dim]
    start = max(0, min(start if start >= 0 else start + size, size))
    trailing = len(input_sizes) - dim % len(input_sizes)
    starts, steps = [0] * trailing, [1] * trailing
    starts[0], steps[0] = start, step
    return _scattered(grad, starts, steps, list(input_sizes)[-trailing:])


def _select_backward(grad: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim %= len(input_sizes)
    index %= input_sizes[dim]
    widths = [(0, 0)] * (len(input_sizes) - dim)
    widths[0] = (index, input_sizes[dim] - index - 1)
    return pad(grad.unsqueeze(dim), widths)


# --- convolution: with x (b, C, L…), weight (O, C / groups, K…), output y (b, O, M…) ---


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n = weight.dim() - 2
    stride, padding, dilation = (_spread(v, n) for v in (stride, padding, dilation))
    d_x = d_weight = d_bias = None
    if output_mask[0] and transposed:
        zeros = [0] * n
        d_x = aten.convolution(grad, weight, None, stride, padding, dilation, False, zeros, groups)
    elif output_mask[0]:
        d_x = _input_gradient(grad, x, weight, stride, padding, dilation, groups)
    if output_mask[1]:
        wide, narrow = (grad, x) if transposed else (x, grad)
        d_weight = _weight_gradient(wide, narrow, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        d_bias = grad.sum([0, *range(2, grad.dim())])
    return d_x, d_weight, d_bias


def _spread(value: Sequence[int], n: int) -> list[int]:
    return list(value) if len(value) == n else [value[0]] * n


def _input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A transposed convolution; with stride 1, one with the mirrored kernel, which is faster."""
    n = weight.dim() - 2
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(step > 1 for step in stride):
        extra = [
            x.shape[2 + i] - (grad.shape[2 + i] - 1) * stride[i] + 2 * padding[i] - reach[i] - 1
            for i in range(n)
        ]
        transposed: Tensor = aten.convolution(
            grad, weight, None, stride, padding, dilation, True, extra, groups
        )
        return transposed
    o, c = weight.shape[0] // groups, weight.shape[1]
    mirrored = weight.flip(list(range(2, 2 + n)))
    mirrored = mirrored.view(groups, o, c, *weight.shape[2:]).transpose(1, 2)
    mirrored = mirrored.reshape(groups * c, o, *weight.shape[2:])
    widths = [(r - p, r - p) for r, p in zip(reach, padding, strict=True)]
    grad = _cropped(grad, widths)  # where it is padded by more than the kernel's reach
    pads = [max(before, 0) for before, _ in widths]
    result: Tensor = aten.convolution(
        grad, mirrored, None, [1] * n, pads, dilation, False, [0] * n, groups
    )
    return result


def _cropped(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    starts = [max(-a, 0) for a, _ in widths]
    sizes = [x.shape[2 + i] - max(-a, 0) - max(-b, 0) for i, (a, b) in enumerate(widths)]
    return _strided(x, starts, [1] * len(widths), sizes)


def _weight_gradient(
    wide: Tensor,
    narrow: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """One matrix product over examples and positions for all of the kernel's taps.

    ``wide`` is what the kernel slides over, ``narrow`` has one value for each of its places.
    """
    kernel, places = weight.shape[2:], narrow.shape[2:]
    reach = [(p - 1) * s + d * (k - 1) + 1
             for p, s, d, k in zip(places, stride, dilation, kernel, strict=True)]  # fmt: skip
    padded = pad(wide, [(p, max(0, r - size - p)) for p, r, size in
                        zip(padding, reach, wide.shape[2:], strict=True)])  # fmt: skip
    b, c, o = wide.shape[0], wide.shape[1] // groups, narrow.shape[1] // groups
    m = math.prod(places)
    if groups == 1:
        padded = padded.transpose(0, 1)  # once, not the taps, which are many times larger
    taps = [
        _strided(padded, [t * d for t, d in zip(tap, dilation, strict=True)], stride, places)
        for tap in itertools.product(*map(range, kernel))
    ]
    num_taps = len(taps)
    if groups == 1:
        columns = torch.cat(taps).reshape(num_taps * c, b * m)
        product = narrow.transpose(0, 1).reshape(o, b * m) @ columns.t()
    else:
        columns = torch.stack(taps, 1).reshape(b, num_taps, groups, c, m).permute(2, 1, 3, 0, 4)
        rows = narrow.reshape(b, groups, o, m).permute(1, 2, 0, 3).reshape(groups, o, b * m)
        product = rows @ columns.reshape(groups, num_taps * c, b * m).transpose(1, 2)
    product = product.view(groups * o, num_taps, c).transpose(1, 2)
    return product.reshape(weight.shape)


# --- pooling: with x (b, C, L…), output y (b, C, M…) ---


def _max_pool_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """The gradient goes to the first of equal maxima in a window, as PyTorch has it."""
    kernel = _spread(kernel_size, 2)
    stride = _spread(stride, 2) if stride else kernel
    padding, dilation = _spread(padding, 2), _spread(dilation, 2)
    y, _ = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    places, sizes = list(grad.shape[-2:]), list(x.shape[-2:])
    reach = [(p - 1) * s + d * (k - 1) + 1
             for p, s, d, k in zip(places, stride, dilation, kernel, strict=True)]  # fmt: skip
    widths = [(p, max(0, r - n - p)) for p, r, n in zip(padding, reach, sizes, strict=True)]
    padded = pad(x, widths, float("-inf"))
    is_tiled = kernel == stride and dilation == [1, 1] and padded is x
    if is_tiled:
        return _tiled_max_pool_backward(grad, x, y, kernel)
    total: Tensor | None = None
    is_open: Tensor | None = None  # no earlier tap was the maximum
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        hit = _strided(padded, starts, stride, places) == y
        first = hit if is_open is None else hit & is_open
        is_open = ~hit if is_open is None else is_open & ~hit
        part = _scattered(_kept_where(first, grad), starts, stride, list(padded.shape[-2:]))
        total = part if total is None else total + part
    assert total is not None  # a kernel has a tap
    return _strided(total, padding, [1, 1], sizes)


def _tiled_max_pool_backward(grad: Tensor, x: Tensor, y: Tensor, kernel: list[int]) -> Tensor:
    """Windows that do not overlap: their taps' gradients are interleaved, nothing is added."""
    places = list(grad.shape[-2:])
    parts: list[Tensor] = []
    is_open: Tensor | None = None
    taps = list(itertools.product(*map(range, kernel)))
    for tap in taps:
        hit = _strided(x, tap, kernel, places) == y
        first = hit if is_open is None else hit & is_open
        if tap != taps[-1]:
            is_open = ~hit if is_open is None else is_open & ~hit
        parts.append(_kept_where(first, grad))
    tiles = torch.stack(parts, -1)
    lead = list(grad.shape[:-2])
    rank = len(lead)
    tiles = tiles.view(*lead, *places, *kernel).permute(
        *range(rank), rank, rank + 2, rank + 1, rank + 3
    )
    whole = tiles.reshape(*lead, places[0] * kernel[0], places[1] * kernel[1])
    rest = [(0, n - w) for n, w in zip(x.shape[-2:], whole.shape[-2:], strict=True)]
    return pad(whole, rest)


def _avg_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """A product with a fixed matrix along either axis."""
    args = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    rows, columns = _pooling_matrices(x, *args)
    return _along_both(x, rows, columns)


def _avg_pool_backward(grad: Tensor, x: Tensor, *args: Any) -> Tensor:
    rows, columns = _pooling_matrices(x, *args)
    return _along_both(grad, rows.t(), columns.t())


def _along_both(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``rows (H, H')ᵀ x columns (W, W')``, axis of length 1 left out."""
    if columns.shape != (1, 1):
        x = x @ columns
    if rows.shape != (1, 1):
        x = rows.t() @ x
    elif rows.numel() and x.shape[-2] != 1:
        raise AssertionError("an axis was left out that is there")
    return x


def _pooling_matrices(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> tuple[Tensor, Tensor]:
    kernel = _spread(kernel_size, 2)
    stride = _spread(stride, 2) if stride else kernel
    padding = _spread(padding, 2)
    matrices = []
    for axis in range(2):
        k, s, p, size = kernel[axis], stride[axis], padding[axis], x.shape[-2 + axis]
        places = _num_places(size, k, s, p, ceil_mode)
        weights = []
        for place in range(places):
            low, high = place * s - p, min(place * s - p + k, size + p)
            inside = range(max(low, 0), min(high, size))
            count = high - low if count_include_pad else len(inside)
            count = count if divisor is None else divisor if axis else 1
            weights.append([1 / count if i in inside else 0.0 for i in range(size)])
        matrices.append(_constant(weights).t())
    return matrices[0], matrices[1]


def _num_places(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    extra = stride - 1 if ceil_mode else 0
    places = (size + 2 * padding - kernel + extra) // stride + 1
    if ceil_mode and (places - 1) * stride >= size + padding:
        places -= 1  # the last window must start inside
    return places


def _adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    if list(output_size) == [1, 1]:
        return x.mean([-2, -1], keepdim=True)
    rows, columns = _adaptive_matrices(x, output_size)
    return _along_both(x, rows, columns)


def _adaptive_avg_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    if list(grad.shape[-2:]) == [1, 1]:
        return (grad / (x.shape[-1] * x.shape[-2])).expand(x.shape)
    rows, columns = _adaptive_matrices(x, grad.shape[-2:])
    return _along_both(grad, rows.t(), columns.t())


def _adaptive_matrices(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    matrices = []
    for size, places in zip(x.shape[-2:], output_size, strict=True):
        weights = []
        for place in range(places):
            inside = range(place * size // places, -(-(place + 1) * size // places))
            weights.append([1 / len(inside) if i in inside else 0.0 for i in range(size)])
        matrices.append(_constant(weights).t())
    return matrices[0], matrices[1]


def _constant(values: list[list[float]]) -> Tensor:
    """A constant that the trace holds as one, not as what made it."""
    return torch.tensor(values, dtype=torch.float32)


# --- normalization ---


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    axes = list(range(x.dim() - len(shape), x.dim()))
    normalized, mean, rstd = _normalized(x, axes, eps)
    return _affine(normalized, weight, bias), mean, rstd


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, positions: int,
    groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grouped = x.reshape(n, groups, c // groups * positions)
    normalized, mean, rstd = _normalized(grouped, [2], eps)
    scale, shift = (
        None if v is None else v.view(1, c, *(1 for _ in x.shape[2:])) for v in (weight, bias)
    )
    result = _affine(normalized.reshape(x.shape), scale, shift)
    return result, mean.reshape(n, groups), rstd.reshape(n, groups)


def _normalized(x: Tensor, axes: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    centered = x - mean
    rstd = torch.rsqrt((centered * centered).mean(axes, keepdim=True) + eps)
    return centered * rstd, mean, rstd


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    axes = list(range(x.dim())) if dim is None else dim if isinstance(dim, (list, tuple)) else [dim]
    if ord == 2:
        return (x * x).sum(axes, keepdim).sqrt()
    if ord == 1:
        return x.abs().sum(axes, keepdim)
    if ord in (math.inf, -math.inf):
        extreme = torch.amax if ord > 0 else torch.amin
        return extreme(x.abs(), axes, keepdim)
    return (x.abs() ** ord).sum(axes, keepdim) ** (1 / ord)


# --- embedding ---


def _embedding_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_by_freq: bool
) -> Tensor:
    if scale_by_freq:
        raise UnsupportedError("an embedding with scale_grad_by_freq; leave it off")
    if padding_idx >= 0:
        grad = _kept_where((indices != padding_idx).unsqueeze(-1), grad)
    flat = indices.reshape(-1, 1)
    updates = grad.reshape(-1, grad.shape[-1])
    zeros = grad.new_zeros(num_weights, grad.shape[-1])
    d_weight: Tensor = aten.index_put(zeros, [flat.flatten()], updates, True)
    return d_weight


_TABLE: dict[Any, Callable[..., Any]] = {
    aten.threshold_backward.default: _threshold_backward,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    aten.avg_pool2d.default: _avg_pool,
    aten.avg_pool2d_backward.default: _avg_pool_backward,
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_avg_pool_backward,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.embedding_dense_backward.default: _embedding_backward,
}

_KEPT: tuple[Any, ...] = (aten.gelu.default, aten.sigmoid.default, aten.relu.default)
