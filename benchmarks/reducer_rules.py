"""The rules that need all updates at once, next to Flower's own and to a plain SVD.

`python -m benchmarks.reducer_rules [--flower-python PATH] [--svd] [--json | --markdown]`. Standard
normal updates of a block, aggregated by each rule; the merged matrix has directions of falling
strength. ``--flower-python`` names a Python that has `flwr` (`contenders/flower_numpy.py` says how
to make one), ``--svd`` adds torch's SVD of all deltas side by side, which takes minutes. On a GPU:
``--reducer cuda --device cuda``, which adds updates that lie in the device's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.bench_canonical import matrix_block, table
from benchmarks.contenders.resident import peak_bytes
from benchmarks.machine import describe_machine
from petalfl.codecs import parse_codec
from petalfl.model import Block
from petalfl.payloads import EncodedDelta, parse_payload
from petalfl.vectors import Vector
from server.aggregators import parse_aggregator
from server.reducer import choose, parse_reducer, use

if TYPE_CHECKING:
    import torch

FLOWER = Path(__file__).parent / "contenders" / "flower_rules.py"
FLOWERS = {"median": "median", "trimmed-mean:0.1": "trimmed-mean", "multi-krum": "multi-krum"}
NOTES = """\
Wall: median, least and most of the repeats; CPU: the least, of all threads together, which other
work on the machine changes little. Ratios: to the same row of petalfl in f32. Memory: the most that
was resident on the host while the rule ran beyond what was before; the updates are not in it. By
examples: no two weights are equal."""


@dataclass(frozen=True, slots=True)
class Row:
    """One contender's way with one rule; ``updates`` as the updates are stored."""

    rule: str
    contender: str
    updates: str
    num_updates: int
    size: int
    wall_s: float
    least_s: float
    most_s: float
    cpu_s: float
    peak_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    with use(choose(options.reducer)) as backend:
        rows = measure_all(options)
    if options.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return 0
    head = f"{options.updates} updates of {options.size:,} values"
    if options.rows:
        head += f"; canonical: of {options.rows} x {options.columns}"
    head += f". Reducer: {backend.name} ({backend.description})."
    packages = ("numpy", "torch") if options.svd or options.device != "cpu" else ("numpy",)
    parts = [report(rows, is_markdown=options.markdown), head, NOTES, describe_machine(*packages)]
    print("\n\n".join(parts))
    return 0


def measure_all(options: argparse.Namespace) -> list[Row]:
    """Rows of all that is asked for."""
    rows = rank_and_distance_rows(
        options.updates, options.size, options.repeats, options.flower_python
    )
    if options.rows:
        device = options.device if options.svd else None
        rows += matrix_rows(options.updates, options.rows, options.columns, svd=device)
    if options.device != "cpu":
        rows += resident_rows(options.updates, options.size, options.repeats, options.device)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reducer_rules",
        description="Time and memory of the rules over all updates, next to others' own.",
    )
    add = parser.add_argument
    add("--updates", type=int, default=100, metavar="N", help="default 100")
    add("--size", type=int, default=1_000_000, metavar="P", help="default 1000000")
    add("--rows", type=int, default=4096, metavar="M", help="of the merged matrix, default 4096; "
        "0: none")  # fmt: skip
    add("--columns", type=int, default=1024, metavar="N", help="default 1024")
    add("--repeats", type=int, default=5, metavar="N", help="default 5")
    add("--reducer", type=parse_reducer, default="auto", help="as of the server; default auto")
    add("--device", default="cpu", help="of torch, for the SVD, and if not cpu for median and "
        "trimmed mean of updates that lie there; default cpu")  # fmt: skip
    add("--flower-python", type=Path, metavar="PATH",
        help="a Python with flwr; without it Flower is left out")  # fmt: skip
    add("--svd", action="store_true", help="next to canonical, torch's SVD; takes minutes")
    add("--json", action="store_true", help="print JSON lines instead of a table")
    add("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def rank_and_distance_rows(
    num_updates: int, size: int, repeats: int, flower: Path | None
) -> list[Row]:
    """Rows of the rules that go by coordinates and by distances."""
    block = matrix_block(1, size)
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal(size, np.float32) for _ in range(num_updates)]
    stored = {codec: encode(block, vectors, codec) for codec in ("f32", "int8")}
    del vectors
    equal, unequal = [1.0] * num_updates, [float(k + 1) for k in range(num_updates)]
    krum = f"multi-krum:{num_updates // 10}"
    cases = [
        ("median", "median", equal),
        ("trimmed-mean:0.1", "trimmed-mean:0.1", equal),
        ("trimmed-mean:0.1 by examples", "trimmed-mean:0.1", unequal),
        ("multi-krum", krum, equal),
        ("geometric-median", "geometric-median", equal),
    ]
    rows = []
    for name, rule, weights in cases:
        for codec, deltas in stored.items():
            finalize = aggregation(rule, block, deltas, weights)
            rows.append(measure(name, "petalfl", codec, num_updates, size, repeats, finalize))
        if flower is not None and name in FLOWERS:
            rows.append(measure_flower(flower, name, num_updates, size, repeats))
    return rows


def resident_rows(num_updates: int, size: int, repeats: int, device: str) -> list[Row]:
    """Rows of values that lie on a device of torch, next to its own ways with them."""
    import torch  # here alone, for it takes seconds

    from server.reducer.rules import torch_rules

    values = torch.randn((num_updates, size), device=device)
    weights = torch.ones(num_updates, dtype=torch.float64, device=device)
    cut, rows = num_updates // 10, []
    cases: list[tuple[str, str, Callable[[], torch.Tensor]]] = [
        ("median", "petalfl", lambda: torch_rules.median(values)),
        ("median", "torch median", lambda: values.median(dim=0).values),
        ("median", "torch sort", lambda: values.sort(dim=0).values[num_updates // 2]),
        ("trimmed-mean:0.1", "petalfl", lambda: torch_rules.trimmed_mean(values, weights, cut)),
        ("trimmed-mean:0.1", "torch sort", lambda: values.sort(0).values[cut:-cut].mean(dim=0)),
    ]
    for rule, contender, kernel in cases:
        wait = partial(_wait, kernel)
        wait()  # compiles it
        rows.append(
            measure(f"{rule} on {device}", contender, "f32", num_updates, size, repeats, wait)
        )
    return rows


def _wait(kernel: Callable[[], torch.Tensor]) -> float:
    return kernel()[0].item()


def matrix_rows(
    num_updates: int, num_rows: int, num_columns: int, *, svd: str | None = None
) -> list[Row]:
    """Rows of `canonical`, and of the SVD that its formulas suggest on a device of torch."""
    rng, block = np.random.default_rng(0), matrix_block(num_rows, num_columns)
    falling = (0.97 ** np.arange(num_columns)).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((num_columns, num_columns)))[0].astype(np.float32)
    vectors: list[Vector] = [
        np.ravel(rng.standard_normal((num_rows, num_columns), np.float32) * falling @ turn)
        for _ in range(num_updates)
    ]
    rows = []
    for codec in ("f32", "int8"):
        deltas = encode(block, vectors, codec)
        finalize = aggregation("canonical", block, deltas, [1.0] * num_updates)
        rows.append(measure("canonical", "petalfl", codec, num_updates, block.size, 1, finalize))
        del deltas, finalize
    if svd is not None:
        side_by_side = np.concatenate([v.reshape(num_rows, num_columns).T for v in vectors], axis=1)
        del vectors
        rows.append(measure("canonical", "torch SVD", "f32", num_updates, block.size, 1,
                            lambda: _svd(side_by_side, svd)))  # fmt: skip
    return rows


def _svd(side_by_side: Vector, device: str) -> object:
    import torch

    found = torch.linalg.svd(torch.from_numpy(side_by_side).to(device), full_matrices=False)
    return found.S[0].item()


def encode(block: Block, vectors: Sequence[Vector], codec: str) -> list[EncodedDelta]:
    """The updates as a server has them: checked, their norms known."""
    rng, known, deltas = np.random.default_rng(0), parse_codec(codec), []
    for vector in vectors:
        deltas.append(parse_payload(known, block, known.encode(vector, rng)))
        assert deltas[-1].norm > 0
    return deltas


def aggregation(
    rule: str, block: Block, deltas: Sequence[EncodedDelta], weights: Sequence[float]
) -> Callable[[], object]:
    """The end of a round: all updates are there."""
    aggregator = parse_aggregator(rule)
    state = aggregator.init(block)
    for delta, weight in zip(deltas, weights, strict=True):
        state = aggregator.accumulate(state, delta, weight)
    return lambda: aggregator.finalize(state)


def measure(
    rule: str, contender: str, updates: str, num_updates: int, size: int, repeats: int,
    function: Callable[[], object],
) -> Row:  # fmt: skip
    """A row of it."""
    _say(f"{rule}: {contender}, {updates}")
    wall_s, cpu_s = [], []

    def run() -> None:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        function()
        wall_s.append(time.perf_counter() - start_s)
        cpu_s.append(time.process_time() - start_cpu_s)

    peak = peak_bytes(run)
    for _ in range(repeats - 1):
        run()
    return Row(rule, contender, updates, num_updates, size, float(np.median(wall_s)), min(wall_s),
               max(wall_s), min(cpu_s), peak)  # fmt: skip


def measure_flower(python: Path, rule: str, num_updates: int, size: int, repeats: int) -> Row:
    """The same of Flower, in a process of its own environment."""
    _say(f"{rule}: Flower")
    command = [python, FLOWER, FLOWERS[rule], num_updates, size, repeats]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"Flower failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Row(rule, f"Flower {found['version']}", "f32", num_updates, size,
               float(np.median(found["wall_s"])), min(found["wall_s"]), max(found["wall_s"]),
               min(found["cpu_s"]), found["peak_bytes"])  # fmt: skip


def report(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """The table."""
    ours = {row.rule: row for row in rows if (row.contender, row.updates) == ("petalfl", "f32")}
    header = ("rule", "contender", "updates", "wall s", "ratio", "CPU s", "ratio", "memory MB")
    cells = [
        (r.rule, r.contender, r.updates, f"{r.wall_s:.2f} ({r.least_s:.2f}-{r.most_s:.2f})",
         f"{r.wall_s / ours[r.rule].wall_s:.1f}", f"{r.cpu_s:.2f}",
         f"{r.cpu_s / ours[r.rule].cpu_s:.1f}", f"{r.peak_bytes / 1e6:.0f}")
        for r in rows
    ]  # fmt: skip
    return table([header, *cells], is_markdown)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
