"""The way back: one PyTorch or ONNX file of what the federation has trained."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from petalfl.errors import ModelError
from petalfl.files import write_atomic
from petalfl.model import ModelManifest

from .compose import compose
from .state import join_state, to_file
from .weights import Progress, StrPath, Weights, newest_weights, store_weights


def merge(
    artifacts: StrPath,
    to: StrPath,
    *,
    weights: StrPath | None = None,
    token: str = "",
    federation: str = "default",
    private: StrPath | None = None,
    modalities: Collection[str] | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Weights]:
    """Writes the whole model, with the newest values of its blocks.

    A block that neither ``weights`` nor ``private`` has keeps its initial values.

    Args:
        artifacts: The folder that the model was exported to.
        to: ``model.pt`` (or ``.pth``) for the ``state_dict`` of the class that was exported, or
            ``model.onnx`` for one inference graph: inputs by modality, outputs by task. Personal
            heads are in it with ``private`` alone, and of a model that was cut not in the former.
        weights: A server's data folder, or the URL of a running server.
        token: Its join token, with a URL.
        federation: Its name on that server.
        private: A device's store, for its private blocks and tensors, or for all its blocks where
            it has fine-tuned them. No client may have it open.
        modalities: Those that the ONNX graph takes; None means all.
        progress: Told the blocks downloaded and their total.

    Returns:
        By block, what was written and where it is from.

    Raises:
        PetalError: Something is missing, damaged or of another model. Nothing is written.
    """
    artifacts, to = Path(artifacts), Path(to)
    if to.suffix not in (".pt", ".pth", ".onnx"):
        raise ModelError(f"found {to.name!r}, expected a file that ends in .pt, .pth or .onnx")
    if to.suffix != ".onnx" and modalities is not None:
        raise ModelError(f"{to.name} is a state_dict of all modalities; only .onnx takes some")
    manifest = ModelManifest.load(artifacts)
    wanted = list(manifest.modalities if modalities is None else modalities)
    manifest.blocks_for(wanted)
    merged = newest_weights(artifacts, manifest, weights, token, federation, progress)
    if private is not None:
        merged |= store_weights(Path(private), manifest, merged)
    vectors = {name: value.vector for name, value in merged.items()}
    if to.suffix == ".onnx":
        if private is None:  # a personal head says nothing before a device has trained it
            kept = tuple(block for block in manifest.blocks if not block.is_personal)
            manifest = replace(manifest, blocks=kept)
        data = compose(artifacts, manifest, vectors, wanted).SerializeToString(deterministic=True)
    else:
        data = to_file(join_state(artifacts, manifest, vectors))
    _write(to, data)
    return {b.name: merged[b.name] for b in manifest.blocks}


def _write(to: Path, data: bytes) -> None:
    try:
        if to.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        write_atomic(to, data, mode=0o644)
    except OSError as error:
        with contextlib.suppress(OSError):
            to.with_name(f"{to.name}.tmp").unlink()
        raise ModelError(f"cannot write {to}: {error.strerror}") from error
