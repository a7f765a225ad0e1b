from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.harness import Outcome, run_federation


@pytest.fixture(scope="session")
def undisturbed(watch_artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Three rounds on the embedded broker, with the seed of all scenarios."""
    return run_federation(watch_artifacts, tmp_path_factory.mktemp("undisturbed"), num_rounds=3)


@pytest.fixture
def numpy_reducer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of servers that others start: numba takes seconds to load."""
    monkeypatch.setenv("PETALFL_SERVER_REDUCER", "numpy")
