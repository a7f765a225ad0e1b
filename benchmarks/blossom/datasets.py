"""The data sets of the study, each as natural devices with two modalities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.android_sim.data import CLASS_NAMES, WINDOW_SAMPLES, Windows, watch_devices
from petalfl.errors import DataError

from . import avdigits, stress
from .examples import Examples, Holding

DATA_VARIABLE = "PETALFL_DATA"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Dataset:
    """What the study needs to know of a data set.

    Attributes:
        modalities: The two of the regimes.
        model: ``module:factory`` of the model, called with a seed.
        training: The paper's local settings for data of this kind, by `Hyperparameters`.
        metric: What the paper reports of it.
        load: The natural devices, in a fixed order; DataError where the data is absent.
    """

    modalities: tuple[str, str]
    class_names: tuple[str, ...]
    model: str
    training: dict[str, Any]
    metric: str
    load: Callable[[], list[Holding]]


def data_folder(name: str) -> Path:
    """A folder below that of ``PETALFL_DATA``, or below one named ``shared/data`` beside this."""
    root = os.environ.get(DATA_VARIABLE)
    return Path(root or ROOT.parent / "shared" / "data") / name


def find_dataset(name: str) -> Dataset:
    """By name.

    Raises:
        ValueError: There is none.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load(name: str) -> list[Holding]:
    """The natural devices of a data set.

    Raises:
        DataError: It is not here; says where it is to be had.
        ValueError: There is none such.
    """
    return find_dataset(name).load()


def _watch() -> list[Holding]:
    return [
        Holding(
            device.name, device.name.rsplit("-", 1)[0], *map(_examples, (device.train, device.test))
        )
        for device in watch_devices()
    ]


def _examples(windows: Windows) -> Examples:
    spans = np.stack([windows.recordings, windows.starts, windows.starts + WINDOW_SAMPLES], axis=1)
    return Examples(windows.inputs, windows.labels, dict.fromkeys(windows.inputs, spans))


def _checked(load_from: Callable[[Path], list[Holding]], folder: str, where: str) -> Any:
    def loader() -> list[Holding]:
        path = data_folder(folder)
        try:
            return load_from(path)
        except OSError as error:
            raise DataError(
                f"cannot read {error.filename or path} ({error.strerror or error}): {where}, and "
                f"put it into {path}, or set {DATA_VARIABLE} to the folder above"
            ) from error

    return loader


_SGD = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-5}
DATASETS: dict[str, Dataset] = {
    "watch": Dataset(
        ("acc", "gyro"), CLASS_NAMES, "export.models.har:watch", _SGD, "macro_f1", _watch
    ),
    "avdigits": Dataset(
        ("image", "audio"),
        avdigits.CLASS_NAMES,
        "benchmarks.blossom.models:avdigits",
        {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-4},
        "accuracy",
        _checked(
            avdigits.load, "fsdd",
            "get the recordings of github.com/Jakobovski/free-spoken-digit-dataset",
        ),
    ),
    "stress": Dataset(
        ("pulse", "skin"),
        stress.CLASS_NAMES,
        "benchmarks.blossom.models:stress",
        _SGD,
        "macro_f1",
        _checked(
            stress.load, "stress-predict",
            "make stress_predict_30s.npz of github.com/italha-d/Stress-Predict-Dataset as "
            "benchmarks/blossom/stress.py says",
        ),
    ),
}  # fmt: skip


def people(holdings: Sequence[Holding]) -> list[str]:
    """Whose devices these are, in their order, each once."""
    return list(dict.fromkeys(holding.person for holding in holdings))
