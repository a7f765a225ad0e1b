"""The weighted mean of other frameworks' servers: run by the Python of their own environment.

`PYTHON benchmarks/contenders/peers_mean.py PEER UPDATES SIZE REPEATS` prints a JSON object:
``wall_s`` and ``cpu_s`` of every repeat, ``peak_bytes`` and the peer's version. PEER is
``flower`` (FedAvg's own way, in place, from the bytes that clients send), ``flower-arrays``
(its `aggregate`, from arrays) or ``nvflare``. It imports nothing of petalfl. Make the
environments with::

    python3.11 -m venv flower && flower/bin/pip install flwr
    python3.11 -m venv nvflare && nvflare/bin/pip install nvflare
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0"}

import numpy as np
from resident import peak_bytes  # type: ignore[import-not-found]

PEER, NUM_UPDATES, SIZE, REPEATS = sys.argv[1], *map(int, sys.argv[2:5])


def flower(updates: list[Any]) -> Callable[[], object]:
    """What `FedAvg.aggregate_fit` does by default."""
    from flwr.common import (  # type: ignore[import-not-found]
        Code,
        FitRes,
        Status,
        ndarrays_to_parameters,
    )
    from flwr.server.strategy.aggregate import (  # type: ignore[import-not-found]
        aggregate_inplace,
    )

    status = Status(Code.OK, "")
    results: list[Any] = []
    while updates:
        parameters = ndarrays_to_parameters([updates.pop()])
        results.append((None, FitRes(status, parameters, len(results) + 1, {})))
    return lambda: aggregate_inplace(results)


def flower_arrays(updates: list[Any]) -> Callable[[], object]:
    """What it does with ``inplace=False``."""
    from flwr.server.strategy.aggregate import aggregate

    results = [([update], k + 1) for k, update in enumerate(updates)]
    return lambda: aggregate(results)


def nvflare(updates: list[Any]) -> Callable[[], object]:
    """The helper of its aggregators, which streams as we do."""
    from nvflare.app_common.aggregators.weighted_aggregation_helper import (  # type: ignore[import-not-found]
        WeightedAggregationHelper,
    )

    def run() -> object:
        helper = WeightedAggregationHelper()
        for k, update in enumerate(updates):
            helper.add({"block": update}, k + 1, str(k), 0)
        return helper.get_result()

    return run


PEERS = {
    "flower": (flower, "flwr"),
    "flower-arrays": (flower_arrays, "flwr"),
    "nvflare": (nvflare, "nvflare"),
}


def main() -> None:
    """Runs a peer on standard normal updates."""
    make, package = PEERS[PEER]
    rng = np.random.default_rng(0)
    run = make([rng.standard_normal(SIZE, np.float32) for _ in range(NUM_UPDATES)])
    peak = peak_bytes(run)
    wall_s, cpu_s = [], []
    for _ in range(REPEATS):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        run()
        wall_s.append(time.perf_counter() - start_s)
        cpu_s.append(time.process_time() - start_cpu_s)
    found = {"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak, "version": version(package)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
