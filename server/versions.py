"""Block versions as files: one safetensors each, which PyTorch users can open."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load, save

from petalfl.errors import PetalError
from petalfl.files import write_atomic
from petalfl.model import Block
from petalfl.vectors import Vector, to_bytes

from .optimizers import OptimizerState

OLDEST = "oldest version of "  # and a block: the setting that says from where on files are kept
_ORDER = "tensors"  # in the metadata: the block's own tensors as its vector has them
_OPTIMIZER = "optimizer."  # before the names of its state, which lie beside the parameters


class StateError(PetalError):
    """A data folder that is in use, belongs to another federation or cannot be written."""


class NewVersion(NamedTuple):
    """A block as a step leaves it, with its server optimizer's state."""

    block: Block
    version: int
    parameters: Vector
    optimizer_state: OptimizerState


class StoredVersion(NamedTuple):
    """A version's file, and the `checksum` of what was written to it."""

    block: Block
    version: int
    path: Path
    sha256: str

    def read(self) -> tuple[Vector, OptimizerState]:
        """The vector ``(size,)`` and optimizer state (empty before the block's first step).

        Raises:
            StateError: The file is missing or is not the one that was written.
        """
        vector, optimizer_state = read_version(self.path, self.block)
        if checksum(vector, optimizer_state) != self.sha256:
            raise StateError(f"{self.path} is damaged: its checksum is not the recorded one")
        return vector, optimizer_state


def version_path(folder: Path, block: str, version: int) -> Path:
    """Where a version lies in a data folder."""
    return folder / "blocks" / block / f"{version}.safetensors"


def write_version(folder: Path, new: NewVersion) -> Path:
    """Writes a version's file, as a whole or not at all; where.

    Raises:
        StateError: The disk refused.
    """
    path = version_path(folder, new.block.name, new.version)
    tensors, start = {}, 0
    for tensor in new.block.tensors:
        part = new.parameters[start : start + tensor.size]
        tensors[tensor.name] = part.reshape(tensor.shape)
        start += tensor.size
    tensors |= {_OPTIMIZER + name: array for name, array in new.optimizer_state.items()}
    try:
        path.parent.mkdir(exist_ok=True)
        order = json.dumps([tensor.name for tensor in new.block.tensors])
        write_atomic(path, save(tensors, {_ORDER: order}), mode=0o644)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error}") from error
    return path


def read_version(path: Path, block: Block) -> tuple[Vector, OptimizerState]:
    """The vector ``(size,)`` and optimizer state (empty before the block's first step).

    Raises:
        StateError: The file is missing or is no version of this block.
    """
    return _read(path, [tensor.name for tensor in block.tensors])


def read_any_version(path: Path) -> tuple[Vector, OptimizerState]:
    """As `read_version`, of whatever block the file says it is."""
    try:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        order = json.loads(header["__metadata__"][_ORDER])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(f"cannot read {path}: {error}") from error
    return _read(path, order)


def _read(path: Path, order: Sequence[str]) -> tuple[Vector, OptimizerState]:
    try:
        tensors = load(path.read_bytes())
        vector = np.concatenate([tensors[name].ravel() for name in order])
    except Exception as error:  # safetensors raises its own and KeyError
        raise StateError(f"cannot read {path}: {error}") from error
    optimizer_state = {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in tensors.items()
        if name.startswith(_OPTIMIZER) and name not in order
    }
    return vector, optimizer_state


def checksum(parameters: Vector, optimizer_state: OptimizerState) -> str:
    """The sha256 of a version's contents, whatever the file format makes of them."""
    digest = hashlib.sha256(to_bytes(parameters))
    for name, array in sorted(optimizer_state.items()):
        digest.update(f"{name} {array.shape}".encode() + to_bytes(array))
    return digest.hexdigest()
