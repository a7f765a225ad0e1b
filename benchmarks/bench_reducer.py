"""The reducer: sums of every backend, next to the memory's own speed, the BLAS, and peers.

`python -m benchmarks.bench_reducer [--rows sums,rules,gpu] [--json | --markdown]`. Streaming means
of standard normal updates, as a server has them, one after another; the rules over all updates are
those of `benchmarks.reducer_rules`, rows for a GPU those of `benchmarks.reducer_gpu`. Flower and
NVIDIA FLARE run if ``--flower-python`` and ``--nvflare-python`` name Pythons that have them
(`contenders/peers_mean.py` says how to make them); ``--svd`` adds torch's SVD next to `canonical`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import reducer_gpu, reducer_rules
from benchmarks.bench_canonical import table
from benchmarks.machine import describe_machine
from benchmarks.reducer_rules import Row, measure
from petalfl.codecs import parse_codec
from petalfl.model import Block
from petalfl.payloads import EncodedDelta, parse_payload
from petalfl.vectors import Vector
from server.aggregators import weighted_mean
from server.memory import keep_freed_memory
from server.reducer import choose, use
from tests.server.builders import make_block

PEERS = Path(__file__).parent / "contenders" / "peers_mean.py"
KINDS = ("sums", "rules", "gpu")
WORK = "100x1000000,1000x100000,800x1000000"
BLAS, FLOOR = "BLAS, one pass", "read once"
NOTES = """\
Wall: median, least and most of the repeats; CPU: the least, of all threads together, which other
work on the machine changes little. Ratios: to one pass of numpy's BLAS over the updates side by
side as one float32 matrix, least to least, which no server has them as, and which sums in float32.
Read once: numpy's maximum of every update. petalfl: adds the updates one after another, as they
come from the door, and takes the mean, summed in float64. Memory: the most that was resident
beyond what was before; the updates are not in it. Flower: its FedAvg in place, from the bytes that
clients send; arrays: its `aggregate`. Peers run on their own, in float32."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()  # as the server does
    sums: list[Row] = []
    if "sums" in options.rows:
        for num_updates, size in options.work:
            sums += sum_rows(num_updates, size, options)
            sums += peer_rows(num_updates, size, options)
    rules = _rules(options) if "rules" in options.rows else []
    gpu = reducer_gpu.rows(options.repeats) if "gpu" in options.rows else []
    if options.json:
        for one in (*sums, *rules):
            print(json.dumps(dataclasses.asdict(one)))
        for row in gpu:
            print(json.dumps(dataclasses.asdict(row)))
        return 0
    parts = [report(sums, is_markdown=options.markdown), NOTES] if sums else []
    if rules:
        parts += [reducer_rules.report(rules, is_markdown=options.markdown), reducer_rules.NOTES]
    if gpu:
        parts += [reducer_gpu.report(gpu, is_markdown=options.markdown), reducer_gpu.NOTES]
    print("\n\n".join([*parts, describe_machine("numpy", *options.packages)]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_reducer",
        description="Time and memory of the server's sums and rules, next to others' own.",
    )
    add = parser.add_argument
    add("--rows", type=_kinds, default=list(KINDS), metavar="KIND,…",
        help=f"of {', '.join(KINDS)}; default all")  # fmt: skip
    add("--work", type=_work, default=_work(WORK), metavar="NxP,…",
        help=f"updates times values, default {WORK}")  # fmt: skip
    add("--backends", type=lambda text: text.split(","), default=["numba", "numpy"],
        metavar="NAME,…", help="that sum, default numba,numpy")  # fmt: skip
    add("--codecs", type=lambda text: text.split(","), metavar="NAME,…",
        default=["f32", "int8", "f16", "bf16", "topk-int8:0.05"],
        help="of updates, default f32,int8,f16,bf16,topk-int8:0.05")  # fmt: skip
    add("--repeats", type=int, default=7, metavar="N", help="default 7")
    add("--flower-python", type=Path, metavar="PATH", help="a Python with flwr")
    add("--nvflare-python", type=Path, metavar="PATH", help="a Python with nvflare")
    add("--rules-updates", type=int, default=100, metavar="N", help="of the rules, default 100")
    add("--rules-size", type=int, default=1_000_000, metavar="P", help="default 1000000")
    add("--matrix", type=int, default=4096, metavar="M", help="rows of the matrix that canonical "
        "merges, 1024 wide; default 4096; 0: none")  # fmt: skip
    add("--svd", action="store_true", help="next to canonical, torch's SVD; takes minutes")
    add("--json", action="store_true", help="print JSON lines instead of tables")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    parser.set_defaults(packages=("numba",))
    return parser


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise argparse.ArgumentTypeError(f"unknown {sorted(unknown)}, expected {', '.join(KINDS)}")
    return kinds


def _work(text: str) -> list[tuple[int, int]]:
    pairs = [one.split("x") for one in text.split(",")]
    return [(int(num_updates), int(size)) for num_updates, size in pairs]


def sum_rows(num_updates: int, size: int, options: argparse.Namespace) -> list[Row]:
    """Rows of one piece of work."""
    rng = np.random.default_rng(0)
    matrix = np.empty((num_updates, size), np.float32)
    for row in matrix:
        rng.standard_normal(size, np.float32, out=row)
    weights = np.arange(1, num_updates + 1, dtype=np.float32)
    work, repeats = f"{num_updates} x {size:,}", options.repeats

    def measured(contender: str, updates: str, function: Callable[[], object]) -> Row:
        return measure(work, contender, updates, num_updates, size, repeats, function)

    rows = [
        measured(FLOOR, "f32", lambda: [row.max() for row in matrix]),
        measured(BLAS, "f32", lambda: weights @ matrix),
    ]
    block = make_block("head", "head", ("acc",), {"w": (size,)})[0]
    for codec in options.codecs:
        deltas = _encoded(block, matrix, codec)
        for name in options.backends:
            with use(choose(name)):
                rows.append(measured(f"petalfl, {name}", codec, partial(mean_of, block, deltas)))
        del deltas
    return rows


def peer_rows(num_updates: int, size: int, options: argparse.Namespace) -> list[Row]:
    """The same of those frameworks that there are Pythons of."""
    flower, nvflare = options.flower_python, options.nvflare_python
    peers = {"flower": flower, "flower-arrays": flower, "nvflare": nvflare}
    return [
        measure_peer(python, peer, num_updates, size, options.repeats)
        for peer, python in peers.items()
        if python is not None
    ]


def _encoded(block: Block, matrix: NDArray[np.float32], codec: str) -> list[EncodedDelta]:
    rng, known = np.random.default_rng(0), parse_codec(codec)
    if codec == "f32":  # as they are, without a copy
        return [parse_payload(known, block, row.data.cast("B")) for row in matrix]
    return [parse_payload(known, block, known.encode(row, rng)) for row in matrix]


def mean_of(block: Block, deltas: Sequence[EncodedDelta]) -> Vector | None:
    """As a server takes it."""
    aggregator = weighted_mean()
    state = aggregator.init(block)
    for k, delta in enumerate(deltas):
        state = aggregator.accumulate(state, delta, k + 1.0)
    return aggregator.finalize(state)


def measure_peer(python: Path, peer: str, num_updates: int, size: int, repeats: int) -> Row:
    """A peer's row, in a process of its own environment."""
    work = f"{num_updates} x {size:,}"
    print(f"{work}: {peer}", file=sys.stderr, flush=True)
    command = [python, PEERS, peer, num_updates, size, repeats]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(work, f"{peer} {found['version']}", "f32", num_updates, size,
               float(np.median(found["wall_s"])), min(found["wall_s"]), max(found["wall_s"]),
               min(found["cpu_s"]), found["peak_bytes"])  # fmt: skip


def _rules(options: argparse.Namespace) -> list[Row]:
    with use(choose("auto")):
        rows = reducer_rules.rank_and_distance_rows(
            options.rules_updates, options.rules_size, min(options.repeats, 5),
            options.flower_python,
        )  # fmt: skip
        if options.matrix:
            svd = "cpu" if options.svd else None
            rows += reducer_rules.matrix_rows(options.rules_updates, options.matrix, 1024, svd=svd)
    return rows


def report(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """The table of sums."""
    blas = {row.rule: row for row in rows if row.contender == BLAS}
    header = ("updates x values", "contender", "codec", "wall ms", "ratio", "CPU ms", "ratio",
              "memory MB")  # fmt: skip
    cells = [
        (r.rule, r.contender, r.updates,
         f"{1e3 * r.wall_s:.1f} ({1e3 * r.least_s:.1f}-{1e3 * r.most_s:.1f})",
         f"{r.least_s / blas[r.rule].least_s:.2f}", f"{1e3 * r.cpu_s:.1f}",
         f"{r.cpu_s / blas[r.rule].cpu_s:.2f}", f"{r.peak_bytes / 1e6:.0f}")
        for r in rows
    ]  # fmt: skip
    return table([header, *cells], is_markdown)


if __name__ == "__main__":
    sys.exit(main())
