from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.vectors import Vector, to_bytes
from petalfl.wire import BlockUpdate
from server.aggregators import weighted_mean
from server.rounds import BlockResult, Round
from tests.server.builders import LAYOUT, average, make_block, make_id, make_report, make_update

ROUND = 4
SIZES = {"encoder-acc": 6, "encoder-gyro": 3, "head": 8}
BLOCKS = {name: make_block(name, *LAYOUT[name])[0] for name in SIZES}
BASE = {"encoder-acc": 2, "encoder-gyro": 4, "head": 3}
COHORT = {
    "both": frozenset({"encoder-acc", "encoder-gyro", "head"}),
    "watch": frozenset({"encoder-acc", "head"}),
    "phone": frozenset({"encoder-gyro", "head"}),
}
PAIRS = [(device, block) for device, blocks in COHORT.items() for block in sorted(blocks)]


def new_round() -> Round:
    return Round(ROUND, COHORT, BASE, BLOCKS, weighted_mean())


def update(device: str, block: str, delta: object = 1.0, num_examples: int = 1) -> BlockUpdate:
    return make_update(
        device,
        block,
        delta,  # type: ignore[arg-type]
        num_examples=num_examples,
        round_num=ROUND,
        base_version=BASE[block],
    )


def offer(target: Round, *updates: BlockUpdate) -> list[str]:
    """What the federation does with arrivals; the reasons, empty for what counted."""
    reasons = []
    for one in updates:
        reason = target.refuse(one)
        reasons.append(reason)
        if not reason:
            target.add(one)
    return reasons


def as_bytes(results: dict[str, BlockResult]) -> dict[str, object]:
    return {
        block: (None if r.delta is None else to_bytes(r.delta), r.holders, r.num_examples)
        for block, r in results.items()
    }


@st.composite
def true_updates(draw: st.DrawFn) -> list[BlockUpdate]:
    """Some of the cohort's updates, with values whose sums are exact in float64."""
    pairs = draw(st.lists(st.sampled_from(PAIRS), unique=True, max_size=len(PAIRS)))
    values = st.integers(-(1 << 16), 1 << 16)
    return [
        update(
            device,
            block,
            np.array(draw(st.lists(values, min_size=SIZES[block], max_size=SIZES[block]))) / 64,
            draw(st.integers(1, 1 << 12)),
        )
        for device, block in pairs
    ]


def strangers(of: BlockUpdate) -> list[BlockUpdate]:
    """Updates that must not count, whenever they come."""
    fresh = replace(of, update_id=make_id("stranger", of.device, of.block))
    return [
        replace(fresh, round_num=ROUND - 1),
        replace(fresh, round_num=ROUND + 1),
        replace(fresh, device="nobody"),
        replace(fresh, block="private-block"),
        replace(fresh, base_version=of.base_version - 1),
        replace(fresh, base_version=of.base_version + 1),
    ]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[BlockUpdate], list[BlockUpdate]]:
    """The true updates, and a disorder of them with duplicates and strangers."""
    true = draw(true_updates())
    foreign = [one for of in true for one in strangers(of)]
    extra = draw(st.lists(st.sampled_from(true + foreign), max_size=8)) if true else []
    order = draw(st.permutations(true + extra))
    for of in true:  # a second try with other values, at some place after the first one
        first = next(i for i, one in enumerate(order) if one is of)
        other = replace(of, update_id=make_id("second", of.device, of.block), delta=of.delta + 1)
        order.insert(draw(st.integers(first + 1, len(order))), other)
    return true, order


@given(arrivals())
def test_any_arrival_order_gives_the_same_result(
    drawn: tuple[list[BlockUpdate], list[BlockUpdate]],
) -> None:
    true, order = drawn
    plain, disturbed = new_round(), new_round()
    assert offer(plain, *true) == [""] * len(true)
    offer(disturbed, *order)
    assert as_bytes(disturbed.finalize()) == as_bytes(plain.finalize())


@given(true_updates())
def test_every_block_is_averaged_over_its_own_holders(true: list[BlockUpdate]) -> None:
    target = new_round()
    offer(target, *true)
    results = target.finalize()
    assert results.keys() == SIZES.keys()
    for block, result in results.items():
        mine = [one for one in true if one.block == block]
        assert result.holders == tuple(sorted(one.device for one in mine))
        assert result.num_examples == sum(one.num_examples for one in mine)
        if mine:
            assert result.delta is not None
            np.testing.assert_allclose(result.delta, average(mine), rtol=1e-6, atol=1e-9)
        else:
            assert result.delta is None


def test_weights_by_hand() -> None:
    target = new_round()
    offer(
        target,
        update("both", "head", 1.0, 30),
        update("watch", "head", 4.0, 10),
        update("both", "encoder-gyro", 2.0, 30),
    )
    results = target.finalize()
    # head: (30·1 + 10·4) / 40; the phone, which sent nothing, weighs nothing.
    assert results["head"].delta is not None and results["encoder-gyro"].delta is not None
    np.testing.assert_array_equal(results["head"].delta, np.full(8, 1.75, np.float32))
    np.testing.assert_array_equal(results["encoder-gyro"].delta, np.full(3, 2, np.float32))
    assert results["encoder-acc"] == BlockResult(None, (), 0)


REFUSALS = {
    "closed round": (
        replace(update("watch", "head"), round_num=3),
        "round 3 is closed, round 4 is open",
    ),
    "not in the cohort": (
        replace(update("watch", "head"), device="nobody"),
        "device nobody is not in the cohort of round 4",
    ),
    "block not held": (
        update("watch", "encoder-gyro"),
        "device watch does not hold the shared block encoder-gyro",
    ),
    "unknown block": (
        replace(update("watch", "head"), block="else"),
        "device watch does not hold the shared block else",
    ),
    "older base version": (
        replace(update("watch", "head"), base_version=2),
        "block head: base version 2, expected 3",
    ),
    "newer base version": (
        replace(update("watch", "head"), base_version=4),
        "block head: base version 4, expected 3",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why_and_changes_nothing(case: str) -> None:
    refused, reason = REFUSALS[case]
    target = new_round()
    before = as_bytes(target.finalize())
    assert target.refuse(refused) == reason
    assert not target.has(refused)
    assert as_bytes(target.finalize()) == before


def test_a_second_update_of_the_same_device_and_block_is_refused() -> None:
    target = new_round()
    first = update("watch", "head", 1.0)
    second = replace(first, update_id=make_id("second"), delta=first.delta * 5)
    reasons = offer(target, first, second)
    assert reasons == ["", "device watch has sent another update of block head"]
    assert not target.has(second)
    np.testing.assert_array_equal(delta_of(target, "head"), np.ones(8))


def test_a_redelivery_is_known_and_not_refused_and_counts_once() -> None:
    target = new_round()
    first = update("watch", "head", 3.0, 10)
    assert not target.has(first)
    assert offer(target, first, first, first) == ["", "", ""]
    assert target.has(first)
    offer(target, update("phone", "head", 0.0, 10))
    np.testing.assert_array_equal(delta_of(target, "head"), np.full(8, 1.5))


def delta_of(target: Round, block: str) -> Vector:
    delta = target.finalize()[block].delta
    assert delta is not None
    return delta


@given(st.permutations([*PAIRS, *((device, "report") for device in COHORT)]))
def test_a_round_is_complete_when_all_reports_and_all_blocks_are_in(
    order: list[tuple[str, str]],
) -> None:
    target = new_round()
    for device, what in order:
        assert not target.is_complete
        if what == "report":
            target.report(device, make_report(device, round_num=ROUND))
        else:
            target.add(update(device, what))
    assert target.is_complete


def test_a_device_without_shared_blocks_completes_by_its_report() -> None:
    target = Round(1, {"watch": frozenset()}, {}, {}, weighted_mean())
    assert not target.is_complete
    target.report("watch", make_report("watch"))
    assert target.is_complete
    assert target.finalize() == {}


def test_reports_of_other_rounds_and_devices_are_refused() -> None:
    target = new_round()
    assert target.refuse_report("watch", make_report("watch", round_num=ROUND)) == ""
    assert (
        target.refuse_report("watch", make_report("watch", round_num=3))
        == "round 3 is closed, round 4 is open"
    )
    assert (
        target.refuse_report("nobody", make_report("nobody", round_num=ROUND))
        == "device nobody is not in the cohort"
    )
    assert target.reports == {}


def test_the_loss_is_weighted_by_examples_and_the_first_report_stands() -> None:
    target = new_round()
    assert target.loss is None
    target.report("both", make_report("both", round_num=ROUND, num_examples=30, loss=1.0))
    target.report("watch", make_report("watch", round_num=ROUND, num_examples=10, loss=3.0))
    target.report("watch", make_report("watch", round_num=ROUND, num_examples=99, loss=9.0))
    assert target.loss == pytest.approx(1.5)  # (30·1 + 10·3) / 40


def test_a_round_keeps_its_own_cohort() -> None:
    cohort = dict(COHORT)
    target = Round(ROUND, cohort, BASE, BLOCKS, weighted_mean())
    cohort.pop("watch")
    assert target.refuse(update("watch", "head")) == ""
