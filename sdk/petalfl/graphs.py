"""What a graph that came over the network may hold, read from its bytes before a runtime has them.

ONNX Runtime reads files that a graph names (external data), and has formats and operators beside
ONNX's own. A server that could use them would read the device's files, or let it compute for ever.
So a graph may hold operators of ONNX alone, no loop, and all of its values itself.

Source:
    onnx/onnx.proto of ONNX 1.17 for the fields' numbers; protobuf's wire format:
    https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterator

from petalfl.errors import ModelError

_MAX_DEPTH = 8  # of branches within branches
_LOOPS = frozenset({b"Loop", b"Scan", b"SequenceMap"})
_DOMAINS = frozenset({b"", b"ai.onnx"})
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_Value = int | memoryview


def check_graph(path: str, data: bytes) -> None:
    """Refuses a graph that is none, or holds what it may not.

    Args:
        path: What errors call it.

    Raises:
        ModelError: It is no ONNX model, names another file, has a loop, a function of its own, or
            an operator that is not of ONNX itself.
    """
    try:
        for number, value in _fields(memoryview(data)):
            if number in (20, 25):
                raise ValueError("it has functions or training graphs of its own")
            if number == 7:
                _check(_message(value), 0)
    except ValueError as error:
        raise ModelError(f"{path} is no graph that a device may run: {error}") from error


def _check(graph: memoryview, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"branches lie in branches, more than {_MAX_DEPTH} deep")
    for number, value in _fields(graph):
        if number == 1:
            _check_node(_message(value), depth)
        elif number == 5:
            _check_tensor(_message(value))
        elif number == 15:
            raise ValueError("it has sparse tensors")


def _check_node(node: memoryview, depth: int) -> None:
    for number, value in _fields(node):
        if number == 4 and bytes(_message(value)) in _LOOPS:
            raise ValueError(f"it has a loop, {bytes(_message(value)).decode()}")
        if number == 7 and bytes(_message(value)) not in _DOMAINS:
            raise ValueError(f"operators of domain {bytes(_message(value))[:40]!r}, not of ONNX")
        if number == 5:
            _check_attribute(_message(value), depth)


def _check_attribute(attribute: memoryview, depth: int) -> None:
    for number, value in _fields(attribute):
        if number in (5, 10):
            _check_tensor(_message(value))
        elif number in (6, 11):
            _check(_message(value), depth + 1)
        elif number in (22, 23):
            raise ValueError("it has sparse tensors")


def _check_tensor(tensor: memoryview) -> None:
    for number, value in _fields(tensor):
        if number == 13 or (number == 14 and value != 0):
            raise ValueError("the values of a tensor lie in another file")


def _message(value: _Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where there should be a message")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, _Value]]:
    """The fields of a protobuf message: numbers, and lengths of bytes as views; no groups."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        if key >= 1 << 32:
            raise ValueError("it is no protobuf message")
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, position = _varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError("it is no protobuf message")
        if position + length > len(message):
            raise ValueError("it ends amid a field")
        yield key >> 3, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise ValueError("it ends amid a number")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than ten bytes")
