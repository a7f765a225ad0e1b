"""What a device is told to do."""

from __future__ import annotations

from dataclasses import replace

from petalfl.wire import Task

from .config import Config
from .rounds import Assignment
from .schedules import learning_rate
from .shared_blocks import SharedBlocks


def make_task(
    assignment: Assignment,
    held: frozenset[str],
    shared: SharedBlocks,
    config: Config,
    round_num: int,
    codec: str,
) -> Task:
    """A device's assignment as a message, with the versions and the learning rate of now.

    Args:
        held: The shared blocks that the device holds: it trains them all.
        round_num: The server's open round, to which the learning rate belongs.
        codec: One that the device knows.
    """
    base = config.hyperparameters.learning_rate
    rate = learning_rate(config.schedule, base, round_num, config.num_rounds)
    return Task(
        round_num=assignment.round_num,
        num_rounds=0 if config.is_async else config.num_rounds,
        hyperparameters=replace(config.hyperparameters, learning_rate=rate),
        seed=config.seed,
        blocks=shared.pointers_of(held),
        codec=None if codec == "f32" else codec,  # nothing new to a device that knows no other
        uploads=None if assignment.blocks == held else tuple(sorted(assignment.blocks)),
    )
