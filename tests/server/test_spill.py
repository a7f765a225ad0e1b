"""Updates that wait in files: the same ones, and none of them in memory."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl.payloads import EncodedDelta, plain_delta
from petalfl.wire import BlockUpdate, Ready
from server import spill
from server.aggregators import AGGREGATORS, parse_aggregator
from server.buffers import Buffer, Keep, in_memory
from server.reducer.rules import tiles
from server.spill import Spill
from server.state import ServerState
from tests.server.aggregators.builders import vector_block
from tests.server.builders import (
    LAYOUT,
    SIZES,
    Layout,
    Run,
    Site,
    make_id,
    make_report,
    make_update,
    settle,
)
from tests.server.reducer.rules.builders import CODECS, encoded, mixed
from tests.server.test_buffers import TEXTS

every_rule = pytest.mark.parametrize("name", AGGREGATORS)


def arrays_of(delta: EncodedDelta) -> list[NDArray[Any]]:
    found = []
    for part in (delta.parameters, delta.statistics):
        found += [part.values, part.scales, part.bitmap, part.starts]
    return [one for one in found if one is not None]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_statistics", [0, 3])
def test_it_is_the_same_delta(tmp_path: Path, codec: str, num_statistics: int) -> None:
    values = np.random.default_rng(0).normal(size=5003)
    delta = replace(encoded(values, codec, num_statistics), factor=0.5)
    kept = Spill(tmp_path).keep(delta)
    assert (kept.codec, kept.size, kept.num_bytes) == (codec, 5003, delta.num_bytes)
    assert kept.norm == delta.norm and kept.factor == 0.5
    np.testing.assert_array_equal(kept.decode(), delta.decode())
    for found, expected in zip(arrays_of(kept), arrays_of(delta), strict=True):
        assert found.dtype == expected.dtype and found.flags.aligned
        assert not (found.size and np.shares_memory(found, expected))
        np.testing.assert_array_equal(found, expected)
    piece = np.empty(2955, np.float32)
    kept.read(2048, 5003, piece)
    np.testing.assert_array_equal(piece, delta.decode()[2048:])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("num_statistics", [0, 3])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_what_the_journal_has_is_read_from_there(
    tmp_path: Path, codec: str, num_statistics: int, factor: float
) -> None:
    """Unless it is compressed; of 5,003 values, statistics lie at no multiple of four."""
    delta = encoded(np.random.default_rng(0).normal(size=5003), codec, num_statistics)
    delta, journaled = replace(delta, factor=factor), bytearray(delta.payload)
    in_file = mmap.mmap(-1, len(journaled))
    in_file[:] = bytes(journaled)
    spilled = Spill(tmp_path, {b"id": memoryview(in_file)}.get)
    kept = spilled.keep(delta, b"id")
    assert (spilled._map is None) == (not codec.startswith("topk"))
    assert (len(kept.payload) > 0) == (not codec.startswith("topk"))
    np.testing.assert_array_equal(kept.decode(), delta.decode())
    assert kept.norm == delta.norm and spilled.keep(kept, b"id") is kept
    theirs, ours = np.frombuffer(delta.payload, np.uint8), arrays_of(kept)
    assert not any(one.size and np.may_share_memory(one, theirs) for one in ours)
    assert not any(one.base is not None and not one.size for one in ours), "it would hold that"


def test_what_is_kept_is_not_written_again(tmp_path: Path) -> None:
    spilled = Spill(tmp_path)
    once = spilled.keep(plain_delta(np.ones(9, np.float32)))
    assert spilled.keep(once) is once
    assert not once.payload, "as it came, it would still be in memory"


def test_many_files_and_vectors_longer_than_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "FILE_BYTES", 1000)
    spilled, deltas = Spill(tmp_path), [*mixed(12, 200), *mixed(12, 3000)]
    for delta, kept in [(delta, spilled.keep(delta)) for delta in deltas]:
        np.testing.assert_array_equal(kept.decode(), delta.decode())


def test_a_file_goes_when_nothing_in_it_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "FILE_BYTES", 4096)
    spilled, deltas, maps = Spill(tmp_path), [], []
    for _ in range(3):
        deltas.append(spilled.keep(plain_delta(np.ones(1000, np.float32))))
        maps.append(weakref.ref(spilled._map))
    assert list(tmp_path.iterdir()) == [], "it has no name, which a crash could leave behind"
    del deltas[1]
    gc.collect()
    assert [one() is None for one in maps] == [False, True, False]
    del deltas, spilled
    gc.collect()
    assert all(one() is None for one in maps)


def test_on_a_full_disk_a_delta_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spilled, delta = Spill(tmp_path), plain_delta(np.arange(8, dtype=np.float32))

    def full(*where: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert spilled.keep(delta) is delta
    assert f"an update stays in memory, {tmp_path} does not take it" in caplog.text
    np.testing.assert_array_equal(spilled.keep(delta).decode(), delta.decode())
    assert Spill(tmp_path / "gone").keep(delta) is delta


@pytest.mark.parametrize("has_room", [True, False])
async def test_versions_have_room_beside_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    has_room: bool,
) -> None:  # fmt: skip
    """Of every block the next, with two moments; else an update stays in memory, and counts."""
    monkeypatch.setattr(ServerState, "mapped_payload", lambda state, update_id: None)
    num_bytes = 3 * 4 * sum(SIZES.values()) + 4 * SIZES["head"] - (not has_room)
    disk = SimpleNamespace(f_bavail=num_bytes, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda folder: disk)
    with Site(tmp_path).run(aggregator="median", min_devices=1, ready=["watch"]) as run:
        assert run.federation.on_update(make_update("watch", "head", 1.0)).status == "accepted"
        assert ("No space left on device beside" in caplog.text) == (not has_room)
        run.federation.on_report("watch", make_report("watch"))
        await settle()
        assert run.federation.shared.versions["head"] == 2


# Buffers


def bits(name: str, keep: Keep, *, is_ordered: bool) -> bytes:
    """Of updates of all codecs; two devices have sent twice."""
    buffer = Buffer(vector_block(2500), parse_aggregator(TEXTS.get(name, name)), keep=keep,
                    is_ordered=is_ordered)  # fmt: skip
    for k, delta in enumerate(mixed(14, 2500)):
        device = f"device-{k % 12:02}"
        buffer.add(BlockUpdate(make_id(k), device, "head", 1 + k // 12, 1, 1, delta, ""), 1.0 + k)
    result = buffer.result()
    assert result.delta is not None
    return result.delta.tobytes()


@every_rule
@pytest.mark.parametrize("is_ordered", [False, True])
def test_every_rule_finds_the_same_bits(tmp_path: Path, name: str, is_ordered: bool) -> None:
    in_files = bits(name, Spill(tmp_path).keep, is_ordered=is_ordered)
    assert in_files == bits(name, in_memory, is_ordered=is_ordered)


# Rounds

SIZE, NUM_DEVICES = 100_000, 100
WIDE: Layout = {**LAYOUT, "head": ("head", ("fusion",), {"fc.weight": (250, SIZE // 250)})}
DEVICES = {f"watch-{k}": ["acc"] for k in range(NUM_DEVICES)}


def delta_of(number: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).standard_normal(SIZE, np.float32)


def arrive(run: Run, number: int) -> None:
    device = f"watch-{number}"
    update = BlockUpdate(
        make_id(device), device, "head", 1, 1, 1, plain_delta(delta_of(number)), ""
    )
    assert run.federation.on_update(update).status == "accepted"


@pytest.mark.parametrize("how", [{"aggregator": "median"}, {"is_deterministic": True}])
async def test_a_round_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """40 MB of updates, a restart among them, in a fifth of that; and the next version is right."""
    monkeypatch.setattr(tiles, "BUDGET_BYTES", 1 << 20)
    monkeypatch.setattr(Spill, "_write", None)  # all of it is in the journal
    site = Site(tmp_path, enrolled=DEVICES, layout=WIDE)
    how = {**how, "min_devices": NUM_DEVICES, "num_rounds": 1}
    tracemalloc.start()
    try:
        with site.run(**how) as run:
            for device in DEVICES:
                run.federation.on_ready(device, Ready(("acc",), ("head",)))
            for number in range(NUM_DEVICES // 2):
                arrive(run, number)
        with site.run(**how) as run:
            for number in range(NUM_DEVICES // 2, NUM_DEVICES):
                arrive(run, number)
            for device in DEVICES:
                run.federation.on_report(device, make_report(device))
            await settle()
            state, head = run.state, run.federation.shared.blocks["head"]
            assert run.federation.shared.versions["head"] == 2
            found = state.read_version(head, 2)[0] - state.read_version(head, 1)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    middle = np.median if "aggregator" in how else np.mean
    some = np.stack([delta_of(k)[::1000] for k in range(NUM_DEVICES)])
    np.testing.assert_allclose(found[::1000], middle(some, axis=0), rtol=0, atol=1e-6)
    assert peak < NUM_DEVICES * 4 * SIZE / 5, f"{peak:,} bytes"
