"""Which tensors of shared blocks a federation leaves to its devices."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from petalfl.model import Block
from petalfl.private_tensors import tensors_of

BATCH_NORM = "batch-norm"
MAX_PRIVATE_TENSORS = 4096


def find_private_tensors(patterns: Sequence[str], shared: Collection[Block]) -> tuple[str, ...]:
    """The tensors ``BLOCK/TENSOR`` that patterns name, in the model's order.

    Args:
        patterns: With ``*``, ``?`` and ``[…]``, of whole names; or ``batch-norm`` for weight, bias
            and running statistics of every layer that has running statistics.
        shared: The blocks that train and are not private as a whole.

    Raises:
        ValueError: A pattern names nothing, all of a block is named, or too much is.
    """
    names = {name: block.name for block in shared for name in tensors_of(block)}
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if pattern == BATCH_NORM:
            found = {name for block in shared for name in _batch_norms(block)}
        if not found:
            raise ValueError(_nothing_found(pattern, list(names)))
        chosen |= found
    for block in shared:
        if chosen >= tensors_of(block).keys():
            raise ValueError(
                f"all tensors of block {block.name} would be private: name it among the "
                "private-blocks instead"
            )
    if len(chosen) > MAX_PRIVATE_TENSORS:
        raise ValueError(f"{len(chosen)} tensors, at most {MAX_PRIVATE_TENSORS} can be private")
    return tuple(name for name in names if name in chosen)


def _batch_norms(block: Block) -> set[str]:
    """The tensors of the layers that have a running mean."""
    layers: dict[str, dict[str, str]] = {}  # by layer and the end of the name: the whole name
    for name in tensors_of(block):
        end = re.split(r"[./]", name)[-1]
        layers.setdefault(name.removesuffix(end), {})[end] = name
    return {
        name
        for ends in layers.values()
        if "running_mean" in ends
        for end, name in ends.items()
        if end in ("weight", "bias", "running_mean", "running_var")
    }


def _nothing_found(pattern: str, names: Sequence[str]) -> str:
    if pattern == BATCH_NORM:
        return "batch-norm: no shared block has a layer with running statistics"
    some = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
    return f"{pattern!r} names no tensor of a shared block; there are {some or 'none'}"
