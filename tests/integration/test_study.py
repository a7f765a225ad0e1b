from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.blossom.examples import Examples
from benchmarks.blossom.simulation import Device, make_config, run_federation
from petalfl.model import ModelManifest
from petalfl.training import Hyperparameters
from petalfl.vectors import from_bytes
from server.config import private_blocks
from tests.integration.harness import Outcome, three_devices


def test_a_simulated_federation_is_the_real_one(
    undisturbed: Outcome, watch_artifacts: Path, tmp_path: Path
) -> None:
    """The blocks are those of three devices at a server process, over a broker and HTTP."""
    manifest = ModelManifest.load(watch_artifacts)
    private = private_blocks("phf", manifest)
    devices = [
        Device(d.name, tmp_path / d.name, watch_artifacts, private, Examples(d.data, d.labels, {}))
        for d in three_devices()
    ]
    config = make_config(
        watch_artifacts, tmp_path / "server", Hyperparameters(0.05, batch_size=4, epochs=3),
        private_blocks=private, num_rounds=3, seed=7,
    )  # fmt: skip
    try:
        outcome = run_federation(config, devices)
        states = {device.name: device.trainer.state.private for device in devices}
    finally:
        for device in devices:
            device.close()
    found = {
        (device, name): from_bytes(data, manifest.block(name).size)
        for device, state in states.items()
        for name, data in state.items()
    }
    simulated = Outcome(outcome.shared, found)
    assert simulated.largest_difference(undisturbed) <= 1e-6
    initial = np.fromfile(
        watch_artifacts / manifest.block("fusion").artifacts.parameters.path, "<f4"
    )
    assert np.abs(found["both", "fusion"] - initial).max() > 1e-3  # it has learned something
    assert all(bytes_up > 4 * 150_976 * 3 for bytes_up in outcome.bytes_up.values())
