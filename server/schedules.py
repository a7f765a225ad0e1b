"""Learning-rate schedules across rounds; the rate of a round travels in its task."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

ScheduleName: TypeAlias = Literal["constant", "cosine"]

FINAL_SHARE = 0.01  # of the base rate, in the last round of a cosine


def learning_rate(schedule: ScheduleName, base: float, round_num: int, num_rounds: int) -> float:
    """The rate of round ``round_num`` in [1, num_rounds].

    ``cosine`` falls from the base rate to 1 % of it, so that private and shared blocks settle
    together in the last rounds.

    Source:
        Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts.
    """
    if schedule == "constant" or num_rounds < 2:
        return base
    progress = (min(round_num, num_rounds) - 1) / (num_rounds - 1)
    return base * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2)
