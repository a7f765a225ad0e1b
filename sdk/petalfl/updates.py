"""A shared block's delta as something to send, and what its codec leaves for the next time."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Collection

import numpy as np

from petalfl import wire
from petalfl.codecs import Codec, parse_codec
from petalfl.errors import DataError
from petalfl.model import Block
from petalfl.payloads import encode_payload
from petalfl.private_tensors import withhold
from petalfl.store import Outgoing, Residual
from petalfl.vectors import Vector, from_bytes, to_bytes

log = logging.getLogger("petalfl.client")


def make_update(
    block: Block,
    task: wire.Task,
    num_examples: int,
    delta: Vector,
    kept: Residual | None,
    rng: np.random.Generator,
    private_tensors: Collection[str] = (),
) -> tuple[Outgoing, Residual | None]:
    """The update of a block that the task asks for, and the residual that it leaves.

    Args:
        kept: The residual of the update before, which goes into this one.
        rng: For codecs that round by lot.
        private_tensors: Neither they nor what was once kept of them is in the update.

    Raises:
        DataError: The delta is not finite.
    """
    base_version = task.blocks[block.name].version
    residual = _usable(kept, block, base_version)
    delta = withhold(block, private_tensors, delta)
    if residual is not None:
        residual = withhold(block, private_tensors, residual)
    codec, payload, left = _encode(block, parse_codec(task.codec or "f32"), delta, residual, rng)
    manifest = wire.UpdateManifest(
        update_id=secrets.token_bytes(16),
        block=block.name,
        round_num=task.round_num,
        base_version=base_version,
        num_examples=num_examples,
        codec=codec.name,
        num_bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
    )
    remains = None if left is None else Residual(base_version, to_bytes(left))
    return Outgoing(wire.encode(manifest), payload), remains


def _usable(kept: Residual | None, block: Block, base_version: int) -> Vector | None:
    """The residual, unless it belongs to versions that the server has gone back behind."""
    if kept is None or kept.base_version > base_version:
        return None
    try:
        return from_bytes(kept.vector, block.num_trainable)
    except ValueError:  # of a model before this one
        return None


def _encode(
    block: Block, codec: Codec, delta: Vector, residual: Vector | None, rng: np.random.Generator
) -> tuple[Codec, bytes, Vector | None]:
    try:
        return codec, *encode_payload(codec, block, delta, residual, rng)
    except ValueError as error:
        log.warning("block %s goes without its codec: %s", block.name, error)
    plain = parse_codec("f32")
    try:
        return plain, *encode_payload(plain, block, delta, residual, rng)
    except ValueError as error:
        raise DataError(f"the update of block {block.name} cannot be sent: {error}") from error
