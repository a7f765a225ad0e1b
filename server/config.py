"""The server's configuration: one frozen value, made by the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from petalfl.errors import PetalError
from petalfl.model import ModelManifest
from petalfl.training import Hyperparameters

from .schedules import ScheduleName


class ConfigError(PetalError):
    """A setting that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class Config:
    """How one federation is run.

    Attributes:
        num_rounds: 0: until stopped.
        min_devices: A round opens when so many devices are ready.
        deadline_s: A round closes after that time with what has arrived.
        private_blocks: These never leave a device.
        server_momentum: Of the server optimizer, per block; 0 is plain FedAvg.
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
    server_momentum: float
    seed: int


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
