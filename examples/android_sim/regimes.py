"""Which modalities each device has: the missing-modality regimes of BLOSSOM.

Source:
    BLOSSOM's three regimes over 10 clients, as (first only, second only, both): 0/0/10, 3/3/4
    and 5/5/0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_TENTHS = {"complete": (0, 0, 10), "incomplete": (3, 3, 4), "exclusive": (5, 5, 0)}
REGIMES = tuple(_TENTHS)


def assign_modalities(
    num_devices: int, regime: str, seed: int, modalities: tuple[str, str] = ("acc", "gyro")
) -> list[tuple[str, ...]]:
    """Draw the modalities of every device.

    The shares of the regime are exact for multiples of 10 and within one device otherwise; the
    seed only decides which device gets which.

    Args:
        num_devices: At least 1.
        regime: One of `REGIMES`.
        seed: Of the shuffle, at least 0.
        modalities: The two modalities there are.

    Returns:
        ``num_devices`` tuples of one or two names, in the order of ``modalities``.

    Raises:
        ValueError: The regime is unknown or ``num_devices`` is below 1.
    """
    if regime not in _TENTHS:
        raise ValueError(f"regime is {regime!r}, expected one of {', '.join(REGIMES)}")
    if num_devices < 1:
        raise ValueError(f"num_devices is {num_devices}, expected at least 1")
    first, second = modalities
    kinds: list[tuple[str, ...]] = [(first,), (second,), (first, second)]
    counts = _largest_remainder(num_devices, _TENTHS[regime])
    ordered = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    return [ordered[index] for index in np.random.default_rng(seed).permutation(num_devices)]


def _largest_remainder(total: int, tenths: Sequence[int]) -> list[int]:
    """Share out ``total``; what is left over goes to the largest remainders, ties to the first."""
    counts = [total * share // 10 for share in tenths]
    remainders = [total * share % 10 for share in tenths]
    by_remainder = sorted(range(len(tenths)), key=lambda index: -remainders[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
