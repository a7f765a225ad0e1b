from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl.errors import ModelError
from petalfl.model import (
    MAX_MANIFEST_BYTES,
    Artifact,
    Artifacts,
    Block,
    Dropout,
    Modality,
    ModelManifest,
    Parameter,
    check_artifact,
    read_artifact,
)


def block(
    name: str, kind: str, inputs: tuple[str, ...], shape: tuple[int, ...], rows: int
) -> Block:
    """A block with a ``(rows, 3)`` matrix and a scalar."""
    size = 3 * rows + 1
    sha = hashlib.sha256(name.encode()).hexdigest()
    return Block(
        name,
        kind,  # type: ignore[arg-type]
        inputs,
        shape,
        size,
        (Parameter("weight", (rows, 3)), Parameter("scale", ())),
        (Dropout("mask.drop", shape, 0.25),),
        Artifacts(
            Artifact(f"{name}/training_model.onnx", sha, 100),
            Artifact(f"{name}/eval_model.onnx", sha, 50),
            Artifact(f"{name}/parameters.bin", sha, 4 * size),
        ),
    )


MANIFEST = ModelManifest(
    format_version=1,
    name="watch",
    modalities={"acc": Modality((3, 100)), "gyro": Modality((3, 100)), "ecg": Modality(())},
    blocks=(
        block("encoder-acc", "encoder", ("acc",), (8,), 2),
        block("encoder-gyro", "encoder", ("gyro",), (8,), 2),
        block("encoder-ecg", "encoder", ("ecg",), (4,), 5),
        block("fusion", "fusion", ("encoder-acc", "encoder-gyro", "encoder-ecg"), (16,), 3),
        block("head", "head", ("fusion",), (7,), 4),
    ),
    loss="cross_entropy",
    num_classes=7,
    class_names=tuple("abcdefg"),
    private_blocks=("head",),
)

PLAIN: dict[str, Any] = json.loads(MANIFEST.to_json())


def test_json_round_trip() -> None:
    assert ModelManifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert PLAIN["blocks"][4]["dropouts"] == [{"name": "mask.drop", "rate": 0.25, "shape": [7]}]
    assert PLAIN["modalities"]["ecg"] == {"dtype": "float32", "shape": []}


def test_json_is_the_same_for_any_order_of_fields() -> None:
    backwards = json.dumps(dict(reversed(PLAIN.items()))).encode()
    assert ModelManifest.from_json(backwards).to_json() == MANIFEST.to_json()


def test_a_block_by_name() -> None:
    assert MANIFEST.block("fusion") is MANIFEST.blocks[3]
    with pytest.raises(KeyError, match="tail"):
        MANIFEST.block("tail")


@pytest.mark.parametrize(
    ("modalities", "names"),
    [
        (["acc"], ["encoder-acc", "fusion", "head"]),
        (["gyro"], ["encoder-gyro", "fusion", "head"]),
        (["ecg", "acc"], ["encoder-acc", "encoder-ecg", "fusion", "head"]),
        (["ecg", "gyro", "acc"],
         ["encoder-acc", "encoder-gyro", "encoder-ecg", "fusion", "head"]),
    ],
)  # fmt: skip
def test_the_blocks_of_a_device(modalities: list[str], names: list[str]) -> None:
    assert [b.name for b in MANIFEST.blocks_for(modalities)] == names
    assert [b.name for b in MANIFEST.blocks_for(dict.fromkeys(modalities))] == names


def test_a_device_without_a_known_modality() -> None:
    with pytest.raises(ModelError, match="found no modality, the model has acc, gyro, ecg"):
        MANIFEST.blocks_for([])
    with pytest.raises(ModelError, match="found modality 'lidar', the model has"):
        MANIFEST.blocks_for(["acc", "lidar"])


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    value = copy.deepcopy(PLAIN)
    change(value)
    return json.dumps(value).encode()


def put(path: str, value: object) -> Callable[[dict[str, Any]], object]:
    """Sets the entry at a path such as ``blocks.0.name``."""
    *steps, last = path.split(".")

    def change(plain: Any) -> None:
        for step in steps:
            plain = plain[int(step)] if isinstance(plain, list) else plain[step]
        plain[int(last) if isinstance(plain, list) else last] = value

    return change


LAYOUT = {
    "a block's name": ("blocks.4.name", None, True),
    "a parameter's name": ("blocks.0.parameters.0.name", "other", True),
    "a parameter's shape": ("blocks.0.parameters.0.shape", [3, 2], True),
    "the model's name": ("name", "other", False),
    "the sharing policy": ("private_blocks", [], False),
    "the initial values": ("blocks.0.artifacts.parameters.sha256", "0" * 64, False),
    "a dropout": ("blocks.0.dropouts", [], False),
}


@pytest.mark.parametrize("what", LAYOUT)
def test_the_layout_digest_is_of_blocks_parameters_and_shapes(what: str) -> None:
    path, value, is_other = LAYOUT[what]
    if value is None:
        data = MANIFEST.to_json().replace(b'"head', b'"tail')
    else:
        data = changed(put(path, value))
    if what == "a block's name":
        data = data.replace(b'"kind": "tail"', b'"kind": "head"')
    other = ModelManifest.from_json(data)
    assert other != MANIFEST
    assert (other.layout_sha256 != MANIFEST.layout_sha256) is is_other


def climbing(path: str) -> tuple[bytes, str]:
    return changed(put("blocks.4.artifacts.eval_model.path", path)), "leads out of its folder"


def reordered(*order: int) -> bytes:
    return changed(lambda plain: plain.update(blocks=[plain["blocks"][i] for i in order]))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no JSON"),
    "text": (b"hello", "no JSON"),
    "cut short": (MANIFEST.to_json()[:-9], "no JSON"),
    "two": (MANIFEST.to_json() * 2, "no JSON"),
    "not utf-8": (b"\xff\xfe\xfd", "no JSON"),
    "too long": (b" " * (MAX_MANIFEST_BYTES + 1), "more than"),
    "a pit of lists": (b"[" * 1_000_000, "no JSON"),
    "a pit of maps": (b'{"format_version":' * 200_000, "no JSON"),
    "an endless number": (b'{"format_version": 1' + b"0" * 5000 + b"}", "no JSON|format_version"),
    "a list": (b"[1]", "format_version None"),
    "null": (b"null", "format_version None"),
    "no version": (b"{}", "format_version None"),
    "newer": (changed(put("format_version", 2)), "format_version 2, this petalfl reads 1"),
    "version as text": (changed(put("format_version", "1")), "format_version '1'"),
    "version true": (changed(put("format_version", True)), "expected int, found True"),
    "version 1.0": (changed(put("format_version", 1.0)), r"expected int, found 1\.0"),
    "version only": (b'{"format_version": 1}', "is missing"),
    "unknown field": (changed(put("license", "x")), "unknown field 'license'"),
    "unknown field of a block": (changed(put("blocks.0.x", 1)), "unknown field 'x'"),
    "name climbs": (changed(put("name", "../watch")), "does not match"),
    "block name climbs": (changed(put("blocks.0.name", "..")), "does not match"),
    "no modalities": (changed(put("modalities", {})), "outside"),
    "modality climbs": (changed(put("modalities", {"../acc": {"shape": [3]}})), "does not match"),
    "modality of integers": (changed(put("modalities.acc.dtype", "int64")), "expected one of"),
    "negative dimension": (changed(put("modalities.acc.shape", [-3, 100])), "outside"),
    "huge dimension": (changed(put("modalities.acc.shape", [(1 << 24) + 1])), "outside"),
    "nine dimensions": (changed(put("modalities.acc.shape", [1] * 9)), "outside"),
    "no blocks": (changed(put("blocks", [])), "outside"),
    "129 blocks": (changed(put("blocks", PLAIN["blocks"] * 26)), "outside"),
    "unknown kind": (changed(put("blocks.0.kind", "decoder")), "expected one of"),
    "unknown loss": (changed(put("loss", "mse")), "expected one of"),
    "one class": (changed(put("num_classes", 1)), "outside"),
    "duplicate block": (changed(put("blocks.1.name", "encoder-acc")), "used twice"),
    "block called as a modality": (changed(put("blocks.1.name", "acc")), "used twice"),
    "no head": (reordered(0, 1, 2, 3), "then a head"),
    "head first": (reordered(4, 0, 1, 2, 3), "comes from nowhere"),
    "fusion before its encoders": (reordered(3, 0, 1, 2, 4), "comes from nowhere before it"),
    "encoder missing": (reordered(0, 1, 3, 4), "input 'encoder-ecg' comes from nowhere"),
    "two fusions": (
        changed(lambda p: (p["blocks"][2].update(kind="fusion"))), "then a fusion"
    ),
    "two heads": (changed(lambda p: p["blocks"][3].update(kind="head")), "then a head"),
    "input of itself": (changed(put("blocks.0.inputs", ["encoder-acc"])), "comes from nowhere"),
    "input of a later block": (changed(put("blocks.0.inputs", ["head"])), "comes from nowhere"),
    "no input": (changed(put("blocks.0.inputs", [])), "outside"),
    "unknown private block": (changed(put("private_blocks", ["tail"])), "'tail' is no block"),
    "private modality": (changed(put("private_blocks", ["acc"])), "'acc' is no block"),
    "size too large": (changed(put("blocks.0.size", 8)), "size 8, its parameters have 7"),
    "size of nothing": (changed(put("blocks.0.size", 0)), "outside"),
    "size of 10 GB": (changed(put("blocks.0.size", 10 << 30)), "outside"),
    "parameters of 10 GB": (
        changed(put("blocks.0.parameters.0.shape", [1 << 20, 10_000])), "its parameters have"
    ),
    "parameters beyond 64 bits": (
        changed(put("blocks.0.parameters.0.shape", [1 << 24] * 8)), "its parameters have"
    ),
    "negative sizes that cancel": (
        changed(put("blocks.0.parameters.0.shape", [-2, -3])), "outside"
    ),
    "no parameters": (changed(put("blocks.0.parameters", [])), "outside"),
    "initial values cut": (
        changed(put("blocks.0.artifacts.parameters.num_bytes", 27)),
        "initial values of 27 bytes, expected 28",
    ),
    "artifact of 10 GB": (
        changed(put("blocks.0.artifacts.eval_model.num_bytes", 10 << 30)), "outside"
    ),
    "artifact of -1 bytes": (
        changed(put("blocks.0.artifacts.eval_model.num_bytes", -1)), "outside"
    ),
    "digest too short": (
        changed(put("blocks.0.artifacts.eval_model.sha256", "ab")), "does not match"
    ),
    "dropout of everything": (changed(put("blocks.0.dropouts.0.rate", 1.0)), "outside"),
    "dropout of NaN": (changed(put("blocks.0.dropouts.0.rate", float("nan"))), "finite"),
    "dropout beyond a float": (
        changed(put("blocks.0.dropouts.0.rate", 1e308)).replace(b"1e+308", b"1e999"), "finite"
    ),
    "path up": climbing("../x"),
    "path up and down": climbing("head/../../x"),
    "path absolute": climbing("/etc/passwd"),
    "path in the parent": climbing("head/.."),
    "path of the folder": climbing("head/."),
    "path without a file": climbing("head/"),
    "path of the folder itself": climbing("head"),
    "path in another block": climbing("fusion/eval_model.onnx"),
    "path with two slashes": climbing("head//etc"),
    "path with a backslash": climbing("head\\..\\x"),
    "path of a drive": climbing("C:\\x"),
    "path below": climbing("head/sub/x.onnx"),
    "path with a null": climbing("head/x\0"),
    "path with a newline": climbing("head/x\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests(case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises(ModelError, match=message) as error:
        ModelManifest.from_json(data)
    assert len(str(error.value)) < 300


def test_a_rate_of_400_digits() -> None:
    data = changed(put("blocks.0.dropouts.0.rate", 10**400))
    with pytest.raises(ModelError):
        ModelManifest.from_json(data)


# Manifests that read well and cannot be trained: `step_gradients` meets a KeyError or nonsense.
INCONSISTENT: dict[str, bytes] = {
    "encoder of an encoder": changed(put("blocks.1.inputs", ["encoder-acc"])),
    "encoder of two modalities": changed(put("blocks.0.inputs", ["acc", "gyro"])),
    "two encoders of one modality": changed(put("blocks.1.inputs", ["acc"])),
    "fusion of modalities": changed(put("blocks.3.inputs", ["acc", "gyro"])),
    "fusion of one encoder twice": changed(put("blocks.3.inputs", ["encoder-acc"] * 2)),
    "head past the fusion": changed(put("blocks.4.inputs", ["encoder-acc"])),
    "head of a modality": changed(put("blocks.4.inputs", ["acc"])),
    "head of other classes": changed(put("blocks.4.output_shape", [9])),
    "fewer class names than classes": changed(put("class_names", ["a"])),
    "two parameters of one name": changed(put("blocks.0.parameters.1.name", "weight")),
    "mask called as an input": changed(put("blocks.4.dropouts.0.name", "fusion")),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_inconsistent_manifests(case: str) -> None:
    with pytest.raises(ModelError):
        ModelManifest.from_json(INCONSISTENT[case])


LEAVES = st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats() | st.text(max_size=9)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def paths(value: Any, before: str = "") -> list[str]:
    if not isinstance(value, (dict, list)):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [p for k, v in items for p in (f"{before}{k}", *paths(v, f"{before}{k}."))]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(paths(PLAIN)), VALUES)
def test_any_change_is_read_or_refused(path: str, value: object) -> None:
    data = changed(put(path, value))
    try:
        manifest = ModelManifest.from_json(data)
    except ModelError:
        return
    assert ModelManifest.from_json(manifest.to_json()) == manifest


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ModelError):
        ModelManifest.from_json(data)


def test_load(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(MANIFEST.to_json())
    assert ModelManifest.load(tmp_path) == MANIFEST
    with pytest.raises(ModelError, match=r"no artifacts at .*nowhere: .*python -m export"):
        ModelManifest.load(tmp_path / "nowhere")
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    with pytest.raises(ModelError, match="no artifacts at"):
        ModelManifest.load(tmp_path / "folder")


def test_read_artifact(tmp_path: Path) -> None:
    data = b"the graph of a block"
    artifact = Artifact("head/eval_model.onnx", hashlib.sha256(data).hexdigest(), len(data))
    with pytest.raises(ModelError, match=r"artifact head/eval_model\.onnx cannot be read"):
        read_artifact(tmp_path, artifact)
    path = tmp_path / "head" / "eval_model.onnx"
    path.parent.mkdir()
    path.write_bytes(data)
    assert read_artifact(tmp_path, artifact) == data
    check_artifact(artifact, data)
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        path.write_bytes(flipped)
        with pytest.raises(ModelError, match=r"eval_model\.onnx is damaged or was swapped: sha256"):
            read_artifact(tmp_path, artifact)
    for other in (data[:-1], data + b"\0", b""):
        with pytest.raises(ModelError, match="damaged"):
            check_artifact(artifact, other)
