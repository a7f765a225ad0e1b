from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalfl.payloads import plain_delta
from petalfl.vectors import Vector, to_bytes
from petalfl.wire import BlockUpdate
from server.aggregators import weighted_mean
from server.buffers import BlockResult
from server.rounds import Assignment, Refusal, Round, mean_loss
from server.weighting import capped
from tests.server.builders import (
    LAYOUT,
    average,
    make_block,
    make_id,
    make_report,
    make_update,
)

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


def new_round(max_staleness: int = 0, **more: object) -> Round:
    made = Round(ROUND, BASE, BLOCKS, weighted_mean(), max_staleness=max_staleness, **more)  # type: ignore[arg-type]
    for device, blocks in COHORT.items():
        made.assign(device, Assignment(ROUND, blocks), deadline_s=10.0)
    return made


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
    """What the federation does with arrivals; the kinds of refusal, empty for what counted."""
    kinds: list[str] = []
    for one in updates:
        refusal = target.refuse(one.device, one)
        kinds.append(refusal.kind if refusal else "")
        if refusal is None:
            target.add(one)
    return kinds


def results(target: Round) -> dict[str, BlockResult]:
    return target.results(list(SIZES))


def as_bytes(target: Round) -> dict[str, object]:
    return {
        block: (None if r.delta is None else to_bytes(r.delta), r.holders, r.num_examples)
        for block, r in results(target).items()
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
        other_id = make_id("second", of.device, of.block)
        other = replace(of, update_id=other_id, encoded=plain_delta(of.delta + 1))
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
    assert as_bytes(disturbed) == as_bytes(plain)


@given(true_updates())
def test_every_block_is_averaged_over_its_own_holders(true: list[BlockUpdate]) -> None:
    target = new_round()
    offer(target, *true)
    for block, result in results(target).items():
        mine = [one for one in true if one.block == block]
        assert result.holders == tuple(sorted(one.device for one in mine))
        assert set(result.update_ids) == {one.update_id for one in mine}
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
    # head: (30·1 + 10·4) / 40; the phone, which sent nothing, weighs nothing.
    np.testing.assert_array_equal(delta_of(target, "head"), np.full(8, 1.75, np.float32))
    np.testing.assert_array_equal(delta_of(target, "encoder-gyro"), np.full(3, 2, np.float32))
    assert results(target)["encoder-acc"] == BlockResult(None, (), 0, ())


def test_another_weighting_and_a_norm_bound_by_hand() -> None:
    target = new_round(weigh=capped(20), max_norm=2.0)
    offer(target, update("both", "encoder-gyro", [3, 0, 0], 30))
    offer(target, update("phone", "encoder-gyro", [0, 1, 0], 10))
    # (20 · [2 0 0] + 10 · [0 1 0]) / 30
    expected = np.array([4 / 3, 1 / 3, 0], np.float32)
    np.testing.assert_allclose(delta_of(target, "encoder-gyro"), expected, rtol=1e-6)


REFUSALS = {
    "closed round": (
        replace(update("watch", "head"), round_num=3),
        Refusal("late", "round 3 is closed, round 4 is open"),
    ),
    "not in the cohort": (
        replace(update("watch", "head"), device="nobody"),
        Refusal("foreign", "device nobody is not in the cohort of round 4"),
    ),
    "late, and not in this cohort": (
        replace(update("watch", "head"), device="nobody", round_num=3),
        Refusal("late", "round 3 is closed, round 4 is open"),
    ),
    "block not held": (
        update("watch", "encoder-gyro"),
        Refusal("foreign", "device watch was not asked for the block encoder-gyro"),
    ),
    "unknown block": (
        replace(update("watch", "head"), block="else"),
        Refusal("foreign", "device watch was not asked for the block else"),
    ),
    "older base version": (
        replace(update("watch", "head"), base_version=2),
        Refusal("stale", "block head: base version 2, expected 3"),
    ),
    "newer base version": (
        replace(update("watch", "head"), base_version=4),
        Refusal("stale", "block head: base version 4, expected 3"),
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why_and_changes_nothing(case: str) -> None:
    refused, refusal = REFUSALS[case]
    target = new_round()
    before = as_bytes(target)
    assert target.refuse(refused.device, refused) == refusal
    assert not target.has(refused.device, refused)
    assert as_bytes(target) == before


def test_a_second_update_of_the_same_device_and_block_is_refused() -> None:
    target = new_round()
    first = update("watch", "head", 1.0)
    second = replace(first, update_id=make_id("second"), encoded=plain_delta(first.delta * 5))
    assert offer(target, first, second) == ["", "duplicate"]
    assert not target.has("watch", second)
    np.testing.assert_array_equal(delta_of(target, "head"), np.ones(8))


def test_a_redelivery_is_known_and_not_refused_and_counts_once() -> None:
    target = new_round()
    first = update("watch", "head", 3.0, 10)
    assert not target.has("watch", first)
    assert offer(target, first, first, first) == ["", "", ""]
    assert target.has("watch", first)
    offer(target, update("phone", "head", 0.0, 10))
    np.testing.assert_array_equal(delta_of(target, "head"), np.full(8, 1.5))


def delta_of(target: Round, block: str) -> Vector:
    delta = results(target)[block].delta
    assert delta is not None
    return delta


@given(st.permutations(list(COHORT)), st.integers(1, 3))
def test_a_round_is_complete_when_enough_devices_have_reported(
    order: list[str], num_enough: int
) -> None:
    target = new_round()
    for number, device in enumerate(order):
        assert target.is_complete(num_enough) == (number >= num_enough)
        assert target.is_open(device)
        target.report(device, make_report(device, round_num=ROUND))
        assert not target.is_open(device)
    assert target.is_complete(num_enough)


def test_nobody_waits_for_a_device_that_has_missed_its_deadline() -> None:
    target = new_round()
    target.report("watch", make_report("watch", round_num=ROUND))
    assert target.deadline_s == 10.0
    assert target.expire(9.9) == [] and not target.is_complete(3)
    assert target.expire(10.0) == ["both", "phone"]
    assert target.is_complete(3) and target.deadline_s is None
    assert offer(target, update("phone", "head")) == [""], "it still counts while the round is open"


def test_a_device_that_is_given_up_is_not_waited_for() -> None:
    target = new_round()
    for device in COHORT:
        assert not target.is_complete(3)
        target.give_up(device)
    assert target.is_complete(3)


def test_an_excused_device_is_not_waited_for_once_another_has_reported() -> None:
    target = new_round()
    assert target.excuse("both", ROUND) and target.excuse("watch", ROUND)
    assert not target.is_complete(2), "there is no report yet, and the phone is at work"
    target.report("phone", make_report("phone", round_num=ROUND))
    assert target.is_complete(2)
    assert target.refuse("both", update("both", "head")) is None, "what it sends counts as before"
    target.expect("both")
    assert not target.is_complete(2), "it has its task again"
    assert target.excuse("both", ROUND)
    assert target.is_complete(2)
    assert not target.excuse("both", ROUND), "it has said so"


def test_a_round_that_all_leave_out_waits_for_its_deadline() -> None:
    """The next would be left out at once, too, and the one after it."""
    target = new_round()
    for device in COHORT:
        assert target.excuse(device, ROUND)
    assert not target.is_complete(3)
    assert sorted(target.expire(11.0)) == sorted(COHORT)
    assert target.is_complete(3)


def test_only_a_device_at_work_can_leave_its_task_out() -> None:
    target = new_round()
    target.report("phone", make_report("phone", round_num=ROUND))
    assert not target.excuse("watch", ROUND + 1)
    assert not target.excuse("phone", ROUND)
    assert not target.excuse("nobody", ROUND)
    target.excuse("watch", ROUND)
    target.assign("watch", Assignment(ROUND + 1, COHORT["watch"]), deadline_s=10.0)
    target.report("both", make_report("both", round_num=ROUND))
    assert not target.is_complete(3), "its next task is another"


def test_the_earliest_deadline_comes_first_whatever_was_assigned_again() -> None:
    target = new_round()
    target.assign("both", Assignment(ROUND + 1, COHORT["both"]), deadline_s=20.0)
    assert target.deadline_s == 10.0
    assert target.expire(15.0) == ["watch", "phone"]
    assert target.deadline_s == 20.0


def test_reports_of_other_rounds_and_devices_are_refused() -> None:
    target = new_round()
    assert target.refuse_report("watch", make_report("watch", round_num=ROUND)) is None
    late = target.refuse_report("watch", make_report("watch", round_num=3))
    assert late == Refusal("late", "round 3 is closed, round 4 is open")
    foreign = target.refuse_report("nobody", make_report("nobody", round_num=ROUND))
    assert foreign == Refusal("foreign", "device nobody is not in the cohort of round 4")
    assert target.reports == {}


def test_the_loss_is_weighted_by_examples_and_the_first_report_stands() -> None:
    assert mean_loss([]) is None
    target = new_round()
    target.report("both", make_report("both", round_num=ROUND, num_examples=30, loss=1.0))
    target.report("watch", make_report("watch", round_num=ROUND, num_examples=10, loss=3.0))
    target.report("watch", make_report("watch", round_num=ROUND, num_examples=99, loss=9.0))
    # (30·1 + 10·3) / 40
    assert mean_loss(list(target.reports.values())) == pytest.approx(1.5)
    target.report("phone", make_report("phone", round_num=ROUND, num_examples=99, loss=1e308))
    assert mean_loss(list(target.reports.values())) is None, "JSON has no infinity"


# Asynchronously: blocks step one by one, devices are asked again


def based_on(device: str, base_version: int, delta: object, round_num: int = ROUND) -> BlockUpdate:
    made = update(device, "head", delta, 10)
    return replace(made, base_version=base_version, round_num=round_num)


def test_a_stale_update_weighs_less_by_hand() -> None:
    target = new_round(max_staleness=3)
    assert offer(target, based_on("both", 3, 4.0), based_on("watch", 3 - 3, 1.0)) == ["", ""]
    # staleness 0 and 3: weights 10 and 10 / √4; (10·4 + 5·1) / 15
    np.testing.assert_allclose(delta_of(target, "head"), np.full(8, 3.0), rtol=1e-6)
    assert results(target)["head"].num_examples == 20


def test_an_update_that_is_too_stale_or_from_the_future_is_refused() -> None:
    target = new_round(max_staleness=1)
    assert target.refuse("both", based_on("both", 1, 1.0)) == Refusal(
        "stale",
        "block head: base version 1 is too stale, the newest is 3 and at most 1 behind it count",
    )
    future = target.refuse("both", based_on("both", 4, 1.0))
    assert future == Refusal("stale", "block head: base version 4, expected 3")
    assert offer(target, based_on("both", 2, 1.0)) == [""]


def test_a_step_empties_one_buffer_and_ages_what_is_under_way() -> None:
    target = new_round(max_staleness=1)
    offer(target, based_on("both", 3, 2.0), update("both", "encoder-gyro", 1.0))
    one, two = (lambda block: 1), (lambda block: 2)
    assert target.full(one, one) == ["encoder-gyro", "head"]
    assert target.full(two, one) == target.full(one, two) == []
    target.step("head", 4, weighted_mean())
    assert target.full(one, one) == ["encoder-gyro"]
    assert target.has("both", based_on("both", 3, 2.0)), "a redelivery is still known"
    assert offer(target, based_on("both", 3, 2.0)) == [""]
    assert results(target)["head"].delta is None, "and counts no second time"
    offer(target, based_on("watch", 3, 4.0), based_on("phone", 4, 1.0))
    weights = 10 / np.sqrt(2), 10
    expected = (weights[0] * 4 + weights[1] * 1) / sum(weights)
    np.testing.assert_allclose(delta_of(target, "head"), np.full(8, expected), rtol=1e-6)
    target.step("head", 5, weighted_mean())
    target.assign("both", Assignment(ROUND + 1, COHORT["both"]))
    assert offer(target, based_on("both", 3, 1.0, ROUND + 1)) == ["stale"]


def test_a_device_that_is_asked_again_may_send_again() -> None:
    target = new_round(max_staleness=9)
    first, second = based_on("both", 3, 1.0), based_on("both", 3, 3.0, ROUND + 1)
    second = replace(second, update_id=make_id("second"))
    assert offer(target, first, second) == ["", "late"]
    target.report("both", make_report("both", round_num=ROUND))
    target.assign("both", Assignment(ROUND + 1, COHORT["both"]))
    assert target.is_open("both") and "both" not in target.reports
    assert offer(target, first, second, second) == ["late", "", ""]
    assert results(target)["head"].holders == ("both",)
    np.testing.assert_array_equal(delta_of(target, "head"), np.full(8, 2.0))


@given(st.permutations(range(6)), st.lists(st.integers(0, 5), max_size=6))
def test_asynchronous_arrivals_in_any_order_with_duplicates_give_the_same_result(
    order: list[int], again: list[int]
) -> None:
    sent = [
        replace(based_on(device, 3 - age, age + 1.0, ROUND), update_id=make_id(device, age))
        for device, age in zip(COHORT, (0, 1, 3), strict=True)
    ] + [update(device, "encoder-gyro", 2.0) for device in ("both", "phone")]
    plain, disturbed = new_round(max_staleness=3), new_round(max_staleness=3)
    offer(plain, *sent)
    offer(disturbed, *(sent[i % 5] for i in [*order, *again]))
    for block in ("head", "encoder-gyro"):
        np.testing.assert_allclose(delta_of(disturbed, block), delta_of(plain, block), rtol=1e-6)
        left, right = results(disturbed)[block], results(plain)[block]
        assert sorted(left.update_ids) == sorted(right.update_ids)
