"""JSON Schema of the frozen dataclasses that `petalfl.schema` reads: for other languages' readers.

`docs/manifest.schema.json` is `manifest_schema()`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from petalfl.model import FORMAT_VERSION, ModelManifest
from petalfl.schema import Limit, Pattern, plain

Schema = dict[str, Any]

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_BOUNDS = {
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
    "string": ("minLength", "maxLength"),
    "array": ("minItems", "maxItems"),
    "object": ("minProperties", "maxProperties"),
}


def manifest_schema() -> str:
    """What a manifest.json of this format version looks like, as JSON text.

    It says what a manifest is made of, not what `petalfl.model.ModelManifest.from_json` checks
    beyond that: wiring, sizes, paths and which graphs there are.
    """
    schema = json_schema(ModelManifest)
    schema["properties"]["format_version"]["const"] = FORMAT_VERSION
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def json_schema(cls: type) -> Schema:
    """The JSON Schema, draft 2020-12, of what `petalfl.schema.read` takes for ``cls``.

    The two differ in one point: JSON Schema takes 2.0 for an integer, `read` does not.

    Raises:
        ValueError: A field's type has no form in JSON, as bytes.
    """
    definitions: dict[str, Schema] = {}
    root = _of_dataclass(cls, definitions)
    document = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__}
    return document | root | ({"$defs": definitions} if definitions else {})


def _of_dataclass(cls: Any, definitions: dict[str, Schema]) -> Schema:
    hints = typing.get_type_hints(cls, include_extras=True)
    properties = {key: _of(hint, definitions) for key, hint in hints.items()}
    required = []
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            properties[field.name]["default"] = plain(field.default)
        elif field.default_factory is dataclasses.MISSING:
            required.append(field.name)
    return {
        "description": (inspect.getdoc(cls) or "").partition("\n")[0],
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _of(hint: Any, definitions: dict[str, Schema]) -> Schema:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = _of(args[0], definitions)
        for rule in args[1:]:
            schema |= _of_rule(rule, schema["type"])
        return schema
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(arg, definitions) for arg in args]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        return {"type": "array", "items": _of(args[0], definitions)}
    if origin is dict:
        keys, values = (_of(arg, definitions) for arg in args)
        return {"type": "object", "propertyNames": keys, "additionalProperties": values}
    if dataclasses.is_dataclass(hint):
        name = typing.cast(type, hint).__name__
        if name not in definitions:
            definitions[name] = {}  # its place, before those that it is made of
            definitions[name] = _of_dataclass(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    if hint not in _TYPES:
        raise ValueError(f"expected a type that JSON has, found {hint}")
    return {"type": _TYPES[hint]}


def _of_rule(rule: Limit | Pattern, kind: str) -> Schema:
    if isinstance(rule, Pattern):
        return {"pattern": f"^(?:{rule.regex})$"}
    number = float if kind == "number" else int
    low, high = _BOUNDS[kind]
    return {low: number(rule.low), high: number(rule.high)}
