"""The optimizers on the artifacts' own graphs, judged by PyTorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl.engine import OrtEngine
from petalfl.model import ModelManifest
from petalfl.optimizers import ClientOptimizer, Scalars, adamw, sgd
from petalfl.vectors import Vector

VECTORS = st.lists(
    st.floats(-10, 10, width=32, allow_subnormal=False), min_size=3, max_size=3
)  # fmt: skip


@pytest.fixture(scope="module")
def made(small_artifacts: Path) -> Any:
    """Makes an optimizer: `sgd` or `adamw` on the exported graph."""
    manifest, engine = ModelManifest.load(small_artifacts), OrtEngine(small_artifacts)

    def make(build: Any, **settings: Any) -> ClientOptimizer:
        optimizer: ClientOptimizer = build(engine, manifest.optimizers[build.__name__], **settings)
        return optimizer

    return make


def vector(*values: float) -> Vector:
    return np.array(values, np.float32)


def test_sgd_by_hand(made: Any) -> None:
    """Two steps with momentum 0.5, decay 0.25 and rates 0.5, then 1, in exact binary numbers."""
    optimizer = made(sgd, momentum=0.5, weight_decay=0.25)
    state = optimizer.init(vector(4.0))
    assert state.num_steps == 0
    np.testing.assert_array_equal(state.moments["velocity"], [0.0])
    w, state = optimizer.update(vector(4.0), vector(2.0), state, Scalars(0.5))
    np.testing.assert_array_equal(state.moments["velocity"], [3.0])  # 2 + 0.25 * 4
    np.testing.assert_array_equal(w, [2.5])  # 4 - 0.5 * 3
    w, state = optimizer.update(w, vector(-1.0), state, Scalars(1.0))
    np.testing.assert_array_equal(state.moments["velocity"], [1.125])  # 1.5 - 1 + 0.25 * 2.5
    np.testing.assert_array_equal(w, [1.375])
    assert state.num_steps == 2


def test_the_scale_and_the_pull_by_hand(made: Any) -> None:
    """g = 0.5 · 4 + 2 · (3 - 1) = 6: the anchor is where the optimizer was started."""
    optimizer = made(sgd)
    _, state = optimizer.update(vector(1.0), vector(0.0), optimizer.init(vector(1.0)), Scalars(1.0))
    np.testing.assert_array_equal(state.anchor, [1.0])
    w, state = optimizer.update(vector(3.0), vector(4.0), state, Scalars(0.5, 0.5, 2.0))
    np.testing.assert_array_equal(w, [0.0])  # 3 - 0.5 * 6
    np.testing.assert_array_equal(state.anchor, [1.0])


SETTINGS: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "sgd": (sgd, "SGD", {}, {}),
    "momentum": (sgd, "SGD", {"momentum": 0.9, "weight_decay": 0.1},
                 {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (sgd, "SGD", {"momentum": 0.5, "nesterov": True},
                 {"momentum": 0.5, "nesterov": True}),
    "adamw": (adamw, "AdamW", {}, {"weight_decay": 0.0}),
    "adamw with all": (
        adamw, "AdamW",
        {"beta1": 0.5, "beta2": 0.75, "epsilon": 0.01, "weight_decay": 0.125},
        {"betas": (0.5, 0.75), "eps": 0.01, "weight_decay": 0.125},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_as_pytorch(made: Any, case: str) -> None:
    torch = pytest.importorskip("torch", reason="without torch: PyTorch is the judge")
    build, judge_type, ours, theirs = SETTINGS[case]
    optimizer = made(build, **ours)

    @settings(max_examples=40, deadline=None)
    @given(
        start=VECTORS,
        gradients=st.lists(VECTORS, min_size=1, max_size=5),
        rate=st.sampled_from([0.0, 0.01, 0.5]),
        scale=st.sampled_from([1.0, 0.25]),
        mu=st.sampled_from([0.0, 0.5]),
    )
    def check(
        start: list[float], gradients: list[list[float]], rate: float, scale: float, mu: float
    ) -> None:
        expected = torch.nn.Parameter(torch.tensor(start))
        judge = getattr(torch.optim, judge_type)([expected], lr=rate, **theirs)
        found, state = vector(*start), optimizer.init(vector(*start))
        for gradient in gradients:
            pull = mu * (expected.detach() - torch.tensor(start))
            expected.grad = scale * torch.tensor(gradient) + pull
            judge.step()
            found, state = optimizer.update(
                found, vector(*gradient), state, Scalars(rate, scale, mu)
            )
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-4)

    check()


@pytest.mark.parametrize("build", [sgd, adamw])
def test_the_arguments_are_not_changed(made: Any, build: Any) -> None:
    optimizer = made(build, weight_decay=0.1)
    w, g = vector(1.0, 1.0), vector(2.0, 2.0)
    state = optimizer.init(w)
    after, new_state = optimizer.update(w, g, state, Scalars(0.1, 0.5, 0.5))
    assert after.dtype == np.float32
    np.testing.assert_array_equal(w, [1.0, 1.0])
    np.testing.assert_array_equal(g, [2.0, 2.0])
    for name, moment in state.moments.items():
        np.testing.assert_array_equal(moment, [0.0, 0.0])
        assert new_state.moments[name].all()


@pytest.mark.parametrize("build", [sgd, adamw])
def test_a_block_without_trainable_parameters_has_a_state(made: Any, build: Any) -> None:
    state = made(build).init(np.zeros(0, np.float32))
    assert all(moment.shape == (0,) for moment in state.moments.values())


@pytest.mark.parametrize(
    ("momentum", "weight_decay"),
    [(1.0, 0.0), (-0.1, 0.0), (math.nan, 0.0), (0.0, -1e-9), (0.0, math.nan)],
)
def test_sgd_outside_its_intervals(made: Any, momentum: float, weight_decay: float) -> None:
    with pytest.raises(ValueError, match="expected 0 <= momentum < 1"):
        made(sgd, momentum=momentum, weight_decay=weight_decay)


@pytest.mark.parametrize(
    "wrong",
    [{"beta1": 1.0}, {"beta2": -0.1}, {"beta2": math.nan}, {"epsilon": 0.0}, {"weight_decay": -1}],
)
def test_adamw_outside_its_intervals(made: Any, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= beta1, beta2 < 1, epsilon > 0"):
        made(adamw, **wrong)
