"""The rows of `bench_step` and the table that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.machine import describe_machine

CONTENDERS = {
    "pytorch": "PyTorch eager",
    "petalfl_sdk": "petalfl",
    "petalfl_stock": "petalfl",
    "composed": "ORT composed",
}
NOTES = """\
One thread, all modalities, training mode, random data, the batch taken from memory by index; times
are of one step (median, p10-p90). PyTorch eager and petalfl: SGD with momentum 0.9 and weight decay
1e-5. ORT composed: onnxruntime-training's generate_artifacts on the whole model, with its AdamW:
it has no SGD with momentum. petalfl: the same artifacts on both engines, ort-training and ort.
Start: from libraries imported to the first step done. Memory: resident peak of a process that takes
20 steps and does nothing else; "over imports" is that less what interpreter and libraries take (no
torch but in PyTorch's process). Disk: petalfl: manifest, the blocks' graphs and parameters, the SGD
graph; PyTorch: the state_dict alone, no code; ORT composed: training, evaluation and optimizer
graph, checkpoint. Ratios are to PyTorch, "/ composed" to ORT composed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one model at one batch size.

    Attributes:
        contender: A key of `CONTENDERS`.
        refused: Why there are no figures, or None.
        note: What is not as with the others, or None.
        engine: The library that computes, with its version.
        median_s: Of the time of a step, as are ``p10_s`` and ``p90_s``.
        num_steps: That these are of.
        time_ratio: PyTorch's median is 1.
        composed_ratio: ORT composed's median is 1.
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
    engine: str | None = None
    median_s: float | None = None
    p10_s: float | None = None
    p90_s: float | None = None
    num_steps: int | None = None
    time_ratio: float | None = None
    composed_ratio: float | None = None
    start_s: float | None = None
    imports_bytes: int | None = None
    peak_bytes: int | None = None
    memory_ratio: float | None = None
    growth_ratio: float | None = None
    disk_bytes: int | None = None

    @property
    def growth_bytes(self) -> int | None:
        """The peak less the imports."""
        if self.peak_bytes is None or self.imports_bytes is None:
            return None
        return self.peak_bytes - self.imports_bytes


HEADER = ("model", "batch", "", "engine", "step ms", "p10-p90", "time", "/ composed", "start s",
          "peak MB", "memory", "over imports MB", "ratio", "disk MB")  # fmt: skip
NUM_LEFT = 4  # columns of text


def report(rows: Sequence[Row], *, is_markdown: bool) -> str:
    """The table, what it counts, and the machine."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    if is_markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        lines.insert(1, "|---|--:|---|---|" + "--:|" * (len(HEADER) - NUM_LEFT))
    else:
        columns = zip(*(line for line in cells if len(line) == len(HEADER)), strict=True)
        widths = [max(map(len, column)) for column in columns]
        lines = [_aligned(line, widths) for line in cells]
    remarks = [f"{r.model}, {CONTENDERS[r.contender]}: {r.note}" for r in rows if r.note]
    return "\n\n".join(["\n".join(lines), NOTES, *dict.fromkeys(remarks), _machine()])


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.model, str(row.batch), CONTENDERS[row.contender], row.engine or "")
    if row.median_s is None or row.p10_s is None or row.p90_s is None:
        return (*start, f"refused: {row.refused}")
    return (
        *start,
        f"{1e3 * row.median_s:.2f}",
        f"{1e3 * row.p10_s:.2f}-{1e3 * row.p90_s:.2f}",
        _number(row.time_ratio),
        _number(row.composed_ratio),
        _number(row.start_s),
        _number(row.peak_bytes, 1e-6, 0),
        _number(row.memory_ratio),
        _number(row.growth_bytes, 1e-6, 1),
        _number(row.growth_ratio),
        _number(row.disk_bytes, 1e-6),
    )


def _number(value: float | None, factor: float = 1, digits: int = 2) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    if len(line) < len(widths):  # a refusal, which no column is made wider for
        return "  ".join([*map(str.ljust, line[:NUM_LEFT], widths), line[NUM_LEFT]])
    pairs = list(zip(line, widths, strict=True))
    left, right = pairs[:NUM_LEFT], pairs[NUM_LEFT:]
    return "  ".join([*(c.ljust(w) for c, w in left), *(c.rjust(w) for c, w in right)])


def _machine() -> str:
    sizes = ", ".join(f"{n} {_package_bytes(n) / 1e6:.0f} MB" for n in ("torch", "onnxruntime"))
    machine = describe_machine("torch", "onnxruntime-training-cpu", "numpy")
    return f"{machine} Installed: {sizes}."


def _package_bytes(name: str) -> int:
    spec = find_spec(name)
    folders = spec.submodule_search_locations if spec else None
    files = (path for folder in folders or () for path in Path(folder).rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())
