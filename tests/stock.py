"""The second environment, which `make stock` builds: another Python with stock ONNX Runtime."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from petalfl.runtime import Runtime

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / os.environ.get("PETALFL_STOCK", ".venv-stock") / "bin" / "python"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
ANSWER_TIMEOUT_S = 120.0

TOLERANCE = 1e-4
"""How far the losses of two runtimes may be apart, relative."""


class StockSteps:
    """`tests.engine_steps` as one process of the second environment, for any number of folders.

    Attributes:
        runtime: Which ONNX Runtime it has.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [PYTHON, "-m", "tests.engine_steps"],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.runtime = Runtime(**self._answer())

    def losses(self, folder: Path) -> list[float]:
        """Those of `tests.engine_steps.losses_of` there."""
        assert self._process.stdin is not None
        print(folder, file=self._process.stdin, flush=True)
        losses: list[float] = self._answer()
        return losses

    def _answer(self) -> Any:
        assert self._process.stdout is not None and self._process.stderr is not None
        watchdog = threading.Timer(ANSWER_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
        assert line, f"it has ended: {self._process.stderr.read()}"
        return json.loads(line)

    def __enter__(self) -> StockSteps:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Of two runs' losses, relative; NaN where one of them is not finite."""
    a, b = np.array(found), np.array(expected)
    assert a.shape == b.shape
    return float((np.abs(a - b) / np.maximum(np.abs(b), 1e-9)).max())
