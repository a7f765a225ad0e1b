from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples.in_vehicle.drive import (
    EVENTS,
    NOTHING,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
    Drive,
    read_csv,
    simulate,
    stack,
    write_csv,
)
from petalfl import DataError


@pytest.fixture(scope="module")
def drive() -> Drive:
    return simulate(0, minutes=2)


def text_of(drive: Drive) -> str:
    file = io.StringIO()
    write_csv(drive, file)
    return file.getvalue()


def test_a_drive_comes_back_from_its_file(drive: Drive, tmp_path: Path) -> None:
    away = drive.without("gyro", 0.25, 0.5)
    (tmp_path / "drive.csv").write_text(text_of(away))
    read = read_csv(tmp_path / "drive.csv")
    assert read.signals.keys() == {"acc", "gyro", "speed"}
    for name, signal in away.signals.items():
        np.testing.assert_allclose(read.signals[name], signal, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(read.events, away.events)


def test_the_vehicle_obeys_mechanics(drive: Drive) -> None:
    acc, speed = drive.signals["acc"], drive.signals["speed"][0]
    assert np.median(np.linalg.norm(acc, axis=0)) == pytest.approx(9.81, rel=0.05)
    assert speed.min() > 0 and speed.max() < 40
    braking = drive.events == EVENTS.index("hard-braking")
    steady = drive.events == EVENTS.index("steady")
    change = np.gradient(speed, 1 / SAMPLE_RATE_HZ)
    assert change[braking].mean() < -4 < change[steady].mean()
    assert set(np.unique(drive.events)) == {NOTHING, *range(len(EVENTS))}


def test_windows_hold_the_sensors_that_were_there(drive: Drive) -> None:
    windows = list(drive.without("gyro", 0.5, 1).windows())
    assert len(windows) == 119
    assert windows[0].inputs.keys() == {"acc", "gyro", "speed"}
    assert windows[-1].inputs.keys() == {"acc", "speed"}
    assert windows[0].inputs["acc"].shape == (3, WINDOW_SAMPLES)


def test_a_window_is_confirmed_by_more_than_half_of_it() -> None:
    signals = {"speed": np.zeros((1, WINDOW_SAMPLES), np.float32)}
    events = np.full(WINDOW_SAMPLES, NOTHING)
    events[:51] = 2
    assert [w.event for w in Drive(signals, events).windows()] == [2]
    events[50] = NOTHING
    assert [w.event for w in Drive(signals, events).windows()] == [None]
    with pytest.raises(DataError, match="no confirmed event"):
        stack(Drive(signals, events).windows())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("acc_z", "az"), "has columns .*; expected time_s, event"),
        (lambda text: text.replace("\n0.04,", "\n0.08,"), "steps of .*: resample it to 50 Hz"),
        (lambda text: text.replace(",\n", ",sliding\n", 1), "event 'sliding', expected one of"),
        (lambda text: text.replace("\n0.04,", "\nzero,"), "column time_s: .*expected numbers"),
        (lambda text: text[:500], "samples, expected 100 at least"),
    ],
)
def test_a_strange_file_is_refused(
    change: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    text = text_of(simulate(0, 0.1, ("acc",)))
    events = text.splitlines()
    text = "\n".join([events[0], *(line.rpartition(",")[0] + "," for line in events[1:])]) + "\n"
    (tmp_path / "drive.csv").write_text(text)
    read_csv(tmp_path / "drive.csv")
    (tmp_path / "drive.csv").write_text(change(text))
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "drive.csv")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing\.csv"):
        read_csv(tmp_path / "nothing.csv")
