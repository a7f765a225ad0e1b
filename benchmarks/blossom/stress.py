"""Stress or rest, from what a wristband feels: blood volume pulse, and the skin.

34 people, windows of 30 s every 15 s, each of one label; a device is a person. Stretches in which
windows follow one another without a gap are recordings; the last 30 % of each is for test.

The file holds ``acc``, ``bvp``, ``eda``, ``temp``, ``hr`` of every window, ``y`` (1: stress) and
``subject``, in order of time; windows follow one another where the second half of one is the first
half of the next.

Source:
    Iqbal et al. 2022, Stress-Predict, doi:10.3390/s22218135, MIT.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .examples import Examples, Holding, Indices

CLASS_NAMES = ("rest", "stress")
FILE_NAME = "stress_predict_30s.npz"
WINDOW_S, HOP_S = 30, 15
TEST_SHARE = 0.3
PULSE_STEP = 4  # of 64 Hz samples, averaged


def load(folder: Path) -> list[Holding]:
    """The devices, one for each person that has windows of both classes in both parts.

    Raises:
        OSError: The file is missing.
    """
    with np.load(folder / FILE_NAME) as raw:
        labels, subjects = raw["y"].astype(np.int64), raw["subject"]
        recordings, starts_s = _recordings(raw["acc"], subjects, labels)
        spans = np.stack([recordings, starts_s, starts_s + WINDOW_S], axis=1)
        inputs = {"pulse": _pulse(raw["bvp"]), "skin": _skin(raw["eda"], raw["temp"])}
    every = Examples(inputs, labels, dict.fromkeys(inputs, spans))
    is_train, is_test = _sides(recordings, starts_s)
    holdings = []
    for subject in np.unique(subjects):
        train, test = (
            every.take(np.flatnonzero(side & (subjects == subject))) for side in (is_train, is_test)
        )
        if set(train.labels) == set(test.labels) == {0, 1}:
            name = f"subject-{subject:02d}"
            holdings.append(Holding(name, name, train, test))
    return holdings


def _recordings(
    acc: NDArray[np.int8], subjects: NDArray[np.int16], labels: Indices
) -> tuple[Indices, Indices]:
    """Of every window, its recording, and where in it the window begins, in seconds."""
    half = acc.shape[1] // 2
    follows = (acc[1:, :half] == acc[:-1, half:]).all(axis=(1, 2))
    follows &= (subjects[1:] == subjects[:-1]) & (labels[1:] == labels[:-1])
    recordings = np.concatenate([[0], np.cumsum(~follows)])
    first = np.searchsorted(recordings, recordings)
    return recordings.astype(np.int64), (np.arange(len(acc)) - first) * HOP_S


def _sides(recordings: Indices, starts_s: Indices) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which windows end before the cut of their recording, and which begin after it."""
    ends_s = np.zeros(recordings.max() + 1, np.int64)
    np.maximum.at(ends_s, recordings, starts_s + WINDOW_S)
    cuts_s = np.round(ends_s[recordings] * (1 - TEST_SHARE) / HOP_S) * HOP_S
    return starts_s + WINDOW_S <= cuts_s, starts_s >= cuts_s


def _pulse(bvp: NDArray[np.float16]) -> NDArray[np.float32]:
    """``(n, 1, 480)`` at 16 Hz; outliers, where the wrist moved, are cut off."""
    slow = bvp.astype(np.float32).reshape(len(bvp), 1, -1, PULSE_STEP).mean(axis=3)
    return np.ascontiguousarray(np.clip(slow / 50, -4, 4), np.float32)


def _skin(eda: NDArray[np.float32], temp: NDArray[np.float32]) -> NDArray[np.float32]:
    """Conductance (log of 1 + µS) and temperature (around 31 °C): ``(n, 2, 120)`` at 4 Hz."""
    return np.stack([np.log1p(eda), (temp - 31) / 2.5], axis=1).astype(np.float32)
