"""What an app is told while its device takes part, and asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from petalfl.errors import PetalError

log = logging.getLogger("petalfl.client")


@dataclass(frozen=True, slots=True)
class RoundInfo:
    """A round is about to be trained, or what follows the last one.

    Attributes:
        num_rounds: 0 where no end is planned.
        is_fine_tuning: It follows the last round; both numbers are of the last one trained here.
    """

    round_num: int
    num_rounds: int
    is_fine_tuning: bool = False


@dataclass(frozen=True, slots=True)
class RoundMetrics:
    """What the training of a round came to, or the fine-tuning after the last one.

    Attributes:
        loss: Mean over the round's steps.
        num_examples: Of the device's data; its weight in the mean.
        num_steps: Batches trained on.
        seconds: From the first batch to the last, pauses included.
        is_complete: Whether it went on to its end; if not, a budget ended it.
        is_fine_tuning: As in `RoundInfo`.
    """

    round_num: int
    loss: float
    num_examples: int
    num_steps: int
    seconds: float
    is_complete: bool = True
    is_fine_tuning: bool = False


@dataclass(frozen=True, slots=True)
class Callbacks:
    """As in `EdgeClient`."""

    on_round: Callable[[RoundInfo], None]
    on_progress: Callable[[int, int], None]
    on_metrics: Callable[[RoundMetrics], None]
    on_error: Callable[[PetalError], None]

    def survived(self, error: PetalError) -> None:
        """Tells of what the client goes on after, also where the app cannot take it."""
        log.warning("%s", error)
        self.told(error)

    def told(self, error: PetalError) -> None:
        """Tells the app; what it raises is logged, and changes nothing."""
        try:
            self.on_error(error)
        except Exception:
            log.exception("on_error failed")
