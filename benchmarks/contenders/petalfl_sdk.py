"""petalfl: the SDK's own training loop on per-block artifacts, SGD with momentum."""

from __future__ import annotations

import numpy as np
import onnxruntime  # noqa: F401  # the engine imports it when it first needs it

from benchmarks.contenders.case import LEARNING_RATE, MOMENTUM, SEED, WEIGHT_DECAY, AfterStep, Case
from petalfl.engine import Engine, OrtEngine
from petalfl.local_data import ArrayData
from petalfl.model import ModelManifest, read_artifact
from petalfl.training import Hyperparameters
from petalfl.training import train as train_round
from petalfl.vectors import from_bytes


def train(case: Case, after_step: AfterStep) -> None:
    """Trains round after round, each of as many one-batch epochs as there may be."""
    train_with(OrtEngine(case.artifacts), case, after_step)


def train_with(engine: Engine, case: Case, after_step: AfterStep) -> None:
    """As `train`, with an engine of the caller's."""
    manifest = ModelManifest.load(case.artifacts)
    parameters = {
        b.name: from_bytes(read_artifact(case.artifacts, b.artifacts.parameters), b.size)
        for b in manifest.blocks
    }
    data = ArrayData(*case.load())
    hyperparameters = Hyperparameters(
        LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, batch_size=case.batch_size, epochs=1000
    )
    rng = np.random.default_rng(SEED)

    def on_batch(done: int, total: int) -> None:
        after_step()

    while True:
        parameters = train_round(
            engine, manifest, parameters, data, hyperparameters, rng, on_batch=on_batch
        ).parameters
