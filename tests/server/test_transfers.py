from __future__ import annotations

import pytest

from petalfl import wire
from petalfl.wire import CHUNK_BYTES
from server.transfers import IDLE_S, MIN_BYTES_PER_S, Transfers
from tests.server.builders import make_id

ROOM = 64 * CHUNK_BYTES
LONG = ROOM // 4


def announced(transfers: Transfers, device: str, name: str, num_bytes: int = LONG) -> bytes:
    update_id = make_id(device, name)
    manifest = wire.UpdateManifest(update_id, "big", 1, 1, 1, "f32", num_bytes, "0" * 64)
    transfers.announce(device, manifest)
    return update_id


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def transfers(clock: list[float]) -> Transfers:
    return Transfers(ROOM, lambda: clock[0])


def feed(transfers: Transfers, device: str, update_id: bytes, index: int, now_s: float) -> None:
    transfer = transfers.get(device, update_id)
    assert transfer is not None
    transfer.add(wire.Chunk(update_id, index, bytes(CHUNK_BYTES)), now_s)


def test_one_device_may_have_all_the_room_while_nobody_waits(transfers: Transfers) -> None:
    ids = [announced(transfers, "hog", str(i)) for i in range(4)]
    assert all(transfers.get("hog", one) for one in ids)


def test_who_has_several_under_way_makes_way_for_others(
    transfers: Transfers, clock: list[float]
) -> None:
    ids = [announced(transfers, "hog", str(i)) for i in range(4)]
    clock[0] = 1.0
    feed(transfers, "hog", ids[0], 0, clock[0])
    honest = announced(transfers, "honest", "one", 400_000)
    assert transfers.get("honest", honest) is not None
    assert transfers.get("hog", ids[1]) is None, "the one that is longest without a chunk"
    assert all(transfers.get("hog", ids[i]) for i in (0, 2, 3)), "no more than there must"


def test_one_long_transfer_of_each_device_is_let_be(transfers: Transfers) -> None:
    under_way = {name: announced(transfers, name, "one") for name in ("a", "b", "c", "d")}
    announced(transfers, "e", "one")
    assert all(transfers.get(name, one) for name, one in under_way.items())


def test_in_line_a_device_with_its_share_lets_others_pass(transfers: Transfers) -> None:
    under_way = {name: announced(transfers, name, "one") for name in ("hog", "b", "c", "d")}
    more = announced(transfers, "hog", "more")
    other = announced(transfers, "e", "one")
    transfers.end("b", under_way["b"])
    assert [one.device for one in transfers.begin_waiting()] == ["e"]
    transfers.end("e", other)
    assert [one.manifest.update_id for one in transfers.begin_waiting()] == [more], "nobody waits"


@pytest.mark.parametrize("is_slow", [True, False])
def test_the_slow_make_way(transfers: Transfers, clock: list[float], is_slow: bool) -> None:
    """As fast as they were at first."""
    held = {name: announced(transfers, name, "one") for name in ("a", "b", "c", "d")}
    for index in range(10):
        for name, update_id in held.items():
            feed(transfers, name, update_id, index, clock[0])
    clock[0] = IDLE_S + 1
    for name, update_id in held.items():
        feed(transfers, name, update_id, 10, clock[0])
    waiting = announced(transfers, "honest", "one")
    assert transfers.is_waiting("honest", waiting) and transfers.begin_waiting() == []
    period_s = CHUNK_BYTES / MIN_BYTES_PER_S * (3 if is_slow else 0.9)
    start_s, index = clock[0], 11
    while clock[0] - start_s <= IDLE_S:
        clock[0] += period_s
        for name, update_id in held.items():
            feed(transfers, name, update_id, min(index, 15), clock[0])
            transfer = transfers.get(name, update_id)
            if index > 15 and transfer is not None:  # the example is short
                transfer.num_bytes_since += CHUNK_BYTES
                transfer.touched_s = clock[0]
        index += 1
    begun = transfers.begin_waiting()
    assert [one.device for one in begun] == (["honest"] if is_slow else [])
