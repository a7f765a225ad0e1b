"""Model artifacts with other initial values: of another seed, or what a federation has learned."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from petalfl.model import MANIFEST_NAME, Artifact, Block, ModelManifest
from petalfl.vectors import Vector, to_bytes


def find(
    cache: Path, dataset: str, missing: str, seed: int, has_personal_head: bool = False
) -> tuple[Path, bool]:
    """Where a data set's artifacts lie in a folder of them, and whether they are there."""
    folder = cache / f"{dataset}-{missing}{'-two' * has_personal_head}-{seed}"
    return folder, (folder / MANIFEST_NAME).exists()


def with_values(artifacts: Path, vectors: Mapping[str, Vector], out: Path) -> ModelManifest:
    """Copies artifacts to ``out``, with other initial values of some blocks.

    Args:
        vectors: By block.

    Raises:
        ModelError: The artifacts cannot be read.
        ValueError: A vector has another length than its block.
    """
    manifest = ModelManifest.load(artifacts)
    shutil.copytree(artifacts, out)
    blocks = tuple(
        _write(block, vectors[block.name], out) if block.name in vectors else block
        for block in manifest.blocks
    )
    manifest = replace(manifest, blocks=blocks)
    (out / MANIFEST_NAME).write_bytes(manifest.to_json())
    return ModelManifest.load(out)


def _write(block: Block, vector: Vector, out: Path) -> Block:
    if vector.shape != (block.size,):
        raise ValueError(f"block {block.name}: expected {block.size} values, found {vector.shape}")
    data, path = to_bytes(vector), block.artifacts.parameters.path
    (out / path).write_bytes(data)
    written = Artifact(path, hashlib.sha256(data).hexdigest(), len(data))
    return replace(block, artifacts=replace(block.artifacts, parameters=written))
