"""The day's bytes; a client that keeps to them is in test_budgets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.metering import DAY_S, HOUR_S, ByteMeter, MeteredTransport
from petalfl.transport import MemoryBroker

START_S = 1_000 * DAY_S


class Clock:
    def __init__(self, now_s: float = START_S) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_bytes_count_for_a_day_and_their_hour(tmp_path: Path, clock: Clock) -> None:
    meter = ByteMeter(1000, tmp_path / "t", clock)
    assert meter.rest_s(1000) == 0
    meter.count(600)
    clock.now_s += 10 * HOUR_S
    meter.count(300)
    assert meter.used == 900
    assert meter.rest_s(100) == 0
    assert meter.rest_s(101) == 15 * HOUR_S  # the first hour ends 25 h after its start
    assert meter.rest_s(701) == 25 * HOUR_S
    clock.now_s += 15 * HOUR_S - 1
    assert meter.used == 900
    clock.now_s += 1
    assert meter.used == 300 and meter.rest_s(700) == 0


def test_more_than_a_day_has_never_has_room(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(ValueError, match="1001 bytes, 1000 are all of a day"):
        ByteMeter(1000, tmp_path / "t", clock).rest_s(1001)


def test_it_outlives_a_restart(tmp_path: Path, clock: Clock) -> None:
    meter = ByteMeter(1000, tmp_path / "t", clock)
    meter.count(600)
    meter.save()
    clock.now_s += HOUR_S
    assert ByteMeter(1000, tmp_path / "t", clock).used == 600
    clock.now_s += DAY_S - 1
    assert ByteMeter(1000, tmp_path / "t", clock).used == 600
    clock.now_s += 9 * DAY_S  # it was off: that is a day at least
    assert ByteMeter(1000, tmp_path / "t", clock).used == 0


def test_what_was_reserved_counts_after_a_crash_alone(tmp_path: Path, clock: Clock) -> None:
    meter = ByteMeter(1000, tmp_path / "t", clock)
    meter.count(100)
    meter.save(num_reserved=500)
    assert meter.used == 100
    assert ByteMeter(1000, tmp_path / "t", clock).used == 600
    meter.count(50)
    meter.save()
    assert ByteMeter(1000, tmp_path / "t", clock).used == 150


def test_a_device_that_starts_without_knowing_the_time(tmp_path: Path, clock: Clock) -> None:
    """Its clock is in 1970 until the network tells: what went before that counts on."""
    meter = ByteMeter(1000, tmp_path / "t", clock)
    for _ in range(5):
        meter.count(100)
        meter.save()
        clock.now_s -= START_S
        again = ByteMeter(1000, tmp_path / "t", clock)
        again.count(1)
        again.save()
        clock.now_s += START_S
        meter = ByteMeter(1000, tmp_path / "t", clock)
    assert meter.used == 500  # the single bytes lie too far back now
    for _ in range(3):
        clock.now_s += DAY_S
        _ = meter.used
    assert meter.used == 0


def test_a_clock_that_is_put_back_holds_nothing_for_ever(tmp_path: Path, clock: Clock) -> None:
    meter = ByteMeter(1000, tmp_path / "t", clock)
    meter.count(1000)
    clock.now_s -= 300 * DAY_S
    assert 24 * HOUR_S < meter.rest_s(1) <= 50 * HOUR_S
    for _ in range(50):
        clock.now_s += HOUR_S
        rest_s = meter.rest_s(1)
    assert rest_s == 0


@given(st.lists(st.tuples(st.integers(0, 400), st.floats(0, 2 * DAY_S)), max_size=30))
def test_nobody_who_rests_uses_more(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, float]]
) -> None:
    clock, path = Clock(), tmp_path_factory.mktemp("meter") / "t"
    meter, sent = ByteMeter(1000, path, clock), list[tuple[float, int]]()
    for num_bytes, later_s in drawn:
        while rest_s := meter.rest_s(num_bytes):
            clock.now_s += min(rest_s, HOUR_S)
        meter.count(num_bytes)
        sent.append((clock.now_s, num_bytes))
        clock.now_s += later_s
    for end_s, _ in sent:
        assert sum(n for at_s, n in sent if end_s - DAY_S < at_s <= end_s) <= 1000


@pytest.mark.parametrize("data", [b"", b"{}", b'{"hours": {"x": 1}, "time_s": 0, "wall_s": 0}'])
def test_a_damaged_file(
    tmp_path: Path, clock: Clock, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t").write_bytes(data)
    assert ByteMeter(1000, tmp_path / "t", clock).used == 0
    assert "is damaged, the day's bytes are counted anew" in caplog.text


def test_a_disk_that_is_full(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    meter = ByteMeter(1000, tmp_path / "nowhere" / "t", clock)
    meter.count(7)
    meter.save()
    assert meter.used == 7 and "cannot keep the day's bytes" in caplog.text


async def test_messages_both_ways() -> None:
    broker, counted, heard = MemoryBroker(), list[int](), list[bytes]()
    transport = MeteredTransport(broker.connect(), counted.append)
    await transport.subscribe("a/+", lambda topic, payload: heard.append(payload))
    await transport.publish("b", b"12345")
    await broker.connect().publish("a/b", b"1234567")
    while not heard:
        await asyncio.sleep(0)
    assert heard == [b"1234567"]
    assert counted == [1 + 5 + 16, 3 + 7 + 16]
    await transport.close()
