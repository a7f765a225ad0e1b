"""Updates that wait on the disk leave descriptors for connections, however many they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from resource import RLIMIT_NOFILE, getrlimit
from typing import Any

import pytest

from petalfl.wire import Ready
from server import descriptors
from server.descriptors import ENOUGH, map_to_read, num_open
from server.maintenance import backup, restore
from tests.server.builders import Run, Site, make_report, make_update, settle

ROOT = Path(__file__).parents[2]
DEVICES = {f"watch-{number}": ["acc"] for number in range(60)}
MEDIAN: dict[str, Any] = {"aggregator": "median", "min_devices": len(DEVICES), "num_rounds": 1}
FEW = 20  # more than a run of the server has without any map
before_3_13 = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="since then a map has no descriptor"
)
RAISED = """
from resource import *
from server.descriptors import raise_limit
hard = getrlimit(RLIMIT_NOFILE)[1]
setrlimit(RLIMIT_NOFILE, (200, hard))
print(raise_limit(), raise_limit(), *getrlimit(RLIMIT_NOFILE), hard)
"""


def test_the_limit_is_raised_to_what_the_system_allows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RAISED], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, second, soft, hard, was_hard = map(int, done.stdout.split())
    assert first == second == soft == (ENOUGH if hard < 0 else min(hard, ENOUGH)) > 200
    assert hard == was_hard


def leave_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, maps may take a few descriptors more."""
    reserve = getrlimit(RLIMIT_NOFILE)[0] - num_open() - FEW
    monkeypatch.setattr(descriptors, "RESERVE", reserve)


@before_3_13
def test_the_reserve_is_not_mapped_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"petal")
    leave_few(monkeypatch)
    maps = []
    with (tmp_path / "file").open("rb") as file:
        with pytest.raises(OSError, match=r"of \d+ file descriptors are in use"):
            for _ in range(2 * FEW):
                maps.append(map_to_read(file.fileno()))
        assert 0 < len(maps) <= FEW and all(bytes(one) == b"petal" for one in maps)
        del maps[0]
        assert bytes(map_to_read(file.fileno())) == b"petal"


def arrive(run: Run) -> None:
    for device in DEVICES:
        run.federation.on_ready(device, Ready(("acc",), ("head",)))
    for number, device in enumerate(DEVICES):
        receipt = run.federation.on_update(make_update(device, "head", float(number)))
        assert receipt.status == "accepted"


async def assert_stepped(run: Run) -> None:
    for device in DEVICES:
        run.federation.on_report(device, make_report(device))
    await settle()
    state, head = run.state, run.federation.shared.blocks["head"]
    moved = state.read_version(head, 2)[0] - state.read_version(head, 1)[0]
    assert moved.tolist() == pytest.approx([29.5] * head.size)


async def test_a_restored_backup_is_served_with_few_descriptors(tmp_path: Path) -> None:
    """It has a segment for each update that waits."""
    site = Site(tmp_path, enrolled=DEVICES)
    with site.run(**MEDIAN) as run:
        arrive(run)
        await run.federation.commit()
    backup(site.data_dir, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "again")
    site.data_dir = tmp_path / "again"
    assert len(list(site.data_dir.glob("journal/*.deltas"))) == len(DEVICES)
    before = num_open()
    with site.run(**MEDIAN) as run:
        assert num_open() - before < FEW
        await assert_stepped(run)


@before_3_13
async def test_updates_of_long_blocks_leave_the_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of which a segment takes one; what cannot be mapped stays in memory, and counts."""
    monkeypatch.setattr("server.journal.SEGMENT_BYTES", 64)
    monkeypatch.setattr("server.spill.FILE_BYTES", 32)
    site = Site(tmp_path, enrolled=DEVICES)
    for is_again in (False, True):
        caplog.clear()
        leave_few(monkeypatch)
        before = num_open()
        with site.run(**MEDIAN) as run:
            if not is_again:
                arrive(run)
            assert num_open() - before < FEW + 4, "a few are the server's own"
            assert "cannot map a segment" in caplog.text and "stays in memory" in caplog.text
            if is_again:
                await assert_stepped(run)
