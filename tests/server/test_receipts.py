"""A device that asks again what has become of an update: the receipt is the same, whenever."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import pytest

from petalfl import topics, wire
from server.config import PerBlock
from tests.server.builders import (
    FED,
    Door,
    Run,
    Site,
    announce,
    make_id,
    make_report,
    make_update,
    messages_of,
)

UPDATE = make_update("watch", "head", 0.5, num_examples=4)
BEGIN, CHUNK, FIN = messages_of(UPDATE)
MANIFEST, PAYLOAD = announce(UPDATE)
QUESTIONS: dict[str, list[wire.Message]] = {
    "all of it": [BEGIN, CHUNK, FIN],
    "what has arrived": [BEGIN, FIN],
    "with what the server said was missing": [CHUNK, FIN],
    "its fin alone": [FIN],
    "its fin twice": [BEGIN, FIN, FIN],
}


async def open_door(run: Run, site: Site) -> Door:
    door = await Door(site.manifest, run.federation).open()
    run.federation.start(door.gateway)
    await door.request(wire.Ready(("acc",), ("head",)))
    return door


async def finish_round(door: Door, round_num: int) -> None:
    """The device sends one block of three, and its report."""
    if round_num == 1:
        await door.send("head", BEGIN, CHUNK, FIN)
    await door.request(make_report("watch", round_num=round_num))
    assert {receipt.status for receipt in door.receipts} == {"accepted"}
    door.received.clear()


async def verdicts(door: Door, messages: Sequence[wire.Message]) -> list[tuple[str, str]]:
    """What a device hears that asks so."""
    door.received.clear()
    await door.send("head", *messages)
    assert door.transport.raised == []
    assert {receipt.update_id for receipt in door.receipts} <= {UPDATE.update_id}
    return [(receipt.status, receipt.reason) for receipt in door.receipts]


@pytest.mark.parametrize("has_restarted", [False, True])
@pytest.mark.parametrize("num_rounds", [2, 9])
@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_receipt_that_was_lost_comes_again(
    site: Site, question: str, num_rounds: int, has_restarted: bool
) -> None:
    """Two rounds later, and where none is open any longer."""
    with ExitStack() as stack:
        run = stack.enter_context(site.run(num_rounds=num_rounds))
        door = await open_door(run, site)
        for round_num in (1, 2):
            await finish_round(door, round_num)
        if has_restarted:
            stack.close()
            run = stack.enter_context(site.run(num_rounds=num_rounds))
            door = await open_door(run, site)
        assert (run.federation.round is None) == (num_rounds == 2)
        before = run.federation.shared.versions, run.state.history.totals()["updates_accepted"]
        heard = await verdicts(door, QUESTIONS[question])
        assert set(heard) == {("accepted", "")}
        assert len(heard) == QUESTIONS[question].count(FIN)
        after = run.federation.shared.versions, run.state.history.totals()["updates_accepted"]
        assert after == before and before[0]["head"] == 2
        assert len(door.gateway.transfers) == 0


async def test_an_update_that_counts_need_not_come_again(site: Site) -> None:
    """While its round is open, too: the device is not asked for its chunks."""
    with site.run() as run:
        door = await open_door(run, site)
        await door.send("head", BEGIN, CHUNK, FIN)
        assert await verdicts(door, [BEGIN, FIN]) == [("accepted", "")]


OTHERS: dict[str, tuple[wire.UpdateManifest, bytes]] = {
    "payload": announce(make_update("watch", "head", 9.0, num_examples=4)),
    "weight": (replace(MANIFEST, num_examples=5), PAYLOAD),
    "version": (replace(MANIFEST, base_version=2), PAYLOAD),
    "round": (replace(MANIFEST, round_num=2, base_version=2), PAYLOAD),
}


@pytest.mark.parametrize("is_closed", [False, True])
@pytest.mark.parametrize("other", OTHERS)
async def test_another_update_under_its_id_is_rejected(
    site: Site, other: str, is_closed: bool
) -> None:
    with site.run() as run:
        door = await open_door(run, site)
        if is_closed:
            await finish_round(door, 1)
        else:
            await door.send("head", BEGIN, CHUNK, FIN)
        manifest, payload = OTHERS[other]
        assert manifest.update_id == UPDATE.update_id
        chunk = wire.Chunk(UPDATE.update_id, 0, payload)
        [(status, reason)] = await verdicts(door, [manifest, chunk, FIN])
        assert status == "rejected" and reason
        assert run.state.history.totals()["updates_accepted"] == 1
        assert await verdicts(door, [BEGIN, FIN]) == [("accepted", "")], "it still counts"


async def test_what_was_dropped_or_is_anothers_is_not_accepted(site: Site) -> None:
    with site.run(quorum=PerBlock(2)) as run:
        door = await open_door(run, site)
        await finish_round(door, 1)
        reason = "round 1 closed without a new version of block head"
        for question in QUESTIONS.values():
            assert set(await verdicts(door, question)) == {("rejected", reason)}
    with site.run() as run:
        door = await open_door(run, site)
        update = make_update("watch", "head", 1.0, round_num=2)
        await door.send("head", *messages_of(update))
        phone: list[wire.Message] = []
        down = topics.all_down(FED, "phone")
        await door.client.subscribe(down, lambda t, data: phone.append(wire.decode(data)))
        await door.publish(topics.block_up(FED, "head", "phone"), wire.Fin(update.update_id))
        assert phone == [wire.Receipt(update.update_id, "missing")]


async def test_an_update_amid_which_its_round_closed_is_rejected_at_once(site: Site) -> None:
    """And not asked for once more, whether or not it is announced again."""
    with site.run(ready=["phone"], min_devices=2) as run:
        door = await open_door(run, site)
        await door.send("head", BEGIN)
        assert len(door.gateway.transfers) == 1
        for device in ("watch", "phone"):
            run.federation.on_report(device, make_report(device))
        await door.request(make_report("watch"))
        assert run.federation.round_num == 2
        assert await verdicts(door, [FIN]) == [("rejected", "round 1 is closed, round 2 is open")]
        assert len(door.gateway.transfers) == 0


async def test_verdicts_of_several_updates_are_not_mixed_up(site: Site) -> None:
    with site.run() as run:
        door = await open_door(run, site)
        await finish_round(door, 1)
        never = make_update("watch", "head", 1.0, update_id=make_id("never"))
        manifest, _ = announce(never)
        door.received.clear()
        await door.send("head", BEGIN, manifest, FIN, wire.Fin(never.update_id))
        assert [(r.update_id, r.status) for r in door.receipts] == [
            (UPDATE.update_id, "accepted"), (never.update_id, "rejected")
        ]  # fmt: skip
