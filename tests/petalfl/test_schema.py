from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petalfl.schema import Limit, Name, Pattern, Sha256, plain, read


@dataclass(frozen=True, slots=True)
class Inner:
    count: int


@dataclass(frozen=True, slots=True)
class Sample:
    flag: bool
    count: Annotated[int, Limit(-3, 5)]
    rate: Annotated[float, Limit(0.0, 1.0)]
    text: Annotated[str, Limit(1, 4)]
    code: Annotated[str, Pattern(r"[a-c]+")]
    data: Annotated[bytes, Limit(2, 2)]
    kind: Literal["x", "y"]
    maybe: Annotated[int, Limit(0, 9)] | None
    inner: Inner
    items: Annotated[tuple[Annotated[int, Limit(0, 9)], ...], Limit(0, 2)]
    table: Annotated[dict[Name, Inner], Limit(0, 2)]
    later: int = 7


VALID: dict[str, Any] = {
    "flag": True, "count": 2, "rate": 0.5, "text": "abcd", "code": "abc", "data": b"hi",
    "kind": "x", "maybe": None, "inner": {"count": 1}, "items": [1, 2],
    "table": {"acc": {"count": 3}},
}  # fmt: skip


def test_a_whole_value() -> None:
    assert read(Sample, VALID) == Sample(
        True, 2, 0.5, "abcd", "abc", b"hi", "x", None, Inner(1), (1, 2), {"acc": Inner(3)}, 7
    )


# Field, and values that are just inside what it takes.
ACCEPTED: list[tuple[str, object]] = [
    ("flag", False),
    ("count", -3), ("count", 5),
    ("rate", 0.0), ("rate", 1.0), ("rate", 1), ("rate", 5e-324),
    ("text", "a"), ("text", "éééé"),
    ("code", "c"),
    ("data", b"\0\0"),
    ("kind", "y"),
    ("maybe", 9),
    ("items", []), ("items", (1,)),
    ("table", {}), ("table", {"a" * 64: {"count": 0}}), ("table", {"0-": {"count": 0}}),
    ("inner", {"count": -(10**30)}),
    ("later", 8),
]  # fmt: skip

# Field, and values that are just outside.
REFUSED: list[tuple[str, object]] = [
    ("flag", 1), ("flag", 0), ("flag", None), ("flag", "true"),
    ("count", -4), ("count", 6), ("count", True), ("count", 2.0), ("count", "2"), ("count", None),
    ("rate", -1e-9), ("rate", math.nextafter(1.0, 2.0)), ("rate", math.nan), ("rate", math.inf),
    ("rate", -math.inf), ("rate", True), ("rate", "0.5"), ("rate", 2),
    ("text", ""), ("text", "abcde"), ("text", b"ab"), ("text", 3),
    ("code", ""), ("code", "abcd"), ("code", "abc\n"), ("code", "\nabc"),
    ("data", b"h"), ("data", b"hix"), ("data", "hi"), ("data", bytearray(b"hi")), ("data", [1, 2]),
    ("kind", "z"), ("kind", ""), ("kind", None), ("kind", ["x"]), ("kind", {"x": 1}), ("kind", 1),
    ("maybe", 10), ("maybe", False), ("maybe", "1"),
    ("inner", None), ("inner", []), ("inner", {}), ("inner", {"count": None}),
    ("inner", {"count": 1, "more": 2}), ("inner", Inner(1)),
    ("items", [1, 2, 3]), ("items", [10]), ("items", "12"), ("items", {1: 2}), ("items", None),
    ("items", [True]), ("items", {1, 2}),
    ("table", []), ("table", {"A": {"count": 0}}), ("table", {"": {"count": 0}}),
    ("table", {1: {"count": 0}}), ("table", {b"a": {"count": 0}}), ("table", {"a": 1}),
    ("table", {"a": {"count": 0}, "b": {"count": 0}, "c": {"count": 0}}),
    ("table", {"a" * 65: {"count": 0}}), ("table", {"a\n": {"count": 0}}),
    ("later", None),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_inside_the_limits(field: str, value: Any) -> None:
    found = plain(read(Sample, VALID | {field: value}))[field]
    assert found == (list(value) if isinstance(value, tuple) else value)
    assert type(found) is (float if field == "rate" else type(found))


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_outside_the_limits(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^Sample\.{field}"):
        read(Sample, VALID | {field: value})


@pytest.mark.parametrize("field", VALID)
def test_a_missing_field(field: str) -> None:
    with pytest.raises(ValueError, match=f"^Sample: field '{field}' is missing$"):
        read(Sample, {k: v for k, v in VALID.items() if k != field})


@pytest.mark.parametrize("key", ["more", "", "__class__", 1, b"flag", None, ("a",)])
def test_an_unknown_field(key: object) -> None:
    value: dict[Any, Any] = {**VALID, key: 1}
    with pytest.raises(ValueError, match=r"^Sample: unknown field"):
        read(Sample, value)


@pytest.mark.parametrize("value", [None, [], "x", 3, b"", True, [("flag", True)]])
def test_no_mapping(value: object) -> None:
    with pytest.raises(ValueError, match=r"^manifest: expected a mapping, found"):
        read(Sample, value, "manifest")


def test_the_message_says_where_and_what_but_not_all_of_it() -> None:
    table = {"acc": {"count": "x" * 10_000}}
    with pytest.raises(ValueError, match=r"Sample\.table\.acc\.count: expected int") as error:
        read(Sample, VALID | {"table": table})
    assert len(str(error.value)) < 120
    with pytest.raises(ValueError, match=r"Sample\.items\[1\]: expected int, found None"):
        read(Sample, VALID | {"items": [1, None]})


def test_an_integer_too_large_for_a_float() -> None:
    with pytest.raises(ValueError, match="rate"):
        read(Sample, VALID | {"rate": 10**400})


NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,63}", fullmatch=True)
SAMPLES = st.builds(
    Sample,
    flag=st.booleans(),
    count=st.integers(-3, 5),
    rate=st.floats(0, 1),
    text=st.text(min_size=1, max_size=4),
    code=st.text("abc", min_size=1, max_size=9),
    data=st.binary(min_size=2, max_size=2),
    kind=st.sampled_from(["x", "y"]),
    maybe=st.none() | st.integers(0, 9),
    inner=st.builds(Inner, st.integers()),
    items=st.lists(st.integers(0, 9), max_size=2).map(tuple),
    table=st.dictionaries(NAMES, st.builds(Inner, st.integers()), max_size=2),
    later=st.integers(),
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | st.text() | (
    st.binary()
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LEAVES, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(SAMPLES)
def test_plain_and_read_are_inverses(sample: Sample) -> None:
    value = plain(sample)
    assert read(Sample, value) == sample
    assert {type(v) for v in value.values()} <= {bool, int, float, str, bytes, list, dict,
                                                 type(None)}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(VALID)), ANYTHING)
def test_any_value_of_a_field_is_read_or_refused(field: str, value: Any) -> None:
    try:
        sample = read(Sample, VALID | {field: value})
    except ValueError as error:
        assert str(error).startswith(f"Sample.{field}")
    else:
        assert read(Sample, plain(sample)) == sample


@settings(max_examples=150, deadline=None)
@given(ANYTHING)
def test_any_value_at_all_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        read(Sample, value)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Name, ["a", "0", "a-", "x" * 64, "0-9"],
         ["", "-a", "A", "a_b", "a.b", "x" * 65, "a\n", "é"]),
        (Sha256, ["0" * 64, "0123456789abcdef" * 4], ["0" * 63, "0" * 65, "G" * 64, "A" * 64]),
    ],
)  # fmt: skip
def test_names_and_digests(hint: Any, good: list[str], bad: list[str]) -> None:
    @dataclass(frozen=True, slots=True)
    class Holder:
        value: Any

    Holder.__annotations__["value"] = hint
    for text in good:
        assert read(Holder, {"value": text}).value == text
    for text in bad:
        with pytest.raises(ValueError, match="does not match"):
            read(Holder, {"value": text})
