"""Artifacts again, with trained values where the initial ones were."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from petalfl.engine import OrtEngine
from petalfl.errors import ModelError
from petalfl.model import MANIFEST_NAME, Artifact, Block, ModelManifest
from petalfl.reference import REFERENCE_NAME, take_reference
from petalfl.runtime import find_runtime
from petalfl.vectors import Vector, to_bytes

from .artifacts import foreign_file, move_into_place
from .weights import Progress, StrPath, Weights, newest_weights


def warm_start(
    artifacts: StrPath,
    out: StrPath,
    *,
    weights: StrPath,
    token: str = "",
    federation: str = "default",
    progress: Progress = lambda done, total: None,
) -> dict[str, Weights]:
    """Writes an artifacts folder that is the same but for its blocks' initial values.

    A federation that serves it starts from these: its shared blocks, and every device's private
    ones. The reference steps are taken anew.

    Args:
        artifacts: The folder that the model was exported to.
        out: Made anew; an artifacts folder that is already there is replaced as a whole.
        weights: A server's data folder, or the URL of a running server.
        token: Its join token, with a URL.
        federation: Its name on that server.
        progress: Told the blocks downloaded and their total.

    Returns:
        By block, its values and where they are from; what nobody shares stays as it was.

    Raises:
        PetalError: Something is missing, damaged or of another model; ``out`` is ``artifacts``, or
            holds something else. Nothing is written.
    """
    artifacts, out = Path(artifacts), Path(out).resolve()
    manifest = ModelManifest.load(artifacts)
    if out == artifacts.resolve():
        raise ModelError(f"{out} is what the values are to go into; choose another place")
    if foreign := foreign_file(out):
        raise ModelError(f"{out} holds something that is no artifacts folder ({foreign})")
    found = newest_weights(artifacts, manifest, weights, token, federation, progress)
    vectors = {name: value.vector for name, value in found.items()}
    try:
        _write(artifacts, out, manifest, vectors)
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror}") from error
    return {block.name: found[block.name] for block in manifest.blocks}


def _write(
    artifacts: Path, out: Path, manifest: ModelManifest, vectors: Mapping[str, Vector]
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shutil.copytree(artifacts, work, dirs_exist_ok=True)
        blocks = tuple(
            block if block.is_frozen else _with_values(work, block, vectors[block.name])
            for block in manifest.blocks
        )
        data = replace(manifest, blocks=blocks).to_json()
        (work / MANIFEST_NAME).write_bytes(data)
        warm = ModelManifest.from_json(data)
        reference = take_reference(OrtEngine(work), warm, work, str(find_runtime()))
        (work / REFERENCE_NAME).write_bytes(reference.to_json())
        move_into_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _with_values(folder: Path, block: Block, vector: Vector) -> Block:
    data, path = to_bytes(vector), block.artifacts.parameters.path
    (folder / path).write_bytes(data)
    made = Artifact(path, hashlib.sha256(data).hexdigest(), len(data))
    return replace(block, artifacts=replace(block.artifacts, parameters=made))
