"""How long to wait before the next try: ever longer, and never all devices at once."""

from __future__ import annotations

import random
from collections.abc import Iterator


def delays(first_s: float, longest_s: float) -> Iterator[float]:
    """Endless delays in seconds: doubling from ``first_s``, each jittered by half either way."""
    delay_s = first_s
    while True:
        yield delay_s * random.uniform(0.5, 1.5)
        delay_s = min(2 * delay_s, longest_s)
