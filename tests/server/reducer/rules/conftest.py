from __future__ import annotations

from collections.abc import Callable

import pytest

from server.reducer.rules import Rules
from server.reducer.rules.numpy_rules import NumpyRules

MAKERS: dict[str, Callable[[], Rules]] = {"numpy": NumpyRules}


@pytest.fixture(params=MAKERS, scope="session")
def rules(request: pytest.FixtureRequest) -> Rules:
    return MAKERS[request.param]()
