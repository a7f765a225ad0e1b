"""A cell of the study: one federation with one seed, by its whole configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.android_sim.regimes import REGIMES
from petalfl.codecs import parse_codec
from petalfl.schema import read
from petalfl.training import Hyperparameters
from server.optimizers import parse_optimizer
from server.schedules import ScheduleName

from .datasets import find_dataset
from .partitions import parse_partition
from .schemes import find_scheme

PROTOCOL = 1
"""Raised when a cell of the same configuration would come to other figures."""

MISSING, SCHEDULES = ("mask", "zero", "untrained"), ("constant", "cosine")


@dataclass(frozen=True, slots=True)
class Cell:
    """One run.

    Attributes:
        devices: 0: as many as are natural.
        rounds: Of one schedule; every scheme trains so many local epochs times ``epochs``.
        server_optimizer: Of the shared blocks, unless the scheme has its own.
        finish_epochs: After the last round every device trains so long on its own.
        finish_rate: The learning rate of that, as a share of the rounds' own.
        unseen: So many people are left out, to test on.
        eval_every: Rounds from one point of the curve to the next.

    Raises:
        ValueError: Something is impossible; says what, and what would do.
    """

    dataset: str
    regime: str
    scheme: str
    missing: str
    partition: str
    data_fraction: float
    seed: int
    rounds: int
    devices: int = 0
    optimizer: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-5
    batch_size: int = 16
    epochs: int = 1
    schedule: ScheduleName = "cosine"
    server_optimizer: str = "sgd"
    codec: str = "f32"
    finish_epochs: int = 30
    finish_rate: float = 0.1
    unseen: int = 0
    eval_every: int = 5

    def __post_init__(self) -> None:
        find_dataset(self.dataset)
        find_scheme(self.scheme)
        parse_partition(self.partition)
        _one_of("regime", self.regime, REGIMES)
        _one_of("missing", self.missing, MISSING)
        _one_of("schedule", self.schedule, SCHEDULES)
        _within("data fraction", self.data_fraction, 0, 1)
        _within("finish rate", self.finish_rate, 0, 1)
        for name in ("rounds", "eval_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("seed", "devices", "finish_epochs", "unseen"):
            _at_least(name, getattr(self, name), 0)
        for name, parse in (("server_optimizer", parse_optimizer), ("codec", parse_codec)):
            try:
                parse(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name.replace('_', ' ')}: {error}") from error
        self.hyperparameters  # noqa: B018 - refuses what no device would take
        if self.unseen and self.partition != "natural":
            raise ValueError(
                f"unseen {self.unseen} needs partition natural, found {self.partition}: dealt "
                "devices are nobody's"
            )

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The devices' own."""
        names = [f.name for f in dataclasses.fields(Hyperparameters)]
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return read(Hyperparameters, {**dataclasses.asdict(Hyperparameters(1.0)), **own}, "-")

    @property
    def key(self) -> str:
        """Equal where configuration and protocol are."""
        return json.dumps({"protocol": PROTOCOL, **dataclasses.asdict(self)}, sort_keys=True)

    @property
    def label(self) -> str:
        """In one line, for people."""
        parts = [self.dataset, self.regime, self.scheme, self.missing, self.partition]
        if self.data_fraction < 1:
            parts.append(f"{self.data_fraction:g} of the data")
        return f"{', '.join(parts)}, seed {self.seed}"


def grid(choices: Mapping[str, Sequence[Any]], **fixed: Any) -> list[Cell]:
    """The cells of all combinations, seed by seed, so that every scheme soon has a figure.

    ``missing`` makes no difference in regime complete: there only its first choice is run.
    """
    order = ("seed", "dataset", "partition", "data_fraction", "regime", "missing", "scheme")
    cells = [Cell(**combination, **fixed) for combination in _product(order, choices)]
    first = choices["missing"][0]
    return [c for c in cells if c.regime != "complete" or c.missing == first]


def _product(
    names: Sequence[str], choices: Mapping[str, Sequence[Any]]
) -> Iterable[dict[str, Any]]:
    if not names:
        yield {}
        return
    for value in choices[names[0]]:
        for rest in _product(names[1:], choices):
            yield {names[0]: value, **rest}


def _one_of(name: str, found: str, known: Sequence[str]) -> None:
    if found not in known:
        raise ValueError(f"{name} {found!r}: expected one of {', '.join(known)}")


def _within(name: str, found: float, low: float, high: float) -> None:
    if not low < found <= high:
        raise ValueError(f"{name} {found:g}: expected in ({low:g}, {high:g}]")


def _at_least(name: str, found: int, least: int) -> None:
    if found < least:
        raise ValueError(f"{name.replace('_', ' ')} {found}: expected at least {least}")
