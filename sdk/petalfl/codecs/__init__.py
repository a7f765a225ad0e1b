"""How a block's delta travels: one codec a file, each a pair of pure functions."""

from __future__ import annotations

import functools
import re

from .codec import Codec
from .encoded import Encoded
from .feedback import encode_with_feedback
from .float32 import float32
from .halves import bfloat16, float16
from .int8 import int8
from .topk import topk

__all__ = [
    "CODECS",
    "CODEC_REGEX",
    "KINDS",
    "Codec",
    "Encoded",
    "encode_with_feedback",
    "parse_codec",
]

CODECS = ("f32", "f16", "bf16", "int8", "topk:SHARE", "topk-int8:SHARE")  # the shorter, the later
KINDS = tuple(name.partition(":")[0] for name in CODECS)
_SHARE_REGEX = r"0\.(?=[0-9]*[1-9])(?:[0-4][0-9]{0,5}|50{0,5})"  # above 0, at most 0.5
CODEC_REGEX = rf"f32|f16|bf16|int8|topk(?:-int8)?:{_SHARE_REGEX}"
_PLAIN = {codec.name: codec for codec in (float32(), float16(), bfloat16(), int8())}


@functools.lru_cache(64)
def parse_codec(name: str) -> Codec:
    """The codec of that name, as in `CODECS`; SHARE is a decimal such as 0.05, at most 0.5.

    Raises:
        ValueError: There is none.
    """
    if not re.fullmatch(CODEC_REGEX, name):
        raise ValueError(
            f"unknown codec {name[:40]!r}, expected one of {', '.join(CODECS)} with a SHARE of "
            "0.5 at most"
        )
    kind, _, share = name.partition(":")
    values = {"topk": float32, "topk-int8": int8}
    return topk(name, float(share), values[kind]()) if kind in values else _PLAIN[kind]
