"""Digits seen and heard: spoken digits and handwritten ones, paired by what they say.

Six people spoke every digit 50 times (3,000 recordings at 8 kHz); the images are the 1,797
8 × 8 digits of scikit-learn. A natural device is half of a person's recordings, 12 in all, with
images of its own. The last 30 % of the takes are for test, and so are the last 30 % of a device's
images: no recording and no image is in both.

Source:
    Jackson et al., Free Spoken Digit Dataset, CC BY-SA 4.0; Alpaydin and Kaynak, UCI
    Optical Recognition of Handwritten Digits, CC BY 4.0. The pairing is AV-MNIST's idea (Vielzeuf
    et al. 2018, arXiv:1808.07275).
"""

from __future__ import annotations

import importlib.util
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from petalfl.errors import DataError

from .examples import Examples, Holding, Indices, concatenate

CLASS_NAMES = tuple("0123456789")
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
NUM_TAKES, NUM_HALVES = 50, 2
TEST_SHARE = 0.3
SAMPLE_RATE_HZ, FRAME, HOP = 8000, 256, 80
NUM_MELS, NUM_FRAMES = 24, 32

Array = NDArray[np.float32]


def load(folder: Path) -> list[Holding]:
    """The 12 natural devices, by speaker and half.

    Args:
        folder: Of the recordings ``{digit}_{speaker}_{take}.wav``.

    Raises:
        DataError: scikit-learn, whose images are needed, is not installed.
        OSError: A recording is missing.
    """
    images, digits = _load_images()
    names = [(speaker, half) for speaker in SPEAKERS for half in range(NUM_HALVES)]
    holdings = []
    for index, (speaker, half) in enumerate(names):
        parts: list[tuple[Examples, Examples]] = []
        for digit in range(10):
            of_digit = np.flatnonzero(digits == digit)
            ours = np.array_split(of_digit, len(names))[index]
            takes = np.array_split(np.arange(NUM_TAKES), NUM_HALVES)[half]
            heard = np.stack([_spectrogram(folder, digit, speaker, take) for take in takes])
            ids = (SPEAKERS.index(speaker) * 10 + digit) * NUM_TAKES + takes
            parts.append(_pair(digit, heard, ids, images[ours], ours))
        train, test = (concatenate(side) for side in zip(*parts, strict=True))
        holdings.append(Holding(f"{speaker}-{half + 1}", speaker, train, test))
    return holdings


def _pair(
    digit: int, heard: Array, takes: Indices, seen: Array, images: Indices
) -> tuple[Examples, Examples]:
    """Each take with an image, which are used again where there are fewer; train and test."""
    cut_takes, cut_images = (round(len(x) * (1 - TEST_SHARE)) for x in (takes, images))
    sides = []
    for take, image in (
        (slice(None, cut_takes), slice(None, cut_images)),
        (slice(cut_takes, None), slice(cut_images, None)),
    ):
        chosen = np.arange(len(takes[take])) % len(images[image])
        sides.append(
            Examples(
                {"image": seen[image][chosen], "audio": heard[take]},
                np.full(len(takes[take]), digit, np.int64),
                {"image": _whole(images[image][chosen]), "audio": _whole(takes[take])},
            )
        )
    return sides[0], sides[1]


def _whole(ids: Indices) -> Indices:
    """Spans of things that are used as a whole."""
    return np.stack([ids, np.zeros_like(ids), np.ones_like(ids)], axis=1).astype(np.int64)


def _load_images() -> tuple[Array, Indices]:
    """All images ``(1797, 1, 8, 8)`` in [-1, 1], and their digits."""
    # Importing scikit-learn takes seconds; finding its file does not.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "the package scikit-learn is not installed, expected its images of digits: "
            "pip install scikit-learn"
        )
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    images = np.ascontiguousarray(table[:, :64].reshape(-1, 1, 8, 8) / 8 - 1)
    return images.astype(np.float32), table[:, 64].astype(np.int64)


def _spectrogram(folder: Path, digit: int, speaker: str, take: int) -> Array:
    """Log mel energies, stretched or squeezed to one length: ``(1, NUM_MELS, NUM_FRAMES)``."""
    with wave.open(str(folder / f"{digit}_{speaker}_{take}.wav"), "rb") as file:
        data = file.readframes(file.getnframes())
    sound = np.frombuffer(data, "<i2").astype(np.float32) / (1 << 15)
    sound = np.pad(sound, (0, max(FRAME - len(sound), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(sound, FRAME)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(FRAME), axis=1)) ** 2  # (t, bins)
    energies = np.log(power @ _MEL.T + 1e-6)  # (t, mels)
    at = np.linspace(0, len(energies) - 1, NUM_FRAMES)
    stretched = [np.interp(at, np.arange(len(energies)), band) for band in energies.T]
    scaled = np.asarray(stretched)[np.newaxis] / 5 + 1  # about in [-2, 2]
    return scaled.astype(np.float32)


def _mel_filters() -> NDArray[np.float64]:
    """Triangles on the mel scale, ``(NUM_MELS, FRAME // 2 + 1)``."""
    hz = SAMPLE_RATE_HZ / FRAME * np.arange(FRAME // 2 + 1)
    top = 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((hz - low) / (mid - low), (high - hz) / (high - mid))
    return np.maximum(triangles, 0)


_MEL = _mel_filters()
