"""`python -m benchmarks.contenders.worker NAME DIR MODULE:FACTORY BATCH`: one contender's process.

It loads one contender, trains `NUM_STEPS` steps and prints a JSON object: `Readiness`, or
``{"refused": reason}``. Then each line on stdin is answered by the time of one step, in seconds.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from benchmarks.contenders.case import Case

NUM_STEPS = 20  # before the peak of the memory is read


class Readiness(TypedDict):
    """What is known of a process that has taken `NUM_STEPS` steps.

    Attributes:
        engine: The library that computes, with its version.
        imports_bytes: Resident after the interpreter and the libraries were loaded.
        peak_bytes: The most that was resident at any time.
        start_s: From then to the end of the first step: files read, sessions opened.
    """

    engine: str
    imports_bytes: int
    peak_bytes: int
    start_s: float


def main(name: str, case: Case) -> None:
    """Trains until stdin is closed."""
    _load_no_more_than(name)
    try:
        contender = importlib.import_module(f"benchmarks.contenders.{name}")
        turns = _turns(_engine(name), _resident_bytes("VmRSS"))
        next(turns)
        contender.train(case, turns.__next__)
    except StopIteration:
        pass
    except Exception as error:  # of three libraries
        _say({"refused": reason_of(error)})


def reason_of(error: Exception) -> str:
    """One line, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    return reason if len(reason) <= 160 else f"{reason[:70]} … {reason[-88:]}"


def _engine(name: str) -> str:
    packages = {"pytorch": "torch", "composed": "onnxruntime-training-cpu"}
    if package := packages.get(name):  # in whose processes nothing of petalfl is to be
        return f"{package} {version(package)}"
    return str(importlib.import_module("petalfl.runtime").find_runtime())


def _turns(engine: str, imports_bytes: int) -> Iterator[None]:
    """Advanced after every step: measures, and waits for its turn."""
    started = time.perf_counter()
    yield
    start_s = time.perf_counter() - started
    for _ in range(NUM_STEPS - 1):
        yield
    peak_bytes = _resident_bytes("VmHWM")
    _say(Readiness(
        engine=engine, imports_bytes=imports_bytes, peak_bytes=peak_bytes, start_s=start_s,
    ))  # fmt: skip
    for _ in sys.stdin:
        yield  # one step to bring the caches back from the contender before
        started = time.perf_counter()
        yield
        _say(time.perf_counter() - started)


def _say(value: object) -> None:
    print(json.dumps(value), flush=True)


def _resident_bytes(field: str) -> int:
    """Of /proc/self/status: VmRSS, or VmHWM, its peak.

    Not `resource.getrusage`: its ru_maxrss starts from the peak of the process that forked this
    one, here one with PyTorch in it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _load_no_more_than(name: str) -> None:
    """Keeps out libraries that the contender has no use for, but that imports would drag in."""
    if name == "pytorch":
        package = _import_bare("export")  # whose exporter imports onnx and onnxruntime
        package.__dict__["BlockModel"] = importlib.import_module("export.model").BlockModel
    else:
        sys.modules["torch"] = None  # type: ignore[assignment]  # onnxruntime imports it if it can
    if name == "composed":
        importlib.import_module("onnxruntime")
        _import_bare("onnxruntime.training")  # whose generator imports onnx


def _import_bare(name: str) -> types.ModuleType:
    """A package without running its ``__init__``; its submodules can be imported as ever."""
    spec = find_spec(name)
    assert spec is not None
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = spec.submodule_search_locations or []
    return package


if __name__ == "__main__":
    _, _name, _folder, _factory, _batch = sys.argv
    main(_name, Case(Path(_folder), _factory, int(_batch)))
