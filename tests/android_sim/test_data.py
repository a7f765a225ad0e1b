from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.android_sim.data import (
    CLASS_NAMES,
    HOP_SAMPLES,
    MIN_WINDOWS_PER_CLASS,
    SCALES,
    WINDOW_SAMPLES,
    DeviceData,
    Recording,
    Windows,
    count_overlaps,
    deal,
    devices,
    load_recordings,
    watch_devices,
)
from petalfl.errors import DataError


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    return load_recordings()


@pytest.fixture(scope="module")
def natural() -> list[DeviceData]:
    return watch_devices()


def covered_samples(windows: Windows) -> set[tuple[int, int]]:
    """List every (recording, sample) in any window: slow, and independent of `count_overlaps`."""
    return {
        (int(recording), sample)
        for recording, start in zip(windows.recordings, windows.starts, strict=True)
        for sample in range(start, start + WINDOW_SAMPLES)
    }


def windows_at(*starts: int, recording: int = 0, label: int = 0) -> Windows:
    n = len(starts)
    return Windows(
        {"acc": np.zeros((n, 3, WINDOW_SAMPLES), np.float32)},
        np.full(n, label, np.int64),
        np.full(n, recording, np.int64),
        np.array(starts, np.int64),
    )


def test_recordings_are_one_per_person_side_and_exercise(recordings: list[Recording]) -> None:
    assert len(recordings) == 140
    assert len({(r.subject, r.side, r.label) for r in recordings}) == 10 * 2 * len(CLASS_NAMES)
    for recording in recordings:
        assert recording.signal.keys() == {"acc", "gyro"}
        assert recording.signal["acc"].shape == recording.signal["gyro"].shape
        for signal in recording.signal.values():
            assert signal.shape[0] == 3
            assert signal.dtype == np.float32
            assert np.isfinite(signal).all()


def test_uncut_recordings_hold_4677_windows(recordings: list[Recording]) -> None:
    lengths = [r.signal["acc"].shape[1] for r in recordings]
    assert sum((length - WINDOW_SAMPLES) // HOP_SAMPLES + 1 for length in lengths) == 4677


def test_a_watch_at_rest_measures_one_g(recordings: list[Recording]) -> None:
    norms = np.concatenate([np.linalg.norm(r.signal["acc"], axis=0) for r in recordings])
    speeds = np.concatenate([np.linalg.norm(r.signal["gyro"], axis=0) for r in recordings])
    assert np.median(norms[speeds < 0.15]) == pytest.approx(1.0, abs=0.02)


def test_natural_devices_in_plain_order(natural: list[DeviceData]) -> None:
    assert len(natural) == 20
    assert [d.name for d in natural[:3]] == [
        "subject-01-left",
        "subject-01-right",
        "subject-02-left",
    ]
    assert natural[-1].name == "subject-10-right"
    assert all(re.fullmatch(r"[a-z0-9-]+", d.name) for d in natural)


def test_window_counts(natural: list[DeviceData]) -> None:
    assert sum(len(d.train) for d in natural) == 3204
    assert sum(len(d.test) for d in natural) == 1253


def test_windows_have_the_promised_form(natural: list[DeviceData]) -> None:
    for windows in (w for d in natural for w in (d.train, d.test)):
        assert windows.inputs.keys() == {"acc", "gyro"}
        for values in windows.inputs.values():
            assert values.shape == (len(windows), 3, WINDOW_SAMPLES)
            assert values.dtype == np.float32
            assert values.flags.c_contiguous
        for column in (windows.labels, windows.recordings, windows.starts):
            assert column.shape == (len(windows),)
            assert column.dtype == np.int64


def test_windows_are_the_scaled_samples_of_their_recording(
    natural: list[DeviceData], recordings: list[Recording]
) -> None:
    for device in natural:
        for windows in (device.train, device.test):
            for i, (index, start) in enumerate(
                zip(windows.recordings, windows.starts, strict=True)
            ):
                recording = recordings[index]
                assert device.name == f"subject-{recording.subject:02d}-{recording.side}"
                assert windows.labels[i] == recording.label
                for modality, signal in recording.signal.items():
                    np.testing.assert_array_equal(
                        windows.inputs[modality][i] * np.float32(SCALES[modality]),
                        signal[:, start : start + WINDOW_SAMPLES],
                    )


def test_modalities_vary_alike(natural: list[DeviceData]) -> None:
    for modality in SCALES:
        values = np.concatenate([d.train.inputs[modality] for d in natural])
        assert 0.5 < np.sqrt(np.mean(values**2)) < 1.0


def test_every_class_is_in_training_and_test(natural: list[DeviceData]) -> None:
    for device in natural:
        for windows in (device.train, device.test):
            counts = Counter(windows.labels.tolist())
            assert sorted(counts) == list(range(len(CLASS_NAMES)))
            assert min(counts.values()) >= MIN_WINDOWS_PER_CLASS


def test_test_part_is_the_later_30_percent(
    natural: list[DeviceData], recordings: list[Recording]
) -> None:
    for device in natural:
        for index in np.unique(device.test.recordings):
            num_samples = recordings[index].signal["acc"].shape[1]
            first = device.test.starts[device.test.recordings == index].min()
            assert first == round(0.7 * num_samples)


@pytest.mark.parametrize("num_devices", [20, 33, 100])
def test_no_sample_is_in_training_and_test(num_devices: int) -> None:
    emulated = devices(num_devices)
    # Across all devices at once: the parts of a wrist share their test set.
    train = set().union(*(covered_samples(d.train) for d in emulated))
    test = set().union(*(covered_samples(d.test) for d in emulated))
    assert train
    assert test
    assert train.isdisjoint(test)


def test_an_overlapping_split_is_detected(natural: list[DeviceData]) -> None:
    whole = natural[0].train
    even = whole.take(np.arange(0, len(whole), 2))
    odd = whole.take(np.arange(1, len(whole), 2))
    assert not covered_samples(even).isdisjoint(covered_samples(odd))
    with pytest.raises(ValueError, match=r"subject-x: \d+ pairs .* share samples"):
        DeviceData("subject-x", even, odd)


@pytest.mark.parametrize(
    ("other", "overlaps"),
    [
        (windows_at(200), 0),
        (windows_at(199), 1),
        (windows_at(1), 1),
        (windows_at(0), 0),
        (windows_at(150, recording=1), 0),
        (windows_at(100, 150, 200, 250), 2),
    ],
    ids=["touching", "last-sample", "first-sample", "touching-before", "elsewhere", "several"],
)
def test_count_overlaps_at_the_boundary(other: Windows, overlaps: int) -> None:
    one = windows_at(100)
    assert count_overlaps(one, other) == count_overlaps(other, one) == overlaps
    assert bool(overlaps) != covered_samples(one).isdisjoint(covered_samples(other))


def test_a_device_with_different_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'PEN'.*'ROW'"):
        DeviceData("x", windows_at(0), windows_at(0, recording=1, label=6))


def test_devices_are_deterministic(natural: list[DeviceData]) -> None:
    for one, other in zip(natural, watch_devices(), strict=True):
        assert one.name == other.name
        for a, b in ((one.train, other.train), (one.test, other.test)):
            np.testing.assert_equal(dataclasses.asdict(a), dataclasses.asdict(b))


@pytest.mark.parametrize("num_devices", [1, 7, 20, 21, 40, 100, 120])
def test_any_number_of_devices(num_devices: int, natural: list[DeviceData]) -> None:
    emulated = devices(num_devices)
    assert len({d.name for d in emulated}) == len(emulated) == num_devices
    assert emulated[0].name == (
        "subject-01-left" if num_devices <= 20 else "subject-01-left-part-1"
    )
    for device in emulated:
        counts = Counter(device.train.labels.tolist())
        assert len(counts) == len(CLASS_NAMES)
        assert min(counts.values()) >= MIN_WINDOWS_PER_CLASS
        assert device.train.inputs["acc"].flags.c_contiguous
    if num_devices >= 20:
        assert sum(len(d.train) for d in emulated) == sum(len(d.train) for d in natural)


def test_parts_are_stretches_of_time_that_make_up_the_device(natural: list[DeviceData]) -> None:
    whole = natural[4]
    parts = deal(whole, 3)
    dealt = [
        pair
        for part in parts
        for pair in zip(part.train.recordings.tolist(), part.train.starts.tolist(), strict=True)
    ]
    assert sorted(dealt) == sorted(
        zip(whole.train.recordings.tolist(), whole.train.starts.tolist(), strict=True)
    )
    for part in parts:
        assert part.test is whole.test
        for recording in np.unique(part.train.recordings):
            starts = part.train.starts[part.train.recordings == recording]
            assert (np.diff(starts) == HOP_SAMPLES).all()


@pytest.mark.parametrize(
    ("num_devices", "message"),
    [
        (0, "num_devices is 0, expected at least 1"),
        (-1, "num_devices is -1"),
        (140, r"subject-\d+-\w+ has \d+ training windows of \w+ for 7 parts, expected at least 2"),
    ],
)
def test_impossible_numbers_of_devices(num_devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        devices(num_devices)


def test_a_device_cannot_be_dealt_to_none(natural: list[DeviceData]) -> None:
    with pytest.raises(ValueError, match="num_parts is 0"):
        deal(natural[0], 0)


@pytest.mark.parametrize("test_fraction", [0.0, 1.0, -0.1])
def test_fraction_outside_its_interval(test_fraction: float) -> None:
    with pytest.raises(ValueError, match=r"expected in \(0, 1\)"):
        watch_devices(test_fraction)


def test_fraction_that_leaves_no_test_window() -> None:
    with pytest.raises(ValueError, match=r"classes .* expected the same"):
        watch_devices(0.05)


def test_a_changed_file_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "watch_dataset.npy"
    np.save(path, np.array({"X": []}, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"has sha256 \w{64}, expected eb122f23.*not loaded"):
        load_recordings(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.npy.*pip install"):
        load_recordings(tmp_path / "absent.npy")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"seglearn is not installed.*pip install seglearn"):
        load_recordings()


def test_seglearn_is_not_imported(recordings: list[Recording]) -> None:
    assert recordings
    assert "seglearn" not in sys.modules
