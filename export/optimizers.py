"""The two optimizer graphs that devices run: SGD and AdamW as PyTorch computes them.

Plain ONNX on flat vectors of any length. Scalars are combined before a vector is touched, and
terms that are switched off (proximal, weight decay, Nesterov) cost no pass over the vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

OPSET = 17
IR_VERSION = 8

Branch = Callable[["_Nodes"], str]


def build_optimizers() -> dict[str, bytes]:
    """The optimizer graphs by name, ``sgd`` and ``adamw``: the same bytes on every call.

    Vectors are float32 ``(n,)``, scalars float32 ``()``. Both take ``parameters``, ``gradient``,
    ``anchor``, ``learning_rate``, ``weight_decay``, ``gradient_scale`` and ``proximal``, and start
    from g = gradient_scale · gradient + proximal · (parameters - anchor). The anchor may be a
    vector of length 1 when ``proximal`` is 0: it is not read then.
    """
    return {"sgd": _sgd(), "adamw": _adamw()}


def _sgd() -> bytes:
    """`torch.optim.SGD` with dampening 0; the velocity before the first step is zero.

    Further inputs are ``velocity (n,)``, ``momentum`` and ``nesterov`` (0 or 1). Outputs are
    ``new_parameters`` and ``new_velocity``.
    """
    nodes = _Nodes()

    def decayed(g: Branch) -> Branch:
        return lambda n: n("Add", g(n), n("Mul", "parameters", "weight_decay"))

    def nesterov(n: _Nodes) -> str:
        ahead = n("Add", gradient, n("Mul", "new_velocity", "momentum"))
        return n("Mul", ahead, "learning_rate")

    gradient = nodes.choose(
        "proximal",
        decayed(_proximal),
        lambda n: n.choose("weight_decay", decayed(_scaled), _scaled),
    )
    nodes("Add", nodes("Mul", "velocity", "momentum"), gradient, output="new_velocity")
    step = nodes.choose("nesterov", nesterov, lambda n: n("Mul", "new_velocity", "learning_rate"))
    nodes("Sub", "parameters", step, output="new_parameters")
    return _model(
        "sgd",
        nodes,
        vectors=["parameters", "gradient", "velocity", "anchor"],
        scalars=["learning_rate", "momentum", "nesterov", "weight_decay", "gradient_scale",
                 "proximal"],
        outputs=["new_parameters", "new_velocity"],
    )  # fmt: skip


def _adamw() -> bytes:
    """`torch.optim.AdamW`; both moments before the first step are zero.

    Further inputs are ``first_moment (n,)``, ``second_moment (n,)``, ``beta1`` and ``beta2`` in
    [0, 1), ``epsilon`` and ``step``, 1 for the first. Outputs are ``new_parameters``,
    ``new_first_moment`` and ``new_second_moment``.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    nodes = _Nodes()
    scalar = _adamw_scalars(nodes)
    gradient = nodes.choose(
        "proximal",
        lambda n: _proximal(n, scalar.gradient_scale, scalar.proximal),
        lambda n: _scaled(n, scalar.gradient_scale),
    )
    nodes(
        "Add",
        nodes("Mul", "first_moment", "beta1"),
        nodes("Mul", gradient, scalar.gradient_weight),
        output="new_first_moment",
    )
    nodes(
        "Add",
        nodes("Mul", "second_moment", "beta2"),
        nodes("Mul", gradient, gradient),
        output="new_second_moment",
    )
    spread = nodes("Add", nodes("Sqrt", "new_second_moment"), scalar.epsilon)
    step = nodes("Mul", nodes("Div", "new_first_moment", spread), scalar.rate)
    nodes("Sub", nodes("Mul", "parameters", scalar.decay), step, output="new_parameters")
    return _model(
        "adamw",
        nodes,
        vectors=["parameters", "gradient", "first_moment", "second_moment", "anchor"],
        scalars=["learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "gradient_scale",
                 "proximal", "step"],
        outputs=["new_parameters", "new_first_moment", "new_second_moment"],
    )  # fmt: skip


class _AdamWScalars(NamedTuple):
    """Names of the scalars that AdamW's vectors are multiplied with, or that are added.

    Attributes:
        gradient_scale: Times r = sqrt(1 - beta2), so that g · g needs no weight in the second
            moment.
        proximal: Times r.
        gradient_weight: (1 - beta1) / r: of r · g in the first moment.
        epsilon: Times c = sqrt(1 - beta2^step): m / (sqrt(v) / c + epsilon) is
            c · m / (sqrt(v) + c · epsilon).
        rate: learning_rate · c / (1 - beta1^step).
        decay: 1 - learning_rate · weight_decay.
    """

    gradient_scale: str
    proximal: str
    gradient_weight: str
    epsilon: str
    rate: str
    decay: str


def _adamw_scalars(nodes: _Nodes) -> _AdamWScalars:
    """In float64: 1 - beta2^step would lose four of float32's seven digits at first."""
    names = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "gradient_scale",
             "proximal", "step")  # fmt: skip
    wide = {name: nodes("Cast", name, to=TensorProto.DOUBLE) for name in names}
    one = nodes("Constant", value=helper.make_tensor("one", TensorProto.DOUBLE, [], [1.0]))

    def one_minus(op: str, first: str, second: str) -> str:
        return nodes("Sub", one, nodes(op, wide[first], wide[second]))

    root = nodes("Sqrt", nodes("Sub", one, wide["beta2"]))
    correction = nodes("Sqrt", one_minus("Pow", "beta2", "step"))
    scaled_rate = nodes("Mul", wide["learning_rate"], correction)
    scalars = _AdamWScalars(
        gradient_scale=nodes("Mul", wide["gradient_scale"], root),
        proximal=nodes("Mul", wide["proximal"], root),
        gradient_weight=nodes("Div", nodes("Sub", one, wide["beta1"]), root),
        epsilon=nodes("Mul", wide["epsilon"], correction),
        rate=nodes("Div", scaled_rate, one_minus("Pow", "beta1", "step")),
        decay=one_minus("Mul", "learning_rate", "weight_decay"),
    )
    return _AdamWScalars(*(nodes("Cast", name, to=TensorProto.FLOAT) for name in scalars))


def _scaled(nodes: _Nodes, scale: str = "gradient_scale") -> str:
    return nodes("Mul", "gradient", scale)


def _proximal(nodes: _Nodes, scale: str = "gradient_scale", proximal: str = "proximal") -> str:
    pull = nodes("Mul", nodes("Sub", "parameters", "anchor"), proximal)
    return nodes("Add", _scaled(nodes, scale), pull)


class _Nodes:
    """A graph's nodes in the making: a call appends one and returns the name of its output."""

    def __init__(self, names: list[str] | None = None) -> None:
        self.nodes: list[NodeProto] = []
        self._names = [] if names is None else names  # shared with the branches: no name twice

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{op.lower()}.{len(self._names)}"
        self._names.append(name)
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def choose(self, scalar: str, if_set: Branch, if_zero: Branch) -> str:
        """The vector of one of two branches, by whether the scalar differs from zero."""
        return self(
            "If",
            self("Cast", scalar, to=TensorProto.BOOL),
            then_branch=self._branch(if_set),
            else_branch=self._branch(if_zero),
        )

    def _branch(self, build: Branch) -> GraphProto:
        nodes = _Nodes(self._names)
        output = _vector(build(nodes))
        return helper.make_graph(nodes.nodes, "branch", [], [output])


def _model(
    name: str, nodes: _Nodes, *, vectors: list[str], scalars: list[str], outputs: list[str]
) -> bytes:
    inputs = [_vector(v, "num_anchor" if v == "anchor" else "n") for v in vectors]
    inputs += [helper.make_tensor_value_info(s, TensorProto.FLOAT, []) for s in scalars]
    graph = helper.make_graph(nodes.nodes, name, inputs, [_vector(output) for output in outputs])
    model = helper.make_model(
        graph,
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="petalfl",
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _vector(name: str, length: str = "n") -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [length])
