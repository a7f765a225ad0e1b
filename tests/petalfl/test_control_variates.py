"""Blocks as they travel with control variates; what these do to training is in test_training."""

from __future__ import annotations

import numpy as np
import pytest

from petalfl.codecs import parse_codec
from petalfl.control_variates import Corrections, with_sum, without_sum
from petalfl.model import Block
from petalfl.payloads import encode_payload, max_payload_bytes, parse_payload
from tests.petalfl.builders import make_block

BLOCKS = {
    "plain": make_block("encoder-a", ("a",), 2, 4),
    "with statistics": make_block("encoder-a", ("a",), 2, 4, statistics=3),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_a_block_grows_by_what_trains(case: str) -> None:
    block = BLOCKS[case]
    longer = with_sum(block)
    assert (longer.size, longer.num_trainable) == (block.size + 10, 10)
    assert sum(tensor.size for tensor in longer.tensors) == longer.size
    assert longer.tensors[:-1] == block.tensors
    assert without_sum(longer) == block == without_sum(block)


@pytest.mark.parametrize("codec", ["f32", "int8", "topk:0.1"])
def test_its_change_travels_as_float32_whatever_the_codec(codec: str) -> None:
    block: Block = with_sum(BLOCKS["with statistics"])
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(block.size, np.float32)
    payload, _ = encode_payload(parse_codec(codec), block, delta, None, rng)
    assert len(payload) <= max_payload_bytes(parse_codec(codec), block)
    found = parse_payload(parse_codec(codec), block, payload).decode()
    np.testing.assert_array_equal(found[10:], delta[10:])


def test_the_mean_is_of_what_was_given_not_of_what_was_corrected() -> None:
    corrections = Corrections({"a": np.array([1.0, -1.0], np.float32)})
    assert "a" in corrections and "b" not in corrections
    assert corrections.mean_gradients == {}
    for gradient in ([1.0, 2.0], [3.0, 2.0], [2.0, 5.0]):
        found = corrections.apply("a", np.array(gradient, np.float32))
        np.testing.assert_array_equal(found, np.add(gradient, [1.0, -1.0]))
    [mean] = corrections.mean_gradients.values()
    np.testing.assert_array_equal(mean, np.array([2.0, 3.0], np.float32))
