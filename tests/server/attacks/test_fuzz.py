"""Generated messages: every field of every message, hostile values, broken bytes."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalfl import wire
from petalfl.training import Hyperparameters
from tests.server.attacks.victim import MEMBER, STRANGER, Victim, open_victim
from tests.server.builders import announce, make_report, make_update, messages_of

NUM_MESSAGES = 100_000
SEEDS = 10
UPDATE = make_update(MEMBER, "head", 1.0)
MESSAGES: list[wire.Message] = [
    replace(announce(UPDATE)[0], sha256="0" * 64),  # else it may well count
    *messages_of(UPDATE)[1:],
    make_report(STRANGER),
    wire.Status(True),
    wire.Ready(("acc",), ("head",)),
    wire.Receipt(UPDATE.update_id, "accepted"),
    wire.BlockVersion(1, "0" * 64),
    wire.Task(1, 0, Hyperparameters(0.1), 0, {}),
    wire.Finish({}),
]
# A member may send updates that are wrong, and a stranger anything: none of it may count. A
# member's own report, ready and status would, and rightly.
TOPICS = [
    *[f"blocks/{block}/up/{device}"
      for block in ("head", "fusion", "encoder-acc", "no-such", "..", "")
      for device in (MEMBER, STRANGER, "nobody", "UPPER", "")],
    *[f"{kind}" for kind in (f"req/{STRANGER}", "req/nobody", "req/", "req/..",
                             f"dev/{STRANGER}/status", "dev/nobody/status", "dev//status")],
]  # fmt: skip
HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 1 << 20, 1 << 31, (1 << 40) + 1, (1 << 63) - 1, -(1 << 63),
    (1 << 64) - 1, 0.0, -0.0, 1.5, 1e308, float("nan"), float("inf"), float("-inf"), "", "head",
    "fusion", "f32", "f16", "accepted", "..", "../../etc/passwd", "/", "\0", "a" * 64, "a" * 65,
    "é", "\U0001f600" * 50, "x" * 2000, "0" * 64, "F" * 64, b"", b"x", bytes(16), bytes(17),
    UPDATE.update_id, bytes(32), bytes(wire.CHUNK_BYTES), [], [[]], ["acc"], ["acc"] * 65,
    [1] * 257, {}, {"v": 2}, {"a": {"b": {"c": {}}}}, {i: i for i in range(5)},
    {str(i): i for i in range(200)}, msgpack.ExtType(1, b"x"), msgpack.Timestamp(0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def fields_of(message: wire.Message) -> dict[str, Any]:
    return dict(msgpack.unpackb(wire.encode(message)))


def pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value, strict_types=False))


def hostile_bytes(rng: random.Random) -> bytes:
    """A message with some fields replaced, dropped or added, or with its bytes broken."""
    fields = fields_of(rng.choice(MESSAGES))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        name = rng.choice([*fields, "extra"])
        if rng.random() < 0.1:
            fields.pop(name, None)
        else:
            fields[name] = rng.choice(HOSTILE)
    data = pack(fields)
    if rng.random() < 0.3:
        place, length = rng.randrange(len(data)), rng.choice((0, 1, 1, 4))
        data = data[:place] + rng.randbytes(length) + data[place + rng.choice((0, 1, 4)) :]
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data) + 1)]
    return data


async def assert_nothing_happened(victim: Victim, before: Any) -> None:
    statuses = {receipt.status for receipt in await victim.receipts()}
    assert "accepted" not in statuses
    assert victim.snapshot() == before


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_hundred_thousand_messages_change_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with open_victim(tmp_path) as victim:
        before = victim.snapshot()
        for _ in range(NUM_MESSAGES // SEEDS):
            victim.receive(rng.choice(TOPICS), hostile_bytes(rng))
        await assert_nothing_happened(victim, before)
        assert victim.gateway.refused["malformed"] > 0.5 * NUM_MESSAGES / SEEDS
        assert set(victim.gateway.refused) <= {"malformed", "payload", "update"}
        assert victim.gateway.transfers.num_bytes <= 64 << 20


anything = st.recursive(
    st.sampled_from(HOSTILE) | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text()
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_field_of_any_message_may_hold_anything(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Hypothesis makes the smallest example of what fails."""

    async def scenario() -> None:
        with open_victim(tmp_path_factory.mktemp("victim")) as victim:
            before = victim.snapshot()
            for _ in range(data.draw(st.integers(1, 8))):
                fields = fields_of(data.draw(st.sampled_from(MESSAGES)))
                name = data.draw(st.sampled_from([*fields, "more"]))
                message = pack({**fields, name: data.draw(anything)})
                victim.receive(data.draw(st.sampled_from(TOPICS)), message)
            await assert_nothing_happened(victim, before)

    asyncio.run(scenario())
