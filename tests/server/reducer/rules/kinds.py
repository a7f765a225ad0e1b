"""Every implementation of the rules."""

from __future__ import annotations

import pytest

from server.reducer.rules import Rules
from server.reducer.rules.numpy_rules import NumpyRules

KINDS = ["numpy", "cpu", "cpu,cpu,cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def rules_of(kind: str) -> Rules:
    """Numpy's, numba's, or torch's on devices; skips the test where there is no such."""
    if kind == "numpy":
        return NumpyRules()
    if kind == "numba":
        pytest.importorskip("numba")
        from server.reducer.rules.numba_rules import NumbaRules

        return NumbaRules()
    torch = pytest.importorskip("torch")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    from server.reducer.rules.torch_rules import TorchRules, rules_on

    return rules_on("cuda") if kind == "cuda" else TorchRules(kind.split(","))
