"""SCAFFOLD where it matters: devices whose data differ, and many local steps between rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from petalfl.codecs import parse_codec
from petalfl.control_variates import correction, with_sum
from petalfl.local_data import ArrayData
from petalfl.payloads import parse_payload
from petalfl.training import Hyperparameters, train
from petalfl.vectors import Vector, to_bytes
from server.aggregators import weighted_mean
from server.control_variates import summed
from tests.petalfl.builders import NumpyEngine, make_block, make_manifest

# Linear least squares: behind a frozen stage, a head with a bias, (x V) W + b against y.
MODEL = make_manifest(
    {"a": 3},
    make_block("encoder-a", ("a",), 3, 3, is_frozen=True, reached=False),
    make_block("head", ("encoder-a",), 2, 3),
)
HEAD = MODEL.block("head")
STEPS = Hyperparameters(0.05, momentum=0.0, weight_decay=0.0, batch_size=64, epochs=20)
START = {
    "encoder-a": np.concatenate([np.eye(3).ravel(), np.zeros(3)]).astype(np.float32),
    "head": np.zeros(8, np.float32),
}


def devices() -> list[ArrayData]:
    """Three, of as many examples, whose inputs and targets have little in common."""
    rng = np.random.default_rng(0)
    made = []
    for scales in ([2.0, 0.2, 0.5], [0.3, 1.5, 0.4], [0.5, 0.4, 1.8]):
        x = (rng.standard_normal((64, 3)) * scales + rng.standard_normal(3)).astype(np.float32)
        y = x @ rng.standard_normal((3, 2)) + rng.standard_normal(2)
        made.append(ArrayData({"a": x}, {"head": y.astype(np.float32)}))
    return made


def optimum() -> NDArray[np.float64]:
    """Of all data together, in closed form."""
    x = np.concatenate([d.inputs["a"] for d in devices()]).astype(np.float64)
    y = np.concatenate([d.labels["head"] for d in devices()]).astype(np.float64)
    found, *_ = np.linalg.lstsq(np.hstack([x, np.ones((len(x), 1))]), y, rcond=None)
    return np.concatenate([found[:3].ravel(), found[3]])


def run(cohorts: list[list[int]], *, has_control: bool) -> Vector:
    """The head after so many rounds, by the parts that client and server have."""
    everybody, wire_head = devices(), with_sum(HEAD)
    version, total = START["head"], np.zeros(8, np.float32)
    own = [np.zeros(8, np.float32) for _ in everybody]
    rule: Any = summed(weighted_mean())
    for cohort in cohorts:
        state = rule.init(wire_head)
        for i in cohort:
            given = {"head": correction(total, len(everybody), own[i])} if has_control else {}
            result = train(
                NumpyEngine(), MODEL, {**START, "head": version}, everybody[i], STEPS,
                np.random.default_rng(0), shared=("head",), corrections=given,
            )  # fmt: skip
            mean = result.mean_gradients.get("head", own[i])
            delta = np.concatenate([result.parameters["head"] - version, mean - own[i]])
            encoded = parse_payload(parse_codec("f32"), wire_head, to_bytes(delta))
            state, own[i] = rule.accumulate(state, encoded, float(len(everybody[i]))), mean
        change = rule.finalize(state)
        version, total = version + change[:8], total + change[8:]
    if has_control:
        np.testing.assert_allclose(total, np.sum(own, axis=0), atol=1e-4)  # C = Σ c_i
    return version


def error(found: Vector) -> float:
    return float(np.linalg.norm(found - optimum()) / np.linalg.norm(optimum()))


def test_fedavg_drifts_and_scaffold_does_not() -> None:
    """FedAvg ends where the drifts cancel, SCAFFOLD at the optimum of all data."""
    rounds = [[0, 1, 2]] * 40
    drifted, corrected = (error(run(rounds, has_control=on)) for on in (False, True))
    assert drifted > 0.05
    assert corrected < 1e-3


def test_with_two_devices_in_turn() -> None:
    """Partial participation: of the third, the gradient of its last round counts."""
    rounds = [[i % 3, (i + 1) % 3] for i in range(120)]
    drifted, corrected = (error(run(rounds, has_control=on)) for on in (False, True))
    assert corrected < 0.1 * drifted
