"""The machine that a benchmark ran on, as its report says it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine(*packages: str) -> str:
    """Processor, cores, Python, the packages' versions, and how busy the machine was."""
    versions = "".join(f", {name} {version(name)}" for name in packages)
    return (
        f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}{versions}. "
        f"Load average at the end of the run: {os.getloadavg()[0]:.1f}."
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
