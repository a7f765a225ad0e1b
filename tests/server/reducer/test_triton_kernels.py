"""The CUDA kernels under Triton's interpreter, which needs no GPU, next to torch's operators."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed: its interpreter would do")

SCRIPT = """
import json, sys
import numpy as np, torch
from petalfl.codecs import parse_codec
from server.reducer import torch_backend, triton_kernels
from server.reducer.packing import pack, room_for

assert triton_kernels.BLOCK == torch_backend.ALIGN
rng, found = np.random.default_rng(0), []
for name in ("f32", "f16", "bf16", "int8", "topk:0.1", "topk-int8:0.3"):
    codec = parse_codec(name)
    for size, start in ((300, 0), (2048, 0), (5000, 0), (5000, 2048)):
        vectors = [rng.standard_normal(size, dtype=np.float32) for _ in range(3)]
        encoded = [codec.parse(codec.encode(vector, rng), size) for vector in vectors]
        host = np.zeros(room_for(size, 8), np.uint8)
        _, packed = pack(encoded, np.array([1.0, 2.5, 1e6]), start, size, host)
        arrays = torch_backend.tensors(torch.from_numpy(host), packed)
        sums = []
        for module in (triton_kernels, torch_backend):
            total = torch.full((size - start,), 0.5, dtype=torch.float64)
            if packed.bitmap is None:
                module.add_dense(total, *arrays)
            else:
                module.add_sparse(total, *arrays, skip=packed.skip)
            sums.append(total)
        off = ((sums[0] - sums[1]).abs() / (1 + sums[1].abs())).max().item()
        found.append([name, size, start, off, sums[1].std().item()])
print(json.dumps(found))
"""


def test_the_kernels_under_the_interpreter() -> None:
    """In a process of its own: Triton reads the variable when a kernel is defined."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parents[3], text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 24
    for name, size, start, off, spread in found:
        assert off < 1e-12 and spread > 0.1, (name, size, start, off, spread)
