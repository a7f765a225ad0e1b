from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from export.schema import json_schema
from petalfl.schema import Limit, Name, Pattern, read


@dataclass(frozen=True, slots=True)
class Inner:
    """Something inside.

    More about it.
    """

    count: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All that a field may be."""

    flag: bool
    count: Annotated[int, Limit(-3, 5)]
    rate: Annotated[float, Limit(0.0, 0.5)]
    text: Annotated[str, Limit(1, 4)]
    code: Annotated[str, Pattern(r"a|bc"), Limit(1, 2)]
    kind: Literal["x", "y"]
    maybe: Annotated[int, Limit(0, 9)] | None
    inner: Inner
    items: Annotated[tuple[Annotated[int, Limit(0, 9)] | None, ...], Limit(0, 2)]
    table: Annotated[dict[Name, Inner], Limit(1, 2)]
    later: tuple[Inner, ...] = ()
    last: dict[Name, float] = field(default_factory=dict)


SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Sample",
    "description": "All that a field may be.",
    "type": "object",
    "properties": {
        "flag": {"type": "boolean"},
        "count": {"type": "integer", "minimum": -3, "maximum": 5},
        "rate": {"type": "number", "minimum": 0.0, "maximum": 0.5},
        "text": {"type": "string", "minLength": 1, "maxLength": 4},
        "code": {"type": "string", "pattern": "^(?:a|bc)$", "minLength": 1, "maxLength": 2},
        "kind": {"enum": ["x", "y"]},
        "maybe": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
        "inner": {"$ref": "#/$defs/Inner"},
        "items": {
            "type": "array",
            "items": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
            "minItems": 0,
            "maxItems": 2,
        },
        "table": {
            "type": "object",
            "propertyNames": {"type": "string", "pattern": "^(?:[a-z0-9][a-z0-9-]{0,63})$"},
            "additionalProperties": {"$ref": "#/$defs/Inner"},
            "minProperties": 1,
            "maxProperties": 2,
        },
        "later": {"type": "array", "items": {"$ref": "#/$defs/Inner"}, "default": []},
        "last": {
            "type": "object",
            "propertyNames": {"type": "string", "pattern": "^(?:[a-z0-9][a-z0-9-]{0,63})$"},
            "additionalProperties": {"type": "number"},
        },
    },
    "required": ["flag", "count", "rate", "text", "code", "kind", "maybe", "inner", "items",
                 "table"],
    "additionalProperties": False,
    "$defs": {
        "Inner": {
            "description": "Something inside.",
            "type": "object",
            "properties": {"count": {"type": "integer"}},
            "required": ["count"],
            "additionalProperties": False,
        }
    },
}  # fmt: skip

VALID: dict[str, Any] = {
    "flag": True, "count": 2, "rate": 0.5, "text": "abcd", "code": "bc", "kind": "x",
    "maybe": None, "inner": {"count": 1}, "items": [1, None], "table": {"acc": {"count": 3}},
}  # fmt: skip


def test_the_whole_schema() -> None:
    assert json_schema(Sample) == SCHEMA
    Draft202012Validator.check_schema(SCHEMA)


def test_without_definitions() -> None:
    assert "$defs" not in json_schema(Inner)


def test_a_type_that_json_does_not_have() -> None:
    @dataclass(frozen=True, slots=True)
    class Payload:
        data: bytes

    with pytest.raises(ValueError, match="expected a type that JSON has, found <class 'bytes'>"):
        json_schema(Payload)


# Field, and values on both sides of what it takes.
VALUES: dict[str, list[object]] = {
    "flag": [False, 0, 1, None, "true"],
    "count": [-4, -3, 5, 6, True, 2.5, "2", None],
    "rate": [-1e-9, 0, 0.0, 0.5, 0.5000001, 1, True, "0.5", None],
    "text": ["", "a", "éééé", "𝄞𝄞𝄞𝄞", "abcde", 3, ["a"]],
    "code": ["", "a", "bc", "abc", "ac", "aa", "c", 1],
    "kind": ["y", "z", "", None, 1, ["x"], {"x": 1}],
    "maybe": [0, 9, 10, -1, False, "1"],
    "inner": [None, [], {}, {"count": 10**30}, {"count": 1, "more": 2}],
    "items": [[], [9, 0], [10], [1, 2, 3], ["1"], [True], "12", {}, None],
    "table": [{}, [], {"a": 1}, {x: {"count": 0} for x in "abc"},
              *({x: {"count": 0}} for x in ("a", "0-", "A", "", "-a", "a" * 64, "a" * 65, "é"))],
    "later": [[], [{"count": 1}] * 9, [{}], None],
    "last": [{}, {"a": 1}, {"a": 1.5}, {"a": "b"}, {"A": 1}, {"a": True}],
    "more": [1],
}  # fmt: skip

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer())
    | st.text("ab0-é", max_size=5)
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab-", max_size=2) | st.just("count"), inner, max_size=3)
    ),
    max_leaves=8,
)


def check_agreement(value: object) -> None:
    """What the schema takes is what `read` takes."""
    try:
        read(Sample, value)
        is_read = True
    except ValueError:
        is_read = False
    assert Draft202012Validator(SCHEMA).is_valid(value) is is_read


@pytest.mark.parametrize("key", VALUES)
def test_agrees_with_the_reader_at_the_limits(key: str) -> None:
    for value in VALUES[key]:
        check_agreement(VALID | {key: value})


@pytest.mark.parametrize("key", VALID)
def test_agrees_with_the_reader_on_missing_fields(key: str) -> None:
    check_agreement({k: v for k, v in VALID.items() if k != key})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SCHEMA["properties"])), ANYTHING)
def test_agrees_with_the_reader_on_any_value_of_a_field(key: str, value: object) -> None:
    check_agreement(VALID)
    check_agreement(VALID | {key: value})


@settings(max_examples=50, deadline=None)
@given(ANYTHING)
def test_agrees_with_the_reader_on_anything(value: object) -> None:
    check_agreement(value)
