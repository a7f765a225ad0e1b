"""An asynchronous federation over the real broker: a slow device holds nobody back."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl import EdgeClient, RoundInfo
from tests.integration.harness import Server, running_server, take_part

NUM_CLASSES, NUM_SHIFTS = 3, 4
SLOW = "device-3"
MODALITIES = {"device-0": "a", "device-1": "ab", "device-2": "b", SLOW: "ab"}
SCHEME = (
    "--scheme", "fm", "--min-devices", "4", "--seed", "3", "--batch-size", "12", "--epochs", "3",
    "--learning-rate", "0.05", "--schedule", "constant",
)  # fmt: skip
ROUNDS = 12
SLOWNESS_S = 0.1  # in a synchronous federation; in an asynchronous one, three tasks of the others


class Examples(NamedTuple):
    inputs: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]

    def of(self, modalities: str) -> dict[str, NDArray[np.float32]]:
        return {name: self.inputs[name] for name in modalities}


def examples(seed: int, n: int) -> Examples:
    """Three classes, each around a center of its own in both modalities."""
    shape = {"a": (5,), "b": (2, 8)}
    centers = np.random.default_rng(100)
    means = {m: 2 * centers.standard_normal((NUM_CLASSES, *s)) for m, s in shape.items()}
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, n)
    noise = {m: rng.standard_normal((n, *s)) for m, s in shape.items()}
    inputs = {m: (means[m][labels] + noise[m]).astype(np.float32) for m in shape}
    return Examples(inputs, labels)


class Outcome(NamedTuple):
    """What a federation came to.

    Attributes:
        accuracy: Mean of the devices', with the final blocks, on examples that nobody trained on.
        tasks: By device, the tasks that it has trained.
        consumed: By block and version, the updates that went into it.
        unconsumed: By block, those that wait for a version.
    """

    accuracy: float
    tasks: dict[str, int]
    seconds: float
    rounds: list[dict[str, Any]]
    updates_accepted: int
    consumed: dict[tuple[str, int], int]
    unconsumed: dict[str, int]
    refused: dict[str, int]


async def interrupt(server: Server) -> None:
    """Kills the server in mid-run, and starts it again."""
    await server.until(lambda status: status["round_num"] >= 4, "four rounds")
    await asyncio.to_thread(server.stop, signal.SIGKILL)
    await asyncio.to_thread(server.start)


def run(artifacts: Path, folder: Path, *arguments: str, is_interrupted: bool = False) -> Outcome:
    """Four devices, one of them slow."""
    trained = dict.fromkeys(MODALITIES, 0)
    words = ("--rounds", str(ROUNDS), *SCHEME, *arguments)
    with running_server(artifacts, folder / "server", *words) as server, ExitStack() as stack:

        def client(number: int, name: str) -> EdgeClient:
            mine = examples(number, 48)

            def note(info: RoundInfo) -> None:
                trained[name] += 1
                if name == SLOW:
                    dawdle()

            return stack.enter_context(
                EdgeClient(
                    server.url, token=server.token, data=mine.of(MODALITIES[name]),
                    labels=mine.labels, store=folder / name, device=name, on_round=note,
                )
            )  # fmt: skip

        def dawdle() -> None:
            if "async" not in arguments:
                time.sleep(SLOWNESS_S)
                return
            enough = least_of_the_others() + 3
            while least_of_the_others() < enough and not is_over():
                time.sleep(0.05)

        def least_of_the_others() -> int:
            return min(count for name, count in trained.items() if name != SLOW)

        def is_over() -> bool:
            with suppress(OSError, HTTPException):  # it is being started again
                return bool(server.get("status")["is_finished"])
            return False

        async def all_of_it() -> None:
            interruption = interrupt(server) if is_interrupted else asyncio.sleep(0)
            await asyncio.gather(take_part(clients), interruption)

        clients = [client(number, name) for number, name in enumerate(MODALITIES)]
        started_s = time.monotonic()
        asyncio.run(all_of_it())
        seconds = time.monotonic() - started_s
        fresh = examples(99, 300)
        scores = [
            c.evaluate(fresh.of(MODALITIES[c.device]), fresh.labels)["accuracy"] for c in clients
        ]
        status = server.get("status")
        assert status["is_finished"]
        return Outcome(
            float(np.mean(scores)),
            trained,
            seconds,
            server.get("rounds"),
            status["updates_accepted"],
            {
                (block, version): count
                for block, version, count in server.query(
                    "SELECT block, version, COUNT(*) FROM updates WHERE version > 0 GROUP BY 1, 2"
                )
            },
            dict(
                server.query(
                    "SELECT block, COUNT(*) FROM updates WHERE closed_in IS NULL GROUP BY 1"
                )
            ),
            status["updates_refused"],
        )


ASYNC = ("--mode", "async", "--buffer-size", "3,encoder-a=2,encoder-b=2")


def buffer_size(block: str) -> int:
    return 2 if block.startswith("encoder") else 3


def num_holders(block: str) -> int:
    """Of an encoder those with its modality, of other blocks all."""
    is_encoder = block.startswith("encoder")
    return sum(not is_encoder or block[-1] in modalities for modalities in MODALITIES.values())


def assert_every_update_is_in_a_version_or_waits_for_one(found: Outcome) -> None:
    newest = found.rounds[-1]["blocks"]
    steps = {(name, v + 1) for name, b in newest.items() for v in range(1, b["version"])}
    assert found.consumed.keys() == steps
    for (block, version), count in found.consumed.items():  # arrivals in one go count together
        assert count >= buffer_size(block), (block, version)
    waiting = sum(found.unconsumed.values())
    assert found.updates_accepted == sum(found.consumed.values()) + waiting


@pytest.fixture(scope="module")
def asynchronous(
    small_artifacts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcome]:
    yield run(small_artifacts, tmp_path_factory.mktemp("async"), *ASYNC)


def test_the_slow_device_holds_nobody_back(asynchronous: Outcome) -> None:
    fast = [count for name, count in asynchronous.tasks.items() if name != SLOW]
    assert asynchronous.tasks[SLOW] >= 1
    assert min(fast) >= 2 * asynchronous.tasks[SLOW], asynchronous.tasks


def test_every_update_is_in_a_version_or_waits_for_one(asynchronous: Outcome) -> None:
    blocks = [block for one in asynchronous.rounds for block in one["blocks"].values()]
    assert len(asynchronous.rounds) == ROUNDS
    assert sum(block["num_dropped"] for block in blocks) == 0
    newest = asynchronous.rounds[-1]["blocks"]
    assert max(block["version"] for block in newest.values()) == ROUNDS + 1
    assert all(block["version"] > ROUNDS / 3 for block in newest.values()), newest
    assert_every_update_is_in_a_version_or_waits_for_one(asynchronous)
    # What was not enough for a version, and one of each device while the last version was made.
    for block, count in asynchronous.unconsumed.items():
        assert count < buffer_size(block) + num_holders(block), block


def test_both_modes_reach_the_same_accuracy(
    small_artifacts: Path, tmp_path: Path, asynchronous: Outcome
) -> None:
    synchronous = run(small_artifacts, tmp_path)
    assert set(synchronous.tasks.values()) == {ROUNDS}
    print(f"\nsync {synchronous.accuracy:.3f} in {synchronous.seconds:.1f} s, "
          f"async {asynchronous.accuracy:.3f} in {asynchronous.seconds:.1f} s, "
          f"tasks {asynchronous.tasks}")  # fmt: skip
    assert min(synchronous.accuracy, asynchronous.accuracy) > 0.85
    assert abs(synchronous.accuracy - asynchronous.accuracy) < 0.08


def test_a_killed_server_goes_on_where_it_was(small_artifacts: Path, tmp_path: Path) -> None:
    found = run(small_artifacts, tmp_path, *ASYNC, is_interrupted=True)
    assert found.accuracy > 0.85
    assert_every_update_is_in_a_version_or_waits_for_one(found)
    # What was accepted but had lost its receipt is not lost: no device trained a task in vain.
    assert set(found.refused) <= {"late"}
