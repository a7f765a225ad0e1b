"""`python -m export MODULE:FACTORY --out DIR`: a PyTorch model of blocks to artifacts."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from petalfl.errors import ModelError, PetalError
from petalfl.model import ModelManifest
from petalfl.schema import plain

from .artifacts import export_model
from .model import BlockModel


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 when the folder is written, 2 when the model is refused."""
    options = _parser().parse_args(arguments)
    sys.path.insert(0, "")  # a console script, unlike `python -m`, does not look here by itself
    try:
        model = load_model(options.factory)
        with _stdout_to_stderr():
            manifest = export_model(model, options.out, _say_progress)
    except PetalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(plain(manifest), indent=1, sort_keys=True))
    else:
        print(_table(manifest, options.out))
    return 0


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keeps stdout for the result: PyTorch's exporter prints graphs there when it gives up."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def load_model(factory: str) -> BlockModel:
    """Calls ``MODULE:FACTORY``.

    Raises:
        ModelError: There is no such module or function, or it returns something else.
    """
    module_name, _, function_name = factory.partition(":")
    if not module_name or not function_name:
        raise ModelError(f"found {factory!r}, expected MODULE:FACTORY, e.g. my_model:build")
    try:
        build = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"cannot find {factory}: {error}") from error
    model = build()
    if not isinstance(model, BlockModel):
        raise ModelError(f"{factory} returned {type(model).__name__}, expected export.BlockModel")
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a PyTorch model of blocks as per-block ONNX training artifacts.",
        epilog="example: python -m export export.models.har:watch --out artifacts",
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="returns an export.BlockModel")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="artifacts folder to write; replaced as a whole")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the manifest instead of a table")
    return parser


def _say_progress(step: str) -> None:
    print(f"  {step} …", file=sys.stderr)


def _table(manifest: ModelManifest, out: Path) -> str:
    rows = [("block", "kind", "parameters", "default")]
    for b in manifest.blocks:
        policy = "private" if b.name in manifest.private_blocks else "shared"
        rows.append((b.name, b.kind, f"{b.size:,}", policy))
    rows.append(("total", "", f"{sum(b.size for b in manifest.blocks):,}", ""))
    lines = [f"{a:<20}{b:<10}{c:>12}  {d}".rstrip() for a, b, c, d in rows]
    return "\n".join(
        [*lines, f"written to {out}; serve it with: python -m server --artifacts {out}"]
    )


if __name__ == "__main__":
    sys.exit(main())
