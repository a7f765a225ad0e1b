"""The real server under the load of many light devices, over a real broker, durability on.

`python -m benchmarks.bench_server [--clients 50,200,1000] [--parameters 100000]`. Server, broker
and all devices (`benchmarks.light_clients`, in this process) share the machine. Next to it, if
``--flower-python`` names a Python that has `flwr[simulation]`, Flower's simulation with clients
that do as little. How to make that environment: `benchmarks/contenders/flower_numpy.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.light_clients import LightClient, open_fleet, random_payload
from benchmarks.machine import describe_machine
from petalfl.model import Modality
from server.memory import keep_freed_memory
from tests.mosquitto import missing_mosquitto, mosquitto
from tests.server.builders import write_artifacts

ROOT = Path(__file__).parents[1]
FLOWER = Path(__file__).parent / "contenders" / "flower_numpy.py"
BLOCK = "encoder-acc"
MIN_UPDATES = 1000  # in a run: small fleets take more rounds
START_TIMEOUT_S = 60.0
NOTES = """\
Updates/s: accepted updates from the first task received to the last receipt, all rounds with their
closing included; MB/s of their payloads. p50 and p99: from a device handing its last chunk to the
transport to the receipt, which follows the commit to disk; all devices send at once: it is mostly
their queue. CPU: milliseconds of the server's process per update; of broker and devices beside it.
Memory: the most that was resident, of the server and of the broker."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run of one contender.

    Attributes:
        refused: Why there are no figures, or None.
        latency_p50_s: From a device's last chunk to its receipt, as is ``latency_p99_s``.
        cpu_s: Of the server, per update, as are ``broker_cpu_s`` and ``devices_cpu_s``.
        peak_bytes: The most of the server that was resident; ``broker_peak_bytes`` of the broker.
    """

    contender: str
    num_clients: int
    num_parameters: int
    num_rounds: int
    codec: str = "f32"
    refused: str | None = None
    updates_per_s: float | None = None
    mb_per_s: float | None = None
    latency_p50_s: float | None = None
    latency_p99_s: float | None = None
    cpu_s: float | None = None
    broker_cpu_s: float | None = None
    devices_cpu_s: float | None = None
    peak_bytes: int | None = None
    broker_peak_bytes: int | None = None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()  # as the server does
    rows: list[Row] = []
    for num_clients in options.clients:
        for repeat in range(options.repeats):
            num_rounds = options.rounds or max(2, -(-MIN_UPDATES // num_clients))
            _say(f"petalfl: {num_clients} clients, {num_rounds} rounds, run {repeat + 1}")
            for codec in options.codecs:
                run = Row(f"petalfl, {options.broker}", num_clients, options.parameters,
                          num_rounds, codec)  # fmt: skip
                rows.append(measure(run, options.broker))
    if options.flower_python is not None:
        for repeat in range(options.repeats):
            _say(f"Flower: 50 clients, 20 rounds, run {repeat + 1}")
            rows.append(measure_flower(options.flower_python, 50, options.parameters, 20))
    if options.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
    else:
        print(report(rows, is_markdown=options.markdown))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_server",
        description="Accepted updates per second, latency, CPU and memory of the server.",
    )
    add = parser.add_argument
    add("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[50, 200, 1000],
        metavar="N,…", help="fleet sizes, default 50,200,1000")  # fmt: skip
    add("--parameters", type=int, default=100_000, metavar="P",
        help="of the one shared block, default 100000")  # fmt: skip
    add("--rounds", type=int, default=0, metavar="N",
        help=f"default: as many as make {MIN_UPDATES} updates, but at least 2")  # fmt: skip
    add("--repeats", type=int, default=1, metavar="N", help="runs of each size, default 1")
    add("--codecs", type=lambda text: text.split(","), default=["f32"], metavar="NAME,…",
        help="of the updates, default f32")  # fmt: skip
    add("--broker", choices=("mosquitto", "embedded"), default="mosquitto")
    add("--flower-python", type=Path, metavar="PATH",
        help='a Python with "flwr[simulation]"; without it Flower is left out')  # fmt: skip
    add("--json", action="store_true", help="print JSON lines instead of a table")
    add("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def measure(blank: Row, broker: str) -> Row:
    """One fleet on a server of its own: the row with its figures."""
    num_clients, num_rounds = blank.num_clients, blank.num_rounds
    if broker == "mosquitto" and (reason := missing_mosquitto()):
        return dataclasses.replace(blank, refused=reason)
    with tempfile.TemporaryDirectory(prefix="bench-server-") as name, ExitStack() as stack:
        folder = Path(name)
        layout = {
            BLOCK: ("encoder", ("acc",), {"weight": (blank.num_parameters,)}),
            "head": ("head", (BLOCK,), {"weight": (2,)}),
        }
        write_artifacts(folder / "artifacts", layout, modalities={"acc": Modality((4, 2))})
        spec = stack.enter_context(mosquitto(folder)) if broker == "mosquitto" else "embedded"
        server = stack.enter_context(
            running_server(
                folder,
                "--broker",
                spec,
                "--scheme",
                "ph",
                "--rounds",
                str(num_rounds),
                "--min-devices",
                str(num_clients),
                "--log-level",
                "warning",
            )
        )
        others = _children_of(os.getpid()) - {server.pid} | _children_of(server.pid)
        before = {pid: _cpu_s(pid) for pid in (server.pid, *others)}
        fleet, devices_cpu_s = asyncio.run(
            _drive(server, [f"device-{i}" for i in range(num_clients)], blank)
        )
        spent = {pid: _cpu_s(pid) - cpu_s for pid, cpu_s in before.items()}
        accepted = sum(len(client.latencies_s) for client in fleet)
        assert accepted == num_clients * num_rounds, f"{accepted} updates were accepted"
        latencies = [latency for client in fleet for latency in client.latencies_s]
        seconds = max(c.last_receipt_s for c in fleet) - min(c.first_task_s for c in fleet)
        return dataclasses.replace(
            blank,
            updates_per_s=accepted / seconds,
            mb_per_s=1e-6 * _num_bytes(blank) * accepted / seconds,
            latency_p50_s=float(np.quantile(latencies, 0.5)),
            latency_p99_s=float(np.quantile(latencies, 0.99)),
            cpu_s=spent[server.pid] / accepted,
            broker_cpu_s=sum(spent[pid] for pid in others) / accepted,
            devices_cpu_s=devices_cpu_s / accepted,
            peak_bytes=_peak_bytes(server.pid),
            broker_peak_bytes=sum(_peak_bytes(pid) for pid in others),
        )


def _num_bytes(run: Row) -> int:
    payload, _ = random_payload(run.num_parameters, run.codec)("", 1, BLOCK)
    return len(payload)


async def _drive(
    server: RunningServer, devices: Sequence[str], blank: Row
) -> tuple[list[LightClient], float]:
    """Brings all devices to the start, then lets them run; they and their CPU seconds."""
    fleet = await open_fleet(
        server.url,
        server.token,
        "default",
        devices,
        ["acc"],
        random_payload(blank.num_parameters, blank.codec),
        blank.codec,
    )
    _say("  all are connected")
    start_s = time.process_time()
    runs = [asyncio.create_task(client.run()) for client in fleet]
    for client in fleet:
        await client.announce(["acc"], ["head"])
    await asyncio.gather(*runs)
    spent_s = time.process_time() - start_s
    for client in fleet:
        await client.close()
    return fleet, spent_s


@dataclass(frozen=True, slots=True)
class RunningServer:
    """Where a started server is."""

    pid: int
    url: str
    token: str


@contextmanager
def running_server(folder: Path, *arguments: str) -> Iterator[RunningServer]:
    """`python -m server` on ``folder/artifacts`` and ``folder/data``."""
    data_dir, token = folder / "data", secrets.token_hex(8)
    command = [
        sys.executable, "-m", "server", "--artifacts", str(folder / "artifacts"),
        "--data-dir", str(data_dir), "--http", "127.0.0.1:0", "--token", token, *arguments,
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while not (data_dir / "server.json").exists():
            if process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"no server: {(folder / 'server.log').read_text()}")
            time.sleep(0.05)
        url = json.loads((data_dir / "server.json").read_bytes())["url"]
        yield RunningServer(process.pid, url, token)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def measure_flower(python: Path, num_clients: int, num_parameters: int, num_rounds: int) -> Row:
    """Flower's simulation, in a process of its own environment."""
    blank = Row("Flower simulation", num_clients, num_parameters, num_rounds)
    numbers = (num_clients, num_parameters, num_rounds)
    try:
        process = subprocess.run(
            [str(python), str(FLOWER), *map(str, numbers)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return dataclasses.replace(blank, refused=f"{type(error).__name__}: {error}")
    lines = process.stdout.strip().splitlines() or [""]
    if process.returncode:
        return dataclasses.replace(blank, refused=lines[-1][:160])
    found = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    return dataclasses.replace(
        blank,
        contender=f"Flower {found['version']} simulation",
        updates_per_s=found["updates_per_s"],
        mb_per_s=4e-6 * num_parameters * found["updates_per_s"],
    )


# Processes and the machine


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _children_of(pid: int) -> set[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return {int(child) for child in text.split()}


def machine_limits(folder: Path) -> str:
    """What disk and memory do at best, in one line."""
    blob = np.random.default_rng(0).bytes(400_000)
    with (folder / "probe").open("wb", buffering=0) as file:
        start_s = time.perf_counter()
        for _ in range(40):
            for _ in range(10):
                file.write(blob)
            os.fdatasync(file.fileno())
        append_mb = 400 * len(blob) / (time.perf_counter() - start_s) / 1e6
        start_s = time.perf_counter()
        for _ in range(200):
            file.write(b"x")
            os.fdatasync(file.fileno())
        syncs = 200 / (time.perf_counter() - start_s)
    (folder / "probe").unlink()
    source, target = bytes(100_000_000), bytearray(100_000_000)
    target[:] = source  # whose pages exist from here on
    start_s = time.perf_counter()
    target[:] = source
    copy_gb = 0.1 / (time.perf_counter() - start_s)
    start_s = time.perf_counter()
    for _ in range(100):
        hashlib.sha256(blob).digest()
    hash_gb = 100 * len(blob) / (time.perf_counter() - start_s) / 1e9
    return (
        f"appends of 4 MB with fdatasync {append_mb:.0f} MB/s, of 1 byte {syncs:.0f}/s; "
        f"memcpy {copy_gb:.1f} GB/s; sha256 {hash_gb:.2f} GB/s"
    )


# The table

HEADER = ("", "codec", "clients", "rounds", "updates/s", "MB/s", "p50 ms", "p99 ms", "CPU ms",
          "broker", "devices", "peak MB", "broker MB")  # fmt: skip


def report(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """The table, what it counts, and the machine."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    if is_markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        lines.insert(1, "|---|" + "--:|" * (len(HEADER) - 1))
    else:
        widths = [
            max(len(line[i]) for line in cells if len(line) == len(HEADER))
            for i in range(len(HEADER))
        ]
        lines = ["  ".join(map(str.rjust, line, widths)) for line in cells]
    with tempfile.TemporaryDirectory(prefix="bench-server-") as name:
        limits = machine_limits(Path(name))
    return "\n\n".join(
        ["\n".join(lines), NOTES, describe_machine("numpy", "paho-mqtt"), f"{limits}."]
    )


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.contender, row.codec, str(row.num_clients), str(row.num_rounds))
    if row.refused is not None:
        return (*start, f"refused: {row.refused}")
    return (
        *start,
        _number(row.updates_per_s, 1, 0),
        _number(row.mb_per_s, 1, 0),
        _number(row.latency_p50_s, 1e3, 0),
        _number(row.latency_p99_s, 1e3, 0),
        _number(row.cpu_s, 1e3, 2),
        _number(row.broker_cpu_s, 1e3, 2),
        _number(row.devices_cpu_s, 1e3, 2),
        _number(row.peak_bytes, 1e-6, 0),
        _number(row.broker_peak_bytes, 1e-6, 0),
    )


def _number(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
