"""`python -m benchmarks.blossom`: runs cells of the study; `… report` makes tables of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.android_sim.regimes import REGIMES
from petalfl.errors import PetalError

from .artifacts import find
from .cells import SCHEDULES, Cell, grid
from .datasets import DATASETS, find_dataset, load
from .results import Line, Results, key_of
from .runner import run_cells
from .schemes import SCHEMES, names_of

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/blossom")
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
QUICK: dict[str, Any] = {
    "regime": ["incomplete", "exclusive"], "scheme": ["fm", "phf", "local", "two-heads"],
    "devices": 10, "data_fraction": [0.3], "rounds": 20, "epochs": 3, "finish_epochs": 10,
    "seeds": 1, "unseen": 2, "out": RUNS / "quick",
}  # fmt: skip
_CHOSEN = ("partition", "data_fraction", "regime", "missing", "scheme")  # of which several


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 when all is done, 1 when cells failed, 2 on an error, 130 on Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(stderr=True)
    logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
    try:
        if arguments[:1] == ["report"]:
            return _report(arguments[1:])
        return _run(_options(arguments), console)
    except (PetalError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; finished cells are kept: the same command goes on", highlight=False)
        return 130


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """The cells that the options ask for.

    Raises:
        ValueError: Something is impossible.
    """
    cells: list[Cell] = []
    names = {f.name for f in dataclasses.fields(Cell)}
    for dataset in options.dataset:
        training = {k: v for k, v in find_dataset(dataset).training.items() if k in names}
        fixed = names - {"dataset", "seed", *_CHOSEN}
        given = {k: v for k, v in vars(options).items() if k in fixed and v is not None}
        choices = {
            "seed": options.seed or range(options.seeds),
            "dataset": [dataset],
            **{name: getattr(options, name) for name in _CHOSEN},
        }
        cells += grid(choices, **{**training, **given})
    return cells


def _run(options: argparse.Namespace, console: Console) -> int:
    cells = cells_of(options)
    results = Results(options.out)
    missing = results.missing(cells)
    if options.list:
        for cell in cells:
            print(f"{'to do' if cell in missing else 'done ':5} {cell.label}")
        print(f"{len(cells)} cells, {len(missing)} to do; results in {options.out}")
        return 0
    for dataset in dict.fromkeys(cell.dataset for cell in missing):
        load(dataset)  # that it is not here should come out now
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # of the cells' processes

    def artifacts_of(cell: Cell) -> Path:
        has_personal_head = SCHEMES[cell.scheme].has_personal_head
        wanted = (cell.dataset, cell.missing, cell.seed)
        folder, is_there = find(options.cache, *wanted, has_personal_head)
        if is_there:
            return folder
        from .models import prepare  # which takes seconds to import torch

        return prepare(*wanted, options.cache, has_personal_head, console.print)

    with _Bar(len(cells), len(cells) - len(missing), console) as bar:
        num_failed = run_cells(missing, artifacts_of, options.jobs, results.append, bar)
    if options.json:
        keys = {cell.key for cell in cells}
        _print_lines(results, keys)
    else:
        console.print(f"results in {options.out}; python -m benchmarks.blossom report makes tables")
    return 1 if num_failed else 0


def _print_lines(results: Results, keys: set[str]) -> None:
    for line in results.lines():
        if key_of(line) in keys:
            print(json.dumps(line, sort_keys=True))


def _report(arguments: list[str]) -> int:
    from .report import write_report  # which needs matplotlib

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blossom report",
        description="Make the tables and figures of the results, in the page that says what "
        "they mean.",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="the results")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE",
                        help="a Markdown page; what is between its marks is replaced")  # fmt: skip
    options = parser.parse_args(arguments)
    for path in write_report(Results(options.out).lines(), options.page):
        print(path)
    return 0


class _Bar:
    """Cells done, and the rounds of those under way; without a terminal, a line for each cell."""

    def __init__(self, total: int, done: int, console: Console) -> None:
        self._console = console
        self._num_done, self._total = done, total
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._all = self._progress.add_task("cells", total=total, completed=done)
        self._tasks: dict[Cell, Any] = {}

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def began(self, cell: Cell) -> None:
        """See `Observer`."""
        self._tasks[cell] = self._progress.add_task(cell.label, total=cell.rounds)

    def advanced(self, cell: Cell, rounds: int) -> None:
        """See `Observer`."""
        self._progress.update(self._tasks[cell], completed=rounds)

    def finished(self, cell: Cell, line: Line) -> None:
        """See `Observer`."""
        metric = find_dataset(cell.dataset).metric
        score = 100 * line["finished"][metric]
        self._end(cell, f"{metric} {score:.1f} in {line['seconds']:.0f} s")

    def failed(self, cell: Cell, reason: str) -> None:
        """See `Observer`."""
        self._end(cell, f"failed: {reason}")

    def _end(self, cell: Cell, what: str) -> None:
        self._num_done += 1
        self._progress.remove_task(self._tasks.pop(cell))
        self._progress.update(self._all, completed=self._num_done)
        self._console.print(f"{self._num_done}/{self._total} {cell.label}: {what}",
                            markup=False, highlight=False, soft_wrap=True)  # fmt: skip


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    if "--quick" in arguments:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    for name in ("jobs", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: found {getattr(options, name)}, expected at least 1")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.blossom",
        description="Run cells of the BLOSSOM study: federations of the SDK's trainers and the "
        "server, joined in memory. What a cell came to is kept; the same command goes on where "
        "it was stopped. Options with a comma take several values, and all combinations are run.",
        epilog=f"schemes:\n{names_of(SCHEMES)}\n\n`python -m benchmarks.blossom report` makes "
        "tables and figures of the results.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", type=_list, default=["watch"], help=f"of {','.join(DATASETS)}; default watch")
    add("--regime", type=_list, default=[*REGIMES],
        help="who has which modalities, default complete,incomplete,exclusive")  # fmt: skip
    add("--scheme", type=_list, default=["fm", "ph", "phf", "local"], help="see below; default "
        "fm,ph,phf,local")  # fmt: skip
    add(
        "--missing",
        type=_list,
        default=["mask"],
        help="of mask (left out of the attention), zero (a zero embedding), untrained (what the "
        "initial encoder makes of zeros, as in the paper's code); default mask. In regime complete "
        "only the first is run",
    )
    add("--partition", type=_list, default=["natural"],
        help="natural, iid or dirichlet:ALPHA; default natural")  # fmt: skip
    add("--data-fraction", type=_floats, default=[1.0], metavar="SHARE",
        help="of a device's training examples, in (0, 1]; default 1")  # fmt: skip
    add("--devices", type=int, metavar="N", help="default: as many as are natural")
    add("--rounds", type=int, default=60, metavar="R", help="default 60")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1; default 3")
    add("--seed", type=_ints, metavar="S", help="these seeds instead")
    add("--unseen", type=int, metavar="N", help="leave so many people out, to test on; default 0")
    group = parser.add_argument_group("training, by default as the paper has it for the data set")
    add = group.add_argument
    add("--optimizer", metavar="NAME", help="sgd or adamw")
    add("--learning-rate", type=float, metavar="LR")
    add("--momentum", type=float, metavar="BETA")
    add("--weight-decay", type=float, metavar="LAMBDA")
    add("--batch-size", type=int, metavar="N", help="default 16")
    add("--epochs", type=int, metavar="N", help="local, per round; default 1")
    add("--schedule", metavar="NAME", help=f"of {', '.join(SCHEDULES)}; default cosine")
    add("--server-optimizer", metavar="RULE",
        help="of schemes without one of their own; default sgd: docs/strategies.md")  # fmt: skip
    add("--codec", metavar="NAME", help="of updates; default f32: docs/codecs.md")
    add("--finish-epochs", type=int, metavar="N", help="after the last round; default 30")
    add("--finish-rate", type=float, metavar="SHARE", help="of the learning rate; default 0.1")
    add("--eval-every", type=int, metavar="R", help="rounds between points of a curve; default 5")
    add = parser.add_argument_group("how").add_argument
    add("--jobs", type=int, default=1, metavar="N", help="cells at once; default 1")
    add("--quick", action="store_true",
        help="a look at it all in under 5 minutes on 2 cores with --jobs 2; results in "
        f"{QUICK['out']}")  # fmt: skip
    add("--list", action="store_true", help="say which cells there are, and which are done")
    add("--json", action="store_true", help="print the cells' lines at the end")
    add("--out", type=Path, default=RESULTS, metavar="DIR", help="the results; default: in git")
    add("--cache", type=Path, default=RUNS / "artifacts", metavar="DIR", help="exported models")
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _floats(text: str) -> list[float]:
    return [float(part) for part in _list(text)]


def _ints(text: str) -> list[int]:
    return [int(part) for part in _list(text)]


if __name__ == "__main__":
    sys.exit(main())
