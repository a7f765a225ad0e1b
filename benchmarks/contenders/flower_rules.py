"""Flower's own robust rules: run by the Python of Flower's own environment.

`PYTHON benchmarks/contenders/flower_rules.py RULE UPDATES SIZE REPEATS` prints a JSON object:
``wall_s`` and ``cpu_s`` of every repeat, ``peak_bytes`` and Flower's version. It imports nothing
of petalfl. Make the environment as for `flower_numpy.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0"}

import numpy as np
from flwr.server.strategy.aggregate import (  # type: ignore[import-not-found]
    aggregate_krum,
    aggregate_median,
    aggregate_trimmed_avg,
)
from resident import peak_bytes  # type: ignore[import-not-found]

RULE, NUM_UPDATES, SIZE, REPEATS = sys.argv[1], *map(int, sys.argv[2:5])
RULES = {
    "median": aggregate_median,
    "trimmed-mean": lambda results: aggregate_trimmed_avg(results, 0.1),
    "multi-krum": lambda results: aggregate_krum(
        results, NUM_UPDATES // 10, NUM_UPDATES - NUM_UPDATES // 10
    ),
}


def main() -> None:
    """Runs a rule on standard normal updates."""
    rng = np.random.default_rng(0)
    results = [([rng.standard_normal(SIZE, np.float32)], 1) for _ in range(NUM_UPDATES)]
    peak = peak_bytes(lambda: RULES[RULE](results))
    wall_s, cpu_s = [], []
    for _ in range(REPEATS):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        RULES[RULE](results)
        wall_s.append(time.perf_counter() - start_s)
        cpu_s.append(time.process_time() - start_cpu_s)
    found = {"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak, "version": version("flwr")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
