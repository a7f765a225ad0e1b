"""Writes the artifacts folder: every block's graphs, its initial values, and the manifest."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from petalfl.errors import ModelError
from petalfl.model import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Artifact,
    Artifacts,
    Block,
    Modality,
    ModelManifest,
    Parameter,
)
from petalfl.schema import NAME_REGEX

from .graph import BlockGraphs, build_graphs
from .law import check_one_step
from .model import BlockModel, encoder_name


def export_model(
    model: BlockModel, out: Path, progress: Callable[[str], None] = lambda block: None
) -> ModelManifest:
    """Exports every block, checks the one-step law, and moves the folder into place.

    Args:
        model: Its current parameters become the initial values.
        out: Made anew; an artifacts folder that is already there is replaced as a whole.
        progress: Told each block's name before its turn.

    Raises:
        ModelError: A block cannot be exported exactly, or ``out`` holds something else.
    """
    out = out.resolve()
    if (out.is_file() or (out.is_dir() and any(out.iterdir()))) and not _is_artifacts(out):
        raise ModelError(f"{out} holds something that is no artifacts folder; choose another place")
    _refuse_shared_parameters(model)
    _check_examples(model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ModelError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        manifest = _write(model, work, progress)
        progress("one-step law")
        check_one_step(model, work)
        work.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _is_artifacts(folder: Path) -> bool:
    """Whether a manifest of ours, of whatever version, is there: others have a manifest, too."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format_version", "modalities"} <= manifest.keys()


def _write(model: BlockModel, folder: Path, progress: Callable[[str], None]) -> ModelManifest:
    blocks: list[Block] = []
    outputs: dict[str, Tensor] = {}
    for modality, encoder in model.encoders.items():
        name = encoder_name(modality)
        progress(name)
        inputs = {modality: model.examples[modality]}
        graphs = build_graphs(name, encoder, inputs, _call, is_head=False, differentiate_by=())
        blocks.append(_write_block(folder, name, encoder, "encoder", (modality,), graphs))
        outputs[name] = graphs.output
    _check_embeddings(outputs)
    progress("fusion")
    graphs = _build_fusion(model, outputs)
    blocks.append(_write_block(folder, "fusion", model.fusion, "fusion", tuple(outputs), graphs))
    progress("head")
    graphs = build_graphs(
        "head", model.head, {"fusion": graphs.output}, _call, is_head=True,
        differentiate_by=("fusion",),
    )  # fmt: skip
    _check_logits(model, graphs.output)
    blocks.append(_write_block(folder, "head", model.head, "head", ("fusion",), graphs))
    return _write_manifest(model, folder, tuple(blocks))


def _call(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x)
    return result


def _build_fusion(model: BlockModel, embeddings: dict[str, Tensor]) -> BlockGraphs:
    modalities = list(model.encoders)

    def call(fusion: nn.Module, *inputs: Tensor) -> Tensor:
        *z, present = inputs
        result: Tensor = fusion(dict(zip(modalities, z, strict=True)), present)
        return result

    length = len(next(iter(embeddings.values())))
    inputs = embeddings | {"present": torch.ones(length, len(modalities))}
    return build_graphs(
        "fusion", model.fusion, inputs, call, is_head=False, differentiate_by=tuple(embeddings)
    )


def _write_block(
    folder: Path, name: str, module: nn.Module, kind: str, inputs: tuple[str, ...],
    graphs: BlockGraphs,
) -> Block:  # fmt: skip
    (folder / name).mkdir()
    return Block(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        inputs=inputs,
        output_shape=tuple(graphs.output.shape[1:]),
        size=graphs.parameters.size,
        parameters=tuple(Parameter(n, tuple(p.shape)) for n, p in module.named_parameters()),
        dropouts=graphs.dropouts,
        artifacts=Artifacts(
            training_model=_put(folder, f"{name}/training_model.onnx", graphs.training_model),
            eval_model=_put(folder, f"{name}/eval_model.onnx", graphs.eval_model),
            parameters=_put(
                folder, f"{name}/parameters.bin", graphs.parameters.astype("<f4").tobytes()
            ),
        ),
    )


def _put(folder: Path, path: str, data: bytes) -> Artifact:
    (folder / path).write_bytes(data)
    return Artifact(path, hashlib.sha256(data).hexdigest(), len(data))


def _write_manifest(model: BlockModel, folder: Path, blocks: tuple[Block, ...]) -> ModelManifest:
    manifest = ModelManifest(
        format_version=FORMAT_VERSION,
        name=model.name,
        modalities={
            modality: Modality(tuple(batch.shape[1:])) for modality, batch in model.examples.items()
        },
        blocks=blocks,
        loss="cross_entropy",
        num_classes=len(model.class_names),
        class_names=model.class_names,
        private_blocks=model.private_blocks,
    )
    data = manifest.to_json()
    (folder / MANIFEST_NAME).write_bytes(data)
    return ModelManifest.from_json(data)


def _refuse_shared_parameters(model: BlockModel) -> None:
    owners: dict[int, str] = {}
    for block, module in model.blocks():
        for path, parameter in module.named_parameters():
            owner = owners.setdefault(id(parameter), block)
            if owner != block:
                raise ModelError(
                    f"blocks {owner} and {block} share the parameter {path}; a block is trained "
                    "and averaged by itself, so give each its own"
                )


def _check_examples(model: BlockModel) -> None:
    for modality, batch in model.examples.items():
        if not re.fullmatch(NAME_REGEX, modality):
            raise ModelError(f"modality {modality!r} does not match {NAME_REGEX}")
        if batch.dtype != torch.float32:
            raise ModelError(
                f"modality {modality}: the example is {batch.dtype}, expected torch.float32"
            )


def _check_embeddings(outputs: dict[str, Tensor]) -> None:
    for name, z in outputs.items():
        if z.dim() != 2:
            raise ModelError(f"block {name}: output of shape {tuple(z.shape)}, expected (batch, d)")


def _check_logits(model: BlockModel, logits: Tensor) -> None:
    expected = (len(logits), len(model.class_names))
    if tuple(logits.shape) != expected:
        raise ModelError(
            f"block head: logits of shape {tuple(logits.shape)}, expected {expected} "
            f"for {expected[1]} class names"
        )
