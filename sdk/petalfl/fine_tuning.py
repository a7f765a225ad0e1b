"""The device's own model: what fine-tuning after the last round makes of all its blocks.

It lies beside the blocks of the rounds and never replaces them: a federation may go on after its
finish, and then starts from the server's shared blocks and the private ones of the last round.

Source:
    Wang et al. 2019, arXiv:1910.10252; Collins et al. 2022, arXiv:2205.13692.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from petalfl import wire
from petalfl.callbacks import Callbacks
from petalfl.errors import StoreError
from petalfl.model import Block
from petalfl.store import DeviceStore, FineTuned, State
from petalfl.vectors import Vector, from_bytes, to_bytes


def origin_of(task: wire.Task | wire.Finish) -> str:
    """The digest of versions, hyperparameters and seed; "" where no fine-tuning is asked for."""
    if not isinstance(task, wire.Finish) or task.hyperparameters is None:
        return ""
    plain = replace(task, blocks=dict(sorted(task.blocks.items())), num_holders=None)
    return hashlib.sha256(wire.encode(plain)).hexdigest()


class OwnModel:
    """The fine-tuned blocks, in memory and in the store.

    Attributes:
        vectors: By block; empty where there is no such model. Replaced, never changed.
    """

    def __init__(self, store: DeviceStore, callbacks: Callbacks) -> None:
        self._store, self._callbacks = store, callbacks
        self._origin = ""
        self.vectors: Mapping[str, Vector] = {}

    def load(self, state: State, held: Iterable[Block]) -> None:
        """Takes the store's, if it was made from this state; raises `StoreError`."""
        self._origin, self.vectors = "", {}
        kept = self._store.read_fine_tuned()
        if kept is None or not kept.is_of(state):
            return
        here = [block for block in held if block.name in kept.vectors]
        self.vectors = {b.name: from_bytes(kept.vectors[b.name], b.size) for b in here}
        self._origin = kept.origin

    def keep(self, origin: str, state: State, vectors: Mapping[str, Vector]) -> None:
        """Takes a new one; what the disk has no room for is made again after a restart."""
        self._origin, self.vectors = origin, vectors
        encoded = {name: to_bytes(vector) for name, vector in vectors.items()}
        try:
            made = FineTuned(origin, state.round_num, state.layout, encoded)
            self._store.write_fine_tuned(made)
        except StoreError as error:
            self._callbacks.survived(error)

    def drop_unless(self, origin: str) -> None:
        """Makes way for the blocks of the rounds, but where it is of that origin."""
        if origin and origin == self._origin:
            return
        self._origin, self.vectors = "", {}
        try:
            self._store.drop_fine_tuned()
        except StoreError as error:  # at a restart the state's round tells that it is old
            self._callbacks.survived(error)
