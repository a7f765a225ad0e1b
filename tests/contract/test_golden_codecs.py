"""The bytes of every codec, as other languages must write and read them: docs/protocol.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from petalfl.codecs import CODECS, parse_codec


class _HalfLots:
    """The lot that `int8` draws is always one half."""

    def random(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.full(shape, 0.5, dtype)


RNG = cast(np.random.Generator, _HalfLots())
VECTOR = np.array([1, -2.5, 0, 0.25, 1e-6, -3.5, 0.1, 3], np.float32)
GOLDEN = {
    "f32": (
        "0000803f 000020c0 00000000 0000803e bd378635 000060c0 cdcccc3d 00004040",
        [1, -2.5, 0, 0.25, np.float32(1e-6), -3.5, np.float32(0.1), 3],
    ),
    "f16": (
        "003c 00c1 0000 0034 1100 00c3 662e 0042",
        [1, -2.5, 0, 0.25, 17 * 2**-24, -3.5, 0.0999755859375, 3],
    ),
    "bf16": (
        "803f 20c0 0000 803e 8635 60c0 cd3d 4040",
        [1, -2.5, 0, 0.25, 134 * 2**-27, -3.5, 205 * 2**-11, 3],
    ),
    "int8": (  # a scale of 3.5 / (127 - 2**-10), and levels
        "f9c3e13c  24 a5 00 09 00 81 04 6d",
        [step * np.float32(3.5 / (127 - 2**-10)) for step in (36, -91, 0, 9, 0, -127, 4, 109)],
    ),
    "topk:0.25": (  # bits 5 and 7
        "a0  000060c0 00004040",
        [0, 0, 0, 0, 0, -3.5, 0, 3],
    ),
    "topk-int8:0.25": (
        "a0  f9c3e13c  81 6d",
        [step * np.float32(3.5 / (127 - 2**-10)) for step in (0, 0, 0, 0, 0, -127, 0, 109)],
    ),
}
STREAM = "7801 e36020153092aa01a8fe803d880000 0a8101c9"


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_every_codec(name: str) -> None:
    written, values = GOLDEN[name]
    codec = parse_codec(name)
    assert codec.encode(VECTOR, RNG).hex() == written.replace(" ", "")
    np.testing.assert_array_equal(
        codec.decode(bytes.fromhex(written), VECTOR.size), np.array(values, np.float32)
    )


def test_every_codec_is_pinned() -> None:
    assert {name.partition(":")[0] for name in GOLDEN} == {c.partition(":")[0] for c in CODECS}


def test_a_shorter_payload_is_a_zlib_stream() -> None:
    """Of the 100 bytes of the bitmap of 800 values and the two values; any zlib will do."""
    expected = np.zeros(800, np.float32)
    expected[[3, 400]] = 1.5, -2
    found = parse_codec("topk:0.0025").decode(bytes.fromhex(STREAM), 800)
    np.testing.assert_array_equal(found, expected)


def test_the_number_that_topk_keeps() -> None:
    """floor(share * size + 0.5) in double precision, and one at least: bitmap and values."""
    counts = {("0.05", 10): 1, ("0.05", 29): 1, ("0.05", 30): 2, ("0.07", 100): 7,
              ("0.15", 10): 2, ("0.000001", 5): 1, ("0.5", 8): 4}  # fmt: skip
    for (share, size), count in counts.items():
        assert parse_codec(f"topk:{share}").max_bytes(size) == -(-size // 8) + 4 * count


def test_the_bytes_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    for name, (written, _) in GOLDEN.items():
        row = re.search(rf"^\| `{name}` \| `([0-9a-f ]+)` \|$", text, re.MULTILINE)
        assert row is not None and row[1].replace(" ", "") == written.replace(" ", "")
    assert STREAM.replace(" ", "") in text
