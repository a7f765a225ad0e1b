"""kill -9 of a device at random moments of its rounds: each round counts its update once."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from petalfl.store import DeviceStore, State
from tests.integration.faulty_device import digest, faulty_device, lines_of
from tests.integration.harness import SCHEME, Server, running_server

PAUSE_S = 0.01
# By phase: how many steps of it a round has, nearly; the moment is drawn among them.
PHASES = {"download": 3, "training": 6, "store": 12, "upload": 7, "receipt": 3}


def possible_digests(said: list[str]) -> set[str]:
    """Of the last write that was complete, or that may have been."""
    kept = [i for i, line in enumerate(said) if line.startswith("kept ")]
    after = said[kept[-1] :] if kept else [f"kept {digest(State())}", *said]
    return {line.split()[1] for line in after if line.startswith(("kept ", "writing "))}


def test_thirty_kills_of_a_device(watch_artifacts: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("PETALFL_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"PETALFL_TEST_SEED={seed} repeats this run")
    rng = random.Random(seed)
    store = tmp_path / "store"
    history: list[str] = []
    amid: Counter[str] = Counter()  # what it was at when it was killed
    arguments = (*SCHEME, "--min-devices", "1", "--epochs", "1")
    with running_server(watch_artifacts, tmp_path / "server", *arguments) as server:
        for phase in [*PHASES, "store"] * 5:  # 30: the store is where most could go wrong
            moment = (phase, rng.randint(1, PHASES[phase]), rng.uniform(0, PAUSE_S))
            device = faulty_device(
                server.url, server.token, store, pause_s=PAUSE_S, kill_amid=moment
            )
            with device as process:
                said = [*lines_of(process)]
                assert process.wait() == -signal.SIGKILL
            amid[[line for line in said if line in PHASES][-1]] += 1
            history += said
            assert_private_blocks_are_intact(store, history)
        print(f"killed amid {dict(amid)}")
        rounds = [int(line.split()[1]) for line in history if line.startswith("round ")]
        with faulty_device(server.url, server.token, store) as process:
            for line in lines_of(process):
                if line == f"round {max(rounds) + 3}":
                    break
        server.stop()  # or a round that the device has left might end between two looks
        assert_each_round_has_one_update(server, at_least=max(rounds) + 1)
    assert sum(amid.values()) == 30
    assert set(amid) == set(PHASES)


def assert_private_blocks_are_intact(store: Path, history: list[str]) -> None:
    possible = possible_digests(history)
    opened = DeviceStore(store)
    try:
        state = opened.read_state()
    finally:
        opened.close()
    assert digest(state) in possible


def assert_each_round_has_one_update(server: Server, at_least: int) -> None:
    [[closed]] = server.query("SELECT MAX(round_num) FROM rounds WHERE closed_at_s > 0")
    assert closed >= at_least
    for what in ("updates", "reports"):
        query = f"SELECT round_num, COUNT(*) FROM {what} WHERE round_num <= ? GROUP BY 1"
        assert dict(server.query(query, closed)) == dict.fromkeys(range(1, closed + 1), 1)
    versions = server.query("SELECT MAX(version) FROM versions WHERE block = 'encoder-acc'")
    assert versions == [(closed + 1,)]
