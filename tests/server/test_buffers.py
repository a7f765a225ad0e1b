from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from petalfl.codecs import parse_codec
from petalfl.payloads import parse_payload, plain_delta
from petalfl.vectors import to_bytes
from petalfl.wire import BlockUpdate
from server.aggregators import AGGREGATORS, parse_aggregator
from server.buffers import Buffer
from server.reducer import choose, use
from server.reducer.weighted_sum import WeightedSum
from tests.server.builders import BLOCKS, make_block, make_id, make_update, with_digest

TEXTS = {"trimmed-mean": "trimmed-mean:0.3", "krum": "krum:1", "multi-krum": "multi-krum:1"}
# Float64 sums of these depend on their order, and so does a tie between equals.
VALUES = {"a": 1e17, "b": -1e17, "c": 3.0, "d": 3.0, "e": 0.5}


def arrivals() -> list[BlockUpdate]:
    """One update of each device, and a second one of ``c`` in a later task."""
    made = [make_update(device, "head", np.arange(8) + v) for device, v in VALUES.items()]
    later = make_update("c", "head", np.arange(8) - 7.25, round_num=2)
    return [*made, later]


def bits(rule: str, order: tuple[BlockUpdate, ...], *, is_ordered: bool) -> bytes:
    buffer = Buffer(BLOCKS["head"], parse_aggregator(rule), is_ordered=is_ordered)
    for update in order:
        buffer.add(update, 1.0)
    result = buffer.result()
    assert result.delta is not None and set(result.update_ids) == {u.update_id for u in order}
    assert (len(buffer), buffer.num_holders) == (6, 5)
    return to_bytes(result.delta)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("backend", ["numpy", "numba", "torch"])
def test_in_order_the_bits_are_the_same_whatever_comes_first(backend: str, name: str) -> None:
    if backend != "numpy":
        pytest.importorskip(backend)
    rule = TEXTS.get(name, name)
    orders = list(permutations(arrivals()))[::37]
    with use(choose(backend)):
        assert len({bits(rule, order, is_ordered=True) for order in orders}) == 1


def test_without_it_they_are_not() -> None:
    """Else the test above would show nothing."""
    orders = list(permutations(arrivals()))[::37]
    assert len({bits("weighted-mean", order, is_ordered=False) for order in orders}) > 1


def test_updates_of_one_device_and_task_go_by_their_ids() -> None:
    first = make_update("a", "head", 1e17)
    order = [replace(first, update_id=make_id(k), encoded=one.encoded)
             for k, one in enumerate(arrivals())]  # fmt: skip
    found = set()
    for several in list(permutations(order))[::53]:
        buffer = Buffer(BLOCKS["head"], parse_aggregator("weighted-mean"), is_ordered=True)
        for update in several:
            buffer.add(update, 1.0)
        delta = buffer.result().delta
        assert delta is not None
        found.add(to_bytes(delta))
    assert len(found) == 1


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("rule", ["weighted-mean", "geometric-median", "multi-krum:0", "median"])
def test_a_device_that_sent_twice_beside_others(backend: str, rule: str) -> None:
    """Of a block with running statistics, as its codec leaves them: apart from the parameters."""
    if backend != "numpy":
        pytest.importorskip(backend)
    block = make_block("norm", "encoder", ("acc",), {"w": (5,)}, {"mean": (3,)})[0]
    payload = to_bytes(np.ones(8, np.float32))
    with use(choose(backend)):
        buffer = Buffer(block, parse_aggregator(rule))
        for number, device in enumerate(["a", "a", "b", "c"]):
            encoded = parse_payload(parse_codec("f32"), block, payload)
            buffer.add(with_digest(make_id(number), device, "norm", 1, 1, 1, encoded), 1.0)
        found = buffer.result().delta
    assert found is not None
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)


def test_deltas_cut_otherwise_are_refused() -> None:
    total = WeightedSum(8)
    total.add(plain_delta(np.ones(8, np.float32), 5), 1.0)
    with pytest.raises(ValueError, match=r"a delta of 8 \+ 0 values, expected 5 \+ 3"):
        total.add(plain_delta(np.ones(8, np.float32)), 1.0)
    with pytest.raises(ValueError, match=r"a delta of 5 \+ 2 values"):
        total.add(plain_delta(np.ones(7, np.float32), 5), 1.0)
