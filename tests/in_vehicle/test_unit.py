from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.in_vehicle.drive import Drive, simulate
from examples.in_vehicle.unit import CONFIRMED_AFTER_S, HELD_OUT, Unit


@pytest.fixture(scope="module")
def drive() -> Drive:
    return simulate(3, minutes=3, modalities=("acc", "gyro")).without("gyro", 0.1, 0.2)


@pytest.fixture
def unit(drive: Drive, tmp_path: Path) -> Iterator[Unit]:
    unit = Unit(
        "unit-1", "http://127.0.0.1:9", "", tmp_path, drive,
        num_trips=2, rounds_per_stop=1, pace=1e9,
    )  # fmt: skip
    yield unit
    unit.close()


def test_a_trip_keeps_every_window_and_labels_what_was_confirmed_in_time(unit: Unit) -> None:
    assert unit.drive(1, unit.trips[0]) is None  # no model yet
    windows = list(unit.trips[0].windows())
    assert len(unit.examples) == len(windows)
    in_time = windows[:-CONFIRMED_AFTER_S]  # one a second
    assert unit.examples.num_labeled == sum(window.event is not None for window in in_time)
    _, labels, ids = unit.examples.snapshot(["acc"])
    assert [windows[i].event for i in ids] == list(labels)
    both = unit.examples.snapshot(["acc", "gyro"])
    assert 0 < len(both.ids) < len(ids)  # the gyroscope was away


def test_training_rests_while_it_drives(unit: Unit) -> None:
    may_train = unit.client._pacing._should_train
    unit.start_driving()
    assert unit.client.is_paused and not may_train()
    unit.park()
    assert not unit.client.is_paused and may_train()


def test_the_end_of_the_drive_is_held_out(unit: Unit, drive: Drive) -> None:
    trained = sum(len(trip.events) for trip in unit.trips)
    assert trained == pytest.approx((1 - HELD_OUT) * len(drive.events), abs=2)
    inputs, labels = unit.held_out
    assert inputs.keys() == {"acc", "gyro"}
    assert len(labels) <= HELD_OUT * 180


def test_a_unit_goes_on_with_the_examples_it_had(unit: Unit, drive: Drive, tmp_path: Path) -> None:
    unit.drive(1, unit.trips[0])
    unit.close()
    again = Unit(
        "unit-1", "http://127.0.0.1:9", "", tmp_path, drive,
        num_trips=2, rounds_per_stop=1, pace=1e9,
    )  # fmt: skip
    assert len(again.examples) == len(unit.examples) > 0
    again.close()
