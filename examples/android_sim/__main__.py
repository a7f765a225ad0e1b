"""`python -m examples.android_sim`: heterogeneous devices on real data and the real wire."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from export import export_model
from export.models import har
from petalfl import PetalError, RoundInfo
from server.config import SCHEMES

from .data import devices
from .history import RunFolder, Settings
from .regimes import REGIMES, assign_modalities
from .report import draw_curves, summarize, table, write_summary
from .server_process import ServerAddress, running_server
from .simulation import Device, Interrupted, Simulation, default_num_threads


def main(arguments: list[str] | None = None) -> int:
    """Runs the emulation; 0 at its end, 2 on an error, 130 on Ctrl-C."""
    options = _parser().parse_args(arguments)
    if options.scheme is None:
        options.scheme = "" if options.artifacts else "personal"
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    console = Console(stderr=True)
    try:
        summary = _run(options, console)
    except (PetalError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except (Interrupted, KeyboardInterrupt):
        console.print(f"stopped; {options.out} is kept: the same command goes on", highlight=False)
        return 130
    if options.json:
        print(json.dumps(summary, indent=1))
    else:
        _print_results(summary, options.out)
    return 0


def _run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _settings(options)
    kinds = assign_modalities(options.devices, options.regime, options.seed)
    fleet = [Device(d, kind) for d, kind in zip(devices(options.devices), kinds, strict=True)]
    folder = RunFolder(options.out, settings, options.fresh)
    if folder.is_resumed:
        console.print(f"going on with the unfinished run in {options.out}", highlight=False)
    with _server(options, folder, console) as server:
        return _simulate(options, settings, fleet, server, folder, console)


def _simulate(
    options: argparse.Namespace,
    settings: Settings,
    fleet: list[Device],
    server: ServerAddress,
    folder: RunFolder,
    console: Console,
) -> dict[str, Any]:
    started_s = time.monotonic()
    with _Bar(folder, len(fleet), options.rounds, console) as bar:
        simulation = Simulation(fleet, server, folder, options.threads, bar.on_round)
        try:
            final = asyncio.run(simulation.run())
        finally:
            simulation.close()
    wall_s = time.monotonic() - started_s
    rounds_trained = max(folder.history()) + 1
    for name, metrics in final.items():
        folder.record(name, rounds_trained, metrics)
    history = folder.history()
    summary = summarize(settings, server, fleet, history, wall_s)
    write_summary(summary, folder.path / "summary.json")
    draw_curves(summary, history, folder.path / "learning_curves.png")
    folder.finish()
    return summary


@contextlib.contextmanager
def _server(
    options: argparse.Namespace, folder: RunFolder, console: Console
) -> Iterator[ServerAddress]:
    if options.server:
        yield ServerAddress(options.server, options.token)
        return
    artifacts = options.artifacts or folder.path / "artifacts"
    if options.artifacts is None and not artifacts.exists():
        with console.status("exporting the watch model") as status:
            model = har.watch(options.seed, personal_head=options.scheme == "personal")
            export_model(model, artifacts, lambda step: status.update(f"export: {step}"))
    arguments = [
        "--rounds", options.rounds, "--min-devices", options.devices, "--scheme", options.scheme,
        "--seed", options.seed, "--learning-rate", options.learning_rate,
        "--server-momentum", options.server_momentum, "--broker", options.broker,
        "--codec", options.codec, "--finish-epochs", options.finish_epochs,
    ]  # fmt: skip
    with running_server(artifacts, folder.path / "server", [str(a) for a in arguments]) as address:
        yield address


class _Bar:
    """Progress over all rounds; without a terminal, a line every tenth of them."""

    def __init__(
        self, folder: RunFolder, num_devices: int, num_rounds: int, console: Console
    ) -> None:
        self._folder = folder
        self._num_devices, self._num_rounds = num_devices, num_rounds
        self._console = console
        self._lock = threading.Lock()
        self._seen: dict[int, int] = {}
        self._num_fine_tuning = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("device rounds, {task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "training", total=num_devices * num_rounds, note="starting"
        )

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def on_round(self, device: Device, info: RoundInfo) -> None:
        """One more device starts a round; the last one of a round knows its score."""
        with self._lock:
            if info.is_fine_tuning:
                self._show_fine_tuning()
                return
            self._seen[info.round_num] = self._seen.get(info.round_num, 0) + 1
            done = (info.round_num - 1) * self._num_devices + self._seen[info.round_num]
            self._progress.update(self._task, completed=done)
            if self._seen[info.round_num] == self._num_devices:
                self._show_score(info.round_num - 1)

    def _show_fine_tuning(self) -> None:
        self._num_fine_tuning += 1
        note = f"fine-tuning on {self._num_fine_tuning} of {self._num_devices} devices"
        self._progress.update(self._task, note=note)
        if not self._console.is_terminal and self._num_fine_tuning == 1:
            self._console.print("fine-tuning: every device alone", highlight=False)

    def _show_score(self, rounds_trained: int) -> None:
        scores = [m["macro_f1"] for m in self._folder.history()[rounds_trained].values()]
        note = f"macro-F1 {sum(scores) / len(scores):.3f} after {rounds_trained} rounds"
        self._progress.update(self._task, note=note)
        step = max(self._num_rounds // 10, 1)
        if not self._console.is_terminal and rounds_trained % step == 0:
            self._console.print(f"round {rounds_trained}/{self._num_rounds}: {note}",
                                highlight=False)  # fmt: skip


def _print_results(summary: dict[str, Any], out: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table(summary))
    totals = summary["totals"]
    finished = summary["mean_macro_f1_finished"]
    console.print(
        f"mean macro-F1 {summary['mean_macro_f1_before']:.3f} → "
        f"{summary['mean_macro_f1_after']:.3f}"
        f"{f' → {finished:.3f} fine-tuned' if finished is not None else ''} "
        f"in {totals['wall_s']:.0f} s; "
        f"{totals['updates_accepted']:,} block updates accepted\n"
        f"{out / 'summary.json'}\n{out / 'learning_curves.png'}",
        highlight=False,
    )


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        devices=options.devices,
        regime=options.regime,
        scheme=options.scheme,
        rounds=options.rounds,
        seed=options.seed,
        learning_rate=options.learning_rate,
        server_momentum=options.server_momentum,
        codec=options.codec,
        server=options.server,
        finish_epochs=options.finish_epochs,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.android_sim",
        description="Emulate devices with different sensors on the seglearn watch data. Each is "
        "the real SDK client on the real wire. Without --server, a server with its broker is "
        "started and stopped along with them.",
        epilog="example: python -m examples.android_sim --regime exclusive --scheme ph --rounds 40",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--devices",
        type=_positive,
        default=20,
        metavar="N",
        help="emulated devices; 20 are natural: 10 people, 2 wrists",
    )
    add(
        "--regime",
        choices=REGIMES,
        default="incomplete",
        help="who has which sensors: all both; some only one; all only one",
    )
    add(
        "--scheme",
        choices=SCHEMES,
        help="what is shared: fm all blocks, ph all but the head, phf the encoders, local nothing "
        "(the control), personal all, with a private head beside the shared one; the default is "
        "personal, and with --artifacts what the model says",
    )
    add("--rounds", type=_positive, default=60, metavar="R", help="rounds of one local epoch each")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of the initial model, who has which sensors, shuffling and dropout",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/android_sim"),
        metavar="DIR",
        help="stores, summary and picture; an unfinished run there is gone on with",
    )
    add("--fresh", action="store_true", help="throw an unfinished run in --out away")
    add(
        "--threads",
        type=_positive,
        default=default_num_threads(),
        metavar="N",
        help="devices that train at once",
    )
    add("--json", action="store_true", help="print the summary instead of the table")
    group = parser.add_argument_group("the server started here").add_argument
    group("--broker", default="embedded", metavar="SPEC", help="see python -m server --help")
    group(
        "--artifacts",
        type=Path,
        metavar="DIR",
        help="an exported model; the default exports the one of export/models/har.py",
    )
    group("--learning-rate", type=float, default=0.05, metavar="LR", help="falls as a cosine")
    group("--server-momentum", type=float, default=0.5, metavar="BETA", help="FedAvgM, per block")
    group("--codec", default="f32", metavar="NAME", help="of updates; see python -m server --help")
    group(
        "--finish-epochs",
        type=int,
        default=30,
        metavar="N",
        help="after the last round every device fine-tunes alone; see python -m server --help",
    )
    group = parser.add_argument_group("a server that runs already").add_argument
    group("--server", default="", metavar="URL", help="takes part there; its own settings hold")
    group("--token", default="", metavar="T", help="the join token that it printed")  # fmt: skip
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {value}, expected at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
