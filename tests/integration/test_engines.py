"""Both ONNX Runtimes: each reference model trains alike, and one federation holds both.

The layer kinds are in tests/export/test_layers.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from examples.android_sim.data import devices
from export import BlockModel, export_model
from export.models import avmnist, projector, ptbxl, text_audio
from petalfl.reference import REFERENCE_NAME, Reference
from petalfl.runtime import find_runtime
from petalfl.training import Hyperparameters
from petalfl.vectors import Vector
from tests.engine_steps import NUM_STEPS, model_losses
from tests.integration.harness import ROOT, running_server
from tests.stock import ENVIRONMENT, TOLERANCE, StockSteps, largest_difference

MODELS: dict[str, Callable[[], BlockModel] | None] = {
    "ecg": ptbxl.ecg,
    "digits": avmnist.digits,
    "emotion": text_audio.emotion,
    "projector": projector.projector,
    "watch": None,  # the fixture
}


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_of_20_steps(
    name: str, watch_artifacts: Path, stock_steps: StockSteps, tmp_path: Path
) -> None:
    """Of SGD with momentum, as the export has taken them; of the smallest model AdamW's, too."""
    folder, build = watch_artifacts, MODELS[name]
    if build is not None:
        folder = tmp_path / "artifacts"
        export_model(build(), folder)
    reference = Reference.load(folder)
    assert reference.runtime == str(find_runtime())
    assert len(reference.losses) == NUM_STEPS
    assert largest_difference(stock_steps.losses(folder), reference.losses) <= TOLERANCE
    if name == "projector":
        adamw = Hyperparameters(1e-3, batch_size=16, epochs=5, optimizer="adamw")
        other = dataclasses.replace(reference, hyperparameters=adamw, losses=())
        (folder / REFERENCE_NAME).write_bytes(other.to_json())
        expected = model_losses(folder)
        assert abs(expected[-1] - reference.losses[-1]) > TOLERANCE
        assert largest_difference(stock_steps.losses(folder), expected) <= TOLERANCE


# A federation


BLOCK_TOLERANCE = 1e-5
"""How far a block of a mixed federation may be from that of a federation of one, absolute."""

NUM_ROUNDS = 5
SETTINGS = (
    "--scheme", "fm", "--min-devices", "4", "--seed", "7", "--log-level", "warning",
    "--batch-size", "8", "--epochs", "2", "--learning-rate", "0.05",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Of a federation: versions of every block from the first to the last, and the devices."""

    blocks: dict[str, list[Vector]]
    engines: list[str]
    accuracies: list[float]


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four devices have: two watches, an accelerometer, a gyroscope."""
    folder = tmp_path_factory.mktemp("windows")
    held = (("acc", "gyro"), ("acc", "gyro"), ("acc",), ("gyro",))
    for i, (modalities, recorded) in enumerate(zip(held, devices(4), strict=True)):
        arrays: dict[str, Any] = {
            "labels": recorded.train.labels,
            "test_labels": recorded.test.labels,
            **{f"train.{m}": recorded.train.inputs[m] for m in modalities},
            **{f"test.{m}": recorded.test.inputs[m] for m in modalities},
        }
        np.savez(folder / f"device-{i}.npz", **arrays)
    return folder


def run_devices(
    pythons: Sequence[Path | str], artifacts: Path, windows: Path, folder: Path
) -> Outcome:
    """A federation with the server here and a process of its own for every device."""
    shutil.copytree(windows, folder)
    arguments = ("--rounds", str(NUM_ROUNDS), *SETTINGS)
    with running_server(artifacts, folder / "server", *arguments) as server:
        processes = [
            subprocess.Popen(
                [python, "-m", "tests.integration.device_of_its_own",
                 server.url, server.token, f"device-{i}", folder],
                cwd=ROOT, env=ENVIRONMENT, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for i, python in enumerate(pythons)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, (_, errors) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, errors
        assert server.get("status")["is_finished"]
        versions = server.query("SELECT block, MAX(version) FROM versions GROUP BY block")
        blocks = {b: [server.block(b, v) for v in (1, last)] for b, last in versions}
        assert {last for _, last in versions} == {1 + NUM_ROUNDS}
    found = [json.loads(out) for out, _ in outputs]
    return Outcome(blocks, [f["engine"] for f in found], [f["accuracy"] for f in found])


def test_a_mixed_federation_converges_as_one(
    watch_artifacts: Path, windows: Path, stock_python: Path, tmp_path: Path
) -> None:
    here = find_runtime().engine
    one = run_devices([sys.executable] * 4, watch_artifacts, windows, tmp_path / "one")
    mixed = run_devices(
        [sys.executable, stock_python, stock_python, sys.executable],
        watch_artifacts, windows, tmp_path / "mixed",
    )  # fmt: skip
    assert one.engines == [here] * 4
    assert mixed.engines == [here, "ort", "ort", here]
    for block, (first, last) in one.blocks.items():
        np.testing.assert_array_equal(first, mixed.blocks[block][0])
        assert np.abs(last - first).max() > 0.05, block
        np.testing.assert_allclose(mixed.blocks[block][1], last, rtol=0, atol=BLOCK_TOLERANCE)
    assert mixed.accuracies == one.accuracies
    assert np.mean(one.accuracies) > 0.4  # by chance: 1/7


# Two packages over each other


ASK = "from petalfl.runtime import find_runtime; find_runtime()"


@pytest.mark.skipif(find_runtime().engine == "ort", reason="both environments have the stock one")
def test_both_packages_unpacked_over_each_other(stock_python: Path, tmp_path: Path) -> None:
    """As pip does it: the second one's files replace the first one's, the metadata of both stay."""
    both = tmp_path / "both"
    theirs = subprocess.run(
        [stock_python, "-c", "import onnxruntime; print(onnxruntime.__file__)"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for site in (Path(onnxruntime.__file__).parents[1], Path(theirs).parents[1]):
        for part in (site / "onnxruntime", *site.glob("onnxruntime*.dist-info")):
            shutil.copytree(part, both / part.name, dirs_exist_ok=True)
    asked = subprocess.run(
        [stock_python, "-c", ASK], capture_output=True, text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(both)},
    )  # fmt: skip
    assert re.search(
        r"ModelError: onnxruntime-training-cpu \S+ and onnxruntime \S+ are installed over each "
        r"other.*: pip uninstall -y onnxruntime-training-cpu onnxruntime && "
        r"pip install petalfl\[ort\]$",
        asked.stderr.strip(),
    ), asked.stderr


def test_the_engine_for_training_asked_of_the_stock_environment(stock_python: Path) -> None:
    command = ASK.replace("()", "('ort-training')")
    asked = subprocess.run([stock_python, "-c", command], capture_output=True, text=True)
    assert re.search(
        r"ModelError: engine ort-training is asked for, onnxruntime \S+ is installed; .*"
        r"pip uninstall onnxruntime && pip install onnxruntime-training-cpu$",
        asked.stderr.strip(),
    ), asked.stderr
