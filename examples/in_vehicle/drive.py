"""A drive: what the sensors saw, and what the vehicle itself confirmed some seconds later.

Either a recording of your own, as CSV at 50 Hz, one row a sample:

    time_s,acc_x,acc_y,acc_z,gyro_x,gyro_y,gyro_z,speed,event
    0.00,0.12,-0.05,9.79,0.001,0.002,-0.004,13.9,steady
    0.02,0.10,-0.07,9.83,,,,13.9,

``acc`` in m/s² with gravity, ``gyro`` in rad/s, ``speed`` in m/s. A sensor that the vehicle lacks
has no columns; one that is away for a while has empty cells. ``event`` is one of `EVENTS`, or empty
where the vehicle confirms nothing. Or a simulated drive, see `simulate`; `python -m
examples.in_vehicle.drive` prints one as CSV.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from petalfl import DataError

SAMPLE_RATE_HZ = 50
WINDOW_SAMPLES = 2 * SAMPLE_RATE_HZ
HOP_SAMPLES = SAMPLE_RATE_HZ
HOP_S = HOP_SAMPLES / SAMPLE_RATE_HZ
EVENTS = ("steady", "cornering", "hard-braking", "rough-road")
CHANNELS = {
    "acc": ("acc_x", "acc_y", "acc_z"),
    "gyro": ("gyro_x", "gyro_y", "gyro_z"),
    "speed": ("speed",),
}
SCALES = {"acc": 9.81, "gyro": 0.3, "speed": 30.0}
"""What a sample is divided by: the same in every vehicle, so that encoders can be shared."""

GRAVITY = 9.81  # m/s²
NOTHING = -1  # confirmed

Array = NDArray[np.float32]


class Window(NamedTuple):
    """Two seconds.

    Attributes:
        inputs: float32 ``(channels, WINDOW_SAMPLES)`` of each modality that was there throughout.
        event: Index into `EVENTS`; None where none was confirmed for more than half of it.
    """

    inputs: dict[str, Array]
    event: int | None


@dataclass(frozen=True, slots=True)
class Drive:
    """Samples at `SAMPLE_RATE_HZ`.

    Attributes:
        signals: float32 ``(channels, n)`` by modality, in the units above; NaN while it was away.
        events: int64 ``(n,)``, indices into `EVENTS`, or `NOTHING`.
    """

    signals: dict[str, Array]
    events: NDArray[np.int64]

    def part(self, begin: float, end: float) -> Drive:
        """From one share of its time to another, both in [0, 1]."""
        span = slice(int(begin * len(self.events)), int(end * len(self.events)))
        signals = {name: signal[:, span] for name, signal in self.signals.items()}
        return Drive(signals, self.events[span])

    def without(self, modality: str, begin: float, end: float) -> Drive:
        """The same with a sensor away for a share of the time."""
        signal = self.signals[modality].copy()
        num_samples = signal.shape[1]
        signal[:, int(begin * num_samples) : int(end * num_samples)] = np.nan
        return Drive({**self.signals, modality: signal}, self.events)

    def windows(self) -> Iterator[Window]:
        """A window every `HOP_S`, as the sensors would produce them."""
        for start in range(0, len(self.events) - WINDOW_SAMPLES + 1, HOP_SAMPLES):
            span = slice(start, start + WINDOW_SAMPLES)
            cut = {name: signal[:, span] / SCALES[name] for name, signal in self.signals.items()}
            inputs = {name: array for name, array in cut.items() if np.isfinite(array).all()}
            counts = np.bincount(self.events[span] + 1, minlength=len(EVENTS) + 1)[1:]
            event = int(counts.argmax())
            yield Window(inputs, event if counts[event] > WINDOW_SAMPLES / 2 else None)


def stack(windows: Iterable[Window]) -> tuple[dict[str, Array], NDArray[np.int64]]:
    """The confirmed windows as inputs ``(n, channels, WINDOW_SAMPLES)`` and labels ``(n,)``.

    Raises:
        DataError: None is confirmed.
    """
    confirmed = [window for window in windows if window.event is not None]
    if not confirmed:
        raise DataError(f"the drive has no confirmed event; its column holds one of {EVENTS}")
    names = set.intersection(*(set(window.inputs) for window in confirmed))
    inputs = {name: np.stack([w.inputs[name] for w in confirmed]) for name in sorted(names)}
    return inputs, np.array([window.event for window in confirmed], np.int64)


# Recordings


def read_csv(path: Path) -> Drive:
    """Reads a recording; the format is above.

    Raises:
        DataError: It cannot be read, or is not in that format; the message names line and cause.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(rows) < WINDOW_SAMPLES:
        raise DataError(f"{path} has {len(rows)} samples, expected {WINDOW_SAMPLES} at least")
    columns = rows[0].keys()
    signals = {
        name: np.array([_numbers(path, rows, column) for column in names], np.float32)
        for name, names in CHANNELS.items()
        if columns >= set(names)
    }
    if not signals or not columns >= {"time_s", "event"}:
        raise DataError(f"{path} has columns {', '.join(columns)}; expected time_s, event and all "
                        f"of a sensor: {CHANNELS}")  # fmt: skip
    steps_s = np.diff(_numbers(path, rows, "time_s"))
    if not np.allclose(steps_s, 1 / SAMPLE_RATE_HZ, atol=0.2 / SAMPLE_RATE_HZ):
        raise DataError(f"{path} has steps of {steps_s.min():g} to {steps_s.max():g} s, expected "
                        f"{1 / SAMPLE_RATE_HZ:g}: resample it to {SAMPLE_RATE_HZ} Hz")  # fmt: skip
    return Drive(signals, np.array([_event(path, i, r) for i, r in enumerate(rows)], np.int64))


def _numbers(path: Path, rows: list[dict[str, str]], column: str) -> list[float]:
    try:
        return [float(row[column] or "nan") for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, column {column}: {error}; expected numbers") from error


def _event(path: Path, index: int, row: dict[str, str]) -> int:
    if not row["event"]:
        return NOTHING
    if row["event"] not in EVENTS:
        raise DataError(f"{path}, line {index + 2}: event {row['event']!r}, "
                        f"expected one of {EVENTS} or nothing")  # fmt: skip
    return EVENTS.index(row["event"])


def write_csv(drive: Drive, file: TextIO) -> None:
    """Writes a drive in the format above."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["time_s", *(c for name in drive.signals for c in CHANNELS[name]), "event"])
    samples = np.concatenate(list(drive.signals.values())).T  # (n, columns)
    for i, (sample, event) in enumerate(zip(samples, drive.events, strict=True)):
        cells = ["" if np.isnan(value) else f"{value:.5g}" for value in sample]
        name = "" if event == NOTHING else EVENTS[event]
        writer.writerow([f"{i / SAMPLE_RATE_HZ:.2f}", *cells, name])


# Simulation


def simulate(seed: int, minutes: float, modalities: Iterable[str] = tuple(CHANNELS)) -> Drive:
    """A simulated drive: a point mass on springs, and a unit mounted at some angle.

    Maneuvers of 3 to 8 s follow one another at random. Pitch and roll are damped springs driven by
    the vehicle's acceleration, ABS makes hard braking pulse, and a rough road shakes body and
    wheels at their resonances. Vehicle, mounting, sensor bias and noise are drawn from ``seed``.
    A third of the maneuvers is confirmed by nobody.

    Args:
        modalities: Those that the unit has.
    """
    rng = np.random.default_rng(seed)
    num_samples = int(minutes * 60 * SAMPLE_RATE_HZ)
    dt = 1 / SAMPLE_RATE_HZ
    pitch, roll = _Spring(rng.uniform(1.1, 1.7), 0.3), _Spring(rng.uniform(1.2, 1.9), 0.25)
    body, wheels = _Spring(rng.uniform(1.2, 1.8), 0.3), _Spring(rng.uniform(9, 13), 0.15)
    softness = rng.uniform(0.004, 0.010)  # rad of pitch and roll per m/s²
    speed, lateral, left = 15.0, 0.0, 0
    motion = np.empty((7, num_samples))  # specific force, rates, speed, in the vehicle's axes
    events = np.full(num_samples, NOTHING)
    for i in range(num_samples):
        if left == 0:  # the next maneuver
            event = int(rng.choice(len(EVENTS), p=(0.35, 0.2, 0.25, 0.2)))
            event = 0 if speed < 8 else event
            left = int(rng.uniform(3, 8) * SAMPLE_RATE_HZ)
            is_confirmed = rng.random() < 2 / 3
            target_speed = rng.uniform(10, 30)
            is_corner = event == EVENTS.index("cornering")
            target_lateral = rng.choice((-1, 1)) * (
                rng.uniform(2, 4) if is_corner else rng.uniform(0, 1.2)
            )
            braking, pulse_hz = rng.uniform(5, 8.5), rng.uniform(8, 14)
            shaking = rng.uniform(1.5, 3) if event == EVENTS.index("rough-road") else 0.4
        left -= 1
        acceleration = float(np.clip(0.5 * (target_speed - speed), -2.5, 2))
        if event == EVENTS.index("hard-braking"):
            pulse = np.sign(np.sin(2 * np.pi * pulse_hz * i * dt))  # of the ABS
            acceleration = -braking * (1 + 0.2 * pulse)
            left = 0 if speed < 3 else left
        speed += acceleration * dt
        lateral += (target_lateral - lateral) * dt / 0.4
        road = shaking * np.sqrt(max(speed, 0.0) / 15) * rng.normal(0, 1, 2)
        vertical = 1.5 * body.step(road[0]) + 1.5 * wheels.step(road[1])
        pitch_angle = pitch.step(softness * acceleration + 0.01 * road[0])
        roll_angle = roll.step(softness * lateral + 0.01 * road[1])
        motion[:, i] = (
            acceleration + GRAVITY * pitch_angle, lateral + GRAVITY * roll_angle,
            GRAVITY + vertical, roll.rate, pitch.rate, lateral / max(speed, 3.0), speed,
        )  # fmt: skip
        events[i] = event if is_confirmed else NOTHING
    mounting = _rotation(rng.normal(0, 0.25, 3))
    acc = mounting @ motion[:3] + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.15, (3, num_samples))
    gyro = mounting @ motion[3:6] + rng.normal(0, 0.01, (3, 1))
    gyro += rng.normal(0, 0.01, (3, num_samples))
    every = {"acc": acc, "gyro": gyro, "speed": motion[6:] + rng.normal(0, 0.1, (1, num_samples))}
    return Drive({name: every[name].astype(np.float32) for name in modalities}, events)


class _Spring:
    """A damped spring of unit gain, followed by small steps: ``x'' = ω² (u − x) − 2 ζ ω x'``."""

    def __init__(self, frequency_hz: float, damping: float) -> None:
        self._omega, self._damping = 2 * np.pi * frequency_hz, damping
        self._position = self.rate = 0.0

    def step(self, target: float) -> float:
        dt, steps = 1 / SAMPLE_RATE_HZ, 2  # of them, so that wheels at 13 Hz stay stable
        for _ in range(steps):
            pull = self._omega**2 * (target - self._position)
            self.rate += (pull - 2 * self._damping * self._omega * self.rate) * dt / steps
            self._position += self.rate * dt / steps
        return self._position


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """By roll, pitch and yaw in rad, ``(3, 3)``."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(angles), np.cos(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    rotation: NDArray[np.float64] = about_z @ about_y @ about_x
    return rotation


def main() -> None:
    """Prints a simulated drive as CSV."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.in_vehicle.drive",
        description="Print a simulated drive as CSV, in the format of --recording.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="of vehicle, mounting and maneuvers")
    parser.add_argument("--minutes", type=float, default=5.0, help="to simulate")
    options = parser.parse_args()
    write_csv(simulate(options.seed, options.minutes), sys.stdout)


if __name__ == "__main__":
    main()
