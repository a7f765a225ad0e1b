"""Typed values from untyped ones: one strict reader for JSON and msgpack alike.

A message or manifest is a frozen dataclass whose annotations are its schema. `read` refuses
unknown, missing and ill-typed fields, and values outside the limits given with `Annotated`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    """Bounds of a number, or of the length of a string, a sequence or a mapping."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression that a whole string must match."""

    regex: str


_MAX_EXACT = 1 << 53  # integers beyond it are no longer exact as a float

# One level of an MQTT topic, of a URL and of a path: nothing in it can climb or branch.
NAME_REGEX = r"[a-z0-9][a-z0-9-]{0,63}"
Name = Annotated[str, Pattern(NAME_REGEX)]
Sha256 = Annotated[str, Pattern(r"[0-9a-f]{64}")]


def read(cls: type[T], value: object, where: str = "") -> T:
    """Reads a plain mapping into the frozen dataclass ``cls``.

    Raises:
        ValueError: A field is missing, unknown, of another type or outside its limits; the
            message names the field and shows what was found.
    """
    where = where or cls.__name__
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping, found {_show(value)}")
    hints, required = _fields(typing.cast(typing.Hashable, cls))
    if unknown := [key for key in value if key not in hints]:
        raise ValueError(f"{where}: unknown field {_show(unknown[0])}")
    if missing := required - value.keys():
        raise ValueError(f"{where}: field {sorted(missing)[0]!r} is missing")
    return cls(**{key: _read_as(hints[key], item, f"{where}.{key}") for key, item in value.items()})


def plain(value: Any) -> Any:
    """The inverse of `read`: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


@functools.cache
def _fields(cls: Any) -> tuple[dict[str, Any], frozenset[str]]:
    fields = dataclasses.fields(cls)
    required = frozenset(
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    return typing.get_type_hints(cls, include_extras=True), required


def _read_as(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = _read_as(args[0], value, where)
        for rule in args[1:]:
            _check(rule, value, where)
        return value
    if origin in (Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _read_as(args[0], value, where)
    if origin is Literal:
        if type(value) is not type(args[0]) or value not in args:
            raise ValueError(f"{where}: expected one of {args}, found {_show(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, found {_show(value)}")
        return tuple(_read_as(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping, found {_show(value)}")
        return {
            _read_as(args[0], key, f"{where} key"): _read_as(args[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), value, where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and type(value) is int and abs(value) < _MAX_EXACT:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{where}: expected {hint.__name__}, found {_show(value)}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, found {value}")
    return value


def _check(rule: Limit | Pattern, value: Any, where: str) -> None:
    if isinstance(rule, Pattern):
        if not re.fullmatch(rule.regex, value):
            raise ValueError(f"{where}: {_show(value)} does not match {rule.regex}")
        return
    size = value if isinstance(value, (int, float)) else len(value)
    if not rule.low <= size <= rule.high:
        raise ValueError(f"{where}: {size} is outside [{rule.low:g}, {rule.high:g}]")


def _show(value: object) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else ""
    return (text[:40] + "…" if len(text) > 40 else text) or type(value).__name__
