from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from petalfl.errors import DataError, StoreError
from petalfl.examples import _STATE_BYTES, FLUSH_EVERY, MIN_BYTES, ExampleStore
from petalfl.records import framed

DAY_S = 86400.0


class Clock:
    def __init__(self, time_s: float = 1.7e9) -> None:
        self.time_s = time_s

    def __call__(self) -> float:
        return self.time_s


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExampleStore]:
    with ExampleStore(tmp_path / "examples") as store:
        yield store


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def segments_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.examples"))


def values_of(store: ExampleStore) -> list[int]:
    """The first value of each labeled example's ``acc``."""
    return [int(window.flat[0]) for window in store.snapshot(["acc"]).inputs["acc"]]


# What goes in comes out


def test_arrays_and_labels_come_back_in_order(store: ExampleStore) -> None:
    first = store.append({"acc": np.ones((2, 3), np.float32), "step": 4}, 1)
    store.append({"acc": np.zeros((2, 3), np.float32), "step": 5})  # without labels
    last = store.append({"acc": np.full((2, 3), 2, np.float32), "step": 6}, 0)
    inputs, labels, ids = store.snapshot()
    assert inputs["acc"].dtype == np.float32 and inputs["acc"].shape == (2, 2, 3)
    assert inputs["acc"][:, 0, 0].tolist() == [1, 2]
    assert inputs["step"].tolist() == [4, 6]
    assert isinstance(labels, np.ndarray) and labels.tolist() == [1, 0]
    assert ids.tolist() == [first, last]
    assert (len(store), store.num_labeled, store.modalities) == (3, 2, ("acc", "step"))


def test_labels_by_task(store: ExampleStore) -> None:
    store.append({"acc": [1.0]}, {"activity": 2, "pose": [0.5, 1.0]})
    store.append({"acc": [2.0]}, {"activity": 1})
    _, labels, _ = store.snapshot(tasks=["activity"])
    assert isinstance(labels, dict) and labels["activity"].tolist() == [2, 1]
    _, labels, ids = store.snapshot()  # all tasks: of one example
    assert isinstance(labels, dict) and labels["pose"].tolist() == [[0.5, 1.0]]
    assert len(ids) == 1


def test_the_examples_that_hold_all_modalities(store: ExampleStore) -> None:
    both = store.append({"acc": [1], "gyro": [1]}, 0)
    acc = store.append({"acc": [2]}, 0)
    gyro = store.append({"gyro": [3]}, 0)
    store.append({"acc": [4], "heart": [4]})  # its modality is not asked for: it has no labels
    assert store.snapshot().ids.tolist() == [both]
    assert store.snapshot(["acc"]).ids.tolist() == [both, acc]
    assert store.snapshot(["gyro"]).ids.tolist() == [both, gyro]
    assert list(store.snapshot(["gyro"]).inputs) == ["gyro"]


def test_no_such_example(store: ExampleStore) -> None:
    with pytest.raises(DataError, match=r"no example has any modality .* 0 have labels"):
        store.snapshot()
    store.append({"acc": [1]}, {"pose": 1})
    with pytest.raises(DataError, match="modality gyro and labels of task pose: 1 have labels"):
        store.snapshot(["gyro"])
    with pytest.raises(DataError, match="task activity"):
        store.snapshot(tasks=["activity"])
    with pytest.raises(DataError, match="any task"):
        store.snapshot(tasks=[])


def test_other_shapes_than_the_newest_are_left_out(
    store: ExampleStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.append({"acc": [1, 1]}, 0)
    store.append({"acc": [2, 2, 2]}, 0)
    store.append({"acc": [3, 3, 3]}, 0)
    assert values_of(store) == [2, 3]
    assert "left out 1 of 3 examples" in caplog.text


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "no modality"),
        ({"acc": [1.0, float("nan")]}, "modality acc: found NaN"),
        ({"acc": [-np.inf]}, "modality acc: found NaN or infinity"),
        ({"acc": ["a"]}, "modality acc: found <U1"),
        ({"acc": [None]}, "modality acc: found object"),
        ({"acc": [1j]}, "modality acc: found complex128"),
        ({"acc": [[1], [1, 2]]}, "modality acc: found no array"),
        ({"": [1]}, "expected a name"),
        ({"acc": np.zeros(1 << 23)}, "of 671.* bytes: expected 4194288 at most, a sixteenth"),
    ],
)
def test_bad_inputs(store: ExampleStore, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        store.append(inputs)
    assert len(store) == 0


@pytest.mark.parametrize("labels", [{}, {"": 1}, float("nan"), "run", {"pose": [None]}])
def test_bad_labels(store: ExampleStore, labels: Any) -> None:
    kept = store.append({"acc": [1]}, 1)
    with pytest.raises(DataError):
        store.append({"acc": [1]}, labels)
    with pytest.raises(DataError):
        store.label(kept, labels)
    assert store.snapshot().ids.tolist() == [kept]


def test_labels_come_later_and_again(store: ExampleStore) -> None:
    example = store.append({"acc": [1]})
    store.label(example, 3)
    store.label(example, 5)
    labels = store.snapshot().labels
    assert isinstance(labels, np.ndarray) and labels.tolist() == [5]
    with pytest.raises(DataError, match=f"there is no example {example + 1}"):
        store.label(example + 1, 0)
    with pytest.raises(DataError, match="found None"):
        store.label(example, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments", [{"max_bytes": MIN_BYTES - 1}, {"max_age_s": 0.0}, {"max_age_s": float("nan")}]
)
def test_programmer_errors(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ExampleStore(tmp_path, **arguments)


DTYPES = [arrays.integer_dtypes(), arrays.unsigned_integer_dtypes(), arrays.boolean_dtypes()]
ARRAY = arrays.arrays(st.one_of(*DTYPES), arrays.array_shapes(min_dims=0, max_side=3)) | (
    arrays.arrays(
        arrays.floating_dtypes(sizes=(16, 32, 64)),
        arrays.array_shapes(max_side=3),
        elements={"allow_nan": False, "allow_infinity": False},
    )
)
STEP = st.one_of(
    st.tuples(st.just("append"), ARRAY, st.none() | ARRAY),
    st.tuples(st.just("label"), st.integers(0, 20), ARRAY),
    st.tuples(st.just("reopen"), st.none(), st.none()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=20))
def test_a_store_is_a_list_that_survives(steps: list[Any]) -> None:
    model: dict[int, list[Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = ExampleStore(folder)
        for action, first, second in steps:
            if action == "append":
                example = store.append({"a": first}, second)
                assert example > max(model, default=-1)
                model[example] = [first, second]
            elif action == "label" and first < len(model):
                example = list(model)[first]
                store.label(example, second)
                model[example][1] = second
            else:
                store.close()
                store = ExampleStore(folder)
            assert len(store) == len(model)
            assert store.num_labeled == sum(y is not None for _, y in model.values())
        labeled = {i: (x, y) for i, (x, y) in model.items() if y is not None}
        if labeled:
            shapes = {i: (x.shape, y.shape) for i, (x, y) in labeled.items()}
            alike = [i for i in labeled if shapes[i] == shapes[max(shapes)]]
            inputs, labels, ids = store.snapshot()
            assert ids.tolist() == alike
            expected = [np.stack([labeled[i][part] for i in alike]) for part in (0, 1)]
            for found, wanted in zip((inputs["a"], labels), expected, strict=True):
                assert isinstance(found, np.ndarray)
                assert found.dtype == wanted.dtype.newbyteorder("=")
                np.testing.assert_array_equal(found, wanted)
        store.close()


# One owner


def test_second_open(store: ExampleStore) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(StoreError, match=f"{store.folder} is open already"):
        ExampleStore(store.folder)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


OPEN = """
import sys
from petalfl.errors import StoreError
from petalfl.examples import ExampleStore
try:
    ExampleStore(sys.argv[1]).close()
except StoreError as error:
    print(error)
"""


def test_second_open_in_another_process(store: ExampleStore) -> None:
    command = [sys.executable, "-c", OPEN, str(store.folder)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "is open already" in result.stdout
    store.close()
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert result.stdout == ""


def test_closed(store: ExampleStore) -> None:
    store.append({"acc": [1]}, 1)
    store.close()
    store.close()
    for use in (
        lambda: store.append({"acc": [1]}),
        lambda: store.label(0, 1),
        store.snapshot,
        store.expire,
        store.flush,
    ):
        with pytest.raises(StoreError, match="is closed"):
            use()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot open the example store"):
        ExampleStore(tmp_path / "file" / "examples")


def test_for_the_owner_alone(store: ExampleStore) -> None:
    store.append({"acc": [1]})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()}
    assert modes == {0o600}


def test_threads(store: ExampleStore) -> None:
    num_each, started, errors = 300, threading.Event(), []

    def sense(sensor: int) -> None:
        try:
            for i in range(num_each):
                value = 1000 * sensor + i
                example = store.append({"acc": np.full(8, value)})
                store.label(example, value)
                started.set()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=sense, args=(sensor,)) for sensor in range(2)]
    for thread in threads:
        thread.start()
    started.wait()
    seen = 0
    while any(thread.is_alive() for thread in threads):
        inputs, labels, ids = store.snapshot()
        assert isinstance(labels, np.ndarray)
        assert (inputs["acc"] == labels[:, None]).all()
        assert (np.diff(ids) > 0).all() and len(ids) >= seen
        seen = len(ids)
    for thread in threads:
        thread.join()
    assert not errors
    assert store.num_labeled == len(store.snapshot().ids) == 2 * num_each


# Bounds


def test_never_more_bytes_than_allowed(tmp_path: Path) -> None:
    max_bytes = MIN_BYTES
    with ExampleStore(tmp_path, max_bytes=max_bytes) as store:
        for i in range(300):
            before = len(store)
            example = store.append({"acc": np.full(8, i)}, i)
            assert size_of(tmp_path) <= max_bytes
            assert store.num_bytes == sum(path.stat().st_size for path in segments_of(tmp_path))
            if len(store) <= before:
                assert store.num_bytes > (max_bytes - _STATE_BYTES) * 13 / 16
            if i % 3 == 0:
                store.label(example, i)
                assert size_of(tmp_path) <= max_bytes
        kept = values_of(store)
        assert kept == list(range(300 - len(kept), 300))  # the oldest went first
        assert len(segments_of(tmp_path)) <= 33
        with pytest.raises(DataError, match="there is no example 0"):
            store.label(0, 1)
    with ExampleStore(tmp_path, max_bytes=max_bytes) as store:
        assert values_of(store) == kept


def test_two_states_fit_their_share(tmp_path: Path) -> None:
    with ExampleStore(tmp_path) as store:
        store._next_id = 1 << 62
        store.append({"acc": [1]})
    assert 2 * (tmp_path / "state.msgpack").stat().st_size <= _STATE_BYTES


def test_opened_with_fewer_bytes(tmp_path: Path) -> None:
    with ExampleStore(tmp_path, max_bytes=4 * MIN_BYTES) as store:
        for i in range(300):
            store.append({"acc": np.full(8, i)}, i)
    with ExampleStore(tmp_path, max_bytes=MIN_BYTES) as store:
        assert size_of(tmp_path) <= MIN_BYTES
        assert values_of(store)[-1] == 299


def test_relabeling_stays_within_bounds(tmp_path: Path) -> None:
    """Labels lie with their example; what they crowd out in the end is that."""
    with ExampleStore(tmp_path, max_bytes=MIN_BYTES) as store:
        example = store.append({"acc": [1]})
        with pytest.raises(DataError, match=f"no example {example}: dropped"):
            for i in range(1000):
                store.label(example, i)
                assert size_of(tmp_path) <= MIN_BYTES
        assert segments_of(tmp_path) == []
        assert store.append({"acc": [2]}) > example


def test_age(tmp_path: Path) -> None:
    clock = Clock()
    with ExampleStore(tmp_path, max_age_s=16 * DAY_S, now_s=clock) as store:
        for day in range(10):
            store.append({"acc": [day]}, day)
            clock.time_s += DAY_S
        clock.time_s += 6 * DAY_S  # the first is 16 days old
        assert store.expire() == 0
        clock.time_s += 1
        assert store.expire() == 1
        assert values_of(store) == list(range(1, 10))
    clock.time_s += 3 * DAY_S
    with ExampleStore(tmp_path, max_age_s=16 * DAY_S, now_s=clock) as store:
        assert len(store) == 6
        assert values_of(store) == list(range(4, 10))
        clock.time_s += 6 * DAY_S
        last = store.append({"acc": [99]}, 0)
        assert store.snapshot().ids.tolist() == [last]


def test_all_too_old_and_ids_go_on(tmp_path: Path) -> None:
    clock = Clock()
    with ExampleStore(tmp_path, max_age_s=DAY_S, now_s=clock) as store:
        last = store.append({"acc": [1]})
        for _ in range(3):
            clock.time_s += DAY_S / 2
            store.expire()
        assert len(store) == store.num_bytes == 0
        assert segments_of(tmp_path) == []
    with ExampleStore(tmp_path, max_age_s=DAY_S, now_s=clock) as store:
        assert store.append({"acc": [1]}) > last


@pytest.mark.parametrize("jump_s", [8 * 365 * DAY_S, -50 * 365 * DAY_S])
@pytest.mark.parametrize("is_reopened", [False, True])
def test_a_clock_that_jumps_and_comes_back(
    tmp_path: Path, jump_s: float, is_reopened: bool
) -> None:
    clock = Clock()
    arguments: dict[str, Any] = {"max_age_s": 16 * DAY_S, "now_s": clock}
    store = ExampleStore(tmp_path, **arguments)
    store.append({"acc": [1]}, 0)
    for _ in range(20):
        for sign in (1, -1):
            clock.time_s += sign * jump_s
            if is_reopened:
                store.close()
                store = ExampleStore(tmp_path, **arguments)
            store.append({"acc": [2]}, 0)
    assert len(store) == 41  # had one jump counted in full, none of the first were left
    for _ in range(5):
        clock.time_s += 5 * DAY_S
        store.expire()
    assert len(store) == 0
    store.close()


# Damage


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, bytes, list[int]]:
    """A segment of four examples, its bytes, and where each record ends."""
    ends = []
    with ExampleStore(tmp_path / "damaged") as store:
        for i in range(4):
            store.append({"acc": [i]}, i)
            ends.append(store.num_bytes)
    (path,) = segments_of(tmp_path / "damaged")
    return path, path.read_bytes(), ends


def survivors(path: Path, data: bytes) -> list[int]:
    """Opens on these bytes; whatever they are, the store works on and is whole again."""
    path.write_bytes(data)
    with ExampleStore(path.parent) as store:
        assert store.num_bytes == sum(p.stat().st_size for p in segments_of(path.parent))
        assert len(store) or not segments_of(path.parent)
        kept = values_of(store) if len(store) else []
        store.append({"acc": [9]}, 9)
    with ExampleStore(path.parent) as store:
        assert values_of(store) == [*kept, 9]
    for segment in segments_of(path.parent):
        segment.unlink()
    return kept


def test_every_truncation(whole: tuple[Path, bytes, list[int]]) -> None:
    path, data, ends = whole
    for length in range(len(data)):
        assert survivors(path, data[:length]) == [i for i in range(4) if ends[i] <= length]


def test_every_flipped_bit(whole: tuple[Path, bytes, list[int]]) -> None:
    path, data, ends = whole
    for position in range(len(data)):
        hit = next(i for i in range(4) if position < ends[i])
        in_header = position < (ends[hit - 1] if hit else 0) + 12
        bad = bytearray(data)
        bad[position] ^= 1 << position % 8
        others = [i for i in range(4) if i < hit or (i > hit and not in_header)]
        assert survivors(path, bytes(bad)) == others


@pytest.mark.parametrize("tail", [bytes(4096), b"\xff" * 50, b"\0"])
def test_a_tail_that_was_never_written(
    whole: tuple[Path, bytes, list[int]], tail: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path, data, _ = whole
    assert survivors(path, data + tail) == [0, 1, 2, 3]
    assert f"lost 0 records, cut off {len(tail)} bytes" in caplog.text


def test_damage_is_said(
    whole: tuple[Path, bytes, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    path, data, ends = whole
    bad = bytearray(data)
    bad[ends[1] - 1] ^= 1
    survivors(path, bytes(bad[:-1]))
    tail = ends[3] - ends[2] - 1
    assert f"{path} is damaged: lost 1 records, cut off {tail} bytes" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_damage_while_it_is_open(store: ExampleStore, caplog: pytest.LogCaptureFixture) -> None:
    store.append({"acc": [1]}, 1)
    end = store.num_bytes
    store.append({"acc": [2]}, 2)
    (path,) = segments_of(store.folder)
    data = bytearray(path.read_bytes())
    data[end - 1] ^= 1
    path.write_bytes(data)
    assert values_of(store) == [2]
    assert "left out an example" in caplog.text


def test_a_lost_or_damaged_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, last = tmp_path / "state.msgpack", -1
    with ExampleStore(tmp_path) as store:
        last = store.append({"acc": [1]}, 1)
    data = path.read_bytes()
    for bad in [data[:i] for i in range(len(data))] + [data[:i] + b"!" for i in range(3)]:
        path.write_bytes(bad)
        with ExampleStore(tmp_path) as store:
            new = store.append({"acc": [1]}, 1)
        assert new > last
        assert "state.msgpack is damaged" in caplog.text
        last = new
        caplog.clear()
    path.unlink()
    with ExampleStore(tmp_path) as store:
        assert store.append({"acc": [1]}, 1) > last


def test_a_segment_of_another_version(tmp_path: Path) -> None:
    (tmp_path / f"{0:016d}.examples").write_bytes(framed({"version": 9}))
    with pytest.raises(StoreError, match="is not readable by this version"):
        ExampleStore(tmp_path)
    with pytest.raises(StoreError, match="is not readable"):  # the lock was given back
        ExampleStore(tmp_path)


# Power cuts and disks

KILLED = """
import sys
import numpy as np
from petalfl.examples import ExampleStore
store = ExampleStore(sys.argv[1], max_bytes=1 << 16)
while True:
    example = store.append({"acc": np.zeros(8)})
    store.label(example, example)
    print(example, flush=True)
"""


def test_killed_amid_appends(tmp_path: Path) -> None:
    last = -1
    for num_lines in (1, 70, 500):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            lines = [int(child.stdout.readline()) for _ in range(num_lines)]
            child.kill()
            lines += [int(line) for line in child.stdout.read().split("\n")[:-1]]
        assert child.returncode == -signal.SIGKILL
        assert lines[0] > last
        with ExampleStore(tmp_path, max_bytes=1 << 16) as store:
            _, labels, ids = store.snapshot()
            assert isinstance(labels, np.ndarray) and (labels == ids).all()
            assert set(lines[-50:]) <= set(ids.tolist())
            last = store.append({"acc": np.zeros(8)})
            assert last > lines[-1]


def test_what_is_flushed_and_when(store: ExampleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def spy(file: int) -> None:
        synced.append(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    store.append({"acc": [0]})
    monkeypatch.setattr(os, "fsync", spy)
    store.flush()
    assert synced == [segments_of(store.folder)[0].name, store.folder.name]
    store.flush()
    assert len(synced) == 2  # there was nothing to do
    for i in range(1, FLUSH_EVERY):
        store.append({"acc": [i]})
    assert len(synced) == 2
    store.label(0, 1)
    assert len(synced) == 4
    store.append({"acc": [1]})
    store.close()
    assert len(synced) == 6


def test_a_lost_tail_gives_its_ids_to_nobody(tmp_path: Path) -> None:
    with ExampleStore(tmp_path) as store:
        store.append({"acc": [0]}, 0)
        end = store.num_bytes
        lost = [store.append({"acc": [1]}, 1) for _ in range(5)]
    os.truncate(segments_of(tmp_path)[0], end)  # at a record's end: nothing looks damaged
    with ExampleStore(tmp_path) as store:
        with pytest.raises(DataError, match="there is no example"):
            store.label(lost[0], 1)
        assert store.append({"acc": [2]}, 2) > lost[-1]


@pytest.mark.parametrize("num_taken", [0, 1, 12, 30])
def test_full_disk(store: ExampleStore, monkeypatch: pytest.MonkeyPatch, num_taken: int) -> None:
    kept = store.append({"acc": [1]}, 1)
    pwrite, left = os.pwrite, num_taken

    def fill(file: int, data: Any, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        num, left = left, 0
        return pwrite(file, data[:num], offset)

    size = size_of(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        with pytest.raises(StoreError, match=r"cannot append to .*No space left"):
            store.append({"acc": [2]}, 2)
        left = num_taken
        with pytest.raises(StoreError, match=r"cannot write to .*No space left"):
            store.label(kept, 2)
        assert size_of(store.folder) == size
        assert values_of(store) == [1]
    store.append({"acc": [3]}, 3)
    store.close()
    with ExampleStore(store.folder) as again:
        assert values_of(again) == [1, 3]
        assert again.snapshot().labels.tolist() == [1, 3]  # type: ignore[union-attr]


def test_a_torn_record_that_cannot_be_cut_off(
    store: ExampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.append({"acc": [1]}, 1)

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", fail)
        patch.setattr(os, "fsync", fail)
        for i in range(2, FLUSH_EVERY):
            store.append({"acc": [i]}, i)
        with pytest.raises(StoreError, match="Input/output error"):
            store.append({"acc": [0] * 20}, 0)
        with pytest.raises(StoreError, match="cannot flush"):
            store.flush()
    store.append({"acc": [64]}, 64)  # shorter than what lies there
    store.close()
    with ExampleStore(store.folder) as again:
        assert values_of(again) == list(range(1, 65))


def test_after_a_flush_that_failed_the_next_one_writes_again(
    store: ExampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system forgets what it could not write, and would call the same file flushed."""
    store.append({"acc": [1]}, 1)
    (segment,) = segments_of(store.folder)
    before, fsync, failed = segment.stat().st_ino, os.fsync, []

    def fail_once(file: int) -> None:
        if os.fstat(file).st_ino == before:
            failed.append(file)
            raise OSError(errno.EIO, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", fail_once)
    store.flush()
    assert len(failed) == 1
    assert segment.stat().st_ino != before
    store.append({"acc": [2]}, 2)
    store.close()
    assert len(failed) == 1
    with ExampleStore(store.folder) as again:
        assert values_of(again) == [1, 2]


def test_files_deleted_underneath(store: ExampleStore) -> None:
    """No file with a hole takes their place; opened again, the store begins anew."""
    last = store.append({"acc": [1]}, 1)
    segments_of(store.folder)[0].unlink()
    with pytest.raises(StoreError, match=r"cannot append .*No such file"):
        store.append({"acc": [2]}, 2)
    with pytest.raises(StoreError, match=r"cannot read .*No such file"):
        store.snapshot()
    with pytest.raises(StoreError, match=r"cannot flush .*No such file"):
        store.close()
    with ExampleStore(store.folder) as again:
        assert len(again) == 0
        assert again.append({"acc": [3]}, 3) > last


LIMITED = """
import resource, sys
import numpy as np
from petalfl.errors import StoreError
from petalfl.examples import ExampleStore
store = ExampleStore(sys.argv[1])
kept = [store.append({"acc": np.full(8, i)}, i) for i in range(3)]
resource.setrlimit(resource.RLIMIT_FSIZE, (store.num_bytes + 100, resource.RLIM_INFINITY))
try:
    store.append({"acc": np.full(8, 9)}, 9)
except StoreError as error:
    print(error)
assert store.snapshot().ids.tolist() == kept
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.append({"acc": np.full(8, 3)}, 3)
store.close()
"""


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "File too large" in result.stdout
    with ExampleStore(tmp_path) as store:
        assert values_of(store) == [0, 1, 2, 3]
