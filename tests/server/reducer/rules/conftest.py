from __future__ import annotations

import pytest

from server.reducer.rules import Rules
from tests.server.reducer.rules.kinds import KINDS, rules_of


@pytest.fixture(params=KINDS, scope="session")
def rules(request: pytest.FixtureRequest) -> Rules:
    """Every implementation; that of torch on each kind of device, and on several."""
    return rules_of(request.param)
