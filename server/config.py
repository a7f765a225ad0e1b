"""The configuration of one federation: one frozen value, made of its settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from petalfl.codecs import parse_codec
from petalfl.model import Block, ModelManifest
from petalfl.payloads import max_payload_bytes
from petalfl.schema import read
from petalfl.tls import Tls
from petalfl.training import Hyperparameters

from .options import BY_KEY, ConfigError, PerBlock
from .private_tensors import find_private_tensors
from .schedules import ScheduleName
from .settings import Setting, Settings
from .tls import ServerTls

__all__ = [
    "SCHEMES", "Config", "ConfigError", "PerBlock", "make_broker_tls", "make_config", "make_tls",
    "private_blocks",
]  # fmt: skip

Mode: TypeAlias = Literal["sync", "async"]


@dataclass(frozen=True, slots=True)
class Config:
    """How one federation is run.

    Attributes:
        num_rounds: 0: until stopped.
        min_devices: The first round opens when so many devices are ready, and in mode sync every
            round.
        deadline_s: Nobody waits longer for a device that has a task.
        private_blocks: These never leave a device.
        private_tensors: Nor do these, ``BLOCK/TENSOR``, of the shared blocks.
        mode: sync: all blocks step together when their cohort has reported; async (FedBuff, per
            block): each block steps when its buffer is full, and nobody waits for anybody.
        selection: Who of those ready is in the cohort, as `parse_selection` reads it.
        cohort_size: The reports that close a round; 0: those of all that were asked.
        over_selection: So many times as many devices are asked as are waited for.
        quorum: A block with updates of fewer devices keeps its version.
        buffer_size: In mode async: the updates that make up a block's next version; several of
            one device count, where the quorum is met.
        max_staleness: In mode async: an update's base may be so many versions old.
        keep_versions: Of each block, the newest that stay on disk.
        max_upload_bytes: A device sends the blocks that this has room for; 0: all of them.
        codec: What devices encode their updates with, as `parse_codec` reads it.
        aggregator: As `parse_aggregator` reads it; the other rules likewise.
        max_update_norm: A longer update of a block is scaled down to it; 0: never.
        has_scaffold: Blocks travel with control variates.
        is_deterministic: Updates are kept, and aggregated by device: the same bits in every run.
        fine_tuning: What devices do after the last round, each alone; None: nothing.
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
    private_tensors: tuple[str, ...] = ()
    mode: Mode = "sync"
    selection: str = "all"
    cohort_size: int = 0
    over_selection: float = 1.0
    quorum: PerBlock = field(default_factory=lambda: PerBlock(1))
    buffer_size: PerBlock = field(default_factory=lambda: PerBlock(10))
    max_staleness: int = 20
    keep_versions: int = 20
    max_upload_bytes: int = 0
    codec: str = "f32"
    aggregator: str = "weighted-mean"
    server_optimizer: str = "sgd"
    weighting: str = "examples"
    max_update_norm: float = 0.0
    has_scaffold: bool = False
    is_deterministic: bool = False
    fine_tuning: Hyperparameters | None = None

    @property
    def is_async(self) -> bool:
        """Whether blocks step one by one."""
        return self.mode == "async"

    def num_enough(self, num_asked: int) -> int:
        """The reports that close a synchronous round."""
        enough = math.ceil(num_asked / self.over_selection)
        return min(enough, self.cohort_size) if self.cohort_size else enough


def make_config(name: str, settings: Settings, manifest: ModelManifest) -> Config:
    """The configuration that a federation's settings make for a model.

    Raises:
        ConfigError: Some setting is impossible, by itself or next to another.
    """
    value = {key: setting.value for key, setting in settings.items()}
    if value["schedule"] == "cosine" and not value["rounds"]:
        raise ConfigError(
            f"{_label('schedule', settings)} cosine needs --rounds; choose --schedule constant"
        )
    private, hyperparameters = _private(settings, manifest), _hyperparameters(settings)
    config = Config(
        artifacts=value["artifacts"],
        data_dir=value["data_dir"],
        federation=name,
        private_blocks=private,
        private_tensors=_private_tensors(settings, _shared(manifest, private)),
        num_rounds=value["rounds"],
        min_devices=value["min_devices"],
        deadline_s=value["deadline"],
        hyperparameters=hyperparameters,
        schedule=value["schedule"] or ("cosine" if value["rounds"] else "constant"),
        seed=value["seed"],
        server_optimizer=_server_optimizer(settings, manifest),
        has_scaffold=value["scaffold"],
        is_deterministic=value["deterministic"],
        fine_tuning=_fine_tuning(
            hyperparameters, _finish_epochs(settings, manifest), value["finish_rate"]
        ),
        **{key: value[key] for key in _AS_THEY_ARE},
    )
    _check(config, settings, manifest)
    return config


_AS_THEY_ARE = (
    "mode", "selection", "cohort_size", "over_selection", "quorum", "buffer_size",
    "max_staleness", "keep_versions", "max_upload_bytes", "codec", "aggregator",
    "weighting", "max_update_norm",
)  # fmt: skip


def _check(config: Config, settings: Settings, manifest: ModelManifest) -> None:
    shared = _shared(manifest, config.private_blocks)
    for key in ("quorum", "buffer_size"):
        known = {block.name for block in shared}
        if unknown := sorted(settings[key].value.by_block.keys() - known):
            raise ConfigError(f"{_label(key, settings)}: {unknown[0]!r} is no shared block")
    if config.is_async and not shared:
        raise ConfigError(f"{_label('mode', settings)}: async needs a block that is shared")
    if config.is_async and config.selection != "all":
        raise ConfigError(
            f"{_label('selection', settings)}: there is none in mode async, where every ready "
            "device has a task"
        )
    if config.has_scaffold:
        _check_scaffold(config, settings)
    codec = parse_codec(config.codec)
    smallest = min((max_payload_bytes(codec, block) for block in shared), default=0)
    if 0 < config.max_upload_bytes < smallest:
        raise ConfigError(
            f"{_label('max_upload_bytes', settings)}: found {config.max_upload_bytes}, the "
            f"smallest shared block has {smallest}"
        )


def _check_scaffold(config: Config, settings: Settings) -> None:
    """Control variates are sums over all devices, which must hold what these have sent."""
    for key, is_wrong, reason in (
        (
            "mode",
            config.is_async,
            "updates of other versions than the newest have no place in them",
        ),
        ("aggregator", config.aggregator != "weighted-mean", "a sum has no defense"),
        ("max_update_norm", config.max_update_norm > 0, "a sum has no defense"),
        ("quorum", config.quorum != PerBlock(1), "what is dropped would be missing in the sum"),
    ):
        if is_wrong:
            raise ConfigError(
                f"{_label('scaffold', settings)}: not with {_label(key, settings)} "
                f"{settings[key].value}: {reason}"
            )


PERSONAL_OPTIMIZER, PERSONAL_FINISH_EPOCHS = "momentum:0.5", 30  # docs/results.md: two-heads


def _server_optimizer(settings: Settings, manifest: ModelManifest) -> str:
    """``server_momentum`` is short for an optimizer."""
    beta, named = settings["server_momentum"], settings["server_optimizer"]
    if not beta.value:
        is_open = (beta.source, named.source) == ("default", "default")
        if is_open and manifest.personal_heads and settings["mode"].value == "sync":
            return PERSONAL_OPTIMIZER
        return str(named.value)
    if named.source != "default":
        raise ConfigError(
            f"{_label('server_momentum', settings)}: the server optimizer is {named.value} already"
        )
    try:
        return str(BY_KEY["server_optimizer"].read(f"momentum:{beta.value}"))
    except ValueError as error:
        raise ConfigError(f"{_label('server_momentum', settings)}: {error}") from error


def _hyperparameters(settings: Settings) -> Hyperparameters:
    """By the schema that the devices' tasks are read with."""
    known: dict[str, Any] = {f.name: settings[f.name].value for f in fields(Hyperparameters)}
    if not known["learning_rate"]:
        raise ConfigError(f"{_label('learning_rate', settings)}: found 0, expected more than 0")
    try:
        return read(Hyperparameters, known, "-")
    except ValueError as error:
        name, _, reason = str(error).removeprefix("-.").partition(":")
        raise ConfigError(f"{_label(name, settings)}:{reason}") from error


def _finish_epochs(settings: Settings, manifest: ModelManifest) -> int:
    epochs = settings["finish_epochs"]
    if epochs.source == "default" and manifest.personal_heads:
        return PERSONAL_FINISH_EPOCHS
    return int(epochs.value)


def _fine_tuning(
    hyperparameters: Hyperparameters, epochs: int, rate: float
) -> Hyperparameters | None:
    """As the rounds, at a share of their rate, without what is about rounds and shared blocks."""
    if not epochs:
        return None
    return replace(
        hyperparameters, learning_rate=rate * hyperparameters.learning_rate, epochs=epochs,
        proximal_mu=0.0, max_steps=0, method="fedsim",
    )  # fmt: skip


def _label(key: str, settings: Settings) -> str:
    """What a message calls a setting: by the flag or variable, or by its file or default."""
    source = settings.get(key, Setting(None, "default")).source
    if source.startswith(("--", "PETALFL_")):
        return source
    return f"--{BY_KEY[key].name}" if source == "default" else f"{source}: {key}"


def make_tls(settings: Settings) -> ServerTls | None:
    """The server's own certificate, if it has one; its files are usable.

    Raises:
        ConfigError: They are not, or there is a key or an authority without a certificate.
    """
    if settings["tls_cert"].value is None:
        for key in ("tls_key", "tls_client_ca"):
            if settings[key].value is not None:
                raise ConfigError(f"{_label(key, settings)} needs a certificate: --tls-cert FILE")
        return None
    tls = ServerTls(*(settings[key].value for key in ("tls_cert", "tls_key", "tls_client_ca")))
    try:
        tls.context()
    except ValueError as error:
        raise ConfigError(f"{_label('tls_cert', settings)}: {error}") from error
    return tls


def make_broker_tls(settings: Settings) -> Tls | None:
    """What the server trusts and shows at its broker; None: nothing is said of it.

    Raises:
        ConfigError: A file is not usable.
    """
    files = [settings[key].value for key in ("broker_ca", "broker_cert", "broker_key")]
    if files == [None, None, None]:
        return None
    tls = Tls(*files)
    try:
        tls.context()
    except ValueError as error:
        raise ConfigError(f"the broker's TLS: {error}") from error
    return tls


SCHEMES = ("fm", "ph", "phf", "local", "personal")
_LONG_NAMES = {"full-model": "fm", "private-head": "ph", "private-head-fusion": "phf"}


def private_blocks(scheme: str, manifest: ModelManifest) -> tuple[str, ...]:
    """The blocks that a sharing scheme keeps on the devices.

    ``fm`` (full-model) shares all, ``ph`` (private-head) keeps the heads, ``phf``
    (private-head-fusion) keeps heads and fusion, ``local`` shares nothing, ``personal`` all but
    personal heads, which always stay; the empty string is the manifest's own default. Frozen
    blocks are not among them: they are nobody's to keep.

    Raises:
        ConfigError: There is no such scheme; or it is ``personal``, and the model has no such head.

    Source:
        BLOSSOM, arXiv:2603.27552.
    """
    kept: dict[str, tuple[str, ...]] = {
        "fm": (),
        "ph": ("head",),
        "phf": ("fusion", "head"),
        "local": ("encoder", "fusion", "head"),
        "personal": (),
    }
    short = _LONG_NAMES.get(scheme, scheme)
    if short and short not in kept:
        raise ConfigError(f"unknown scheme {scheme!r}, expected one of {', '.join(SCHEMES)}")
    if short == "personal" and not manifest.personal_heads:
        raise ConfigError(
            "scheme personal: the model has no personal head; export it with "
            "BlockModel(…, personal_head=True)"
        )
    return tuple(
        block.name
        for block in manifest.blocks
        if not block.is_frozen
        and (
            block.is_personal
            or (block.kind in kept[short] if short else block.name in manifest.private_blocks)
        )
    )


def _private(settings: Settings, manifest: ModelManifest) -> tuple[str, ...]:
    """By a list of blocks, or by a scheme."""
    scheme, listed = settings["scheme"].value, settings["private_blocks"].value
    if not listed:
        return private_blocks(scheme, manifest)
    if scheme:
        raise ConfigError(
            f"{_label('private_blocks', settings)}: there is a scheme, too; choose one of them"
        )
    trainable = [block.name for block in manifest.blocks if not block.is_frozen]
    if unknown := [name for name in listed if name not in trainable]:
        raise ConfigError(
            f"{_label('private_blocks', settings)}: {unknown[0]!r} is no block of the model that "
            f"trains; those are {', '.join(trainable)}"
        )
    personal = {head.name for head in manifest.personal_heads.values()}
    return tuple(name for name in trainable if name in {*listed, *personal})


def _private_tensors(settings: Settings, shared: Sequence[Block]) -> tuple[str, ...]:
    try:
        return find_private_tensors(settings["private_tensors"].value, shared)
    except ValueError as error:
        raise ConfigError(f"{_label('private_tensors', settings)}: {error}") from error


def _shared(manifest: ModelManifest, private: Collection[str]) -> list[Block]:
    return [b for b in manifest.blocks if not b.is_frozen and b.name not in private]
