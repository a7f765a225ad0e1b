"""`docs/manifest.schema.json` says of a manifest's form what the reader says."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from petalfl.errors import ModelError
from petalfl.model import FORMAT_VERSION, ModelManifest
from petalfl.schema import read
from tests.petalfl.builders import fusionless_manifest, rich_manifest

FILE = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
SCHEMA: dict[str, Any] = json.loads(FILE.read_bytes())
VALIDATOR = Draft202012Validator(SCHEMA)
COMMAND = "python -c 'from export.schema import manifest_schema as s; print(s(), end=\"\")'"

Place = tuple[str | int, ...]


@functools.cache
def manifests() -> dict[str, Any]:
    """Valid manifests, as JSON has them; the first has something in every field."""
    rich = json.loads(rich_manifest(private_blocks=("fusion",), source="models:build").to_json())
    rich["modalities"]["a"] = {
        "shape": [None, 2],
        "dtype": "int64",
        "num_values": 5,
        "ranges": [[2, 9]],
    }
    task = next(b["task"] for b in rich["blocks"] if b["name"] == "head-q")
    task |= {"class_names": ["x", "y", "z"], "weight": 1.5}  # no whole floats: see LEAVES
    return {"rich": rich, "fusionless": json.loads(fusionless_manifest().to_json())}


def is_read(value: object) -> bool:
    """Whether the reader finds no fault with the form; the rest of `from_json` is of meaning."""
    try:
        return read(ModelManifest, value).format_version == FORMAT_VERSION
    except ValueError:
        return False


def check_agreement(value: object) -> bool:
    """Schema and reader agree, and what they refuse `from_json` refuses; whether they take it."""
    is_valid = VALIDATOR.is_valid(value)
    assert is_valid is is_read(value)
    if not is_valid:
        with pytest.raises(ModelError):
            ModelManifest.from_json(json.dumps(value).encode())
    return is_valid


def paths(value: Any, before: Place = ()) -> Iterator[Place]:
    """The place of everything in a JSON value, itself included."""
    yield before
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(item, (*before, key))


def at(value: Any, path: Place) -> Any:
    return functools.reduce(lambda inner, key: inner[key], path, value)


def changed(value: Any, path: Place, new: object) -> Any:
    """A copy with another value at the path."""
    value = copy.deepcopy(value)
    if not path:
        return new
    at(value, path[:-1])[path[-1]] = new
    return value


def test_the_file_is_current() -> None:
    pytest.importorskip("torch", reason="without torch: export needs it")
    from export.schema import manifest_schema

    assert FILE.read_text(encoding="utf-8") == manifest_schema(), f"{COMMAND} > {FILE}"


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


@pytest.mark.parametrize("name", ["rich", "fusionless"])
def test_real_manifests_are_valid(name: str) -> None:
    value = manifests()[name]
    ModelManifest.from_json(json.dumps(value).encode())
    assert check_agreement(value)


def test_every_definition_is_met() -> None:
    """The tests below reach all of the schema: each object of the first manifest is filled."""
    rich = manifests()["rich"]
    met = {frozenset(o) for path in paths(rich) if isinstance(o := at(rich, path), dict)}
    for definition in SCHEMA["$defs"].values():
        assert frozenset(definition["properties"]) in met


def test_a_field_less_or_more() -> None:
    rich = manifests()["rich"]
    for path in paths(rich):
        if isinstance(found := at(rich, path), dict):
            assert not check_agreement(changed(rich, path, {**found, "Surplus": 1}))
            for key in found:
                check_agreement(changed(rich, path, {k: v for k, v in found.items() if k != key}))


def test_another_version() -> None:
    for version in (0, FORMAT_VERSION - 1, FORMAT_VERSION + 1, str(FORMAT_VERSION), None, True):
        assert not check_agreement(changed(manifests()["rich"], ("format_version",), version))


@pytest.mark.parametrize(
    ("path", "inside", "outside"),
    [
        (("name",), ["a", "a-", "x" * 64], ["", "-a", "A", "a/b", "x" * 65, "é"]),
        (("source",), ["", "x" * 1024], ["x" * 1025]),
        (("missing",), ["zero"], ["none", "", None]),
        (("modalities", "a", "shape"), [[], [None] * 8, [1 << 24]],
         [[1] * 9, [0], [(1 << 24) + 1]]),
        (("modalities", "a", "num_values"), [None, 1, 1 << 31], [0, (1 << 31) + 1, True]),
        (("blocks", 0, "inputs"), [["a"] * 64], [[], ["a"] * 65, ["A"]]),
        (("blocks", 0, "size"), [0, 1 << 28], [-1, (1 << 28) + 1, 1.5]),
        (("blocks", 0, "parameters", 0, "shape"), [[], [0]], [[None], [-1]]),
        (("blocks", 0, "parameters", 0, "name"), ["é" * 256], ["", "é" * 257]),
        (("blocks", 2, "dropouts", 0, "rate"), [0, 0.0, 0.999],
         [-1e-9, math.nextafter(0.999, 1), 1, True]),
        (("blocks", 5, "task"), [None, {"loss": "l1"}], [{}, {"loss": "hinge"}]),
        (("optimizers", "sgd", "sha256"), ["0" * 64], ["0" * 63, "0" * 65, "A" * 64]),
        (("optimizers", "sgd", "num_bytes"), [0, 2 << 30], [-1, (2 << 30) + 1, "1"]),
    ],
    ids=lambda value: "/".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_the_limits(path: Place, inside: list[object], outside: list[object]) -> None:
    rich = manifests()["rich"]
    at(rich, path)  # it is there
    for value in inside:
        assert check_agreement(changed(rich, path, value))
    for value in outside:
        assert not check_agreement(changed(rich, path, value))


@pytest.mark.parametrize(("key", "most"), [("blocks", 128), ("private_blocks", 128)])
def test_the_longest_lists(key: str, most: int) -> None:
    rich = manifests()["rich"]
    for num, is_valid in ((most, True), (most + 1, False)):
        assert check_agreement(changed(rich, (key,), rich[key][:1] * num)) is is_valid


# JSON Schema takes 2.0 for an integer, the reader does not: no whole floats here.
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 33), 1 << 33)
    | st.sampled_from([0, 1, 2, 1 << 16, 1 << 24, 1 << 28, 1 << 31]).map(lambda x: x + 1)
    | st.floats(-1e9, 1e9).filter(lambda x: not x.is_integer())
    | st.text(max_size=5)
    | st.text("a0-", min_size=60, max_size=70)
    | st.sampled_from(["mse", "float32", "mask", "head", "fusion", "0" * 64])
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text("ab-"), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(["rich", "fusionless"]))
def test_any_value_anywhere(data: st.DataObject, name: str) -> None:
    value = manifests()[name]
    path = data.draw(st.sampled_from(list(paths(value))), "path")
    check_agreement(changed(value, path, data.draw(ANYTHING, "value")))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_part_in_any_place(data: st.DataObject) -> None:
    """Parts that are valid where they come from."""
    rich = manifests()["rich"]
    places = st.sampled_from(list(paths(rich)))
    source, target = data.draw(places, "source"), data.draw(places, "target")
    check_agreement(changed(rich, target, copy.deepcopy(at(rich, source))))
