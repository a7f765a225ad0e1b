"""What is compared: the paper's schemes, the controls, and ideas of our own.

A scheme says what is shared, with which settings, and how a device makes the model its own after
the last round. All have the same rounds, local settings and rate schedule.

What needs a change of the SDK or the server is not here: fusion shared among devices with the
same modalities (the server averages a block over all its holders), class prototypes that align
encoders (a loss on embeddings), and modality dropout by batch (`train` takes one set of
modalities).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from petalfl.local_model import LocalModel
from petalfl.training import Hyperparameters
from petalfl.vectors import Vector

from .examples import Examples, hold_out
from .simulation import train_alone

PROXIMAL_MU = 0.1
CANDIDATE_EPOCHS = (0, 1, 3, 10)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class OwnData(NamedTuple):
    """What a device has.

    Attributes:
        every: All that it may learn from.
        rounds: Of it, what it trains on in the rounds.
        held_out: What it has kept out of them to choose by; overlaps with nothing of ``rounds``.
    """

    every: Examples
    rounds: Examples
    held_out: Examples | None = None

    @classmethod
    def split(cls, train: Examples, share: float) -> OwnData:
        """Holds out the last of every class, if ``share`` is above 0 and a class has several."""
        if not share or np.bincount(train.labels).max() < 2:
            return cls(train, train)
        return cls(train, *hold_out(train, share))

    def only(self, modalities: Sequence[str]) -> OwnData:
        """The same seen through fewer sensors."""
        held_out = None if self.held_out is None else self.held_out.only(modalities)
        return OwnData(self.every.only(modalities), self.rounds.only(modalities), held_out)


class Finish(NamedTuple):
    """How devices finish.

    Attributes:
        hyperparameters: At the finish's own rate.
        epochs: Of the plain finish.
        shared: The blocks that others have trained as well.
        seed: Of a generator, the same for every try.
    """

    hyperparameters: Hyperparameters
    epochs: int
    shared: frozenset[str]
    seed: tuple[int, ...]

    def train(self, model: LocalModel, examples: Examples, epochs: int, mu: float) -> LocalModel:
        """Trains on these examples; ``mu`` pulls shared blocks back to where they are."""
        if not epochs:
            return model
        settings = replace(self.hyperparameters, epochs=epochs, proximal_mu=mu)
        return train_alone(model, examples, settings, np.random.default_rng(self.seed), self.shared)


Personalize: TypeAlias = Callable[[LocalModel, OwnData, Finish], LocalModel]


@dataclass(frozen=True, slots=True)
class Scheme:
    """One row of the study.

    Attributes:
        about: One line for `--list`.
        shares: What the server shares: ``fm``, ``ph``, ``phf``, ``local``, or what the model says.
        server_optimizer: Instead of the cell's.
        grouping: Who takes part in one federation: all ``devices``; each pool of the devices with
            the same modalities (``pooled``); or one federation for each modality (``unimodal``).
        warm_up: In this share of the rounds, the first ones, everything is shared; what is
            private afterwards starts from there.
        modality_dropout: The share of rounds in which a device with several modalities trains
            with one of them, drawn anew.
        held_out: The share of its training examples that a device keeps out of the rounds.
        personalize: What it does after the last round.
        has_personal_head: The model has one.
        has_scaffold: Control variates take the drift out of the shared blocks' steps.
    """

    about: str
    shares: str
    personalize: Personalize
    server_optimizer: str = ""
    grouping: Literal["devices", "pooled", "unimodal"] = "devices"
    warm_up: float = 0.0
    modality_dropout: float = 0.0
    held_out: float = 0.0
    has_personal_head: bool = False
    has_scaffold: bool = False


def fine_tune(model: LocalModel, data: OwnData, finish: Finish) -> LocalModel:
    """The finish that every scheme of the paper and every control has: a few slow epochs."""
    return finish.train(model, data.every, finish.epochs, mu=0.0)


def stop_early(model: LocalModel, data: OwnData, finish: Finish) -> LocalModel:
    """As many epochs, pulled to the global blocks, as are best on what was held out.

    The epochs are chosen without what is held out, and then trained with it.

    Source:
        The pull: Li et al. 2020 (FedProx), arXiv:1812.06127, and Ditto, arXiv:2012.04221.
    """
    if data.held_out is None:
        return fine_tune(model, data, finish)
    tried = {
        epochs: _loss(finish.train(model, data.rounds, epochs, PROXIMAL_MU), data.held_out)
        for epochs in CANDIDATE_EPOCHS
    }
    best = min(tried, key=lambda epochs: tried[epochs])
    return finish.train(model, data.every, best, PROXIMAL_MU)


def interpolate(model: LocalModel, data: OwnData, finish: Finish) -> LocalModel:
    """Between the global and the device's own blocks, block by block as is best on held-out data.

    The own ones come of the plain finish. Blocks are chosen one after another, encoders first.

    Source:
        Mixtures of local and global parameters: Deng et al. 2020 (APFL), arXiv:2003.13461.
    """
    if data.held_out is None:
        return fine_tune(model, data, finish)
    own = fine_tune(model, OwnData(data.rounds, data.rounds), finish)
    chosen: dict[str, float] = {}
    mixed = own
    for block in (b.name for b in model.held if b.name in finish.shared):
        tried = {share: _loss(_mixed(mixed, model, own, {block: share}), data.held_out)
                 for share in reversed(SHARES)}  # fmt: skip
        chosen[block] = min(tried, key=lambda share: tried[share])
        mixed = _mixed(mixed, model, own, {block: chosen[block]})
    final = fine_tune(model, data, finish)
    return _mixed(final, model, final, chosen)


def _mixed(
    onto: LocalModel, shared: LocalModel, own: LocalModel, shares: dict[str, float]
) -> LocalModel:
    """``onto`` with share · own + (1 − share) · shared in these blocks."""
    vectors: dict[str, Vector] = {
        name: (share * own.parameters[name] + (1 - share) * shared.parameters[name]).astype(
            np.float32
        )
        for name, share in shares.items()
    }
    return onto.with_parameters(vectors)


def _loss(model: LocalModel, examples: Examples) -> float:
    """Mean cross-entropy: smoother than a metric on few examples."""
    probabilities = model.predict_proba(examples.inputs)
    of_truth = probabilities[np.arange(len(examples)), examples.labels]
    return float(-np.log(np.maximum(of_truth, 1e-9)).mean())


SCHEMES: dict[str, Scheme] = {
    "fm": Scheme("the paper's full model: everything is shared", "fm", fine_tune),
    "ph": Scheme("the paper's private head", "ph", fine_tune),
    "phf": Scheme("the paper's private head and fusion", "phf", fine_tune),
    "local": Scheme("control: nothing is shared", "local", fine_tune),
    "centralized": Scheme(
        "control: the data of all devices with the same modalities in one place",
        "fm", fine_tune, grouping="pooled",
    ),
    "unimodal": Scheme(
        "control: a federation for each modality; a device averages their probabilities",
        "fm", fine_tune, grouping="unimodal",
    ),
    "fm-momentum": Scheme("server momentum per block", "fm", fine_tune, "momentum:0.5"),
    "phf-momentum": Scheme("server momentum per block", "phf", fine_tune, "momentum:0.5"),
    "phf-adam": Scheme("FedAdam per block", "phf", fine_tune, "adam:0.01"),
    "phf-early": Scheme(
        "a finish pulled to the global blocks, stopped early on held-out data",
        "phf", stop_early, "momentum:0.5", held_out=0.2,
    ),
    "fm-early": Scheme(
        "all shared; a finish pulled to the global blocks, stopped early on held-out data",
        "fm", stop_early, "momentum:0.5", held_out=0.2,
    ),
    "ph-warm": Scheme(
        "the private head starts from a shared one, after a third of the rounds",
        "ph", fine_tune, "momentum:0.5", warm_up=1 / 3,
    ),
    "fm-mix": Scheme(
        "all shared; then each block between global and own, as held-out data says",
        "fm", interpolate, "momentum:0.5", held_out=0.2,
    ),
    "fm-drop": Scheme(
        "multimodal devices train every second round with one modality",
        "fm", fine_tune, "momentum:0.5", modality_dropout=0.5,
    ),
    "two-heads": Scheme(
        "all shared, and a personal head beside the shared one; probabilities are the mean of both",
        "", fine_tune, "momentum:0.5", has_personal_head=True,
    ),
    "fm-scaffold": Scheme("SCAFFOLD's control variates", "fm", fine_tune, has_scaffold=True),
    "phf-scaffold": Scheme("SCAFFOLD's control variates", "phf", fine_tune, has_scaffold=True),
    "phf-drop": Scheme(
        "multimodal devices train every second round with one modality",
        "phf", fine_tune, "momentum:0.5", modality_dropout=0.5,
    ),
}  # fmt: skip


def find_scheme(name: str) -> Scheme:
    """By name.

    Raises:
        ValueError: There is none.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme {name!r}: expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def names_of(schemes: Collection[str]) -> str:
    """With what each is, one a line."""
    return "\n".join(f"{name:14} {SCHEMES[name].about}" for name in schemes)
