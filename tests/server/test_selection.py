from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.selection import SELECTIONS, Candidate, parse_selection

HEAD = "head"
Known = dict[str, Candidate]


def holder(*blocks: str, **known: float) -> Candidate:
    return replace(Candidate(frozenset(blocks)), **known)  # type: ignore[arg-type]


def reported(loss: float = 1.0, duration_s: float = 10.0, **known: float) -> Candidate:
    return replace(
        Candidate(frozenset({HEAD}), 1, 1, 9, loss, 100, duration_s),
        **known,  # type: ignore[arg-type]
    )


def select(rule: str, candidates: Known, size: int, seed: int = 0, round_num: int = 10) -> set[str]:
    rng = np.random.default_rng(seed)
    return set(parse_selection(rule)(candidates, size, round_num, rng))


BLOCKS = ("encoder-acc", "encoder-gyro", "encoder-ecg", HEAD)
candidates = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.builds(
        Candidate,
        blocks=st.frozensets(st.sampled_from(BLOCKS)),
        num_selected=st.integers(0, 9),
        num_reported=st.integers(0, 9),
        last_round=st.integers(0, 9),
        loss=st.none() | st.floats(0, 1e30),
        num_examples=st.integers(1, 1 << 40),
        duration_s=st.none() | st.floats(0, 1e6),
    ),
    max_size=12,
)


@pytest.mark.parametrize("rule", SELECTIONS)
@given(known=candidates, size=st.integers(0, 15), seed=st.integers(0, 99))
def test_a_cohort_is_of_the_candidates_and_as_large_as_asked(
    rule: str, known: Known, size: int, seed: int
) -> None:
    found = select(rule, known, size, seed)
    assert found <= known.keys()
    assert len(found) == (len(known) if rule == "all" else min(size, len(known)))
    turned = dict(reversed(known.items()))
    assert select(rule, turned, size, seed) == found  # names and rng alone decide


def test_random_draws_everyone_alike() -> None:
    known = {name: holder(HEAD) for name in "abcdefgh"}
    counts = Counter(d for seed in range(2000) for d in select("random", known, 2, seed))
    # 500 each; 4 standard deviations of a binomial(2000, 1/4) are 77.
    assert counts.keys() == known.keys()
    assert all(abs(count - 500) < 78 for count in counts.values())


@given(candidates, st.integers(0, 99))
def test_by_coverage_every_block_gets_a_holder(known: Known, seed: int) -> None:
    held = {block for one in known.values() for block in one.blocks}
    chosen = select("coverage", known, len(BLOCKS), seed)
    assert {block for device in chosen for block in known[device].blocks} == held


def test_a_rare_modality_is_never_starved_and_at_random_it_is() -> None:
    known = {f"watch-{i}": holder("encoder-acc", HEAD) for i in range(99)}
    known["strap"] = holder("encoder-ecg", HEAD)
    for seed in range(20):
        assert "strap" in select("coverage", known, 5, seed)
    assert sum("strap" in select("random", known, 5, seed) for seed in range(20)) < 10


def test_coverage_takes_who_waited_longest() -> None:
    known = {name: holder(HEAD, last_round=i) for i, name in enumerate("abcd", start=1)}
    assert select("coverage", known, 2) == {"a", "b"}


def test_coverage_keeps_the_blocks_alike() -> None:
    known = {f"a{i}": holder("encoder-acc", HEAD) for i in range(20)}
    known |= {f"g{i}": holder("encoder-gyro", HEAD) for i in range(4)}
    chosen = select("coverage", known, 6)
    assert Counter(device[0] for device in chosen) == {"a": 3, "g": 3}


def test_utility_by_hand() -> None:
    """100 examples · loss · √(10 − 9) · 2/2 · speed."""
    known = {
        "dull": reported(0.1),  # 10
        "keen": reported(2.0),  # 200
        "slow": reported(2.0, duration_s=120),  # 200 · (60 / 120)²: 50
        "lost": reported(2.0, num_selected=9, num_reported=1),  # 200 · 2 / 10: 40
        "long": reported(0.5, last_round=1),  # 50 · √9: 150
        "next": reported(1.0),  # 100
    }
    order = ["keen", "long", "next", "slow", "lost", "dull"]
    for size in range(7):
        assert select("utility:60:0", known, size) == set(order[:size])


def test_who_boasts_gains_no_more_than_the_quantile() -> None:
    known = {f"honest-{i}": reported(1.0) for i in range(30)}
    known["liar"] = reported(1e30, last_round=9)
    known["honest-0"] = reported(1.0, last_round=5)  # it has waited
    assert select("utility:60:0", known, 1) == {"honest-0"}


def test_a_share_of_the_cohort_is_new_and_the_least_tried_go_first() -> None:
    known = {f"old-{i}": reported(float(i + 1)) for i in range(10)}
    known |= {f"new-{i}": holder(HEAD, num_selected=i) for i in range(10)}
    chosen = select("utility:60:0.3", known, 10)
    assert chosen == {f"old-{i}" for i in range(3, 10)} | {"new-0", "new-1", "new-2"}


def test_either_kind_fills_what_the_other_leaves_open() -> None:
    old = {f"old-{i}": reported() for i in range(3)}
    new = {f"new-{i}": holder(HEAD) for i in range(3)}
    assert select("utility", new, 2) < new.keys()
    assert select("utility", old, 3) == old.keys()
    assert select("utility:60:0", old | new, 5) > old.keys()
    assert select("utility:60:1", old | new, 4) > new.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "selection 'best' is not known; choose of all, random, coverage, utility"),
        ("utility:0", "expected deadline_s > 0 and exploration in [0, 1], found 0.0, 0.2"),
        ("utility:9:2", "expected deadline_s > 0 and exploration in [0, 1], found 9.0, 2.0"),
        ("random:3", "found 1 parameters, expected 0 at most"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_selection(text)
    assert message in str(raised.value)
