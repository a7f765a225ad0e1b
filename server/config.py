"""The server's configuration: one frozen value, made by the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from petalfl.errors import PetalError
from petalfl.model import ModelManifest
from petalfl.training import Hyperparameters

from .schedules import ScheduleName


class ConfigError(PetalError):
    """A setting that cannot be used; the message names it."""


Mode: TypeAlias = Literal["sync", "async"]


@dataclass(frozen=True, slots=True)
class PerBlock:
    """A number for every block, and others for some of them."""

    default: int
    by_block: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, block: str) -> int:
        """The number of this block."""
        return self.by_block.get(block, self.default)


@dataclass(frozen=True, slots=True)
class Config:
    """How one federation is run.

    Attributes:
        num_rounds: 0: until stopped.
        min_devices: The first round opens when so many devices are ready, and in mode sync every
            round.
        deadline_s: Nobody waits longer for a device that has a task.
        private_blocks: These never leave a device.
        mode: sync: all blocks step together when their cohort has reported; async (FedBuff, per
            block): each block steps when its buffer is full, and nobody waits for anybody.
        selection: Who of those ready is in the cohort, as `parse_selection` reads it.
        cohort_size: The reports that close a round; 0: those of all ready devices.
        over_selection: So many times as many devices are asked, and the slowest not waited for.
        quorum: A block with fewer updates keeps its version.
        buffer_size: In mode async: the updates that make up a block's next version.
        max_staleness: In mode async: an update's base may be so many versions old.
        max_upload_bytes: A device sends the blocks that this has room for; 0: all of them.
        aggregator: As `parse_aggregator` reads it; the other rules likewise.
        max_update_norm: A longer update of a block is scaled down to it; 0: never.
    """

    artifacts: Path
    data_dir: Path
    federation: str
    private_blocks: tuple[str, ...]
    num_rounds: int
    min_devices: int
    deadline_s: float
    hyperparameters: Hyperparameters
    schedule: ScheduleName
    seed: int
    mode: Mode = "sync"
    selection: str = "all"
    cohort_size: int = 0
    over_selection: float = 1.0
    quorum: PerBlock = PerBlock(1)
    buffer_size: PerBlock = PerBlock(10)
    max_staleness: int = 20
    max_upload_bytes: int = 0
    aggregator: str = "weighted-mean"
    server_optimizer: str = "sgd"
    weighting: str = "examples"
    max_update_norm: float = 0.0

    @property
    def is_async(self) -> bool:
        """Whether blocks step one by one."""
        return self.mode == "async"


SCHEMES = ("fm", "ph", "phf", "local")


def private_blocks(scheme: str, manifest: ModelManifest) -> tuple[str, ...]:
    """The blocks that a sharing scheme keeps on the devices.

    ``fm`` (full-model) shares all, ``ph`` (private-head) keeps the head, ``phf``
    (private-head-fusion) keeps head and fusion, ``local`` shares nothing; the empty string is
    the manifest's own default. Frozen blocks are not among them: they are nobody's to keep.

    Raises:
        ConfigError: There is no such scheme.

    Source:
        BLOSSOM, arXiv:2603.27552.
    """
    kept: dict[str, tuple[str, ...]] = {
        "fm": (),
        "ph": ("head",),
        "phf": ("fusion", "head"),
        "local": ("encoder", "fusion", "head"),
    }
    if scheme and scheme not in kept:
        raise ConfigError(f"unknown scheme {scheme!r}, expected one of {', '.join(SCHEMES)}")
    return tuple(
        block.name
        for block in manifest.blocks
        if not block.is_frozen
        and (block.kind in kept[scheme] if scheme else block.name in manifest.private_blocks)
    )
