"""Local steps on drawn data, taken at export and again wherever the artifacts are to be trained.

Two runtimes that compute the same have the same losses. `python -m petalfl check` compares.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from petalfl.engine import Engine
from petalfl.errors import ModelError
from petalfl.local_data import ArrayData
from petalfl.model import Block, Modality, ModelManifest, differentiated, read_artifact
from petalfl.schema import Limit, plain, read
from petalfl.steps import predict_outputs
from petalfl.training import Hyperparameters, train
from petalfl.vectors import from_bytes

REFERENCE_NAME = "reference.json"
TOLERANCE = 1e-4  # of a loss, relative
# 20 steps: 5 epochs of 4 batches. The norm is clipped, so that no model diverges on noise.
NUM_EXAMPLES = 64
HYPERPARAMETERS = Hyperparameters(0.01, batch_size=16, epochs=5, max_grad_norm=1.0)


@dataclass(frozen=True, slots=True)
class Reference:
    """What the steps gave when they were taken first.

    Attributes:
        runtime: That they were taken with.
        seed: Of the data, their order and the dropout masks.
        losses: Of each step; none of a model in which nothing trains.
    """

    runtime: str
    seed: int
    num_examples: Annotated[int, Limit(1, 1 << 16)]
    hyperparameters: Hyperparameters
    losses: tuple[float, ...]

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Reads ``folder/reference.json``.

        Raises:
            ModelError: It is not there, or unusable.
        """
        try:
            return read(cls, json.loads((folder / REFERENCE_NAME).read_bytes()), REFERENCE_NAME)
        except OSError as error:
            raise ModelError(
                f"{folder} has no {REFERENCE_NAME} ({error.strerror}); export the model again"
            ) from error
        except ValueError as error:
            raise ModelError(f"{folder / REFERENCE_NAME} is unusable: {error}") from error

    def to_json(self) -> bytes:
        """The file's contents."""
        return json.dumps(plain(self), indent=1).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Steps:
    """What the steps gave here; ``seconds`` of each."""

    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    def difference(self, reference: Reference) -> float:
        """The largest one of a loss, relative to the reference's."""
        pairs = zip(self.losses, reference.losses, strict=True)
        return max((abs(a - b) / max(abs(b), 1e-12) for a, b in pairs), default=0.0)


def take_reference(
    engine: Engine, manifest: ModelManifest, folder: Path, runtime: str
) -> Reference:
    """Takes the steps with all modalities and tasks, from the artifacts' initial values."""
    blank = Reference(runtime, 0, NUM_EXAMPLES, HYPERPARAMETERS, ())
    losses = take_steps(engine, manifest, folder, blank).losses
    return Reference(runtime, 0, NUM_EXAMPLES, HYPERPARAMETERS, losses)


def take_steps(
    engine: Engine, manifest: ModelManifest, folder: Path, reference: Reference
) -> Steps:
    """Takes the same steps as the reference did, with this machine's runtime.

    Raises:
        ModelError: A graph or the initial values are missing or damaged, or do not run.
    """
    if not differentiated(manifest.blocks):
        return Steps((), ())
    parameters = {
        block.name: from_bytes(read_artifact(folder, block.artifacts.parameters), block.size)
        for block in manifest.blocks
    }
    rng = np.random.default_rng(reference.seed)
    inputs = {
        name: _draw(modality, reference.num_examples, rng)
        for name, modality in manifest.modalities.items()
    }
    outputs = predict_outputs(engine, manifest, parameters, inputs, manifest.heads)
    labels = {
        task: _draw_labels(head, outputs[task].shape, rng) for task, head in manifest.heads.items()
    }
    times = [time.perf_counter()]
    losses = train(
        engine,
        manifest,
        parameters,
        ArrayData(inputs, labels),
        reference.hyperparameters,
        rng,
        on_batch=lambda done, total: times.append(time.perf_counter()),
    ).losses
    return Steps(losses, tuple(np.diff(times).tolist()))


def _draw(modality: Modality, length: int, rng: np.random.Generator) -> NDArray[Any]:
    """Axes that vary are as short as they may be."""
    ranges = iter(modality.ranges)
    shape = (length, *(next(ranges)[0] if dim is None else dim for dim in modality.shape))
    if modality.num_values is not None:
        return rng.integers(0, modality.num_values, shape)
    return rng.standard_normal(shape, dtype=np.float32)


def _draw_labels(head: Block, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    if head.task is not None and head.task.loss == "cross_entropy":
        return rng.integers(0, shape[1], shape[0])
    return rng.integers(0, 2, shape).astype(np.float32)
