"""`Federation`: how a round opens, goes on and closes."""

from __future__ import annotations

import hashlib
import sqlite3

import numpy as np
import pytest

from petalfl import topics, wire
from petalfl.training import Hyperparameters
from petalfl.vectors import to_bytes
from server.segments import read_delta, segments
from tests.server.builders import (
    FED,
    INITIAL,
    NOW_S,
    SIZES,
    Door,
    Site,
    average,
    make_report,
    make_update,
    messages_of,
    settle,
)
from tests.server.federations import EVERYBODY, HELD, Clock, cohort, digest, result

# A round opens


async def test_a_round_opens_when_enough_devices_are_ready(site: Site) -> None:
    with site.run(min_devices=2) as run:
        run.ready("watch")
        assert run.federation.round is None and run.sender.sent == []
        run.ready("watch")  # again, but still one device
        assert run.federation.round is None
        run.ready("phone")
        assert cohort(run) == {d: HELD[d] for d in ("watch", "phone")}
        assert run.sender.tasks(1).keys() == {"watch", "phone"}
        assert run.federation.round_num == 1


async def test_a_task_names_the_devices_own_blocks_and_their_versions(site: Site) -> None:
    with site.run(ready=EVERYBODY, min_devices=3, num_rounds=9, seed=41) as run:
        for device, held in HELD.items():
            task = run.task(device, 1)
            assert task.blocks == {
                name: wire.BlockVersion(1, hashlib.sha256(to_bytes(INITIAL[name])).hexdigest())
                for name in held
            }
            assert (task.round_num, task.num_rounds, task.seed) == (1, 9, 41)
            assert task.hyperparameters == run.federation.config.hyperparameters


async def test_a_task_leaves_out_private_blocks(site: Site) -> None:
    with site.run(ready=EVERYBODY, min_devices=3, private_blocks=("fusion", "head")) as run:
        assert {device: set(run.task(device, 1).blocks) for device in EVERYBODY} == {
            "both": {"encoder-acc", "encoder-gyro"},
            "watch": {"encoder-acc"},
            "phone": {"encoder-gyro"},
        }
        assert run.federation.shared.versions.keys() == {"encoder-acc", "encoder-gyro"}
        assert {block for block, _ in run.sender.versions} == {"encoder-acc", "encoder-gyro"}
        assert await run.federation.shared.body("head", 1) is None
        private = run.federation.on_update(make_update("watch", "head", 1.0))
        assert private.status == "rejected" and "was not asked for" in private.reason


async def test_a_device_may_take_part_with_fewer_modalities(site: Site) -> None:
    with site.run() as run:
        run.federation.on_ready("both", wire.Ready(("gyro",), ("head",)))
        assert run.task("both", 1).blocks.keys() == HELD["phone"]


@pytest.mark.parametrize(
    ("device", "modalities"),
    [("watch", ("gyro",)), ("watch", ("acc", "gyro")), ("nobody", ("acc",)), ("both", ("sonar",))],
)
async def test_a_device_cannot_claim_what_it_has_not_enrolled(
    site: Site, device: str, modalities: tuple[str, ...]
) -> None:
    with site.run() as run:
        run.federation.on_ready(device, wire.Ready(modalities, ("head",)))
        assert run.federation.roster.ready == {} and run.sender.sent == []


async def test_a_device_that_left_is_not_waited_for(site: Site) -> None:
    with site.run(min_devices=2) as run:
        run.ready("watch")
        run.federation.on_offline("watch")
        run.federation.on_offline("nobody")
        run.ready("phone")
        assert run.federation.round is None
        run.ready("both")
        assert cohort(run).keys() == {"phone", "both"}


async def test_a_device_that_comes_later_waits_for_the_next_round(site: Site) -> None:
    with site.run(ready=["watch"]) as run:
        run.ready("phone")
        assert run.sender.tasks(1).keys() == {"watch"}
        await run.finish_round(1)
        assert run.sender.tasks(2).keys() == {"watch", "phone"}


async def test_a_device_that_is_back_gets_its_task_again_until_it_has_reported(site: Site) -> None:
    with site.run(ready=["watch", "phone"], min_devices=2) as run:
        run.ready("watch")
        assert [device for device, _ in run.sender.sent] == ["watch", "phone", "watch"]
        assert run.sender.sent[0] == run.sender.sent[2]
        run.federation.on_report("watch", make_report("watch"))
        run.ready("watch")
        assert len(run.sender.sent) == 3


async def test_the_learning_rate_follows_the_schedule(site: Site) -> None:
    with site.run(ready=["watch"], num_rounds=3, schedule="cosine") as run:
        for round_num in (1, 2):
            await run.finish_round(round_num)
        rates = [run.task("watch", n).hyperparameters.learning_rate for n in (1, 2, 3)]
        assert rates == pytest.approx([0.1, 0.0505, 0.001])


# Updates


async def test_an_update_is_in_the_journal_after_the_commit_that_its_receipt_waits_for(
    site: Site, other_db: sqlite3.Connection
) -> None:
    with site.run(ready=["watch"]) as run:
        update = make_update("watch", "head", np.arange(8), num_examples=5)
        receipt = run.federation.on_update(update)
        assert receipt == wire.Receipt(update.update_id, "accepted")
        await run.federation.commit()
        query = (
            "SELECT update_id, device, block, num_examples, delta, num_bytes, crc32 FROM updates"
        )
        [(*fields, position, num_bytes, crc32)] = other_db.execute(query).fetchall()
        assert fields == [update.update_id, "watch", "head", 5]
        folder = site.data_dir / "journal"
        stored = read_delta(folder, list(segments(folder)), position, num_bytes, crc32)
        assert stored == to_bytes(update.delta)


async def test_without_the_journal_there_is_no_receipt(
    site: Site, other_db: sqlite3.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full: the device hears nothing, asks again, and then it counts, once."""
    with site.run() as run:
        door = await Door(site.manifest, run.federation).open()
        run.federation.start(door.gateway)
        await door.request(wire.Ready(("acc",), ("head",)))
        fault = "BEFORE INSERT ON updates BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        other_db.execute(f"CREATE TRIGGER fault {fault}")
        messages = messages_of(make_update("watch", "head", 2.0))
        await door.send("head", *messages)
        assert door.receipts == []
        assert door.gateway.refused == {"not stored": 1}
        other_db.execute("DROP TRIGGER fault")
        await door.send("head", *messages)
        assert [one.status for one in door.receipts] == ["accepted"]
        assert result(run, "head").holders == ("watch",)


async def test_a_redelivered_update_counts_once(site: Site) -> None:
    with site.run(ready=["watch", "phone"], min_devices=2) as run:
        update = make_update("watch", "head", 3.0, num_examples=1)
        for _ in range(3):
            receipt = run.federation.on_update(update)
            assert receipt == wire.Receipt(update.update_id, "accepted")
        run.federation.on_update(make_update("phone", "head", 1.0, num_examples=1))
        await run.federation.commit()
        assert run.state.history.totals()["updates_accepted"] == 2
        delta = result(run, "head").delta
        assert delta is not None
        np.testing.assert_array_equal(delta, np.full(8, 2.0))


REJECTED = {
    "not held": (make_update("watch", "encoder-gyro", 1.0), "was not asked for the block"),
    "not in the cohort": (make_update("phone", "head", 1.0), "not in the cohort of round 1"),
    "another version": (make_update("watch", "head", 1.0, base_version=2), "base version 2"),
    "another round": (make_update("watch", "head", 1.0, round_num=2), "round 2 is closed"),
}


@pytest.mark.parametrize("case", REJECTED)
async def test_an_update_that_does_not_count_is_rejected_with_the_reason(
    site: Site, case: str
) -> None:
    update, reason = REJECTED[case]
    with site.run(ready=["watch"]) as run:
        receipt = run.federation.on_update(update)
        assert (receipt.status, receipt.update_id) == ("rejected", update.update_id)
        assert reason in receipt.reason
        assert run.state.history.totals()["updates_accepted"] == 0


async def test_without_an_open_round_everything_is_rejected(site: Site) -> None:
    with site.run() as run:
        update, report = make_update("watch", "head", 1.0), make_report("watch")
        expected = ("rejected", "no round is open")
        for receipt in (
            run.federation.on_update(update),
            run.federation.on_report("watch", report),
        ):
            assert (receipt.status, receipt.reason) == expected


async def test_reports_are_judged_too(site: Site) -> None:
    with site.run(ready=["watch"]) as run:
        late = run.federation.on_report("watch", make_report("watch", round_num=9))
        assert (late.status, late.reason) == ("rejected", "round 9 is closed, round 1 is open")
        foreign = run.federation.on_report("phone", make_report("phone"))
        assert foreign.status == "rejected" and "not in the cohort" in foreign.reason
        for _ in range(2):
            assert run.federation.on_report("watch", make_report("watch")).status == "accepted"


# A round closes


async def test_a_complete_round_closes_and_moves_the_blocks_that_have_updates(site: Site) -> None:
    with site.run(ready=["watch", "phone"], min_devices=2) as run:
        updates = {
            "head": [
                make_update("watch", "head", np.arange(8) / 3, num_examples=30),
                make_update("phone", "head", np.arange(8)[::-1] / 7, num_examples=10),
            ],
            "fusion": [
                make_update("watch", "fusion", 0.5, num_examples=30),
                make_update("phone", "fusion", -1.0, num_examples=10),
            ],
            "encoder-acc": [make_update("watch", "encoder-acc", 0.125, num_examples=30)],
            "encoder-gyro": [make_update("phone", "encoder-gyro", 7.0, num_examples=10)],
        }
        for sent in updates.values():
            for update in sent:
                run.federation.on_update(update)
        for device in ("phone", "watch"):
            await settle()
            assert run.federation.round_num == 1, "the round is not complete yet"
            run.federation.on_report(device, make_report(device))
        await settle()
        assert run.federation.round_num == 2  # the next one is open
        assert run.federation.shared.versions == dict.fromkeys(SIZES, 2)
        for block, sent in updates.items():
            expected = INITIAL[block] + average(sent)
            np.testing.assert_allclose(run.block(block), expected, rtol=1e-6)
        np.testing.assert_allclose(run.block("fusion"), INITIAL["fusion"] + 0.125)  # by hand
        assert run.task("watch", 2).blocks["head"] == wire.BlockVersion(2, digest(run, "head"))


async def test_a_block_that_nobody_sent_keeps_its_version(site: Site) -> None:
    with site.run(ready=["watch"]) as run:
        await run.finish_round(1)
        assert run.federation.shared.versions == {
            **dict.fromkeys(HELD["watch"], 2),
            "encoder-gyro": 1,
        }
        assert to_bytes(run.block("encoder-gyro")) == to_bytes(INITIAL["encoder-gyro"])
        moved = {block for block, version in run.sender.versions if version.version == 2}
        assert moved == HELD["watch"]


async def test_old_versions_stay(site: Site) -> None:
    with site.run(ready=["watch"]) as run:
        await run.finish_round(1, 2.0)
        bodies = [await run.federation.shared.body("head", version) for version in (0, 1, 2, 3)]
        expected = [None, to_bytes(INITIAL["head"]), to_bytes(INITIAL["head"] + 2), None]
        assert [body and body.data for body in bodies] == expected


async def test_the_deadline_closes_a_round_without_the_stragglers(
    site: Site, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with site.run(ready=["watch", "phone"], min_devices=2, deadline_s=600, num_rounds=1) as run:
        await run.finish_round(1, 4.0, "watch")
        await clock.advance(500)
        assert run.federation.round is not None, "the phone may still answer"
        await clock.advance(101)
        assert run.federation.finished.is_set()
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 4)
        assert run.federation.shared.versions["encoder-gyro"] == 1
        [closed] = run.state.history.rounds()
        assert closed["cohort_size"] == 2
        assert "deadline after 600 s without phone" in caplog.text
        late = run.federation.on_update(make_update("phone", "head", 9.0))
        assert (late.status, late.reason) == ("rejected", "no round is open")


async def test_a_late_update_of_a_closed_round_is_rejected_in_the_next(
    site: Site, clock: Clock
) -> None:
    with site.run(ready=["watch", "phone"], min_devices=2) as run:
        await run.finish_round(1, 1.0, "watch")
        await clock.advance(61)
        late = run.federation.on_update(make_update("phone", "head", 9.0))
        assert late.status == "rejected"
        assert late.reason == "round 1 is closed, round 2 is open"
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 1)


async def test_a_closed_rounds_deadline_does_not_close_the_next(site: Site, clock: Clock) -> None:
    with site.run(ready=["watch"]) as run:
        await clock.advance(50)
        await run.finish_round(1)
        await clock.advance(50)  # past the first deadline
        assert run.federation.round_num == 2
        await clock.advance(11)  # past the second
        assert run.federation.round_num == 3


async def test_after_the_last_round_everybody_gets_the_final_versions(site: Site) -> None:
    with site.run(ready=EVERYBODY, min_devices=3, num_rounds=2) as run:
        await run.finish_round(1)
        assert not run.federation.finished.is_set() and run.sender.finishes() == {}
        await run.finish_round(2)
        assert run.federation.finished.is_set()
        assert run.federation.round is None and run.federation.round_num == 2
        finishes = run.sender.finishes()
        assert finishes.keys() == set(EVERYBODY)
        for device, finish in finishes.items():
            assert finish.blocks.keys() == HELD[device]
            assert finish.blocks["head"] == wire.BlockVersion(3, digest(run, "head"))
    with site.run(num_rounds=2) as run:  # nothing is left to do
        assert run.federation.finished.is_set()
        run.ready("watch")
        assert run.sender.tasks(3) == {}
        assert run.sender.finishes()["watch"].blocks.keys() == HELD["watch"]
    with site.run(ready=["watch"], num_rounds=3) as run:  # one more was asked for
        assert run.sender.tasks(3).keys() == {"watch"}


async def test_the_last_word_asks_for_the_fine_tuning_of_now(site: Site) -> None:
    slow, slower = Hyperparameters(0.01, epochs=30), Hyperparameters(0.001, epochs=3)
    with site.run(ready=["watch"], num_rounds=1, fine_tuning=slow, seed=5) as run:
        assert run.task("watch", 1).hyperparameters == run.federation.config.hyperparameters
        await run.finish_round(1)
        finish = run.sender.finishes()["watch"]
        assert (finish.hyperparameters, finish.seed) == (slow, 5)
    with site.run(num_rounds=1, fine_tuning=slower) as run:  # restarted with other settings
        run.ready("watch")
        assert run.sender.finishes()["watch"].hyperparameters == slower
    with site.run(num_rounds=1) as run:
        run.ready("watch")
        finish = run.sender.finishes()["watch"]
        assert (finish.hyperparameters, finish.seed) == (None, None)


async def test_when_nothing_is_shared_reports_alone_close_rounds(site: Site) -> None:
    everything = tuple(SIZES)
    with site.run(ready=["watch"], private_blocks=everything, num_rounds=2) as run:
        assert run.task("watch", 1).blocks == {}
        await run.finish_round(1)
        await run.finish_round(2)
        assert run.federation.finished.is_set()
        assert run.sender.finishes() == {"watch": wire.Finish({})}
        assert run.sender.versions == []
        assert [one["blocks"] for one in run.state.history.rounds()] == [{}, {}]
        refused = run.federation.on_update(make_update("watch", "head", 1.0))
        assert refused.status == "rejected"


async def test_a_round_is_timed_and_has_its_loss(site: Site) -> None:
    clock = iter([NOW_S, NOW_S + 12, NOW_S + 12.5, NOW_S + 13])
    with site.run(ready=["watch"], now_s=lambda: next(clock)) as run:
        await run.finish_round(1)
        [closed] = run.state.history.rounds()
        assert (closed["duration_s"], closed["loss"]) == (12.5, 0.5)


# Traffic


async def test_traffic_is_counted_by_round_device_and_shared_block(site: Site) -> None:
    with site.run(ready=["watch"], private_blocks=("head",)) as run:
        for num_bytes in (100, 50):
            run.federation.on_bytes_up("watch", "fusion", num_bytes)
        run.federation.on_bytes_up("watch", "head", 9)  # private: none of ours
        run.federation.on_bytes_up("watch", "no-such-block", 9)
        run.federation.on_bytes_down("watch", "fusion", 7)
        await run.finish_round(1)
        run.federation.on_bytes_down("watch", "fusion", 1000)  # of round 2
        [closed] = run.state.history.rounds()
        blocks = closed["blocks"]
        assert isinstance(blocks, dict)
        assert (blocks["fusion"]["bytes_up"], blocks["fusion"]["bytes_down"]) == (150, 7)
    with site.state() as state:  # closing has written the rest
        assert state.history.device_traffic()["watch"] == {
            "fusion": {"bytes_up": 150, "bytes_down": 1007}
        }


# Through the gateway


async def test_a_round_over_the_broker(site: Site) -> None:
    with site.run(num_rounds=1) as run:
        door = await Door(site.manifest, run.federation).open()
        run.federation.start(door.gateway)
        await door.request(wire.Ready(("acc",), ("head",)))
        [task] = door.received
        assert isinstance(task, wire.Task) and task.blocks.keys() == HELD["watch"]
        for block in task.blocks:
            await door.send(block, *messages_of(make_update("watch", block, 0.5, num_examples=4)))
        assert [one.status for one in door.receipts] == ["accepted"] * 3
        await door.request(make_report("watch"))
        # The receipt that completes the round goes out before what follows from it.
        kinds = [type(message) for message in door.received]
        assert kinds == [wire.Task, *[wire.Receipt] * 4, wire.Finish]
        finish = door.received[-1]
        assert isinstance(finish, wire.Finish)
        assert finish.blocks["head"] == wire.BlockVersion(2, digest(run, "head"))
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 0.5)
        pointers: list[wire.Message] = []
        meta = topics.block_meta(FED, "head")
        await door.client.subscribe(meta, lambda t, data: pointers.append(wire.decode(data)))
        await settle()
        assert pointers == [finish.blocks["head"]]
        sent_up = run.state.history.device_traffic()["watch"]["head"]["bytes_up"]
        sent = messages_of(make_update("watch", "head", 0.5, num_examples=4))
        assert sent_up == sum(len(wire.encode(message)) for message in sent)
        assert door.transport.raised == []


async def test_a_round_closes_without_a_device_that_leaves_it_out(site: Site) -> None:
    with site.run(ready=["phone"], min_devices=2) as run:
        door = await Door(site.manifest, run.federation).open()
        run.federation.start(door.gateway)
        await door.request(wire.Ready(("acc",), ("head",)))
        await run.federation.commit()
        run.federation.on_update(make_update("phone", "head", 1.0))
        run.federation.on_report("phone", make_report("phone"))
        await settle()
        assert run.federation.round_num == 1, "the watch may still answer"
        await door.request(wire.Excuse(9))
        assert run.federation.round_num == 1, "no round of today"
        await door.request(wire.Excuse(1))
        assert run.federation.round_num == 2
        assert run.federation.shared.versions["head"] == 2
        assert door.receipts == [] and door.gateway.refused == {}
        await door.request(wire.Excuse(2))
        assert run.federation.round_num == 2


async def test_a_revoked_device_is_not_waited_for_and_what_it_has_sent_counts(
    site: Site,
) -> None:
    with site.run(ready=EVERYBODY, min_devices=3, num_rounds=1) as run:
        door = await Door(site.manifest, run.federation).open()
        run.federation.start(door.gateway)
        await door.send("head", *messages_of(make_update("watch", "head", 1.0)))
        begin, *_ = messages_of(make_update("watch", "fusion", 1.0))
        await door.send("fusion", begin)
        run.federation.on_report("watch", make_report("watch"))
        run.state.remove_device("watch")
        run.federation.remove("watch")
        door.gateway.forget("watch")
        assert len(door.gateway.transfers) == 0
        late = run.federation.on_update(make_update("watch", "fusion", 5.0))
        assert "not in the cohort" in late.reason
        run.federation.on_report("phone", make_report("phone"))
        await settle()
        assert run.federation.round is not None, "both is at work"
    with site.run(num_rounds=1) as run:  # nor after a restart
        assert cohort(run).keys() == {"phone", "both"}
        run.federation.on_report("both", make_report("both"))
        await settle()
        assert run.federation.finished.is_set()
        np.testing.assert_array_equal(run.block("head"), INITIAL["head"] + 1)
        run.ready("watch")
        assert "watch" not in run.sender.finishes()


async def test_who_enrolls_under_a_revoked_name_is_asked_from_the_next_round_on(
    site: Site,
) -> None:
    """Also after a restart in the round that its predecessor has a part in."""
    with site.run(ready=EVERYBODY, min_devices=3) as run:
        run.federation.on_update(make_update("watch", "head", 1.0))
        run.state.remove_device("watch")
        run.federation.remove("watch")
        await run.federation.commit()
        assert run.state.add_device("watch", "another password", ["acc"], NOW_S)
        run.ready("watch")
        assert [device for device, _ in run.sender.sent].count("watch") == 1
    with site.run(ready=EVERYBODY, min_devices=3) as run:
        assert cohort(run).keys() == run.sender.tasks(1).keys() == {"phone", "both"}
        refused = run.federation.on_update(make_update("watch", "fusion", 5.0))
        assert "not in the cohort" in refused.reason
        await run.finish_round(1)
        assert run.sender.tasks(2).keys() == set(EVERYBODY)
        await run.finish_round(2)
        assert run.federation.round_num == 3


async def test_a_device_that_says_goodbye_is_left_out(site: Site) -> None:
    with site.run(min_devices=2) as run:
        door = await Door(site.manifest, run.federation).open()
        run.federation.start(door.gateway)
        await door.request(wire.Ready(("acc",), ("head",)))
        assert run.federation.roster.ready.keys() == {"watch"}
        await door.publish(topics.status(FED, "watch"), wire.Status(is_online=False))
        assert run.federation.roster.ready == {}
