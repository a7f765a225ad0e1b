"""What a round of a rule over all updates takes of memory: its updates wait in files.

`python -m benchmarks.round_memory [--rule RULE] [--in-memory] [--json]`. Standard normal updates
arrive one after another, as they come from the door, go into the journal, and wait in a block's
buffer; then the rule aggregates them. Linux alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.bench_canonical import matrix_block
from benchmarks.machine import describe_machine
from petalfl.codecs import parse_codec
from petalfl.model import Block
from petalfl.payloads import parse_payload
from petalfl.wire import BlockUpdate
from server.aggregators import parse_aggregator
from server.buffers import Buffer, Keep, in_memory
from server.memory import keep_freed_memory
from server.reducer import choose, parse_reducer, use
from server.spill import Spill
from server.state import ServerState

NOTES = """\
Own: the most memory that the process held which no file backs (RssAnon), beyond what it held
before. Cache: the most of the files that was mapped into it (RssFile), which the kernel takes away
where memory is short. Arrival: CPU time of an update's way into the buffer, the median, without its
check at the door and the journal; end: of the rule."""


@dataclass(frozen=True, slots=True)
class Row:
    """A round of a block."""

    rule: str
    codec: str
    where: str
    num_updates: int
    size: int
    payload_bytes: int
    own_bytes: int
    cache_bytes: int
    arrival_s: float
    end_s: float


class Watch:
    """The most that was resident within the block, looked at every few milliseconds."""

    def __enter__(self) -> Watch:
        self._before = resident()
        self._most = dict(self._before)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def beyond(self, field: str) -> int:
        """The bytes above what was there before."""
        return self._most[field] - self._before[field]

    def _look(self) -> None:
        while not self._is_over.wait(0.005):
            for field, value in resident().items():
                self._most[field] = max(self._most[field], value)


def resident() -> dict[str, int]:
    """Bytes of this process in memory, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {field: int(fields[field].split()[0]) << 10 for field in ("RssAnon", "RssFile")}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()  # as the server does
    with use(choose(options.reducer)), tempfile.TemporaryDirectory(dir=options.folder) as folder:
        row = measure(options, Path(folder))
    if options.json:
        print(json.dumps(dataclasses.asdict(row)))
        return 0
    print(
        f"{row.rule} of {row.num_updates} x {row.size:,} {row.codec}, {row.where}: payloads "
        f"{row.payload_bytes / 1e6:.0f} MB, own {row.own_bytes / 1e6:.0f} MB, cache "
        f"{row.cache_bytes / 1e6:.0f} MB; arrival {1e3 * row.arrival_s:.1f} ms, end "
        f"{row.end_s:.1f} s\n\n{NOTES}\n\n{describe_machine('numpy')}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.round_memory", description="Memory of a round of many updates."
    )
    add = parser.add_argument
    add("--rule", default="median", help="an aggregator of the server; default median")
    add("--updates", type=int, default=200, metavar="N", help="default 200")
    add("--size", type=int, default=1_000_000, metavar="P", help="default 1000000")
    add("--codec", default="f32", help="default f32")
    add("--reducer", type=parse_reducer, default="auto", help="as of the server; default auto")
    add("--in-memory", action="store_true", help="keep the updates in memory, to compare")
    add("--folder", type=Path, help="on the disk to write to; default the system's for such files")
    add("--json", action="store_true", help="print a JSON line")
    return parser


def measure(options: argparse.Namespace, folder: Path) -> Row:
    """The round."""
    block = matrix_block(1, options.size)
    arrivals_s, payload_bytes = [], 0
    with closing(ServerState(folder)) as state, Watch() as watch:
        keep: Keep = in_memory if options.in_memory else Spill(folder, state.mapped_payload).keep
        buffer = Buffer(block, parse_aggregator(options.rule), keep=keep)
        for number in range(options.updates):
            update = arrived(block, options.codec, number)
            payload_bytes += len(update.encoded.payload)
            state.journal_update(update)
            start_s = time.process_time()
            buffer.add(update, 1.0)
            arrivals_s.append(time.process_time() - start_s)
        start_s = time.process_time()
        assert buffer.result().delta is not None
        end_s = time.process_time() - start_s
    return Row(
        options.rule, options.codec, "in memory" if options.in_memory else "in files",
        options.updates, options.size, payload_bytes, watch.beyond("RssAnon"),
        watch.beyond("RssFile"), float(np.median(arrivals_s)), end_s,
    )  # fmt: skip


def arrived(block: Block, codec: str, number: int) -> BlockUpdate:
    """An update as it comes from the door: checked, its norm known."""
    rng, known = np.random.default_rng(number), parse_codec(codec)
    payload = known.encode(rng.standard_normal(block.size, np.float32), rng)
    encoded = parse_payload(known, block, payload)
    assert encoded.norm > 0
    return BlockUpdate(
        number.to_bytes(16, "big"), f"device-{number}", block.name, 1, 1, 1, encoded, ""
    )


if __name__ == "__main__":
    sys.exit(main())
