from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.uploads import Upload, choose_uploads, priorities

BLOCKS = {
    "encoder-acc": Upload(100, 4.0, 0),
    "encoder-video": Upload(1000, 8.0, 1),
    "head": Upload(50, 1.0, 4),
}
uploads = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.builds(
        Upload,
        st.integers(0, 1 << 30),
        st.floats(0, 1e30, allow_subnormal=False),
        st.integers(0, 100),
    ),
    max_size=8,
)


def test_priorities_by_hand() -> None:
    assert priorities(BLOCKS) == pytest.approx(
        {"encoder-acc": 0.5 + 0.9 + 0, "encoder-video": 1 + 0 + 0.25, "head": 0.125 + 0.95 + 1}
    )
    found = priorities(BLOCKS, impact=2, size=0.5, recency=0)
    assert found == pytest.approx(
        {"encoder-acc": 1 + 0.45, "encoder-video": 2, "head": 0.25 + 0.475}
    )


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (2000, ("head", "encoder-acc", "encoder-video")),
        (1149, ("head", "encoder-acc")),
        (1050, ("head", "encoder-acc")),
        (99, ("head",)),
        (49, ()),
        (0, ()),
    ],
)
def test_what_a_budget_buys(budget: int, chosen: tuple[str, ...]) -> None:
    assert choose_uploads(BLOCKS, budget) == chosen


def test_a_block_that_does_not_fit_is_passed_over() -> None:
    found = choose_uploads(BLOCKS, 200, impact=1, size=0, recency=0)
    assert found == ("encoder-acc", "head")


def test_what_waits_is_sent_in_the_end() -> None:
    """The dearest block has the lowest priority, and room for one of them alone."""
    ages = dict.fromkeys(BLOCKS, 0)
    sent: list[str] = []
    for _ in range(12):
        now = {name: one._replace(age=ages[name], num_bytes=100) for name, one in BLOCKS.items()}
        chosen = choose_uploads(now, 100)
        sent += chosen
        ages = {name: 0 if name in chosen else age + 1 for name, age in ages.items()}
    assert set(sent) == BLOCKS.keys()


@given(uploads, st.integers(0, 1 << 32))
def test_no_choice_exceeds_the_budget_or_leaves_room(known: dict[str, Upload], budget: int) -> None:
    chosen = choose_uploads(known, budget)
    total = sum(known[block].num_bytes for block in chosen)
    assert total <= budget
    left = known.keys() - set(chosen)
    assert all(total + known[block].num_bytes > budget for block in left)
    scores = priorities(known)
    assert [scores[b] for b in chosen] == sorted((scores[b] for b in chosen), reverse=True)
    assert all(0 <= score <= 3 for score in scores.values())


def test_coefficients_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected coefficients >= 0, found 1\.0, -1, 1\.0"):
        choose_uploads(BLOCKS, 1, size=-1)
