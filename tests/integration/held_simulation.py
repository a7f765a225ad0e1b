"""`python -m examples.android_sim` whose devices wait before a round until a file is there.

python -m tests.integration.held_simulation ROUND FILE …
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from examples.android_sim.__main__ import main
from examples.android_sim.history import RunFolder


def hold_before(round_num: int, until: Path) -> None:
    """Each device, on its training thread, once its score before that round is kept."""
    record = RunFolder.record

    def record_and_wait(
        self: RunFolder, device: str, trained: int, metrics: Mapping[str, float]
    ) -> None:
        record(self, device, trained, metrics)
        while trained + 1 == round_num and not until.exists():
            time.sleep(0.01)

    RunFolder.record = record_and_wait  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    hold_before(int(sys.argv[1]), Path(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
