"""What a device may download: the manifest, the files and the versions of blocks that it holds.

Paths are those of HTTP below the federation's own: ``manifest``, ``artifacts/{path}`` and
``blocks/{name}/{version}``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from petalfl.errors import PetalError
from petalfl.model import MANIFEST_NAME, OPTIMIZERS_FOLDER

from .federation import Federation
from .state import ServerState


class NotServedError(PetalError):
    """There is nothing at a path."""


class NotHeldError(PetalError):
    """It is of a block that the device does not hold."""


@dataclass(frozen=True, slots=True)
class File:
    """What is at a path.

    Attributes:
        source: Its bytes, or where they lie on disk.
        block: The shared block that it is a version of, or empty.
    """

    sha256: str
    num_bytes: int
    source: bytes | Path
    block: str = ""

    def read(self, start: int, end: int) -> bytes | memoryview:
        """Bytes ``[start, end)``; from memory without a copy.

        Raises:
            PetalError: The file on disk cannot be read, or has become shorter.
        """
        if isinstance(self.source, bytes):
            return memoryview(self.source)[start:end]
        try:
            with self.source.open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read(end - start)
        except OSError as error:
            raise PetalError(f"cannot read {self.source}: {error}") from error
        if len(data) != end - start:
            raise PetalError(f"{self.source} is shorter than the manifest says")
        return data


class Catalog:
    """The files of one federation."""

    def __init__(self, federation: Federation, state: ServerState) -> None:
        self._federation = federation
        self._state = state
        manifest = federation.manifest
        files = [
            *manifest.optimizers.values(),
            *(graph for block in manifest.blocks for graph in block.artifacts.graphs),
            *(block.artifacts.parameters for block in manifest.blocks),
        ]
        folder = federation.config.artifacts
        self._artifacts = {
            one.path: File(one.sha256, one.num_bytes, folder / one.path) for one in files
        }
        data = (folder / MANIFEST_NAME).read_bytes()
        self._manifest = File(hashlib.sha256(data).hexdigest(), len(data), data)

    async def find(self, device: str, path: str) -> File:
        """What is at ``path``, for a device; an operator is the device "", which holds every block.

        Raises:
            NotServedError: There is nothing.
            NotHeldError: The device does not hold its block.
            StateError: An old version is damaged.
        """
        kind, _, rest = path.partition("/")
        if path == "manifest":
            return self._manifest
        if kind == "artifacts":
            return self._find_artifact(device, rest)
        if kind == "blocks":
            return await self._find_version(device, rest)
        raise NotServedError("a path begins with manifest, artifacts or blocks")

    def sent(self, device: str, file: File, num_bytes: int) -> None:
        """Counts traffic of blocks."""
        if device and file.block:
            self._federation.on_bytes_down(device, file.block, num_bytes)

    def _find_artifact(self, device: str, path: str) -> File:
        file = self._artifacts.get(path)
        if file is None:
            raise NotServedError("no such artifact in the manifest")
        folder = path.partition("/")[0]
        if folder != OPTIMIZERS_FOLDER:  # which are everybody's
            self._check_holds(device, folder)
        return file

    async def _find_version(self, device: str, rest: str) -> File:
        name, _, version = rest.partition("/")
        if not re.fullmatch("[0-9]{1,15}", version):
            raise NotServedError("a block's version is a number")
        self._check_holds(device, name)
        body = await self._federation.shared.body(name, int(version))
        if body is None:
            raise NotServedError(f"no version {int(version)} of a shared block {name!r}")
        return File(body.sha256, len(body.data), body.data, name)

    def _check_holds(self, device: str, block: str) -> None:
        if not device:
            return
        modalities = self._state.modalities(device) or []
        held = self._federation.manifest.blocks_for(modalities)
        if block not in {b.name for b in held}:
            raise NotHeldError(f"device {device} does not hold block {block}")
