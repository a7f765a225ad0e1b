"""What is in an artifacts folder, and what it costs devices: for people who size and plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from petalfl.model import MANIFEST_NAME, Artifact, Block, ModelManifest, read_artifact
from petalfl.reference import REFERENCE_NAME, Reference


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """One block.

    Attributes:
        modality: Of an encoder; else empty.
        parameters: Their number; ``statistics`` are running averages, shared like these.
        num_bytes: Of all its files.
        activation_bytes: Kept per example between forward and backward pass.
        num_flops: Of one example's forward pass.
        policy: By default.
        loss: Of a head; else empty.
    """

    name: str
    kind: str
    modality: str
    parameters: int
    statistics: int
    num_bytes: int
    activation_bytes: int
    num_flops: int
    policy: Literal["shared", "private", "frozen"]
    loss: str


@dataclass(frozen=True, slots=True)
class Total:
    """All blocks together; fields as of `BlockSummary`."""

    parameters: int
    statistics: int
    num_bytes: int
    activation_bytes: int
    num_flops: int


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """A device with some modalities, and labels for every task, by the default policy.

    Attributes:
        setup_bytes: Downloaded once: graphs, optimizers, manifest, values of private and frozen
            blocks.
        download_bytes: Per round, at most: the shared blocks.
        upload_bytes: Per round: their updates, without the few bytes of the envelope.
    """

    modalities: tuple[str, ...]
    blocks: tuple[str, ...]
    parameters: int
    activation_bytes: int
    num_flops: int
    setup_bytes: int
    download_bytes: int
    upload_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A whole folder; ``num_bytes`` is of all files."""

    name: str
    source: str
    format: str
    num_bytes: int
    total: Total
    blocks: tuple[BlockSummary, ...]
    devices: tuple[DeviceSummary, ...]


def inspect_artifacts(folder: Path) -> Inspection:
    """Reads the manifest and checks every file against it.

    Raises:
        ModelError: The manifest is unusable, or a file is missing or is another one.
    """
    manifest = ModelManifest.load(folder)
    for artifact in files(manifest):
        read_artifact(folder, artifact)
    Reference.load(folder)
    manifest_bytes = (folder / MANIFEST_NAME).stat().st_size
    unlisted_bytes = manifest_bytes + (folder / REFERENCE_NAME).stat().st_size
    blocks = tuple(_summary(manifest, block) for block in manifest.blocks)
    subsets = dict.fromkeys([*((m,) for m in manifest.modalities), tuple(manifest.modalities)])
    return Inspection(
        name=manifest.name,
        source=manifest.source,
        format=Path(manifest.blocks[0].artifacts.eval_model.path).suffix[1:],
        num_bytes=unlisted_bytes + sum(a.num_bytes for a in files(manifest)),
        total=_total(blocks),
        blocks=blocks,
        devices=tuple(_device(manifest, subset, manifest_bytes) for subset in subsets),
    )


def files(manifest: ModelManifest) -> Iterator[Artifact]:
    """All that the manifest lists."""
    for block in manifest.blocks:
        yield from _files(block)
    yield from manifest.optimizers.values()
    if manifest.state is not None:
        yield manifest.state


def policy_of(manifest: ModelManifest, block: Block) -> Literal["shared", "private", "frozen"]:
    """What becomes of its values by default."""
    if block.is_frozen:
        return "frozen"
    return "private" if block.name in manifest.private_blocks else "shared"


def _files(block: Block) -> tuple[Artifact, ...]:
    return (*block.artifacts.graphs, block.artifacts.parameters)


def _summary(manifest: ModelManifest, block: Block) -> BlockSummary:
    return BlockSummary(
        name=block.name,
        kind=block.kind,
        modality=manifest.modality_of(block) if block.kind == "encoder" else "",
        parameters=sum(p.size for p in block.parameters),
        statistics=sum(s.size for s in block.statistics),
        num_bytes=sum(a.num_bytes for a in _files(block)),
        activation_bytes=block.activation_bytes,
        num_flops=block.num_flops,
        policy=policy_of(manifest, block),
        loss=block.task.loss if block.task else "",
    )


def _total(blocks: tuple[BlockSummary, ...]) -> Total:
    return Total(
        parameters=sum(b.parameters for b in blocks),
        statistics=sum(b.statistics for b in blocks),
        num_bytes=sum(b.num_bytes for b in blocks),
        activation_bytes=sum(b.activation_bytes for b in blocks),
        num_flops=sum(b.num_flops for b in blocks),
    )


def _device(
    manifest: ModelManifest, modalities: tuple[str, ...], manifest_bytes: int
) -> DeviceSummary:
    held = manifest.blocks_for(modalities)
    own = [b for b in held if policy_of(manifest, b) != "shared"]
    shared_bytes = sum(4 * b.size for b in held if policy_of(manifest, b) == "shared")
    graphs = [a for b in held for a in b.artifacts.graphs]
    values = [b.artifacts.parameters for b in own]
    downloads = [*graphs, *values, *manifest.optimizers.values()]
    return DeviceSummary(
        modalities=modalities,
        blocks=tuple(b.name for b in held),
        parameters=sum(p.size for b in held for p in b.parameters),
        activation_bytes=sum(b.activation_bytes for b in held),
        num_flops=sum(b.num_flops for b in held),
        setup_bytes=manifest_bytes + sum(a.num_bytes for a in downloads),
        download_bytes=shared_bytes,
        upload_bytes=shared_bytes,
    )
