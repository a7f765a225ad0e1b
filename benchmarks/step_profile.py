"""Where the time of petalfl's step goes: by block and pass, and by ONNX operator."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.contenders.case import Case
from benchmarks.contenders.petalfl_sdk import train_with
from petalfl.engine import Arrays, Forward, Gradients, OrtEngine
from petalfl.model import Artifact, Block
from petalfl.vectors import Vector

NUM_WARM, NUM_STEPS = 5, 30
NUM_OPERATORS = 12

_Run = tuple[Artifact, dict[str, NDArray[Any]]]


def profile(case: Case) -> str:
    """Two tables: milliseconds of one step, and the operators that take most of it."""
    engine = _TimedEngine(case.artifacts)
    totals: list[float] = []
    with contextlib.suppress(StopIteration):
        train_with(engine, case, _Recorder(engine, totals))
    lines = [f"{'block':<20}{'forward':>10}{'backward':>10}{'optimizer':>10}  ms"]
    blocks = dict.fromkeys(block for block, _ in engine.seconds)
    accounted = 0.0
    for block in blocks:
        times = [engine.seconds.get((block, what), [0.0]) for what in _PASSES]
        accounted += sum(float(np.median(t)) for t in times)
        lines.append(f"{block:<20}" + "".join(f"{1e3 * np.median(t):>10.3f}" for t in times))
    total = float(np.median(totals))
    lines.append(f"{'Python around them':<20}{1e3 * (total - accounted):>10.3f}")
    lines.append(f"{'step':<20}{1e3 * total:>10.3f}")
    return "\n".join([*lines, "", *_operators(case.artifacts, list(engine.runs.values()))])


_PASSES = ("forward", "backward", "optimizer")


class _TimedEngine:
    """The SDK's engine with a clock on every call.

    Attributes:
        seconds: By block and pass.
        runs: The last feeds of every call of a step, by block and pass.
    """

    def __init__(self, folder: Path) -> None:
        self._engine = OrtEngine(folder)
        self._trained: deque[str] = deque()  # blocks whose optimizer step is still to come
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.runs: dict[tuple[str, str], _Run] = {}

    def evaluate(
        self, block: Block, vector: Vector, inputs: Arrays
    ) -> dict[str, NDArray[np.float32]]:
        """See `Engine.evaluate`."""
        return self._engine.evaluate(block, vector, inputs)

    def forward(self, block: Block, vector: Vector, inputs: Arrays) -> Forward:
        """See `Engine.forward`."""
        started = time.perf_counter()
        result = self._engine.forward(block, vector, inputs)
        artifact = block.artifacts.training_forward or block.artifacts.eval_model
        self._note(block.name, "forward", started, artifact, {"parameters": vector, **inputs})
        return result

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        """See `Engine.backward`."""
        started = time.perf_counter()
        result = self._engine.backward(block, vector, feeds)
        artifact = block.artifacts.training_backward
        assert artifact is not None  # it has just been run
        self._note(block.name, "backward", started, artifact, {"parameters": vector, **feeds})
        if result.parameters is not None:
            self._trained.append(block.name)
        return result

    def step(self, optimizer: Artifact, feeds: Arrays) -> dict[str, NDArray[np.float32]]:
        """See `Engine.step`."""
        started = time.perf_counter()
        result = self._engine.step(optimizer, feeds)
        self._note(self._trained.popleft(), "optimizer", started, optimizer, feeds)
        return result

    def _note(
        self, block: str, what: str, started: float, artifact: Artifact, feeds: Arrays
    ) -> None:
        self.seconds[block, what].append(time.perf_counter() - started)
        self.runs[block, what] = artifact, dict(feeds)


class _Recorder:
    """Called after every step; stops the training after `NUM_STEPS`, the first few uncounted."""

    def __init__(self, engine: _TimedEngine, totals: list[float]) -> None:
        self._engine = engine
        self._totals = totals
        self._num_steps = 0
        self._started = time.perf_counter()

    def __call__(self) -> None:
        self._num_steps += 1
        self._totals.append(time.perf_counter() - self._started)
        if self._num_steps == NUM_WARM:
            self._totals.clear()
            self._engine.seconds.clear()
        if self._num_steps == NUM_WARM + NUM_STEPS:
            raise StopIteration
        self._started = time.perf_counter()


def _operators(folder: Path, runs: list[_Run]) -> list[str]:
    """The operators of a step by time, from sessions of their own with a profiler."""
    micros: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for artifact, feeds in runs:
        for operator, times in _profile(folder / artifact.path, feeds).items():
            micros[operator] += sum(times) / NUM_STEPS
            counts[operator] += len(times) // NUM_STEPS
    total = sum(micros.values())
    lines = [f"{'operator':<24}{'ms':>8}{'share':>8}{'nodes':>8}"]
    for operator in sorted(micros, key=lambda op: -micros[op])[:NUM_OPERATORS]:
        share = micros[operator] / total
        lines.append(
            f"{operator:<24}{micros[operator] / 1e3:>8.3f}{share:>8.1%}{counts[operator]:>8}"
        )
    return [*lines, f"{'all':<24}{total / 1e3:>8.3f}{'':>8}{sum(counts.values()):>8}"]


def _profile(path: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, list[float]]:
    """Microseconds of each node run, by operator."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        for _ in range(NUM_STEPS):
            session.run(None, taken)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]].append(event["dur"])
    return times
