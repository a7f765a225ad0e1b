"""The clocks of device and server jump amid a federation, together: nothing depends on them."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.faulty_device import faulty_device, lines_of, read_until
from tests.integration.harness import SCHEME, assert_counted_once, running_server

DAY_S = 86400.0
CLOCK = Path(__file__).parent / "jumping_clock"


def test_the_clock_jumps(
    watch_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a day and by a year, back before the first stored time, amid rounds and over restarts.

    The device trains on an `ExampleStore` whose examples may be 3 days old.
    """
    clock = tmp_path / "clock"
    monkeypatch.setenv("PETALFL_TEST_CLOCK", str(clock))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(CLOCK), os.environ.get("PYTHONPATH"))))
    )

    def jump(days: float) -> None:
        part = clock.with_suffix(".part")
        part.write_text(str(days * DAY_S))
        part.replace(clock)

    def go_on(round_num: int) -> None:
        (tmp_path / f"jumped {round_num}").touch()

    store, num_rounds, said = tmp_path / "store", 7, []
    setup = {
        "examples": str(tmp_path / "examples"), "max_age_s": 3 * DAY_S,
        "hold_at": "training", "until": str(tmp_path / "jumped "),
    }  # fmt: skip
    arguments = (*SCHEME, "--min-devices", "1", "--epochs", "1", "--rounds", str(num_rounds))
    with running_server(watch_artifacts, tmp_path / "server", *arguments) as server:
        with faulty_device(server.url, server.token, store, **setup) as process:
            for number, days in ((1, 1.0), (2, -1.0), (3, 365.0)):
                read_until(process, f"round {number}")
                read_until(process, "wait")
                jump(days)
                go_on(number)
            read_until(process, "round 4")
            read_until(process, "wait")
        jump(-30.0)  # the device is off; it comes back in the past
        with faulty_device(server.url, server.token, store, **setup) as process:
            read_until(process, "wait")
            server.stop(signal.SIGKILL)
            jump(-31.0)
            server.start()
            for number in (4, 5, 7):
                go_on(number)
            for line in lines_of(process):
                said.append(line)
                if line == "round 6":
                    jump(0.0)
                    go_on(6)
            assert process.wait() == 0
        assert_counted_once(server, num_rounds=num_rounds, num_devices=1)
        with closing(sqlite3.connect(server.data_dir / "state.sqlite")) as db:
            times_s = [s for (s,) in db.execute("SELECT closed_at_s FROM rounds ORDER BY 1")]
        assert times_s[-1] - times_s[0] > 300 * DAY_S  # the server's clock did jump
    trained_on = [line for line in said if line.startswith("examples ")]
    assert trained_on == ["examples 24"] * 4  # of round 4 on
