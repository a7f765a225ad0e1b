from __future__ import annotations

import pytest

from server.reducer.rules import Rules
from server.reducer.rules.numpy_rules import NumpyRules

KINDS = ["numpy", "numba", "cpu", "cpu,cpu,cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=KINDS, scope="session")
def rules(request: pytest.FixtureRequest) -> Rules:
    """Every implementation; that of torch on each kind of device, and on several."""
    if request.param == "numpy":
        return NumpyRules()
    if request.param == "numba":
        pytest.importorskip("numba")
        from server.reducer.rules.numba_rules import NumbaRules

        return NumbaRules()
    torch = pytest.importorskip("torch")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    from server.reducer.rules.torch_rules import TorchRules, rules_on

    return rules_on("cuda") if request.param == "cuda" else TorchRules(request.param.split(","))
