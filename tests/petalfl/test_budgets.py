"""Limits of time and memory; with the real server, in a round."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from petalfl import Budgets, DataError, PetalError, RoundMetrics
from petalfl.budgets import fit_memory, training_bytes
from petalfl.metering import ByteMeter
from petalfl.model import ModelManifest
from petalfl.participation import ROOM_BYTES
from petalfl.training import Hyperparameters, TrainingResult, train
from tests.integration.harness import Server, running_server
from tests.petalfl.builders import make_block
from tests.petalfl.clients import Make, is_gone, running, until

# Of 1000 bytes an example, and 10 parameters each.
HELD = [
    make_block("encoder-a", ("a",), 2, 4, activation_bytes=400, min_batch=2),
    make_block("head", ("encoder-a",), 2, 4, activation_bytes=600),
]
PLAIN = Hyperparameters(0.1, batch_size=16)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "bytes_per_day"])
def test_a_budget_is_above_zero(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"the budget of {name} is .*, expected more than 0"):
        Budgets(**{name: value})


def test_what_a_batch_takes() -> None:
    assert training_bytes(HELD, "sgd", 16) == 3 * 16 * 1000 + 8 * 80
    assert training_bytes(HELD, "adamw", 1) == 3000 + 10 * 80


@pytest.mark.parametrize(
    ("room", "accumulation", "num_parts"),
    [(16, 1, 1), (15, 1, 2), (8, 1, 2), (5, 1, 4), (2, 1, 8), (16, 4, 4), (2, 4, 8), (16, 99, 99)],
)
def test_batches_in_as_few_parts_as_there_is_room_for(
    room: int, accumulation: int, num_parts: int
) -> None:
    """Never in fewer than the server says."""
    memory_bytes = training_bytes(HELD, "sgd", room)
    wanted = replace(PLAIN, accumulation=accumulation)
    assert fit_memory(wanted, HELD, memory_bytes) == replace(wanted, accumulation=num_parts)


def test_no_room_for_the_smallest_part() -> None:
    least = training_bytes(HELD, "sgd", 2)
    with pytest.raises(DataError, match=r"about 0\.0 MB even with 2 examples at a time"):
        fit_memory(PLAIN, HELD, least - 1)
    assert fit_memory(PLAIN, HELD, least).accumulation == 8


# In a round: 12 batches of 4 of 24 examples.


def test_a_round_ends_when_its_time_is_over(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that strikes whenever it is looked at: before each batch, and once at the start."""
    now_s = 0.0

    def monotonic() -> float:
        nonlocal now_s
        now_s += 1
        return now_s

    monkeypatch.setattr("petalfl.trainer.time", SimpleNamespace(monotonic=monotonic))
    found: list[RoundMetrics] = []
    make(busy, "d", budgets=Budgets(seconds=5), on_metrics=found.append).run()
    assert [(m.num_steps, m.num_examples, m.is_complete) for m in found] == [(4, 16, False)] * 3
    rows = busy.query("SELECT num_examples, COUNT(*) FROM updates GROUP BY 1")
    assert rows == [(16, 3)]


def test_a_round_without_time_for_a_batch_is_left_out(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("petalfl.trainer.time", SimpleNamespace(monotonic=lambda: next(clock)))
    errors: list[PetalError] = []
    client = make(busy, "d", budgets=Budgets(seconds=30), on_error=errors.append)
    with running(client):
        until(lambda: bool(errors), "the error")
    assert str(errors[0]) == "round 1 is left out: the 30 s of its budget were over too soon"
    assert client._trainer.state.round_num == 0


def test_a_round_that_has_no_room_is_left_out(busy: Server, make: Make) -> None:
    errors: list[PetalError] = []
    with running(make(busy, "d", budgets=Budgets(memory_bytes=99), on_error=errors.append)):
        until(lambda: bool(errors), "the error")
    assert re.match(r"round 1 is left out: training takes about 0\.0 MB even", str(errors[0]))


def test_batches_are_cut_to_the_memory(
    busy: Server, make: Make, small_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []

    def spy(*arguments: Any, **more: Any) -> TrainingResult:
        parts.append(arguments[4].accumulation)
        return train(*arguments, **more)

    monkeypatch.setattr("petalfl.trainer.train", spy)
    held = ModelManifest.load(small_artifacts).blocks_for({"a"})
    make(busy, "d", budgets=Budgets(memory_bytes=training_bytes(held, "sgd", 2))).run()
    assert parts == [2, 2, 2]  # of batches of 4


# The day's bytes


class Clock:
    now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of the meters that clients make; who rests looks at it often."""
    found = Clock()
    monkeypatch.setattr("petalfl.client.ByteMeter", partial(ByteMeter, now_s=found))
    monkeypatch.setattr("petalfl.participation.REST_POLL_S", 0.02)
    return found


def model_bytes(folder: Path) -> int:
    """The files of a device with modality a."""
    manifest = ModelManifest.load(folder)
    held = manifest.blocks_for({"a"})
    files = [graph for block in held for graph in block.artifacts.graphs]
    return len(manifest.to_json()) + sum(
        file.num_bytes for file in (*files, *manifest.optimizers.values())
    )


def round_bytes(folder: Path) -> int:
    """What a round takes at most: every block down and up, and other messages."""
    held = ModelManifest.load(folder).blocks_for({"a"})
    return 8 * sum(block.size for block in held) + ROOM_BYTES


def test_without_room_for_a_round_the_client_is_offline_until_there_is(
    fully_shared: Server, make: Make, clock: Clock, small_artifacts: Path
) -> None:
    """Also behind a restart; then it goes on by itself."""
    server, errors = fully_shared, list[PetalError]()
    model, one_round = model_bytes(small_artifacts), round_bytes(small_artifacts)
    budgets = Budgets(bytes_per_day=model + one_round + 3000)
    client = make(server, "d", budgets=budgets, on_error=errors.append)
    with running(client):
        until(lambda: bool(errors), "rest")
        until(lambda: is_gone(server, "d"), "offline")
    assert client._trainer.state.round_num == 1 and client._meter is not None
    assert model < client._meter.used < model + one_round
    client.close()
    again = make(server, "d", budgets=budgets, on_error=errors.append)
    with running(again):
        until(lambda: len(errors) == 2, "rest again")
        until(lambda: is_gone(server, "d"), "offline again")
        assert again._trainer.state.round_num == 1
        clock.now_s += 26 * 3600
        until(lambda: again._trainer.state.round_num == 3, "two rounds: the model is there")
    assert re.fullmatch(
        r"a round takes up to \d+ bytes, \d+ are left of the \d+ of 24 hours: no round for the "
        r"next 2\d\.\d h", str(errors[0]),
    )  # fmt: skip
    assert len(errors) == 2


@pytest.fixture
def fully_shared(small_artifacts: Path, tmp_path: Path) -> Iterator[Server]:
    arguments = ("--rounds", "3", "--scheme", "fm", "--batch-size", "4")
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        yield server


def test_a_budget_below_a_round(busy: Server, make: Make, clock: Clock) -> None:
    with pytest.raises(PetalError, match=r"the budget is too small for a round: .* of a day"):
        make(busy, "d", budgets=Budgets(bytes_per_day=1000)).run()
