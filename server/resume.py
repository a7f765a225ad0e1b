"""Taking up what a data folder holds: whose it is, and the round that is open in it."""

from __future__ import annotations

from typing import Any

from petalfl.model import ModelManifest

from .aggregators import Aggregator
from .config import Config, ConfigError
from .rounds import Round
from .shared_blocks import SharedBlocks
from .spill import Spill
from .state import ServerState
from .weighting import parse_weighting


def check_owner(state: ServerState, config: Config, manifest: ModelManifest) -> None:
    """Raises `ConfigError` where the folder was made for another model, sharing scheme or mode."""
    for key, value in (
        ("model layout", manifest.layout_sha256),
        ("private blocks", ",".join(sorted((*config.private_blocks, *config.private_tensors)))),
        ("mode", config.mode + " with control variates" * config.has_scaffold),
    ):
        stored = state.setting(key, value)
        if stored != value:
            raise ConfigError(
                f"the data folder {config.data_dir} was made for another {key} "
                f"({stored[:60]!r}, now {value[:60]!r}); choose another --data-dir"
            )


def round_from_journal(
    round_num: int,
    state: ServerState,
    shared: SharedBlocks,
    config: Config,
    aggregator: Aggregator[Any],
    deadline_s: float,
) -> Round:
    """A round as the state knows it; whoever is at work has time until ``deadline_s``."""
    since = 0 if config.is_async else round_num
    # Of every block its next version, with as much of a server optimizer, which has two moments.
    reserve_bytes = 3 * 4 * sum(block.size for block in shared.blocks.values())
    found = Round(
        round_num, shared.versions, shared.blocks, aggregator,
        weigh=parse_weighting(config.weighting),
        max_staleness=config.max_staleness if config.is_async else 0,
        max_norm=config.max_update_norm,
        is_deterministic=config.is_deterministic,
        new_keep=lambda: Spill(state.folder, state.mapped_payload, reserve_bytes).keep,
    )  # fmt: skip
    for device, assignment in state.newest_tasks(since).items():
        found.assign(device, assignment, deadline_s)
    for device, block, update_id in state.sent_updates(since):
        found.note(device, block, update_id)
    for update in state.unconsumed_updates(shared.blocks):
        found.buffer(update)
    for device, report in state.journaled_reports(since).items():
        found.report(device, report)
    return found
