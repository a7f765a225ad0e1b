"""A small module per layer kind and configuration, and whether it is exported or refused.

`tests.export.layer_law` runs each of them, `tests/export/test_layers.py` judges, and
``docs/layers.md`` lists them all. Shapes are small: batches of 4 for the trace, at most 8 time
steps and 8 channels, and lengths of time other than the batches that are run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

TRACED_LENGTH = 4
Draw = Callable[[int], Tensor]  # by the length of the batch


@dataclass(frozen=True, slots=True)
class Case:
    """One row of ``docs/layers.md``.

    Attributes:
        draws: By input name, in the order in which the module takes them.
        min_batch: The smallest batch that it trains on.
        refusal: What the error must name (a regular expression); None: exported exactly.
        varying: The axis of the inputs whose length varies from batch to batch; 0: none.
    """

    kind: str
    configuration: str
    build: Callable[[], nn.Module]
    draws: dict[str, Draw]
    min_batch: int = 1
    refusal: str | None = None
    varying: int = 0

    def module(self) -> nn.Module:
        """The module in training mode, always the same one, no parameter at a special value."""
        torch.manual_seed(7)
        module = copy.deepcopy(self.build()).train()  # some of its layers may be built but once
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in module.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_()
                if name.endswith("running_var"):
                    buffer.uniform_(0.5, 2.0)
        return module

    def inputs(self, length: int, seed: int = 0) -> dict[str, Tensor]:
        torch.manual_seed(1000 * seed + length)
        inputs = {name: draw(length) for name, draw in self.draws.items()}
        if self.varying:
            inputs = {
                name: x.narrow(self.varying, 0, x.shape[self.varying] - length % 4)
                for name, x in inputs.items()
            }
        return inputs


def case(
    kind: str,
    configuration: str,
    build: Callable[[], nn.Module],
    *draws: Draw,
    min_batch: int = 1,
    refusal: str | None = None,
    varying: int = 0,
) -> Case:
    named = dict(zip(("x", "y", "z"), draws, strict=False))
    return Case(kind, configuration, build, named, min_batch, refusal, varying)


def normal(*shape: int) -> Draw:
    return lambda length: torch.randn(length, *shape)


def whole(low: int, high: int, *shape: int) -> Draw:
    """Float32 that are whole numbers in [low, high]: full of ties and of kinks."""
    return lambda length: torch.randint(low, high + 1, (length, *shape)).float()


def tokens(num_values: int, *shape: int) -> Draw:
    return lambda length: torch.randint(0, num_values, (length, *shape))


class Of(nn.Module):
    """A module given as a function of itself and its inputs."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, nn.Module | nn.Parameter):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def after_linear(activation: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 8), activation)


def on_series(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv1d(3, 4, 1), layer)


def on_image(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 4, 1), layer)


def of_linear(function: Callable[..., Any], width: int = 6) -> Callable[[], nn.Module]:
    """The function of a linear layer's output."""
    return lambda: Of(lambda m, *xs: function(*map(m.linear, xs)), linear=nn.Linear(width, width))


def of(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    """A function of the inputs alone: a block without parameters."""
    return lambda: Of(lambda m, *xs: function(*xs))


def recurrent(
    build: Callable[..., nn.Module], pick: Callable[..., Any] = lambda out: out[0], **options: Any
) -> Callable[[], nn.Module]:
    """A recurrent layer of width 5 on (b, t, 3); ``pick`` takes what it returns."""
    return lambda: Of(lambda m, x: pick(m.layer(x)), layer=build(3, 5, batch_first=True, **options))


def time_first(build: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Of(
        lambda m, x: m.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=build(3, 5, **options)
    )


VECTOR = normal(6)
STEPS = normal(6, 3)  # (b, t, c)
STEPS4 = normal(4, 3)
WIDE = normal(6, 6)  # (b, t, c)
SERIES = normal(3, 8)  # (b, c, t)
SERIES4 = normal(4, 8)
IMAGE = normal(3, 7, 6)  # (b, c, h, w)
IMAGE4 = normal(4, 7, 6)
TIES = whole(0, 2, 3, 8)
TIES2 = whole(0, 2, 3, 7, 6)
KINKS = whole(-7, 7, 3, 8)

LINEAR = [
    case("Linear", "(b, c)", lambda: nn.Linear(6, 5), VECTOR),
    case("Linear", "(b, t, c)", lambda: nn.Linear(3, 5), STEPS),
    case("Linear", "no bias", lambda: nn.Linear(6, 5, bias=False), VECTOR),
    case("Linear", "as wide as the batch is long", lambda: nn.Linear(4, 4), normal(4)),
    case("Linear", "one output", lambda: nn.Linear(6, 1), VECTOR),
    case(
        "Linear",
        "one layer in two places",
        lambda: Of(lambda m, x: m.l(torch.tanh(m.l(x))), l=nn.Linear(6, 6)),
        VECTOR,
    ),
    case(
        "Linear",
        "a parameter without use",
        lambda: Of(lambda m, x: m.l(x), l=nn.Linear(6, 6), idle=nn.Linear(2, 2)),
        VECTOR,
        refusal="idle.weight",
    ),
    case("Bilinear", "two inputs", lambda: nn.Bilinear(6, 3, 4), VECTOR, normal(3)),
]

CONVOLUTION = [
    case("Conv1d", "kernel 3", lambda: nn.Conv1d(3, 4, 3), SERIES),
    case("Conv1d", "kernel 1, no bias", lambda: nn.Conv1d(3, 4, 1, bias=False), SERIES),
    case("Conv1d", "stride 2", lambda: nn.Conv1d(3, 4, 3, stride=2), SERIES),
    case("Conv1d", "stride over kernel", lambda: nn.Conv1d(3, 4, 2, stride=3), SERIES),
    case("Conv1d", "padding 2", lambda: nn.Conv1d(3, 4, 3, padding=2), SERIES),
    case("Conv1d", "stride 3, padding 1", lambda: nn.Conv1d(3, 4, 5, 3, 1), SERIES),
    case("Conv1d", "groups 2", lambda: nn.Conv1d(4, 6, 3, groups=2), SERIES4),
    case("Conv1d", "depthwise", lambda: nn.Conv1d(4, 4, 3, padding=1, groups=4), SERIES4),
    case("Conv1d", "depthwise × 2, stride 2", lambda: nn.Conv1d(4, 8, 3, 2, groups=4), SERIES4),
    case("Conv1d", "dilation 2", lambda: nn.Conv1d(3, 4, 3, dilation=2), SERIES),
    case("Conv1d", "padding same", lambda: nn.Conv1d(3, 4, 3, padding="same"), SERIES),
    case("Conv1d", "padding same, even kernel", lambda: nn.Conv1d(3, 4, 4, padding="same"), SERIES),
    case(
        "Conv1d",
        "padding same, even kernel, dilation 3, groups 3",
        lambda: nn.Conv1d(3, 6, 2, padding="same", dilation=3, groups=3),
        SERIES,
    ),
    case(
        "Conv1d",
        "causal padding",
        lambda: Of(lambda m, x: m.conv(F.pad(x, (4, 0))), conv=nn.Conv1d(3, 4, 3, dilation=2)),
        SERIES,
    ),
    *(
        case(
            "Conv1d",
            f"padding mode {mode}",
            lambda mode=mode: nn.Conv1d(3, 4, 3, padding=2, padding_mode=mode),  # type: ignore[misc]
            SERIES,
        )
        for mode in ("reflect", "replicate", "circular")
    ),
    case("Conv2d", "kernel 3", lambda: nn.Conv2d(3, 4, 3), IMAGE),
    case("Conv2d", "kernel 1, no bias", lambda: nn.Conv2d(3, 4, 1, bias=False), IMAGE),
    case("Conv2d", "kernel 3 × 2, stride 2 × 1", lambda: nn.Conv2d(3, 4, (3, 2), (2, 1)), IMAGE),
    case("Conv2d", "stride 2, padding 1", lambda: nn.Conv2d(3, 4, 3, 2, 1), IMAGE),
    case("Conv2d", "padding 0 × 2", lambda: nn.Conv2d(3, 4, 3, padding=(0, 2)), IMAGE),
    case("Conv2d", "groups 2, stride 2", lambda: nn.Conv2d(4, 6, 3, 2, groups=2), IMAGE4),
    case("Conv2d", "depthwise", lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), IMAGE4),
    case("Conv2d", "depthwise × 2, stride 2", lambda: nn.Conv2d(4, 8, 3, 2, groups=4), IMAGE4),
    case("Conv2d", "dilation 2 × 1", lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1)), IMAGE),
    case("Conv2d", "padding same", lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), IMAGE),
    case(
        "Conv2d",
        "asymmetric padding",
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(3, 4, 3, stride=2)),
        IMAGE,
    ),
    case("ConvTranspose1d", "kernel 3", lambda: nn.ConvTranspose1d(3, 4, 3), SERIES),
    case("ConvTranspose1d", "stride 2", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), SERIES),
    case(
        "ConvTranspose1d",
        "stride 2, padding 1, output padding 1",
        lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1),
        SERIES,
    ),
    case(
        "ConvTranspose1d",
        "groups 2, dilation 2, no bias",
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2, bias=False),
        SERIES4,
    ),
    case("ConvTranspose2d", "kernel 3", lambda: nn.ConvTranspose2d(3, 4, 3), IMAGE),
    case(
        "ConvTranspose2d",
        "stride 2 × 1, padding 1, output padding 1 × 0",
        lambda: nn.ConvTranspose2d(3, 4, 3, (2, 1), 1, (1, 0)),
        IMAGE,
    ),
    case(
        "ConvTranspose2d",
        "groups 2, stride 2",
        lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        IMAGE4,
    ),
    case(
        "ConvTranspose2d",
        "depthwise",
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, padding=1),
        IMAGE4,
    ),
]

NORMALIZATION = [
    case("BatchNorm1d", "(b, c)", lambda: nn.BatchNorm1d(6), VECTOR, min_batch=2),
    case("BatchNorm1d", "(b, c, t)", lambda: nn.BatchNorm1d(3), SERIES),
    case(
        "BatchNorm1d",
        "after Conv1d",
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()),
        SERIES,
    ),
    case("BatchNorm1d", "affine off", on_series(nn.BatchNorm1d(4, affine=False)), SERIES),
    case(
        "BatchNorm1d",
        "affine off, alone in a block",
        lambda: nn.BatchNorm1d(3, affine=False),
        SERIES,
        refusal="no parameters",
    ),
    case("BatchNorm1d", "momentum 0.3, eps 0.1", lambda: nn.BatchNorm1d(3, 0.1, 0.3), SERIES),
    case(
        "BatchNorm1d",
        "momentum none: a cumulative average",
        lambda: nn.BatchNorm1d(3, momentum=None),
        SERIES,
        refusal="momentum",
    ),
    case(
        "BatchNorm1d",
        "no running statistics",
        on_series(nn.BatchNorm1d(4, track_running_stats=False)),
        SERIES,
    ),
    case(
        "BatchNorm1d",
        "one layer in two places",
        lambda: Of(
            lambda m, x: m.norm(m.conv(m.norm(x))), norm=nn.BatchNorm1d(3), conv=nn.Conv1d(3, 3, 3)
        ),
        SERIES,
    ),
    case(
        "BatchNorm2d",
        "after Conv2d",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)),
        IMAGE,
    ),
    case("BatchNorm2d", "affine off", on_image(nn.BatchNorm2d(4, affine=False)), IMAGE),
    case("BatchNorm2d", "momentum 0.01", lambda: nn.BatchNorm2d(3, momentum=0.01), IMAGE),
    case("LayerNorm", "last dimension", lambda: nn.LayerNorm(6), WIDE),
    case("LayerNorm", "two dimensions", lambda: nn.LayerNorm((3, 8)), SERIES),
    case("LayerNorm", "affine off", lambda: nn.LayerNorm(6, elementwise_affine=False), WIDE),
    case("LayerNorm", "no bias", lambda: nn.LayerNorm(6, bias=False), WIDE),
    case("RMSNorm", "last dimension", lambda: nn.RMSNorm(6), WIDE),
    case("GroupNorm", "2 groups of (b, c, t)", lambda: nn.GroupNorm(2, 4), SERIES4),
    case("GroupNorm", "1 group of (b, c, h, w)", lambda: nn.GroupNorm(1, 4), IMAGE4),
    case("GroupNorm", "a group each", lambda: nn.GroupNorm(4, 4), SERIES4),
    case("GroupNorm", "2 groups of (b, c)", lambda: nn.GroupNorm(2, 6), VECTOR),
    case("GroupNorm", "affine off", lambda: nn.GroupNorm(2, 4, affine=False), IMAGE4),
    case("InstanceNorm1d", "default", lambda: nn.InstanceNorm1d(3), SERIES),
    case("InstanceNorm1d", "affine", lambda: nn.InstanceNorm1d(3, affine=True), SERIES),
    case(
        "InstanceNorm1d",
        "running statistics",
        lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        SERIES,
        refusal="running statistics",
    ),
    case("InstanceNorm2d", "affine", lambda: nn.InstanceNorm2d(3, affine=True), IMAGE),
    case(
        "weight_norm",
        "Linear",
        lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        VECTOR,
    ),
    case(
        "weight_norm",
        "Conv1d",
        lambda: parametrizations.weight_norm(nn.Conv1d(3, 4, 3)),
        SERIES,
    ),
    case(
        "spectral_norm",
        "Linear",
        lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
        VECTOR,
        refusal="parametrizations",
    ),
]


def attention_by_hand(m: Any, x: Tensor) -> Tensor:
    weights = F.dropout((x @ x.transpose(1, 2)).softmax(-1), 0.4, m.training)
    return m.linear(weights @ x)  # type: ignore[no-any-return]


DROPOUT = [
    case("Dropout", "(b, c)", lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)), VECTOR),
    case("Dropout", "(b, c, t)", on_series(nn.Dropout(0.3)), SERIES),
    case("Dropout", "alone in a block", lambda: nn.Dropout(0.3), SERIES, refusal="no parameters"),
    case("F.dropout", "alone in a block", lambda: Of(lambda m, x: F.dropout(x, 0.3, m.training)),
         SERIES, refusal="no parameters"),
    case(
        "Dropout",
        "in place",
        after_linear(nn.Dropout(0.5, inplace=True)),
        VECTOR,
    ),
    case("Dropout", "rate 0", lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0)), VECTOR),
    case(
        "Dropout",
        "one layer in two places",
        lambda: Of(lambda m, x: m.drop(m.linear(m.drop(x))), drop=nn.Dropout(0.5),
                   linear=nn.Linear(6, 8)),
        VECTOR,
    ),
    case(
        "Dropout",
        "(t, b, c)",
        lambda: Of(lambda m, x: m.linear(m.drop(x.transpose(0, 1))).transpose(0, 1),
                   drop=nn.Dropout(0.5), linear=nn.Linear(3, 4)),
        STEPS,
    ),
    case(
        "Dropout",
        "(b · t, c)",
        lambda: Of(lambda m, x: m.drop(m.linear(x.flatten(0, 1))).unflatten(0, (-1, 6)),
                   drop=nn.Dropout(0.5), linear=nn.Linear(3, 4)),
        STEPS,
    ),
    case(
        "Dropout",
        "of a weight: without a batch",
        lambda: Of(lambda m, x: x @ m.drop(m.w), drop=nn.Dropout(0.5), w=weight(6, 4)),
        VECTOR,
        refusal="(?i)dropout",
    ),
    case(
        "F.dropout",
        "training=self.training",
        lambda: Of(lambda m, x: F.dropout(m.linear(x), 0.5, m.training), linear=nn.Linear(6, 8)),
        VECTOR,
    ),
    case("F.dropout", "of attention weights", lambda: Of(attention_by_hand,
         linear=nn.Linear(6, 4)), WIDE),
    case(
        "F.dropout",
        "in evaluation too",
        lambda: Of(lambda m, x: F.dropout(m.linear(x), 0.5), linear=nn.Linear(6, 8)),
        VECTOR,
        refusal="(?i)dropout|random",
    ),
    case("Dropout1d", "(b, c, t)", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Dropout1d(0.5)),
         SERIES),
    case("Dropout2d", "(b, c, h, w)", lambda: nn.Sequential(nn.Conv2d(3, 4, 3),
         nn.Dropout2d(0.5)), IMAGE),
    case("AlphaDropout", "(b, c)", after_linear(nn.AlphaDropout(0.5)), VECTOR,
         refusal="alpha_dropout"),
    case("RReLU", "random slopes", after_linear(nn.RReLU()), VECTOR, refusal="rrelu"),
]  # fmt: skip

EMBEDDING = [
    case("Embedding", "(b, t)", lambda: nn.Embedding(7, 4), tokens(7, 6)),
    case("Embedding", "(b,)", lambda: nn.Embedding(7, 4), tokens(7)),
    case("Embedding", "padding_idx 0", lambda: nn.Embedding(5, 4, padding_idx=0), tokens(5, 6)),
    case("Embedding", "padding_idx -1", lambda: nn.Embedding(5, 4, padding_idx=-1), tokens(5, 6)),
    case(
        "Embedding",
        "scale_grad_by_freq",
        lambda: nn.Embedding(5, 4, scale_grad_by_freq=True),
        tokens(5, 6),
        refusal="scale_grad_by_freq",
    ),
    case(
        "Embedding",
        "max_norm: renormalized in the forward pass",
        lambda: nn.Embedding(5, 4, max_norm=1.0),
        tokens(5, 6),
        refusal="(?i)embedding|max_norm|renorm",
    ),
    case(
        "Embedding",
        "of positions, added",
        lambda: Of(lambda m, x: m.words(x) + m.places(torch.arange(x.shape[1])),
                   words=nn.Embedding(7, 4), places=nn.Embedding(6, 4)),
        tokens(7, 6),
    ),
    case(
        "Embedding",
        "one-hot by hand",
        lambda: Of(lambda m, x: m.linear(F.one_hot(x, 7).float()), linear=nn.Linear(7, 4)),
        tokens(7, 6),
    ),
]  # fmt: skip


def both(out: Any) -> Any:
    """The sequence and the final hidden state of every layer: (b, t, h), (b, layers, h)."""
    return out[0], out[1].transpose(0, 1)


def all_three(out: Any) -> Any:
    sequence, (hidden, memory) = out
    return {"sequence": sequence, "hidden": hidden[-1], "memory": memory.transpose(0, 1)}


def cell_by_cell(m: Any, x: Tensor) -> Tensor:
    hidden = x.new_zeros(len(x), 5)
    for step in x.unbind(1):
        hidden = m.cell(step, hidden)
    return hidden


def memory_cell_by_cell(m: Any, x: Tensor) -> Tensor:
    state = None
    for time in range(x.shape[1]):
        state = m.cell(x[:, time], state)
    assert state is not None
    return state[0]  # type: ignore[no-any-return]


def packed(m: Any, x: Tensor) -> Tensor:
    lengths = 1 + torch.arange(len(x)) % x.shape[1]
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
    return m.layer(sequence)[1][-1]  # type: ignore[no-any-return]


RECURRENT = [
    case("GRU", "sequence", recurrent(nn.GRU), STEPS4),
    case("GRU", "final hidden state", recurrent(nn.GRU, lambda out: out[1][-1]), STEPS4),
    case("GRU", "last step", recurrent(nn.GRU, lambda out: out[0][:, -1]), STEPS4),
    case("GRU", "time first", time_first(nn.GRU), STEPS4),
    case("GRU", "no bias", recurrent(nn.GRU, bias=False), STEPS4),
    case("GRU", "bidirectional, sequence and state", recurrent(nn.GRU, both, bidirectional=True),
         STEPS4),
    case("GRU", "2 layers, sequence and state", recurrent(nn.GRU, both, num_layers=2), STEPS4),
    case("GRU", "2 layers, dropout", recurrent(nn.GRU, num_layers=2, dropout=0.4), STEPS4),
    case(
        "GRU",
        "2 layers, bidirectional, dropout, time first",
        time_first(nn.GRU, num_layers=2, bidirectional=True, dropout=0.4),
        STEPS4,
    ),
    case(
        "GRU",
        "initial state given",
        lambda: Of(lambda m, x, h: m.layer(x, m.start(h)[None])[0],
                   layer=nn.GRU(3, 5, batch_first=True), start=nn.Linear(6, 5)),
        STEPS4,
        VECTOR,
    ),
    case("GRU", "of a packed sequence", lambda: Of(packed, layer=nn.GRU(3, 5, batch_first=True)),
         STEPS4, refusal="packed sequence"),
    case("GRUCell", "in a loop", lambda: Of(cell_by_cell, cell=nn.GRUCell(3, 5)), STEPS4,
         refusal="GRUCell"),
    case("LSTM", "sequence", recurrent(nn.LSTM), STEPS4),
    case("LSTM", "final hidden state", recurrent(nn.LSTM, lambda out: out[1][0][-1]), STEPS4),
    case("LSTM", "time first", time_first(nn.LSTM), STEPS4),
    case("LSTM", "no bias", recurrent(nn.LSTM, bias=False), STEPS4),
    case("LSTM", "bidirectional, sequence, state and memory",
         recurrent(nn.LSTM, all_three, bidirectional=True), STEPS4),
    case("LSTM", "2 layers, sequence, state and memory",
         recurrent(nn.LSTM, all_three, num_layers=2), STEPS4),
    case("LSTM", "2 layers, dropout", recurrent(nn.LSTM, num_layers=2, dropout=0.4), STEPS4),
    case(
        "LSTM",
        "2 layers, bidirectional, dropout, time first, no bias",
        time_first(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.4, bias=False),
        STEPS4,
    ),
    case("LSTM", "proj_size", recurrent(nn.LSTM, all_three, proj_size=2), STEPS4,
         refusal="proj_size"),
    case("LSTMCell", "in a loop", lambda: Of(memory_cell_by_cell, cell=nn.LSTMCell(3, 5)), STEPS4,
         refusal="LSTMCell"),
    case("RNN", "tanh, sequence and state", recurrent(nn.RNN, both), STEPS4),
    case("RNN", "tanh, 2 layers, bidirectional, dropout",
         recurrent(nn.RNN, num_layers=2, bidirectional=True, dropout=0.4), STEPS4),
    case("RNN", "relu", recurrent(nn.RNN, nonlinearity="relu"), STEPS4, refusal="ReLU RNN"),
]  # fmt: skip


def attend(
    *, weights: bool = False, mask: Callable[[Tensor], dict[str, Any]] = lambda x: {},
    **options: Any,
) -> Callable[[], nn.Module]:  # fmt: skip
    """Self-attention on (b, t, 6) with 2 heads; ``weights``: they are an output too."""

    def run(m: Any, x: Tensor) -> Any:
        out = m.attention(x, x, x, need_weights=weights, **mask(x))
        return out if weights else out[0]

    return lambda: Of(
        run, attention=nn.MultiheadAttention(6, 2, **({"batch_first": True} | options))
    )


def padding_of(x: Tensor) -> Tensor:
    """True for the steps to leave out, never the first: (b, t)."""
    return (x[..., 0] > 0.3) & (torch.arange(x.shape[1]) > 0)


def causal_of(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


def attend_time_first(m: Any, x: Tensor) -> Any:
    x = x.transpose(0, 1)
    return m.attention(x, x, x)[0].transpose(0, 1)


def cross(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return m.attention(q, k, v)


def transformer(**options: Any) -> Callable[[], nn.TransformerEncoderLayer]:
    return lambda: nn.TransformerEncoderLayer(6, 2, 8, **({"batch_first": True} | options))


def sdpa(**options: Any) -> Callable[[], nn.Module]:
    """On (b, heads, t, d); the query is projected."""
    return lambda: Of(
        lambda m, q, k, v: F.scaled_dot_product_attention(m.linear(q), k, v, **options),
        linear=nn.Linear(3, 3),
    )


HEADS = (normal(2, 6, 3), normal(2, 7, 3), normal(2, 7, 3))
ATTENTION = [
    case("MultiheadAttention", "self, weights off", attend(), WIDE),
    case("MultiheadAttention", "self, weights on", attend(weights=True), WIDE),
    case("MultiheadAttention", "dropout, weights off", attend(dropout=0.3), WIDE),
    case("MultiheadAttention", "dropout, weights on", attend(weights=True, dropout=0.3), WIDE),
    case(
        "MultiheadAttention",
        "weights of each head",
        attend(weights=True, mask=lambda x: {"average_attn_weights": False}),
        WIDE,
    ),
    case("MultiheadAttention", "no bias", attend(bias=False), WIDE),
    case("MultiheadAttention", "bias and zero appended", attend(add_bias_kv=True,
         add_zero_attn=True), WIDE),
    case(
        "MultiheadAttention",
        "time first, dropout",
        lambda: Of(attend_time_first, attention=nn.MultiheadAttention(6, 2, dropout=0.3)),
        WIDE,
    ),
    case(
        "MultiheadAttention",
        "key_padding_mask of the input, weights off",
        attend(mask=lambda x: {"key_padding_mask": padding_of(x)}),
        WIDE,
    ),
    case(
        "MultiheadAttention",
        "key_padding_mask of the input, weights on, dropout",
        attend(weights=True, dropout=0.3, mask=lambda x: {"key_padding_mask": padding_of(x)}),
        WIDE,
    ),
    case("MultiheadAttention", "causal attn_mask", attend(mask=lambda x: {
         "attn_mask": causal_of(x)}), WIDE),
    case(
        "MultiheadAttention",
        "causal and padded",
        attend(mask=lambda x: {"attn_mask": causal_of(x), "key_padding_mask": padding_of(x)}),
        WIDE,
    ),
    case(
        "MultiheadAttention",
        "kdim and vdim",
        lambda: Of(cross, attention=nn.MultiheadAttention(6, 2, kdim=3, vdim=5,
                                                          batch_first=True)),
        WIDE,
        normal(7, 3),
        normal(7, 5),
    ),
    case("TransformerEncoderLayer", "post-norm, relu, dropout 0.1", transformer(dropout=0.1),
         WIDE),
    case(
        "TransformerEncoderLayer",
        "pre-norm, gelu, dropout 0.1",
        transformer(dropout=0.1, norm_first=True, activation="gelu"),
        WIDE,
    ),
    case("TransformerEncoderLayer", "no dropout, no bias", transformer(dropout=0.0, bias=False),
         WIDE),
    case(
        "TransformerEncoderLayer",
        "padded",
        lambda: Of(lambda m, x: m.layer(x, src_key_padding_mask=padding_of(x)),
                   layer=transformer(dropout=0.1)()),
        WIDE,
    ),
    case(
        "TransformerEncoderLayer",
        "time first",
        lambda: Of(lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1),
                   layer=transformer(batch_first=False)()),
        WIDE,
    ),
    case(
        "TransformerEncoder",
        "2 layers",
        lambda: nn.TransformerEncoder(transformer()(), 2, enable_nested_tensor=False),
        WIDE,
    ),
    case(
        "TransformerDecoderLayer",
        "dropout 0.1",
        lambda: nn.TransformerDecoderLayer(6, 2, 8, dropout=0.1, batch_first=True),
        WIDE,
        normal(7, 6),
    ),
    case("F.scaled_dot_product_attention", "plain", sdpa(), *HEADS),
    case("F.scaled_dot_product_attention", "causal", sdpa(is_causal=True), *HEADS),
    case("F.scaled_dot_product_attention", "scale", sdpa(scale=0.3), *HEADS),
    case(
        "F.scaled_dot_product_attention",
        "boolean mask",
        sdpa(attn_mask=torch.ones(6, 7, dtype=torch.bool).tril(2)),
        *HEADS,
    ),
    case(
        "F.scaled_dot_product_attention",
        "additive mask",
        sdpa(attn_mask=torch.linspace(-1, 1, 42).view(6, 7)),
        *HEADS,
    ),
    case(
        "F.scaled_dot_product_attention",
        "dropout",
        lambda: Of(
            lambda m, q, k, v: F.scaled_dot_product_attention(
                m.linear(q), k, v, dropout_p=0.3 if m.training else 0.0
            ),
            linear=nn.Linear(3, 3),
        ),
        *HEADS,
    ),
    case(
        "F.scaled_dot_product_attention",
        "causal, dropout",
        lambda: Of(
            lambda m, x: F.scaled_dot_product_attention(
                m.linear(x), x, x, is_causal=True, dropout_p=0.3 if m.training else 0.0
            ),
            linear=nn.Linear(3, 3),
        ),
        HEADS[0],
    ),
]  # fmt: skip


POOLING = [
    case("MaxPool1d", "kernel 2", on_series(nn.MaxPool1d(2)), SERIES),
    case("MaxPool1d", "overlapping", on_series(nn.MaxPool1d(3, 1)), SERIES),
    case("MaxPool1d", "overlapping, padding", on_series(nn.MaxPool1d(3, 2, 1)), SERIES),
    case("MaxPool1d", "ties", lambda: nn.MaxPool1d(3, 2, 1), TIES),
    case("MaxPool1d", "all equal", lambda: nn.MaxPool1d(3, 1), whole(1, 1, 3, 8)),
    case("MaxPool1d", "after ReLU", lambda: nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(),
         nn.MaxPool1d(3, 2)), SERIES),
    case("MaxPool1d", "ceil_mode", on_series(nn.MaxPool1d(3, ceil_mode=True)), SERIES),
    case("MaxPool1d", "dilation", on_series(nn.MaxPool1d(3, 1, dilation=2)), SERIES),
    case("MaxPool2d", "kernel 2", on_image(nn.MaxPool2d(2)), IMAGE),
    case("MaxPool2d", "overlapping", on_image(nn.MaxPool2d(3, 1)), IMAGE),
    case("MaxPool2d", "overlapping, padding", on_image(nn.MaxPool2d(3, 2, 1)), IMAGE),
    case("MaxPool2d", "kernel 3 × 2, stride 1 × 2", on_image(nn.MaxPool2d((3, 2), (1, 2))), IMAGE),
    case("MaxPool2d", "ties", lambda: nn.MaxPool2d(3, 2, 1), TIES2),
    case("MaxPool2d", "all equal", lambda: nn.MaxPool2d(3, 1), whole(1, 1, 3, 7, 6)),
    case("MaxPool2d", "after ReLU", lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(),
         nn.MaxPool2d(2)), IMAGE),
    case("MaxPool2d", "ceil_mode, padding", on_image(nn.MaxPool2d(3, 2, 1, ceil_mode=True)), IMAGE),
    case("MaxPool2d", "dilation 2 × 1", on_image(nn.MaxPool2d(3, 1, dilation=(2, 1))), IMAGE),
    case("AvgPool1d", "kernel 2", on_series(nn.AvgPool1d(2)), SERIES),
    case("AvgPool1d", "overlapping", on_series(nn.AvgPool1d(3, 1)), SERIES),
    case("AvgPool1d", "padding", on_series(nn.AvgPool1d(3, 2, 1)), SERIES),
    case("AvgPool1d", "padding not counted",
         on_series(nn.AvgPool1d(3, 2, 1, count_include_pad=False)), SERIES),
    case("AvgPool1d", "ceil_mode", on_series(nn.AvgPool1d(3, ceil_mode=True)), SERIES),
    case("AvgPool1d", "ceil_mode, padding", on_series(nn.AvgPool1d(3, 2, 1, ceil_mode=True)),
         normal(3, 7)),
    case("AvgPool2d", "kernel 2", on_image(nn.AvgPool2d(2)), IMAGE),
    case("AvgPool2d", "padding", on_image(nn.AvgPool2d(3, 2, 1)), IMAGE),
    case("AvgPool2d", "padding 0 × 1, not counted",
         on_image(nn.AvgPool2d(3, 2, (0, 1), count_include_pad=False)), IMAGE),
    case("AvgPool2d", "ceil_mode, padding", on_image(nn.AvgPool2d(3, 2, 1, ceil_mode=True)), IMAGE),
    case("AvgPool2d", "ceil_mode, padding not counted", on_image(
         nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)), IMAGE),
    case("AvgPool2d", "divisor_override", on_image(nn.AvgPool2d(2, divisor_override=3)), IMAGE),
    case("AdaptiveAvgPool1d", "8 to 1", on_series(nn.AdaptiveAvgPool1d(1)), SERIES),
    case("AdaptiveAvgPool1d", "8 to 4", on_series(nn.AdaptiveAvgPool1d(4)), SERIES),
    case("AdaptiveAvgPool1d", "8 to 3", on_series(nn.AdaptiveAvgPool1d(3)), SERIES),
    case("AdaptiveAvgPool1d", "3 to 5", on_series(nn.AdaptiveAvgPool1d(5)), normal(3, 3)),
    case("AdaptiveAvgPool2d", "to 1", on_image(nn.AdaptiveAvgPool2d(1)), IMAGE),
    case("AdaptiveAvgPool2d", "6 × 4 to 2 × 2", on_image(nn.AdaptiveAvgPool2d(2)),
         normal(3, 6, 4)),
    case("AdaptiveAvgPool2d", "7 × 6 to 3 × 4", on_image(nn.AdaptiveAvgPool2d((3, 4))), IMAGE),
    case("AdaptiveMaxPool1d", "8 to 1", on_series(nn.AdaptiveMaxPool1d(1)), SERIES),
    case("AdaptiveMaxPool1d", "8 to 4, ties", lambda: nn.AdaptiveMaxPool1d(4), TIES),
    case("AdaptiveMaxPool1d", "8 to 3, ties", lambda: nn.AdaptiveMaxPool1d(3), TIES,
         refusal="overlap"),
    case("AdaptiveMaxPool2d", "to 1", on_image(nn.AdaptiveMaxPool2d(1)), IMAGE),
    case("AdaptiveMaxPool2d", "7 × 6 to 3 × 4, ties", lambda: nn.AdaptiveMaxPool2d((3, 4)), TIES2,
         refusal="overlap"),
]  # fmt: skip

ACTIVATION = [
    *(
        case(type(layer).__name__, configuration, after_linear(layer), VECTOR)
        for layer, configuration in (
            (nn.ReLU(), "default"),
            (nn.ReLU(inplace=True), "in place"),
            (nn.GELU(), "exact"),
            (nn.GELU("tanh"), "tanh"),
            (nn.SiLU(), "default"),
            (nn.SiLU(inplace=True), "in place"),
            (nn.Tanh(), "default"),
            (nn.Sigmoid(), "default"),
            (nn.Softmax(-1), "last dimension"),
            (nn.LogSoftmax(-1), "last dimension"),
            (nn.LeakyReLU(0.2), "slope 0.2"),
            (nn.ELU(0.7), "alpha 0.7"),
            (nn.Hardswish(), "default"),
            (nn.ReLU6(), "default"),
            (nn.Softplus(), "default"),
            (nn.Softplus(2.0, 1.0), "beta 2, threshold 1"),
            (nn.Mish(), "default"),
            (nn.PReLU(), "one slope"),
            (nn.PReLU(8), "a slope per channel"),
            (nn.GLU(), "last dimension"),
            (nn.SELU(), "default"),
            (nn.CELU(0.6), "alpha 0.6"),
            (nn.Hardsigmoid(), "default"),
            (nn.Hardtanh(-0.3, 0.4), "-0.3 to 0.4"),
            (nn.LogSigmoid(), "default"),
            (nn.Softsign(), "default"),
        )
    ),
    case("Softmax", "over time", lambda: nn.Sequential(nn.Linear(3, 5), nn.Softmax(1)), STEPS),
    case("PReLU", "a slope per channel, (b, c, t)", lambda: nn.PReLU(3), SERIES),
    case("GLU", "channels", lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.GLU(1)), SERIES),
    *(
        case(type(layer).__name__, "at the kinks", lambda layer=layer: layer, KINKS)  # type: ignore[misc]
        for layer in (
            nn.ReLU(),
            nn.LeakyReLU(0.2),
            nn.ELU(0.7),
            nn.Hardswish(),
            nn.ReLU6(),
            nn.Hardsigmoid(),
            nn.Hardtanh(-2, 3),
            nn.PReLU(),
        )
    ),
    case("abs, clamp, minimum", "at the kinks", of(lambda x, y: (x.abs() + x.clamp(-1, 2)
         + torch.minimum(x, y) + torch.maximum(x, y + 1))), KINKS, KINKS),
    case("exp, log, sqrt, pow", "after Linear", of_linear(lambda x: (x.abs() + 1).log()
         + x.exp() + (x.square() + 1).sqrt() + (x.abs() + 1) ** 1.5 + 2**x
         + (1 + x**2).rsqrt() + x.sin() * x.cos() + torch.erf(x)), VECTOR),
]  # fmt: skip


def add_in_place(m: Any, x: Tensor) -> Tensor:
    out = m.second(F.relu(m.first(x)))
    out += x
    return F.relu(out, inplace=True)


def write_in_place(m: Any, x: Tensor) -> Tensor:
    out = m.linear(x).clone()
    out[:, 0] = 2 * x[:, -1]
    out[:, 1:3] *= 0.5
    return out  # type: ignore[no-any-return]


def write_in_fresh(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6, 6)
    out[:, :, 1:4] = m.linear(x)
    return out


SHAPES = [
    case("residual add", "x + f(x)", lambda: Of(lambda m, x: x + m.linear(x),
         linear=nn.Linear(6, 6)), VECTOR),
    case("residual add", "in place", lambda: Of(add_in_place, first=nn.Linear(6, 5),
         second=nn.Linear(5, 6)), VECTOR),
    case("concat", "channels", of_linear(lambda x: torch.cat([x, x.tanh(), x[:, :1]], 1)), WIDE),
    case("concat", "two inputs", of_linear(lambda x, y: torch.cat([x, y], -1)), VECTOR, VECTOR),
    case("reshape", "flatten", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(),
         nn.Linear(24, 2)), SERIES),
    case("reshape", "by the batch's length", of_linear(lambda x: x.reshape(x.shape[0], -1)), WIDE),
    case("reshape", "view, -1 and time merged", of_linear(
         lambda x: x.view(-1, 6).tanh().view(-1, 6, 2, 3)), WIDE),
    case("reshape", "unflatten", of_linear(lambda x: nn.Unflatten(-1, (2, 3))(x)), WIDE),
    case("permute", "then contiguous view", of_linear(
         lambda x: x.permute(0, 2, 1).contiguous().view(len(x), -1)), STEPS_WIDE := normal(7, 6)),
    case("permute", "batch last and back", of_linear(
         lambda x: x.permute(2, 1, 0).cumsum(0).permute(2, 1, 0)), STEPS_WIDE),
    case("unsqueeze, expand, repeat", "to time steps", of_linear(
         lambda x: x.unsqueeze(1).expand(-1, 7, -1) + x[:, None].repeat(1, 7, 1)), VECTOR),
    case("mean", "over time", of_linear(lambda x: x.mean(1)), WIDE),
    case("mean", "over time and channels, kept", of_linear(lambda x: x.mean((1, 2), True)), WIDE),
    case("mean", "over the batch, taken away", of_linear(lambda x: x - x.mean(0)), WIDE),
    case("sum", "over time", of_linear(lambda x: x.sum(1)), WIDE),
    case("max", "over time", of_linear(lambda x: x.max(1).values), WIDE),
    case("max", "over time, ties", of(lambda x: x.max(2).values), TIES),
    case("amax", "over time, ties", of(lambda x: x.amax(2) + 2 * x.amin(2)), TIES),
    case("max", "global max pooling by F", of(lambda x: F.max_pool1d(x, x.shape[2])), TIES),
    case("std", "over time", of_linear(lambda x: x.std(1)), WIDE),
    case("std", "over time, correction 0, kept", of_linear(
         lambda x: x.std(1, correction=0, keepdim=True)), WIDE),
    case("var", "over time", of_linear(lambda x: x.var(1)), WIDE),
    case("norm", "over time", of_linear(lambda x: x.norm(dim=1)), WIDE),
    case("logsumexp", "over time", of_linear(lambda x: x.logsumexp(1)), WIDE),
    case("cumsum", "over time", of_linear(lambda x: x.cumsum(1)), WIDE),
    case("statistics", "mean, max and std", of_linear(
         lambda x: torch.cat([x.mean(1), x.max(1)[0], x.std(1)], 1)), WIDE),
    case("slicing", "last step", of_linear(lambda x: x[:, -1]), WIDE),
    case("slicing", "[:, 1:-1, ::2]", of_linear(lambda x: x[:, 1:-1, ::2]), WIDE),
    case("slicing", "differences of neighbors", of_linear(lambda x: x[:, 1:] - x[:, :-1]), WIDE),
    case("slicing", "select, narrow, unbind", of_linear(
         lambda x: x.select(1, 2) + x.narrow(1, 1, 3).sum(1) + x.unbind(1)[3]), WIDE),
    case("indexing", "a list of steps", of_linear(lambda x: x[:, [0, 4, 2, 4]]), WIDE),
    case("indexing", "index_select", of_linear(
         lambda x: x.index_select(1, torch.tensor([5, 0, 0]))), WIDE),
    case("indexing", "gather of the largest", of_linear(
         lambda x: x.gather(1, x.argmax(1, keepdim=True))), WIDE),
    case("indexing", "the step that an input names", of_linear(
         lambda x: x[torch.arange(len(x)), x.detach()[:, :, 0].argmax(1)]), WIDE),
    case("indexing", "written in place", lambda: Of(write_in_place, linear=nn.Linear(6, 6)), WIDE,
         refusal="in place"),
    case("indexing", "written in zeros", lambda: Of(write_in_fresh, linear=nn.Linear(6, 3)), WIDE,
         refusal="in place"),
    case("flip, roll", "over time", of_linear(lambda x: x.flip(1) * x.roll(2, 1)), WIDE),
    case("masked_fill, where", "of the input", of_linear(
         lambda x: x.masked_fill(x > 0.5, -1.0) + torch.where(x < 0, x, x * x)), WIDE),
    case("masked mean", "over the steps that are not padding", lambda: Of(
         lambda m, x: (m.linear(x) * ~padding_of(x)[..., None]).sum(1)
         / (~padding_of(x)).sum(1, keepdim=True), linear=nn.Linear(6, 6)), WIDE),
    case("einsum", "bilinear pooling", of_linear(lambda x: torch.einsum("btc,btd->bcd", x, x)),
         WIDE),
    case("einsum", "with a parameter", lambda: Of(
         lambda m, x: torch.einsum("btc,chd->bhtd", x, m.w), w=weight(6, 2, 3)), WIDE),
    case("bmm", "attention by hand", of_linear(
         lambda x: torch.bmm(torch.bmm(x, x.transpose(1, 2)).softmax(-1), x)), WIDE),
    case("matmul", "broadcast", lambda: Of(lambda m, x: m.w @ x, w=weight(2, 5, 6)),
         normal(2, 6, 3)),
    case("matmul", "with a vector", lambda: Of(lambda m, x: x @ m.w, w=weight(6)), WIDE),
    case("stack", "then mean", of_linear(lambda x: torch.stack([x, x.tanh(), -x], 1).mean(1)),
         WIDE),
    case("chunk", "3 of 6", of_linear(lambda x: torch.mul(*x.chunk(3, -1)[:2])), WIDE),
    case("split", "uneven", of_linear(
         lambda x: torch.cat(torch.split(x, [1, 3, 2], 1)[::-1], 1)), WIDE),
    case("F.pad", "constant 0.5, asymmetric", of_linear(
         lambda x: F.pad(x, (1, 2, 0, 3), value=0.5)), WIDE),
    case("F.pad", "negative: crops", of_linear(lambda x: F.pad(x, (-1, 2))), WIDE),
    case("F.pad", "reflect, replicate, circular", lambda: Of(lambda m, x: torch.cat(
         [F.pad(m.conv(x), (2, 1), mode) for mode in ("reflect", "replicate", "circular")], 1),
         conv=nn.Conv1d(3, 3, 1)), SERIES),
    case("F.normalize", "p 2", of_linear(lambda x: F.normalize(x, dim=-1)), WIDE),
    case("F.normalize", "p 1, over time", of_linear(lambda x: F.normalize(x, 1.0, 1)), WIDE),
    case("cosine similarity", "two inputs", of_linear(
         lambda x, y: F.cosine_similarity(x, y, dim=-1)), WIDE, WIDE),
    case("cosine similarity", "to prototypes", lambda: Of(lambda m, x: 10 * F.linear(
         F.normalize(x), F.normalize(m.w)), w=weight(3, 6)), VECTOR),
    case("interpolate", "nearest, scale 2", lambda: nn.Sequential(nn.Conv1d(3, 4, 1),
         nn.Upsample(scale_factor=2)), SERIES),
    case("interpolate", "nearest, scale 1.5", lambda: nn.Sequential(nn.Conv1d(3, 4, 1),
         nn.Upsample(scale_factor=1.5)), SERIES),
    case("interpolate", "nearest, 8 to 5", of(lambda x: F.interpolate(x, 5)), SERIES),
    case("interpolate", "nearest, 2D scale 2", lambda: nn.Sequential(nn.Conv2d(3, 4, 1),
         nn.Upsample(scale_factor=2)), IMAGE),
    case("interpolate", "nearest, 7 × 6 to 10 × 4", of(lambda x: F.interpolate(x, (10, 4))), IMAGE),
    case("interpolate", "linear", of(lambda x: F.interpolate(x, 13, mode="linear")), SERIES),
    case("interpolate", "bilinear", of(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
         IMAGE),
    case("PixelShuffle", "factor 2", lambda: nn.PixelShuffle(2), normal(4, 3, 5)),
    case("buffer", "positions added", lambda: Of(lambda m, x: m.linear(x + m.positions),
         linear=nn.Linear(6, 4), positions=torch.randn(6, 6)), WIDE),
    case("batch length", "as a number", of_linear(lambda x: x / len(x) + x.shape[0]), VECTOR),
    case("double", "within", of_linear(lambda x: x.double().softmax(-1).float()), VECTOR),
]  # fmt: skip


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * channels
        self.has_skip = stride == 1 and channels == out
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.has_skip else out


class SqueezeExcitation(nn.Module):
    """Channels weighted by their means (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 2, 1)
        self.excite = nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.excite(scale))


class BasicBlock(nn.Module):
    """ResNet's block, written as torchvision does (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)  # type: ignore[no-any-return]


def sinusoidal(m: Any, x: Tensor) -> Tensor:
    time = torch.arange(x.shape[1])[:, None] * torch.exp(torch.arange(3) * -math.log(10.0))
    return m.layer(x + torch.cat([time.sin(), time.cos()], -1))  # type: ignore[no-any-return]


BLOCKS = [
    case("inverted residual", "with skip", lambda: InvertedResidual(4, 4, 1), IMAGE4),
    case("inverted residual", "stride 2", lambda: InvertedResidual(4, 6, 2), IMAGE4),
    case("squeeze-and-excitation", "default", lambda: SqueezeExcitation(4), IMAGE4),
    case("ResNet basic block", "identity", lambda: BasicBlock(4, 4, 1), IMAGE4),
    case("ResNet basic block", "stride 2, downsample", lambda: BasicBlock(4, 6, 2), IMAGE4),
    case(
        "CNN and GRU",
        "BatchNorm, dropout, final state",
        lambda: Of(
            lambda m, x: m.gru(m.cnn(x).transpose(1, 2))[1][-1],
            cnn=nn.Sequential(
                nn.Conv1d(3, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.ReLU(inplace=True),
                nn.MaxPool1d(2), nn.Dropout(0.2),
            ),
            gru=nn.GRU(4, 5, batch_first=True),
        ),
        SERIES,
    ),
    case(
        "text transformer",
        "Embedding, sinusoids, masked by the tokens",
        lambda: Of(
            lambda m, x: m.layer(m.words(x), src_key_padding_mask=(x == 0) & (torch.arange(6) > 0)),
            words=nn.Embedding(7, 6, padding_idx=0),
            layer=transformer(dropout=0.1)(),
        ),
        tokens(7, 6),
    ),
    case(
        "transformer",
        "sinusoidal positions",
        lambda: Of(sinusoidal, layer=transformer(dropout=0.0)()),
        WIDE,
    ),
]  # fmt: skip


VARYING = [
    case("varying length", "convolutions, BatchNorm, global pooling", lambda: nn.Sequential(
         nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 5, 3),
         nn.AdaptiveAvgPool1d(1), nn.Flatten()), SERIES, varying=2),
    case("varying length", "a sequence out, dropout", lambda: nn.Sequential(
         nn.Conv1d(3, 4, 3), nn.Dropout(0.3), nn.GELU(), nn.GroupNorm(2, 4)), SERIES, varying=2,
         refusal="dropout"),
    case("varying length", "stride 2, max and mean over time", lambda: Of(
         lambda m, x: torch.cat([m.c(x).amax(2), m.c(x).max(2).values, m.c(x).mean(2)], 1),
         c=nn.Conv1d(3, 4, 2, stride=2)), SERIES, varying=2, refusal="length"),
    case("varying length", "max pooling", on_series(nn.MaxPool1d(3, 1)), SERIES, varying=2),
    case("varying length", "max pooling, stride 2", on_series(nn.MaxPool1d(2)), SERIES,
         varying=2, refusal="length"),
    case("varying length", "attention and mean", lambda: nn.Sequential(
         transformer(dropout=0.0)(), Of(lambda m, x: x.mean(1))), normal(8, 6), varying=1),
    case("varying length", "attention with dropout", lambda: nn.Sequential(
         transformer(dropout=0.1)(), Of(lambda m, x: x.mean(1))), normal(8, 6), varying=1),
    case("varying length", "causal attention, positions", lambda: Of(
         lambda m, q: F.scaled_dot_product_attention(m.linear(q + m.places(
             torch.arange(q.shape[1]))), q, q, is_causal=True),
         linear=nn.Linear(6, 6), places=nn.Embedding(16, 6)), normal(8, 6), varying=1),
    case("varying length", "tokens, masked mean", lambda: Of(
         lambda m, x: (m.words(x) * (x > 0)[..., None]).sum(1) / (1 + (x > 0).sum(1))[:, None],
         words=nn.Embedding(16, 4)), tokens(7, 8), varying=1),
    case("varying length", "GRU", recurrent(nn.GRU), normal(8, 3), varying=1, refusal="length"),
    case("varying length", "std, last step, differences", of_linear(
         lambda x: torch.cat([x.std(1), x[:, -1], (x[:, 1:] - x[:, :-1]).abs().sum(1)], 1)),
         normal(8, 6), varying=1, refusal="length"),
    case("varying length", "flattened", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten()),
         SERIES, varying=2),
    case("varying length", "an image's width", lambda: nn.Sequential(
         nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6(),
         nn.AdaptiveAvgPool2d(1)), IMAGE, varying=3),
]  # fmt: skip


def by_row(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.linear(row) for row in x])


def by_value(m: Any, x: Tensor) -> Tensor:
    return m.linear(x) if x.sum() > 0 else m.linear(-x)  # type: ignore[no-any-return]


def one(**parts: nn.Module) -> dict[str, nn.Module]:
    return {"linear": nn.Linear(6, 6)} | parts


OUTPUTS = [
    case("outputs", "tuple", of_linear(lambda x: (x, x.mean(1))), WIDE),
    case("outputs", "list of one", of_linear(lambda x: [x.tanh()]), VECTOR),
    case("outputs", "named tuple", of_linear(lambda x: Pair(x, x.exp())), VECTOR),
    case("outputs", "dict", of_linear(lambda x: {"mean": x.mean(1), "steps": x.tanh()}), WIDE),
    case("outputs", "an input as it came", of(lambda x: x), VECTOR),
    case("outputs", "one tensor twice", of_linear(lambda x: (x, x)), VECTOR),
    case("outputs", "nested", of_linear(lambda x: {"a": (x, x.tanh())}), VECTOR),
    case("outputs", "None among them", of_linear(lambda x: (x, None)), VECTOR, refusal="NoneType"),
    case("outputs", "integers", of_linear(lambda x: x.argmax(-1)), WIDE, refusal="int64"),
    case("outputs", "no batch", of_linear(lambda x: x.mean(0)), WIDE, refusal="examples first"),
    case("outputs", "a scalar", of_linear(lambda x: x.mean()), WIDE, refusal="examples first"),
    case("data-dependent", "branch on a value", lambda: Of(by_value, **one()), VECTOR,
         refusal="data|value"),
    case("data-dependent", "boolean indexing", of_linear(lambda x: x[x[:, 0] > 0]), VECTOR,
         refusal="examples first"),
    case("data-dependent", "item()", of_linear(lambda x: x * x.sum().item()), VECTOR,
         refusal="data|value|item"),
    case("data-dependent", "numpy in the forward pass", of_linear(
         lambda x: x + torch.from_numpy(x.detach().numpy().round())), VECTOR,
         refusal="(?i)numpy|data"),
    case("batch length", "loop over the rows", lambda: Of(by_row, **one()), VECTOR,
         refusal="batch"),
    case("batch length", "written into the code", of_linear(lambda x: x.view(4, 6)), VECTOR,
         refusal=r"shape '\[4, 6\]'"),
    case("random", "noise added", of_linear(lambda x: x + torch.randn_like(x)), VECTOR,
         refusal="(?i)random"),
    case("random", "F.gumbel_softmax", of_linear(F.gumbel_softmax), VECTOR, refusal="(?i)random"),
    case("complex", "spectrum", of_linear(lambda x: torch.fft.rfft(x).abs()), VECTOR,
         refusal="(?i)complex|fft"),
]  # fmt: skip

CASES = (
    *LINEAR, *CONVOLUTION, *NORMALIZATION, *DROPOUT, *EMBEDDING, *RECURRENT, *ATTENTION, *POOLING,
    *ACTIVATION, *SHAPES, *BLOCKS, *VARYING, *OUTPUTS,
)  # fmt: skip
