"""One block as ONNX graphs: its forward pass and its vector-Jacobian product.

Both graphs take the block's parameters as one flat float32 vector, so that their gradient is
one flat vector too: a device trains, sends and stores a block as a single array.

An encoder or fusion block takes the upstream gradient ``g`` and differentiates ``sum(z * g)``;
a head takes ``labels`` and differentiates its loss. Dropout masks are inputs: the forward pass
that feeds the next block and the backward pass must see the same ones.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import GradientGraphBuilder, get_optimized_model
from torch import Tensor, nn

from petalfl.errors import ModelError
from petalfl.model import Dropout

OPSET = 15  # later ones keep LayerNormalization whole, and it has no gradient then
PARAMETERS, GRADIENT, UPSTREAM, LABELS, LOSS = "parameters", "gradient", "g", "labels", "loss"
# Random inside the graph: its backward pass would draw other numbers than its forward pass.
_RANDOM_OPS = {"Dropout", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
               "Bernoulli", "Multinomial"}  # fmt: skip
_STATEFUL = (nn.modules.batchnorm._BatchNorm,)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass(frozen=True, slots=True)
class BlockGraphs:
    """What becomes of one block.

    Attributes:
        output: One example batch's output ``(b, d)``, for the next block's trace.
        parameters: Initial values, flat float32, in the order of ``named_parameters``.
    """

    training_model: bytes
    eval_model: bytes
    parameters: np.ndarray[tuple[int], np.dtype[np.float32]]
    dropouts: tuple[Dropout, ...]
    output: Tensor


def build_graphs(
    name: str,
    module: nn.Module,
    inputs: dict[str, Tensor],
    call: Callable[..., Tensor],
    *,
    is_head: bool,
    differentiate_by: Sequence[str],
) -> BlockGraphs:
    """Traces one block and differentiates it.

    Args:
        name: The block's name, and the name of its output.
        module: The block; it is copied, not changed.
        inputs: Example inputs by graph-input name, in the order that ``call`` takes them.
        call: ``call(module, *inputs)`` runs the block.
        is_head: The output is logits under a cross-entropy loss, not an embedding.
        differentiate_by: The inputs whose gradient goes on to the block before.

    Raises:
        ModelError: The block cannot be exported exactly; says which layer and why.
    """
    module = copy.deepcopy(module).train()
    _refuse_unsupported(name, module)
    masked = _mask_dropouts(module)
    output = _run(name, module, inputs, call)
    dropouts = _dropouts(name, masked)
    masks = {d.name: torch.ones(len(output), *d.shape) for d in dropouts}
    traced = _Traced(module, call, list(masked.values()))
    forward = _to_onnx(name, traced, inputs | masks)
    _flatten_parameters(name, forward.graph, module)
    eval_model = copy.deepcopy(forward)
    _default_masks(eval_model.graph, list(masks))
    _append_loss(name, forward.graph, output, is_head)
    gradients = _gradient_model(name, forward, differentiate_by, [LOSS] if is_head else [])
    return BlockGraphs(
        training_model=gradients.SerializeToString(),
        eval_model=eval_model.SerializeToString(),
        parameters=np.concatenate([p.detach().numpy().ravel() for p in module.parameters()]),
        dropouts=dropouts,
        output=output,
    )


def _run(
    name: str, module: nn.Module, inputs: dict[str, Tensor], call: Callable[..., Tensor]
) -> Tensor:
    try:
        with torch.no_grad():
            output = call(module, *inputs.values())
    except Exception as error:  # whatever the user's own code raises
        raise ModelError(f"block {name}: its forward pass fails: {error!r}"[:500]) from error
    if not isinstance(output, Tensor) or output.dtype != torch.float32 or output.dim() < 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else ""
        raise ModelError(
            f"block {name}: its output is {getattr(output, 'dtype', type(output).__name__)} "
            f"{found}, expected torch.float32 (batch, …)"
        )
    return output


class _MaskedDropout(nn.Module):
    """Multiplies by a mask given from outside; without one, notes the shape and passes on."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.shapes: list[tuple[int, ...]] = []
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.shapes.append(tuple(x.shape[1:]))
            return x
        return x * self.mask


class _Traced(nn.Module):
    """The block as the exporter sees it: a function of inputs, then masks."""

    def __init__(
        self, module: nn.Module, call: Callable[..., Tensor], dropouts: Sequence[_MaskedDropout]
    ) -> None:
        super().__init__()
        self.module, self.call, self.dropouts = module, call, dropouts

    def forward(self, *inputs: Tensor) -> Tensor:
        split = len(inputs) - len(self.dropouts)
        for dropout, mask in zip(self.dropouts, inputs[split:], strict=True):
            dropout.mask = mask
        return self.call(self.module, *inputs[:split])


def _refuse_unsupported(name: str, module: nn.Module) -> None:
    for path, layer in module.named_modules():
        if isinstance(layer, _STATEFUL):
            raise ModelError(
                f"block {name}: layer {path} ({type(layer).__name__}) keeps running statistics, "
                "which are not exported yet; use LayerNorm"
            )
        if isinstance(layer, _CONVOLUTIONS) and layer.groups > 1:
            raise ModelError(
                f"block {name}: layer {path} has groups={layer.groups}; onnxruntime-training's "
                "gradient of a grouped convolution writes into its neighbors; use groups=1"
            )
    if not list(module.parameters()):
        raise ModelError(f"block {name}: it has no trainable parameter")
    for path, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ModelError(
                f"block {name}: {path} is frozen (requires_grad=False), which is not exported yet"
            )
        if parameter.dtype != torch.float32:
            raise ModelError(f"block {name}: {path} is {parameter.dtype}, expected torch.float32")


def _mask_dropouts(module: nn.Module) -> dict[str, _MaskedDropout]:
    masked = {
        path: _MaskedDropout(layer.p)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Dropout) and layer.p > 0
    }
    for path, layer in masked.items():
        module.set_submodule(path, layer)
    for path, other in list(module.named_modules()):
        if isinstance(other, nn.Dropout):  # of rate 0
            module.set_submodule(path, nn.Identity())
    return masked


def _dropouts(name: str, masked: dict[str, _MaskedDropout]) -> tuple[Dropout, ...]:
    for path, layer in masked.items():
        if len(layer.shapes) != 1:
            raise ModelError(
                f"block {name}: dropout layer {path} runs {len(layer.shapes)} times in a forward "
                "pass, expected once; give each place a layer of its own"
            )
    return tuple(
        Dropout(f"mask.{path}", layer.shapes[0], layer.rate) for path, layer in masked.items()
    )


def _to_onnx(name: str, traced: _Traced, inputs: dict[str, Tensor]) -> ModelProto:
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),  # this exporter is deprecated, and the one that is exact here
    ):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                traced,
                tuple(inputs.values()),
                Path(folder) / "block.onnx",
                input_names=list(inputs),
                output_names=[name],
                dynamic_axes={key: {0: "batch"} for key in [*inputs, name]},
                opset_version=OPSET,
                dynamo=False,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.TRAINING,
            )
        except Exception as error:  # its own kinds, and what the user's code raises
            first_line = str(error).strip().splitlines()[0]
            raise ModelError(f"block {name}: PyTorch cannot export it: {first_line}") from error
        model = onnx.load(Path(folder) / "block.onnx")
    for node in model.graph.node:
        if node.op_type in _RANDOM_OPS:
            raise ModelError(
                f"block {name}: {node.name} draws random numbers inside the graph; use nn.Dropout "
                "layers of the block's own, not functional or built-in dropout"
            )
    return model


def _flatten_parameters(name: str, graph: GraphProto, module: nn.Module) -> None:
    """Feeds the block's initializers from slices of one flat input."""
    shapes = {f"module.{path}": tuple(p.shape) for path, p in module.named_parameters()}
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    constants = [i for i in graph.initializer if i.name not in shapes]
    if lost := shapes.keys() - {i.name for i in graph.initializer}:
        first = sorted(lost)[0].removeprefix("module.")
        raise ModelError(f"block {name}: parameter {first} is not used in the forward pass")
    nodes = [helper.make_node("Split", [PARAMETERS, "sizes"], [f"{p}.flat" for p in shapes])]
    constants.append(numpy_helper.from_array(np.array(sizes, np.int64), "sizes"))
    for path, shape in shapes.items():
        constants.append(numpy_helper.from_array(np.array(shape, np.int64), f"{path}.shape"))
        nodes.append(helper.make_node("Reshape", [f"{path}.flat", f"{path}.shape"], [path]))
    nodes.extend(graph.node)
    _replace(graph.initializer, constants)
    _replace(graph.node, nodes)
    graph.input.append(helper.make_tensor_value_info(PARAMETERS, TensorProto.FLOAT, [sum(sizes)]))


def _default_masks(graph: GraphProto, masks: list[str]) -> None:
    """Gives each mask the default 1, so that evaluation need not feed it."""
    for value in graph.input:
        if value.name in masks:
            rank = len(value.type.tensor_type.shape.dim)
            dims = [f"{value.name}.{axis}" for axis in range(rank)]
            value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, dims))
            ones = np.ones((1,) * rank, np.float32)
            graph.initializer.append(numpy_helper.from_array(ones, value.name))


def _append_loss(name: str, graph: GraphProto, output: Tensor, is_head: bool) -> None:
    float_, int_ = TensorProto.FLOAT, TensorProto.INT64
    if is_head:
        graph.input.append(helper.make_tensor_value_info(LABELS, int_, ["batch"]))
        graph.node.append(  # its gradient needs the second output
            helper.make_node("SoftmaxCrossEntropyLoss", [name, LABELS], [LOSS, "log_probabilities"])
        )
    else:
        shape = ["batch", *output.shape[1:]]
        graph.input.append(helper.make_tensor_value_info(UPSTREAM, float_, shape))
        graph.node.append(helper.make_node("Mul", [name, UPSTREAM], ["z_times_g"]))
        graph.node.append(helper.make_node("ReduceSum", ["z_times_g"], [LOSS], keepdims=0))
    graph.output.append(helper.make_tensor_value_info(LOSS, float_, []))


def _gradient_model(
    name: str, model: ModelProto, inputs: Sequence[str], keep: Sequence[str]
) -> ModelProto:
    """The graph whose outputs are ``keep``, the parameters' gradient and ``d_`` the inputs'."""
    gradients = _differentiate(name, model, [PARAMETERS, *inputs])
    # A trailing `_grad` would be taken for a parameter's by onnxruntime's own tools.
    renamed = {f"{PARAMETERS}_grad": GRADIENT} | {f"{i}_grad": f"d_{i}" for i in inputs}
    outputs = {o.name: o for o in gradients.graph.output}
    for old, new in renamed.items():
        gradients.graph.node.append(helper.make_node("Identity", [old], [new]))
        outputs[new] = copy.deepcopy(outputs[old])
        outputs[new].name = new
    _replace(gradients.graph.output, [outputs[key] for key in [*keep, *renamed.values()]])
    return gradients


def _differentiate(name: str, model: ModelProto, by: list[str]) -> ModelProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        optimized = get_optimized_model(model.SerializeToString(), set(by), options)
        builder = GradientGraphBuilder(optimized, {LOSS}, set(by), LOSS, options)
        builder.build()
    except Exception as error:  # the extension raises bare RuntimeError and its own kinds
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"block {name}: onnxruntime cannot differentiate it: {first_line}") from (
            error
        )
    gradients = onnx.load_from_string(builder.get_model())
    missing = {f"{i}_grad" for i in by} - {o.name for o in gradients.graph.output}
    if missing:
        raise ModelError(f"block {name}: no gradient reaches {sorted(missing)[0][:-5]}")
    return gradients


def _replace(field: object, items: Sequence[object]) -> None:
    items = list(items)
    del field[:]  # type: ignore[attr-defined]
    field.extend(items)  # type: ignore[attr-defined]
