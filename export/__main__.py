"""`python -m export`: from PyTorch to artifacts, what is in them, and back to PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from petalfl.errors import ModelError, PetalError
from petalfl.model import ModelManifest
from petalfl.runtime import ENGINES, find_runtime
from petalfl.schema import plain

from .artifacts import export_model
from .inspection import Inspection, inspect_artifacts, policy_of
from .law import OWN_TIMES, TOLERANCE
from .merge import merge
from .model import BlockModel
from .schema import manifest_schema
from .verify import Finding, verify
from .warm import warm_start
from .weights import Weights

_FORMS = """\
Export a PyTorch model of blocks as per-block ONNX training artifacts.

other forms (each has its own --help):
  inspect DIR                        what is in an artifacts folder, and what it costs devices
  verify DIR                         prove again that a step on it is PyTorch's step
  merge --artifacts DIR --to FILE    trained blocks to one PyTorch or ONNX file
  warm --artifacts DIR --out DIR     the same artifacts, starting from trained blocks
  schema                             JSON Schema of manifest.json
"""
_EXAMPLES = """\
examples:
  python -m export export.models.har:watch --out artifacts
  python -m export export.models.har:watch --out artifacts --check-with .venv-stock/bin/python
  python -m export inspect artifacts
  python -m export verify artifacts --batches 10
  python -m export merge --artifacts artifacts --weights petalfl-data --to model.pt
"""
_MERGE_EXAMPLES = """\
examples:
  python -m export merge --artifacts artifacts --weights petalfl-data --to model.pt
      then, in Python: my_model.load_state_dict(torch.load("model.pt"))
  python -m export merge --artifacts artifacts --weights http://host:8080 --token TOKEN \\
      --private device-store --modalities acc,gyro --to model.onnx
"""
_WARM_EXAMPLES = """\
example, of heads that all devices have trained together and then each for itself:
  python -m export warm --artifacts artifacts --weights petalfl-data --out warm
  python -m server --artifacts warm --data-dir second --scheme ph
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0; 1 when `verify` finds a difference; 2, with a line on stderr, when something is wrong
        with what was given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.path.insert(0, "")  # a console script, unlike `python -m`, does not look here by itself
    options = _parse(arguments)
    try:
        code: int = options.run(options)
    except PetalError as error:
        _clear_line()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _clear_line()
        print("error: interrupted", file=sys.stderr)
        return 130
    return code


# The commands


def _export(options: argparse.Namespace) -> int:
    find_runtime(options.engine)
    with _stdout_to_stderr():
        model = load_model(options.factory)
        progress = _step_progress(len(model.blocks()) + 2 + len(options.check_with))
        manifest = export_model(
            model,
            options.out,
            progress,
            file_format=options.format,
            source=options.factory,
            check_with=options.check_with,
        )
    _clear_line()
    if options.json:
        _print_json(plain(manifest))
    else:
        print(_manifest_table(manifest))
        print(
            f"written to {options.out}; serve it with: python -m server --artifacts {options.out}"
        )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    found = inspect_artifacts(options.folder)
    if options.json:
        _print_json(plain(found))
    else:
        print(_inspection_tables(found))
    return 0


def _verify(options: argparse.Namespace) -> int:
    find_runtime(options.engine)
    source = options.model or ModelManifest.load(options.folder).source
    if not source:
        raise ModelError(
            "the manifest does not say which model this is; give it with --model MODULE:FACTORY"
        )
    with _stdout_to_stderr():
        findings = verify(
            load_model(source),
            options.folder,
            num_batches=options.batches,
            seed=options.seed,
            progress=_counter("batch"),
        )
    _clear_line()
    wrong = [finding for finding in findings if not finding.is_exact]
    if options.json:
        _print_json(_findings_json(findings))
    else:
        print(_findings_table(findings))
    for block, error, what, _ in wrong:
        where = f"block {block}: its {what}" if block else f"the {what}"
        print(f"failed: {where} differs from PyTorch's by {error:.1e}", file=sys.stderr)
    return 1 if wrong else 0


def _warm(options: argparse.Namespace) -> int:
    found = warm_start(
        options.artifacts,
        options.out,
        weights=options.weights,
        token=options.token,
        federation=options.federation,
        progress=_counter("block"),
    )
    return _print_weights(options, options.out, found)


def _merge(options: argparse.Namespace) -> int:
    merged = merge(
        options.artifacts,
        options.to,
        weights=options.weights,
        token=options.token,
        federation=options.federation,
        private=options.private,
        modalities=options.modalities,
        progress=_counter("block"),
    )
    return _print_weights(options, options.to, merged)


def _print_weights(options: argparse.Namespace, to: Path, found: Mapping[str, Weights]) -> int:
    _clear_line()
    if options.json:
        origins = {name: weights.origin for name, weights in found.items()}
        _print_json({"to": str(to), "blocks": origins})
    else:
        rows = [(name, f"{w.vector.size:,}", w.origin) for name, w in found.items()]
        print(_table([("block", "values", "from"), *rows], right={1}))
        print(f"written to {to}")
    return 0


def _schema(options: argparse.Namespace) -> int:
    print(manifest_schema(), end="")
    return 0


def load_model(factory: str) -> BlockModel:
    """Calls ``MODULE:FACTORY``.

    Raises:
        ModelError: There is no such module or function, it fails, or returns something else.
    """
    module_name, _, function_name = factory.partition(":")
    if not module_name or not function_name:
        raise ModelError(f"found {factory!r}, expected MODULE:FACTORY, e.g. my_model:build")
    try:
        build = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot find {factory}: {error}") from error
    except Exception as error:  # whatever the user's own code raises
        raise ModelError(f"importing {module_name} fails: {_where(error)}") from error
    try:
        model = build()
    except PetalError:
        raise
    except Exception as error:  # as above
        raise ModelError(f"{factory} fails: {_where(error)}") from error
    if not isinstance(model, BlockModel):
        raise ModelError(f"{factory} returned {type(model).__name__}, expected export.BlockModel")
    return model


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{' '.join(repr(error).split())[:300]}{place}"


# The arguments


class _Parser(argparse.ArgumentParser):
    """One line for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    commands = {
        "inspect": _inspect_parser,
        "verify": _verify_parser,
        "merge": _merge_parser,
        "warm": _warm_parser,
        "schema": _schema_parser,
    }
    if arguments and arguments[0] in commands:
        return commands[arguments[0]]().parse_args(arguments[1:])
    return _export_parser().parse_args(arguments)


def _make_parser(
    command: str, run: Callable[[argparse.Namespace], int], description: str, epilog: str = ""
) -> _Parser:
    parser = _Parser(
        prog=f"python -m export {command}".strip(),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _export_parser() -> _Parser:
    parser = _make_parser("", _export, _FORMS, _EXAMPLES)
    add = parser.add_argument
    add("factory", metavar="MODULE:FACTORY", help="returns an export.BlockModel")
    add("--out", type=Path, required=True, metavar="DIR",
        help="artifacts folder to write; replaced as a whole")  # fmt: skip
    add("--format", choices=("onnx", "ort"), default="onnx",
        help="ort: for runtimes that read nothing else (default: %(default)s)")  # fmt: skip
    _add_engine(parser)
    add("--check-with", type=Path, action="append", default=[], metavar="PYTHON",
        help="also take some steps with the ONNX Runtime of this other Python and refuse what "
        "differs; may be repeated")  # fmt: skip
    return parser


def _add_engine(parser: _Parser) -> None:
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto",
        help="the ONNX Runtime that the law is proven on, which must be the one installed; the "
        "graphs are the same for all (default: %(default)s)",
    )  # fmt: skip


def _inspect_parser() -> _Parser:
    parser = _make_parser(
        "inspect",
        _inspect,
        "Say what is in an artifacts folder and what it costs devices; check every file.",
        "example:\n  python -m export inspect artifacts",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="artifacts folder")
    return parser


def _verify_parser() -> _Parser:
    parser = _make_parser(
        "verify",
        _verify,
        "Prove on random batches that a chained step on the artifacts is PyTorch's own step.\n"
        f"Exit code 0 when every block is within {TOLERANCE:g}, else 1.",
        "example:\n  python -m export verify artifacts --model my_model:build --batches 10",
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="artifacts folder")
    add("--model", metavar="MODULE:FACTORY",
        help="the PyTorch model (default: what the artifacts were exported from)")  # fmt: skip
    add("--batches", type=_positive, default=3, metavar="N",
        help="of all modalities and of each alone (default: %(default)s)")  # fmt: skip
    add("--seed", type=_natural, default=0, metavar="K", help="of the first (default: %(default)s)")
    _add_engine(parser)
    return parser


def _merge_parser() -> _Parser:
    parser = _make_parser(
        "merge",
        _merge,
        "Write what the federation has trained as one file: a state_dict for the class that was\n"
        "exported (.pt), or one ONNX graph for inference (.onnx). What neither --weights nor\n"
        "--private has keeps its initial values.",
        _MERGE_EXAMPLES,
    )
    add = parser.add_argument
    add("--artifacts", type=Path, required=True, metavar="DIR", help="what was exported")
    add("--to", type=Path, required=True, metavar="FILE", help="model.pt or model.onnx")
    _add_weights(parser, is_required=False)
    add("--private", type=Path, metavar="STORE",
        help="a device's store, for its private blocks, or for all that it has fine-tuned after "
        "the last round; close its client first")  # fmt: skip
    add("--modalities", type=_names, metavar="A,B",
        help="inputs of model.onnx (default: all); the others are absent for good")  # fmt: skip
    return parser


def _warm_parser() -> _Parser:
    parser = _make_parser(
        "warm",
        _warm,
        "Write the artifacts again, with a federation's trained values as initial ones. Another\n"
        "federation that serves them starts from these: its shared blocks, and the private blocks\n"
        "of every device. What --weights does not have keeps its initial values.",
        _WARM_EXAMPLES,
    )
    add = parser.add_argument
    add("--artifacts", type=Path, required=True, metavar="DIR", help="what was exported")
    add("--out", type=Path, required=True, metavar="DIR",
        help="artifacts folder to write; replaced as a whole")  # fmt: skip
    _add_weights(parser, is_required=True)
    return parser


def _add_weights(parser: _Parser, is_required: bool) -> None:
    add = parser.add_argument
    add("--weights", metavar="DIR_OR_URL", required=is_required,
        help="a server's data folder, or the URL of a running server")  # fmt: skip
    add("--token", default="", help="the server's join token, with a URL")
    add("--federation", default="default", metavar="NAME",
        help="on that server (default: %(default)s)")  # fmt: skip


def _schema_parser() -> _Parser:
    return _make_parser(
        "schema",
        _schema,
        "Print the JSON Schema of manifest.json.",
        "example:\n  python -m export schema > manifest.schema.json",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 1")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number from 0")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


# What is printed


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keeps stdout for the result: the user's own code may print, and what it calls."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _step_progress(total: int) -> Callable[[str], None]:
    """Names the step at hand: a bar on a terminal, else a line each."""
    done = 0

    def show(step: str) -> None:
        nonlocal done
        if sys.stderr.isatty():
            _draw_bar(done, total, step)
        else:
            print(f"  {step} …", file=sys.stderr)
        done += 1

    return show


def _counter(what: str) -> Callable[[int, int], None]:
    """Counts: a bar on a terminal, else a line at the end."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            _draw_bar(done, total, f"{what} {done}/{total}")
        elif done == total:
            print(f"  {what} {done}/{total}", file=sys.stderr)

    return show


def _draw_bar(done: int, total: int, text: str) -> None:
    filled = 24 * done // max(total, 1)
    bar = "█" * filled + "░" * (24 - filled)
    print(f"\r\033[K  {bar} {text}", end="", file=sys.stderr, flush=True)


def _clear_line() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, sort_keys=True))


def _manifest_table(manifest: ModelManifest) -> str:
    sizes = {block.name: sum(p.size for p in block.parameters) for block in manifest.blocks}
    rows = [("block", "kind", "parameters", "default")]
    for block in manifest.blocks:
        policy = policy_of(manifest, block)
        rows.append((block.name, block.kind, f"{sizes[block.name]:,}", policy))
    rows.append(("total", "", f"{sum(sizes.values()):,}", ""))
    return _table(rows, right={2})


def _inspection_tables(found: Inspection) -> str:
    blocks = [("block", "kind", "modality", "parameters", "files", "activations", "FLOPs",
               "default", "loss")]  # fmt: skip
    for b in found.blocks:
        blocks.append((b.name, b.kind, b.modality, f"{b.parameters:,}",
                       _bytes(b.num_bytes), _bytes(b.activation_bytes), _count(b.num_flops),
                       b.policy, b.loss))  # fmt: skip
    t = found.total
    blocks.append(("total", "", "", f"{t.parameters:,}", _bytes(t.num_bytes),
                   _bytes(t.activation_bytes), _count(t.num_flops), "", ""))  # fmt: skip
    devices = [("device with", "parameters", "activations", "FLOPs", "download once",
                "round down", "round up", "holds")]  # fmt: skip
    for d in found.devices:
        devices.append((", ".join(d.modalities), f"{d.parameters:,}", _bytes(d.activation_bytes),
                        _count(d.num_flops), _bytes(d.setup_bytes), _bytes(d.download_bytes),
                        _bytes(d.upload_bytes), ", ".join(d.blocks)))  # fmt: skip
    source = f" from {found.source}" if found.source else ""
    return "\n".join(
        [
            f"{found.name}{source}: {_bytes(found.num_bytes)} as {found.format}, all files intact",
            "",
            _table(blocks, right={3, 4, 5, 6}),
            "",
            _table(devices, right={1, 2, 3, 4, 5, 6}),
            "",
            "activations and FLOPs (of the forward pass) are per example; a round moves at most "
            "so much",
        ]
    )


def _findings_table(findings: list[Finding]) -> str:
    rows = [("block", "worst error", "", "in")]
    for block, error, what, is_exact in findings:
        rows.append((block or "(all)", f"{error:.1e}", "ok" if is_exact else "FAILED", what))
    return (
        f"{_table(rows, right={1})}\nthe limit is {TOLERANCE:g} of the largest entry, or "
        f"{OWN_TIMES} times PyTorch's own float32 error where that is more"
    )


def _findings_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "tolerance": TOLERANCE,
        "is_exact": all(finding.is_exact for finding in findings),
        "blocks": {
            finding.block or "(all)": {
                "error": finding.error if math.isfinite(finding.error) else None,
                "what": finding.what,
                "is_exact": finding.is_exact,
            }
            for finding in findings
        },
    }


def _table(rows: Sequence[tuple[str, ...]], right: set[int]) -> str:
    """Columns two spaces apart, those in ``right`` flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _bytes(number: int) -> str:
    return _scaled(number, ("B", "KB", "MB", "GB"))


def _count(number: int) -> str:
    return _scaled(number, ("", "K", "M", "G", "T"))


def _scaled(number: float, units: Sequence[str]) -> str:
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.{1 if power else 0}f} {units[power]}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
