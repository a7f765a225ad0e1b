"""The rows of `bench_codec` and the table that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.bench_canonical import table
from benchmarks.machine import describe_machine

NOTES = """\
MB/s of float32, 10^6 bytes, by the time that one core computes; median and p10-p90 of single calls.
Both: encode, then decode. Ratio: float32 bytes by payload bytes. With zlib: by how much zlib at
level 1 would shorten the payload further, at about 50 MB/s; payloads of topk have been through it.
Error: relative Euclidean norm of what a delta is off by, the median over deltas. Mean of 50: the
same of the mean of 50 encodings of one delta, which of an unbiased codec is a seventh of its
error."""


@dataclass(frozen=True, slots=True)
class Row:
    """One codec; speeds are p10, median and p90 in MB/s.

    Attributes:
        ratio: Float32 bytes by payload bytes.
        zlib_ratio: Payload bytes by what zlib makes of them.
        error: Relative Euclidean norm of what one delta is off by.
        mean_error: Of what the mean of many encodings of one delta is off by.
    """

    codec: str
    encode: tuple[float, float, float]
    decode: tuple[float, float, float]
    both: tuple[float, float, float]
    ratio: float | None = None
    zlib_ratio: float | None = None
    error: float | None = None
    mean_error: float | None = None


HEADER = ("codec", "encode MB/s", "p10-p90", "decode MB/s", "p10-p90", "both MB/s", "p10-p90",
          "ratio", "with zlib", "error", "mean of 50")  # fmt: skip


def report(rows: Sequence[Row], head: str, *, is_markdown: bool) -> str:
    """The table, what it counts, and the machine."""
    lines = table([HEADER, *(_cells(row) for row in rows)], is_markdown)
    return "\n\n".join([lines, head, NOTES, describe_machine("numpy")])


def _cells(row: Row) -> tuple[str, ...]:
    speeds = (
        text
        for p10, median, p90 in (row.encode, row.decode, row.both)
        for text in (f"{median:.0f}", f"{p10:.0f}-{p90:.0f}")
    )
    return (
        row.codec,
        *speeds,
        _number(row.ratio, ".2f"),
        _number(row.zlib_ratio, ".2f"),
        _number(row.error, ".5f"),
        _number(row.mean_error, ".5f"),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
