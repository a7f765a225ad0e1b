"""The optimizer graphs against torch.optim, in float32 on both sides."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from export.optimizers import build_optimizers

Vector = NDArray[np.float32]

STATE = {"sgd": ("velocity",), "adamw": ("first_moment", "second_moment")}
TORCH_STATE = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}
OFF = {"gradient_scale": 1.0, "proximal": 0.0, "weight_decay": 0.0}
DEFAULTS: dict[str, dict[str, float]] = {
    "sgd": {"momentum": 0.0, "nesterov": 0.0, **OFF},
    "adamw": {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8, **OFF},
}
RATES = [0.1, 0.1, 0.03, 0.0, 0.2]  # of five steps
TOLERANCE = 1e-6


@functools.cache
def session(name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        build_optimizers()[name], options, providers=["CPUExecutionProvider"]
    )


def random(n: int, seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def feeds(name: str, parameters: Vector, gradient: Vector, **changes: object) -> dict[str, Any]:
    """Inputs of a first step with the defaults, but for ``changes``."""
    values: dict[str, object] = {
        "parameters": parameters,
        "gradient": gradient,
        "anchor": np.zeros(1),
        "learning_rate": 0.1,
        **dict.fromkeys(STATE[name], np.zeros_like(parameters)),
        **DEFAULTS[name],
        **({"step": 1} if name == "adamw" else {}),
        **changes,
    }
    return {key: np.asarray(value, np.float32) for key, value in values.items()}


class Run(NamedTuple):
    """Some steps: where they start, what they are fed, and which step of AdamW is the first."""

    start: Vector
    state: list[Vector]
    anchor: Vector
    gradients: list[Vector]
    rates: list[float]
    options: dict[str, float]
    first: int = 1


def ours(name: str, run: Run) -> Iterator[list[Vector]]:
    """Parameters and state after each step."""
    values = [run.start, *run.state]
    for i, (gradient, rate) in enumerate(zip(run.gradients, run.rates, strict=True)):
        changes: dict[str, object] = {**run.options, "anchor": run.anchor, "learning_rate": rate}
        changes.update(zip(STATE[name], values[1:], strict=True))
        if name == "adamw":
            changes["step"] = run.first + i
        values = session(name).run(None, feeds(name, values[0], gradient, **changes))
        yield values


def theirs(name: str, run: Run) -> Iterator[list[Vector]]:
    """The same of torch.optim and autograd: a proximal term is a part of the loss."""
    options = {key: float(np.float32(value)) for key, value in run.options.items()}
    parameters = torch.nn.Parameter(torch.from_numpy(run.start.copy()))
    optimizer = judge(name, parameters, options)
    state = [torch.from_numpy(x.copy()) for x in run.state]
    optimizer.state[parameters] = dict(zip(TORCH_STATE[name], state, strict=True))
    if name == "adamw":
        optimizer.state[parameters]["step"] = torch.tensor(run.first - 1.0)
    for gradient, rate in zip(run.gradients, run.rates, strict=True):
        optimizer.param_groups[0]["lr"] = float(np.float32(rate))
        optimizer.zero_grad()
        loss = options["gradient_scale"] * torch.dot(torch.from_numpy(gradient), parameters)
        distance = (parameters - torch.from_numpy(run.anchor)).square().sum()
        torch.autograd.backward(loss + options["proximal"] / 2 * distance)
        optimizer.step()
        yield [t.detach().numpy().copy() for t in (parameters, *state)]


def judge(
    name: str, parameters: torch.nn.Parameter, options: dict[str, float]
) -> torch.optim.Optimizer:
    decay = options["weight_decay"]
    if name == "sgd":
        return torch.optim.SGD(
            [parameters],
            momentum=options["momentum"],
            nesterov=bool(options["nesterov"]),
            weight_decay=decay,
        )
    betas = options["beta1"], options["beta2"]
    return torch.optim.AdamW([parameters], betas=betas, eps=options["epsilon"], weight_decay=decay)


def check(name: str, run: Run) -> None:
    """Our steps are PyTorch's, within `TOLERANCE` of a vector's largest entry around the step."""
    before = [run.start, *run.state]
    # Without momentum torch.optim.SGD leaves the velocity alone.
    num_vectors = 1 if run.options.get("momentum") == 0 else len(before)
    for found, expected in zip(ours(name, run), theirs(name, run), strict=True):
        assert [(x.dtype, x.shape) for x in found] == [(x.dtype, x.shape) for x in before]
        for i in range(num_vectors):
            scale = max(np.abs(before[i]).max(), np.abs(expected[i]).max())
            assert np.abs(found[i] - expected[i]).max() <= TOLERANCE * scale
        before = expected


def check_steps(
    name: str, changes: dict[str, float], *, n: int = 37, rates: list[float] = RATES
) -> None:
    """From the first step on, random gradients."""
    start, anchor, *gradients = (random(n, i) for i in range(len(rates) + 2))
    state = [np.zeros_like(start) for _ in STATE[name]]
    check(name, Run(start, state, anchor, gradients, rates, DEFAULTS[name] | changes))


COMMON = [
    {"weight_decay": decay, "gradient_scale": scale, "proximal": proximal}
    for decay, scale, proximal in itertools.product([0.0, 0.01], [1.0, 0.3], [0.0, 0.1])
]
MOMENTA = [(0.0, 0.0), (0.9, 0.0), (0.9, 1.0)]
BETAS = [(0.9, 0.999), (0.0, 0.99), (0.5, 0.0)]


@pytest.mark.parametrize(("momentum", "nesterov"), MOMENTA)
@pytest.mark.parametrize("common", COMMON, ids=str)
def test_sgd_is_pytorchs(common: dict[str, float], momentum: float, nesterov: float) -> None:
    check_steps("sgd", {**common, "momentum": momentum, "nesterov": nesterov})


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
@pytest.mark.parametrize("common", COMMON, ids=str)
def test_adamw_is_pytorchs(common: dict[str, float], beta1: float, beta2: float) -> None:
    check_steps("adamw", {**common, "beta1": beta1, "beta2": beta2})


@pytest.mark.parametrize("n", [1, 2, 100_003])
@pytest.mark.parametrize("name", STATE)
def test_any_length(name: str, n: int) -> None:
    own = {"momentum": 0.9, "nesterov": 1.0} if name == "sgd" else {}
    check_steps(name, {"weight_decay": 0.01, "gradient_scale": 0.5, "proximal": 0.1, **own}, n=n)


def scalars(low: float, high: float) -> st.SearchStrategy[float]:
    bounds = (float(np.float32(x)) for x in (low, high))
    return st.floats(*bounds, width=32, allow_subnormal=False)


SHARED = {
    "weight_decay": scalars(0, 0.2),
    "gradient_scale": scalars(0, 1),
    "proximal": scalars(0, 1),
}
SEEDS = st.integers(0, 1 << 20)


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries({**SHARED, "momentum": scalars(0.01, 0.99)}),
    st.sampled_from(MOMENTA),
    SEEDS,
    scalars(0, 1),
)
def test_sgd_with_any_scalars(
    options: dict[str, float], switches: tuple[float, float], seed: int, rate: float
) -> None:
    momentum, nesterov = switches
    options |= {"momentum": options["momentum"] * bool(momentum), "nesterov": nesterov}
    start, anchor, gradient, velocity = (random(37, seed + i) for i in range(4))
    check("sgd", Run(start, [velocity], anchor, [gradient], [rate], options))


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {**SHARED, "beta1": scalars(0, 0.99), "beta2": scalars(0.5, 0.9999),
         "epsilon": scalars(0, 1e-2)}
    ),
    SEEDS,
    scalars(0, 1),
    st.integers(1, 100_000),
)  # fmt: skip
def test_adamw_with_any_scalars(
    options: dict[str, float], seed: int, rate: float, step: int
) -> None:
    """Second moments of at least 1: a step along a rounding error is no fault of the graph."""
    start, anchor, gradient, first, second = (random(37, seed + i) for i in range(5))
    state = [first, 1 + np.square(second)]
    check("adamw", Run(start, state, anchor, [gradient], [rate], options, first=step))


def test_many_steps_of_adamw() -> None:
    """The bias correction far from the first step."""
    check_steps("adamw", {"weight_decay": 0.01}, rates=[0.01] * 300)


def test_sgd_by_hand() -> None:
    """One step in exact binary numbers, with everything switched on."""
    new_parameters, new_velocity = session("sgd").run(
        None,
        feeds(
            "sgd", np.full(1, 4.0), np.full(1, 8.0), velocity=[2.0], anchor=[2.0],
            learning_rate=0.5, momentum=0.5, nesterov=1, weight_decay=0.25, gradient_scale=0.5,
            proximal=0.5,
        ),
    )  # fmt: skip
    # g = 0.5 * 8 + 0.5 * (4 - 2) + 0.25 * 4 = 6; v = 0.5 * 2 + 6; w = 4 - 0.5 * (6 + 0.5 * 7)
    assert (new_velocity, new_parameters) == ([7.0], [-0.75])


def test_adamw_by_hand() -> None:
    """A first step goes by the learning rate against the gradient's sign, decay apart."""
    w, m, v = session("adamw").run(
        None, feeds("adamw", np.full(1, 4.0), np.full(1, -2.0), weight_decay=0.5)
    )
    np.testing.assert_allclose([*w, *m, *v], [4 * 0.95 + 0.1, -0.2, 0.004], rtol=2e-5)


def test_a_beta_is_as_exact_as_float32() -> None:
    """1 - float32(0.999) is 1.3e-5 from 0.001, and so is the second moment of a first step."""
    gradient = random(37, 0)
    v = session("adamw").run(["new_second_moment"], feeds("adamw", gradient, gradient))[0]
    exact = 0.001 * gradient.astype(np.float64) ** 2
    assert 1e-6 < np.abs(v / exact - 1).max() < 2e-5


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
@pytest.mark.parametrize("name", STATE)
def test_the_scale_is_clip_grad_norm(name: str, max_norm: float) -> None:
    start, gradient = random(37, 1), random(37, 2)
    parameters = torch.nn.Parameter(torch.from_numpy(start.copy()))
    parameters.grad = torch.from_numpy(gradient.copy())
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer = judge(name, parameters, DEFAULTS[name])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    scale = min(1.0, max_norm / (norm.item() + 1e-6))
    found = session(name).run(
        ["new_parameters"], feeds(name, start, gradient, gradient_scale=scale)
    )[0]
    np.testing.assert_allclose(found, parameters.detach().numpy(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", STATE)
def test_an_exploding_gradient_that_is_clipped(name: str) -> None:
    """Scale squared would be zero in float32, the scaled gradient is an ordinary one."""
    start, gradient = random(37, 1), random(37, 2)
    run = session(name).run
    expected = run(None, feeds(name, start, gradient))
    found = run(None, feeds(name, start, gradient * np.float32(1e30), gradient_scale=1e-30))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", STATE)
def test_an_anchor_of_length_one(name: str) -> None:
    """Not read without a proximal term, not even when it is no number; broadcast with one."""
    start, gradient = random(37, 1), random(37, 2)
    run = session(name).run
    for proximal, one in ((0.0, np.nan), (0.5, 3.0)):
        full = run(None, feeds(name, start, gradient, proximal=proximal, anchor=np.full(37, 3.0)))
        short = run(None, feeds(name, start, gradient, proximal=proximal, anchor=[one]))
        for a, b in zip(full, short, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", STATE)
def test_at_the_anchor_there_is_no_pull(name: str) -> None:
    start, gradient = random(37, 1), random(37, 2)
    run = session(name).run
    far = run(None, feeds(name, start, gradient, proximal=0.7, anchor=start, weight_decay=0.1))
    off = run(None, feeds(name, start, gradient, weight_decay=0.1))
    for a, b in zip(far, off, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", STATE)
def test_the_arguments_are_not_changed(name: str) -> None:
    inputs = feeds(name, random(37, 1), random(37, 2), proximal=0.1, anchor=random(37, 3))
    before = {key: value.copy() for key, value in inputs.items()}
    session(name).run(None, inputs)
    for key, value in before.items():
        np.testing.assert_array_equal(inputs[key], value)


@pytest.mark.parametrize("proximal", [0.0, 0.1])
@pytest.mark.parametrize("name", STATE)
def test_another_runtime_agrees(name: str, proximal: float) -> None:
    inputs = feeds(name, random(37, 1), random(37, 2), proximal=proximal, anchor=random(37, 3))
    reference = ReferenceEvaluator(onnx.load_from_string(build_optimizers()[name]))
    for a, b in zip(session(name).run(None, inputs), reference.run(None, inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


SIGNATURES = {
    "sgd": (
        ["parameters", "gradient", "velocity", "anchor"],
        ["learning_rate", "momentum", "nesterov", "weight_decay", "gradient_scale", "proximal"],
        ["new_parameters", "new_velocity"],
    ),
    "adamw": (
        ["parameters", "gradient", "first_moment", "second_moment", "anchor"],
        ["learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "gradient_scale",
         "proximal", "step"],
        ["new_parameters", "new_first_moment", "new_second_moment"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signature(name: str) -> None:
    vectors, scalars, outputs = SIGNATURES[name]
    declared = [(i.name, i.type, i.shape) for i in session(name).get_inputs()]
    lengths = [["num_anchor" if v == "anchor" else "n"] for v in vectors]
    assert declared == [
        (key, "tensor(float)", shape)
        for key, shape in zip(vectors + scalars, lengths + [[]] * len(scalars), strict=True)
    ]
    assert [(o.name, o.type, o.shape) for o in session(name).get_outputs()] == [
        (key, "tensor(float)", ["n"]) for key in outputs
    ]


@pytest.mark.parametrize("name", SIGNATURES)
def test_plain_onnx(name: str) -> None:
    model = onnx.load_from_string(build_optimizers()[name])
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert not any(node.domain for node in model.graph.node)
    assert not model.functions


def test_the_same_bytes_in_another_process() -> None:
    program = (
        "import sys; from export.optimizers import build_optimizers as b; "
        "sys.stdout.write(' '.join(f'{k}:{v.hex()}' for k, v in b().items()))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True,
        env={**os.environ, "PYTHONHASHSEED": "1"}, cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    here = build_optimizers()
    assert list(here) == ["sgd", "adamw"]
    assert printed == " ".join(f"{key}:{value.hex()}" for key, value in here.items())
