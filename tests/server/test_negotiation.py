from __future__ import annotations

import pytest

from petalfl.codecs import KINDS, parse_codec
from server.negotiation import choose_codec

ALL = KINDS


@pytest.mark.parametrize("wanted", ["f32", "f16", "bf16", "int8", "topk:0.05", "topk-int8:0.05"])
def test_a_device_that_knows_all_does_as_configured(wanted: str) -> None:
    assert choose_codec(wanted, ALL) == wanted
    assert choose_codec(wanted, (*ALL, "a-codec-of-tomorrow")) == wanted


@pytest.mark.parametrize(
    ("wanted", "known", "chosen"),
    [
        ("topk-int8:0.05", ("f32", "topk"), "topk:0.05"),
        ("topk-int8:0.05", ("f32", "f16", "int8"), "int8"),
        ("topk:0.1", ("f32", "f16", "bf16", "topk-int8"), "bf16"),
        ("int8", ("f32", "f16"), "f16"),
        ("bf16", ("f16", "f32"), "f16"),
        ("f16", ("bf16", "int8", "f32"), "f32"),
        ("f32", ("int8", "topk"), "f32"),
        ("int8", ("zip",), "f32"),
        ("int8", (), "f32"),
    ],
)
def test_else_it_uses_the_next_longer_one(wanted: str, known: tuple[str, ...], chosen: str) -> None:
    assert choose_codec(wanted, known) == chosen
    parse_codec(chosen)
