"""What every aggregator and server optimizer costs: time and memory on one block.

`python -m benchmarks.bench_aggregators [--updates N] [--rows M --columns N] [--markdown | --json]`.
The block is one matrix, so that the rules for matrices have something to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.bench_canonical import matrix_block, table
from benchmarks.machine import describe_machine
from petalfl.model import Block
from petalfl.payloads import EncodedDelta, plain_delta
from petalfl.vectors import Vector
from server.aggregators import parse_aggregator
from server.optimizers import parse_optimizer, step

AGGREGATORS = ("weighted-mean", "median", "trimmed-mean:0.1", "krum:5", "multi-krum:5",
               "geometric-median", "canonical")  # fmt: skip
OPTIMIZERS = ("sgd", "momentum", "adagrad", "adam", "yogi", "orthogonal")
NOTES = """\
Least of five runs. Update: to fold one in; end: to finalize, or the step of a server optimizer.
Memory: the peak above what was there, as numpy allocates it; deltas: those that the rule holds when
all have arrived, which a server would else have freed; of the weighted mean, such as wait for a
pass."""


@dataclass(frozen=True, slots=True)
class Row:
    """One rule on one block; ``kept_bytes`` are the deltas that it holds on to."""

    rule: str
    update_s: float
    end_s: float
    peak_bytes: int
    kept_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    block = matrix_block(options.rows, options.columns)
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=block.size).astype(np.float32) for _ in range(options.updates)]
    rows = []
    for rule in AGGREGATORS:
        print(rule, file=sys.stderr, flush=True)
        rows.append(aggregator_row(rule, block, deltas))
    for rule in OPTIMIZERS:
        print(rule, file=sys.stderr, flush=True)
        rows.append(optimizer_row(rule, block, deltas))
    if options.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return 0
    head = f"{options.updates} updates of {options.rows} x {options.columns} float32."
    print(
        "\n\n".join(
            [report(rows, is_markdown=options.markdown), head, NOTES, describe_machine("numpy")]
        )
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_aggregators",
        description="Time and memory of every aggregator and server optimizer on one block.",
    )
    parser.add_argument("--updates", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--rows", type=int, default=400, metavar="M", help="default 400")
    parser.add_argument("--columns", type=int, default=250, metavar="N", help="default 250")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def aggregator_row(rule: str, block: Block, deltas: Sequence[Vector]) -> Row:
    """Time and memory of one aggregation."""
    aggregator = parse_aggregator(rule)
    weights = [float(k + 1) for k in range(len(deltas))]

    arrived: list[weakref.ref[EncodedDelta]] = []

    def fold() -> object:
        state = aggregator.init(block)
        arrived.clear()
        for delta, weight in zip(map(plain_delta, deltas), weights, strict=True):
            arrived.append(weakref.ref(delta))
            state = aggregator.accumulate(state, delta, weight)
        return state

    state = fold()
    still_there = [delta for delta in (one() for one in arrived) if delta is not None]
    kept_bytes = sum(len(delta.payload) for delta in still_there)
    del still_there
    update_s = _least(fold) / len(deltas)
    end_s = _least(lambda: aggregator.finalize(state))
    return Row(rule, update_s, end_s, _peak(lambda: aggregator.finalize(fold())), kept_bytes)


def optimizer_row(rule: str, block: Block, deltas: Sequence[Vector]) -> Row:
    """Time and memory of one step, with a state that is there already."""
    optimizer = parse_optimizer(rule)
    parameters, state = step(optimizer, block, deltas[0], deltas[1], {})

    def run() -> object:
        return step(optimizer, block, parameters, deltas[0], state)

    return Row(rule, 0.0, _least(run), _peak(run), 0)


def _least(function: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start_s = time.perf_counter()
        function()
        times.append(time.perf_counter() - start_s)
    return min(times)


def _peak(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def report(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """The table."""
    header = ("rule", "update ms", "end ms", "memory MB", "deltas MB")
    cells = [
        (r.rule, f"{1e3 * r.update_s:.3f}", f"{1e3 * r.end_s:.1f}", f"{r.peak_bytes / 1e6:.1f}",
         f"{r.kept_bytes / 1e6:.1f}")
        for r in rows
    ]  # fmt: skip
    return table([header, *cells], is_markdown)


if __name__ == "__main__":
    sys.exit(main())
