"""What the torch backend does when a device has too little memory, or is lost."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
import pytest

from petalfl.codecs import Encoded
from petalfl.codecs.encoded import ALIGN
from server.reducer import Backend, backend, choose
from server.reducer.numpy_backend import NumpyBackend
from tests.server.reducer.test_backends import CODECS, SIZES, assert_sum, encoded, summed

torch = pytest.importorskip("torch")
torch_backend = pytest.importorskip("server.reducer.torch_backend")

SIZE = 40 * ALIGN + 17


class LostError(RuntimeError):
    """As torch's AcceleratorError: ``CUDA error: unspecified launch failure``."""


class Device(torch_backend.CpuDevice):  # type: ignore[misc, name-defined]
    """The CPU with so much memory for staging, and so many sums to live."""

    tile = 16 * ALIGN

    def __init__(self, name: str = "cuda:0", max_bytes: int = 1 << 40, life: int = 1 << 40) -> None:
        super().__init__(name)
        self.max_bytes = max_bytes
        self.life = life
        self.tiles: list[int] = []

    def stage(self, num_bytes: int) -> Any:
        if num_bytes > self.max_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {num_bytes}")
        return super().stage(num_bytes)

    def zeros(self, width: int) -> Any:
        self.tiles.append(width)
        return super().zeros(width)

    def add(self, total: Any, stage: Any, packed: Any) -> None:
        self.life -= 1
        if self.life < 0:
            raise LostError("CUDA error: unspecified launch failure")
        super().add(total, stage, packed)


def of(*devices: Device) -> Backend:
    made: Backend = torch_backend.TorchBackend("cuda", devices, NumpyBackend())
    return made


def updates(number: int = 12) -> tuple[list[Encoded], Any]:
    rng = np.random.default_rng(0)
    vectors = [encoded(CODECS[k % len(CODECS)], SIZE, rng) for k in range(number)]
    return vectors, rng.uniform(1, 2, number)


def test_with_too_little_memory_the_tile_is_halved(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(max_bytes=torch_backend.room_for(5 * ALIGN, 8))
    vectors, factors = updates()
    assert_sum(summed(of(device), vectors, factors), vectors, factors, 1e-7)
    assert max(device.tiles) == 4 * ALIGN
    assert [r.getMessage() for r in caplog.records] == [
        f"cuda:0 has no memory for tiles of {n * ALIGN} values: half of that" for n in (16, 8)
    ]


def test_the_smaller_tile_stays() -> None:
    device = Device(max_bytes=torch_backend.room_for(5 * ALIGN, 8))
    target, (vectors, factors) = of(device), updates()
    summed(target, vectors, factors)
    num_stages = len(device.tiles)
    summed(target, vectors, factors)
    assert len(device.tiles) == 2 * num_stages


def test_without_any_memory_the_cpu_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    vectors, factors = updates()
    target = of(Device(max_bytes=0))
    assert_sum(summed(target, vectors, factors), vectors, factors, 1e-7)
    assert "cuda:0 is lost, numpy goes on: CUDA out of memory" in caplog.text
    assert target.name == "numpy, cuda is lost"


@pytest.mark.parametrize("life", [0, 1, 5, 10])
def test_a_device_that_is_lost_loses_nothing(life: int, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it is lost: what it had summed by then is not counted twice, either."""
    vectors, factors = updates()
    device = Device(life=life)
    target, total = of(device), np.zeros(SIZE)
    for first in range(0, 12, 3):
        target.fold(total, vectors[first : first + 3], factors[first : first + 3])
    assert_sum(total, vectors, factors, 1e-7)
    assert device.life < 0
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line == "cuda:0 is lost, numpy goes on: CUDA error: unspecified launch failure"
    assert target.name == "numpy, cuda is lost" and "numpy" in target.description


def test_several_devices_share_a_block() -> None:
    devices = [Device(f"cuda:{k}") for k in range(3)]
    vectors, factors = updates()
    assert_sum(summed(of(*devices), vectors, factors), vectors, factors, 1e-7)
    assert sum(sum(device.tiles) for device in devices) == SIZE
    assert all(device.tiles for device in devices)


def test_one_of_several_devices_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = Device("cuda:0"), Device("cuda:1", life=2)
    target, (vectors, factors) = of(good, bad), updates()
    for _ in range(2):
        assert_sum(summed(target, vectors, factors), vectors, factors, 1e-7)
    assert "cuda:1 is lost, cuda:0 goes on" in caplog.text
    assert target.description.endswith("on cuda:0")


@pytest.mark.parametrize("size", SIZES)
def test_a_block_of_any_size_is_shared(size: int) -> None:
    rng = np.random.default_rng(size)
    vectors, factors = [encoded("int8", size, rng) for _ in range(3)], np.array([1.0, 2.0, 4.0])
    found = summed(of(Device("cuda:0"), Device("cuda:1")), vectors, factors)
    assert_sum(found, vectors, factors, 1e-7)


# The choice


def test_without_a_gpu_cuda_is_refused_and_auto_goes_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for text in ("cuda", "cuda:3"):
        with pytest.raises(
            ValueError, match=f"reducer {text}: torch .*(without CUDA|finds 0 GPUs)"
        ):
            choose(text)
    monkeypatch.setattr(backend, "num_gpus", lambda: 1)  # the driver has one, torch has not
    assert choose("auto").name in ("numba", "numpy")
    assert "there is a GPU, but --reducer cuda: torch" in caplog.text


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="reducer cuda:2: torch finds 2 GPUs; choose auto, or"):
        choose("cuda:2")


@pytest.mark.parametrize("kind", ["torch", "cuda"])
def test_without_torch(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"reducer {kind}: torch is not installed; https://"):
        choose(kind)


# On a GPU, and its kernels without one


@pytest.fixture(scope="module")
def gpu() -> Backend:
    if not (torch.cuda.is_available() and importlib.util.find_spec("triton")):
        pytest.skip("no GPU, or no triton")
    return choose("cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", SIZES)
def test_the_sums_of_a_gpu(gpu: Backend, codec: str, size: int) -> None:
    rng = np.random.default_rng(size)
    vectors = [encoded(codec, size, rng) for _ in range(11)]
    factors = rng.uniform(0.1, 1000, 11)
    assert_sum(summed(gpu, vectors, factors), vectors, factors, 1e-7)


@pytest.mark.cuda
def test_a_gpu_gives_the_same_bits_again(gpu: Backend) -> None:
    vectors, factors = updates()
    first = summed(gpu, vectors, factors)
    assert summed(gpu, vectors, factors).tobytes() == first.tobytes()
