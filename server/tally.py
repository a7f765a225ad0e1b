"""What a round has come to so far, for its one line in the log and for /metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Tally:
    """Counts since the last round was closed.

    Attributes:
        num_late: Updates and reports that came too late or too stale.
        counted: By block, the updates that went into a version.
        dropped: By block, those that did not: too few for its quorum, or the next version would
            not have been finite.
    """

    def __init__(self) -> None:
        self.num_late = 0
        self.counted: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def line(self, round_num: int, loss: float | None, blocks: Iterable[str]) -> str:
        """The log's line of a closed round."""
        text = "none" if loss is None else f"{loss:.4f}"
        updates = ", ".join(f"{block} {self.counted[block]}" for block in blocks)
        notes = [
            f"{block} keeps its version, {n} dropped" for block, n in self.dropped.items() if n
        ]
        notes += [f"{self.num_late} late"] if self.num_late else []
        summary = f"round {round_num} closed: loss {text}, updates: {updates or 'none'}"
        return "; ".join([summary, *notes])
