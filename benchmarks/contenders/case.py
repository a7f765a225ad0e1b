"""One model at one batch size, as a folder: what every contender's process is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 1e-5
SEED = 0

AfterStep: TypeAlias = Callable[[], object]  # called after every step; raises to end the training


class Case(NamedTuple):
    """A model and its data set of one batch, which every step takes in another order.

    Attributes:
        folder: Of the model: ``artifacts``, ``composed``, ``state_dict.pt``, ``batch-<b>.npz``.
        factory: ``MODULE:FACTORY``.
        batch_size: Examples.
    """

    folder: Path
    factory: str
    batch_size: int

    @property
    def artifacts(self) -> Path:
        """What `petalfl` exports."""
        return self.folder / "artifacts"

    @property
    def composed(self) -> Path:
        """What onnxruntime-training generates for the whole model."""
        return self.folder / "composed"

    @property
    def state_dict(self) -> Path:
        """What PyTorch saves."""
        return self.folder / "state_dict.pt"

    def save(self, inputs: dict[str, NDArray[Any]], labels: dict[str, NDArray[Any]]) -> None:
        """Writes the data set."""
        arrays = {f"input.{name}": value for name, value in inputs.items()}
        arrays |= {f"label.{name}": value for name, value in labels.items()}
        np.savez(self._data, **arrays)  # type: ignore[arg-type]  # its allow_pickle comes first

    def load(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Inputs by modality and labels by task, as `save` was given them."""
        with np.load(self._data) as arrays:
            return (
                {n.removeprefix("input."): arrays[n] for n in arrays if n.startswith("input.")},
                {n.removeprefix("label."): arrays[n] for n in arrays if n.startswith("label.")},
            )

    @property
    def _data(self) -> Path:
        return self.folder / f"batch-{self.batch_size}.npz"
