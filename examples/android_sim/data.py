"""The watch recordings of seglearn, as the data of many devices.

Ten people did seven shoulder exercises with a smartwatch on either wrist: 140 recordings at 50 Hz,
one for each person, side and exercise. A natural device is one wrist of one person, 20 in all.

Samples are divided by one fixed constant per modality, the same on every device: nothing about the
data leaves a device, and nothing of the test part reaches training.

Source:
    Burns et al. 2018, arXiv:1802.01489; seglearn 1.2.5 (BSD-3).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from petalfl.errors import DataError

CLASS_NAMES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
SIDES = ("left", "right")
CHANNELS = {"acc": slice(0, 3), "gyro": slice(3, 6)}
SCALES = {"acc": 1.0, "gyro": 2.0}
"""What a sample is divided by, in g (gravity included) and rad/s; the RMS is then 0.7 and 0.8."""

SAMPLE_RATE_HZ = 50
WINDOW_SAMPLES = 2 * SAMPLE_RATE_HZ
HOP_SAMPLES = 1 * SAMPLE_RATE_HZ
MIN_WINDOWS_PER_CLASS = 2

_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"


@dataclass(frozen=True, slots=True)
class Recording:
    """One exercise of one person on one side.

    Attributes:
        subject: The person, in [1, 10].
        side: ``"left"`` or ``"right"``; the x axis of the watch points the other way on the other.
        label: Index into `CLASS_NAMES`.
        signal: float32 ``(3, num_samples)`` by modality, ``acc`` in g and ``gyro`` in rad/s.
    """

    subject: int
    side: str
    label: int
    signal: dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Windows:
    """Labelled windows, each with the place it was cut from.

    Attributes:
        inputs: float32 ``(n, 3, WINDOW_SAMPLES)`` by modality, divided by `SCALES`.
        labels: int64 ``(n,)``, indices into `CLASS_NAMES`.
        recordings: int64 ``(n,)``, indices into what `load_recordings` returns.
        starts: int64 ``(n,)``, the first sample of each window in its recording.
    """

    inputs: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    recordings: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> Windows:
        """Copy the windows at ``indices``, in that order."""
        inputs = {modality: values[indices] for modality, values in self.inputs.items()}
        return Windows(inputs, self.labels[indices], self.recordings[indices], self.starts[indices])


@dataclass(frozen=True, slots=True)
class DeviceData:
    """What one device holds: its training windows and its test windows.

    Attributes:
        name: Lower case, digits and dashes, such as ``subject-03-left``.
        train: Windows the device learns from.
        test: Windows that share no sample with those of ``train``, of the same classes.

    Raises:
        ValueError: A test window overlaps a training window, or the classes differ.
    """

    name: str
    train: Windows
    test: Windows

    def __post_init__(self) -> None:
        if overlaps := count_overlaps(self.train, self.test):
            raise ValueError(
                f"{self.name}: {overlaps} pairs of a training and a test window share samples, "
                "expected none"
            )
        train_classes, test_classes = set(self.train.labels), set(self.test.labels)
        if train_classes != test_classes:
            raise ValueError(
                f"{self.name}: classes {_names(train_classes)} in training and "
                f"{_names(test_classes)} in test, expected the same"
            )


def count_overlaps(a: Windows, b: Windows) -> int:
    """Count the pairs of a window of ``a`` and one of ``b`` that share a sample.

    Takes O(len(a) × len(b)) memory.
    """
    is_same_recording = a.recordings[:, None] == b.recordings
    is_near = np.abs(a.starts[:, None] - b.starts) < WINDOW_SAMPLES
    return int((is_same_recording & is_near).sum())


def load_recordings(path: Path | None = None) -> list[Recording]:
    """Load all 140 recordings, in the order of the file.

    Args:
        path: The file `watch_dataset.npy`; by default that of the installed seglearn.

    Raises:
        DataError: seglearn or its file is missing, or the file is not the one known.
    """
    content = _read_verified(_installed_path() if path is None else path)
    # A pickle runs what it says on loading: only the bytes just verified may get here.
    raw = np.load(io.BytesIO(content), allow_pickle=True).item()
    return [
        Recording(int(subject), SIDES[int(side)], int(label), _by_modality(samples))
        for subject, side, label, samples in zip(
            raw["subject"], raw["side"], raw["y"], raw["X"], strict=True
        )
    ]


def watch_devices(test_fraction: float = 0.3) -> list[DeviceData]:
    """Make the 20 natural devices, ordered by subject and side.

    The last ``test_fraction`` of every recording is for test and the rest for training; windows
    are cut within each part, so that none crosses from one to the other.

    Args:
        test_fraction: Share of each recording, in (0, 1).

    Raises:
        DataError: As in `load_recordings`.
        ValueError: ``test_fraction`` leaves a class with no window in training or test.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}, expected in (0, 1)")
    by_device: dict[str, dict[int, Recording]] = {}
    for index, recording in enumerate(load_recordings()):
        name = f"subject-{recording.subject:02d}-{recording.side}"
        by_device.setdefault(name, {})[index] = recording
    return [
        _split(name, recordings, test_fraction) for name, recordings in sorted(by_device.items())
    ]


def devices(num_devices: int) -> list[DeviceData]:
    """Make any number of devices out of the 20 natural ones.

    Up to 20, the first of `watch_devices`. Beyond, natural devices are dealt to emulated ones with
    `deal`, as evenly as possible: 40 devices are two parts of each wrist. There are windows enough
    for 120 devices.

    Raises:
        DataError: As in `load_recordings`.
        ValueError: ``num_devices`` is below 1, or too many for the windows there are.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices is {num_devices}, expected at least 1")
    natural = watch_devices()
    if num_devices <= len(natural):
        return natural[:num_devices]
    num_parts, num_larger = divmod(num_devices, len(natural))
    return [
        part
        for index, device in enumerate(natural)
        for part in deal(device, num_parts + (index < num_larger))
    ]


def deal(device: DeviceData, num_parts: int) -> list[DeviceData]:
    """Deal one device's training windows to several, each with a stretch in time of every class.

    The parts share the whole test set: it is too short to divide, and shares no sample with any of
    them. Windows on either side of a seam between two parts overlap by a hop.

    Returns:
        ``num_parts`` devices named ``<name>-part-1`` and so on; ``device`` itself for one part.

    Raises:
        ValueError: A part would get fewer than `MIN_WINDOWS_PER_CLASS` training windows of a class.
    """
    if num_parts < 1:
        raise ValueError(f"num_parts is {num_parts}, expected at least 1")
    if num_parts == 1:
        return [device]
    shares: list[list[NDArray[np.int64]]] = [[] for _ in range(num_parts)]
    for label in np.unique(device.train.labels):
        of_class = np.flatnonzero(device.train.labels == label)
        if len(of_class) < num_parts * MIN_WINDOWS_PER_CLASS:
            raise ValueError(
                f"{device.name} has {len(of_class)} training windows of {CLASS_NAMES[label]} for "
                f"{num_parts} parts, expected at least {MIN_WINDOWS_PER_CLASS} each: "
                "ask for fewer devices"
            )
        for share, stretch in zip(shares, np.array_split(of_class, num_parts), strict=True):
            share.append(stretch)
    return [
        DeviceData(
            f"{device.name}-part-{number}", device.train.take(np.concatenate(share)), device.test
        )
        for number, share in enumerate(shares, start=1)
    ]


def _installed_path() -> Path:
    # Importing seglearn would need pandas, which it does not declare; finding it does not.
    spec = importlib.util.find_spec("seglearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the package seglearn is not installed, expected its watch recordings: "
            "pip install seglearn==1.2.5"
        )
    return Path(spec.submodule_search_locations[0], "data", "watch_dataset.npy")


def _read_verified(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}), expected the watch recordings: "
            "pip install --force-reinstall --no-deps seglearn==1.2.5"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256:
        raise DataError(
            f"{path} has sha256 {found}, expected {_SHA256}; it is a pickle and was not loaded: "
            "pip install --force-reinstall --no-deps seglearn==1.2.5"
        )
    return content


def _by_modality(samples: NDArray[np.float64]) -> dict[str, NDArray[np.float32]]:
    return {
        modality: np.ascontiguousarray(samples[:, channels].T, dtype=np.float32)
        for modality, channels in CHANNELS.items()
    }


def _split(name: str, recordings: Mapping[int, Recording], test_fraction: float) -> DeviceData:
    train, test = [], []
    for index, recording in recordings.items():
        num_samples = recording.signal["acc"].shape[1]
        cut = round(num_samples * (1 - test_fraction))
        train.append(_cut(recording, index, 0, cut))
        test.append(_cut(recording, index, cut, num_samples))
    return DeviceData(name, _concatenate(train), _concatenate(test))


def _cut(recording: Recording, index: int, begin: int, end: int) -> Windows:
    """Cut the windows that lie within samples [begin, end) of a recording."""
    starts = np.arange(begin, end - WINDOW_SAMPLES + 1, HOP_SAMPLES, dtype=np.int64)
    inputs = {}
    for modality, signal in recording.signal.items():
        every = sliding_window_view(signal, WINDOW_SAMPLES, axis=1)  # (3, starts, samples)
        windows = every[:, starts].transpose(1, 0, 2)  # (n, 3, samples)
        inputs[modality] = np.ascontiguousarray(windows / np.float32(SCALES[modality]))
    return Windows(
        inputs,
        labels=np.full(len(starts), recording.label, dtype=np.int64),
        recordings=np.full(len(starts), index, dtype=np.int64),
        starts=starts,
    )


def _concatenate(parts: Sequence[Windows]) -> Windows:
    return Windows(
        inputs={
            modality: np.concatenate([part.inputs[modality] for part in parts])
            for modality in CHANNELS
        },
        labels=np.concatenate([part.labels for part in parts]),
        recordings=np.concatenate([part.recordings for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
    )


def _names(labels: set[np.int64]) -> list[str]:
    return [CLASS_NAMES[label] for label in sorted(labels)]
