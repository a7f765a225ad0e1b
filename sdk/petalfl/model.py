"""What a model of blocks is: modalities, blocks, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from petalfl.errors import ModelError
from petalfl.schema import Limit, Name, Sha256, plain, read

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
OPTIMIZERS_FOLDER = "optimizers"  # no block is called so: they have a dash, or are fusion or head
OPTIMIZERS = ("sgd", "adamw")
STATE_NAME = "state.pt"
MAX_MANIFEST_BYTES = 4 << 20
MAX_BLOCK_SIZE = 1 << 28  # parameters: 1 GiB of float32

Dim = Annotated[int, Limit(1, 1 << 24)]
Shape = Annotated[tuple[Dim, ...], Limit(0, 8)]
OpenShape = Annotated[tuple[Dim | None, ...], Limit(0, 8)]  # None: varies from batch to batch
Text = Annotated[str, Limit(1, 256)]

PERSONAL_LOSSES = ("cross_entropy", "bce_with_logits")  # those whose outputs are probabilities

# What graphs call their other inputs and outputs.
_RESERVED = frozenset({"parameters", "present", "labels", "loss", "gradient", "statistics"})


@dataclass(frozen=True, slots=True)
class Modality:
    """One kind of input. ``shape`` leaves out the batch dimension.

    Attributes:
        num_values: Of int64: values lie in [0, num_values).
        ranges: For each None in ``shape``: the shortest and the longest length.
    """

    shape: OpenShape
    dtype: Literal["float32", "int64"] = "float32"
    num_values: Annotated[int, Limit(1, 1 << 31)] | None = None
    ranges: Annotated[tuple[Annotated[tuple[Dim, ...], Limit(2, 2)], ...], Limit(0, 8)] = ()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an example may have this shape."""
        ranges = iter(self.ranges)
        ends = [next(ranges) if dim is None else (dim, dim) for dim in self.shape]
        return len(shape) == len(ends) and all(
            low <= size <= high for size, (low, high) in zip(shape, ends, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a block; tensors lie one after another in the block's flat vector."""

    name: Text
    shape: Annotated[tuple[Annotated[int, Limit(0, 1 << 24)], ...], Limit(0, 8)]

    @property
    def size(self) -> int:
        """Its number of floats."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What one block hands to the next: float32 ``(batch, *shape)``."""

    name: Text
    shape: OpenShape


@dataclass(frozen=True, slots=True)
class Dropout:
    """A mask input: ``(batch, *shape)``, zero with probability ``rate``, else 1 / (1 - rate).

    Attributes:
        varying: For each None in ``shape``: the axis ``MODALITY.AXIS`` whose length it has; axes
            count from 1, as 0 is the batch.
        batch_axis: Where PyTorch has the batch in what the dropout acts on; masks have it first.
    """

    name: Text
    shape: OpenShape
    rate: Annotated[float, Limit(0.0, 0.999)]
    varying: Annotated[tuple[Text, ...], Limit(0, 8)] = ()
    batch_axis: Annotated[int, Limit(0, 7)] = 0

    def sizes(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for these lengths by axis; 1 where the axis's modality is absent."""
        names = iter(self.varying)
        return tuple(lengths.get(next(names), 1) if d is None else d for d in self.shape)


@dataclass(frozen=True, slots=True)
class Task:
    """What a head learns.

    Attributes:
        loss: A mean over the batch; labels are int64 ``(n,)`` for cross_entropy, else float32 of
            the shape of the head's output.
        weight: Of its loss in the sum over all heads.
        personalizes: Of a personal head: the task of the head that it stands beside. It learns
            that task's labels as well, never leaves its device, and predictions are the mean of
            both heads' probabilities.
    """

    loss: Literal["cross_entropy", "bce_with_logits", "mse", "l1"]
    weight: Annotated[float, Limit(0.0, 1e6)] = 1.0
    class_names: Annotated[tuple[Text, ...], Limit(0, 1 << 20)] = ()
    personalizes: Name | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of the artifacts folder."""

    path: Annotated[str, Limit(1, 256)]
    sha256: Sha256
    num_bytes: Annotated[int, Limit(0, 2 << 30)]


@dataclass(frozen=True, slots=True)
class Artifacts:
    """The files of a block.

    Attributes:
        eval_model: Inference: dropout off, running statistics used.
        training_forward: None for a head, whose backward graph runs it, and for a frozen block,
            which its ``eval_model`` serves.
        training_backward: Vector-Jacobian products; of a head, the loss and its gradients. None
            when neither the block nor anything before it trains.
        parameters: Initial values: the flat vector as little-endian float32.
    """

    eval_model: Artifact
    training_forward: Artifact | None
    training_backward: Artifact | None
    parameters: Artifact

    @property
    def graphs(self) -> tuple[Artifact, ...]:
        """Those of the files that are graphs and there."""
        graphs = (self.eval_model, self.training_forward, self.training_backward)
        return tuple(graph for graph in graphs if graph is not None)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model that is trained, versioned and shared or kept as one.

    Attributes:
        inputs: A modality (first stage of an encoder) or blocks before it.
        outputs: One tensor called like the block, or several called ``<block>.<key>``.
        size: Floats in its flat vector: ``parameters``, then ``statistics``.
        num_trainable: The leading part of the vector that gradients reach.
        statistics: Running averages; training replaces them, no gradient reaches them.
        dropouts: In the order in which they act.
        task: Of a head alone.
        is_frozen: It never trains and never travels: the artifacts hold its parameters.
        state_prefix: PyTorch's ``state_dict`` key is ``state_prefix`` + the parameter's name.
        min_batch: The smallest batch that it can train on.
        num_flops: Of one example's forward pass: products and convolutions.
        activation_bytes: What one example keeps between forward and backward pass.
    """

    name: Name
    kind: Literal["encoder", "fusion", "head"]
    inputs: Annotated[tuple[Name, ...], Limit(1, 64)]
    outputs: Annotated[tuple[Tensor, ...], Limit(1, 64)]
    size: Annotated[int, Limit(0, MAX_BLOCK_SIZE)]
    num_trainable: Annotated[int, Limit(0, MAX_BLOCK_SIZE)]
    parameters: Annotated[tuple[Parameter, ...], Limit(0, 4096)]
    statistics: Annotated[tuple[Parameter, ...], Limit(0, 4096)]
    dropouts: Annotated[tuple[Dropout, ...], Limit(0, 256)]
    task: Task | None
    is_frozen: bool
    state_prefix: Annotated[str, Limit(0, 256)]
    min_batch: Annotated[int, Limit(1, 1 << 16)]
    num_flops: Annotated[int, Limit(0, 1 << 53)]
    activation_bytes: Annotated[int, Limit(0, 1 << 53)]
    artifacts: Artifacts

    @property
    def tensors(self) -> tuple[Parameter, ...]:
        """Everything in its flat vector, in that order."""
        return self.parameters + self.statistics

    @property
    def is_joint(self) -> bool:
        """Whether it joins modalities, some of which a device may lack."""
        return self.kind == "fusion" or len(self.inputs) > 1

    @property
    def is_personal(self) -> bool:
        """Whether it is a personal head, which stays on its device whatever is shared."""
        return self.task is not None and self.task.personalizes is not None

    @property
    def label_task(self) -> str:
        """Of a head: the task whose labels it learns."""
        personalizes = self.task.personalizes if self.task else None
        return personalizes or self.name.removeprefix("head-")


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """Everything a device and a server must know of a model; blocks in topological order.

    Attributes:
        private_blocks: The default sharing policy: these never leave a device.
        missing: What stands in for a modality that a device lacks: zeros, of length 1 along an
            axis that varies, and with ``mask`` the blocks that join modalities are also told
            which are ``present``.
        optimizers: Graphs of `petalfl.optimizers` by name.
        source: The ``MODULE:FACTORY`` that it was exported from.
        state: How to put the PyTorch model's ``state_dict`` together again, for `export.merge`
            alone: neither server nor devices read it.
    """

    format_version: int
    name: Name
    modalities: Annotated[dict[Name, Modality], Limit(1, 64)]
    blocks: Annotated[tuple[Block, ...], Limit(1, 128)]
    missing: Literal["mask", "zero"]
    optimizers: Annotated[dict[Name, Artifact], Limit(0, 64)]
    private_blocks: Annotated[tuple[Name, ...], Limit(0, 128)] = ()
    source: Annotated[str, Limit(0, 1024)] = ""
    state: Artifact | None = None

    def block(self, name: str) -> Block:
        """The block of that name; `KeyError` when there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    @property
    def heads(self) -> dict[str, Block]:
        """By task: what follows ``head-`` in the block's name, or ``head`` where there is one.

        Personal heads are not among them.
        """
        return {b.label_task: b for b in self.blocks if b.kind == "head" and not b.is_personal}

    @property
    def personal_heads(self) -> dict[str, Block]:
        """By the task that they personalize."""
        return {b.label_task: b for b in self.blocks if b.is_personal}

    def modality_of(self, encoder: Block) -> str:
        """The modality at the start of an encoder's chain."""
        name = encoder.inputs[0]
        while name not in self.modalities:
            name = self.block(name).inputs[0]
        return name

    def blocks_for(
        self, modalities: Collection[str], tasks: Collection[str] | None = None
    ) -> tuple[Block, ...]:
        """The blocks that a device holds: no foreign encoder, no head that it has no labels for.

        Args:
            modalities: The device's.
            tasks: Those that it has labels of; None means all.

        Raises:
            ModelError: None of them, or one that the model does not have.
        """
        tasks = self.heads if tasks is None else tasks
        _check_known("modality", modalities, self.modalities)
        _check_known("task", tasks, self.heads)
        return tuple(
            block
            for block in self.blocks
            if (block.kind != "encoder" or self.modality_of(block) in modalities)
            and (block.kind != "head" or block.label_task in tasks)
        )

    @property
    def layout_sha256(self) -> str:
        """A digest of what makes vectors interchangeable.

        Blocks, wiring, names and shapes, and the values of frozen blocks, which all others have
        been trained with.
        """
        layout = [
            (b.name, b.kind, list(b.inputs), plain(b.parameters), plain(b.statistics),
             b.artifacts.parameters.sha256 if b.is_frozen else None)
            for b in self.blocks
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys: the same model gives the same bytes."""
        return json.dumps(plain(self), indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> ModelManifest:
        """Reads and checks a manifest of any origin.

        Raises:
            ModelError: It is too long, no JSON, of another format or inconsistent.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ModelError(f"the manifest has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"the manifest is no JSON: {error}") from error
        _check_format(value.get("format_version") if isinstance(value, dict) else None)
        try:
            manifest = read(cls, value, "manifest")
        except ValueError as error:
            raise ModelError(str(error)) from error
        _check_names(manifest)
        for block in manifest.blocks:
            _check_block(block)
        _check_wiring(manifest)
        _check_graphs(manifest)
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


def differentiated(blocks: Iterable[Block]) -> frozenset[str]:
    """The blocks that a gradient is needed of: they train, or something before them does.

    Args:
        blocks: In topological order.
    """
    names: set[str] = set()
    for block in blocks:
        if block.num_trainable or not names.isdisjoint(block.inputs):
            names.add(block.name)
    return frozenset(names)


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
    if len(data) != artifact.num_bytes:
        found, expected = f"{len(data)} bytes", f"{artifact.num_bytes}"
    else:
        found, expected = hashlib.sha256(data).hexdigest(), artifact.sha256
        if found == expected:
            return
        found, expected = f"sha256 {found[:12]}…", f"{expected[:12]}…"
    raise ModelError(
        f"artifact {artifact.path} is damaged or was swapped: {found}, the manifest says {expected}"
    )


def _check_known(kind: str, wanted: Collection[str], known: Collection[str]) -> None:
    unknown = sorted(set(wanted).difference(known))
    if unknown or not wanted:
        found = f"{kind} {unknown[0]!r}" if unknown else f"no {kind}"
        raise ModelError(f"found {found}, the model has {', '.join(known)}")


def _check_format(version: object) -> None:
    if version == FORMAT_VERSION:
        return
    advice = "export the model again"
    if type(version) is int and version > FORMAT_VERSION:
        advice = "install a newer petalfl"
    found = repr(version)[:40]
    raise ModelError(
        f"the manifest has format_version {found}, this petalfl reads {FORMAT_VERSION}: {advice}"
    )


def _check_names(manifest: ModelManifest) -> None:
    known = set(_RESERVED)
    for name in (*manifest.modalities, *(block.name for block in manifest.blocks)):
        if name in known:
            raise ModelError(f"block or modality {name}: the name is used twice or reserved")
        known.add(name)
    for name, modality in manifest.modalities.items():
        if (modality.dtype == "int64") != (modality.num_values is not None):
            raise ModelError(
                f"modality {name}: {modality.dtype} with num_values {modality.num_values}, "
                "expected them for int64 and for it alone"
            )
        if len(modality.ranges) != modality.shape.count(None):
            raise ModelError(f"modality {name}: {len(modality.ranges)} ranges for {modality.shape}")
    for name in manifest.private_blocks:
        if name not in {block.name for block in manifest.blocks}:
            raise ModelError(f"private block {name!r} is no block of the model")
    if missing := [name for name in OPTIMIZERS if name not in manifest.optimizers]:
        raise ModelError(f"optimizer {missing[0]} is missing, found {list(manifest.optimizers)}")
    _check_paths("the optimizers", OPTIMIZERS_FOLDER, manifest.optimizers.values())
    if manifest.state is not None and manifest.state.path != STATE_NAME:
        raise ModelError(f"state: path {manifest.state.path!r}, expected {STATE_NAME}")


def _check_block(block: Block) -> None:
    where = f"block {block.name}"
    names = [tensor.name for tensor in block.outputs]
    is_several = all(len(n) > len(block.name) + 1 and n.startswith(f"{block.name}.") for n in names)
    if not (names == [block.name] or is_several) or len(set(names)) < len(names):
        raise ModelError(f"{where}: outputs {names[:4]}, expected {block.name} or {block.name}.KEY")
    masks = [dropout.name for dropout in block.dropouts]
    if masks != [f"mask.{i}" for i in range(len(masks))]:
        raise ModelError(f"{where}: masks {masks[:4]}, expected mask.0, mask.1, …")
    if any(len(d.varying) != d.shape.count(None) for d in block.dropouts):
        raise ModelError(f"{where}: a mask's varying axes do not fit its shape")
    for shape in (*(t.shape for t in block.outputs), *(d.shape for d in block.dropouts)):
        if math.prod(dim or 1 for dim in shape) > MAX_BLOCK_SIZE:
            raise ModelError(f"{where}: a tensor of shape {shape} is too large for a device")
    if (block.task is not None) != (block.kind == "head"):
        raise ModelError(f"{where}: expected a task of heads, and of them alone")
    if block.task is not None:
        _check_task(block, block.task)
    _check_vector(block)
    _check_paths(where, block.name, (*block.artifacts.graphs, block.artifacts.parameters))


def _check_task(block: Block, task: Task) -> None:
    if len(block.outputs) != 1:
        raise ModelError(f"block {block.name}: {len(block.outputs)} outputs, a head has one")
    shape = block.outputs[0].shape
    if task.loss == "cross_entropy" and (len(shape) != 1 or (shape[0] or 0) < 2):
        raise ModelError(f"block {block.name}: outputs of {shape}, expected (num_classes,)")
    if task.class_names and len(task.class_names) != (shape[-1] if shape else 1):
        raise ModelError(
            f"block {block.name}: {len(task.class_names)} class names for outputs of {shape}"
        )


def _check_vector(block: Block) -> None:
    names = [tensor.name for tensor in block.tensors]
    if len(set(names)) != len(names):
        raise ModelError(f"block {block.name}: two tensors of one name in {names[:6]}")
    total = sum(tensor.size for tensor in block.tensors)
    if total != block.size:
        raise ModelError(f"block {block.name}: size {block.size}, its tensors have {total}")
    if block.artifacts.parameters.num_bytes != 4 * block.size:
        raise ModelError(
            f"block {block.name}: initial values of {block.artifacts.parameters.num_bytes} bytes, "
            f"expected {4 * block.size}"
        )
    if not block.size and not block.is_frozen:
        raise ModelError(f"block {block.name}: is_frozen is false, and there is nothing to train")
    trainable = 0 if block.is_frozen else sum(p.size for p in block.parameters)
    if block.num_trainable != trainable:
        raise ModelError(
            f"block {block.name}: num_trainable {block.num_trainable}, expected {trainable}"
        )


def _check_paths(where: str, folder: str, artifacts: Iterable[Artifact]) -> None:
    for artifact in artifacts:
        found, _, file = artifact.path.partition("/")
        if found != folder or not re.fullmatch(r"\w[\w.]{0,63}", file, re.ASCII):
            raise ModelError(f"{where}: path {artifact.path!r} leads out of {folder}/")


def _check_wiring(manifest: ModelManifest) -> None:
    """Encoder chains by modality, then at most one fusion of them all, then the heads."""
    kinds = [block.kind for block in manifest.blocks]
    if (
        kinds != sorted(kinds, key=("encoder", "fusion", "head").index)
        or kinds.count("fusion") > 1
        or "head" not in kinds
    ):
        raise ModelError(
            f"expected encoders, then at most one fusion, then heads; found {kinds[:6]}"
        )
    ends = {modality: modality for modality in manifest.modalities}  # of the chains, so far
    fused: tuple[str, ...] = ()
    for block in manifest.blocks:
        if block.kind == "encoder":
            modality = _extended(block, ends)
            ends[modality] = block.name
            is_named = block.name.endswith(f"-{modality}")
        else:
            _check_joins(block, fused or tuple(ends.values()), manifest)
            is_named = block.name == block.kind
            is_named |= block.kind == "head" and block.name.startswith("head-")
        if not is_named:
            raise ModelError(
                f"block {block.name}: expected the name STAGE-MODALITY of an encoder, fusion, "
                "head or head-TASK"
            )
        fused = (block.name,) if block.kind == "fusion" else fused
    if len(manifest.heads) > 1 and "head" in {block.name for block in manifest.blocks}:
        raise ModelError("block head: expected head-TASK where there are several heads")
    for block in manifest.blocks:
        if block.is_personal:
            _check_personal(block, manifest.heads)


def _check_personal(block: Block, heads: Mapping[str, Block]) -> None:
    """A personal head is as the one beside it, but for its values."""
    head = heads.get(block.label_task)
    if head is None or head.task is None or block.task is None:
        raise ModelError(f"block {block.name}: it personalizes {block.label_task!r}, no task")
    is_twin = replace(block.task, personalizes=None, weight=head.task.weight) == head.task
    shapes = [[tensor.shape for tensor in one.outputs] for one in (block, head)]
    if block.name != f"{head.name}-personal" or not is_twin or shapes[0] != shapes[1]:
        raise ModelError(
            f"block {block.name}: expected {head.name}-personal, with {head.name}'s task and output"
        )
    if head.task.loss not in PERSONAL_LOSSES:
        raise ModelError(f"block {block.name}: a personal head cannot have loss {head.task.loss}")


def _extended(encoder: Block, ends: dict[str, str]) -> str:
    """The modality whose chain this encoder goes on with."""
    for modality, end in ends.items():
        if encoder.inputs == (end,):
            return modality
    raise ModelError(
        f"block {encoder.name}: takes {list(encoder.inputs)[:4]}, expected one modality without "
        "an encoder yet, or the last stage of an encoder before it"
    )


def _check_joins(block: Block, expected: tuple[str, ...], manifest: ModelManifest) -> None:
    if bare := sorted(manifest.modalities.keys() & set(expected)):
        raise ModelError(f"modality {bare[0]}: no encoder takes it")
    if sorted(block.inputs) != sorted(expected):
        raise ModelError(
            f"block {block.name}: takes {list(block.inputs)[:4]}, expected {list(expected)[:4]}"
        )


def _check_graphs(manifest: ModelManifest) -> None:
    """Every graph that training needs is there, and none that it must not run."""
    reached = differentiated(manifest.blocks)
    if not reached:
        raise ModelError("no block trains: all are frozen or without parameters")
    for block in manifest.blocks:
        has_own_pass = block.kind != "head" and not block.is_frozen
        for graph, is_needed in (
            ("training_forward", has_own_pass),
            ("training_backward", block.name in reached),
        ):
            if (getattr(block.artifacts, graph) is not None) != is_needed:
                need = "needs a" if is_needed else "needs no"
                raise ModelError(f"block {block.name}: {need} {graph}")
