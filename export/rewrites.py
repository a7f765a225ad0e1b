"""PyTorch functions that a trace must see otherwise than PyTorch runs them.

Dropout multiplies by a mask from outside, because the forward and the backward graph must see the
same one; batch normalization hands out its new running statistics instead of writing them in place;
recurrent layers are unrolled; attention is spelled out. What draws random numbers is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from .normalization import BatchNorm
from .recurrent import CELLS, run_layers


class UnsupportedError(Exception):
    """An operation that cannot be exported; the message names it and says what to do."""


class Rewrites(TorchFunctionMode):
    """While it is active, the functions in `REWRITES` run as written here.

    Attributes:
        dropouts: Shape of what each dropout so far acted on, and its rate, in order.
        statistics: By ``id`` of a running average: its new value.
        needs_two: Whether some batch statistic is over the batch alone, as of ``(b, d)``.

    Args:
        masks: Of the dropouts, in order; None: they are only noted, and pass everything.
        choose: What runs instead of a function that is called so, if anything; `REWRITES` decides
            if it is not given.
    """

    def __init__(
        self,
        masks: Sequence[Mask] | None = None,
        choose: Callable[[Any, Any, Mapping[str, Any]], Callable[..., Any] | None] | None = None,
    ) -> None:
        super().__init__()
        self._choose = choose or (lambda func, args, kwargs: REWRITES.get(func))
        self.dropouts: list[tuple[tuple[int, ...], float]] = []
        self.statistics: dict[int, Tensor] = {}
        self.needs_two = False
        self._masks = masks

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _RANDOM:
            raise UnsupportedError(
                f"{name} draws random numbers inside the graph; nn.Dropout is all that may"
            )
        if name.startswith("fft_"):
            raise UnsupportedError(f"{name} has complex numbers; transform the data beforehand")
        if name in _REFUSED:
            raise UnsupportedError(_REFUSED[name])
        rewrite = self._choose(func, args, kwargs)
        if rewrite is None:
            return func(*args, **kwargs)
        return rewrite(self, *args, **kwargs)

    def drop(self, x: Tensor, rate: float, shape: tuple[int, ...] | None = None) -> Tensor:
        """Multiplies by the next mask, shaped as ``x``, or as ``shape``, which broadcasts to it."""
        if rate == 0:
            return x
        shape = tuple(x.shape) if shape is None else shape
        self.dropouts.append((shape, rate))
        if self._masks is None:
            return x
        return x * self._masks[len(self.dropouts) - 1].fitted(shape)


@dataclass(frozen=True, slots=True)
class Mask:
    """A dropout's mask ``(b, ...)``, and which axis the batch is in what it acts on."""

    values: Tensor
    axis: int

    def fitted(self, shape: tuple[int, ...]) -> Tensor:
        """For a tensor of this shape, whose axis may be the batch times something."""
        return self.values.movedim(0, self.axis).reshape(shape)


@contextlib.contextmanager
def attention_in_python() -> Iterator[None]:
    """Keeps PyTorch's attention layers off their fused inference path."""
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _dropout(
    mode: Rewrites, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return mode.drop(input, p) if training else input


def _torch_dropout(mode: Rewrites, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(mode, input, p, train)


def _channel_dropout(num_axes: int) -> Callable[..., Tensor]:
    """Whole channels at once; of an input without a batch, the first axis is the channels'."""

    def drop(
        mode: Rewrites,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        kept = 2 if input.dim() == num_axes + 2 or (num_axes, input.dim()) == (2, 3) else 1
        shape = (*input.shape[:kept], *(1 for _ in input.shape[kept:]))
        return mode.drop(input, p, shape) if training else input

    return drop


_CHANNEL_DROPOUTS = {
    F.dropout1d: _channel_dropout(1),
    F.dropout2d: _channel_dropout(2),
    F.dropout3d: _channel_dropout(3),
}


def _batch_norm(
    mode: Rewrites,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: object,
) -> Tensor:
    if not training:
        assert running_mean is not None and running_var is not None  # PyTorch's own condition
        scale = torch.rsqrt(running_var + eps)
        scale = scale if weight is None else scale * weight
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        return input * _as_channels(scale, input) + _as_channels(shift, input)
    if input.numel() == input.shape[0] * input.shape[1]:
        mode.needs_two = True
    ones = input.new_ones(input.shape[1])
    zeros = input.new_zeros(input.shape[1])
    output, mean, var = BatchNorm.apply(  # type: ignore[no-untyped-call]
        input, ones if weight is None else weight, zeros if bias is None else bias, eps
    )
    if running_mean is not None and running_var is not None:
        count = input.numel() // input.shape[1]
        unbiased = var * torch.full((), float(count)) / torch.full((), float(count - 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            before = mode.statistics.get(id(running), running)  # the layer may run twice
            mode.statistics[id(running)] = (1 - momentum) * before + momentum * new
    normalized: Tensor = output
    return normalized


def _as_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *(1 for _ in like.shape[2:]))


def _instance_norm(
    mode: Rewrites,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *rest: object,
) -> Tensor:
    if running_mean is not None:
        raise UnsupportedError(
            "instance norm with running statistics; use track_running_stats=False"
        )
    return F.group_norm(input, input.shape[1], weight, bias, eps)


def _recurrent(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """For `torch.gru` and its like; the states are one tensor, or two of an LSTM."""

    def run(
        mode: Rewrites,
        input: Tensor,
        states: Tensor | tuple[Tensor, ...],
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        states = (states,) if isinstance(states, Tensor) else tuple(states)
        if kind == "lstm" and states[0].shape[2] != states[1].shape[2]:
            raise UnsupportedError("an LSTM with proj_size; use a Linear layer after it")
        x = input.transpose(0, 1) if batch_first else input
        rate = dropout if train else 0.0

        def between(sequence: Tensor) -> Tensor:  # masks have the batch first
            if not rate:
                return sequence
            return mode.drop(sequence.transpose(0, 1), rate).transpose(0, 1)

        sequence, states = run_layers(
            CELLS[kind], x, states, weights, has_biases=has_biases,
            is_bidirectional=bidirectional, between=between,
        )  # fmt: skip
        return sequence.transpose(0, 1) if batch_first else sequence, *states

    return run


def _attention(
    mode: Rewrites,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        raise UnsupportedError("grouped-query attention; repeat keys and values first")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        length, width = scores.shape[-2:]
        attn_mask = torch.ones(length, width, dtype=torch.bool).tril()
    if attn_mask is None:
        return mode.drop(scores.softmax(-1), dropout_p) @ value
    if attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    else:
        scores = scores + attn_mask
    is_empty = scores.amax(-1, keepdim=True) == float("-inf")  # nothing to attend to: zeros
    weights = scores.masked_fill(is_empty, 0.0).softmax(-1).masked_fill(is_empty, 0.0)
    return mode.drop(weights, dropout_p) @ value


def _multi_head_attention(mode: Rewrites, *args: Any, **kwargs: Any) -> Any:
    """PyTorch's own, which calls dropout and attention by their names in its module."""

    def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        return _dropout(mode, input, p, training)

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return _attention(mode, *args, **kwargs)

    with mock.patch.multiple(F, dropout=dropout, scaled_dot_product_attention=attention):
        return F.multi_head_attention_forward(*args, **kwargs)


def _pad(
    rewrites: Rewrites, input: Tensor, pad: Any, mode: str = "constant", value: float | None = None
) -> Tensor:
    for i in range(0, len(pad), 2):
        input = _padded(input, input.dim() - 1 - i // 2, pad[i], pad[i + 1], mode, value)
    return input


def _padded(
    x: Tensor, axis: int, before: int, after: int, kind: str, value: float | None
) -> Tensor:
    size = x.shape[axis]
    if kind == "constant" or min(before, after) < 0:
        widths = [0, 0] * (x.dim() - 1 - axis) + [before, after]
        return torch.constant_pad_nd(x, widths, value or 0.0)
    if kind == "reflect":
        left, right = (x.narrow(axis, 1, before).flip(axis),
                       x.narrow(axis, size - 1 - after, after).flip(axis))  # fmt: skip
    elif kind == "circular":
        left, right = x.narrow(axis, size - before, before), x.narrow(axis, 0, after)
    else:
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, size - 1, 1)
        left, right = (torch.cat([v] * n, axis) if n else x.narrow(axis, 0, 0)
                       for v, n in ((first, before), (last, after)))  # fmt: skip
    return torch.cat([part for part in (left, x, right) if part.shape[axis]], axis)


def _adaptive_max_pool(pool: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Windows of equal length that do not overlap are those of ordinary pooling."""

    def run(
        mode: Rewrites, input: Tensor, output_size: Any, return_indices: bool = False
    ) -> Tensor:
        if return_indices:
            raise UnsupportedError(f"{name} with return_indices")
        n = 2 if pool is F.max_pool2d else 1
        wanted = output_size if isinstance(output_size, (tuple, list)) else [output_size] * n
        sizes = list(input.shape[-n:])
        wanted = [s if w is None else w for s, w in zip(sizes, wanted, strict=True)]
        if any(s % w for s, w in zip(sizes, wanted, strict=True)):
            raise UnsupportedError(
                f"{name} from {sizes} to {wanted}: its windows overlap; choose divisors"
            )
        return pool(input, [s // w for s, w in zip(sizes, wanted, strict=True)])

    return run


def _interpolate(
    rewrites: Rewrites,
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """A product with a fixed matrix along each axis: what becomes of the unit vectors."""
    kinds = {"nearest": "nearest", "nearest-exact": "nearest-exact", "linear": "linear",
             "bilinear": "linear", "trilinear": "linear"}  # fmt: skip
    if mode not in kinds or antialias:
        raise UnsupportedError(f"interpolation by {mode!r}; use one of {', '.join(kinds)}")
    n = input.dim() - 2
    sizes, factors = (
        list(v) if isinstance(v, (tuple, list)) else [v] * n for v in (size, scale_factor)
    )
    for i in range(n):
        axis = 2 + i
        with _disable_current_modes():
            units = torch.eye(input.shape[axis]).unsqueeze(0)
            rows = F.interpolate(
                units, sizes[i], factors[i], kinds[mode], align_corners,
                recompute_scale_factor,
            )[0].tolist()  # fmt: skip
        matrix = torch.tensor(rows, dtype=torch.float32)
        input = (input.transpose(axis, -1) @ matrix).transpose(axis, -1)
    return input


def _bilinear(
    mode: Rewrites, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    result = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return result if bias is None else result + bias


def _embedding(mode: Rewrites, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if kwargs.get("sparse", args[4] if len(args) > 4 else False):
        raise UnsupportedError("an embedding with sparse gradients; leave sparse off")
    if kwargs.get("max_norm", args[1] if len(args) > 1 else None) is not None:
        raise UnsupportedError(
            "an embedding with max_norm, which changes its weight in the forward pass; leave it off"
        )
    return F.embedding(input, weight, *args, **kwargs)


def _weight_norm(mode: Rewrites, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [axis for axis in range(v.dim()) if axis != dim]
    return v * (g / (v * v).sum(axes, keepdim=True).sqrt())


def _refuse(what: str) -> Callable[..., Any]:
    def refuse(mode: Rewrites, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(what)

    return refuse


_RANDOM = {"rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm",
           "bernoulli", "bernoulli_", "multinomial", "normal", "normal_", "uniform_", "poisson",
           "gumbel_softmax", "exponential_", "alpha_dropout", "feature_alpha_dropout",
           "rrelu"}  # fmt: skip

_REFUSED = {
    "_pack_padded_sequence": "a packed sequence; keep it padded, and mask what is padding",
    "item": "a value is read out of a tensor by item(); compute with tensors throughout",
    "tolist": "a value is read out of a tensor by tolist(); compute with tensors throughout",
}

REWRITES: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    **_CHANNEL_DROPOUTS,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.pad: _pad,
    F.adaptive_max_pool1d: _adaptive_max_pool(F.max_pool1d, "AdaptiveMaxPool1d"),
    F.adaptive_max_pool2d: _adaptive_max_pool(F.max_pool2d, "AdaptiveMaxPool2d"),
    F.interpolate: _interpolate,
    F.bilinear: _bilinear,
    torch.bilinear: _bilinear,
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.gru: _recurrent("gru"),
    torch.lstm: _recurrent("lstm"),
    torch.rnn_tanh: _recurrent("rnn_tanh"),
    torch.rnn_relu: _refuse("a ReLU RNN; use nonlinearity='tanh', a GRU or an LSTM"),
    torch.gru_cell: _refuse("GRUCell; use nn.GRU over the sequence"),
    torch.lstm_cell: _refuse("LSTMCell; use nn.LSTM over the sequence"),
}


def dropouts_only(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """Chooses what is random and nothing else: PyTorch itself runs the rest."""
    rewrite = REWRITES.get(func)
    if func in _CHANNEL_DROPOUTS or rewrite in (_dropout, _torch_dropout, _multi_head_attention):
        return rewrite
    if rewrite is _attention and (kwargs.get("dropout_p") or args[4:5] not in ((), (0.0,))):
        return rewrite
    is_recurrent = func in (torch.gru, torch.lstm, torch.rnn_tanh)
    num_layers, rate, is_training = args[4:7] if is_recurrent else (0, 0, False)
    return rewrite if is_recurrent and num_layers > 1 and rate and is_training else None


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """The running averages of a block's batch normalization, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
        for name, buffer in layer.named_buffers(recurse=False)
        if name != "num_batches_tracked"
    }
