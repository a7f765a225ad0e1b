"""`ExampleStore`: what the sensors have seen, kept on the device for training.

Segment files ``<first id>.examples`` hold records (`petalfl.records`) and only ever grow at the
end, until the oldest are deleted whole. A record is ``{id, time_s, inputs, labels}``, or ``{id,
labels}`` for labels that came later. These go into the segment of their example, so that both are
dropped as one. ``state.msgpack`` is one such record, replaced atomically: ids reserved, and the
clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl.data import Labels
from petalfl.errors import DataError, StoreError
from petalfl.files import sync_folder, write_atomic
from petalfl.records import NO_TASK, Arrays, Span, framed, pack, pack_labels, records, unpack

log = logging.getLogger("petalfl.examples")

FLUSH_EVERY = 64  # examples and labels: a power cut loses fewer
MIN_BYTES = 1 << 12
_NUM_SEGMENTS = 16  # of a full store; the share that is dropped at a time
_STATE_BYTES = 256  # of state.msgpack and of the file that replaces it, together
_NUM_RESERVED = 1024  # ids, at a time


class Examples(NamedTuple):
    """Labeled examples, the oldest first.

    Attributes:
        inputs: By modality ``(n, …)``.
        labels: ``(n, …)`` by task; one array where labels were given without a task.
        ids: int64 ``(n,)``, ascending.
    """

    inputs: Arrays
    labels: NDArray[Any] | Arrays
    ids: NDArray[np.int64]


@dataclass(eq=False, slots=True)
class _Segment:
    path: Path
    time_s: float = 0.0  # of its first example
    size: int = 0  # what lies behind is no record
    ids: list[int] = field(default_factory=list)


class _Entry(NamedTuple):
    segment: _Segment
    span: Span
    modalities: frozenset[str]
    label_span: Span  # the same where the labels came with the example, or have not come yet
    tasks: frozenset[str]  # none: no labels yet


class ExampleStore:
    """A bounded store of examples in a folder of its own, open in one process at a time.

    An example and its labels are on disk for good after `flush`, `close`, or `FLUSH_EVERY` of
    them; a power cut loses at most what came since. All methods may be called from any thread.

    Args:
        max_bytes: Of all files in the folder together, at least `MIN_BYTES`; before it is
            exceeded, the oldest sixteenth is dropped.
        max_age_s: Nothing older is kept; what came up to a sixteenth of it later may go with it.
        now_s: The wall clock. Where it jumps, ages change by half of ``max_age_s`` at most, and
            back if it jumps back.

    Raises:
        StoreError: The store is open already, or cannot be read or written.
        ValueError: ``max_bytes`` is too small or ``max_age_s`` is not positive.

    Example:
        >>> with ExampleStore(folder, max_age_s=30 * 86400) as examples:   # doctest: +SKIP
        ...     example = examples.append({"acc": window})
        ...     examples.label(example, 3)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_bytes: int = 64 << 20,
        max_age_s: float | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        if max_bytes < MIN_BYTES:
            raise ValueError(f"max_bytes: expected {MIN_BYTES} at least, found {max_bytes}")
        if max_age_s is not None and not max_age_s > 0:
            raise ValueError(f"max_age_s: expected a positive number or None, found {max_age_s}")
        self.folder = Path(folder)
        self._budget = max_bytes - _STATE_BYTES
        self._segment_bytes = self._budget // _NUM_SEGMENTS
        self._max_age_s = math.inf if max_age_s is None else max_age_s
        self._now_s = now_s
        self._lock = threading.RLock()
        self._segments: list[_Segment] = []  # the oldest first
        self._entries: dict[int, _Entry] = {}  # by id, ascending
        self._unflushed: list[_Segment] = []  # one for each record
        self._next_id = self._reserved = 0  # the ids between them are reserved on disk
        self._time_s = self._wall_s = self._saved_s = 0.0  # believed, as now_s had it, on disk
        self._file_lock = _lock_file(self.folder)
        try:
            with _environment(f"cannot open the example store {self.folder}"):
                self._load()
                self._expire()
        except BaseException:
            os.close(self._file_lock)
            raise

    def close(self) -> None:
        """Flushes, and lets another process open the folder."""
        with self._lock:
            if self._file_lock < 0:
                return
            try:
                self.flush()
            finally:
                os.close(self._file_lock)
                self._file_lock = -1

    def __enter__(self) -> ExampleStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def append(self, inputs: Mapping[str, ArrayLike], labels: Labels | None = None) -> int:
        """Keeps one example.

        Args:
            inputs: By modality an array without batch axis, of a float, integer or bool dtype;
                any subset of the modalities.
            labels: A number or an array, or such by task; None: they may come later, see `label`.

        Returns:
            The example's id: larger than all before, also after a restart, and never reused.

        Raises:
            DataError: No modality, no numbers, a NaN or an infinity, or more than a sixteenth of
                ``max_bytes``.
            StoreError: The disk is full or broken; the example was not kept, all others are.
        """
        packed = {"inputs": pack("modality", inputs), "labels": pack_labels(labels)}
        with self._opened("append to"):
            self._advance()
            self._save_when_due()
            example_id, self._next_id = self._next_id, self._next_id + 1
            record = {"id": example_id, "time_s": self._time_s, **packed}
            frame = self._frame(record)
            self._expire()
            self._make_room(len(frame))
            self._write(self._segment_for(example_id, len(frame)), frame, record)
            return example_id

    def label(self, example_id: int, labels: Labels) -> None:
        """Gives an example its labels, in place of those it had.

        Raises:
            DataError: No such example, or it has been dropped; or as `append`.
            StoreError: As `append`; the example has the labels it had.
        """
        record = {"id": int(example_id), "labels": pack_labels(labels)}
        if record["labels"] is None:
            raise DataError(f"labels of example {example_id}: found None")
        with self._opened("write to"):
            frame = self._frame(record)
            self._find(example_id)  # or nothing need go
            self._make_room(len(frame))
            self._write(self._find(example_id).segment, frame, record)

    def snapshot(
        self,
        modalities: Iterable[str] | None = None,
        tasks: Iterable[str] | None = None,
        check: Callable[[Arrays, Labels], object] = lambda inputs, labels: None,
    ) -> Examples:
        """The labeled examples that hold all of some modalities and tasks, as arrays.

        Of examples whose shapes differ, those like the newest one; a warning says how many are
        left out. Others may append meanwhile.

        Args:
            modalities: The default is all that appear in labeled examples.
            tasks: The default is all that appear; labels without a task have none.
            check: An example's inputs and labels, in the form of `Examples` with n = 1; what it
                raises a `DataError` for is left out, with a warning.

        Raises:
            DataError: There is no such example.
            StoreError: The files cannot be read.
        """
        with contextlib.ExitStack() as files:
            with self._opened("read"):
                self._advance()
                self._expire()
                labeled = {i: e for i, e in self._entries.items() if e.tasks}
                names = _named(modalities, (e.modalities for e in labeled.values()))
                heads = _named(tasks, (e.tasks for e in labeled.values()))
                chosen = {
                    i: e
                    for i, e in labeled.items()
                    if names and heads and names <= e.modalities and heads <= e.tasks
                }
                # Open files outlive their segments.
                segments = {e.segment for e in chosen.values()}
                opened = {s: files.enter_context(_open(s.path, os.O_RDONLY)) for s in segments}
            with _environment(f"cannot read the example store {self.folder}"):
                read = {i: _read(opened[e.segment], e, names, heads) for i, e in chosen.items()}
        intact = {i: example for i, example in read.items() if example is not None}
        fitting, misfit = _fitting(intact, check)
        if not fitting:
            cause = f", one that does not fit: {misfit}" if misfit else "; name fewer, or wait"
            raise DataError(
                f"no example has {_listed(names, 'modality')} and labels of "
                f"{_listed(heads, 'task')}: {len(labeled)} have labels{cause}"
            )
        examples = _alike(fitting)
        stacked = _stacked(list(examples.values()))
        return Examples(*stacked, np.array(list(examples), np.int64))

    def expire(self) -> int:
        """Drops what is too old, as `append` and `snapshot` do; returns the number of examples."""
        with self._opened("expire"):
            before = len(self._entries)
            self._advance()
            self._expire()
            self._save_when_due()
            return before - len(self._entries)

    def flush(self) -> None:
        """Returns when all that was appended and labeled would survive a power cut.

        Raises:
            StoreError: The disk is full or broken; what was flushed before is safe.
        """
        with self._opened("flush"):
            self._sync()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_labeled(self) -> int:
        """Of the examples, those that have labels."""
        with self._lock:
            return sum(bool(entry.tasks) for entry in self._entries.values())

    @property
    def num_bytes(self) -> int:
        """On disk, of examples and labels."""
        with self._lock:
            return sum(segment.size for segment in self._segments)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that some labeled example has, sorted; where none is labeled, that any has."""
        with self._lock:
            entries = list(self._entries.values())
        labeled = [entry for entry in entries if entry.tasks]
        return tuple(sorted(_named(None, (e.modalities for e in labeled or entries))))

    # Ids and time.

    def _advance(self) -> None:
        """Follows the wall clock, by half of the age at most: what jumps may jump back."""
        wall_s, limit_s = self._now_s(), self._max_age_s / 2
        self._time_s += min(max(wall_s - self._wall_s, -limit_s), limit_s)
        self._wall_s = wall_s

    def _save_when_due(self) -> None:
        """Reserves ids before they are given out: lost with its example, none is given again."""
        is_late = abs(self._wall_s - self._saved_s) > self._max_age_s / 8
        if self._next_id >= self._reserved or is_late:
            reserved = self._next_id + _NUM_RESERVED
            write_atomic(self._state, framed([reserved, self._time_s, self._wall_s]))
            self._reserved, self._saved_s = reserved, self._wall_s

    @property
    def _state(self) -> Path:
        return self.folder / "state.msgpack"

    # Segments.

    def _load(self) -> None:
        times_s = [-math.inf]
        for path in sorted(self.folder.glob("[0-9]*.examples")):
            try:
                times_s.append(self._load_segment(path))
            except (KeyError, TypeError, ValueError) as error:  # intact, but strange
                raise StoreError(f"{path} is not readable by this version: {error!r}") from error
        self._next_id = max(self._entries, default=-1) + 1
        is_new = not self._segments and not self._state.exists()
        state = None if is_new else _read_state(self._state)
        if state is None:
            now_s = self._now_s()
            newest_s = max(times_s)
            state = (0, newest_s if math.isfinite(newest_s) else now_s, now_s)
            if not is_new:
                log.warning("%s is damaged: ids go on with a gap", self._state)
                self._next_id += _NUM_RESERVED
        self._next_id = self._reserved = max(state[0], self._next_id)
        self._time_s, self._wall_s = state[1:]
        self._saved_s = self._wall_s
        self._advance()

    def _load_segment(self, path: Path) -> float:
        """Reads one segment, cuts off what is damaged at its end, returns its newest time."""
        segment, data, num_lost, newest_s = _Segment(path), path.read_bytes(), 0, -math.inf
        for (start, stop), record in records(data):
            if record is None:
                num_lost += 1
                continue
            self._enter(segment, (start, stop), record)
            newest_s = max(newest_s, record.get("time_s", newest_s))
        num_cut = len(data) - segment.size
        if num_lost or num_cut:
            log.warning("%s is damaged: lost %d records, cut off %d bytes", path, num_lost, num_cut)
        if not segment.ids:
            path.unlink()
            return newest_s
        if num_cut:
            os.truncate(path, segment.size)
        self._segments.append(segment)
        return newest_s

    def _enter(self, segment: _Segment, span: Span, record: Mapping[str, Any]) -> None:
        """Takes a record that is on disk into the index."""
        example_id, tasks = record["id"], _names(tuple(record["labels"] or ()))
        segment.size = span[1]
        if "inputs" in record:
            modalities = _names(tuple(record["inputs"]))
            self._entries[example_id] = _Entry(segment, span, modalities, span, tasks)
            if not segment.ids:
                segment.time_s = record["time_s"]
            segment.ids.append(example_id)
        elif example_id in self._entries:  # or the example was damaged
            entry = self._entries[example_id]
            self._entries[example_id] = entry._replace(label_span=span, tasks=tasks)

    def _segment_for(self, example_id: int, num_bytes: int) -> _Segment:
        if self._segments:
            newest = self._segments[-1]
            is_recent = abs(self._time_s - newest.time_s) < self._max_age_s / _NUM_SEGMENTS
            if not newest.ids or (is_recent and newest.size + num_bytes <= self._segment_bytes):
                return newest
        self._segments.append(_Segment(self.folder / f"{example_id:016d}.examples"))
        return self._segments[-1]

    def _frame(self, record: Mapping[str, Any]) -> bytes:
        frame = framed(record)
        if len(frame) > self._segment_bytes:
            raise DataError(
                f"an example or its labels of {len(frame)} bytes: expected {self._segment_bytes} "
                f"at most, a sixteenth of max_bytes"
            )
        return frame

    def _write(self, segment: _Segment, frame: bytes, record: Mapping[str, Any]) -> None:
        start = segment.size
        create = os.O_CREAT if start == 0 else 0
        with _open(segment.path, os.O_RDWR | create) as file:
            self._unflushed.append(segment)
            try:
                _write_at(file, frame, start)
                if len(self._unflushed) >= FLUSH_EVERY:
                    self._sync()
            except BaseException:
                del self._unflushed[-1:]
                with contextlib.suppress(OSError):  # else the next record overwrites it
                    os.ftruncate(file, start)
                raise
        self._enter(segment, (start, start + len(frame)), record)

    def _sync(self) -> None:
        if not self._unflushed:
            return
        for path in {segment.path for segment in self._unflushed}:
            with _open(path, os.O_RDONLY) as file:
                try:
                    os.fsync(file)
                except OSError:  # of what it failed for, a second one would say that it is there
                    write_atomic(path, path.read_bytes())
        sync_folder(self.folder)
        self._unflushed = []

    def _expire(self) -> None:
        while self._segments and self._time_s - self._segments[0].time_s > self._max_age_s:
            self._drop_oldest()
        self._make_room(0)

    def _make_room(self, num_bytes: int) -> None:
        while self._segments and self.num_bytes + num_bytes > self._budget:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest = self._segments[0]
        oldest.path.unlink(missing_ok=True)
        del self._segments[0]
        for example_id in oldest.ids:
            del self._entries[example_id]
        self._unflushed = [segment for segment in self._unflushed if segment is not oldest]

    def _find(self, example_id: int) -> _Entry:
        entry = self._entries.get(example_id)
        if entry is None:
            raise DataError(f"there is no example {example_id}: dropped to make room, or never was")
        return entry

    @contextlib.contextmanager
    def _opened(self, action: str) -> Iterator[None]:
        with self._lock, _environment(f"cannot {action} the example store {self.folder}"):
            if self._file_lock < 0:
                raise StoreError(f"cannot {action} the example store {self.folder}: it is closed")
            yield


def _lock_file(folder: Path) -> int:
    with _environment(f"cannot open the example store {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StoreError(
            f"the example store {folder} is open already; close it there first"
        ) from error
    return lock


@contextlib.contextmanager
def _environment(failure: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{failure}: {error}") from error


@contextlib.contextmanager
def _open(path: Path, flags: int) -> Iterator[int]:
    file = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _write_at(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:  # a disk that is nearly full takes a part
        num_written = os.pwrite(file, view, offset)
        view, offset = view[num_written:], offset + num_written


# Records.


def _read_state(path: Path) -> tuple[int, float, float] | None:
    """First id that is not reserved, time and wall clock; None when it is not there or damaged."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    for _, record in records(data):
        return None if record is None else tuple(record)
    return None


def _read(
    file: int, entry: _Entry, modalities: frozenset[str], tasks: frozenset[str]
) -> tuple[Arrays, Arrays] | None:
    """Inputs and labels of an example; None, and a warning, when they were damaged since."""
    found = []
    for start, stop in (entry.span, entry.label_span):
        record = next((r for _, r in records(os.pread(file, stop - start, start))), None)
        if record is None:
            log.warning("%s is damaged: left out an example", entry.segment.path)
            return None
        found.append(record)
    inputs, labels = found[0]["inputs"], found[1]["labels"]
    return unpack(inputs, modalities), unpack(labels, tasks)


def _fitting(
    examples: dict[int, tuple[Arrays, Arrays]], check: Callable[[Arrays, Labels], object]
) -> tuple[dict[int, tuple[Arrays, Arrays]], DataError | None]:
    """Those that pass, and why the last of the others does not."""
    fitting, misfit = {}, None
    for i, example in examples.items():
        try:
            check(*_stacked([example]))
        except DataError as error:
            misfit = error
        else:
            fitting[i] = example
    if misfit is not None:
        num_left_out = len(examples) - len(fitting)
        log.warning("left out %d of %d examples: %s", num_left_out, len(examples), misfit)
    return fitting, misfit


def _stacked(
    examples: Sequence[tuple[Arrays, Arrays]],
) -> tuple[Arrays, NDArray[Any] | Arrays]:
    """Inputs and labels as in `Examples`."""
    (inputs, labels), *_ = examples
    by_modality = {n: np.stack([x[n] for x, _ in examples]) for n in sorted(inputs)}
    by_task = {t: np.stack([y[t] for _, y in examples]) for t in sorted(labels)}
    return by_modality, by_task[NO_TASK] if by_task.keys() == {NO_TASK} else by_task


def _alike(examples: dict[int, tuple[Arrays, Arrays]]) -> dict[int, tuple[Arrays, Arrays]]:
    """The examples of the newest one's shapes."""
    shapes = {
        i: [(name, array.shape) for arrays in example for name, array in sorted(arrays.items())]
        for i, example in examples.items()
    }
    newest = shapes[max(shapes)] if shapes else []
    alike = {i: example for i, example in examples.items() if shapes[i] == newest}
    if len(alike) < len(examples):
        log.warning(
            "left out %d of %d examples: their shapes are not those of the newest, %s",
            len(examples) - len(alike), len(examples), newest,
        )  # fmt: skip
    return alike


@functools.lru_cache
def _names(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(names)  # one for all examples alike


def _named(asked: Iterable[str] | None, there: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*there) if asked is None else frozenset(asked)


def _listed(names: frozenset[str], kind: str) -> str:
    return f"any {kind}" if names <= {NO_TASK} else f"{kind} " + ", ".join(sorted(names))
