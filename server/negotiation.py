"""Which codec a device is asked to use: the configured one, or the next that it knows."""

from __future__ import annotations

from collections.abc import Collection

from petalfl.codecs import KINDS


def choose_codec(wanted: str, known: Collection[str]) -> str:
    """The codec for a device that knows some kinds of codecs.

    Args:
        wanted: As the configuration has it, parameters included.
        known: As the device says with `Ready`; whatever it says, it knows f32.

    Returns:
        ``wanted`` where the device knows its kind, else the shortest one that is longer and that
        it knows; with the same parameters where it has some.
    """
    kind, colon, parameters = wanted.partition(":")
    for candidate in reversed(KINDS[: KINDS.index(kind) + 1]):
        if candidate in known:
            has_parameters = candidate.startswith("topk")
            return candidate + colon + parameters if has_parameters else candidate
    return "f32"
