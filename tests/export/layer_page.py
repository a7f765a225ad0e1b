"""The page that lists what becomes of every kind of layer.

    python -m tests.export.layer_page --write docs/layers.md

needs both environments: `make stock`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from petalfl.errors import ModelError
from petalfl.runtime import find_runtime
from tests.engine_steps import NUM_STEPS, layer_losses
from tests.export.layer_law import BLOCK, TOLERANCE, check, export
from tests.export.layer_law import NUM_STEPS as NUM_LAW_STEPS
from tests.export.layer_steps import write_layer
from tests.export.layers import CASES, Case
from tests.stock import TOLERANCE as RUNTIME_TOLERANCE
from tests.stock import StockSteps, largest_difference


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        apart: The largest difference of the losses between the two ONNX Runtimes.
        note: The worst error, or the reason for the refusal.
    """

    kind: str
    configuration: str
    verdict: str
    apart: str
    note: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


def row(case: Case, stock: StockSteps) -> Row:
    """Runs the case and writes down what comes of it."""
    try:
        exported = export(case)
        worst = float(np.max([*check(case, exported).values()]))  # NaN if one is
    except ModelError as error:
        reason = str(error).removeprefix(f"block {BLOCK}: ").replace("|", "\\|")
        return Row(case.kind, case.configuration, "refused", "–", " ".join(reason.split()))
    except AssertionError as error:
        return Row(case.kind, case.configuration, "WRONG", "–", str(error))
    with tempfile.TemporaryDirectory() as folder:
        write_layer(case, exported, Path(folder))
        apart = largest_difference(stock.losses(Path(folder)), layer_losses(Path(folder)))
    is_right = worst <= TOLERANCE and apart <= RUNTIME_TOLERANCE
    verdict = "exact" if is_right else "WRONG"
    return Row(case.kind, case.configuration, verdict, f"{apart:.0e}", f"{worst:.0e}")


def table(text: str) -> list[Row]:
    """The rows of the table in a page."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [Row(*line[2:-2].split(" | ", 4)) for line in lines[1:]]


HEADING = """\
# Layers

What `python -m export` does with each kind of layer. *Exact*: training outputs, the gradients of
all parameters and inputs, running statistics, evaluation outputs, and the parameters after
{steps} steps of SGD with momentum and of AdamW equal PyTorch's within {tolerance:g}, with the
same dropout masks and on batches of other lengths than the traced ones. *Refused*: the export stops
with the reason given.

Every exact one runs on {ours} and on {stock}. *Runtimes
apart* is the largest relative difference of the losses of {num_steps} steps of SGD with momentum,
which move parameters and inputs towards a fixed target, and of the evaluation after them;
{apart:g} is the limit.

What is not listed is most likely exported too: every export is checked against PyTorch, and what
differs is refused. The cases are in `tests/export/layers.py`; this page is made from them:

    make stock
    python -m tests.export.layer_page --write docs/layers.md

| Layer | Configuration | Verdict | Runtimes apart | Largest relative error, or the reason |
|---|---|---|---|---|
"""


def page(stock: StockSteps) -> str:
    """The whole page."""
    heading = HEADING.format(
        steps=NUM_LAW_STEPS, tolerance=TOLERANCE, num_steps=NUM_STEPS, apart=RUNTIME_TOLERANCE,
        ours=find_runtime(), stock=stock.runtime,
    )  # fmt: skip
    return heading + "".join(f"{row(case, stock)}\n" for case in CASES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs every case and lists the verdicts.")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="default: the terminal")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    with StockSteps() as stock:
        text = page(stock)
    print(text, end="") if write is None else write.write_text(text)


if __name__ == "__main__":
    main()
