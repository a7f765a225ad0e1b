"""Studies that hang once their second cell has begun, where this is on PYTHONPATH."""

import sys
import time
from pathlib import Path
from typing import Any

if sys.orig_argv[1:3] == ["-m", "benchmarks.blossom"]:
    from benchmarks.blossom import runner
    from benchmarks.blossom.cells import Cell

    start, num_begun = runner._start, 0

    def start_and_hang(cell: Cell, artifacts: Path) -> Any:
        global num_begun
        begun, num_begun = start(cell, artifacts), num_begun + 1
        if num_begun == 2:
            time.sleep(3600)
        return begun

    runner._start = start_and_hang
