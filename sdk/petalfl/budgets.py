"""What a client may use of its device: seconds and memory for a round, bytes for a day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from petalfl.errors import DataError
from petalfl.model import Block
from petalfl.training import Hyperparameters, min_batch

_ACTIVATIONS = 3  # times what a batch keeps for its backward pass; 2.0 to 2.5 were measured
_VECTORS = {"sgd": 8, "adamw": 10}  # of a block: before, now, gradient, new, anchor, moments


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits that a client keeps; None: there is none.

    Attributes:
        seconds: That the training of a round may take, rests not counted. Then it ends early: what
            was trained is sent, with the weight of the examples it has seen. Of fine-tuning, too.
        memory_bytes: That training may take on top of what is in memory before it, as
            `training_bytes` estimates. Batches are computed in so many parts that it suffices.
        bytes_per_day: Up and down together, in any 24 hours; of messages and bodies, without what
            HTTP, TLS and TCP add. Before a round for which there is no room the client goes
            offline, until there is; one that has begun goes to its end.

    Raises:
        ValueError: A limit is not above 0.
    """

    seconds: float | None = None
    memory_bytes: int | None = None
    bytes_per_day: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_bytes", "bytes_per_day"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"the budget of {name} is {value}, expected more than 0")


def training_bytes(held: Sequence[Block], optimizer: str, batch_size: int) -> int:
    """What a batch takes at its peak, estimated rather too high than too low.

    Of inputs whose length varies it is that of the example at export.
    """
    activations = _ACTIVATIONS * batch_size * sum(block.activation_bytes for block in held)
    return activations + _VECTORS[optimizer] * sum(4 * block.size for block in held)


def fit_memory(
    hyperparameters: Hyperparameters, held: Sequence[Block], memory_bytes: int
) -> Hyperparameters:
    """The same training, each batch in as few parts as the memory allows.

    Raises:
        DataError: The smallest part that the blocks can train on takes more.
    """
    h, smallest = hyperparameters, min_batch(held)
    most = max(1, h.batch_size // smallest)  # parts that training makes of a batch
    for num_parts in range(min(h.accumulation, most), most + 1):
        part = -(-h.batch_size // num_parts)
        if training_bytes(held, h.optimizer, part) <= memory_bytes:
            return replace(h, accumulation=max(num_parts, h.accumulation))
    least = -(-h.batch_size // most)
    needed = training_bytes(held, h.optimizer, least)
    raise DataError(
        f"training takes about {needed / 1e6:.1f} MB even with {least} examples at a time, the "
        f"budget is {memory_bytes / 1e6:.1f} MB"
    )
