from __future__ import annotations

from collections.abc import Callable

import pytest
from paho.mqtt.client import topic_matches_sub

from petalfl import topics

TOPICS = {
    "fl/v1/lab/blocks/encoder-acc/meta": topics.block_meta("lab", "encoder-acc"),
    "fl/v1/lab/blocks/head/up/watch-1": topics.block_up("lab", "head", "watch-1"),
    "fl/v1/lab/down/watch-1/task": topics.tasks("lab", "watch-1"),
    "fl/v1/lab/down/watch-1/ack": topics.acks("lab", "watch-1"),
    "fl/v1/lab/down/watch-1/+": topics.all_down("lab", "watch-1"),
    "fl/v1/lab/req/watch-1": topics.request("lab", "watch-1"),
    "fl/v1/lab/dev/watch-1/status": topics.status("lab", "watch-1"),
}
BAD_NAMES = ["", "+", "#", "a/b", "../a", "a+", "A", "a b", "-a", "a_b", "a\n", "a\0", "$sys", "é",
             "x" * 65, "\u0661"]  # fmt: skip


@pytest.mark.parametrize("expected", TOPICS)
def test_topics(expected: str) -> None:
    assert TOPICS[expected] == expected
    assert expected.count("/") <= 6


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize(
    ("build", "num_names"),
    [
        (topics.block_meta, 2), (topics.block_up, 3), (topics.tasks, 2), (topics.acks, 2),
        (topics.all_down, 2), (topics.request, 2), (topics.status, 2), (topics.from_devices, 1),
    ],
)  # fmt: skip
def test_no_name_climbs_or_holds_a_wildcard(
    build: Callable[..., object], num_names: int, name: str
) -> None:
    for place in range(num_names):
        names = ["a"] * num_names
        names[place] = name
        with pytest.raises(ValueError, match="is no name"):
            build(*names)


def test_a_long_name_does_not_fill_the_log() -> None:
    with pytest.raises(ValueError) as error:
        topics.request("lab", "X" * 1_000_000)
    assert len(str(error.value)) < 200


def test_the_filters_take_what_they_should_and_nothing_else() -> None:
    """Every topic goes one way: to the server, to one device, or, retained, to all."""
    to_server = {
        topics.block_up("lab", "head", "watch-1"), topics.request("lab", "watch-1"),
        topics.status("lab", "watch-1"),
    }  # fmt: skip
    to_device = {topics.tasks("lab", "watch-1"), topics.acks("lab", "watch-1")}
    others = {
        topics.block_meta("lab", "head"), topics.block_up("other", "head", "watch-1"),
        topics.tasks("lab", "watch-2"), topics.acks("other", "watch-1"),
    }  # fmt: skip
    for topic in to_server | to_device | others:
        taken = [f for f in topics.from_devices("lab") if topic_matches_sub(f, topic)]
        assert len(taken) == (1 if topic in to_server else 0)
        down = topic_matches_sub(topics.all_down("lab", "watch-1"), topic)
        assert down is (topic in to_device)
