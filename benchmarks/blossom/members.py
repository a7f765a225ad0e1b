"""The devices of a cell: whose data they have, how much of it, and through which sensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.android_sim.regimes import assign_modalities

from .cells import Cell
from .datasets import find_dataset, load, people
from .examples import Examples, Holding
from .partitions import keep_fraction, partition
from .schemes import OwnData, find_scheme

PARTITION, FRACTION, PEOPLE, DROPOUT, FINISH, LOCAL = range(6)  # streams of randomness


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the study: what it has, and what it is tested on."""

    name: str
    data: OwnData
    test: Examples

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of its data."""
        return tuple(self.test.inputs)

    def only(self, modality: str) -> Member:
        """The same with one sensor."""
        return Member(self.name, self.data.only([modality]), self.test.only([modality]))


def deal(cell: Cell) -> tuple[list[Member], list[Holding]]:
    """The devices of a cell, and those of the people that it leaves out.

    Raises:
        PetalError: The data is absent.
        ValueError: There are too few devices or people.
    """
    dataset, holdings = find_dataset(cell.dataset), load(cell.dataset)
    everybody = people(holdings)
    if cell.unseen >= len(everybody):
        raise ValueError(
            f"unseen {cell.unseen}: {cell.dataset} has {len(everybody)} people, and somebody "
            "must take part"
        )
    strangers = set(rng_of(cell, PEOPLE).permutation(everybody)[: cell.unseen].tolist())
    unseen = [h for h in holdings if h.person in strangers]
    known = [h for h in holdings if h.person not in strangers]
    dealt = partition(known, cell.partition, cell.devices, rng_of(cell, PARTITION))
    kinds = assign_modalities(len(dealt), cell.regime, cell.seed, dataset.modalities)
    scheme, rng = find_scheme(cell.scheme), rng_of(cell, FRACTION)
    members = []
    for holding, kind in zip(dealt, kinds, strict=True):
        train = keep_fraction(holding.train.only(kind), cell.data_fraction, rng)
        data = OwnData.split(train, scheme.held_out)
        members.append(Member(holding.name, data, holding.test.only(kind)))
    return members, unseen


def seed_of(cell: Cell, stream: int, *names: str | int) -> tuple[int, ...]:
    """Of a stream of randomness, for somebody or something."""
    text = "/".join(map(str, names))
    return (cell.seed, stream, *text.encode())


def rng_of(cell: Cell, stream: int, *names: str) -> np.random.Generator:
    """A generator of that seed."""
    return np.random.default_rng(seed_of(cell, stream, *names))
