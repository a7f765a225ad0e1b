from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from petalfl import DataError, wire
from petalfl.codecs import parse_codec
from petalfl.store import Residual
from petalfl.training import Hyperparameters
from petalfl.updates import make_update
from petalfl.vectors import Vector, from_bytes, to_bytes
from tests.petalfl.builders import make_block
from tests.petalfl.codecs.vectors import deltas

BLOCK = make_block("head", ("fusion",), 4, 9)  # 40 parameters
DELTA = deltas(40)
OLD = deltas(40, 1)


def task(codec: str | None, version: int = 5) -> wire.Task:
    blocks = {"head": wire.BlockVersion(version, "0" * 64)}
    return wire.Task(7, 0, Hyperparameters(0.1), 0, blocks, None, codec)


def update(
    codec: str | None, delta: Vector = DELTA, kept: Residual | None = None, version: int = 5
) -> tuple[wire.UpdateManifest, Vector, Residual | None]:
    """The manifest, what the server decodes, and the residual."""
    rng = np.random.default_rng(0)
    outgoing, left = make_update(BLOCK, task(codec, version), 12, delta, kept, rng)
    manifest = cast(wire.UpdateManifest, wire.decode(outgoing.message))
    wire.check_announced(manifest, BLOCK)
    found = wire.decode_payload(manifest, outgoing.payload, "watch", BLOCK)
    assert (found.round_num, found.base_version, found.num_examples) == (7, version, 12)
    return manifest, found.delta, left


@pytest.mark.parametrize("codec", [None, "f32", "f16", "bf16", "int8"])
def test_what_leaves_no_residual(codec: str | None) -> None:
    manifest, found, left = update(codec)
    assert manifest.codec == (codec or "f32") and left is None
    np.testing.assert_allclose(found, DELTA, atol=np.abs(DELTA).max() / 120)


@pytest.mark.parametrize("codec", ["topk:0.1", "topk-int8:0.1"])
def test_what_is_left_out_is_kept(codec: str) -> None:
    manifest, found, left = update(codec)
    assert manifest.codec == codec and np.count_nonzero(found) <= 4
    assert left is not None and left.base_version == 5
    np.testing.assert_allclose(found + from_bytes(left.vector, 40), DELTA, rtol=1e-5)


@pytest.mark.parametrize("codec", ["f32", "int8", "topk:0.1"])
def test_what_was_kept_goes_into_the_next(codec: str) -> None:
    _, found, left = update(codec, kept=Residual(5, to_bytes(OLD.copy())))
    rest = from_bytes(left.vector, 40) if left is not None else 0
    total = DELTA + OLD
    np.testing.assert_allclose(found + rest, total, atol=np.abs(total).max() / 120)


@pytest.mark.parametrize(
    "kept",
    [Residual(6, to_bytes(OLD.copy())), Residual(4, to_bytes(deltas(39)))],
    ids=["of a version that the server has gone back behind", "of another size"],
)
def test_what_no_longer_fits_is_dropped(kept: Residual) -> None:
    np.testing.assert_array_equal(update("f32", kept=kept)[1], DELTA)


def test_a_device_that_was_away_still_has_its_residual() -> None:
    kept = Residual(5, to_bytes(OLD.copy()))
    np.testing.assert_array_equal(update("f32", kept=kept, version=500)[1], DELTA + OLD)


def test_what_a_codec_cannot_say_goes_as_f32(caplog: pytest.LogCaptureFixture) -> None:
    large = DELTA.copy()
    large[3] = 1e6
    manifest, found, left = update("f16", large)
    assert manifest.codec == "f32" and left is None
    np.testing.assert_array_equal(found, large)
    assert "block head goes without its codec: f16: a value of 1e+06" in caplog.text


@pytest.mark.parametrize("codec", ["f32", "int8", "topk:0.1"])
def test_what_nobody_can_say_is_refused(codec: str) -> None:
    bad = DELTA.copy()
    bad[3] = np.inf
    with pytest.raises(DataError, match="the update of block head cannot be sent: f32: a value"):
        update(codec, bad)


# Private tensors: of the head's 40 parameters, the last four are its bias.


@pytest.mark.parametrize("codec", ["f32", "f16", "bf16", "int8", "topk:0.5", "topk-int8:0.1"])
def test_nothing_of_a_private_tensor_is_in_an_update(codec: str) -> None:
    """Its values change no byte: neither a scale nor what is kept of the others nor a residual."""
    made = []
    for factor in (0, 1e30):
        delta, old = DELTA.copy(), OLD.copy()
        delta[36:] *= np.float32(factor)
        old[36:] *= np.float32(factor)
        outgoing, left = make_update(
            BLOCK, task(codec), 12, delta, Residual(5, to_bytes(old)), np.random.default_rng(0),
            {"head/bias", "other/weight"},
        )  # fmt: skip
        manifest = cast(wire.UpdateManifest, wire.decode(outgoing.message))
        found = wire.decode_payload(manifest, outgoing.payload, "watch", BLOCK).delta
        np.testing.assert_array_equal(found[36:], np.zeros(4))
        assert manifest.codec == codec and np.abs(found[:36]).max() > 0
        made.append((outgoing.payload, left))
    assert made[0] == made[1]


def test_the_codec_is_parsed_once() -> None:
    assert parse_codec("topk:0.1") is parse_codec("topk:0.1")
