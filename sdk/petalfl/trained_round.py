"""What a trained round makes of a device's state: the outbox, and what stays on the device."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from petalfl import wire
from petalfl.control_variates import own_control, with_sum
from petalfl.model import Block
from petalfl.private_tensors import private_values, withhold
from petalfl.store import Identity, Outgoing, Residual, State
from petalfl.training import TrainingResult
from petalfl.updates import make_update
from petalfl.vectors import Vector, to_bytes


@dataclass(frozen=True, slots=True)
class TrainedRound:
    """A round that has been trained.

    Attributes:
        identity: Says what may be shared; None: nothing.
        state: The device's, before the round.
        task: What the server asked for.
        before: By block: its vector when the round began.
        result: What training has made of that.
    """

    identity: Identity | None
    state: State
    task: wire.Task
    before: Mapping[str, Vector]
    result: TrainingResult

    def state_after(self, held: Iterable[Block], rng: np.random.Generator) -> State:
        """The device's state once the round counts, with its updates and report in the outbox.

        Args:
            held: The blocks that took part.
            rng: For codecs that round by lot.

        Raises:
            DataError: A delta is not finite.
        """
        task, state, vectors = self.task, self.state, self.result.parameters
        uploads = task.blocks if task.uploads is None else task.uploads
        names = self.identity.private_tensors if self.identity else ()
        outbox, residuals, controls = [], dict(state.residuals), {}
        private, tensors = dict(state.private), dict(state.private_tensors)
        for block in held:
            if block.name in uploads:
                if task.num_holders is not None:
                    controls[block.name] = to_bytes(self._next_control(block))
                update, left = self.make_update(block, rng)
                outbox.append(update)
                residuals.pop(block.name, None)
                residuals |= {} if left is None else {block.name: left}
            if not (block.is_frozen or self._is_shared(block)):
                private[block.name] = to_bytes(vectors[block.name])
            own = private_values(block, names, vectors[block.name])
            tensors |= {name: to_bytes(values) for name, values in own.items()}
        report = wire.Report(
            secrets.token_bytes(16), task.round_num, self.result.num_examples, self.result.loss
        )
        outbox.append(Outgoing(wire.encode(report), b""))
        return State(
            task.round_num, private, tuple(outbox), residuals, tensors, state.layout,
            state.controls, controls,
        )  # fmt: skip

    def make_update(
        self, block: Block, rng: np.random.Generator
    ) -> tuple[Outgoing, Residual | None]:
        """The one place where a block becomes something to send; refuses all but shared ones."""
        if self.identity is None or not self._is_shared(block):
            raise ValueError(f"block {block.name} is not shared: it cannot become an update")
        delta = self.result.parameters[block.name] - self.before[block.name]
        travelling = block
        if self.task.num_holders is not None:
            change = self._next_control(block) - own_control(block, self.state.controls)
            delta, travelling = np.concatenate([delta, change]), with_sum(block)
        kept = self.state.residuals.get(block.name)
        return make_update(
            travelling, self.task, self.result.num_examples, delta, kept, rng,
            self.identity.private_tensors,
        )  # fmt: skip

    def _is_shared(self, block: Block) -> bool:
        return self.identity is not None and self.identity.shares(block)

    def _next_control(self, block: Block) -> Vector:
        mean = self.result.mean_gradients.get(block.name)
        if mean is None or self.identity is None:
            return own_control(block, self.state.controls)
        return withhold(block, self.identity.private_tensors, mean)
