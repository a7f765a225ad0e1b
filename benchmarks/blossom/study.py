"""Runs one cell: deals the data, runs the federations, finishes, and measures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from petalfl import metrics
from petalfl.callbacks import RoundInfo
from petalfl.local_model import LocalModel
from petalfl.model import ModelManifest
from petalfl.vectors import Vector
from server.config import private_blocks
from server.schedules import learning_rate

from .artifacts import with_values
from .cells import PROTOCOL, Cell
from .datasets import find_dataset
from .examples import Examples, Holding, concatenate
from .members import DROPOUT, FINISH, FRACTION, LOCAL, Member, deal, rng_of, seed_of
from .partitions import keep_fraction
from .schemes import Finish, Scheme, find_scheme
from .simulation import (
    Device,
    Outcome,
    make_config,
    run_federation,
    train_alone,
)

Scores = dict[str, float]  # macro_f1 and accuracy, in [0, 1]
UNSEEN_ROUNDS = (0, 1, 3, 10)
SECOND_STAGE = (
    1_000_000  # added to the seed, or its first rounds would shuffle as the first stage's
)


class Source(NamedTuple):
    """Where the blocks of somebody come from that took no part.

    Attributes:
        modalities: Those that it is about.
    """

    modalities: tuple[str, ...]
    artifacts: Path
    private: tuple[str, ...]
    shared: dict[str, Vector]


@dataclass(slots=True)
class Trained:
    """What the federations of a cell leave.

    Attributes:
        models: By member, the models whose probabilities it averages.
    """

    sources: list[Source] = field(default_factory=list)
    models: dict[str, list[LocalModel]] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    curve: dict[int, list[tuple[Scores, int]]] = field(default_factory=dict)

    def note(self, rounds: int, scores: Scores, num_examples: int) -> None:
        """One more score of a point of the curve."""
        self.curve.setdefault(rounds, []).append((scores, num_examples))


def run_cell(
    cell: Cell,
    artifacts: Path,
    folder: Path,
    on_round: Callable[[int], None] = lambda rounds: None,
) -> dict[str, Any]:
    """Runs a cell.

    Args:
        artifacts: Of the data set's model with the initial values of the cell's seed.
        folder: Empty; for stores and the server's data, best in memory.
        on_round: Told the rounds done, of all federations one after another.

    Returns:
        Its line of the results: the cell, ``final`` after the last round, ``finished`` after the
        finish, the curve, the devices, and what unseen people get.

    Raises:
        PetalError: The data is absent, or training failed.
        ValueError: The cell asks for more devices or people than there are.
    """
    started_s = time.monotonic()
    members, unseen = deal(cell)
    with ExitStack() as stack:
        study = _Study(cell, artifacts, folder, stack, on_round)
        trained = study.train(members)
        trained_s = time.monotonic()
        final = {m.name: score(trained.models[m.name], m.test) for m in members}
        models = {m.name: study.finish(trained.models[m.name], m, trained) for m in members}
        finished = {m.name: score(models[m.name], m.test) for m in members}
        others = study.meet(unseen, trained)
    trained.curve[cell.rounds] = [(final[m.name], len(m.test)) for m in members]
    curve = [[n, *_mean(points).values()] for n, points in sorted(trained.curve.items())]
    sizes = [len(m.test) for m in members]
    return {
        "protocol": PROTOCOL,
        "cell": asdict(cell),
        "final": _mean(zip(final.values(), sizes, strict=True)),
        "finished": _mean(zip(finished.values(), sizes, strict=True)),
        "curve": curve,  # rounds, macro_f1, accuracy
        "devices": {
            m.name: {
                "modalities": list(m.modalities),
                "num_train": len(m.data.every),
                "num_test": len(m.test),
                "final": final[m.name],
                "finished": finished[m.name],
                "bytes_up": trained.bytes_up.get(m.name, 0),
            }
            for m in members
        },
        "unseen": others,
        "seconds": round(time.monotonic() - started_s, 1),
        "seconds_in_rounds": round(trained_s - started_s, 1),
        "machine": machine(),
    }


def score(models: Sequence[LocalModel], test: Examples) -> Scores:
    """Of the mean of the models' probabilities, each from the modalities that it holds."""
    predicted = _probabilities(models, test).argmax(axis=1)
    return {
        "macro_f1": metrics.macro_f1(test.labels, predicted),
        "accuracy": metrics.accuracy(test.labels, predicted),
    }


class _Study:
    """One cell while it runs."""

    def __init__(
        self,
        cell: Cell,
        artifacts: Path,
        folder: Path,
        stack: ExitStack,
        on_round: Callable[[int], None],
    ) -> None:
        self.cell, self.scheme = cell, find_scheme(cell.scheme)
        self._artifacts, self._folder, self._stack = artifacts, folder, stack
        self._on_round = on_round
        self._num_folders = 0

    # Rounds

    def train(self, members: Sequence[Member]) -> Trained:
        """Runs the federations of the cell's scheme."""
        trained = Trained()
        if self.scheme.grouping == "unimodal":
            for modality in find_dataset(self.cell.dataset).modalities:
                seen = [m.only(modality) for m in members if modality in m.modalities]
                if seen:
                    self._train_together([[m] for m in seen], (modality,), trained)
        elif self.scheme.grouping == "pooled":
            kinds = list(dict.fromkeys(m.modalities for m in members))
            pools = [[m for m in members if m.modalities == kind] for kind in kinds]
            self._train_together(pools, self._modalities, trained)
        else:
            self._train_together([[m] for m in members], self._modalities, trained)
        return trained

    @property
    def _modalities(self) -> tuple[str, ...]:
        return find_dataset(self.cell.dataset).modalities

    def _train_together(
        self, pools: Sequence[Sequence[Member]], modalities: tuple[str, ...], trained: Trained
    ) -> None:
        """One federation, in which each pool is a device; in two stages where there is a warm-up.

        A pool of one member is that member.
        """
        artifacts = self._artifacts
        warm_up = round(self.cell.rounds * self.scheme.warm_up)
        if warm_up:
            outcome, _, _ = self._run(pools, artifacts, "fm", 0, warm_up, trained)
            artifacts = self._folder / "warm"
            with_values(self._artifacts, outcome.shared, artifacts)
        outcome, devices, private = self._run(
            pools, artifacts, self.scheme.shares, warm_up, self.cell.rounds - warm_up, trained
        )
        for pool, device in zip(pools, devices, strict=True):
            for member in pool:
                trained.models.setdefault(member.name, []).append(device.model)
        trained.sources.append(Source(modalities, artifacts, private, outcome.shared))

    def _run(
        self,
        pools: Sequence[Sequence[Member]],
        artifacts: Path,
        shares: str,
        rounds_before: int,
        num_rounds: int,
        trained: Trained,
    ) -> tuple[Outcome, list[Device], tuple[str, ...]]:
        cell, folder = self.cell, self._new_folder()
        private = private_blocks(shares, ModelManifest.load(artifacts))
        devices = [
            self._device(pool, pool is pools[0], folder, artifacts, private, rounds_before, trained)
            for pool in pools
        ]
        is_warm_up = rounds_before + num_rounds < cell.rounds
        config = make_config(
            artifacts,
            folder / "server",
            cell.hyperparameters,
            private_blocks=private,
            num_rounds=num_rounds,
            schedule="constant" if is_warm_up else cell.schedule,
            seed=cell.seed + (SECOND_STAGE if rounds_before else 0),
            server_optimizer=self.scheme.server_optimizer or cell.server_optimizer,
            codec=cell.codec,
            has_scaffold=self.scheme.has_scaffold,
        )
        outcome = run_federation(config, devices)
        for pool in pools:
            up = outcome.bytes_up[pool[0].name]
            for member in pool:
                total = trained.bytes_up.get(member.name, 0)
                trained.bytes_up[member.name] = total + up // len(pool)
        return outcome, devices, private

    def _device(
        self,
        pool: Sequence[Member],
        is_first: bool,
        folder: Path,
        artifacts: Path,
        private: Sequence[str],
        rounds_before: int,
        trained: Trained,
    ) -> Device:
        name = pool[0].name

        def on_round(info: RoundInfo) -> None:
            rounds = rounds_before + info.round_num - 1
            if is_first:
                self._on_round(rounds)
            if rounds % self.cell.eval_every == 0:
                for member in pool:
                    scores = score([device.model], member.test)
                    trained.note(rounds, scores, len(member.test))

        train = concatenate([member.data.rounds for member in pool])
        device = Device(name, folder / name, artifacts, private, train, on_round)
        self._stack.callback(device.close)
        if self.scheme.modality_dropout and len(train.inputs) > 1:
            _drop_modalities(device, self.scheme, rng_of(self.cell, DROPOUT, name))
        return device

    def _new_folder(self) -> Path:
        self._num_folders += 1
        folder = self._folder / str(self._num_folders)
        folder.mkdir(parents=True)
        return folder

    # What comes after the rounds

    def finish(
        self, models: Sequence[LocalModel], member: Member, trained: Trained
    ) -> list[LocalModel]:
        """A member's models as its own."""
        cell = self.cell
        rate = cell.finish_rate * cell.learning_rate
        settings = replace(cell.hyperparameters, learning_rate=rate)
        shared = frozenset(name for source in trained.sources for name in source.shared)
        seed = seed_of(cell, FINISH, member.name)
        finish = Finish(settings, cell.finish_epochs, shared, seed)
        finished = []
        for model in models:
            data = member.data.only(_known(model, member.test))
            finished.append(self.scheme.personalize(model, data, finish))
        return finished

    def meet(self, unseen: Sequence[Holding], trained: Trained) -> dict[str, dict[str, Scores]]:
        """Scores of unseen people, by modalities and local rounds; means over their test examples.

        On day one they have what is shared; what is private begins at its initial values.
        """
        if not unseen:
            return {}
        kinds = [*((modality,) for modality in self._modalities), self._modalities]
        return {"+".join(kind): self._meet_with(kind, unseen, trained) for kind in kinds}

    def _meet_with(
        self, modalities: tuple[str, ...], unseen: Sequence[Holding], trained: Trained
    ) -> dict[str, Scores]:
        found: dict[int, list[tuple[Scores, int]]] = {}
        for holding in unseen:
            rng = rng_of(self.cell, FRACTION, holding.name)
            train = keep_fraction(holding.train.only(modalities), self.cell.data_fraction, rng)
            test = holding.test.only(modalities)
            strangers = [
                (self._stranger(holding.name, source, own), own)
                for source in trained.sources
                if (own := train.only([m for m in modalities if m in source.modalities])).inputs
            ]
            for num_rounds in UNSEEN_ROUNDS:
                models = [
                    self._train_locally(model, own, num_rounds, holding.name)
                    for model, own in strangers
                ]
                found.setdefault(num_rounds, []).append((score(models, test), len(test)))
        return {str(n): _mean(scores) for n, scores in found.items()}

    def _stranger(self, name: str, source: Source, train: Examples) -> LocalModel:
        folder = self._new_folder()
        device = Device(name, folder, source.artifacts, source.private, train)
        self._stack.callback(device.close)
        device.keep(source.shared)
        return device.model

    def _train_locally(
        self, model: LocalModel, train: Examples, num_rounds: int, name: str
    ) -> LocalModel:
        """Rounds alone, on the same schedule as the others had, over their own length."""
        cell = self.cell
        for round_num in range(1, num_rounds + 1):
            rate = learning_rate(cell.schedule, cell.learning_rate, round_num, num_rounds)
            settings = replace(cell.hyperparameters, learning_rate=rate)
            rng = np.random.default_rng(seed_of(cell, LOCAL, name, round_num))
            model = train_alone(model, train, settings, rng)
        return model


def _drop_modalities(device: Device, scheme: Scheme, rng: np.random.Generator) -> None:
    """Has it train some rounds with one of its modalities; the server is not told."""
    train = device.train

    def drop() -> None:
        if rng.random() < scheme.modality_dropout:
            kept = [str(rng.choice(list(train.inputs)))]
            device.replace_data(train.only(kept))

    def restore() -> None:
        device.replace_data(train)

    device.before_round, device.after_round = drop, restore


def _known(model: LocalModel, examples: Examples) -> list[str]:
    """The modalities that the model has encoders of."""
    held = {model.manifest.modality_of(b) for b in model.held if b.kind == "encoder"}
    return [name for name in examples.inputs if name in held]


def _probabilities(models: Sequence[LocalModel], test: Examples) -> NDArray[np.float32]:
    found = [m.predict_proba(test.only(_known(m, test)).inputs) for m in models]
    mean: NDArray[np.float32] = np.mean(found, axis=0, dtype=np.float32)
    return mean


def _mean(scores: Iterable[tuple[Mapping[str, float], int]]) -> Scores:
    """Weighted by test examples, as the paper has it."""
    every = list(scores)
    total = sum(n for _, n in every)
    return {key: round(sum(s[key] * n for s, n in every) / total, 6) for key in every[0][0]}


def machine() -> dict[str, Any]:
    """Where this ran, and how busy it was."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown",
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
    }
