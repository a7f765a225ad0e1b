"""Flower's simulation with clients that only send: run by the Python of Flower's own environment.

`PYTHON benchmarks/contenders/flower_numpy.py CLIENTS PARAMETERS ROUNDS` prints a JSON object:
``updates_per_s`` and ``seconds`` of the rounds, and Flower's version. It imports nothing of
petalfl. Make the environment with::

    python3.11 -m venv flower && flower/bin/pip install "flwr[simulation]"
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

os.environ |= {"RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_TELEMETRY_ENABLED": "0"}

import numpy as np
from flwr.client import ClientApp, NumPyClient  # type: ignore[import-not-found]
from flwr.common import ndarrays_to_parameters  # type: ignore[import-not-found]
from flwr.server import ServerApp, ServerAppComponents, ServerConfig  # type: ignore[import-not-found]
from flwr.server.strategy import FedAvg  # type: ignore[import-not-found]
from flwr.simulation import run_simulation  # type: ignore[import-not-found]

NUM_CLIENTS, NUM_PARAMETERS, NUM_ROUNDS = (int(text) for text in sys.argv[1:4])
times: list[float] = []


class Trivial(NumPyClient):  # type: ignore[misc]
    """Sends what it got, moved a little."""

    def fit(self, parameters: list[Any], config: Any) -> tuple[list[Any], int, dict[str, Any]]:
        """One round of it."""
        return [parameters[0] + np.float32(0.001)], 16, {}


class Timed(FedAvg):  # type: ignore[misc]
    """Notes when the first round opens and the last one closes."""

    def configure_fit(self, *arguments: Any, **named: Any) -> Any:
        """Opens a round."""
        times.append(time.perf_counter())
        return super().configure_fit(*arguments, **named)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Closes a round."""
        assert len(results) == NUM_CLIENTS and not failures, (len(results), failures)
        closed = super().aggregate_fit(server_round, results, failures)
        times.append(time.perf_counter())
        return closed


def _client(context: Any) -> Any:
    return Trivial().to_client()


def _server(context: Any) -> ServerAppComponents:
    strategy = Timed(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=NUM_CLIENTS,
        min_available_clients=NUM_CLIENTS,
        initial_parameters=ndarrays_to_parameters([np.zeros(NUM_PARAMETERS, np.float32)]),
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=NUM_ROUNDS))


if __name__ == "__main__":
    run_simulation(
        server_app=ServerApp(server_fn=_server),
        client_app=ClientApp(client_fn=_client),
        num_supernodes=NUM_CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    assert len(times) == 2 * NUM_ROUNDS, times
    seconds = times[-1] - times[0]
    rate = NUM_CLIENTS * NUM_ROUNDS / seconds
    print(json.dumps({"updates_per_s": rate, "seconds": seconds, "version": version("flwr")}))
