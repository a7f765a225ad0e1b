"""Which of the ready devices take part in a round."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from .choices import parse_choice


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that is ready, and what is known of it.

    Attributes:
        blocks: The shared blocks that it holds.
        num_selected: Rounds it was chosen for, as is ``num_reported`` of those it reported in.
        last_round: The last one that it was chosen for; 0 before the first.
        loss: Its last training loss; None before the first report.
        num_examples: Of its last report.
        duration_s: From its last task to its report; None before the first report.
    """

    blocks: frozenset[str]
    num_selected: int = 0
    num_reported: int = 0
    last_round: int = 0
    loss: float | None = None
    num_examples: int = 0
    duration_s: float | None = None


Candidates: TypeAlias = Mapping[str, Candidate]  # by device
# (candidates, size of the cohort, number of the round, rng) to the devices of the cohort
Selection: TypeAlias = Callable[[Candidates, int, int, np.random.Generator], frozenset[str]]


def everyone() -> Selection:
    """All candidates, whatever the size asked for."""
    return lambda candidates, size, round_num, rng: frozenset(candidates)


def random() -> Selection:
    """A uniform draw without replacement."""

    def select(
        candidates: Candidates, size: int, round_num: int, rng: np.random.Generator
    ) -> frozenset[str]:
        return frozenset(_shuffled(candidates, rng)[:size])

    return select


def coverage() -> Selection:
    """By modality coverage: the blocks' numbers of holders in the cohort are kept alike.

    Device by device, the block with the fewest holders in the cohort so far is served next, the
    rarest of equals first, by the holder that was chosen longest ago. So every block that has a
    holder has one in every cohort of at least as many devices as there are blocks, and a rare
    modality is never starved.
    """

    def select(
        candidates: Candidates, size: int, round_num: int, rng: np.random.Generator
    ) -> frozenset[str]:
        # Sorting is stable: among equals the shuffled order stands.
        waiting = sorted(_shuffled(candidates, rng), key=lambda d: candidates[d].last_round)
        num_holders = Counter(block for one in candidates.values() for block in one.blocks)
        num_chosen: Counter[str] = Counter()
        chosen: set[str] = set()
        while waiting and len(chosen) < size:
            open_blocks = {block for device in waiting for block in candidates[device].blocks}
            device = waiting[0]
            if open_blocks:
                rarest = min(open_blocks, key=lambda b: (num_chosen[b], num_holders[b], b))
                device = next(d for d in waiting if rarest in candidates[d].blocks)
            waiting.remove(device)
            chosen.add(device)
            num_chosen.update(candidates[device].blocks)
        return frozenset(chosen)

    return select


def utility(deadline_s: float = 60.0, exploration: float = 0.2) -> Selection:
    """Oort-like: the devices that teach the most, soon and reliably; some are new ones.

    The utility of a device that has reported is the product of

    - ``num_examples · |loss|``, which it says of itself: no more than the 95 % quantile counts,
    - ``√(rounds since it was chosen)``, so that none is forgotten,
    - ``(1 + num_reported) / (1 + num_selected)``, its reliability,
    - ``min(1, deadline_s / duration_s)²``, its capability.

    Of the cohort, ``exploration`` goes to devices without a report, those tried least first. What
    either kind leaves open the other fills.

    Args:
        deadline_s: A device that takes longer is less useful, by the square of the excess.
        exploration: Share of the cohort, in [0, 1].

    Raises:
        ValueError: An argument is outside its interval.

    Source:
        Modelled on Lai et al. 2021 (Oort), OSDI, arXiv:2010.06081. Theirs needs the squared loss
        of each example, ours the mean loss; theirs adds a term for the wait; reliability is ours.
    """
    if not 0 < deadline_s < math.inf or not 0 <= exploration <= 1:
        raise ValueError(
            f"expected deadline_s > 0 and exploration in [0, 1], found {deadline_s}, {exploration}"
        )

    def factor(one: Candidate, round_num: int) -> float:
        waited = math.sqrt(max(1, round_num - one.last_round))
        reliability = (1 + one.num_reported) / (1 + one.num_selected)
        return waited * reliability * min(1.0, deadline_s / max(one.duration_s or 0, 1e-9)) ** 2

    def select(
        candidates: Candidates, size: int, round_num: int, rng: np.random.Generator
    ) -> frozenset[str]:
        shuffled = _shuffled(candidates, rng)
        lessons = {
            device: one.num_examples * abs(one.loss)
            for device in shuffled
            if (one := candidates[device]).loss is not None
        }
        most = np.quantile([*lessons.values()], 0.95, method="lower") if lessons else 0.0
        known = sorted(
            lessons, key=lambda d: -min(lessons[d], most) * factor(candidates[d], round_num)
        )
        fresh = [device for device in shuffled if device not in lessons]
        fresh.sort(key=lambda device: candidates[device].num_selected)
        num_fresh = min(len(fresh), max(math.ceil(exploration * size), size - len(known)))
        return frozenset(fresh[:num_fresh] + known[: max(0, size - num_fresh)])

    return select


SELECTIONS: dict[str, Callable[..., Selection]] = {
    "all": everyone,
    "random": random,
    "coverage": coverage,
    "utility": utility,
}


def parse_selection(text: str) -> Selection:
    """The rule that a text such as ``utility:60:0.2`` names.

    Raises:
        ValueError: It names none, or its parameters are not that one's.
    """
    return parse_choice("selection", text, SELECTIONS)


def _shuffled(candidates: Candidates, rng: np.random.Generator) -> list[str]:
    names = sorted(candidates)  # the draw depends on the names and the rng alone
    return [names[i] for i in rng.permutation(len(names))]
