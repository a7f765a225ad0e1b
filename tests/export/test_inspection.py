from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from export.inspection import files, inspect_artifacts
from petalfl.errors import ModelError
from petalfl.model import ModelManifest


def test_the_blocks(watch_artifacts: Path) -> None:
    found = inspect_artifacts(watch_artifacts)
    manifest = ModelManifest.load(watch_artifacts)
    assert (found.name, found.format) == (manifest.name, "onnx")
    assert [(b.name, b.kind, b.modality, b.parameters, b.policy, b.loss) for b in found.blocks] == [
        ("encoder-acc", "encoder", "acc", 150_976, "shared", ""),
        ("encoder-gyro", "encoder", "gyro", 150_976, "shared", ""),
        ("fusion", "fusion", "", 66_562, "private", ""),
        ("head", "head", "", 16_903, "private", "cross_entropy"),
    ]
    for summary, block in zip(found.blocks, manifest.blocks, strict=True):
        folder = watch_artifacts / block.name
        assert summary.num_bytes == sum(path.stat().st_size for path in folder.iterdir())
        assert summary.activation_bytes == block.activation_bytes
        assert summary.num_flops == block.num_flops > 0
    assert found.total.parameters == 385_417
    assert found.total.num_bytes == sum(b.num_bytes for b in found.blocks)
    on_disk = sum(path.stat().st_size for path in watch_artifacts.rglob("*.*"))
    assert found.num_bytes == on_disk


def test_what_a_device_holds_and_moves(watch_artifacts: Path) -> None:
    """By hand: it downloads the graphs once, and its shared encoders every round."""
    found = inspect_artifacts(watch_artifacts)
    assert [d.modalities for d in found.devices] == [("acc",), ("gyro",), ("acc", "gyro")]
    acc, _, both = found.devices
    assert acc.blocks == ("encoder-acc", "fusion", "head")
    assert acc.parameters == 150_976 + 66_562 + 16_903
    assert acc.download_bytes == acc.upload_bytes == 4 * 150_976
    assert both.upload_bytes == 2 * acc.upload_bytes

    def size(path: str) -> int:
        return (watch_artifacts / path).stat().st_size

    graphs = ["encoder-acc/training_forward.onnx", "encoder-acc/training_backward.onnx",
              "encoder-acc/eval_model.onnx", "fusion/training_forward.onnx",
              "fusion/training_backward.onnx", "fusion/eval_model.onnx",
              "head/training_backward.onnx", "head/eval_model.onnx"]  # fmt: skip
    rest = ["fusion/parameters.bin", "head/parameters.bin", "optimizers/sgd.onnx",
            "optimizers/adamw.onnx", "manifest.json"]  # fmt: skip
    assert acc.setup_bytes == sum(map(size, graphs + rest))


def test_every_file_is_checked(small_artifacts: Path, tmp_path: Path) -> None:
    manifest = ModelManifest.load(small_artifacts)
    listed = {artifact.path for artifact in files(manifest)} | {"manifest.json", "reference.json"}
    there = {path for path in small_artifacts.rglob("*") if path.is_file()}
    assert listed == {str(path.relative_to(small_artifacts)) for path in there}
    folder = tmp_path / "copy"
    shutil.copytree(small_artifacts, folder)
    for artifact in files(manifest):
        path = folder / artifact.path
        data = path.read_bytes()
        for wrong in (data[:-1], data + b"\0", bytes([data[0] ^ 1]) + data[1:]):
            path.write_bytes(wrong)
            with pytest.raises(ModelError, match=f"{artifact.path} is damaged or was swapped"):
                inspect_artifacts(folder)
        path.unlink()
        with pytest.raises(ModelError, match=f"{artifact.path} cannot be read"):
            inspect_artifacts(folder)
        path.write_bytes(data)
    inspect_artifacts(folder)


@pytest.mark.parametrize("contents", [None, b"{}", b"losses"])
def test_reference_losses_that_are_missing_or_unusable(
    small_artifacts: Path, tmp_path: Path, contents: bytes | None
) -> None:
    shutil.copytree(small_artifacts, tmp_path / "copy")
    path = tmp_path / "copy" / "reference.json"
    path.unlink() if contents is None else path.write_bytes(contents)
    with pytest.raises(ModelError, match=r"reference\.json"):
        inspect_artifacts(tmp_path / "copy")


def test_a_length_that_the_file_does_not_have(small_artifacts: Path, tmp_path: Path) -> None:
    shutil.copytree(small_artifacts, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    value = json.loads(path.read_bytes())
    value["blocks"][0]["artifacts"]["eval_model"]["num_bytes"] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(ModelError, match=r"encoder-a/eval_model\.onnx is damaged .* bytes, the"):
        inspect_artifacts(tmp_path / "copy")
