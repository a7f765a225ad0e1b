"""The law of export for one block, written independently of `export.law`: PyTorch is the judge.

`export` builds the graphs of a case of `tests.export.layers`; `check` compares, at other lengths of
the batch than the traced one: training outputs, gradients of every parameter and input, running
statistics, evaluation outputs, and three steps of each optimizer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from export.block import BlockSpec, TaskSpec
from export.checks import check_blocks, check_output
from export.graph import BATCH_SIZE, build_graphs
from export.optimizers import build_optimizers
from export.program import Size, Value
from tests.export.layers import TRACED_LENGTH, Case

TOLERANCE = 1e-5
COINCIDENCE = 1e-2  # a larger error is no rounding, nor a tie of a ReLU
NUM_TRIES = 3
LENGTHS = (5, 1, 3)
NUM_STEPS = 3
BLOCK = "block"

Arrays = dict[str, NDArray[Any]]
Tensors = dict[str, Tensor]


class Masked(TorchFunctionMode):
    """While it is active, PyTorch's dropouts multiply by the given masks, in call order.

    Masks are ``(b, *shape)`` and may be 1 wide where they are broadcast; a dropout whose input
    has its batch elsewhere, or merged with the next dimension, takes its mask in that layout.

    Attributes:
        rates: Of the dropouts so far.
    """

    def __init__(self, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self.masks = list(masks)
        self.rates: list[float] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self.dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.opened(func)(*args, **kwargs)
        if func in _RECURRENT:
            return self.layer_by_layer(func, *args, **kwargs)
        return func(*args, **kwargs)

    def dropout(
        self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if p == 0 or not training:
            return x
        assert len(self.rates) < len(self.masks), "PyTorch has more dropouts than the graphs"
        self.rates.append(p)
        mask = fitted(self.masks[len(self.rates) - 1], x.shape)
        return x.mul_(mask) if inplace else x * mask

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """PyTorch's attention by its definition, which its documentation gives."""
        assert not enable_gqa
        logits = query @ key.transpose(-2, -1)
        logits = logits * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return self.dropout(logits.softmax(-1), dropout_p) @ value

    def opened(self, func: Any) -> Callable[..., Any]:
        """PyTorch's own function, which calls our dropout in place of its own."""
        names = func.__globals__ | {
            "dropout": self.dropout,
            "scaled_dot_product_attention": self.attention,
        }
        copied = FunctionType(func.__code__, names, func.__name__, func.__defaults__)
        copied.__kwdefaults__ = func.__kwdefaults__
        return copied

    def layer_by_layer(
        self, func: Any, x: Tensor, start: Any, weights: Sequence[Tensor], has_biases: bool,
        num_layers: int, p: float, training: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """PyTorch's recurrence of one layer at a time, and the dropout between them."""
        directions, per_layer = 1 + bidirectional, len(weights) // num_layers
        finals = []
        for layer in range(num_layers):
            if layer:
                x = self.dropout(x, p, training)
            part = slice(layer * directions, (layer + 1) * directions)
            state = tuple(s[part] for s in start) if isinstance(start, tuple) else start[part]
            own = weights[layer * per_layer : (layer + 1) * per_layer]
            x, *final = func(
                x, state, own, has_biases, 1, 0.0, training, bidirectional, batch_first
            )
            finals.append(final)
        return (x, *map(torch.cat, zip(*finals, strict=True)))


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d)
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def fitted(mask: Tensor, shape: torch.Size) -> Tensor:
    """The mask ``(b, *rest)`` in the layout of an input of that shape."""
    mask = mask.reshape(*mask.shape, *[1] * (len(shape) - mask.dim()))
    for axis in range(len(shape)) if mask.dim() == len(shape) else ():
        moved = mask.movedim(0, axis)
        if all(m in (n, 1) for m, n in zip(moved.shape, shape, strict=False)):
            return moved
    return mask.reshape(shape)


def named(name: str, value: Any) -> Tensors:
    """The tensors of an output by name: ``block``, ``block.0`` or ``block.key``."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {n: t for key, v in items for n, t in named(f"{name}.{key}", v).items()}


class Step(NamedTuple):
    """What a training step of PyTorch gives."""

    outputs: Tensors
    gradients: Tensors  # by parameter
    d_inputs: Tensors
    statistics: Tensors
    rates: list[float]


def training_outputs(
    module: nn.Module, inputs: Tensors, masks: Sequence[Tensor]
) -> tuple[Tensors, list[float]]:
    with Masked(masks) as mode:
        outputs = named(BLOCK, module.train()(*inputs.values()))
    return outputs, mode.rates


def training_step(
    module: nn.Module, inputs: Tensors, masks: Sequence[Tensor], upstream: Tensors
) -> Step:
    """Leaves the gradients in the module's parameters, and its statistics moved."""
    module.zero_grad()
    leaves = {
        name: x.clone().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs, rates = training_outputs(module, leaves, masks)
    surrogate = sum((outputs[name] * g).sum() for name, g in upstream.items())
    surrogate.backward()  # type: ignore[union-attr]
    return Step(
        outputs={name: z.detach() for name, z in outputs.items()},
        gradients={name: gradient_of(p) for name, p in module.named_parameters()},
        d_inputs={name: gradient_of(x) for name, x in leaves.items() if x.is_floating_point()},
        statistics=running_statistics(module),
        rates=rates,
    )


def gradient_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()


def running_statistics(module: nn.Module) -> Tensors:
    return {
        name: buffer.clone()
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def evaluation_outputs(module: nn.Module, inputs: Tensors) -> Tensors:
    with torch.no_grad():
        return named(BLOCK, module.eval()(*inputs.values()))


def relative_error(found: NDArray[Any], expected: Tensor, at_least: float = 0.0) -> float:
    """The largest difference relative to the largest expected entry, or to ``at_least``."""
    assert found.shape == tuple(expected.shape), f"{found.shape}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), at_least)
    error = float(np.abs(found.astype(np.float64) - expected.double().numpy()).max())
    return error / scale if scale else error


_AXES = {"axis": (8, 11)}


def _type_of(x: Tensor, varying: int) -> Value:
    """With the batch, and maybe another axis, of any length."""
    shape: list[int | Size] = [BATCH_SIZE, *x.shape[1:]]
    if varying:
        shape[varying] = Size(((1, (*_AXES,)),))
    return Value(tuple(shape), x.dtype)


class Exported:
    """The graphs of a case, run as a device runs them."""

    def __init__(self, case: Case) -> None:
        module, inputs = case.module(), case.inputs(TRACED_LENGTH)
        spec = BlockSpec(
            BLOCK,
            "encoder",
            module,
            tuple(inputs),
            (),
            False,
            not list(module.parameters()),
            "",
            None,
        )
        self._check(spec, inputs)
        self.graphs = build_graphs(
            spec,
            {name: _type_of(x, case.varying) for name, x in inputs.items()},
            inputs,
            num_modalities=1,
            differentiate_by=[name for name, x in inputs.items() if x.is_floating_point()],
            axes=_AXES if case.varying else {},
        )
        graphs = self.graphs
        assert graphs.min_batch == case.min_batch
        assert np.array_equal(graphs.vector, vector_of(module))
        self.dropouts, self.varying = graphs.dropouts, case.varying
        self.rates = [d.rate for d in graphs.dropouts]
        # A block without parameters has no forward graph of its own for training.
        forward = graphs.training_forward or graphs.eval_model
        assert (graphs.training_forward is None) == spec.is_frozen
        assert graphs.training_backward is not None
        self.forward = session(forward)
        self.backward = session(graphs.training_backward)
        self.evaluation = session(graphs.eval_model)

    @staticmethod
    def _check(spec: BlockSpec, inputs: Tensors) -> None:
        """What `export.BlockModel` checks of a block before it is traced."""
        task = TaskSpec("mse")
        head = BlockSpec("head", "head", nn.Linear(1, 1), (BLOCK,), (), False, False, "", task)
        check_blocks((spec, head), list(inputs), ())
        try:
            output = copy.deepcopy(spec.module).eval()(*inputs.values())
        except Exception as error:
            raise AssertionError("a case that does not run") from error
        check_output(spec, output, TRACED_LENGTH)

    def masks(self, inputs: Tensors) -> list[Tensor]:
        """Drawn at random, in order."""
        some = next(iter(inputs.values()))
        lengths = {"axis": some.shape[self.varying]}
        return [
            (torch.rand(len(some), *d.sizes(lengths)) >= d.rate).float() / (1 - d.rate)
            for d in self.dropouts
        ]

    def feed(self, vector: NDArray[np.float32], inputs: Tensors, masks: Sequence[Tensor]) -> Arrays:
        return {
            "parameters": vector,
            **arrays(inputs),
            **{f"mask.{i}": mask.numpy() for i, mask in enumerate(masks)},
        }

    def training_step(self, feed: Arrays, upstream: Tensors) -> Arrays:
        """Outputs, ``statistics``, ``gradient`` and ``d_`` the inputs."""
        done = run(self.forward, feed)
        return done | run(
            self.backward, feed | done | {f"d_{name}": g.numpy() for name, g in upstream.items()}
        )


def session(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run(graph: onnxruntime.InferenceSession, feed: Mapping[str, NDArray[Any]]) -> Arrays:
    """The outputs by name; what the graph does not declare is not fed."""
    names = [output.name for output in graph.get_outputs()]
    declared = {i.name: feed[i.name] for i in graph.get_inputs()}
    return dict(zip(names, graph.run(names, declared), strict=True))


def arrays(tensors: Tensors) -> Arrays:
    return {name: t.numpy() for name, t in tensors.items()}


def flat(tensors: Iterable[Tensor]) -> NDArray[np.float32]:
    parts = [t.detach().numpy().ravel() for t in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def vector_of(module: nn.Module) -> NDArray[np.float32]:
    return flat([*module.parameters(), *running_statistics(module).values()])


def split(vector: NDArray[np.float32], like: Tensors) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The parts of a flat vector by name, all of it."""
    start = 0
    for name, tensor in like.items():
        yield name, vector[start : start + tensor.numel()].reshape(tensor.shape)
        start += tensor.numel()
    assert start == len(vector), f"a vector of {len(vector)}, expected {start}"


def export(case: Case) -> Exported:
    """Its graphs.

    Raises:
        ModelError: The block is refused.
    """
    with _quiet():
        return Exported(case)


def check(case: Case, exported: Exported) -> dict[str, float]:
    """The errors of a case by what is compared; see the module's docstring.

    An error that is no larger than chance makes it, as of a sum that nearly cancels, is measured
    on two more draws: what is wrong is wrong on all of them.
    """
    errors: dict[str, float] = {}
    with _quiet():
        for length in LENGTHS:
            if length >= case.min_batch:
                errors |= _without_chance(lambda seed, n=length: _step_errors(  # type: ignore[misc]
                    case, exported, n, seed))  # fmt: skip
        for optimizer in OPTIMIZERS if list(case.module().parameters()) else ():
            errors |= _without_chance(
                lambda seed, o=optimizer: _optimizer_errors(case, exported, o, seed)  # type: ignore[misc]
            )
    return errors


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")
        warnings.filterwarnings("ignore", "LSTM with projections")
        yield


def _without_chance(measure: Callable[[int], dict[str, float]]) -> dict[str, float]:
    errors = measure(0)
    for seed in range(1, NUM_TRIES):
        if not TOLERANCE < max(errors.values()) <= COINCIDENCE:
            break
        again = measure(seed)
        errors = {name: min(error, again[name]) for name, error in errors.items()}
    return errors


def _step_errors(case: Case, exported: Exported, length: int, seed: int) -> dict[str, float]:
    """One training step and one evaluation."""
    module = case.module()
    inputs = case.inputs(length, seed)
    masks = exported.masks(inputs)
    vector = vector_of(module)
    expected_evaluation = evaluation_outputs(module, inputs)
    upstream = {n: torch.randn_like(z) / length for n, z in expected_evaluation.items()}
    feed = exported.feed(vector, inputs, masks)
    found = exported.training_step(feed, upstream)
    found_evaluation = run(exported.evaluation, feed)
    step = training_step(module, inputs, masks, upstream)

    assert step.rates == exported.rates
    assert found_evaluation.keys() == step.outputs.keys()
    assert ("statistics" in found) == bool(step.statistics)
    assert ("gradient" in found) == bool(step.gradients)
    where = f"batch of {length}"
    errors = {}
    for name, z in step.outputs.items():
        errors[f"{name}, {where}"] = relative_error(found[name], z)
        errors[f"{name} in evaluation, {where}"] = relative_error(
            found_evaluation[name], expected_evaluation[name]
        )
    # Less than its own rounding, as of a bias before a normalization, PyTorch cannot tell us.
    rounding = functools.cache(lambda: _rounding(case, inputs, masks, upstream, step))
    expected = step.gradients | step.d_inputs
    found_gradients = {name: found[f"d_{name}"] for name in step.d_inputs}
    if step.gradients:
        found_gradients |= dict(split(found["gradient"], step.gradients))
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        error = relative_error(found_gradients[name], gradient, 1e-3 * largest)
        if TOLERANCE < error <= COINCIDENCE:
            noise = max(1e-3 * largest, 10 * rounding()[name] / TOLERANCE)
            error = relative_error(found_gradients[name], gradient, noise)
        errors[f"gradient of {name}, {where}"] = error
    if step.statistics:
        for name, new in split(found["statistics"], step.statistics):
            errors[f"{name}, {where}"] = relative_error(new, step.statistics[name])
    return errors


def _rounding(
    case: Case, inputs: Tensors, masks: Sequence[Tensor], upstream: Tensors, step: Step
) -> dict[str, float]:
    """How far PyTorch's gradients are from those that it computes in float64."""

    def wide(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    exact = training_step(
        case.module().double(),
        {name: wide(x) for name, x in inputs.items()},
        [wide(m) for m in masks],
        {name: wide(g) for name, g in upstream.items()},
    )
    return {
        name: float((gradient - exact_gradient).abs().max())
        for found, expected in ((step.gradients, exact.gradients), (step.d_inputs, exact.d_inputs))
        for (name, gradient), exact_gradient in zip(found.items(), expected.values(), strict=True)
    }


class Optimizer(NamedTuple):
    """An optimizer graph and PyTorch's optimizer with the same settings."""

    name: str
    torch: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    scalars: dict[str, float]
    state: tuple[str, ...]


OPTIMIZERS = (
    Optimizer(
        "sgd",
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
        {"learning_rate": 0.01, "momentum": 0.9, "nesterov": 0.0, "weight_decay": 0.1},
        ("velocity",),
    ),
    Optimizer(  # an epsilon above the noise of a gradient that is zero but for rounding
        "adamw",
        lambda p: torch.optim.AdamW(p, 0.01, eps=1e-2, weight_decay=0.1),
        {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-2, "weight_decay": 0.1},
        ("first_moment", "second_moment"),
    ),
)


def _optimizer_errors(
    case: Case, exported: Exported, optimizer: Optimizer, seed: int
) -> dict[str, float]:
    """Parameters and running statistics after `NUM_STEPS` steps of both."""
    module = case.module()
    reference = optimizer.torch(module.parameters())
    vector = vector_of(module)
    size = sum(p.numel() for p in module.parameters())
    state = {name: np.zeros(size, np.float32) for name in optimizer.state}
    scalars = optimizer.scalars | {"gradient_scale": 1.0, "proximal": 0.0}
    for number in range(1, NUM_STEPS + 1):
        inputs = case.inputs(LENGTHS[0], seed + 10 * number)
        masks = exported.masks(inputs)
        with torch.no_grad():
            shapes = named(BLOCK, copy.deepcopy(module).eval()(*inputs.values()))
        upstream = {n: torch.randn_like(z) / LENGTHS[0] for n, z in shapes.items()}
        feed = exported.feed(vector, inputs, masks)
        found = exported.training_step(feed, upstream)
        done = run(
            _optimizer_session(optimizer.name),
            {"parameters": vector[:size], "gradient": found["gradient"], "anchor": vector[:size]}
            | state
            | {s: np.array(v, np.float32) for s, v in (scalars | {"step": number}).items()},
        )
        state = {name: done[f"new_{name}"] for name in optimizer.state}
        vector = np.concatenate([done["new_parameters"], found.get("statistics", vector[size:])])
        training_step(module, inputs, masks, upstream)
        reference.step()
    expected = {n: p.detach() for n, p in module.named_parameters()} | running_statistics(module)
    floor = 1e-3 * max(float(p.abs().max()) for p in expected.values())
    return {
        f"{name} after {NUM_STEPS} steps of {optimizer.name}": relative_error(
            part, expected[name], floor
        )
        for name, part in split(vector, expected)
    }


@functools.cache
def _optimizer_session(name: str) -> onnxruntime.InferenceSession:
    return session(build_optimizers()[name])
