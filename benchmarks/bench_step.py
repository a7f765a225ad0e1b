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
import platform
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders.case import SEED, Case
from benchmarks.contenders.pytorch import build
from benchmarks.contenders.worker import Readiness
from benchmarks.step_profile import profile
from export import BlockModel, export_model
from petalfl.model import Block, ModelManifest

MODELS = {
    "har": "export.models.har:watch",
    "avmnist": "export.models.avmnist:digits",
    "ptbxl": "export.models.ptbxl:ecg",
    "text_audio": "export.models.text_audio:emotion",
    "projector": "export.models.projector:projector",
}
CONTENDERS = {"pytorch": "PyTorch eager", "petalfl_sdk": "petalfl", "composed": "ORT composed"}
NOTES = """\
One thread, all modalities, training mode, random data, the batch taken from memory by index; times
are of one step (median, p10-p90). PyTorch eager and petalfl: SGD with momentum 0.9 and weight decay
1e-5. ORT composed: onnxruntime-training's generate_artifacts on the whole model, with its AdamW:
it has no SGD with momentum. Start: from libraries imported to the first step done. Memory: resident
peak of a process that takes 20 steps and does nothing else; "over imports" is that less what
interpreter and libraries take (petalfl and ORT composed without torch). Disk: petalfl: manifest,
the blocks' graphs and parameters, the SGD graph; PyTorch: the state_dict alone, no code; ORT
composed: training, evaluation and optimizer graph, checkpoint. Ratios are to PyTorch."""


Remarks: TypeAlias = Mapping[str, str | None]  # ``refused`` and ``note``, as in a row


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one model at one batch size.

    Attributes:
        contender: A key of `CONTENDERS`.
        refused: Why there are no figures, or None.
        note: What is not as with the others, or None.
        median_s: Of the time of a step, as are ``p10_s`` and ``p90_s``.
        num_steps: That these are of.
        time_ratio: PyTorch's median is 1.
        start_s: From libraries imported to the first step done.
        imports_bytes: Resident after the libraries were imported.
        peak_bytes: The most that was resident.
        memory_ratio: PyTorch's peak is 1.
        growth_ratio: Of the peak less the imports; PyTorch's is 1.
        disk_bytes: What a device stores, but for libraries and code.
    """

    model: str
    batch: int
    contender: str
    refused: str | None = None
    note: str | None = None
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    num_steps: int | None = None
    time_ratio: float | None = None
    start_s: float | None = None
    imports_bytes: int | None = None
    peak_bytes: int | None = None
    memory_ratio: float | None = None
    growth_ratio: float | None = None
    disk_bytes: int | None = None


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
                found = measure(name, case, options.repeats, remarks)
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


def measure(name: str, case: Case, repeats: int, remarks: Mapping[str, Remarks]) -> list[Row]:
    """A row for each contender: started one by one, then timed in turns.

    Args:
        name: The model's, for the rows.
        repeats: Timed steps of each.
        remarks: By contender: ``refused`` and ``note`` of its row, if there is something to say.
    """
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
                    workers[contender] = stack.enter_context(_worker(contender, case))
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
    return [_with_ratios(row, rows["pytorch"]) for row in rows.values()]


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
def _worker(contender: str, case: Case) -> Iterator[Worker]:
    command = [
        sys.executable, "-m", "benchmarks.contenders.worker",
        contender, str(case.folder), case.factory, str(case.batch_size),
    ]  # fmt: skip
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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


def _with_ratios(row: Row, reference: Row) -> Row:
    return dataclasses.replace(
        row,
        time_ratio=_ratio(row.median_s, reference.median_s),
        memory_ratio=_ratio(row.peak_bytes, reference.peak_bytes),
        growth_ratio=_ratio(_growth(row), _growth(reference)),
    )


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None


def _growth(row: Row) -> int | None:
    if row.peak_bytes is None or row.imports_bytes is None:
        return None
    return row.peak_bytes - row.imports_bytes


HEADER = ("model", "batch", "", "step ms", "p10-p90", "time", "start s", "peak MB", "memory",
          "over imports MB", "ratio", "disk MB")  # fmt: skip


def report(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """The table, what it counts, and the machine."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    if is_markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        lines.insert(1, "|---|--:|---|" + "--:|" * (len(HEADER) - 3))
    else:
        columns = zip(*(line for line in cells if len(line) == len(HEADER)), strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = [_aligned(line, widths) for line in cells]
    remarks = [f"{r.model}, {CONTENDERS[r.contender]}: {r.note}" for r in rows if r.note]
    return "\n\n".join(["\n".join(lines), NOTES, *dict.fromkeys(remarks), _machine()])


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.model, str(row.batch), CONTENDERS[row.contender])
    if row.median_s is None or row.p10_s is None or row.p90_s is None:
        return (*start, f"refused: {row.refused}")
    return (
        *start,
        f"{1e3 * row.median_s:.2f}",
        f"{1e3 * row.p10_s:.2f}-{1e3 * row.p90_s:.2f}",
        _number(row.time_ratio),
        _number(row.start_s),
        _number(row.peak_bytes, 1e-6, 0),
        _number(row.memory_ratio),
        _number(_growth(row), 1e-6, 1),
        _number(row.growth_ratio),
        _number(row.disk_bytes, 1e-6),
    )


def _number(value: float | None, factor: float = 1, digits: int = 2) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    if len(line) < len(widths):  # a refusal, which no column is made wider for
        return "  ".join([*map(str.ljust, line[:3], widths), line[3]])
    pairs = list(zip(line, widths, strict=True))
    left, right = pairs[:3], pairs[3:]
    return "  ".join([*(c.ljust(w) for c, w in left), *(c.rjust(w) for c, w in right)])


def _machine() -> str:
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "onnxruntime-training-cpu", "numpy")
    )
    sizes = ", ".join(f"{n} {_package_bytes(n) / 1e6:.0f} MB" for n in ("torch", "onnxruntime"))
    load = os.getloadavg()[0]
    return (
        f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}; "
        f"installed: {sizes}. Load average at the end of the run: {load:.1f}."
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _package_bytes(name: str) -> int:
    spec = find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    files = (path for folder in folders or () for path in Path(folder).rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
