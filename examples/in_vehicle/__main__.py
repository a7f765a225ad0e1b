"""`python -m examples.in_vehicle`: a server and some units as processes, and what came out."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from examples.android_sim.server_process import ServerAddress, die_with_parent, running_server
from export import export_model
from petalfl import PetalError

from .certificates import Certificate, make_certificates
from .drive import Drive, read_csv, simulate, write_csv
from .model import build

SENSORS = (("acc", "gyro", "speed"), ("acc", "gyro"), ("acc",))
"""Of the simulated vehicles; the second one's gyroscope is away for a while, too."""
AWAY = ("gyro", 0.3, 0.4)  # of its drive
STOP_TIMEOUT_S = 20.0


def main(arguments: list[str] | None = None) -> int:
    """Runs the example; 0 at its end, 2 on an error, 130 on Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    console = Console(stderr=True, highlight=False)
    try:
        summary = _run(options, console)
    except (PetalError, ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("stopped")
        return 130
    (options.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if options.json:
        print(json.dumps(summary, indent=1))
    else:
        _print_results(summary, options.out)
    return 0


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    started_s = time.monotonic()
    run = options.out / "run"  # everything below it is this command's own
    shutil.rmtree(run, ignore_errors=True)
    recordings = _recordings(options, run, console)
    num_units, num_rounds = len(recordings), options.trips * options.rounds
    with console.status("exporting the model") as status:
        export_model(build(), run / "artifacts", lambda step: status.update(f"export: {step}"))
    arguments = [
        "--rounds", num_rounds, "--min-devices", num_units,
        "--optimizer", "adamw", "--learning-rate", 0.003,
    ]  # fmt: skip
    certificates = {} if options.no_tls else make_certificates(run / "tls", recordings)
    if certificates:
        ca, certificate, key = certificates["server"]
        arguments += ["--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", ca]
    with running_server(
        run / "artifacts", run / "server", [str(argument) for argument in arguments]
    ) as server:
        view = _View(list(recordings), console)
        results = _drive(options, run, recordings, certificates, server, view)
    return {
        "source": "recordings" if options.recording else "simulated drives",
        "rounds": num_rounds,
        "units": results,
        "wall_s": round(time.monotonic() - started_s, 1),
    }


def _recordings(options: argparse.Namespace, run: Path, console: Console) -> dict[str, Path]:
    """By unit, a file; simulated ones are written first."""
    if options.recording:
        for path in options.recording:
            read_csv(path)  # complains before anything starts
        return {f"unit-{i}": path for i, path in enumerate(options.recording, 1)}
    recordings = {}
    for i in range(options.units):
        name = f"unit-{i + 1}"
        with console.status(f"simulating the drive of {name}"):
            drive = simulate(options.seed * 100 + i, options.minutes, SENSORS[i % len(SENSORS)])
            recordings[name] = _written(drive.without(*AWAY) if i == 1 else drive, run / name)
    return recordings


def _written(drive: Drive, folder: Path) -> Path:
    folder.mkdir(parents=True)
    with (folder / "drive.csv").open("w") as file:
        write_csv(drive, file)
    return folder / "drive.csv"


# The units' processes


def _drive(
    options: argparse.Namespace,
    run: Path,
    recordings: dict[str, Path],
    certificates: dict[str, Certificate],
    server: ServerAddress,
    view: _View,
) -> dict[str, Any]:
    said: queue.Queue[dict[str, Any]] = queue.Queue()
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, recording in recordings.items():
            command = [
                "--server", server.url, "--token", server.token, "--name", name,
                "--folder", str(run / name), "--recording", str(recording),
                "--trips", str(options.trips), "--rounds-per-stop", str(options.rounds),
                "--pace", str(options.pace),
            ]  # fmt: skip
            if (tls := certificates.get(name)) is not None:
                command += ["--ca", str(tls.ca), "--certificate", str(tls.certificate)]
                command += ["--key", str(tls.key)]
            processes[name] = stack.enter_context(_unit(command, name, run / name, said))
        stack.enter_context(view)
        return _follow(processes, said, view, run)


@contextlib.contextmanager
def _unit(
    arguments: list[str], name: str, folder: Path, said: queue.Queue[dict[str, Any]]
) -> Iterator[subprocess.Popen[str]]:
    """A unit's process; what it says goes to the queue, its log to ``unit.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "unit.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.in_vehicle.unit", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True, preexec_fn=die_with_parent, cwd=Path(__file__).parents[2],
        )  # fmt: skip
    reader = threading.Thread(target=_read, args=(process, name, said), daemon=True)
    reader.start()
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()


def _read(process: subprocess.Popen[str], name: str, said: queue.Queue[dict[str, Any]]) -> None:
    assert process.stdout is not None
    try:
        with process.stdout:
            for line in process.stdout:
                said.put(json.loads(line))
    finally:  # whatever it says: nobody waits for more
        said.put({"unit": name, "exit_status": process.wait()})


def _follow(
    processes: dict[str, subprocess.Popen[str]],
    said: queue.Queue[dict[str, Any]],
    view: _View,
    run: Path,
) -> dict[str, Any]:
    results: dict[str, Any] = {name: {"while_driving": []} for name in processes}
    running = set(processes)
    while running:
        line = said.get()
        unit = line["unit"]
        if "exit_status" in line:
            running.remove(unit)
            if line["exit_status"] != 0:
                log = run / unit / "unit.log"
                last = (log.read_text().strip().splitlines() or ["it printed nothing"])[-1]
                raise PetalError(f"{unit} has ended early: {last.removeprefix('error: ')}; {log}")
            continue
        if "while_driving" in line:
            results[unit]["while_driving"].append(line["while_driving"])
        results[unit] |= {key: line[key] for key in ("examples", "labeled")}
        results[unit] |= line.get("result", {})
        view.show(unit, line)
    return results


class _View:
    """A table of the units; without a terminal, a line for each state."""

    def __init__(self, names: list[str], console: Console) -> None:
        self._console = console
        self._rows: dict[str, dict[str, Any]] = {name: {} for name in names}
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> _View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def show(self, unit: str, line: dict[str, Any]) -> None:
        row = self._rows[unit]
        old = row.get("state", "")
        row.update(line)
        if self._console.is_terminal:
            self._live.update(self._table())
        elif "error" in line:
            self._console.print(f"{unit}: {line['error']}", markup=False)
        elif row.get("state") != old:
            self._console.print(f"{unit}: {row['state']}; {row['labeled']} of {row['examples']} "
                                "examples labeled")  # fmt: skip

    def _table(self) -> Table:
        table = Table("unit", "", "sensors", "sees", "labeled", "loss")
        for name, row in self._rows.items():
            table.add_row(
                name, row.get("state", "starting"), " ".join(row.get("sensors", ())),
                row.get("sees", ""), f"{row.get('labeled', 0)} of {row.get('examples', 0)}",
                f"{row['loss']:.3f}" if "loss" in row else "",
            )  # fmt: skip
        return table


def _print_results(summary: dict[str, Any], out: Path) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=120, highlight=False)
    table = Table("unit", "sensors", "labeled", "before", "after", "with one sensor",
                  "while driving", title=f"macro-F1, {summary['source']}")  # fmt: skip
    for name, unit in summary["units"].items():
        alone = unit["macro_f1_with_one_sensor"] if len(unit["sensors"]) > 1 else {}
        table.add_row(
            name, " ".join(unit["sensors"]), f"{unit['labeled']} of {unit['examples']}",
            _f1(unit["macro_f1_before"]), _f1(unit["macro_f1_after"]),
            ", ".join(f"{sensor} {_f1(f1)}" for sensor, f1 in alone.items()),
            " → ".join(map(_f1, unit["while_driving"])),
        )  # fmt: skip
    console.print(table)
    console.print(f"{summary['rounds']} rounds in {summary['wall_s']:.0f} s; {out}/summary.json")


def _f1(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.in_vehicle",
        description="In-vehicle units that collect while they drive, are told by the vehicle some "
        "seconds later what it was, and train while parked and charging. Exports a model, starts a "
        "server and a process per unit. The drives are simulated, or recordings of your own.",
        epilog="example: python -m examples.in_vehicle --recording van.csv --recording truck.csv",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--recording", type=Path, action="append", metavar="CSV",
        help="a unit's drive, instead of simulated ones; may be given several times. The format is "
        "in examples/in_vehicle/README.md")  # fmt: skip
    add("--units", type=int, default=3, choices=(2, 3), help="with simulated drives")
    add("--minutes", type=float, default=20.0, metavar="M", help="of each simulated drive")
    add("--seed", type=int, default=0, metavar="S", help="of the simulated drives")
    add("--trips", type=int, default=3, metavar="N", help="of each drive, with a stop after each")
    add("--rounds", type=int, default=8, metavar="R", help="trained at each stop")
    add("--pace", type=float, default=60.0, metavar="X", help="times faster than the clock")
    add("--no-tls", action="store_true", help="HTTP and MQTT in the clear; else mutual TLS with an "
        "authority made by openssl")  # fmt: skip
    add("--out", type=Path, default=Path("runs/in_vehicle"), metavar="DIR",
        help="summary.json, and a folder 'run' that is made anew each time")  # fmt: skip
    add("--json", action="store_true", help="print the summary instead of the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
