"""Which blocks a device uploads when it may not send all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Upload(NamedTuple):
    """What counts for and against sending a block.

    Attributes:
        num_bytes: Of its payload.
        impact: How much the block matters to the task, at least 0, in any unit: FedMFS takes
            Shapley values; the norm of its delta or the loss it saves will do.
        age: Rounds since the device last sent it, at least 0.
    """

    num_bytes: int
    impact: float
    age: int


def priorities(
    uploads: Mapping[str, Upload],
    *,
    impact: float = 1.0,
    size: float = 1.0,
    recency: float = 1.0,
) -> dict[str, float]:
    """By block: impact · its impact + size · (1 − its bytes) + recency · its age.

    Impact, bytes and age each as a share of the greatest among the blocks, in [0, 1].

    Args:
        impact: The coefficient a_s, at least 0, as are ``size``, a_c, and ``recency``, a_r.

    Source:
        FedMFS, Yuan et al. 2023, arXiv:2310.07048; recency: its successor, arXiv:2401.16685.
    """
    if not min(impact, size, recency) >= 0:
        raise ValueError(f"expected coefficients >= 0, found {impact}, {size}, {recency}")
    most = [max((one[i] for one in uploads.values()), default=0) or 1 for i in range(3)]
    return {
        block: impact * one.impact / most[1]
        + size * (1 - one.num_bytes / most[0])
        + recency * one.age / most[2]
        for block, one in uploads.items()
    }


def choose_uploads(
    uploads: Mapping[str, Upload],
    budget_bytes: int,
    *,
    impact: float = 1.0,
    size: float = 1.0,
    recency: float = 1.0,
) -> tuple[str, ...]:
    """The blocks to send, by falling priority, each where the budget still has room for it.

    A block that does not fit is passed over, and smaller ones behind it may be sent; its age
    grows, which raises its priority. Equal priorities go by name.

    Args:
        budget_bytes: Their payloads together are no longer.
    """
    scores = priorities(uploads, impact=impact, size=size, recency=recency)
    chosen, left = [], budget_bytes
    for block in sorted(uploads, key=lambda name: (-scores[name], name)):
        if uploads[block].num_bytes <= left:
            chosen.append(block)
            left -= uploads[block].num_bytes
    return tuple(chosen)
