"""How a block's delta travels: one codec a file, each a pair of pure functions."""

from __future__ import annotations

import functools
import re

from .codec import Codec
from .feedback import encode_with_feedback
from .float32 import float32
from .halves import bfloat16, float16
from .int8 import int8
from .topk import topk

__all__ = ["CODECS", "Codec", "encode_with_feedback", "parse_codec"]

CODECS = ("f32", "f16", "bf16", "int8", "topk:SHARE", "topk-int8:SHARE")
_PLAIN = {codec.name: codec for codec in (float32(), float16(), bfloat16(), int8())}
_TOPK_REGEX = r"topk(-int8)?:(0\.[0-9]{1,6})"


@functools.lru_cache(64)
def parse_codec(name: str) -> Codec:
    """The codec of that name, as in `CODECS`; SHARE is a decimal such as 0.05.

    Raises:
        ValueError: There is none.
    """
    if codec := _PLAIN.get(name):
        return codec
    if match := re.fullmatch(_TOPK_REGEX, name):
        return topk(name, float(match[2]), int8() if match[1] else float32())
    raise ValueError(f"unknown codec {name[:40]!r}, expected one of {', '.join(CODECS)}")
