"""Batch normalization by the statistics of the batch, with its gradient by hand.

Autograd's own would pass over the activations a dozen times and keep three of them.

Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class BatchNorm(Function):
    """``(b, C, ...)`` to the same, and the batch's mean and biased variance ``(C,)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalizes."""
        axes, shape = _axes(x)
        mean = x.mean(axes)
        centered = x - mean.view(shape)
        var = (centered * centered).mean(axes)
        rstd = torch.rsqrt(var + eps)
        ctx.kept = centered, rstd, weight
        ctx.mark_non_differentiable(mean, var)
        return centered * (rstd * weight).view(shape) + bias.view(shape), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients by x, weight and bias."""
        d_y = grads[0]
        centered, rstd, weight = ctx.kept
        axes, shape = _axes(d_y)
        count = d_y.numel() // d_y.shape[1]
        d_bias = d_y.sum(axes)
        d_weight = (d_y * centered).sum(axes) * rstd
        scale = weight * rstd
        by_centered = -(scale * rstd * d_weight) / count
        shift = -(scale * d_bias) / count
        d_x = d_y * scale.view(shape) + centered * by_centered.view(shape) + shift.view(shape)
        return d_x, d_weight, d_bias, None


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """All axes but the channels', and the shape of something by channel."""
    return [0, *range(2, x.dim())], [1, -1, *(1 for _ in x.shape[2:])]
