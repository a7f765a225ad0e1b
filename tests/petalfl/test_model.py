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
    Modality,
    ModelManifest,
    Task,
    check_artifact,
    differentiated,
    read_artifact,
)
from tests.petalfl.builders import (
    fusionless_manifest,
    make_block,
    make_manifest,
    rich_manifest,
)

MANIFEST = make_manifest(
    {"acc": Modality((3, 100)), "gyro": Modality(()),
     "text": Modality((None,), "int64", 1000, ((1, 64),))},
    make_block("encoder-acc", ("acc",), 2, 3, dropout=0.25),
    make_block("backbone-text", ("text",), {"tokens": 4, "mean": 2}, 1, is_frozen=True,
               reached=False),
    make_block("encoder-gyro", ("gyro",), 2, 3, statistics=2, min_batch=2),
    make_block("projector-text", ("backbone-text",), 2, 6),
    make_block("fusion", ("encoder-acc", "encoder-gyro", "projector-text"), 4, 6),
    make_block("head-activity", ("fusion",), 3, 4,
               task=Task("cross_entropy", 1.0, ("x", "y", "z"))),
    make_block("head-rate", ("fusion",), 1, 4, task=Task("mse", 0.5)),
    private_blocks=("encoder-acc",),
    source="my_model:build",
)  # fmt: skip
RICH, FUSIONLESS = rich_manifest(), fusionless_manifest()

PLAIN: dict[str, Any] = json.loads(MANIFEST.to_json())
NAMES = [block["name"] for block in PLAIN["blocks"]]


def test_json_round_trip() -> None:
    for manifest in (MANIFEST, RICH, FUSIONLESS):
        assert ModelManifest.from_json(manifest.to_json()) == manifest
    assert PLAIN["blocks"][0]["dropouts"] == [
        {"name": "mask.0", "rate": 0.25, "shape": [2], "varying": [], "batch_axis": 0}
    ]
    assert PLAIN["modalities"]["text"] == {
        "dtype": "int64",
        "num_values": 1000,
        "shape": [None],
        "ranges": [[1, 64]],
    }
    assert PLAIN["blocks"][5]["artifacts"]["training_forward"] is None
    assert PLAIN["blocks"][5]["task"] == {
        "class_names": ["x", "y", "z"], "loss": "cross_entropy", "weight": 1.0,
        "personalizes": None,
    }  # fmt: skip


def test_json_is_the_same_for_any_order_of_fields() -> None:
    backwards = json.dumps(dict(reversed(PLAIN.items()))).encode()
    assert ModelManifest.from_json(backwards).to_json() == MANIFEST.to_json()


def test_a_block_by_name() -> None:
    assert MANIFEST.block("fusion") is MANIFEST.blocks[4]
    with pytest.raises(KeyError, match="tail"):
        MANIFEST.block("tail")


def test_heads_by_task() -> None:
    assert list(MANIFEST.heads.items()) == [
        ("activity", MANIFEST.blocks[5]), ("rate", MANIFEST.blocks[6])
    ]  # fmt: skip
    one = make_manifest({"a": 1}, make_block("encoder-a", ("a",), 1, 1),
                        make_block("head", ("encoder-a",), 1, 1))  # fmt: skip
    assert list(one.heads) == ["head"]


def test_the_modality_of_an_encoder() -> None:
    found = {b.name: MANIFEST.modality_of(b) for b in MANIFEST.blocks if b.kind == "encoder"}
    assert found == {
        "encoder-acc": "acc", "backbone-text": "text", "encoder-gyro": "gyro",
        "projector-text": "text",
    }  # fmt: skip


BOTH = ["head-activity", "head-rate"]


@pytest.mark.parametrize(
    ("modalities", "tasks", "names"),
    [
        (["acc"], None, ["encoder-acc", "fusion", *BOTH]),
        (["gyro"], ["rate"], ["encoder-gyro", "fusion", "head-rate"]),
        (["text"], ["rate", "activity"], ["backbone-text", "projector-text", "fusion", *BOTH]),
        (["text", "acc"], ["activity"],
         ["encoder-acc", "backbone-text", "projector-text", "fusion", "head-activity"]),
        (["text", "gyro", "acc"], None, NAMES),
    ],
)  # fmt: skip
def test_the_blocks_of_a_device(
    modalities: list[str], tasks: list[str] | None, names: list[str]
) -> None:
    assert [b.name for b in MANIFEST.blocks_for(modalities, tasks)] == names
    of_tasks = None if tasks is None else dict.fromkeys(tasks)
    assert [b.name for b in MANIFEST.blocks_for(dict.fromkeys(modalities), of_tasks)] == names


def test_a_device_without_a_known_modality_or_task() -> None:
    with pytest.raises(ModelError, match="found no modality, the model has acc, gyro, text"):
        MANIFEST.blocks_for([])
    with pytest.raises(ModelError, match="found modality 'lidar', the model has"):
        MANIFEST.blocks_for(["acc", "lidar"])
    with pytest.raises(ModelError, match="found no task, the model has activity, rate"):
        MANIFEST.blocks_for(["acc"], [])
    with pytest.raises(ModelError, match="found task 'head-rate', the model has activity, rate"):
        MANIFEST.blocks_for(["acc"], ["head-rate"])


def test_what_gradients_reach() -> None:
    assert differentiated(MANIFEST.blocks) == set(NAMES) - {"backbone-text"}
    frozen = make_block("fusion", ("a", "b"), 2, 2, is_frozen=True)
    assert differentiated([frozen]) == set()
    head = make_block("head", ("fusion",), 2, 2, is_frozen=True)
    encoder = make_block("a", (), 2, 2)
    assert differentiated([encoder, frozen, head]) == {"a", "fusion", "head"}


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


def set_(path: str, value: object) -> bytes:
    return changed(put(path, value))


LAYOUT = {
    "a parameter's name": ("blocks.0.parameters.0.name", "other", True),
    "a parameter's shape": ("blocks.0.parameters.0.shape", [2, 3], True),
    "a statistic's name": ("blocks.2.statistics.0.name", "other", True),
    "the values of a frozen block": ("blocks.1.artifacts.parameters.sha256", "0" * 64, True),
    "the wiring": ("blocks.4.inputs", ["encoder-gyro", "encoder-acc", "projector-text"], True),
    "the model's name": ("name", "other", False),
    "the sharing policy": ("private_blocks", [], False),
    "the initial values": ("blocks.0.artifacts.parameters.sha256", "0" * 64, False),
    "a dropout": ("blocks.0.dropouts", [], False),
    "a graph": ("blocks.0.artifacts.eval_model.sha256", "0" * 64, False),
    "where it came from": ("source", "", False),
}


@pytest.mark.parametrize("what", LAYOUT)
def test_the_layout_digest_is_of_what_makes_vectors_interchangeable(what: str) -> None:
    path, value, is_other = LAYOUT[what]
    other = ModelManifest.from_json(set_(path, value))
    assert other != MANIFEST
    assert (other.layout_sha256 != MANIFEST.layout_sha256) is is_other


def test_the_layout_digest_is_of_names_and_of_what_is_frozen() -> None:
    renamed = ModelManifest.from_json(MANIFEST.to_json().replace(b"head-rate", b"head-pace"))
    assert renamed.layout_sha256 != MANIFEST.layout_sha256
    blocks = [make_block("encoder-a", ("a",), 2, 2, is_frozen=f, reached=not f)
              for f in (False, True)]  # fmt: skip
    head = make_block("head", ("encoder-a",), 2, 2)
    one, other = (make_manifest({"a": 2}, b, head).layout_sha256 for b in blocks)
    assert one != other


def test_a_digest_of_old_stays() -> None:
    """A server's data folder outlives its program."""
    expected = "97e8cc895823361988fbe93f7a9c31c2923af933a7840226d7c0fa23830833c0"
    assert MANIFEST.layout_sha256 == expected


def climbing(path: str) -> tuple[bytes, str]:
    return set_("blocks.6.artifacts.eval_model.path", path), "leads out of head-rate/"


def reordered(*order: int) -> bytes:
    return changed(lambda plain: plain.update(blocks=[plain["blocks"][i] for i in order]))


KINDS = "expected encoders, then at most one fusion, then heads"
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
    "older": (
        set_("format_version", 1),
        "format_version 1, this petalfl reads 2: export the model again$",
    ),
    "newer": (
        set_("format_version", 3),
        "format_version 3, this petalfl reads 2: install a newer petalfl$",
    ),
    "version as text": (set_("format_version", "2"), "format_version '2'"),
    "version true": (set_("format_version", True), "format_version True"),
    "version 2.0": (set_("format_version", 2.0), r"expected int, found 2\.0"),
    "version only": (b'{"format_version": 2}', "is missing"),
    "unknown field": (set_("license", "x"), "unknown field 'license'"),
    "unknown field of a block": (set_("blocks.0.x", 1), "unknown field 'x'"),
    "name climbs": (set_("name", "../watch"), "does not match"),
    "block name climbs": (set_("blocks.0.name", ".."), "does not match"),
    "no modalities": (set_("modalities", {}), "outside"),
    "modality climbs": (set_("modalities", {"../acc": {"shape": [3]}}), "does not match"),
    "modality of doubles": (set_("modalities.acc.dtype", "float64"), "expected one of"),
    "negative dimension": (set_("modalities.acc.shape", [-3, 100]), "outside"),
    "huge dimension": (set_("modalities.acc.shape", [(1 << 24) + 1]), "outside"),
    "nine dimensions": (set_("modalities.acc.shape", [1] * 9), "outside"),
    "no blocks": (set_("blocks", []), "outside"),
    "129 blocks": (set_("blocks", PLAIN["blocks"] * 19), "outside"),
    "unknown kind": (set_("blocks.0.kind", "decoder"), "expected one of"),
    "unknown loss": (set_("blocks.6.task.loss", "hinge"), "expected one of"),
    "unknown policy for the missing": (set_("missing", "mean"), "expected one of"),
    "weight of NaN": (set_("blocks.6.task.weight", float("nan")), "finite"),
    "negative weight": (set_("blocks.6.task.weight", -1), "outside"),
    "size of -1": (set_("blocks.0.size", -1), "outside"),
    "size of 10 GB": (set_("blocks.0.size", 10 << 30), "outside"),
    "negative sizes that cancel": (set_("blocks.0.parameters.0.shape", [-2, -3]), "outside"),
    "batches of none": (set_("blocks.0.min_batch", 0), "outside"),
    "artifact of 10 GB": (set_("blocks.0.artifacts.eval_model.num_bytes", 10 << 30), "outside"),
    "artifact of -1 bytes": (set_("blocks.0.artifacts.eval_model.num_bytes", -1), "outside"),
    "digest too short": (set_("blocks.0.artifacts.eval_model.sha256", "ab"), "does not match"),
    "dropout of everything": (set_("blocks.0.dropouts.0.rate", 1.0), "outside"),
    "dropout of NaN": (set_("blocks.0.dropouts.0.rate", float("nan")), "finite"),
    "dropout beyond a float": (
        set_("blocks.0.dropouts.0.rate", 1e308).replace(b"1e+308", b"1e999"), "finite"
    ),
    "no input": (set_("blocks.0.inputs", []), "outside"),
    "no output": (set_("blocks.0.outputs", []), "outside"),
    "path up": climbing("../x"),
    "path up and down": climbing("head-rate/../../x"),
    "path absolute": climbing("/etc/passwd"),
    "path in the parent": climbing("head-rate/.."),
    "path of the folder": climbing("head-rate/."),
    "path without a file": climbing("head-rate/"),
    "path of the folder itself": climbing("head-rate"),
    "path in another block": climbing("fusion/eval_model.onnx"),
    "path with two slashes": climbing("head-rate//etc"),
    "path with a backslash": climbing("head-rate\\..\\x"),
    "path of a drive": climbing("C:\\x"),
    "path below": climbing("head-rate/sub/x.onnx"),
    "path with a null": climbing("head-rate/x\0"),
    "path with a newline": climbing("head-rate/x\n"),
    "path of an optimizer": (
        set_("optimizers.sgd.path", "optimizers/../x"), "the optimizers: path .* out of optimizers/"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests(case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises(ModelError, match=message) as error:
        ModelManifest.from_json(data)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_rate_of_400_digits() -> None:
    with pytest.raises(ModelError):
        ModelManifest.from_json(set_("blocks.0.dropouts.0.rate", 10**400))


HEAD = PLAIN["blocks"][6]
GRAPH = HEAD["artifacts"]["eval_model"]

# Manifests that read well and cannot be trained: the message names the block.
INCONSISTENT: dict[str, tuple[bytes, str]] = {
    # Names
    "duplicate block": (set_("blocks.2.name", "encoder-acc"), "encoder-acc: the name is used"),
    "block called as a modality": (set_("blocks.0.name", "acc"), "acc: the name is used twice"),
    "modality called as a graph's input": (
        MANIFEST.to_json().replace(b'"acc"', b'"labels"'), "labels: the name is .*reserved"
    ),
    "fusion of another name": (
        MANIFEST.to_json().replace(b'"name": "fusion"', b'"name": "mix"'), "block mix: "
    ),
    "encoder of another name": (
        MANIFEST.to_json().replace(b"encoder-acc", b"encoder-x"),
        "block encoder-x: expected the name STAGE-MODALITY",
    ),
    "head of another name": (
        MANIFEST.to_json().replace(b"head-rate", b"rate"), "block rate: expected the name"
    ),
    "the head among several": (
        MANIFEST.to_json().replace(b"head-rate", b"head"), "block head: expected head-TASK"
    ),
    "unknown private block": (set_("private_blocks", ["tail"]), "'tail' is no block"),
    "private modality": (set_("private_blocks", ["acc"]), "'acc' is no block"),
    "a state elsewhere": (
        set_("state", {**GRAPH, "path": "../state.pt"}), "state: path .*, expected state.pt"
    ),
    # Modalities and optimizers
    "integers without a range": (
        set_("modalities.text.num_values", None), "modality text: int64 with num_values None"
    ),
    "a range of floats": (
        set_("modalities.acc.num_values", 9), "modality acc: float32 with num_values 9"
    ),
    "no optimizers": (set_("optimizers", {}), "optimizer sgd is missing"),
    "no adamw": (
        changed(lambda p: p["optimizers"].pop("adamw")), r"adamw is missing, found \['sgd'\]"
    ),
    # Wiring
    "no head": (reordered(0, 1, 2, 3, 4), KINDS),
    "head first": (reordered(6, 0, 1, 2, 3, 4, 5), KINDS),
    "fusion before an encoder": (reordered(0, 1, 2, 4, 3, 5, 6), KINDS),
    "two fusions": (
        changed(lambda p: p["blocks"][5].update(kind="fusion", task=None)), KINDS
    ),
    "a modality without an encoder": (reordered(0, 1, 3, 4, 5, 6), "modality gyro: no encoder"),
    "stages in another order": (reordered(0, 3, 2, 1, 4, 5, 6), "block projector-text: takes"),
    "encoder of a foreign encoder": (
        set_("blocks.2.inputs", ["encoder-acc"]), "block encoder-gyro: expected the name"
    ),
    "encoder of two modalities": (
        set_("blocks.0.inputs", ["acc", "gyro"]),
        r"block encoder-acc: takes \['acc', 'gyro'\], expected one modality without an encoder",
    ),
    "two encoders of one modality": (set_("blocks.3.inputs", ["text"]), "projector-text: takes"),
    "input of itself": (set_("blocks.0.inputs", ["encoder-acc"]), "block encoder-acc: takes"),
    "input of a later block": (set_("blocks.0.inputs", ["head-rate"]), "encoder-acc: takes"),
    "fusion of modalities": (set_("blocks.4.inputs", ["acc", "gyro", "text"]), "fusion: takes"),
    "fusion of an early stage": (
        set_("blocks.4.inputs", ["encoder-acc", "encoder-gyro", "backbone-text"]),
        "block fusion: takes",
    ),
    "fusion of one encoder twice": (set_("blocks.4.inputs", ["encoder-acc"] * 3), "fusion: takes"),
    "fusion of some": (set_("blocks.4.inputs", ["encoder-acc"]), "block fusion: takes"),
    "head past the fusion": (
        set_("blocks.6.inputs", ["encoder-acc"]),
        r"block head-rate: takes \['encoder-acc'\], expected \['fusion'\]",
    ),
    "head of a head": (set_("blocks.6.inputs", ["head-activity"]), "block head-rate: takes"),
    "head of a modality": (set_("blocks.6.inputs", ["acc"]), "block head-rate: takes"),
    # Outputs and tasks
    "output of another name": (
        set_("blocks.0.outputs.0.name", "encoder-gyro"), "block encoder-acc: outputs"
    ),
    "output without a key": (set_("blocks.1.outputs.0.name", "backbone-text."), "outputs"),
    "output and parts": (set_("blocks.1.outputs.0.name", "backbone-text"), "outputs"),
    "two outputs of one name": (
        set_("blocks.1.outputs.0.name", "backbone-text.mean"), "block backbone-text: outputs"
    ),
    "head of two outputs": (
        set_("blocks.6.outputs", [{"name": f"head-rate.{i}", "shape": [1]} for i in range(2)]),
        "block head-rate: 2 outputs, a head has one",
    ),
    "head without a task": (set_("blocks.6.task", None), "block head-rate: expected a task"),
    "encoder with a task": (set_("blocks.0.task", HEAD["task"]), "encoder-acc: expected a task"),
    "one class": (set_("blocks.5.outputs.0.shape", [1]), "block head-activity: outputs of"),
    "classes that vary": (set_("blocks.5.outputs.0.shape", [None]), "head-activity: outputs of"),
    "classes by pixel": (set_("blocks.5.outputs.0.shape", [3, 8]), "head-activity: outputs of"),
    "fewer class names than classes": (
        set_("blocks.5.task.class_names", ["a"]), "block head-activity: 1 class names for outputs"
    ),
    # Vectors
    "size too large": (
        changed(lambda p: p["blocks"][0].update(size=9)), "encoder-acc: size 9, its tensors have 8"
    ),
    "parameters of 10 GB": (
        set_("blocks.0.parameters.0.shape", [1 << 20, 10_000]), "its tensors have"
    ),
    "parameters beyond 64 bits": (
        set_("blocks.0.parameters.0.shape", [1 << 24] * 8), "its tensors have"
    ),
    "statistics beyond the size": (
        set_("blocks.2.statistics.0.shape", [3]), "encoder-gyro: size 10, its tensors have 11"
    ),
    "two parameters of one name": (
        set_("blocks.0.parameters.1.name", "weight"), "encoder-acc: two tensors of one name"
    ),
    "a statistic called as a parameter": (
        set_("blocks.2.statistics.0.name", "weight"), "encoder-gyro: two tensors of one name"
    ),
    "trainable statistics": (
        set_("blocks.2.num_trainable", 10), "encoder-gyro: num_trainable 10, expected 8"
    ),
    "trainable and frozen": (
        set_("blocks.1.num_trainable", 12), "backbone-text: num_trainable 12, expected 0"
    ),
    "initial values cut": (
        set_("blocks.0.artifacts.parameters.num_bytes", 31),
        "encoder-acc: initial values of 31 bytes, expected 32",
    ),
    "empty and not frozen": (
        changed(lambda p: p["blocks"][4].update(
            size=0, num_trainable=0, parameters=[],
            artifacts={**p["blocks"][4]["artifacts"],
                       "parameters": {**GRAPH, "path": "fusion/parameters.bin", "num_bytes": 0}},
        )),
        "block fusion: is_frozen is false, and there is nothing to train",
    ),
    # Masks and graphs
    "mask of another name": (
        set_("blocks.0.dropouts.0.name", "mask.drop"), "encoder-acc: masks .*, expected mask.0"
    ),
    "masks in another order": (
        set_("blocks.0.dropouts", [{"name": f"mask.{i}", "shape": [2], "rate": 0.5}
                                   for i in (1, 0)]),
        "block encoder-acc: masks",
    ),
    "no forward graph": (
        set_("blocks.0.artifacts.training_forward", None), "encoder-acc: needs a training_forward"
    ),
    "no backward graph": (
        set_("blocks.6.artifacts.training_backward", None), "head-rate: needs a training_backward"
    ),
    "forward graph of a head": (
        set_("blocks.6.artifacts.training_forward", GRAPH), "head-rate: needs no training_forward"
    ),
    "forward graph of a frozen block": (
        set_("blocks.1.artifacts.training_forward", {**GRAPH, "path": "backbone-text/x"}),
        "block backbone-text: needs no training_forward",
    ),
    "backward graph of what nothing trains": (
        set_("blocks.1.artifacts.training_backward", {**GRAPH, "path": "backbone-text/x"}),
        "block backbone-text: needs no training_backward",
    ),
    "nothing trains": (
        changed(lambda p: [b.update(is_frozen=True, num_trainable=0) for b in p["blocks"]]),
        "no block trains",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INCONSISTENT)
def test_inconsistent_manifests(case: str) -> None:
    data, message = INCONSISTENT[case]
    with pytest.raises(ModelError, match=message) as error:
        ModelManifest.from_json(data)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


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
