"""What becomes of a rule whose device fails, and which rules go with which backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl.payloads import EncodedDelta
from server.matrices import Matrix
from server.reducer import rules, use
from server.reducer.numpy_backend import NumpyBackend
from server.reducer.rules import Rules
from server.reducer.rules.numpy_rules import NumpyRules
from tests.server.reducer.rules.builders import mixed

torch = pytest.importorskip("torch")
from server.reducer.rules import torch_rules  # noqa: E402
from server.reducer.rules.torch_device import TorchDevice  # noqa: E402


class Named(NumpyBackend):
    def __init__(self, name: str) -> None:
        self.name = name


def test_the_rules_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "numba", "torch", "numba, cuda is lost"):
        with use(Named(name)):
            assert isinstance(rules.active(), NumpyRules)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    rules._on.cache_clear()
    for name, devices in (("cuda", ["cuda:0", "cuda:1", "cuda:2"]), ("cuda:1", ["cuda:1"])):
        with use(Named(name)):
            found = rules.active()
            assert isinstance(found, torch_rules.TorchRules)
            assert [str(device) for device in found._devices] == devices
            assert rules.active() is found
    rules._on.cache_clear()


def test_tiles_are_halved_while_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deltas, on_cpu = mixed(9, 60_000), torch_rules.TorchRules(["cpu"])
    expected, widths = on_cpu.median(deltas), []

    def median(values: Any) -> Any:
        widths.append(values.shape[1])
        if values.numel() > 200_000:
            raise torch.OutOfMemoryError("a device of 200,000 values")
        return torch_median(values)

    torch_median = torch_rules.median
    monkeypatch.setattr(torch_rules, "median", median)
    monkeypatch.setattr(torch_rules, "MIN_TILE_VALUES", 1 << 17)
    np.testing.assert_array_equal(on_cpu.median(deltas), expected)
    assert widths[0] == 60_000 and max(widths[-3:]) <= 200_000 // 9
    assert "tiles of 16777216 values: half of that" in caplog.text


def test_without_memory_another_computes_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def median(values: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch_rules, "median", median)
    deltas = mixed(9, 3000)
    found = torch_rules.TorchRules(["cpu"]).median(deltas)
    np.testing.assert_array_equal(found, NumpyRules().median(deltas))


def test_a_device_that_is_lost_loses_no_update(caplog: pytest.LogCaptureFixture) -> None:
    """Torch's meta device takes tensors, and gives none back."""
    deltas, weights = mixed(9, 3000), np.linspace(1, 2, 9)
    lost, numpy = torch_rules.TorchRules(["meta"]), NumpyRules()
    np.testing.assert_array_equal(lost.median(deltas), numpy.median(deltas))
    np.testing.assert_array_equal(
        lost.trimmed_mean(deltas, weights, 2), numpy.trimmed_mean(deltas, weights, 2)
    )
    assert caplog.text.count("meta is lost to the rules") == 1


MATRIX = Matrix("w", 5, (30, 40))
KERNELS: dict[str, Callable[[Rules, list[EncodedDelta]], Any]] = {
    "median": lambda rules, deltas: rules.median(deltas),
    "trimmed mean": lambda rules, deltas: rules.trimmed_mean(deltas, np.linspace(1, 2, 9), 2),
    "inner products": lambda rules, deltas: rules.inner_products(deltas),
    "canonical": lambda rules, deltas: rules.canonical(MATRIX, deltas, np.full(9, 1 / 9), 0.5, 1),
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def assert_as_of_numpy(name: str, found: Any, deltas: list[EncodedDelta]) -> None:
    expected = KERNELS[name](NumpyRules(), deltas)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@every_kernel
def test_several_devices_share_the_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of the block, or clients and directions of a matrix: a share each, all once."""
    shares: dict[str, list[slice]] = {}

    def guarded(self: Any, work: Any, device: Any, share: slice) -> Any:
        shares.setdefault(work.__name__, []).append(share)
        return plain(self, work, device, share)

    plain = torch_rules.TorchRules._guarded
    monkeypatch.setattr(torch_rules.TorchRules, "_guarded", guarded)
    deltas = mixed(9, 30_000)
    assert_as_of_numpy(name, KERNELS[name](torch_rules.TorchRules(["cpu"] * 3), deltas), deltas)
    sizes = {"work": 30_000, "gram_of": 9, "basis_of": 1, "merged_along": 30}
    assert shares.keys() == (sizes.keys() - {"work"} if name == "canonical" else {"work"})
    for work, some in shares.items():
        assert len(some) == (1 if work == "basis_of" else 3)
        assert sorted(k for one in some for k in range(sizes[work])[one]) == [*range(sizes[work])]


@every_kernel
def test_those_that_are_left_take_over(name: str, caplog: pytest.LogCaptureFixture) -> None:
    deltas, several = mixed(9, 30_000), torch_rules.TorchRules(["cpu", "meta", "cpu"])
    for _ in range(2):
        assert_as_of_numpy(name, KERNELS[name](several, deltas), deltas)
    assert caplog.text.count("meta is lost to the rules") == 1
    assert [str(device) for device in several._devices] == ["cpu", "cpu"]


def test_one_without_memory_is_left_out_of_that_rule_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    several, deltas = torch_rules.TorchRules(["cpu", "cpu"]), mixed(9, 30_000)
    full = several._devices[1]

    def tiles(*work: object) -> Any:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(full, "tiles", tiles)
        assert_as_of_numpy("median", several.median(deltas), deltas)
    assert "cpu has no memory for a rule, another computes it" in caplog.text
    assert several._devices[1] is full and several._devices[0].tile_values == 1 << 24


def test_a_block_shorter_than_its_shares() -> None:
    deltas = mixed(9, 20)
    for name in ("median", "trimmed mean", "inner products"):
        found = KERNELS[name](torch_rules.TorchRules(["cpu"] * 4), deltas)
        assert_as_of_numpy(name, found, deltas)


def test_kernels_run_on_the_device_that_has_the_values() -> None:
    """Triton launches on the current one."""
    active = TorchDevice("cuda:1").active()
    assert isinstance(active, torch.cuda.device) and active.idx == 1


def test_an_error_of_the_cpu_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def median(values: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch_rules, "median", median)
    with pytest.raises(RuntimeError, match="a bug"):
        torch_rules.TorchRules(["cpu"]).median(mixed(2, 100))


SCRIPT = """
import json
import numpy as np, torch
from server.reducer.rules import torch_rules, triton_ranks

rng, off = np.random.default_rng(0), 0.0
for num_rows in (1, 2, 7, 33, 100):
    for drawn in (rng.normal(size=(num_rows, 70)), rng.integers(-2, 3, (num_rows, 70)),
                  rng.choice([3.4e38, -3.4e38, 1e-45, -0.0, 0.0], (num_rows, 70))):
        values = torch.from_numpy(drawn.astype(np.float32))
        assert (triton_ranks.median(values) == torch_rules.median(values)).all(), num_rows
        part = values[:, :41]
        assert (triton_ranks.median(part) == torch_rules.median(part)).all(), num_rows
        for cut in {1, num_rows // 4} - {0}:
            if 2 * cut < num_rows:
                weights = torch.from_numpy(rng.random(num_rows) + 1)
                found = triton_ranks.trimmed_mean(values, weights, cut)
                expected = torch_rules.trimmed_mean(values, weights, cut)
                error = (found.double() - expected).abs() / values.double().abs().max()
                off = max(off, error.max().item())
print(json.dumps(off))
"""


def test_the_cuda_kernels_under_the_interpreter() -> None:
    """In a process of its own: Triton reads the variable when a kernel is defined."""
    pytest.importorskip("triton", reason="triton is not installed: its interpreter would do")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[4], text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 1e-7
