from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from petalfl.model import Block
from petalfl.vectors import Vector, to_bytes
from petalfl.wire import BlockUpdate
from server.rounds import Assignment
from server.selection import Candidate
from server.state import Closing, NewVersion, OpenRound, ServerState, StateError
from tests.server.builders import (
    BLOCKS,
    INITIAL,
    LAYOUT,
    NOW_S,
    SIZES,
    make_block,
    make_id,
    make_report,
    make_update,
)

ROOT = Path(__file__).parents[2]
COHORT = {
    "watch": Assignment(1, frozenset({"encoder-acc", "head"})),
    "phone": Assignment(1, frozenset({"head"})),
}
HEAD = BLOCKS["head"]
UPDATES = [
    make_update("watch", "head", np.arange(8) / 7, num_examples=3),
    make_update("watch", "encoder-acc", 0.25, num_examples=3),
    make_update("phone", "head", -1e-3, num_examples=5),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def state(folder: Path) -> Iterator[ServerState]:
    opened = ServerState(folder)
    yield opened
    opened.close()


def open_round(state: ServerState, *updates: BlockUpdate) -> None:
    """Round 1 with what has arrived so far."""
    for block in BLOCKS.values():
        state.add_initial_version(block, INITIAL[block.name])
    state.open_round(1, COHORT, NOW_S)
    for update in updates:
        state.journal_update(update)


def close_round(state: ServerState, versions: list[NewVersion]) -> None:
    """Closes round 1; what went into no version is dropped."""
    moved = {new.block.name: new.version for new in versions}
    outcomes = {update.update_id: moved.get(update.block, 0) for update in UPDATES}
    written = [state.write_version(new) for new in versions]
    state.step(1, written, outcomes, Closing(NOW_S + 3, 0.5, num_late=4))


def next_versions() -> list[NewVersion]:
    """What round 1 leaves: two blocks have moved, with their momentum."""
    rng = np.random.default_rng(5)
    return [
        NewVersion(BLOCKS[name], 2, rng.normal(size=SIZES[name]).astype(np.float32),
                   {"velocity": rng.normal(size=SIZES[name]).astype(np.float32)})
        for name in ("encoder-acc", "head")
    ]  # fmt: skip


def block_files(folder: Path) -> dict[str, bytes]:
    root = folder / "blocks"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def path_of(state: ServerState, block: str, version: int) -> Path:
    return state.folder / "blocks" / block / f"{version}.safetensors"


def same(left: BlockUpdate, right: BlockUpdate) -> bool:
    fields = ("update_id", "device", "block", "round_num", "base_version", "num_examples")
    equal = all(getattr(left, name) == getattr(right, name) for name in fields)
    return equal and to_bytes(left.delta) == to_bytes(right.delta)


def assert_round_is_open(state: ServerState) -> None:
    """Round 1 stands as `open_round` with `UPDATES` left it."""
    assert state.unclosed_round() == OpenRound(1, NOW_S)
    assert state.newest_tasks(1) == COHORT
    assert state.last_closed_round() == 0
    found = list(state.unconsumed_updates(BLOCKS))
    assert len(found) == len(UPDATES) and all(map(same, found, UPDATES))
    assert state.newest_versions() == dict.fromkeys(BLOCKS, 1)


# The journal


def test_a_copy_of_the_open_files_holds_the_journal(state: ServerState, tmp_path: Path) -> None:
    """What is on the disk while the server runs is what a crash leaves."""
    open_round(state, *UPDATES)
    state.journal_report("watch", make_report("watch", num_examples=3, loss=0.25), 1, NOW_S)
    asyncio.run(state.commit())
    shutil.copytree(state.folder, tmp_path / "copy")
    copy = ServerState(tmp_path / "copy")
    assert_round_is_open(copy)
    expected = make_report("watch", num_examples=3, loss=0.25)
    assert copy.journaled_reports(0) == {"watch": expected}
    copy.close()


JOURNALER = """
import asyncio, sys, time
from pathlib import Path
from server.state import ServerState
from tests.server.test_state import UPDATES, open_round
state = ServerState(Path(sys.argv[1]))
open_round(state, *UPDATES)
asyncio.run(state.commit())
print("durable", flush=True)
time.sleep(60)
"""


def test_a_killed_server_loses_nothing_that_it_journaled(folder: Path) -> None:
    command = [sys.executable, "-c", JOURNALER, str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'sdk'}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"durable\n"
        finally:
            os.kill(child.pid, signal.SIGKILL)
    state = ServerState(folder)  # the lock went with its process
    assert_round_is_open(state)
    state.close()


def test_updates_come_back_in_order_of_arrival_and_bit_for_bit(state: ServerState) -> None:
    odd = np.array([0.1, -0.0, 1e-42, 3.4e38, -1e-7, np.pi, 1, -1], np.float32)
    updates = [make_update("watch", "head", odd), *UPDATES[1:]]
    open_round(state, *reversed(updates))
    assert all(map(same, state.unconsumed_updates(BLOCKS), reversed(updates)))


def test_the_first_report_of_a_device_stands(state: ServerState) -> None:
    open_round(state)
    state.journal_report("watch", make_report("watch", loss=0.25), 1, NOW_S)
    state.journal_report("watch", make_report("watch", loss=9.0), 1, NOW_S)
    assert state.journaled_reports(0) == {"watch": make_report("watch", loss=0.25)}
    assert state.journaled_reports(2) == {}


def test_a_second_update_of_a_device_and_block_cannot_be_journaled(state: ServerState) -> None:
    open_round(state, *UPDATES)
    second = make_update("watch", "head", 5.0, update_id=make_id("second"))
    for _ in range(2):  # before the first is committed, and after
        with pytest.raises(StateError, match="has an update of that task"):
            state.journal_update(second)
        asyncio.run(state.commit())
    assert_round_is_open(state)


# Closing a round

FAULTS = {
    "after the files": "BEFORE UPDATE ON rounds",
    "at the first version": "BEFORE INSERT ON versions",
    "at the second version": "BEFORE INSERT ON versions WHEN NEW.block = 'head'",
    "at the journal": "BEFORE UPDATE ON updates",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_round_is_closed_entirely_or_not_at_all(folder: Path, tmp_path: Path, fault: str) -> None:
    undisturbed = ServerState(tmp_path / "undisturbed")
    open_round(undisturbed, *UPDATES)
    close_round(undisturbed, next_versions())
    undisturbed.close()

    failing = ServerState(folder)
    open_round(failing, *UPDATES)
    failing.close()
    with sqlite3.connect(folder / "state.sqlite") as other:
        trigger = f"CREATE TRIGGER fault {FAULTS[fault]} BEGIN SELECT RAISE(ABORT, 'fault'); END"
        other.execute(trigger)
    other.close()
    failing = ServerState(folder)
    with pytest.raises(sqlite3.Error, match="fault"):
        close_round(failing, next_versions())
    failing.close()
    with sqlite3.connect(folder / "state.sqlite") as other:
        other.execute("DROP TRIGGER fault")
    other.close()

    state = ServerState(folder)
    assert_round_is_open(state)
    np.testing.assert_array_equal(state.read_version(HEAD, 1)[0], INITIAL["head"])
    close_round(state, next_versions())
    assert block_files(folder) == block_files(tmp_path / "undisturbed")
    assert state.unclosed_round() is None
    state.close()


def test_a_fault_while_the_files_are_written_leaves_the_round_open(state: ServerState) -> None:
    open_round(state, *UPDATES)
    (path_of(state, "head", 2).with_suffix(".safetensors.tmp")).mkdir()  # the second of two
    with pytest.raises(StateError, match=r"cannot write .*head/2\.safetensors"):
        close_round(state, next_versions())
    assert_round_is_open(state)


def test_a_closed_round_has_its_versions_and_no_deltas(state: ServerState) -> None:
    open_round(state, *UPDATES)
    new = next_versions()
    close_round(state, new)
    assert state.unclosed_round() is None
    assert state.last_closed_round() == 1
    assert state.newest_versions() == {**dict.fromkeys(BLOCKS, 1), "encoder-acc": 2, "head": 2}
    for one in new:
        parameters, optimizer_state = state.read_version(one.block, 2)
        np.testing.assert_array_equal(parameters, one.parameters)
        assert optimizer_state.keys() == {"velocity"}
        np.testing.assert_array_equal(optimizer_state["velocity"], one.optimizer_state["velocity"])
    with sqlite3.connect(state.folder / "state.sqlite") as other:
        deltas = other.execute("SELECT delta FROM updates").fetchall()
    other.close()
    assert deltas == [(None,)] * 3


def test_the_rounds_read_back(state: ServerState) -> None:
    open_round(state, *UPDATES)
    state.journal_report("watch", make_report("watch"), 1, NOW_S + 2)
    state.add_traffic({(1, "watch", "head"): (10, 20), (1, "phone", "head"): (1, 2)})
    close_round(state, next_versions())
    state.open_round(2, {}, NOW_S + 4)  # not closed: not listed
    quiet = {
        "num_asked": 0,
        "holders": [],
        "num_examples": 0,
        "num_dropped": 0,
        "outliers": [],
        "bytes_up": 0,
        "bytes_down": 0,
    }
    assert state.history.rounds() == [
        {
            "round_num": 1,
            "cohort_size": 2,
            "num_reports": 1,
            "num_late": 4,
            "duration_s": 3.0,
            "loss": 0.5,
            "blocks": {
                "encoder-acc": {
                    **quiet,
                    "version": 2,
                    "num_asked": 1,
                    "holders": ["watch"],
                    "num_examples": 3,
                },
                "encoder-gyro": {**quiet, "version": 1},
                "fusion": {**quiet, "version": 1},
                "head": {
                    **quiet,
                    "version": 2,
                    "num_asked": 2,
                    "holders": ["phone", "watch"],
                    "num_examples": 8,
                    "bytes_up": 11,
                    "bytes_down": 22,
                },
            },
        }
    ]
    assert state.history.totals() == {
        "updates_accepted": 3,
        "updates_dropped": 0,
        "bytes_up": 11,
        "bytes_down": 22,
    }


def test_many_rounds_read_back_in_as_many_queries_as_few(state: ServerState) -> None:
    statements: list[str] = []
    state._db.set_trace_callback(statements.append)
    numbers = []
    for block in BLOCKS.values():
        state.add_initial_version(block, INITIAL[block.name])
    for round_num in range(1, 12):
        state.open_round(round_num, {"watch": Assignment(round_num, frozenset({"head"}))}, NOW_S)
        step = [NewVersion(HEAD, round_num + 1, INITIAL["head"], {})] if round_num != 6 else []
        state.step(round_num, [*map(state.write_version, step)], {}, Closing(NOW_S + 1, None, 0))
        if round_num == 6:  # the next is version 8: whatever comes is taken as it is
            assert state.history.rounds()[-1]["blocks"]["head"]["version"] == 6
        statements.clear()
        rounds = state.history.rounds()
        numbers.append(len(statements))
    assert len(set(numbers)) == 1
    versions = [of["blocks"]["head"]["version"] for of in rounds]
    assert versions == [2, 3, 4, 5, 6, 6, 8, 9, 10, 11, 12]
    assert {of["blocks"]["fusion"]["version"] for of in rounds} == {1}
    assert [of["blocks"]["head"]["num_asked"] for of in rounds] == [1] * 11
    assert state.history.rounds(since=4) == rounds[4:] and state.history.rounds(since=11) == []


def test_what_is_dropped_and_what_stands_out_is_said(state: ServerState) -> None:
    """A block without a new version in the step has dropped its updates."""
    for block in BLOCKS.values():
        state.add_initial_version(block, INITIAL[block.name])
    lengths = {"a": 1.0, "b": 1.5, "c": 40.0}
    held = frozenset({"head", "fusion"})
    state.open_round(1, {name: Assignment(1, held) for name in lengths}, NOW_S)
    updates = [make_update(d, "head", x) for d, x in lengths.items()]
    updates.append(make_update("a", "fusion", 1.0))
    for update in updates:
        state.journal_update(update)
    outcomes = {update.update_id: 2 * (update.block == "head") for update in updates}
    moved = state.write_version(NewVersion(HEAD, 2, INITIAL["head"] + 1, {}))
    state.step(1, [moved], outcomes, Closing(NOW_S + 1, None, num_late=0))
    [closed] = state.history.rounds()
    head, fusion = closed["blocks"]["head"], closed["blocks"]["fusion"]
    assert (head["holders"], head["num_asked"], head["num_dropped"]) == (["a", "b", "c"], 3, 0)
    [outlier] = head["outliers"]
    assert outlier["device"] == "c"
    assert outlier["norm"] / outlier["median_norm"] == pytest.approx(40 / 1.5)
    assert (fusion["version"], fusion["holders"], fusion["num_dropped"]) == (1, [], 1)
    assert state.history.totals()["updates_dropped"] == 1
    assert list(state.unconsumed_updates(BLOCKS)) == []


def test_a_step_may_leave_the_round_open_or_open_the_next(state: ServerState) -> None:
    open_round(state, *UPDATES)
    head = [state.write_version(new) for new in next_versions() if new.block is HEAD]
    state.step(1, head, {UPDATES[0].update_id: 2, UPDATES[2].update_id: 2}, None)
    assert state.unclosed_round() == OpenRound(1, NOW_S)
    [left] = state.unconsumed_updates(BLOCKS)
    assert same(left, UPDATES[1])
    assert ("watch", "head", UPDATES[0].update_id) in state.sent_updates(0), "also the consumed"
    state.step(1, [], {}, Closing(NOW_S + 1, None, num_late=0, has_next=True))
    assert state.unclosed_round() == OpenRound(2, NOW_S + 1)
    assert len(list(state.unconsumed_updates(BLOCKS))) == 1


def test_the_newest_task_of_each_device(state: ServerState) -> None:
    open_round(state, *UPDATES)
    state.journal_report("watch", make_report("watch"), 1, NOW_S)
    again = {"watch": Assignment(2, frozenset({"head"}))}
    state.add_tasks(1, again, NOW_S)
    assert state.newest_tasks(0) == {**COHORT, **again}
    assert state.newest_tasks(2) == {}
    assert state.sent_updates(0) == [("phone", "head", UPDATES[2].update_id)]
    assert state.journaled_reports(0) == {}


def test_a_device_s_record_reads_back(state: ServerState) -> None:
    open_round(state)
    state.journal_report("watch", make_report("watch", num_examples=3, loss=0.5), 1, NOW_S + 7)
    state.add_tasks(4, {"watch": Assignment(4, frozenset())}, NOW_S + 9)
    assert state.candidates() == {
        "phone": Candidate(frozenset(), num_selected=1, last_round=1),
        "watch": Candidate(
            frozenset(), num_selected=2, num_reported=1, last_round=4, loss=0.5, num_examples=3,
            duration_s=7.0,
        ),
    }  # fmt: skip


@pytest.mark.parametrize(("version", "lacking"), [(2, ("codec", "sha256")), (3, ("sha256",))])
def test_a_folder_of_a_format_before_goes_on(
    folder: Path, version: int, lacking: tuple[str, ...]
) -> None:
    """Its journal has deltas as float32, and says so nowhere, or no digests."""
    state = ServerState(folder)
    state.open_round(1, COHORT, NOW_S)
    state.journal_update(UPDATES[0])
    state.close()
    with sqlite3.connect(folder / "state.sqlite") as other:
        for column in lacking:
            other.execute(f"ALTER TABLE updates DROP COLUMN {column}")
        other.execute(f"PRAGMA user_version={version}")
    other.close()
    for _ in range(2):
        state = ServerState(folder)
        [found] = state.unconsumed_updates(BLOCKS)
        assert same(found, UPDATES[0]) and not found.sha256
        entry = state.find_update(UPDATES[0].update_id)
        assert entry is not None and entry.is_of(UPDATES[0].device, UPDATES[0])
        state.close()


def test_a_folder_of_another_format_is_refused(folder: Path) -> None:
    ServerState(folder).close()
    with sqlite3.connect(folder / "state.sqlite") as other:
        other.execute("PRAGMA user_version=1")
    other.close()
    for _ in range(2):  # and its lock is free again
        with pytest.raises(StateError, match="has format 1, this server reads 4"):
            ServerState(folder)


# Block versions


@pytest.mark.parametrize("name", LAYOUT)
def test_a_version_is_a_safetensors_file_with_the_parameters(state: ServerState, name: str) -> None:
    block = BLOCKS[name]
    state.add_initial_version(block, INITIAL[name])
    tensors = load_file(path_of(state, name, 1))
    assert {key: tensor.shape for key, tensor in tensors.items()} == LAYOUT[name][2]
    flat = np.concatenate([tensors[key].ravel() for key in LAYOUT[name][2]])
    np.testing.assert_array_equal(flat, INITIAL[name])


def scalar_block() -> Block:
    return make_block("scale", "head", ("acc",), {"gain": (), "bias": (2,)})[0]


def test_a_block_with_a_scalar_reads_back(state: ServerState) -> None:
    vector = np.array([1, 2, 3], np.float32)
    state.add_initial_version(scalar_block(), vector)
    np.testing.assert_array_equal(state.read_version(scalar_block(), 1)[0], vector)


def test_a_scalar_is_stored_as_a_scalar(state: ServerState) -> None:
    state.add_initial_version(scalar_block(), np.array([1, 2, 3], np.float32))
    assert load_file(path_of(state, "scale", 1))["gain"].shape == ()


def test_the_optimizer_state_lies_beside_the_parameters(state: ServerState) -> None:
    open_round(state)
    close_round(state, next_versions())
    tensors = load_file(path_of(state, "head", 2))
    assert tensors.keys() == {*LAYOUT["head"][2], "optimizer.velocity"}


def test_the_initial_version_is_added_once(state: ServerState) -> None:
    state.add_initial_version(HEAD, INITIAL["head"])
    state.add_initial_version(HEAD, INITIAL["head"] + 1)
    parameters, optimizer_state = state.read_version(HEAD, 1)
    np.testing.assert_array_equal(parameters, INITIAL["head"])
    assert optimizer_state == {}


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def offset_of(path: Path, vector: Vector) -> int:
    return path.read_bytes().index(to_bytes(vector)[:8])


DAMAGES: dict[str, Callable[[bytes, int], bytes]] = {
    "a flipped bit": lambda data, at: flip(data, at),
    "cut off": lambda data, at: data[:-4],
    "empty": lambda data, at: b"",
    "no safetensors": lambda data, at: b"\xff" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_detected(state: ServerState, damage: str) -> None:
    state.add_initial_version(HEAD, INITIAL["head"])
    path = path_of(state, "head", 1)
    path.write_bytes(DAMAGES[damage](path.read_bytes(), offset_of(path, INITIAL["head"])))
    with pytest.raises(StateError, match=r"head/1\.safetensors"):
        state.read_version(HEAD, 1)


def test_a_missing_or_foreign_version_is_detected(state: ServerState) -> None:
    open_round(state)
    close_round(state, next_versions())
    shutil.copy(path_of(state, "head", 2), path_of(state, "head", 1))
    with pytest.raises(StateError, match="damaged"):
        state.read_version(HEAD, 1)
    shutil.copy(path_of(state, "head", 2), path_of(state, "head", 3))  # of no record
    with pytest.raises(StateError, match="damaged"):
        state.read_version(HEAD, 3)
    path_of(state, "head", 2).unlink()
    with pytest.raises(StateError, match="cannot read"):
        state.read_version(HEAD, 2)


def test_a_damaged_optimizer_state_is_detected(state: ServerState) -> None:
    open_round(state)
    new = next_versions()
    close_round(state, new)
    path = path_of(state, "head", 2)
    path.write_bytes(flip(path.read_bytes(), offset_of(path, new[1].optimizer_state["velocity"])))
    with pytest.raises(StateError):
        state.read_version(HEAD, 2)


# Devices


def test_passwords_are_checked_and_not_kept(state: ServerState) -> None:
    password = "correct-horse-battery-staple"
    assert state.add_device("watch", password, ["acc"], NOW_S)
    assert state.is_password("watch", password)
    for wrong in ("", password[:-1], password + " ", password.upper()):
        assert not state.is_password("watch", wrong)
    assert not state.is_password("phone", password)
    files = [path for path in state.folder.rglob("*") if path.is_file()]
    assert any(b"watch" in path.read_bytes() for path in files)
    assert not any(password.encode() in path.read_bytes() for path in files)


def test_equal_passwords_have_different_digests(state: ServerState) -> None:
    for name in ("watch", "phone"):
        state.add_device(name, "the same", ["acc"], NOW_S)
    with sqlite3.connect(state.folder / "state.sqlite") as other:
        digests = other.execute("SELECT password_sha256 FROM devices").fetchall()
    other.close()
    assert len(set(digests)) == 2


def test_a_taken_name_changes_nothing(state: ServerState) -> None:
    assert state.add_device("watch", "first", ["acc"], NOW_S)
    assert not state.add_device("watch", "second", ["gyro"], NOW_S)
    assert state.devices() == {"watch": ["acc"]}
    assert state.is_password("watch", "first") and not state.is_password("watch", "second")
    state.remove_device("watch")
    assert state.devices() == {}
    assert not state.is_password("watch", "first")


def test_only_the_owner_reads_the_state(state: ServerState) -> None:
    assert (state.folder / "state.sqlite").stat().st_mode & 0o777 == 0o600


# The folder


def test_a_folder_in_use_is_refused_until_it_is_closed(folder: Path) -> None:
    first = ServerState(folder)
    with pytest.raises(StateError, match=f"another server is running on the data folder {folder}"):
        ServerState(folder)
    first.close()
    ServerState(folder).close()


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot open the data folder"):
        ServerState(tmp_path / "file")


def test_a_damaged_database_is_a_state_error(folder: Path) -> None:
    folder.mkdir()
    (folder / "state.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StateError):
        ServerState(folder)


def test_a_setting_is_stored_once_and_replaced_on_demand(folder: Path) -> None:
    state = ServerState(folder)
    assert state.setting("token", "first") == "first"
    assert state.setting("token", "second") == "first"
    state.close()
    state = ServerState(folder)
    assert state.setting("token", "third") == "first"
    state.replace_setting("token", "fourth")
    state.replace_setting("port", "1")
    assert (state.setting("token", ""), state.setting("port", "")) == ("fourth", "1")
    state.close()


# Traffic


def test_traffic_adds_up(state: ServerState) -> None:
    state.add_device("quiet", "password", ["acc"], NOW_S)
    state.add_traffic({(1, "watch", "head"): (10, 1), (1, "watch", "fusion"): (7, 0)})
    state.add_traffic({(1, "watch", "head"): (5, 2), (2, "watch", "head"): (100, 200)})
    state.add_traffic({(2, "phone", "head"): (0, 3)})
    state.add_traffic({})
    assert state.history.device_traffic() == {
        "quiet": {},
        "watch": {
            "head": {"bytes_up": 115, "bytes_down": 203},
            "fusion": {"bytes_up": 7, "bytes_down": 0},
        },
        "phone": {"head": {"bytes_up": 0, "bytes_down": 3}},
    }
    totals = state.history.totals()
    assert (totals["bytes_up"], totals["bytes_down"]) == (122, 206)


def test_versions_of_all_blocks_are_dropped_in_one_transaction(
    state: ServerState, folder: Path
) -> None:
    """Each is a wait for the disk, and all of them are on the event loop."""
    for block in BLOCKS.values():
        state.add_initial_version(block, INITIAL[block.name])
    state.open_round(1, COHORT, NOW_S)
    close_round(state, next_versions())
    commits: list[str] = []
    state._db.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    state.prune_versions(1)
    state._db.set_trace_callback(None)
    assert len(commits) == 1
    moved = [new.block.name for new in next_versions()]
    assert len(moved) > 1
    for name in moved:
        assert state.oldest_version(name) == 2
        assert [path.name for path in (folder / "blocks" / name).iterdir()] == ["2.safetensors"]
