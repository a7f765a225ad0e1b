"""What a model of blocks is: modalities, blocks, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from petalfl.errors import ModelError
from petalfl.schema import Limit, Name, Sha256, plain, read

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_BLOCK_SIZE = 1 << 28  # parameters: 1 GiB of float32

Dim = Annotated[int, Limit(1, 1 << 24)]
Shape = Annotated[tuple[Dim, ...], Limit(0, 8)]
Text = Annotated[str, Limit(1, 256)]


@dataclass(frozen=True, slots=True)
class Modality:
    """One kind of input. ``shape`` leaves out the batch dimension."""

    shape: Shape
    dtype: Literal["float32"] = "float32"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a block; tensors lie one after another in the block's flat vector."""

    name: Text
    shape: Annotated[tuple[Annotated[int, Limit(0, 1 << 24)], ...], Limit(0, 8)]


@dataclass(frozen=True, slots=True)
class Dropout:
    """A mask input: ``(batch, *shape)``, zero with probability ``rate``, else 1 / (1 - rate)."""

    name: Text
    shape: Shape
    rate: Annotated[float, Limit(0.0, 0.999)]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a block, relative to the artifacts folder."""

    path: Annotated[str, Limit(1, 256)]
    sha256: Sha256
    num_bytes: Annotated[int, Limit(0, 2 << 30)]


@dataclass(frozen=True, slots=True)
class Artifacts:
    """The files of a block.

    Attributes:
        training_model: Vector-Jacobian products; of a head, the loss and its gradients.
        eval_model: The forward pass; with dropout masks fed, the training-mode one.
        parameters: Initial values: the flat vector as little-endian float32.
    """

    training_model: Artifact
    eval_model: Artifact
    parameters: Artifact


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model that is trained, versioned and shared or kept as one.

    Attributes:
        inputs: A modality (encoder), encoders (fusion) or the block before it (head).
        output_shape: Of one example: ``(d,)``; of a head, ``(num_classes,)``.
        size: Number of parameters.
    """

    name: Name
    kind: Literal["encoder", "fusion", "head"]
    inputs: Annotated[tuple[Name, ...], Limit(1, 64)]
    output_shape: Shape
    size: Annotated[int, Limit(1, MAX_BLOCK_SIZE)]
    parameters: Annotated[tuple[Parameter, ...], Limit(1, 4096)]
    dropouts: Annotated[tuple[Dropout, ...], Limit(0, 256)]
    artifacts: Artifacts


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """Everything a device and a server must know of a model; blocks in topological order.

    Attributes:
        private_blocks: The default sharing policy: these never leave a device.
    """

    format_version: int
    name: Name
    modalities: Annotated[dict[Name, Modality], Limit(1, 64)]
    blocks: Annotated[tuple[Block, ...], Limit(1, 128)]
    loss: Literal["cross_entropy"]
    num_classes: Annotated[int, Limit(2, 1 << 20)]
    class_names: Annotated[tuple[Text, ...], Limit(0, 1 << 20)] = ()
    private_blocks: Annotated[tuple[Name, ...], Limit(0, 128)] = ()

    def block(self, name: str) -> Block:
        """The block of that name; `KeyError` when there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    def blocks_for(self, modalities: Collection[str]) -> tuple[Block, ...]:
        """The blocks that a device with these modalities holds: no foreign encoder.

        Raises:
            ModelError: None of the modalities, or one that the model does not have.
        """
        unknown = sorted(set(modalities) - self.modalities.keys())
        if unknown or not modalities:
            found = f"modality {unknown[0]!r}" if unknown else "no modality"
            raise ModelError(f"found {found}, the model has {', '.join(self.modalities)}")
        return tuple(
            block
            for block in self.blocks
            if block.kind != "encoder" or block.inputs[0] in modalities
        )

    @property
    def layout_sha256(self) -> str:
        """A digest of blocks, parameters and shapes: equal layouts can share vectors."""
        layout = [(b.name, b.kind, list(b.inputs), plain(b.parameters)) for b in self.blocks]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys: the same model gives the same bytes."""
        return json.dumps(plain(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> ModelManifest:
        """Reads and checks a manifest of any origin.

        Raises:
            ModelError: It is too long, no JSON, of a newer format or inconsistent.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ModelError(f"the manifest has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"the manifest is no JSON: {error}") from error
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION:
            raise ModelError(
                f"the manifest has format_version {version!r}, this petalfl reads {FORMAT_VERSION}"
            )
        try:
            manifest = read(cls, value, "manifest")
        except ValueError as error:
            raise ModelError(str(error)) from error
        _check_wiring(manifest)
        return manifest

    @classmethod
    def load(cls, folder: Path) -> ModelManifest:
        """Reads ``folder/manifest.json``.

        Raises:
            ModelError: The folder or the manifest is missing or unusable.
        """
        path = folder / MANIFEST_NAME
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelError(
                f"no artifacts at {folder}: cannot read {MANIFEST_NAME} ({error.strerror}); "
                f"make them with: python -m export MODULE:FACTORY --out {folder}"
            ) from error
        return cls.from_json(data)


def read_artifact(folder: Path, artifact: Artifact) -> bytes:
    """The file's bytes, checked against the manifest.

    Raises:
        ModelError: It is missing, or its length or SHA-256 is not the manifest's.
    """
    try:
        data = (folder / artifact.path).read_bytes()
    except OSError as error:
        raise ModelError(f"artifact {artifact.path} cannot be read: {error.strerror}") from error
    check_artifact(artifact, data)
    return data


def check_artifact(artifact: Artifact, data: bytes) -> None:
    """Compares length and SHA-256 with the manifest's.

    Raises:
        ModelError: They differ.
    """
    found = hashlib.sha256(data).hexdigest()
    if found != artifact.sha256:
        raise ModelError(
            f"artifact {artifact.path} is damaged or was swapped: "
            f"sha256 {found[:12]}…, the manifest says {artifact.sha256[:12]}…"
        )


def _check_wiring(manifest: ModelManifest) -> None:
    """One encoder per modality, then a fusion of all of them, then a head of the fusion."""
    known = set(manifest.modalities)
    for block in manifest.blocks:
        _check_block(block, known)
        known.add(block.name)
    encoders = [b for b in manifest.blocks if b.kind == "encoder"]
    expected = [(m,) for m in manifest.modalities]
    rest = [(b.kind, b.inputs) for b in manifest.blocks[len(encoders) :]]
    fusion = manifest.blocks[-2].name if len(manifest.blocks) > 1 else ""
    wanted = [("fusion", tuple(e.name for e in encoders)), ("head", (fusion,))]
    if sorted(e.inputs for e in encoders) != sorted(expected) or rest != wanted:
        raise ModelError(
            "expected an encoder per modality, then a fusion of all encoders, then a head of the "
            f"fusion; found {[(b.name, b.kind, *b.inputs) for b in manifest.blocks][:4]}"
        )
    if manifest.blocks[-1].output_shape != (manifest.num_classes,):
        raise ModelError(
            f"block {manifest.blocks[-1].name}: outputs of {manifest.blocks[-1].output_shape}, "
            f"expected ({manifest.num_classes},) classes"
        )
    if manifest.class_names and len(manifest.class_names) != manifest.num_classes:
        raise ModelError(
            f"{len(manifest.class_names)} class names for {manifest.num_classes} classes"
        )
    for name in manifest.private_blocks:
        if name not in known - manifest.modalities.keys():
            raise ModelError(f"private block {name!r} is no block of the model")


def _check_block(block: Block, known: set[str]) -> None:
    if block.name in known:
        raise ModelError(f"block {block.name}: the name is used twice")
    for name in block.inputs:
        if name not in known:
            raise ModelError(f"block {block.name}: input {name!r} comes from nowhere before it")
    for kind, names in (
        ("parameter", [p.name for p in block.parameters]),
        ("input", [*block.inputs, *(d.name for d in block.dropouts), "present", "parameters"]),
    ):
        if len(set(names)) != len(names):
            raise ModelError(f"block {block.name}: two {kind}s of one name in {names[:6]}")
    total = sum(_count(parameter.shape) for parameter in block.parameters)
    if total != block.size:
        raise ModelError(f"block {block.name}: size {block.size}, its parameters have {total}")
    artifacts = block.artifacts
    if artifacts.parameters.num_bytes != 4 * block.size:
        raise ModelError(f"block {block.name}: initial values of {artifacts.parameters.num_bytes} "
                         f"bytes, expected {4 * block.size}")  # fmt: skip
    for artifact in (artifacts.training_model, artifacts.eval_model, artifacts.parameters):
        folder, _, file = artifact.path.partition("/")
        if folder != block.name or not file or not file.replace("_", "").replace(".", "").isalnum():
            raise ModelError(f"block {block.name}: path {artifact.path!r} leads out of its folder")


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for dim in shape:
        total *= dim
    return total
