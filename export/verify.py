"""Proves the one-step law again, on artifacts that are already there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from petalfl.errors import ModelError
from petalfl.model import Block, ModelManifest, read_artifact

from .block import BlockSpec
from .inspection import files
from .law import COINCIDENCE, NUM_TRIES, Errors, worst_errors
from .model import BlockModel
from .rewrites import statistics_of
from .state import join_state, state_of
from .weights import Progress, initial_weights


class Finding(NamedTuple):
    """A block's largest relative error, what it is in, and whether the block is exact."""

    block: str  # empty for the loss of the whole model
    error: float
    what: str
    is_exact: bool


def verify(
    model: BlockModel,
    folder: Path,
    *,
    num_batches: int = 3,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[Finding]:
    """Compares chained steps on the artifacts with PyTorch's, on random batches.

    As at export, an error over `TOLERANCE` by rounding alone is told from a wrong gradient by
    trying again: it is not there on every batch.

    Args:
        model: Of the class that was exported; gets the values in the artifacts.
        num_batches: Of all modalities together, and of each alone.
        seed: Of the first; each next one has the next number.
        progress: Told the batches done and their total.

    Returns:
        The loss first, then the blocks in topological order.

    Raises:
        ModelError: An artifact is missing or damaged, or the model does not fit.
    """
    manifest = ModelManifest.load(folder)
    for artifact in files(manifest):
        read_artifact(folder, artifact)
    load_values(model, folder, manifest)
    passes: list[Errors] = []
    while len(passes) < num_batches or (len(passes) < NUM_TRIES and any(_suspects(passes))):
        start, planned = len(passes), max(num_batches, len(passes) + 1)
        passes.append(
            worst_errors(
                model,
                folder,
                seed + start,
                lambda done, total, start=start, planned=planned: progress(  # type: ignore[misc]
                    start * total + done, planned * total
                ),
            )
        )
    wrong = {block for block, _ in _suspects(passes)}
    return [
        Finding(name, *_worst(passes, name), name not in wrong)
        for name in ("", *(b.name for b in manifest.blocks))
    ]


def load_values(model: BlockModel, folder: Path, manifest: ModelManifest) -> None:
    """Gives the model the parameters and buffers that were exported.

    Raises:
        ModelError: Its blocks, or their parameters' names or shapes, are not the manifest's.
    """
    found = {spec.name: _layout(spec) for spec in model.blocks()}
    expected = {block.name: _tensors(block) for block in manifest.blocks}
    if list(found) != list(expected):
        raise ModelError(
            f"the model has blocks {', '.join(found)}, the artifacts {', '.join(expected)}"
        )
    for name, layout in found.items():
        if layout != expected[name]:
            keys = layout | expected[name]
            key = next(k for k in keys if layout.get(k) != expected[name].get(k))
            raise ModelError(
                f"block {name}: the model's {key} is {layout.get(key, 'missing')}, "
                f"the artifacts' is {expected[name].get(key, 'missing')}"
            )
    vectors = {name: w.vector for name, w in initial_weights(folder, manifest).items()}
    state = join_state(folder, manifest, vectors)
    try:
        model.whole().load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ModelError(
            f"the model does not fit the artifacts: {' '.join(lines)}"[:500]
        ) from error
    for spec in model.blocks():
        if manifest.block(spec.name).is_personal:  # not in the state of a module that was cut
            spec.module.load_state_dict(
                state_of(manifest, spec.name, vectors[spec.name]), strict=False
            )


def _layout(spec: BlockSpec) -> dict[str, tuple[int, ...]]:
    tensors = [*spec.module.named_parameters(), *statistics_of(spec.module).items()]
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _tensors(block: Block) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in block.tensors}


def _suspects(passes: list[Errors]) -> Iterator[tuple[str, str]]:
    """What is wrong, as far as these batches tell."""
    for key in {key for errors in passes for key in errors}:
        found = [errors[key] for errors in passes if key in errors]
        is_far_off = any(not error <= COINCIDENCE for error in found)
        if is_far_off or all(not error.is_kept for error in found):
            yield key


def _worst(passes: list[Errors], block: str) -> tuple[float, str]:
    errors = [(e, what) for found in passes for (b, what), e in found.items() if b == block]
    return max(errors, key=lambda e: math.inf if math.isnan(e[0]) else e[0], default=(0.0, ""))
