"""SCAFFOLD on the server: blocks that travel with the sum of the devices' control variates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl import wire
from petalfl.codecs import parse_codec
from petalfl.control_variates import with_sum
from petalfl.model import Block
from petalfl.payloads import EncodedDelta, parse_payload, plain_delta
from petalfl.vectors import Vector, from_bytes, to_bytes
from server.aggregators import weighted_mean
from server.config import ConfigError
from server.control_variates import summed
from server.federation import Federation
from tests.server.builders import (
    BLOCKS,
    INITIAL,
    SIZES,
    Door,
    Run,
    Site,
    make_block,
    make_config,
    make_id,
    make_report,
    messages_of,
    settle,
    with_digest,
)

STATISTICS: dict[str, tuple[int, ...]] = {"bn.running_mean": (3,)}


def draw(device: str, size: int, round_num: int = 1) -> Vector:
    seed = [len(device), size, round_num]
    return np.random.default_rng(seed).standard_normal(size, np.float32)


def update_of(device: str, block: str, num_examples: int, round_num: int = 1) -> wire.BlockUpdate:
    """Both changes drawn: of the block and of its control variate."""
    delta = encoded(with_sum(BLOCKS[block]), draw(device, 2 * SIZES[block], round_num))
    return with_digest(
        make_id(device, block, round_num), device, block, round_num, round_num, num_examples, delta
    )


def encoded(block: Block, delta: Vector) -> EncodedDelta:
    """As it comes over the wire."""
    return parse_payload(parse_codec("f32"), block, to_bytes(delta))


def body_of(run: Run, block: str) -> tuple[Vector, Vector]:
    """The newest version and its sum, as they are served."""
    vector = from_bytes(run.federation.shared.newest(block).data, 2 * SIZES[block])
    return vector[: SIZES[block]], vector[SIZES[block] :]


# The rule


@given(st.lists(st.tuples(st.integers(0, 99), st.floats(0.1, 100)), min_size=1, max_size=6))
def test_the_block_is_averaged_and_the_changes_are_added_up(drawn: list[tuple[int, float]]) -> None:
    block: Block = with_sum(make_block("head", "head", ("fusion",), {"w": (4,)}, STATISTICS)[0])
    rule: Any = summed(weighted_mean())
    state = rule.init(block)
    deltas = [np.random.default_rng(seed).standard_normal(11, np.float32) for seed, _ in drawn]
    for delta, (_, weight) in zip(deltas, drawn, strict=True):
        state = rule.accumulate(state, encoded(block, delta), weight)
    found = rule.finalize(state)
    own = np.average([d[:7] for d in deltas], axis=0, weights=[w for _, w in drawn])
    np.testing.assert_allclose(found[:7], own, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[7:], np.sum([d[7:] for d in deltas], axis=0), atol=1e-5)


def test_nothing_of_nothing() -> None:
    rule: Any = summed(weighted_mean())
    block = with_sum(make_block("head", "head", ("fusion",), {"w": (4,)})[0])
    assert rule.finalize(rule.init(block)) is None


# A federation


async def test_a_version_starts_with_a_sum_of_zeros(tmp_path: Path) -> None:
    with Site(tmp_path).run(ready=["watch"], has_scaffold=True) as run:
        own, total = body_of(run, "head")
        np.testing.assert_array_equal(own, INITIAL["head"])
        np.testing.assert_array_equal(total, np.zeros(8))


async def test_a_task_says_how_many_hold_its_blocks(tmp_path: Path) -> None:
    """Of the three that are enrolled, two have an accelerometer, whoever is ready."""
    with Site(tmp_path).run(ready=["watch"], has_scaffold=True, num_rounds=1) as run:
        assert run.task("watch", 1).num_holders == {"encoder-acc": 2, "fusion": 3, "head": 3}
        run.federation.on_report("watch", make_report("watch"))
        await settle()
        run.ready("phone")
        assert run.sender.finishes()["phone"].num_holders == {
            "encoder-gyro": 2, "fusion": 3, "head": 3
        }  # fmt: skip
    with Site(tmp_path / "other").run(ready=["watch"]) as run:
        assert run.task("watch", 1).num_holders is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam:0.1", "momentum:0.9"])
async def test_sums_add_up_over_rounds_and_restarts(tmp_path: Path, optimizer: str) -> None:
    """Weights, the server's optimizer and who takes part make no difference to them."""
    site = Site(tmp_path)
    expected = np.zeros(8)
    cohort = ["watch", "phone"]
    changes: Any = {"ready": cohort, "min_devices": 2, "server_optimizer": optimizer}
    for round_num, holders in enumerate((cohort, ["watch"], ["phone"], cohort), 1):
        with site.run(has_scaffold=True, **changes) as run:
            early = update_of(holders[0], "head", 1 + len(holders[0]), round_num)
            assert run.federation.on_update(early).status == "accepted"
            await run.federation.commit()
        with site.run(has_scaffold=True, **changes) as run:
            for device in holders:
                update = update_of(device, "head", 1 + len(device), round_num)
                assert run.federation.on_update(update).status == "accepted"
                expected += update.delta[8:]
            for device in cohort:
                run.federation.on_report(device, make_report(device, round_num=round_num))
            await settle()
            assert run.federation.shared.versions["head"] == round_num + 1
            own, total = body_of(run, "head")
            np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-6)
            assert not np.allclose(own, INITIAL["head"])


async def test_a_round_over_the_broker(tmp_path: Path) -> None:
    """The gateway takes blocks with their control variates, and none without."""
    with Site(tmp_path).run(has_scaffold=True, num_rounds=1) as run:
        door = await Door(run.federation.served, run.federation).open()
        run.federation.start(door.gateway)
        await door.request(wire.Ready(("acc",), ("head",)))
        [task] = door.received
        assert isinstance(task, wire.Task)
        update = update_of("watch", "head", 4)
        await door.send(
            "head", *messages_of(replace(update, encoded=plain_delta(update.delta[:8])))
        )
        assert door.gateway.refused["malformed"] >= 1
        other = replace(update, update_id=make_id("again"))
        await door.send("head", *messages_of(other))
        assert [one.status for one in door.receipts if one.update_id == other.update_id] == [
            "accepted"
        ]
        await door.request(make_report("watch"))
        np.testing.assert_array_equal(body_of(run, "head")[1], update.delta[8:])


async def test_a_data_folder_without_control_variates_gets_none(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.run():
        pass
    config = make_config(site.artifacts, site.data_dir, has_scaffold=True)
    with site.state() as state, pytest.raises(ConfigError, match="now 'sync with control variates"):
        Federation(config, site.manifest, state)
