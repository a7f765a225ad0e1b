"""Who has which examples: natural devices, or their data dealt anew; and less of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .examples import Examples, Holding, Indices, concatenate

MIN_TRAIN, MIN_TEST = 16, 4  # examples of a dealt device: a batch, and something to measure
MAX_DRAWS = 1000


def parse_partition(text: str) -> float | None:
    """The α of ``dirichlet:α``, infinity for ``iid``, None for ``natural``.

    Raises:
        ValueError: It is none of them.
    """
    if text == "natural":
        return None
    if text == "iid":
        return float("inf")
    name, _, alpha = text.partition(":")
    try:
        if name == "dirichlet" and 0 < float(alpha) < float("inf"):
            return float(alpha)
    except ValueError:
        pass
    raise ValueError(f"partition {text!r}: expected natural, iid or dirichlet:ALPHA, ALPHA above 0")


def partition(
    holdings: Sequence[Holding], how: str, num_devices: int, rng: np.random.Generator
) -> list[Holding]:
    """Deals the data of natural devices to others.

    Training and test examples are dealt apart, each device's with the same shares of the classes;
    so test examples share no sample with any training example.

    Args:
        how: As `parse_partition` reads it.
        num_devices: 0: as many as there are.

    Returns:
        With ``natural``, the first ``num_devices`` of ``holdings``.

    Raises:
        ValueError: There is too little data for so many devices, or ``how`` is malformed.

    Source:
        Dirichlet over labels: Hsu et al. 2019, arXiv:1909.06335, here with every example dealt out.
    """
    alpha = parse_partition(how)
    num_devices = num_devices or len(holdings)
    if num_devices < 1:
        raise ValueError(f"found {num_devices} devices, expected at least 1")
    if alpha is None:
        if num_devices > len(holdings):
            raise ValueError(
                f"there are {len(holdings)} natural devices, found {num_devices} asked for: "
                "choose another partition"
            )
        return list(holdings[:num_devices])
    train = concatenate([holding.train for holding in holdings])
    test = concatenate([holding.test for holding in holdings])
    classes = np.union1d(train.labels, test.labels)
    for _ in range(MAX_DRAWS):
        shares = _draw_shares(alpha, num_devices, len(classes), rng)
        dealt_train = _deal(train, classes, shares, rng)
        dealt_test = _deal(test, classes, shares, rng)
        if min(map(len, dealt_train)) >= MIN_TRAIN and min(map(len, dealt_test)) >= MIN_TEST:
            return [
                Holding(f"device-{number:02d}", "", train.take(ours), test.take(tests))
                for number, (ours, tests) in enumerate(
                    zip(dealt_train, dealt_test, strict=True), start=1
                )
            ]
    raise ValueError(
        f"partition {how}: of {MAX_DRAWS} draws none gives each of {num_devices} devices "
        f"{MIN_TRAIN} training and {MIN_TEST} test examples; choose fewer devices"
    )


def keep_fraction(examples: Examples, fraction: float, rng: np.random.Generator) -> Examples:
    """A random share of each class, at least one of each, in their order.

    Raises:
        ValueError: ``fraction`` is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"data fraction {fraction:g}: expected in (0, 1]")
    kept = []
    for label in np.unique(examples.labels):
        of_class = np.flatnonzero(examples.labels == label)
        kept.append(rng.permutation(of_class)[: max(round(fraction * len(of_class)), 1)])
    return examples.take(np.sort(np.concatenate(kept)))


def _draw_shares(
    alpha: float, num_devices: int, num_classes: int, rng: np.random.Generator
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Of each class, each device's share: ``(num_classes, num_devices)``, rows add up to 1."""
    if alpha == float("inf"):
        return np.full((num_classes, num_devices), 1 / num_devices)
    return rng.dirichlet([alpha] * num_devices, num_classes)


def _deal(
    examples: Examples,
    classes: Indices,
    shares: np.ndarray[tuple[int, int], np.dtype[np.float64]],
    rng: np.random.Generator,
) -> list[Indices]:
    """Each example to one device, each class by its row of ``shares``."""
    hands: list[list[Indices]] = [[] for _ in range(shares.shape[1])]
    for label, row in zip(classes, shares, strict=True):
        of_class = rng.permutation(np.flatnonzero(examples.labels == label))
        cuts = np.round(np.cumsum(row)[:-1] * len(of_class)).astype(int)
        for hand, part in zip(hands, np.split(of_class, cuts), strict=True):
            hand.append(part)
    return [np.sort(np.concatenate(hand)) for hand in hands]
