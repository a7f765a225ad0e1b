from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# torch and export are imported by the fixtures alone: most tests need neither.


@pytest.fixture(scope="session")
def watch_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of the reference model, `export.models.har:watch`."""
    from export import export_model
    from export.models.har import watch

    out = tmp_path_factory.mktemp("watch") / "artifacts"
    export_model(watch(), out)
    return out


@pytest.fixture(scope="session")
def small_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of `tests.export.tiny:small`: modalities a and b, three classes."""
    from export import export_model
    from tests.export.tiny import small

    out = tmp_path_factory.mktemp("small") / "artifacts"
    export_model(small(), out)
    return out


@pytest.fixture(scope="session")
def several_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of `tests.petalfl.torch_models:several`: modalities motion and text."""
    from export import export_model
    from tests.petalfl.torch_models import several

    out = tmp_path_factory.mktemp("several") / "artifacts"
    export_model(several(), out)
    return out


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where CI requires Mosquitto, a test that needs it fails instead of being skipped."""
    report = yield
    is_required = "PETALFL_REQUIRE_MOSQUITTO" in os.environ and item.get_closest_marker("mosquitto")
    if report.skipped and is_required:
        report.outcome = "failed"
        report.longrepr = f"skipped although Mosquitto is required: {report.longrepr}"
    return report
