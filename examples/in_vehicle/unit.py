"""One unit: a process that drives, collects, waits for labels, and trains while parked.

This is the file to copy from. In an app of your own, `Vehicle` is what your vehicle tells, and the
windows come from its sensors instead of a recording; the rest stays as it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from petalfl import (
    EdgeClient,
    ExampleStore,
    PetalError,
    RoundInfo,
    RoundMetrics,
    StoreError,
    Tls,
)
from petalfl.metrics import macro_f1

from .drive import EVENTS, HOP_S, Drive, read_csv, stack

CONFIRMED_AFTER_S = 5  # the vehicle's event log comes so much later than the event
HELD_OUT = 0.3  # of the drive, its end: to evaluate on, never to train
MAX_BYTES, MAX_AGE_S = 16 << 20, 30 * 86400.0  # of the examples kept


class Vehicle:
    """What the unit asks its vehicle: of a real one the bus, a gateway or a pin."""

    is_driving = True
    is_charging = False


class Unit:
    """A unit's part in a federation.

    Args:
        folder: The unit's own, kept over restarts: its examples, and the client's store.
        drive: Cut into ``num_trips`` and, at its end, the held-out part.
        rounds_per_stop: The unit drives on when it has trained so many.
        pace: So many times faster than the clock.
        tls: The federation's authority, and this unit's certificate.
    """

    def __init__(
        self, name: str, server: str, token: str, folder: Path, drive: Drive, *,
        num_trips: int, rounds_per_stop: int, pace: float, tls: Tls | None = None,
    ) -> None:  # fmt: skip
        share = (1 - HELD_OUT) / num_trips
        self.trips = [drive.part(i * share, (i + 1) * share) for i in range(num_trips)]
        self.held_out = stack(drive.part(1 - HELD_OUT, 1).windows())
        self.name, self.rounds_per_stop, self.pace = name, rounds_per_stop, pace
        self.vehicle = Vehicle()
        self.stopping = threading.Event()
        self.round_num = 0  # the last one trained
        self.trained = asyncio.Event()  # set after each
        self.before: dict[str, Any] = {}
        self.examples = ExampleStore(folder / "examples", max_bytes=MAX_BYTES, max_age_s=MAX_AGE_S)
        self.client = EdgeClient(
            server,
            tls=tls,
            token=token,
            device=name,
            data=self.examples,
            store=folder / "store",
            should_train=lambda: self.vehicle.is_charging and not self.vehicle.is_driving,
            on_round=self.on_round,
            on_metrics=self.on_metrics,
            on_error=lambda error: self.say(error=str(error)),
        )

    async def run(self) -> None:
        """Drives and parks in turn, until the federation's last round or `stop`.

        Raises:
            PetalError: As `EdgeClient.arun`.
        """
        self.loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self.stop)
        participation: asyncio.Task[None] | None = None
        for trip_num, trip in enumerate(self.trips, 1):
            self.start_driving()
            f1 = await asyncio.to_thread(self.drive, trip_num, trip)
            if self.stopping.is_set():
                break
            self.park()
            self.say(state=f"parked, after trip {trip_num}", while_driving=f1)
            if participation is None:  # from here on there are examples, and a connection
                participation = asyncio.create_task(self.client.arun())
            await self.until_trained(trip_num * self.rounds_per_stop, participation)
        if participation is not None:
            await participation  # until the last round's blocks are here

    async def until_trained(self, round_num: int, participation: asyncio.Task[None]) -> None:
        """Returns after that round, or when the client takes part no longer."""
        while self.round_num < round_num and not participation.done():
            self.trained.clear()
            trained = asyncio.create_task(self.trained.wait())
            await asyncio.wait((trained, participation), return_when=asyncio.FIRST_COMPLETED)
            trained.cancel()

    def stop(self) -> None:
        """On Ctrl-C, or when the vehicle is about to cut the power: ends within a batch."""
        self.stopping.set()
        self.client.stop()

    def close(self) -> None:
        """Gives back what belongs to one process at a time."""
        self.client.close()
        self.examples.close()

    # The vehicle's side.

    def start_driving(self) -> None:
        """Training rests within a batch; the connection stays, and a round goes on later."""
        self.vehicle.is_driving, self.vehicle.is_charging = True, False
        self.client.pause()

    def park(self) -> None:
        """At a charger: now there are time and power to train."""
        self.examples.flush()  # whatever happens to the power
        self.vehicle.is_driving, self.vehicle.is_charging = False, True
        self.client.resume()

    def drive(self, trip_num: int, trip: Drive) -> float | None:
        """Keeps and predicts each window as it comes; labels it when the vehicle confirms it.

        Returns:
            The predictions' macro-F1 where something was confirmed; None without a model.
        """
        unconfirmed: deque[tuple[float, int, int | None, int | None]] = deque()
        seen: list[tuple[int, int]] = []  # what was confirmed, and what was predicted
        for i, window in enumerate(trip.windows()):
            if self.stopping.wait(HOP_S / self.pace):
                break
            now_s = i * HOP_S
            while unconfirmed and unconfirmed[0][0] <= now_s:
                _, example, event, prediction = unconfirmed.popleft()
                if event is not None:
                    self.examples.label(example, event)
                    if prediction is not None:
                        seen.append((event, prediction))
            if not window.inputs:
                continue  # all sensors are away
            example = self.examples.append(window.inputs)
            prediction = self.predict(window.inputs)
            due_s = now_s + CONFIRMED_AFTER_S
            unconfirmed.append((due_s, example, window.event, prediction))
            if i % 20 == 0:
                self.say(
                    state=f"driving, trip {trip_num}",
                    sees="" if prediction is None else EVENTS[prediction],
                    sensors=sorted(window.inputs),
                )
        truths, predictions = np.array(seen, np.int64).reshape(-1, 2).T
        return macro_f1(truths, predictions) if seen else None

    def predict(self, inputs: Mapping[str, Any]) -> int | None:
        """The event, with whatever sensors are there now; None on the first trip of all."""
        try:
            return int(self.client.predict(inputs)[0])
        except StoreError:  # the model comes with the first run
            return None

    # What the client tells, on its training thread.

    def on_round(self, info: RoundInfo) -> None:
        """The newest blocks are in place, and not yet trained on: the moment to evaluate."""
        if not self.before:
            self.before = self.client.evaluate(*self.held_out)
        self.say(state=f"training, round {info.round_num}/{info.num_rounds}")

    def on_metrics(self, metrics: RoundMetrics) -> None:
        """A round is trained."""
        self.round_num = metrics.round_num
        self.loop.call_soon_threadsafe(self.trained.set)
        self.say(round_num=metrics.round_num, loss=metrics.loss)

    # Its own reports.

    def say(self, **fields: Any) -> None:
        """Tells the parent process, a line of JSON at a time."""
        known = {"examples": len(self.examples), "labeled": self.examples.num_labeled}
        line = json.dumps({"unit": self.name, **known, **fields})
        sys.stdout.write(line + "\n")  # at once: other threads say something, too
        sys.stdout.flush()

    def result(self) -> dict[str, Any]:
        """What came out, on the held-out end of the drive; all of it works offline."""
        inputs, labels = self.held_out
        alone = {
            name: self.client.evaluate({name: array}, labels)["macro_f1"]
            for name, array in inputs.items()
        }
        return {
            "sensors": sorted(inputs),
            "held_out": len(labels),
            "macro_f1_before": self.before.get("macro_f1"),
            "macro_f1_after": self.client.evaluate(inputs, labels)["macro_f1"],
            "macro_f1_with_one_sensor": alone,
            "rounds": self.round_num,
        }


def main() -> int:
    """Runs one unit; 0 at the end, 2 on an error, 130 when it was stopped."""
    options = _parser().parse_args()
    try:
        tls = Tls(options.ca, options.certificate, options.key) if options.ca else None
        unit = Unit(
            options.name, options.server, options.token, options.folder,
            read_csv(options.recording), num_trips=options.trips,
            rounds_per_stop=options.rounds_per_stop, pace=options.pace, tls=tls,
        )  # fmt: skip
        try:
            asyncio.run(unit.run())
            if unit.stopping.is_set():
                return 130
            unit.say(state="done", result=unit.result())
            return 0
        finally:
            unit.close()
    except (PetalError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.in_vehicle.unit",
        description="One in-vehicle unit. Prints a line of JSON for what happens. Ctrl-C stops it "
        "within a batch; the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--server", required=True, metavar="URL", help="what python -m server prints")
    add("--token", default="", help="its join token; needed until the unit is enrolled")
    add("--ca", type=Path, metavar="PEM", help="the federation's own authority, of an https URL")
    add("--certificate", type=Path, metavar="PEM", help="the unit's, for mutual TLS")
    add("--key", type=Path, metavar="PEM", help="of the certificate")
    add("--name", required=True, help="of the unit: a-z, 0-9 and '-'")
    add("--folder", type=Path, required=True, metavar="DIR", help="of the unit, kept for good")
    add("--recording", type=Path, required=True, metavar="CSV", help="the drive; see README.md")
    add("--trips", type=int, default=3, metavar="N", help="to cut the drive into")
    add("--rounds-per-stop", type=int, default=8, metavar="N", help="to train before driving on")
    add("--pace", type=float, default=1.0, metavar="X", help="times faster than the clock")
    return parser


if __name__ == "__main__":
    sys.exit(main())
