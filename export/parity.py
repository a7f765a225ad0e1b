"""The reference steps on another ONNX Runtime: that of another Python environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import petalfl
from petalfl.errors import ModelError


def check_elsewhere(python: Path, folder: Path) -> None:
    """Runs `python -m petalfl check` on artifacts with another interpreter.

    Args:
        python: Its environment needs ONNX Runtime, numpy, msgpack and paho-mqtt, no PyTorch; what
            is checked is this petalfl, whether it has one of its own or not.

    Raises:
        ModelError: The losses differ there, or nothing runs.
    """
    source = str(Path(petalfl.__file__).parents[1])
    try:
        process = subprocess.run(
            [str(python), "-m", "petalfl", "check", str(folder), "--json"],
            env=os.environ | {"PYTHONPATH": source},
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ModelError(f"cannot run {python}: {error.strerror}") from error
    if process.returncode not in (0, 1):
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise ModelError(f"the artifacts do not run with {python}: {lines[-1]}")
    found: dict[str, Any] = json.loads(process.stdout)
    if not found["is_equal"]:
        raise ModelError(
            f"on {found['runtime']} ({python}) the losses of {found['num_steps']} local steps "
            f"differ by {found['largest_difference']:.1e} (limit {found['tolerance']:g}) from "
            f"{found['reference_runtime']}'s"
        )
