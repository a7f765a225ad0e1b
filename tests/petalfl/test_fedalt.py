"""FedAlt on closed-form blocks: private and shared ones in turn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from petalfl.engine import Arrays, Gradients
from petalfl.model import Block
from petalfl.vectors import Vector
from tests.petalfl.builders import (
    NumpyEngine,
    draw_vectors,
    make_block,
    make_manifest,
)
from tests.petalfl.trainings import (
    PLAIN,
    RICH,
    assert_same,
    run,
    stopping_after,
)

ALTERNATING = replace(
    PLAIN, learning_rate=0.01, momentum=0.5, weight_decay=0.25, method="fedalt", proximal_mu=0.5
)
SHARED = {"backbone-a", "projector-a", "fusion", "head-q"}  # private: encoder-b, head-p


class Watching(NumpyEngine):
    """Keeps the vectors that each batch is trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Vector]] = []

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        if block.name == "head-q":  # the last block, and so the first on the way back
            self.batches.append({})
        self.batches[-1][block.name] = vector.copy()
        return super().backward(block, vector, feeds)


def test_fedalt_trains_the_private_blocks_first_and_then_the_shared_ones() -> None:
    """Of frozen blocks, parameters and statistics stay to the bit."""
    engine, start = Watching(), draw_vectors(RICH)
    result = run(replace(ALTERNATING, epochs=2), engine=engine, shared=SHARED)
    num_steps = len(engine.batches)
    assert num_steps == result.num_steps == 2 * 6
    middle = num_steps // 2
    for vectors in engine.batches[: middle + 1]:
        for name in vectors.keys() & SHARED:
            np.testing.assert_array_equal(vectors[name], start[name])
    for vectors in engine.batches[middle:]:
        for name in vectors.keys() - SHARED:
            np.testing.assert_array_equal(vectors[name], result.parameters[name])
    for block in RICH.blocks:
        moved = result.parameters[block.name] != start[block.name]
        assert moved.all() != block.is_frozen


@pytest.mark.parametrize("shared", [set(), {block.name for block in RICH.blocks}])
def test_fedalt_without_private_or_without_shared_blocks_is_fedsim(shared: set[str]) -> None:
    one, other = (
        run(replace(ALTERNATING, method=method, epochs=2), shared=shared)
        for method in ("fedalt", "fedsim")
    )
    assert one.losses == other.losses
    assert_same(one, other)


@pytest.mark.parametrize(("num_batches", "num_examples"), [(1, 0), (3, 0), (4, 4), (5, 8)])
def test_fedalt_that_is_stopped_weighs_what_the_shared_blocks_have_seen(
    num_batches: int, num_examples: int
) -> None:
    """Three batches for the private blocks, then three for the shared ones."""
    start = draw_vectors(RICH)
    result = run(ALTERNATING, shared=SHARED, should_train=stopping_after(num_batches))
    assert (result.num_examples, result.num_steps) == (num_examples, num_batches)
    assert not result.is_complete
    for name in ("encoder-b", "head-p"):
        assert (result.parameters[name] != start[name]).any()
    for name in ("projector-a", "fusion", "head-q"):
        assert (result.parameters[name] != start[name]).any() == (num_examples > 0)
    alone = run(ALTERNATING, should_train=stopping_after(1))
    assert alone.num_examples == 4, "of nothing shared, what the private blocks have seen"


def test_each_phase_has_its_epochs_its_max_steps_and_a_fresh_optimizer() -> None:
    steps: list[tuple[int, int]] = []
    engine = NumpyEngine()
    run(
        replace(ALTERNATING, optimizer="adamw", epochs=3, max_steps=2), engine=engine,
        shared=SHARED, on_batch=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    fed = [float(f["step"]) for f in engine.fed("step", "optimizers/adamw.onnx")]
    assert fed == [1.0] * 2 + [2.0] * 2 + [1.0] * 3 + [2.0] * 3


def test_the_loss_is_the_whole_one_in_both_phases() -> None:
    """Also of a head that no training block needs; nothing moves, is drawn or left out."""
    still = replace(ALTERNATING, learning_rate=0.0, batch_size=8)
    manifest = make_manifest(
        {"a": 2},
        make_block("encoder-a", ("a",), 2, 2),
        make_block("head-p", ("encoder-a",), 2, 2),
        make_block("head-q", ("encoder-a",), 2, 2),
    )
    result = run(still, manifest=manifest, length=8, shared={"encoder-a", "head-p"})
    assert result.num_steps == 2
    assert result.losses[0] == pytest.approx(result.losses[1], rel=1e-6)


def test_what_no_training_block_needs_is_not_run_backwards() -> None:
    """The heads are, for their losses."""
    engine = NumpyEngine()
    run(replace(ALTERNATING, batch_size=8), engine=engine, length=8,
        shared={"backbone-a", "projector-a", "encoder-b", "fusion"})  # fmt: skip
    backward = [name for method, name in engine.names if method == "backward"]
    heads = ["head-q", "head-p"]
    assert backward == [*heads, *heads, "fusion", "encoder-b", "projector-a"]


def test_clipping_is_of_the_blocks_that_train() -> None:
    engine = NumpyEngine()
    run(replace(ALTERNATING, max_grad_norm=1e-3, batch_size=8), engine=engine, length=8,
        shared=SHARED)  # fmt: skip
    fed = engine.fed("step", "optimizers/sgd.onnx")
    for phase in (fed[:2], fed[2:]):
        norm = math.sqrt(sum(float((f["gradient"] ** 2).sum()) for f in phase))
        for f in phase:
            assert float(f["gradient_scale"]) == pytest.approx(1e-3 / norm, rel=1e-3)
    assert [float(f["proximal"]) for f in fed] == [0.0] * 2 + [0.5] * 3


def test_fedalt_in_parts_is_that_of_whole_batches() -> None:
    whole, parts = (
        run(replace(ALTERNATING, batch_size=8, accumulation=n), length=8, shared=SHARED)
        for n in (1, 2)
    )
    for block in RICH.blocks:
        one, other = (r.parameters[block.name][: block.num_trainable] for r in (whole, parts))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
