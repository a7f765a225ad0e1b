"""The graphs of one block: what they are called, what is saved, what is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from export.block import BlockSpec, TaskSpec
from export.graph import BATCH_SIZE, BlockGraphs, build_graphs
from export.program import Size, Value
from petalfl.errors import ModelError
from petalfl.model import Dropout, Parameter
from tests.export.tiny import Lambda

VIEWS = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Split", "Gather", "Expand"}


def build(
    module: nn.Module,
    *shape: int,
    by_input: bool = False,
    is_frozen: bool = False,
    loss: str | None = None,
    dtype: torch.dtype = torch.float32,
    axes: Mapping[str, tuple[int, int]] | None = None,
) -> BlockGraphs:
    """Of a block called "block" with one input ``x (b, *shape)``."""
    kind: Any = "encoder" if loss is None else "head"
    task = None if loss is None else TaskSpec(loss)
    spec = BlockSpec("block", kind, module, ("x",), (), False, is_frozen, "", task)
    dims: list[int | Size] = [BATCH_SIZE, *shape]
    for axis in axes or {}:
        dims[int(axis.split(".")[1])] = Size(((1, (axis,)),))
    return build_graphs(
        spec,
        {"x": Value(tuple(dims), dtype)},
        {"x": torch.zeros(2, *shape, dtype=dtype)},
        num_modalities=1,
        differentiate_by=["x"] if by_input else [],
        axes=axes,
    )


def load(data: bytes | None) -> ModelProto:
    assert data is not None
    return onnx.load_from_string(data)


def inputs(data: bytes | None) -> set[str]:
    return {value.name for value in load(data).graph.input}


def outputs(data: bytes | None) -> list[str]:
    return [value.name for value in load(data).graph.output]


def saved(graphs: BlockGraphs) -> dict[str, str]:
    """By name: the kind of node that makes it."""
    graph = load(graphs.training_forward).graph
    makers = {name: node for node in graph.node for name in node.output}

    def kind(name: str) -> str:
        made_by = makers[name]
        return kind(made_by.input[0]) if made_by.op_type == "Identity" else made_by.op_type

    return {v.name: kind(v.name) for v in graph.output if v.name.startswith("saved.")}


def run(data: bytes | None, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    assert data is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    declared = {i.name: feeds[i.name] for i in session.get_inputs()}
    return dict(zip(names, session.run(names, declared), strict=True))


def every_layer() -> nn.Sequential:
    """Convolution, statistics, dropout, products, a softmax: of (b, 3, 8)."""
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.MaxPool1d(2), nn.Flatten(), nn.Linear(16, 6), nn.GELU(), nn.Dropout(0.25),
        nn.Linear(6, 4), nn.Softmax(1),
    )  # fmt: skip


def averages_of(module: nn.Sequential) -> list[Tensor]:
    return [module.get_buffer(f"1.running_{what}") for what in ("mean", "var")]


@pytest.fixture(scope="module")
def whole() -> BlockGraphs:
    torch.manual_seed(0)
    return build(every_layer(), 3, 8, by_input=True)


# --- what they are ---


def test_the_inputs_and_outputs_of_a_block(whole: BlockGraphs) -> None:
    masks, kept = {"mask.0", "mask.1"}, {*saved(whole)}
    assert inputs(whole.eval_model) == {"parameters", "x"}
    assert outputs(whole.eval_model) == ["block"]
    assert inputs(whole.training_forward) == {"parameters", "x"} | masks
    assert {*outputs(whole.training_forward)} == {"block", "statistics"} | kept
    assert kept == {f"saved.{i}" for i in range(len(kept))}
    taken = inputs(whole.training_backward)
    assert kept | {"d_block"} <= taken <= {"parameters", "x", "d_block"} | masks | kept
    assert outputs(whole.training_backward) == ["gradient", "d_x"]


def test_the_inputs_and_outputs_of_a_head() -> None:
    graphs = build(every_layer(), 3, 8, by_input=True, loss="cross_entropy")
    assert graphs.training_forward is None
    taken = inputs(graphs.training_backward)
    assert taken == {"parameters", "x", "mask.0", "mask.1", "labels"}
    made = outputs(graphs.training_backward)
    assert {*made} == {"loss", "gradient", "d_x", "statistics"} and len(made) == 4
    assert graphs.activation_bytes == 0


def test_a_frozen_block_hands_the_gradient_on() -> None:
    module = every_layer().requires_grad_(False)
    graphs = build(module, 3, 8, by_input=True, is_frozen=True)
    assert graphs.training_forward is None and graphs.dropouts == ()
    assert inputs(graphs.training_backward) == {"parameters", "x", "d_block"}
    assert outputs(graphs.training_backward) == ["d_x"]
    assert build(module, 3, 8, is_frozen=True).training_backward is None


def test_a_block_without_parameters() -> None:
    graphs = build(nn.Tanh(), 4, by_input=True, is_frozen=True)
    assert graphs.vector.shape == (0,) and graphs.parameters == ()
    assert inputs(graphs.eval_model) == {"x"}
    assert inputs(graphs.training_backward) == {"x", "d_block"}


def test_several_outputs_are_named_by_their_keys() -> None:
    module = Lambda(
        lambda m, x: {"u": m.one(x), "v": (x.tanh(), m.one(x) * 2)}, one=nn.Linear(4, 3)
    )
    graphs = build(module, 4, by_input=True)
    names = ["block.u", "block.v.0", "block.v.1"]
    assert [*graphs.outputs] == outputs(graphs.eval_model) == names
    assert [v.shape for v in graphs.outputs.values()] == [(BATCH_SIZE, n) for n in (3, 4, 3)]
    assert {n for n in inputs(graphs.training_backward) if n.startswith("d_")} == {
        f"d_{name}" for name in names
    }


def test_the_vector_holds_parameters_then_statistics(whole: BlockGraphs) -> None:
    torch.manual_seed(0)
    module = every_layer()
    tensors = [*module.parameters(), *averages_of(module)]
    np.testing.assert_array_equal(
        whole.vector, np.concatenate([t.detach().numpy().ravel() for t in tensors])
    )
    assert [p.name for p in whole.parameters] == [name for name, _ in module.named_parameters()]
    assert whole.statistics == (
        Parameter("1.running_mean", (4,)), Parameter("1.running_var", (4,))
    )  # fmt: skip


def test_the_dropouts_are_listed_as_they_act(whole: BlockGraphs) -> None:
    assert whole.dropouts == (Dropout("mask.0", (4, 8), 0.5), Dropout("mask.1", (6,), 0.25))


def test_plain_onnx(whole: BlockGraphs) -> None:
    for data in (whole.eval_model, whole.training_forward, whole.training_backward):
        model = load(data)
        assert model.ir_version == 8
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
        assert {node.domain for node in model.graph.node} == {""}
        assert not model.functions and not model.graph.sparse_initializer
        onnx.checker.check_model(model, full_check=True)
        names = [node.name for node in model.graph.node]
        assert all(names) and len({*names}) == len(names)


def test_all_but_labels_and_tokens_is_float32(whole: BlockGraphs) -> None:
    for data in (whole.eval_model, whole.training_forward, whole.training_backward):
        graph = load(data).graph
        for value in (*graph.input, *graph.output):
            kinds = {onnx.TensorProto.FLOAT}
            if value.name.startswith("saved."):
                kinds |= {onnx.TensorProto.BOOL, onnx.TensorProto.INT64}
            assert value.type.tensor_type.elem_type in kinds


# --- what is saved ---


def test_no_view_is_saved(whole: BlockGraphs) -> None:
    assert saved(whole) and not {*saved(whole).values()} & VIEWS


VIEWED = {
    "transposed": lambda m, x: m.out(m.into(x).tanh().transpose(1, 2)),
    "cut": lambda m, x: m.out(m.into(x).tanh()[:, 1:3].transpose(1, 2).repeat(1, 1, 2)),
    "flattened": lambda m, x: m.out(m.into(x).tanh().reshape(-1, 4)).view(len(x), 4, -1),
    "split": lambda m, x: m.out(torch.cat(m.into(x).tanh().chunk(2, 1)[::-1], 1)),
    "widened": lambda m, x: m.out((m.into(x).tanh()[:, :1]).expand(-1, 4, -1)),
}


@pytest.mark.parametrize("case", VIEWED)
def test_views_are_taken_of_what_is_saved(case: str) -> None:
    """Of (b, 4, 4): tanh is kept once, for its own gradient and for the weight behind it."""
    graphs = build(Lambda(VIEWED[case], into=nn.Linear(4, 4), out=nn.Linear(4, 2)), 4, 4)
    kinds = Counter(saved(graphs).values())
    assert kinds["Tanh"] == 1
    assert not {*kinds} & VIEWS
    assert kinds.total() <= 2  # what `repeat` and `cat` make may be kept, too


def test_nothing_is_computed_twice() -> None:
    """Dear operators of the forward graph do not come again in the backward graph."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 4), nn.Softmax(1), nn.Sigmoid()
    )
    graphs = build(module, 3, 8)
    dear = {"Conv", "Tanh", "Gemm", "Softmax", "Sigmoid"}
    forward = Counter(node.op_type for node in load(graphs.training_forward).graph.node)
    assert {kind: forward[kind] for kind in dear} == dict.fromkeys(dear, 1)
    backward = {node.op_type for node in load(graphs.training_backward).graph.node}
    assert not backward & {"Tanh", "Softmax", "Sigmoid", "Conv"}
    assert {*saved(graphs).values()} == {"Tanh", "Softmax", "Sigmoid"}


def test_nothing_is_saved_that_is_an_input() -> None:
    graphs = build(nn.Linear(4, 3), 4)
    assert saved(graphs) == {}
    assert inputs(graphs.training_backward) == {"x", "d_block"}


def test_the_cut_graphs_are_the_gradient(whole: BlockGraphs) -> None:
    torch.manual_seed(0)
    module = every_layer().train()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 3, 8), dtype=np.float32)
    upstream = rng.standard_normal((12, 4), dtype=np.float32)
    masks = {d.name: np.ones((12, *d.sizes({})), np.float32) for d in whole.dropouts}
    module[3], module[8] = nn.Identity(), nn.Identity()
    leaf = torch.from_numpy(x).requires_grad_()
    torch.autograd.backward(module(leaf), torch.from_numpy(upstream))
    feeds = {"x": x, "parameters": whole.vector, "d_block": upstream, **masks}
    forward = run(whole.training_forward, feeds)
    backward = run(whole.training_backward, feeds | forward)
    gradients = [p.grad for p in module.parameters()]
    expected = np.concatenate([g.numpy().ravel() for g in gradients if g is not None])
    np.testing.assert_allclose(backward["gradient"], expected, rtol=0, atol=1e-6)
    assert leaf.grad is not None
    np.testing.assert_allclose(backward["d_x"], leaf.grad, rtol=0, atol=1e-6)
    moved = np.concatenate([average.numpy() for average in averages_of(module)])
    np.testing.assert_allclose(forward["statistics"], moved, rtol=1e-6)


# --- what is counted ---


@pytest.mark.parametrize(
    ("module", "shape", "num_flops"),
    [
        (nn.Linear(5, 3), (5,), 2 * 5 * 3),
        (nn.Linear(5, 3, bias=False), (7, 5), 2 * 7 * 5 * 3),
        (nn.Conv1d(3, 4, 5), (3, 8), 2 * (4 * 4) * (3 * 5)),  # 4 channels, 4 places
        (nn.Conv1d(4, 4, 5, groups=2), (4, 8), 2 * (4 * 4) * (2 * 5)),
        (nn.Conv2d(3, 2, 3, stride=2, padding=1), (3, 6, 4), 2 * (2 * 3 * 2) * (3 * 9)),
        (nn.ConvTranspose1d(3, 4, 5), (3, 8), 2 * (3 * 8) * (4 * 5)),
        (nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)), (5,), 2 * (15 + 6)),
        (  # per step, 3 gates of 4 units, from 5 inputs and 4 states
            Lambda(lambda m, x: m.cell(x)[0], cell=nn.GRU(5, 4, batch_first=True)),
            (6, 5),
            6 * 2 * 12 * (5 + 4),
        ),
        (nn.LayerNorm(5), (5,), 0),
    ],
)
def test_num_flops(module: nn.Module, shape: tuple[int, ...], num_flops: int) -> None:
    assert build(module, *shape).num_flops == num_flops


@pytest.mark.parametrize(
    ("module", "shape", "num_floats"),
    [
        (nn.Linear(5, 3), (5,), 0),  # its input is kept by who made it
        (nn.Conv1d(3, 4, 5), (3, 8), 0),
        (nn.Sequential(nn.Linear(5, 3), nn.Tanh()), (5,), 3),
        (nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)), (5,), 3),
        (nn.Sequential(nn.Conv1d(3, 4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)), (3, 8), 16),
        (  # per step: r and z together, n, what r gates, and the state before
            Lambda(lambda m, x: m.cell(x)[0], cell=nn.GRU(5, 4, batch_first=True)),
            (6, 5),
            6 * (8 + 4 + 4 + 4),
        ),
    ],
)
def test_activation_bytes(module: nn.Module, shape: tuple[int, ...], num_floats: int) -> None:
    assert build(module, *shape).activation_bytes == 4 * num_floats


def test_counts_are_of_the_shorter_lengths() -> None:
    graphs = build(
        nn.Sequential(nn.Linear(5, 3), nn.Tanh()), 7, 5, axes={"x.1": (7, 14)}
    )  # fmt: skip
    assert (graphs.num_flops, graphs.activation_bytes) == (2 * 7 * 5 * 3, 4 * 7 * 3)


# --- details ---


def test_axes_that_vary_are_named() -> None:
    graphs = build(nn.Linear(5, 3), 7, 5, axes={"x.1": (7, 14)})
    (x,) = [v for v in load(graphs.eval_model).graph.input if v.name == "x"]
    (y,) = load(graphs.eval_model).graph.output
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (x, y)]
    assert dims == [["batch", "x.1", 5], ["batch", "x.1", 3]]
    found = run(
        graphs.eval_model, {"x": np.ones((2, 3, 5), np.float32), "parameters": graphs.vector}
    )
    assert found["block"].shape == (2, 3, 3)


def test_an_output_that_is_the_input() -> None:
    graphs = build(Lambda(lambda m, x: (x, m.out(x), x), out=nn.Linear(4, 3)), 4, by_input=True)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    found = run(graphs.eval_model, {"x": x, "parameters": graphs.vector})
    np.testing.assert_array_equal(found["block.0"], x)
    np.testing.assert_array_equal(found["block.2"], x)
    upstream = {"d_block.0": x, "d_block.1": np.zeros((2, 3), np.float32), "d_block.2": 2 * x}
    feeds = {"x": x, "parameters": graphs.vector, **upstream}
    forward = run(graphs.training_forward, feeds)
    np.testing.assert_array_equal(run(graphs.training_backward, feeds | forward)["d_x"], 3 * x)


def test_a_graph_s_constants_are_there_once(whole: BlockGraphs) -> None:
    for data in (whole.eval_model, whole.training_forward, whole.training_backward):
        values = [numpy_helper.to_array(value) for value in load(data).graph.initializer]
        keys = [(v.dtype.str, v.shape, v.tobytes()) for v in values]
        assert len({*keys}) == len(keys)


def test_the_same_block_gives_the_same_bytes(whole: BlockGraphs) -> None:
    torch.manual_seed(0)
    again = build(every_layer(), 3, 8, by_input=True)
    assert again.eval_model == whole.eval_model
    assert again.training_forward == whole.training_forward
    assert again.training_backward == whole.training_backward


def test_the_module_is_not_changed() -> None:
    module = every_layer().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [layer.training for layer in module.modules()]
    build(module, 3, 8)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [layer.training for layer in module.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


class Failing(nn.Module):
    """What the user's own code raises; ``int`` in training, ``float`` in a trace."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.out = error, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("depth"), r"^block block: PyTorch cannot trace it: 'depth'$"),
        (RuntimeError("first\nsecond"), r"^block block: PyTorch cannot trace it: first$"),
        (AssertionError(), r"^block block: PyTorch cannot trace it: AssertionError$"),
        (ModelError("as it is"), r"^as it is$"),
        (
            ValueError("x" * 1000),
            rf"^{re.escape('block block: PyTorch cannot trace it: ')}x{{400,}}$",
        ),
    ],
)
def test_errors_name_the_block(error: Exception, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(Failing(error), 4)
