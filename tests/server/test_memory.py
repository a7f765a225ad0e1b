from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource
import numpy as np
from server.memory import keep_freed_memory
for prepare in (bool, keep_freed_memory):
    prepare()
    for count in (10, 200):  # the first to come to rest
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            arrays = [np.ones(400_000, np.uint8) for _ in range(8)]
            del arrays
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's mallopt")
def test_large_arrays_reuse_one_another_s_pages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    by_default, kept = map(int, done.stdout.split())
    assert kept < 0.1 * by_default, (kept, by_default)
