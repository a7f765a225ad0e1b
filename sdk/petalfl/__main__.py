"""`python -m petalfl check DIR`: will this machine train these artifacts as they were proven?"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from petalfl.engine import OrtEngine
from petalfl.errors import PetalError
from petalfl.model import ModelManifest
from petalfl.reference import TOLERANCE, Reference, take_steps
from petalfl.runtime import ENGINES, find_runtime


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 0 where the losses agree, 1 where they differ, 2 where nothing runs."""
    options = _parser().parse_args(arguments)
    try:
        found = _check(options.artifacts, options.engine, options.threads)
    except PetalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else _text(found))
    return 0 if found["is_equal"] else 1


def _check(folder: Path, name: Any, num_threads: int) -> dict[str, Any]:
    runtime = find_runtime(name)
    manifest, reference = ModelManifest.load(folder), Reference.load(folder)
    steps = take_steps(OrtEngine(folder, num_threads, name=name), manifest, folder, reference)
    if len(steps.losses) != len(reference.losses):
        difference = float("inf")  # the manifest is not the one that the reference was taken of
    else:
        difference = steps.difference(reference)
    return {
        "model": manifest.name,
        "engine": runtime.engine,
        "runtime": str(runtime),
        "reference_runtime": reference.runtime,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "num_steps": len(steps.losses),
        "losses": steps.losses,
        "largest_difference": difference,
        "tolerance": TOLERANCE,
        "is_equal": difference <= TOLERANCE,
        "batch_size": reference.hyperparameters.batch_size,
        "median_step_s": statistics.median(steps.seconds) if steps.seconds else None,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"runtime   {found['runtime']} (engine {found['engine']}), Python {found['python']}, "
        f"numpy {found['numpy']}, {found['machine']}",
        f"model     {found['model']}",
    ]
    if not found["num_steps"]:
        return "\n".join([*lines, "nothing in it trains: there are no steps to compare"])
    verdict = "equal" if found["is_equal"] else "DIFFERENT"
    return "\n".join(
        [
            *lines,
            f"losses    {verdict}: {found['num_steps']} local steps differ by at most "
            f"{found['largest_difference']:.1e} from {found['reference_runtime']}'s at export "
            f"(limit {found['tolerance']:g})",
            f"step      {1e3 * found['median_step_s']:.1f} ms (median, batch of "
            f"{found['batch_size']}); memory {found['peak_bytes'] / 1e6:.0f} MB at most",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m petalfl", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="train a few steps here and compare with the export",
        description="Take the local steps that were taken at export, on the ONNX Runtime that is "
        "installed here, and compare the losses. Needs neither PyTorch nor a server.",
        epilog="exit codes: 0 equal, 1 different, 2 the artifacts cannot be run here",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = check.add_argument
    add("artifacts", type=Path, metavar="DIR", help="made by python -m export")
    add("--engine", choices=ENGINES, default="auto", help="insist on one line of packages")
    add("--threads", type=int, default=1, metavar="N", help="of ONNX Runtime")
    add("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
