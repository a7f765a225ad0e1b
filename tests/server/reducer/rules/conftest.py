from __future__ import annotations

import pytest

from server.reducer.rules import Rules
from server.reducer.rules.numpy_rules import NumpyRules

KINDS = ["numpy", "cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)]


@pytest.fixture(params=KINDS, scope="session")
def rules(request: pytest.FixtureRequest) -> Rules:
    """Every implementation; that of torch on each kind of device."""
    if request.param == "numpy":
        return NumpyRules()
    torch = pytest.importorskip("torch")
    if request.param != "cpu" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    from server.reducer.rules.torch_rules import TorchRules

    return TorchRules(request.param)
