from __future__ import annotations

import fcntl
import os
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

from tests import stock
from tests.certificates import Authority
from tests.reference_artifacts import export_to

READY_MADE = os.environ.get("PETALFL_TEST_ARTIFACTS")
"""A folder that `tests.reference_artifacts` has written, for an environment without torch."""

# Of torch and of BLAS, here and in child processes: the models are small, and threads of several
# workers spin while they wait for one another. Exporting the watch model takes half the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure.
hypothesis.settings.register_profile(
    "petalfl", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("petalfl")

# torch and export are imported by the fixtures alone: most tests need neither.


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """The artifacts of one of `tests.reference_artifacts.MODELS`, for all workers of a run."""
    if READY_MADE:
        return Path(READY_MADE) / name
    if find_spec("torch") is None:
        pytest.skip("torch is not installed: set PETALFL_TEST_ARTIFACTS, as make test-stock does")
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        run = run.parent
    with (run / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = run / "artifacts" / name
        return made if made.exists() else export_to(run / "artifacts", name)


@pytest.fixture(scope="session")
def watch_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of the reference model, `export.models.har:watch`."""
    return made_once(tmp_path_factory, "watch")


@pytest.fixture(scope="session")
def small_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of `tests.export.tiny:small`: modalities a and b, three classes."""
    return made_once(tmp_path_factory, "small")


@pytest.fixture(scope="session")
def wider_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of `tests.export.tiny:wider`: as ``small_artifacts``, with a wider head."""
    return made_once(tmp_path_factory, "wider")


@pytest.fixture(scope="session")
def personal_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of `tests.export.tiny:personal`: as ``small_artifacts``, with a second head."""
    return made_once(tmp_path_factory, "personal")


@pytest.fixture(scope="session")
def several_artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifacts of `tests.petalfl.torch_models:several`: modalities motion and text."""
    return made_once(tmp_path_factory, "several")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that no system trusts."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stock_python() -> Path:
    """The interpreter of the second environment."""
    if not stock.PYTHON.exists() and "PETALFL_STOCK" not in os.environ:
        pytest.skip(f"{stock.PYTHON} is not there: make stock")
    return stock.PYTHON


@pytest.fixture(scope="session")
def stock_steps(stock_python: Path) -> Iterator[stock.StockSteps]:
    """Local steps in the second environment."""
    with stock.StockSteps() as steps:
        assert steps.runtime.engine == "ort"
        yield steps


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
