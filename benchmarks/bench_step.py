"""One training step: petalfl next to PyTorch and to onnxruntime-training's own way.

`python -m benchmarks.bench_step [--models har,…] [--batch 16,32] [--repeats N]`. Every contender
runs in a process of its own, on one thread, and they take turns step by step, so that noise hits
all alike. Nothing is downloaded; the artifacts are exported in the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders.case import SEED, Case
from benchmarks.contenders.pytorch import build
from benchmarks.contenders.worker import Readiness
from benchmarks.step_profile import profile
from benchmarks.step_report import CONTENDERS, Row, report
from export import BlockModel, export_model
from petalfl.model import Block, ModelManifest

MODELS = {
    "har": "export.models.har:watch",
    "avmnist": "export.models.avmnist:digits",
    "ptbxl": "export.models.ptbxl:ecg",
    "text_audio": "export.models.text_audio:emotion",
    "projector": "export.models.projector:projector",
}
ROOT = Path(__file__).parents[1]
STOCK_PYTHON = ROOT / ".venv-stock" / "bin" / "python"  # of `make stock`
Remarks: TypeAlias = Mapping[str, str | None]  # ``refused`` and ``note``, as in a row


class RefusedError(Exception):
    """A contender cannot train a model; says why in one line."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command."""
    options = _parser().parse_args(arguments)
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
            factory = MODELS.get(name, name)
            remarks = _prepare(name, factory, Path(folder), options.batch)
            for batch in options.batch:
                case = Case(Path(folder), factory, batch)
                _say(f"{name}, batch {batch}: {options.repeats} rounds of steps")
                found = measure(name, case, options.repeats, remarks, options.stock_python)
                rows += found
                if options.json:
                    for row in found:
                        print(json.dumps(dataclasses.asdict(row)), flush=True)
                if options.profile:
                    _say(f"{name}, batch {batch}: profile")
                    print(f"\n{name}, batch {batch}\n{profile(case)}\n", flush=True)
    if not options.json:
        print(report(rows, is_markdown=options.markdown))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step",
        description="Time, memory and size of one training step, next to PyTorch's.",
    )
    parser.add_argument("--models", type=lambda text: text.split(","), default=[*MODELS],
                        help=f"of {','.join(MODELS)}, or MODULE:FACTORY; default all")  # fmt: skip
    parser.add_argument("--batch", type=lambda text: [int(b) for b in text.split(",")],
                        default=[16, 32], help="batch sizes, default 16,32")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=50, metavar="N",
                        help="timed steps of each contender, default 50")  # fmt: skip
    parser.add_argument("--stock-python", type=Path, default=STOCK_PYTHON, metavar="PATH",
                        help="the Python of an environment with stock onnxruntime, numpy, msgpack "
                        "and paho-mqtt; default .venv-stock/bin/python, which `make stock` "
                        "makes")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--profile", action="store_true",
                        help="also print where petalfl's time goes")  # fmt: skip
    return parser


def _prepare(name: str, factory: str, folder: Path, batches: Sequence[int]) -> dict[str, Remarks]:
    """Fills the folder for all contenders; by contender, what it says of that."""
    case = Case(folder, factory, 0)
    model = build(factory)
    _say(f"{name}: exporting")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manifest = export_model(model, case.artifacts)
    torch.save(model.state_dict(), case.state_dict)
    for batch in batches:
        _draw_data(model, manifest, Case(folder, factory, batch))
    _say(f"{name}: composing one graph with onnxruntime-training")
    return {"composed": _compose(case)}


def _draw_data(model: BlockModel, manifest: ModelManifest, case: Case) -> None:
    rng = np.random.default_rng(SEED)
    inputs: dict[str, NDArray[Any]] = {}
    for name, modality in manifest.modalities.items():
        shape = (case.batch_size, *model.examples[name].shape[1:])
        inputs[name] = (
            rng.standard_normal(shape, dtype=np.float32)
            if modality.num_values is None
            else rng.integers(0, modality.num_values, shape)
        )
    labels = {
        task: _draw_labels(head, case.batch_size, rng) for task, head in manifest.heads.items()
    }
    case.save(inputs, labels)


def _draw_labels(head: Block, batch_size: int, rng: np.random.Generator) -> NDArray[Any]:
    shape = [dim or 1 for dim in head.outputs[0].shape]
    if head.task is not None and head.task.loss == "cross_entropy":
        return rng.integers(0, shape[0], batch_size)
    return rng.integers(0, 2, (batch_size, *shape)).astype(np.float32)


def _compose(case: Case) -> Remarks:
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.contenders.compose", case.factory, case.composed],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if process.returncode:
        return {"refused": _end_of(process.returncode), "note": None}
    return cast(Remarks, json.loads(process.stdout.splitlines()[-1]))


def measure(
    name: str, case: Case, repeats: int, remarks: Mapping[str, Remarks], stock_python: Path
) -> list[Row]:
    """A row for each contender: started one by one, then timed in turns.

    Args:
        name: The model's, for the rows.
        repeats: Timed steps of each.
        remarks: By contender: ``refused`` and ``note`` of its row, if there is something to say.
        stock_python: The interpreter of ``petalfl_stock``.
    """
    pythons = {c: stock_python if c == "petalfl_stock" else Path(sys.executable)
               for c in CONTENDERS}  # fmt: skip
    blank = {
        c: Row(name, case.batch_size, c, remarks.get(c, {}).get("refused"),
               remarks.get(c, {}).get("note"))
        for c in CONTENDERS
    }  # fmt: skip
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for contender, row in blank.items():
            if row.refused is None:
                try:
                    workers[contender] = stack.enter_context(
                        _worker(contender, case, pythons[contender])
                    )
                except RefusedError as error:
                    blank[contender] = dataclasses.replace(row, refused=str(error))
        times: dict[str, list[float]] = {contender: [] for contender in workers}
        for _ in range(repeats):
            for contender, worker in workers.items():
                times[contender].append(worker.time_step())
    rows = blank | {
        contender: _filled(
            blank[contender], times[contender], worker.readiness, _disk_bytes(contender, case)
        )
        for contender, worker in workers.items()
    }
    return [_with_ratios(row, rows["pytorch"], rows["composed"]) for row in rows.values()]


class Worker:
    """A contender's process, which has taken its first steps.

    Raises:
        RefusedError: It cannot.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        said = self._read()
        if "refused" in said:
            raise RefusedError(said["refused"])
        self.readiness = cast(Readiness, said)

    def time_step(self) -> float:
        """The time of one step in seconds, after one that is not timed."""
        assert self._process.stdin is not None  # as it was made
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> Any:
        assert self._process.stdout is not None  # as it was made
        line = self._process.stdout.readline()
        if not line:
            raise RefusedError(_end_of(self._process.wait()))
        return json.loads(line)


@contextmanager
def _worker(contender: str, case: Case, python: Path) -> Iterator[Worker]:
    if not python.exists():
        raise RefusedError(f"no Python at {python}; make one with: make stock")
    module = contender.replace("petalfl_stock", "petalfl_sdk")
    command = [
        str(python), "-m", "benchmarks.contenders.worker",
        module, str(case.folder), case.factory, str(case.batch_size),
    ]  # fmt: skip
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "sdk")},
        cwd=ROOT,
    ) as process:
        yield Worker(process)


def _end_of(returncode: int) -> str:
    if returncode < 0:
        return f"its process ended with {signal.Signals(-returncode).name}"
    return f"its process ended with code {returncode}"


def _disk_bytes(contender: str, case: Case) -> int:
    if contender == "pytorch":
        return case.state_dict.stat().st_size
    if contender == "composed":
        names = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")
        return sum((case.composed / name).stat().st_size for name in names)
    paths = [path for path in case.artifacts.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in paths if path.name != "adamw.onnx")


def _filled(row: Row, times: Sequence[float], readiness: Readiness, disk_bytes: int) -> Row:
    p10, median, p90 = (float(q) for q in np.quantile(times, (0.1, 0.5, 0.9)))
    return dataclasses.replace(
        row,
        median_s=median,
        p10_s=p10,
        p90_s=p90,
        num_steps=len(times),
        disk_bytes=disk_bytes,
        **readiness,
    )


def _with_ratios(row: Row, reference: Row, composed: Row) -> Row:
    return dataclasses.replace(
        row,
        time_ratio=_ratio(row.median_s, reference.median_s),
        composed_ratio=_ratio(row.median_s, composed.median_s),
        memory_ratio=_ratio(row.peak_bytes, reference.peak_bytes),
        growth_ratio=_ratio(row.growth_bytes, reference.growth_bytes),
    )


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
