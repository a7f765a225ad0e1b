"""Recurrent layers as plain tensor operations, unrolled over time, with their gradients by hand.

The gradients are written out because autograd's own would add up each weight's gradient step by
step: here one product over all steps gives it, and what does not depend on the later steps'
gradient is computed for all of them at once.

Shapes: T steps, b examples, C inputs, H hidden units. Sequences are ``(T, b, ·)``.

Source: the equations in the documentation of `torch.nn.RNN`, `torch.nn.GRU` and `torch.nn.LSTM`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

State = tuple[Tensor, ...]  # h, or h and c


class Weights(NamedTuple):
    """Of one layer in one direction: G is 1 (RNN), 3 (GRU) or 4 (LSTM)."""

    w_ih: Tensor  # (G H, C)
    w_hh: Tensor  # (G H, H)
    b_ih: Tensor  # (G H,)
    b_hh: Tensor  # (G H,)


def run_layers(
    cell: type[Function],
    x: Tensor,
    states: State,
    weights: Sequence[Tensor],
    *,
    has_biases: bool,
    is_bidirectional: bool,
    between: Callable[[Tensor], Tensor],
) -> tuple[Tensor, State]:
    """Runs stacked layers.

    Args:
        cell: One of `CELLS`.
        x: ``(T, b, C)``.
        states: Of all layers and directions, each ``(layers × directions, b, H)``.
        weights: In PyTorch's order.
        between: Applied to the sequence between two layers: the dropout.

    Returns:
        The last layer's sequence ``(T, b, directions × H)``, and the states after it.
    """
    num_directions = 2 if is_bidirectional else 1
    per_run = 4 if has_biases else 2
    runs = [weights[i : i + per_run] for i in range(0, len(weights), per_run)]
    last_states: list[State] = []
    for number, run in enumerate(runs):
        direction = number % num_directions
        if direction == 0:
            x = between(x) if number else x
            sequences: list[Tensor] = []
        zeros = run[0].new_zeros(run[0].shape[0])
        w = Weights(*run) if has_biases else Weights(run[0], run[1], zeros, zeros)
        state = [s[number] for s in states]
        sequence, *state = cell.apply(x, *state, *w, direction == 1)  # type: ignore[no-untyped-call]
        sequences.append(sequence)
        last_states.append(tuple(state))
        if direction == num_directions - 1:
            x = torch.cat(sequences, 2) if is_bidirectional else sequence
    return x, tuple(torch.stack(s) for s in zip(*last_states, strict=True))


def _project(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """All steps' inputs to the gates in one product: T tensors ``(b, G H)``."""
    flat = torch.addmm(b, x.reshape(-1, x.shape[2]), w.t())
    return _by_step(flat.view(x.shape[0], x.shape[1], -1))


def _by_step(sequence: Tensor) -> tuple[Tensor, ...]:
    """T tensors of ``(T, b, ·)``; `unbind` would be traced as twice as many operations."""
    return tuple(sequence.select(0, t) for t in range(sequence.shape[0]))


def _weight_gradients(
    x: Tensor, previous: Tensor, w_ih: Tensor, d_in: Tensor, d_hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, w_ih, w_hh, b_ih and b_hh.

    Args:
        previous: The states before each step ``(T b, H)``.
        d_in: The gradient by what the input adds to the gates ``(T b, G H)``.
        d_hidden: The same of the state; the same tensor, where both just add up.
    """
    d_x = (d_in @ w_ih).view(x.shape)
    b_ih = d_in.sum(0)
    b_hh = b_ih if d_hidden is d_in else d_hidden.sum(0)
    return d_x, d_in.t() @ x.reshape(-1, x.shape[2]), d_hidden.t() @ previous, b_ih, b_hh


def _stepwise(flat: Tensor, num_steps: int) -> tuple[Tensor, ...]:
    """T tensors ``(b, ...)`` of one ``(T b, ...)``."""
    return _by_step(flat.view(num_steps, -1, *flat.shape[1:]))


def _cut(gates: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Along the second axis."""
    parts: tuple[Tensor, ...] = torch.split(gates, list(sizes), 1)
    return parts


def _steps(num_steps: int, is_reverse: bool) -> list[int]:
    return list(range(num_steps))[:: -1 if is_reverse else 1]


class _RnnTanh(Function):
    """h ← tanh(W_ih x + b_ih + W_hh h + b_hh)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
        is_reverse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        inputs = _project(x, w_ih, b_ih)
        after, previous = list(inputs), list(inputs)
        for t in _steps(len(inputs), is_reverse):
            previous[t] = h
            h = torch.tanh(inputs[t] + torch.addmm(b_hh, h, w_hh.t()))
            after[t] = h
        ctx.kept = x, w_ih, w_hh, torch.cat(after), torch.cat(previous), is_reverse
        return torch.stack(after), h.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_sequence, d_h = grads
        x, w_ih, w_hh, after, previous, is_reverse = ctx.kept
        upstream = _by_step(d_sequence)
        slopes = _stepwise(1 - after * after, len(upstream))
        d_gates = list(upstream)
        for t in reversed(_steps(len(upstream), is_reverse)):
            d_gates[t] = (d_h + upstream[t]) * slopes[t]
            d_h = d_gates[t] @ w_hh
        d_all = torch.cat(d_gates)
        d_x, *d_w = _weight_gradients(x, previous, w_ih, d_all, d_all)
        return d_x, d_h, *d_w, None


class _Gru(Function):
    """r, z ← σ(…); n ← tanh(W_in x + b_in + r (W_hn h + b_hn)); h ← (1 − z) n + z h."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor,
        is_reverse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        size = h.shape[1]
        inputs = _project(x, w_ih, b_ih)
        after, kept = list(inputs), [inputs] * len(inputs)
        for t in _steps(len(inputs), is_reverse):
            before = h
            i_rz, i_n = _cut(inputs[t], 2 * size, size)
            h_rz, h_n = _cut(torch.addmm(b_hh, h, w_hh.t()), 2 * size, size)
            rz = torch.sigmoid(i_rz + h_rz)
            r, z = _cut(rz, size, size)
            n = torch.tanh(i_n + r * h_n)
            h = n + z * (h - n)
            after[t], kept[t] = h, (before, rz, n, h_n)
        ctx.kept = x, w_ih, w_hh, [torch.cat(k) for k in zip(*kept, strict=True)], is_reverse
        return torch.stack(after), h.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_sequence, d_h = grads
        x, w_ih, w_hh, (previous, rz, n, h_n), is_reverse = ctx.kept
        size, upstream = n.shape[1], _by_step(d_sequence)
        r, z = _cut(rz, size, size)
        by_n = (1 - z) * (1 - n * n)
        by_gate = [by_n * h_n * r * (1 - r), (previous - n) * z * (1 - z), by_n * r]
        factors = _stepwise(torch.stack(by_gate, 1), len(upstream))  # (b, 3, H) each
        by_h = _stepwise(z, len(upstream))
        d_after, d_gates = list(upstream), list(upstream)
        for t in reversed(_steps(len(upstream), is_reverse)):
            d_after[t] = d_h + upstream[t]
            d_gates[t] = (d_after[t].unsqueeze(1) * factors[t]).view(-1, 3 * size)
            d_h = d_after[t] * by_h[t] + d_gates[t] @ w_hh
        d_hidden = torch.cat(d_gates)
        d_in = torch.cat([d_hidden[:, : 2 * size], torch.cat(d_after) * by_n], 1)
        d_x, *d_w = _weight_gradients(x, previous, w_ih, d_in, d_hidden)
        return d_x, d_h, *d_w, None


class _Lstm(Function):
    """i, f, o ← σ(…), g ← tanh(…); c ← f c + i g; h ← o tanh(c)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor,
        b_hh: Tensor, is_reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        size = h.shape[1]
        inputs = _project(x, w_ih, b_ih)
        after, kept = list(inputs), [inputs] * len(inputs)
        for t in _steps(len(inputs), is_reverse):
            before, c_before = h, c
            gates = inputs[t] + torch.addmm(b_hh, h, w_hh.t())
            a_if, a_g, a_o = _cut(gates, 2 * size, size, size)
            i_f, g, o = torch.sigmoid(a_if), torch.tanh(a_g), torch.sigmoid(a_o)
            i, f = _cut(i_f, size, size)
            c = f * c_before + i * g
            tanh_c = torch.tanh(c)
            h = o * tanh_c
            after[t], kept[t] = h, (before, i_f, g, o, c_before, tanh_c)
        ctx.kept = x, w_ih, w_hh, [torch.cat(k) for k in zip(*kept, strict=True)], is_reverse
        return torch.stack(after), h.clone(), c.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_sequence, d_h, d_c = grads
        x, w_ih, w_hh, (previous, i_f, g, o, c_before, tanh_c), is_reverse = ctx.kept
        size, upstream = g.shape[1], _by_step(d_sequence)
        i, f = _cut(i_f, size, size)
        by_gate = [g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g)]
        by_c = _stepwise(torch.stack(by_gate, 1), len(upstream))  # (b, 3, H) each
        by_h = _stepwise(tanh_c * o * (1 - o), len(upstream))
        through = _stepwise(o * (1 - tanh_c * tanh_c), len(upstream))
        forget = _stepwise(f, len(upstream))
        d_gates = list(upstream)
        for t in reversed(_steps(len(upstream), is_reverse)):
            d_h = d_h + upstream[t]
            d_c = d_c + d_h * through[t]
            d_ifg = (d_c.unsqueeze(1) * by_c[t]).view(-1, 3 * size)
            d_gates[t] = torch.cat([d_ifg, d_h * by_h[t]], 1)
            d_c = d_c * forget[t]
            d_h = d_gates[t] @ w_hh
        d_all = torch.cat(d_gates)
        d_x, *d_w = _weight_gradients(x, previous, w_ih, d_all, d_all)
        return d_x, d_h, d_c, *d_w, None


CELLS: dict[str, type[Function]] = {"rnn_tanh": _RnnTanh, "gru": _Gru, "lstm": _Lstm}
