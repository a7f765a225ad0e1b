"""The shared blocks of a federation and their newest versions, as they are served."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from petalfl.control_variates import without_sum
from petalfl.model import Block, ModelManifest, read_artifact
from petalfl.private_tensors import private_values, put_back, withhold
from petalfl.vectors import Vector, from_bytes, to_bytes
from petalfl.wire import BlockVersion

from .optimizers import ServerOptimizer, step
from .state import NewVersion, ServerState

log = logging.getLogger("petalfl.server")

MAX_OLD_BYTES = 64 << 20  # of older versions in memory; or the one asked for last


class Body(NamedTuple):
    """A version as it is served."""

    data: bytes
    sha256: str


class SharedBlocks:
    """Starts from the newest versions in the state, or from the artifacts' initial values.

    Attributes:
        blocks: Those that are neither private nor frozen, by name.
        pointers: Their newest versions.

    Raises:
        ModelError: An artifact is damaged.
        StateError: A version is.
    """

    def __init__(
        self,
        state: ServerState,
        manifest: ModelManifest,
        artifacts: Path,
        private_blocks: Collection[str],
        private_tensors: Collection[str] = (),
    ) -> None:
        self.blocks: dict[str, Block] = {
            block.name: block
            for block in manifest.blocks
            if not block.is_frozen and block.name not in private_blocks
        }
        self.pointers: dict[str, BlockVersion] = {}
        self._bodies: dict[str, bytes] = {}
        self._old: dict[tuple[str, int], Body] = {}  # the one asked for last comes last
        self._manifest = manifest
        self._private_tensors = frozenset(private_tensors)
        self._state = state
        for name, block in self.blocks.items():
            initial = read_artifact(artifacts, block.artifacts.parameters)
            start = np.zeros(block.size, np.float32)
            own_size = without_sum(block).size
            start[:own_size] = from_bytes(initial, own_size)
            state.add_initial_version(block, start)
            version = state.newest_versions()[name]
            self._install(name, version, state.read_version(block, version)[0])

    @property
    def versions(self) -> dict[str, int]:
        """By name, the newest version."""
        return {name: pointer.version for name, pointer in self.pointers.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """By name, the floats of its vector."""
        return {name: block.size for name, block in self.blocks.items()}

    def held_with(
        self, modalities: Collection[str], tasks: Collection[str] | None = None
    ) -> frozenset[str]:
        """The shared blocks of a device; arguments and errors as of `ModelManifest.blocks_for`."""
        held = {block.name for block in self._manifest.blocks_for(modalities, tasks)}
        return frozenset(held & self.blocks.keys())

    def pointers_of(self, names: Collection[str]) -> dict[str, BlockVersion]:
        """The newest versions of some blocks, sorted by name."""
        return {name: self.pointers[name] for name in sorted(names)}

    def body(self, name: str, version: int) -> Body | None:
        """A version's float32 vector as bytes; None where there is none such.

        Of older versions, those asked for last are in memory; others are read from disk.
        """
        if name not in self.blocks:
            return None
        newest = self.pointers[name]
        if version == newest.version:
            return Body(self._bodies[name], newest.sha256)
        if not self._state.oldest_version(name) <= version < newest.version:
            return None
        body = self._old.pop((name, version), None) or self._read_body(name, version)
        self._keep_old(name, version, body)
        return body

    def _read_body(self, name: str, version: int) -> Body:
        data = to_bytes(self._state.read_version(self.blocks[name], version)[0])
        return Body(data, hashlib.sha256(data).hexdigest())

    def _keep_old(self, name: str, version: int, body: Body) -> None:
        self._old[name, version] = body
        while len(self._old) > 1 and sum(len(b.data) for b in self._old.values()) > MAX_OLD_BYTES:
            del self._old[next(iter(self._old))]

    def next_version(
        self, name: str, delta: Vector, optimizer: ServerOptimizer
    ) -> NewVersion | None:
        """What an optimizer makes of a block; None where that would not be finite.

        Private tensors keep their initial values, whatever a device may have sent there.
        """
        block, version = self.blocks[name], self.pointers[name].version
        before, state = self._state.read_version(block, version)
        delta = withhold(block, self._private_tensors, delta)
        with np.errstate(over="ignore", invalid="ignore"):
            parameters, state = step(optimizer, block, before, delta, state)
        parameters = put_back(
            block, private_values(block, self._private_tensors, before), parameters
        )
        if not all(np.isfinite(array).all() for array in (parameters, *state.values())):
            log.error("block %s keeps version %d: the next would not be finite", name, version)
            return None
        return NewVersion(block, version + 1, parameters, state)

    def install(self, new: NewVersion) -> BlockVersion:
        """Serves a version that the state has from now on."""
        return self._install(new.block.name, new.version, new.parameters)

    def _install(self, name: str, version: int, parameters: Vector) -> BlockVersion:
        body = to_bytes(parameters)
        pointer = BlockVersion(version, hashlib.sha256(body).hexdigest())
        self._bodies[name], self.pointers[name] = body, pointer
        return pointer
