"""What a device spends besides training: start, memory, disk, threads, CPU when idle and per round.

`python -m benchmarks.bench_device [--stock-python .venv-stock/bin/python] [--markdown]`. Starts the
real server with its broker and two devices, each a process (`benchmarks.device_process`) on one
wrist of the watch recordings. The first waits alone, for the server wants two; then the second
joins and they train. The first is looked at from outside, through /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.bench_server import RunningServer, running_server
from benchmarks.machine import describe_machine
from examples.android_sim.data import watch_devices
from petalfl.http import HttpClient

ROOT = Path(__file__).parents[1]
# With bytecode on disk, as installed packages have it.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
TIMEOUT_S = 120.0
SETTLE_S = 2.0
MB = 1e-6

BARE = "pass"
STATEMENTS = (
    BARE,
    "import numpy",
    "import petalfl",
    "from petalfl import EdgeClient",
    "from petalfl import EdgeClient; import onnxruntime",
)
FLOWER_STATEMENTS = (BARE, "from flwr.clientapp import ClientApp")

NOTES = """\
Every statement in fresh interpreters, in turns: wall time from the start of the process to its
end, and CPU time of all its threads; over bare: less those of `pass`. MB: resident memory behind
it. torch is hidden from all: onnxruntime-training imports it if it can.
Idle and peak (VmHWM): resident memory of a device that waits for a task, and the most up to the
end; the arrays that it trains on (data) are in both. Idle CPU and switches to another process: of
all its threads. Round: from one training to the next, with download, upload and waiting for the
other device; its CPU seconds stand for energy. Store: what the device keeps on disk at the end.
Medians; in brackets least and most of all repeats, or of all their rounds."""


@dataclass(frozen=True, slots=True)
class Start:
    """A statement in fresh interpreters.

    Attributes:
        wall_s: Of each, in the order run, as are ``cpu_s`` and ``resident_bytes``.
    """

    environment: str
    statement: str
    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    resident_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed there, in bytes; see `benchmarks.device_process.describe`."""

    runtime: str
    python: str
    petalfl_bytes: int
    dependencies_bytes: int
    runtime_bytes: int
    more_bytes: int


@dataclass(frozen=True, slots=True)
class Life:
    """One device from its enrollment to the last round.

    Attributes:
        idle_cpu_s: Per second of waiting, as is ``idle_switches``.
        round_cpu_s: Of each round, as is ``round_s`` by the clock.
    """

    runtime: str
    data_bytes: int
    idle_bytes: int
    idle_threads: int
    idle_cpu_s: float
    idle_switches: float
    peak_bytes: int
    training_threads: int
    round_cpu_s: tuple[float, ...]
    round_s: tuple[float, ...]
    store_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    pythons = [Path(sys.executable), *([options.stock_python] if options.stock_python else [])]
    environments = [describe(python) for python in pythons]
    starts = [
        start
        for python, environment in zip(pythons, environments, strict=True)
        for start in measure_starts(python, environment.runtime, STATEMENTS, options.starts)
    ]
    if options.flower_python:
        starts += measure_starts(options.flower_python, "Flower", FLOWER_STATEMENTS, options.starts)
    with tempfile.TemporaryDirectory(prefix="bench-device-") as name:
        artifacts = options.artifacts or _export(Path(name) / "artifacts")
        lives = []
        for repeat in range(options.repeats):  # in turns, so that noise hits all alike
            for i, python in enumerate(pythons):
                _say(f"{environments[i].runtime}: run {repeat + 1}")
                folder = Path(name) / f"{i}-{repeat}"
                folder.mkdir()
                (folder / "artifacts").symlink_to(artifacts.resolve())
                runtime = environments[i].runtime
                lives.append(live(python, runtime, folder, options.rounds, options.idle))
    if options.json:
        rows: list[Environment | Start | Life] = [*environments, *starts, *lives]
        for row in rows:
            print(json.dumps({"kind": type(row).__name__.lower(), **dataclasses.asdict(row)}))
    else:
        print(report(environments, starts, lives, is_markdown=options.markdown))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_device",
        description="Start, memory, disk, threads and CPU of a device, idle and in training.",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=6, metavar="N", help="of the federation, default 6")
    add("--idle", type=float, default=15.0, metavar="S",
        help="seconds of waiting that are measured, default 15")  # fmt: skip
    add("--starts", type=int, default=20, metavar="N",
        help="fresh interpreters for each statement, default 20")  # fmt: skip
    add("--repeats", type=int, default=2, metavar="N", help="federations, default 2")
    add("--artifacts", type=Path, metavar="PATH",
        help="those of the watch model; without it they are exported first")  # fmt: skip
    add("--stock-python", type=Path, metavar="PATH",
        help="a Python with petalfl and stock onnxruntime, as `make stock` makes it")  # fmt: skip
    add("--flower-python", type=Path, metavar="PATH",
        help="a Python with flwr, for the time that its client takes to import")  # fmt: skip
    add("--json", action="store_true", help="print JSON lines instead of tables")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    return parser


def _export(folder: Path) -> Path:
    from export import export_model
    from export.models import har

    _say("exporting the watch model")
    export_model(har.watch(0), folder)
    return folder


def describe(python: Path) -> Environment:
    """What is installed for that interpreter."""
    command = [str(python), "-m", "benchmarks.device_process"]
    printed = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    return Environment(**json.loads(printed.stdout))


# Starts


def measure_starts(
    python: Path, environment: str, statements: Sequence[str], num_starts: int
) -> list[Start]:
    """Every statement in ``num_starts`` interpreters, after one that fills the caches."""
    seen: dict[str, list[tuple[float, float, int]]] = {statement: [] for statement in statements}
    for turn in range(num_starts + 1):
        for statement in statements:
            figures = _start(python, statement)
            if turn:
                seen[statement].append(figures)
    rows = []
    for statement, runs in seen.items():
        wall_s, cpu_s, resident_bytes = zip(*runs, strict=True)
        rows.append(Start(environment, statement, wall_s, cpu_s, resident_bytes))
    return rows


def _start(python: Path, statement: str) -> tuple[float, float, int]:
    code = (
        f"import sys; sys.modules['torch'] = None\n{statement}\n"
        "print(open('/proc/self/status').read())"
    )
    cpu_s = -_children_cpu_s()
    start_s = time.perf_counter()
    process = subprocess.run(
        [python, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    wall_s = time.perf_counter() - start_s
    cpu_s += _children_cpu_s()
    return wall_s, cpu_s, parse_status(process.stdout)["VmRSS"]


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)  # those that have ended
    return usage.ru_utime + usage.ru_stime


# A device's life


def live(python: Path, runtime: str, folder: Path, num_rounds: int, idle_s: float) -> Life:
    """Runs a federation of two devices and looks at the first.

    Args:
        folder: Holds ``artifacts``; server and devices keep their data there.
    """
    names = [_write_data(folder, index) for index in range(2)]
    arguments = ("--broker", "embedded", "--scheme", "phf", "--min-devices", "2",
                 "--rounds", str(num_rounds), "--log-level", "warning")  # fmt: skip
    with (
        running_server(folder, *arguments) as server,
        _device(python, server, names[0], folder) as watched,
    ):
        pid = watched.pid
        _wait_until_ready(server, names[0], watched)
        before_s, cpu_s, switches = time.monotonic(), *_spent(pid)
        time.sleep(idle_s)
        idle = parse_status(Path(f"/proc/{pid}/status").read_text())
        waited_s = time.monotonic() - before_s
        idle_cpu_s, idle_switches = (
            b - a for a, b in zip((cpu_s, switches), _spent(pid), strict=True)
        )
        with _device(python, server, names[1], folder):
            at_s, used_s, threads = _watch_rounds(watched, num_rounds)
        after = parse_status(Path(f"/proc/{pid}/status").read_text())
    store = [path for path in (folder / names[0]).rglob("*") if path.is_file()]
    return Life(
        runtime=runtime,
        data_bytes=_data_bytes(folder / f"{names[0]}.npz"),
        idle_bytes=idle["VmRSS"],
        idle_threads=idle["Threads"],
        idle_cpu_s=idle_cpu_s / waited_s,
        idle_switches=idle_switches / waited_s,
        peak_bytes=after["VmHWM"],
        training_threads=threads,
        round_cpu_s=tuple(float(s) for s in np.diff(used_s)),
        round_s=tuple(float(s) for s in np.diff(at_s)),
        store_bytes=sum(path.stat().st_size for path in store),
    )


def _write_data(folder: Path, index: int) -> str:
    device = watch_devices()[index]
    arrays: dict[str, Any] = {"labels": device.train.labels, **device.train.inputs}
    np.savez(folder / f"{device.name}.npz", **arrays)
    return device.name


def _data_bytes(path: Path) -> int:
    with np.load(path) as file:
        return sum(array.nbytes for array in dict(file).values())


@contextlib.contextmanager
def _device(
    python: Path, server: RunningServer, name: str, folder: Path
) -> Iterator[subprocess.Popen[str]]:
    """The process of a device; is killed where it takes too long or something else fails."""
    who = (server.url, server.token, name, str(folder))
    command = [str(python), "-m", "benchmarks.device_process", *who]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        watchdog = threading.Timer(TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            yield process
            process.communicate()
        finally:
            watchdog.cancel()
            process.kill()


def _wait_until_ready(server: RunningServer, name: str, process: subprocess.Popen[str]) -> None:
    http = HttpClient(server.url)
    http.use_token(server.token)
    while not http.get_json("/v1/default/devices").get(name, {}).get("is_ready"):
        if process.poll() is not None:
            raise RuntimeError(f"the device {name} ended with code {process.returncode}")
        time.sleep(0.1)
    time.sleep(SETTLE_S)


def _watch_rounds(
    process: subprocess.Popen[str], num_rounds: int
) -> tuple[list[float], list[float], int]:
    """The clock and the CPU seconds used before each training and at the end; the most threads."""
    assert process.stdout is not None
    at_s, used_s, threads = [], [], 0
    for expected in (*(f"round {i + 1}" for i in range(num_rounds)), "done"):
        line = process.stdout.readline().strip()
        if line != expected:
            raise RuntimeError(f"the device printed {line!r}, expected {expected!r}")
        at_s.append(time.monotonic())
        used_s.append(_cpu_s(process.pid))
        status = parse_status(Path(f"/proc/{process.pid}/status").read_text())
        threads = max(threads, status["Threads"])
    return at_s, used_s, threads


def parse_status(text: str) -> dict[str, int]:
    """The numbers in ``/proc/PID/status``, kB as bytes; what holds no single number is left out."""
    found = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdecimal() and words[1:] in ([], ["kB"]):
            found[key] = int(words[0]) * (1024 if words[1:] else 1)
    return found


def _cpu_s(pid: int) -> float:
    """All threads, also those that have ended; in steps of a clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _spent(pid: int) -> tuple[float, int]:
    """CPU seconds of the threads that live, to the nanosecond, and how often they gave way."""
    cpu_ns = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_ns += int((task / "schedstat").read_text().split()[0])
        status = parse_status((task / "status").read_text())
        switches += status["voluntary_ctxt_switches"] + status["nonvoluntary_ctxt_switches"]
    return 1e-9 * cpu_ns, switches


# The tables


def report(
    environments: Sequence[Environment],
    starts: Sequence[Start],
    lives: Sequence[Life],
    *,
    is_markdown: bool,
) -> str:
    """All tables, what they count, and the machine."""
    tables = (start_cells(starts), life_cells(lives), environment_cells(environments))
    parts = [_table(cells, is_markdown=is_markdown) for cells in tables]
    return "\n\n".join((*parts, NOTES, describe_machine()))


def start_cells(starts: Sequence[Start]) -> list[tuple[str, ...]]:
    """Each statement's medians, and what they are over those of the bare interpreter."""
    bare = {start.environment: start for start in starts if start.statement == BARE}
    cells = [("", "statement", "wall ms", "p10-p90", "over bare", "CPU ms", "over bare", "MB")]
    for start in starts:
        base = bare[start.environment]
        wall_ms, cpu_ms = (1e3 * median(s) for s in (start.wall_s, start.cpu_s))
        low, high = (1e3 * float(q) for q in np.quantile(start.wall_s, (0.1, 0.9)))
        cells.append((
            start.environment,
            f"`{start.statement}`",
            f"{wall_ms:.0f}",
            f"{low:.0f}-{high:.0f}",
            str(round(wall_ms - 1e3 * median(base.wall_s))),
            f"{cpu_ms:.0f}",
            str(round(cpu_ms - 1e3 * median(base.cpu_s))),
            f"{MB * median(start.resident_bytes):.0f}",
        ))  # fmt: skip
    return [*cells, ("aim", "`import petalfl`", "", "", "150", "", "", "")]


def life_cells(lives: Sequence[Life]) -> list[tuple[str, ...]]:
    """By runtime the median over all repeats, with least and most."""
    cells = [("", "idle MB", "peak MB", "data MB", "threads idle", "in training", "idle CPU %",
              "idle switches/s", "round CPU s", "round s", "store MB")]  # fmt: skip
    for runtime in dict.fromkeys(life.runtime for life in lives):
        own = [life for life in lives if life.runtime == runtime]
        cells.append((
            runtime,
            _spread([MB * life.idle_bytes for life in own], 1),
            _spread([MB * life.peak_bytes for life in own], 1),
            _spread([MB * life.data_bytes for life in own], 2),
            _spread([life.idle_threads for life in own], 0),
            _spread([life.training_threads for life in own], 0),
            _spread([100 * life.idle_cpu_s for life in own], 3),
            _spread([life.idle_switches for life in own], 1),
            _spread([s for life in own for s in life.round_cpu_s], 2),
            _spread([s for life in own for s in life.round_s], 2),
            _spread([MB * life.store_bytes for life in own], 2),
        ))  # fmt: skip
    return [*cells, ("aim", "", "120", "", "", "", "0", "", "", "", "")]


def environment_cells(environments: Sequence[Environment]) -> list[tuple[str, ...]]:
    """What is installed, in MB."""
    header = ("", "Python", "petalfl MB", "numpy, msgpack, paho MB", "runtime MB",
              "what it requires MB")  # fmt: skip
    return [
        header,
        *(
            (e.runtime, e.python, f"{MB * e.petalfl_bytes:.2f}", f"{MB * e.dependencies_bytes:.0f}",
             f"{MB * e.runtime_bytes:.0f}", f"{MB * e.more_bytes:.0f}")
            for e in environments
        ),
    ]  # fmt: skip


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def _table(cells: Sequence[tuple[str, ...]], *, is_markdown: bool) -> str:
    if is_markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        lines.insert(1, "|---" * 2 + "|" + "--:|" * (len(cells[0]) - 2))
    else:
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
