"""Where the values of a model's blocks come from: the artifacts, a server, or a device's store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from safetensors.numpy import load

from petalfl.control_variates import with_sum
from petalfl.errors import ModelError, StoreError
from petalfl.http import HttpClient
from petalfl.model import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Block,
    ModelManifest,
    read_artifact,
)
from petalfl.private_tensors import check_tensors, put_back
from petalfl.store import DeviceStore
from petalfl.vectors import Vector, from_bytes

_OPTIMIZER = "optimizer."  # before the names of the server's own, beside the block's tensors

Progress = Callable[[int, int], None]  # told what is done, and the total
StrPath: TypeAlias = str | os.PathLike[str]


class Weights(NamedTuple):
    """A block's vector; ``origin`` is where it is from, in words."""

    vector: Vector
    origin: str


def initial_weights(folder: Path, manifest: ModelManifest) -> dict[str, Weights]:
    """Of every block, as they were exported.

    Raises:
        ModelError: A file is missing or damaged.
    """
    return {
        block.name: Weights(
            _vector(block, read_artifact(folder, block.artifacts.parameters)), "artifacts"
        )
        for block in manifest.blocks
    }


def newest_weights(
    artifacts: Path,
    manifest: ModelManifest,
    weights: StrPath | None,
    token: str,
    federation: str,
    progress: Progress,
) -> dict[str, Weights]:
    """Of every block, the newest that there are; arguments and errors as of `export.merge`."""
    found = initial_weights(artifacts, manifest)
    if weights is None:
        return found
    if str(weights).startswith(("http://", "https://")):
        return found | server_weights(
            str(weights), manifest, token=token, federation=federation, progress=progress
        )
    return found | folder_weights(Path(weights), manifest)


def folder_weights(folder: Path, manifest: ModelManifest) -> dict[str, Weights]:
    """The newest versions in a server's data folder, or in its folder ``blocks``.

    Raises:
        ModelError: There are none, or they are of another model.
    """
    root = folder / "blocks" if (folder / "blocks").is_dir() else folder
    newest: dict[str, Path] = {}
    for path in root.glob("*/*.safetensors"):
        block = path.parent.name
        if path.stem.isdecimal() and (
            block not in newest or int(path.stem) > int(newest[block].stem)
        ):
            newest[block] = path
    if not newest:
        raise ModelError(
            f"no weights at {folder}: expected BLOCK/VERSION.safetensors, as in a server's data "
            "folder"
        )
    blocks = {block.name: block for block in manifest.blocks if not block.is_frozen}
    if foreign := sorted(newest.keys() - blocks.keys()):
        raise ModelError(
            f"the weights at {folder} are of another model: {foreign[0]} is none of its blocks "
            f"that train, {', '.join(blocks)}"
        )
    return {
        name: Weights(_read_safetensors(blocks[name], path), f"server, version {path.stem}")
        for name, path in newest.items()
    }


def server_weights(
    url: str,
    manifest: ModelManifest,
    *,
    token: str,
    federation: str = "default",
    progress: Progress = lambda done, total: None,
) -> dict[str, Weights]:
    """The newest versions that a running server has.

    Args:
        token: The join token.

    Raises:
        ModelError: The URL is malformed, or the server's model is another one.
        EnrollError: It does not accept the token.
        TransportError: It cannot be reached, or there is no such federation.
    """
    try:
        http = HttpClient(url)
    except ValueError as error:
        raise ModelError(str(error)) from error
    http.use_token(token)
    root = f"/v1/{federation}"
    theirs = ModelManifest.from_json(http.get(f"{root}/manifest", MAX_MANIFEST_BYTES))
    _check_same(f"the server {url}", theirs, manifest)
    found = http.get_json(f"{root}/blocks")
    blocks = {block.name: block for block in manifest.blocks if not block.is_frozen}
    if not isinstance(found, dict) or not found.keys() <= blocks.keys():
        raise ModelError(f"the server {url} sends no versions of this model's blocks")
    weights = {}
    for done, (name, value) in enumerate(found.items()):
        progress(done, len(found))
        version = _read_version(url, value)
        num_bytes = 4 * with_sum(blocks[name]).size
        body = http.get(f"{root}/blocks/{name}/{version}", num_bytes)
        if len(body) == num_bytes:  # with control variates at the end
            body = body[: 4 * blocks[name].size]
        weights[name] = Weights(_vector(blocks[name], body), f"server, version {version}")
    progress(len(found), len(found))
    return weights


def store_weights(
    folder: Path, manifest: ModelManifest, shared: Mapping[str, Weights]
) -> dict[str, Weights]:
    """What a device's store has of its own, as the device predicts with it.

    That is all its blocks where it has fine-tuned them after the last round, and else its private
    blocks, and blocks with private tensors.

    Args:
        shared: By block, what lies around private tensors.

    Raises:
        StoreError: There is no store, it is open or damaged, or it has nothing of its own.
        ModelError: They are of another model.
    """
    if not (folder / "identity.json").is_file():
        raise StoreError(f"{folder} is no device store: it has no identity.json")
    store = DeviceStore(folder)
    try:
        identity, state = store.read_identity(), store.read_state()
        data, fine_tuned = store.read_file(MANIFEST_NAME), store.read_fine_tuned()
    finally:
        store.close()
    if data is not None:
        _check_same(f"the device store {folder}", ModelManifest.from_json(data), manifest)
    blocks = {block.name: block for block in manifest.blocks if not block.is_frozen}
    own_model = fine_tuned.vectors if fine_tuned and fine_tuned.is_of(state) else {}
    if not state.private and not state.private_tensors and not own_model:
        raise StoreError(
            f"{folder} holds no private blocks and no fine-tuned ones: the device shares all, or "
            "has not trained yet"
        )
    check_tensors(manifest, state.private_tensors)
    if foreign := sorted((state.private.keys() | own_model.keys()) - blocks.keys()):
        raise StoreError(f"{folder} holds {foreign[0]}, which is no block of {manifest.name!r}")
    origin = f"device {identity.device}" if identity else "device"
    if own_model:
        origin += ", fine-tuned"
        return {name: Weights(_vector(blocks[name], own_model[name]), origin) for name in own_model}
    weights = {
        name: Weights(_vector(blocks[name], vector), origin)
        for name, vector in state.private.items()
    }
    own = {name: from_bytes(data, len(data) // 4) for name, data in state.private_tensors.items()}
    for name in {tensor.partition("/")[0] for tensor in own}:
        around = shared[name]
        vector = put_back(blocks[name], own, around.vector)
        weights[name] = Weights(vector, f"{around.origin}, private tensors of {origin}")
    return weights


def _check_same(where: str, theirs: ModelManifest, ours: ModelManifest) -> None:
    if theirs.layout_sha256 != ours.layout_sha256:
        raise ModelError(
            f"{where} has another model: {theirs.name!r} of blocks that differ from those of "
            f"{ours.name!r} in names, shapes or frozen values"
        )


def _vector(block: Block, data: bytes) -> Vector:
    try:
        return from_bytes(data, block.size)
    except ValueError as error:
        raise ModelError(f"block {block.name}: {error}") from error


def _read_version(url: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ModelError(f"the server {url} sends the version {value!r}")
    return value


def _read_safetensors(block: Block, path: Path) -> Vector:
    try:
        tensors = load(path.read_bytes())
    except Exception as error:  # safetensors has its own kinds
        raise ModelError(f"cannot read {path}: {error}") from error
    expected = {tensor.name: (tensor.shape, "float32") for tensor in block.tensors}
    found = {
        name: (array.shape, str(array.dtype))
        for name, array in tensors.items()
        if name in expected or not name.startswith(_OPTIMIZER)
    }
    if found != expected:
        name = next(n for n in found | expected if found.get(n) != expected.get(n))
        raise ModelError(
            f"{path} does not fit block {block.name}: tensor {name} is {found.get(name)}, "
            f"expected {expected.get(name)}"
        )
    vector = np.concatenate([tensors[t.name].ravel() for t in block.tensors])
    return _vector(block, vector.tobytes())
