"""What every codec costs and saves: MB/s on one core, bytes, and what arrives.

`python -m benchmarks.bench_codec [--codecs f32,int8,…] [--repeats N] [--markdown | --json]`. The
vectors are deltas of the watch model: a few devices train a few rounds in the run, as a federation
would have them. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.codec_report import Row, report
from examples.android_sim.data import watch_devices
from export import export_model
from export.models import har
from petalfl.codecs import Codec, parse_codec
from petalfl.engine import OrtEngine
from petalfl.local_data import ArrayData
from petalfl.model import ModelManifest, read_artifact
from petalfl.training import Hyperparameters, train
from petalfl.vectors import Vector, from_bytes

CODECS = ("f32", "f16", "bf16", "int8", "topk:0.1", "topk:0.01", "topk-int8:0.25", "topk-int8:0.1",
          "topk-int8:0.01")  # fmt: skip
SEED = 0
NUM_DEVICES = 4
LEARNING_RATE = 0.05
NUM_DRAWS = 50  # that the bias is measured over


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    _say(f"training {NUM_DEVICES} devices, {options.rounds} rounds")
    deltas = train_deltas(options.rounds)
    vector = np.resize(np.concatenate(deltas), options.size)
    rows = [memcpy_row(vector, options.repeats)]
    for name in options.codecs:
        _say(name)
        rows.append(codec_row(parse_codec(name), vector, deltas, options.repeats))
    if options.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return 0
    lengths = [delta.size for delta in deltas]
    head = (
        f"{vector.size:,} float32 to time; {len(deltas)} deltas of {min(lengths):,} to "
        f"{max(lengths):,} parameters after {options.rounds} rounds to weigh."
    )
    print(report(rows, head, is_markdown=options.markdown))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_codec",
        description="Speed, size and error of every codec on deltas of the watch model.",
    )
    parser.add_argument("--codecs", type=lambda text: text.split(","), default=[*CODECS],
                        metavar="NAME,…", help=f"default {','.join(CODECS)}")  # fmt: skip
    parser.add_argument("--size", type=int, default=1 << 20, metavar="N",
                        help="values to time, default 1048576")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=8, metavar="R",
                        help="of training, whose last deltas are taken, default 8")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def train_deltas(num_rounds: int) -> list[Vector]:
    """Every device's delta of every block in the last of some rounds of plain averaging."""
    with tempfile.TemporaryDirectory(prefix="bench-codec-") as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        manifest = export_model(har.watch(SEED), folder)
        parameters: Mapping[str, Vector] = {
            b.name: from_bytes(read_artifact(folder, b.artifacts.parameters), b.size)
            for b in manifest.blocks
        }
        engine = OrtEngine(folder)
        for round_num in range(num_rounds):
            deltas = _train_round(engine, manifest, parameters, round_num)
            parameters = {
                block: base + np.mean([d[block] for d in deltas], axis=0)
                for block, base in parameters.items()
            }
    return [delta for device in deltas for delta in device.values()]


def _train_round(
    engine: OrtEngine, manifest: ModelManifest, base: Mapping[str, Vector], round_num: int
) -> list[dict[str, Vector]]:
    deltas = []
    for index, device in enumerate(watch_devices()[:NUM_DEVICES]):
        rng = np.random.default_rng([SEED, round_num, index])
        trained = train(
            engine, manifest, base,
            ArrayData(device.train.inputs, {"head": device.train.labels}),
            Hyperparameters(LEARNING_RATE), rng,
        ).parameters  # fmt: skip
        deltas.append({block: trained[block] - base[block] for block in trained})
    return deltas


def memcpy_row(vector: Vector, repeats: int) -> Row:
    """The limit: a copy there and a copy back."""
    target = np.empty_like(vector)
    times = _times(lambda: np.copyto(target, vector), repeats)
    return _row("memcpy", vector, times, times)


def codec_row(codec: Codec, vector: Vector, deltas: Sequence[Vector], repeats: int) -> Row:
    """Speed on one long vector, size and error on the deltas."""
    rng = np.random.default_rng(SEED)
    payload = codec.encode(vector, rng)
    row = _row(
        codec.name, vector,
        _times(lambda: codec.encode(vector, rng), repeats),
        _times(lambda: codec.decode(payload, vector.size), repeats),
    )  # fmt: skip
    payloads = [codec.encode(delta, rng) for delta in deltas]
    num_bytes = sum(map(len, payloads))
    return dataclasses.replace(
        row,
        ratio=sum(4 * delta.size for delta in deltas) / num_bytes,
        zlib_ratio=num_bytes / sum(len(zlib.compress(payload, 1)) for payload in payloads),
        error=float(np.median([_error(codec, delta, rng, 1) for delta in deltas])),
        mean_error=float(np.median([_error(codec, delta, rng, NUM_DRAWS) for delta in deltas])),
    )


def _error(codec: Codec, delta: Vector, rng: np.random.Generator, num_draws: int) -> float:
    """Relative Euclidean norm of what the mean of some encodings of one delta is off by."""
    total = np.zeros(delta.size)
    for _ in range(num_draws):
        total += codec.decode(codec.encode(delta, rng), delta.size)
    return float(np.linalg.norm(total / num_draws - delta) / np.linalg.norm(delta))


def _times(function: Callable[[], object], repeats: int) -> NDArray[np.float64]:
    function()
    times = np.empty(repeats)
    for index in range(repeats):
        start_s = time.thread_time()
        function()
        times[index] = time.thread_time() - start_s
    return times


def _row(
    name: str, vector: Vector, encode: NDArray[np.float64], decode: NDArray[np.float64]
) -> Row:
    def speeds(times: NDArray[np.float64]) -> tuple[float, float, float]:
        p10, median, p90 = (vector.nbytes / 1e6 / q for q in np.quantile(times, (0.9, 0.5, 0.1)))
        return float(p10), float(median), float(p90)

    return Row(name, speeds(encode), speeds(decode), speeds(encode + decode))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
