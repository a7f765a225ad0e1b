"""A PyTorch model's ``state_dict``, taken apart for export and put together again.

The blocks' vectors hold its parameters and running statistics. ``state.pt`` lists all its keys and
holds the rest: other buffers as they were exported, such as ``num_batches_tracked``. A parameter
that has two keys, because weights are tied or a module is registered twice, is listed under both.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from petalfl.errors import ModelError
from petalfl.model import ModelManifest, read_artifact
from petalfl.vectors import Vector

from .model import BlockModel
from .rewrites import statistics_of


def save_state(model: BlockModel) -> bytes:
    """By key of the ``state_dict``: block and name of a tensor in its vector, or the value."""
    owners = {
        id(tensor): (spec.name, name)
        for spec in model.blocks()
        for name, tensor in [*spec.module.named_parameters(), *statistics_of(spec.module).items()]
    }
    state: dict[str, Any] = {}
    for key, value in model.whole().state_dict(keep_vars=True).items():
        if id(value) in owners:
            state[key] = owners[id(value)]
        else:
            state[key] = value.detach().clone() if isinstance(value, Tensor) else value
    return to_file(state)


def join_state(
    folder: Path, manifest: ModelManifest, vectors: Mapping[str, Vector]
) -> dict[str, Any]:
    """The ``state_dict`` of the class that was exported, with the blocks' values.

    Args:
        vectors: Of every block.

    Raises:
        ModelError: The artifacts lack what this needs, or it is damaged.
    """
    if manifest.state is None:
        raise ModelError(
            f"the artifacts at {folder} do not say how their PyTorch model was made; "
            "export the model again"
        )
    data = read_artifact(folder, manifest.state)
    tensors = {
        (block.name, name): tensor
        for block in manifest.blocks
        for name, tensor in state_of(manifest, block.name, vectors[block.name]).items()
    }
    try:
        state = torch.load(io.BytesIO(data), weights_only=True)
        joined = {k: tensors[v] if isinstance(v, tuple) else v for k, v in state.items()}
    except Exception as error:  # pickle's own kinds, and a tensor that no block has
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{manifest.state.path} cannot be read: {reason}"[:500]) from error
    placed = {v for v in state.values() if isinstance(v, tuple)}
    for block, name in tensors.keys() - placed:
        is_foreign = manifest.block(block).is_personal  # to a module that was cut
        if not manifest.block(block).is_frozen and not is_foreign:  # of which two may be one module
            raise ModelError(
                f"block {block}: {name} is not in the state_dict of the class that was exported, "
                "as if a hook replaced it"
            )
    return joined


def to_file(state: Mapping[str, Any]) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()


def state_of(manifest: ModelManifest, name: str, vector: Vector) -> dict[str, Tensor]:
    """A block's tensors by name, cut out of its vector."""
    tensors = manifest.block(name).tensors
    starts = itertools.accumulate((t.size for t in tensors), initial=0)
    return {
        t.name: torch.from_numpy(vector[start : start + t.size].reshape(t.shape).copy())
        for t, start in zip(tensors, starts, strict=False)
    }
