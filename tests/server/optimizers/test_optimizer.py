from __future__ import annotations

import numpy as np
import pytest

from server.optimizers import OPTIMIZERS, momentum, parse_optimizer, sgd, step
from tests.server.builders import make_block
from tests.server.optimizers.builders import f32, run, vector_block

BLOCK = make_block("encoder", "encoder", ("acc",), {"w": (2,)}, {"var": (2,)})[0]


def test_running_statistics_are_added_to_and_parameters_moved() -> None:
    parameters, state = f32([0, 0, 1, 1]), momentum(0.5).init(BLOCK)
    for expected in ([4, 4, 1.5, 1.5], [10, 10, 2, 2]):
        delta = f32([4, 4, 0.5, 0.5])
        parameters, state = step(momentum(0.5), BLOCK, parameters, delta, state)
        np.testing.assert_array_equal(parameters, expected)
    assert state["velocity"].shape == (2,)


def test_the_state_of_another_optimizer_is_begun_anew() -> None:
    foreign = {"other": f32([9, 9, 9])}
    found, state = step(momentum(0.5), vector_block(3), f32([0, 0, 0]), f32([1, 2, 3]), foreign)
    np.testing.assert_array_equal(found, [1, 2, 3])
    assert state.keys() == {"velocity"}
    _, state = step(sgd(), vector_block(3), f32([0, 0, 0]), f32([1, 2, 3]), state)
    assert state == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_by_name_takes_float32_steps(name: str) -> None:
    [found] = run(parse_optimizer(name), f32([1, -2]), f32([0.5, 0.25]))
    assert found.dtype == np.float32 and (found > [1, -2]).all()


def test_parameters_come_after_the_name() -> None:
    trail = run(parse_optimizer("momentum:0.5:0.25"), f32([0]), f32([4]), f32([4]))
    np.testing.assert_array_equal(trail, [[1], [2.5]])


def test_an_unknown_optimizer_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"server optimizer 'lion:1' is not known; choose of sgd"):
        parse_optimizer("lion:1")
