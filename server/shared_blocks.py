"""The shared blocks of a federation and their newest versions, as they are served."""

from __future__ import annotations

import asyncio
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
from .state import NewVersion, ServerState, StateError, StoredVersion

log = logging.getLogger("petalfl.server")

MAX_OLD_BYTES = 64 << 20  # of older versions in memory; or the one asked for last


class Body(NamedTuple):
    """A version as it is served."""

    data: bytes
    sha256: str


class NextVersion(NamedTuple):
    """A version that is written, and how it will be served."""

    stored: StoredVersion
    body: Body


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
        self._bodies: dict[str, Body] = {}
        self._reading = asyncio.Lock()
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
            stored = state.stored_version(block, state.newest_versions()[name])
            self._install(name, stored.version, _read_body(stored))

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

    def newest(self, name: str) -> Body:
        """The newest version of a shared block."""
        return self._bodies[name]

    async def body(self, name: str, version: int) -> Body | None:
        """A version's float32 vector as bytes; None where there is none such.

        Of older versions, those asked for last are in memory; others are read from disk, one
        after another, on a thread.

        Raises:
            StateError: An older one is damaged.
        """
        if not self._is_kept(name, version):
            return None
        if version == self.pointers[name].version:
            return self.newest(name)
        if (name, version) not in self._old:
            async with self._reading:
                if (name, version) not in self._old and not await self._read_old(name, version):
                    return None
        body = self._old.pop((name, version))
        self._keep_old(name, version, body)
        return body

    def _is_kept(self, name: str, version: int) -> bool:
        if name not in self.blocks or version > self.pointers[name].version:
            return False
        return version >= self._state.oldest_version(name)

    async def _read_old(self, name: str, version: int) -> bool:
        """Whether it is in memory from now on: it may have been pruned meanwhile."""
        stored = self._state.stored_version(self.blocks[name], version)
        try:
            self._keep_old(name, version, await asyncio.to_thread(_read_body, stored))
        except StateError:
            if self._is_kept(name, version):
                raise
            return False
        return True

    def _keep_old(self, name: str, version: int, body: Body) -> None:
        self._old[name, version] = body
        while len(self._old) > 1 and sum(len(b.data) for b in self._old.values()) > MAX_OLD_BYTES:
            del self._old[next(iter(self._old))]

    def newest_stored(self, name: str) -> StoredVersion:
        """Where the newest version of a shared block lies."""
        return self._state.stored_version(self.blocks[name], self.pointers[name].version)

    def make_next(
        self, base: StoredVersion, delta: Vector, optimizer: ServerOptimizer
    ) -> NextVersion | None:
        """Writes what an optimizer makes of a block; None where that would not be finite.

        Private tensors keep their initial values, whatever a device may have sent there. It may
        be called on whatever thread.

        Raises:
            StateError: The disk does not read or write.
        """
        block = base.block
        before, state = base.read()
        delta = withhold(block, self._private_tensors, delta)
        with np.errstate(over="ignore", invalid="ignore"):
            parameters, state = step(optimizer, block, before, delta, state)
        parameters = put_back(
            block, private_values(block, self._private_tensors, before), parameters
        )
        if not all(np.isfinite(array).all() for array in (parameters, *state.values())):
            log.error(
                "block %s keeps version %d: the next would not be finite", block.name, base.version
            )
            return None
        stored = self._state.write_version(NewVersion(block, base.version + 1, parameters, state))
        return NextVersion(stored, _body_of(parameters))

    def install(self, made: NextVersion) -> BlockVersion:
        """Serves a version that the state has from now on."""
        return self._install(made.stored.block.name, made.stored.version, made.body)

    def _install(self, name: str, version: int, body: Body) -> BlockVersion:
        self._bodies[name] = body
        self.pointers[name] = BlockVersion(version, body.sha256)
        return self.pointers[name]


def _body_of(parameters: Vector) -> Body:
    data = to_bytes(parameters)
    return Body(data, hashlib.sha256(data).hexdigest())


def _read_body(stored: StoredVersion) -> Body:
    return _body_of(stored.read()[0])
