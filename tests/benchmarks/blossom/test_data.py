from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.blossom import datasets, stress
from benchmarks.blossom.examples import (
    Examples,
    Holding,
    count_overlaps,
    hold_out,
    overlaps_with,
)
from benchmarks.blossom.partitions import (
    MIN_TEST,
    MIN_TRAIN,
    keep_fraction,
    parse_partition,
    partition,
)
from petalfl.errors import DataError
from tests.benchmarks.blossom.tiny_data import examples, holdings


@functools.cache
def load(name: str) -> list[Holding]:
    try:
        return datasets.load(name)
    except DataError as error:
        pytest.skip(str(error))


def samples(examples: Examples, modality: str) -> set[tuple[int, int]]:
    """Every sample of every example: slow, and independent of `count_overlaps`."""
    return {
        (int(recording), sample)
        for recording, begin, end in examples.spans[modality]
        for sample in range(begin, end)
    }


def identities(parts: list[Examples]) -> list[tuple[int, ...]]:
    return sorted(tuple(map(int, span)) for part in parts for span in part.spans["a"])


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_no_sample_is_in_training_and_test(name: str) -> None:
    found = load(name)
    assert len({holding.name for holding in found}) == len(found)
    for modality in datasets.DATASETS[name].modalities:
        train = set[tuple[int, int]]().union(*(samples(h.train, modality) for h in found))
        test = set[tuple[int, int]]().union(*(samples(h.test, modality) for h in found))
        assert train and test and not train & test


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_what_a_data_set_promises(name: str) -> None:
    dataset, found = datasets.DATASETS[name], load(name)
    for holding in found:
        for part in (holding.train, holding.test):
            assert tuple(part.inputs) == dataset.modalities
            assert set(part.labels) == set(range(len(dataset.class_names)))
            for array in part.inputs.values():
                assert array.dtype == np.float32 and len(array) == len(part)
                assert np.isfinite(array).all() and 0.05 < array.std() < 5
        assert 0.2 < len(holding.test) / (len(holding.train) + len(holding.test)) < 0.35


def test_images_of_digits_are_of_the_digit_that_is_heard() -> None:
    found = load("avdigits")
    seen: dict[int, int] = {}
    for holding in found:
        for part in (holding.train, holding.test):
            for (image, *_), label in zip(part.spans["image"], part.labels, strict=True):
                assert seen.setdefault(int(image), int(label)) == label


def test_data_that_is_not_there_says_where_it_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(datasets.DATA_VARIABLE, str(tmp_path))
    for name, source in (("avdigits", "free-spoken-digit-dataset"), ("stress", "Stress-Predict")):
        with pytest.raises(DataError, match=f"{source}.*{tmp_path}"):
            datasets.load(name)
    with pytest.raises(ValueError, match="dataset 'har': expected one of watch, avdigits, stress"):
        datasets.load("har")


def test_windows_of_stress_that_follow_one_another_are_one_recording() -> None:
    acc = np.arange(8 * 3, dtype=np.int8).reshape(8, 3)  # 8 half windows
    windows = np.stack([acc[i : i + 2] for i in (0, 1, 2, 4, 5)])
    subjects, labels = np.zeros(5, np.int16), np.array([0, 0, 1, 1, 1])
    recordings, starts_s = stress._recordings(windows, subjects, labels)
    assert recordings.tolist() == [0, 0, 1, 2, 2]
    assert starts_s.tolist() == [0, 15, 0, 0, 15]


def test_overlaps() -> None:
    a, b = examples(0, 0, 3), examples(0, 2, 3)
    assert count_overlaps(a, b) == 3  # the third of each class is the first of the other
    assert overlaps_with(a, b).tolist() == [False, False, True] * 3
    assert count_overlaps(a, examples(1, 0, 3)) == 0
    only_a = Examples(b.inputs, b.labels, {**b.spans, "b": b.spans["b"] + np.array([0, 100, 100])})
    assert count_overlaps(a, only_a) == 3  # one modality is enough
    with pytest.raises(ValueError, match="x: 3 pairs of a training and a test example"):
        Holding("x", "", a, b)


def test_what_is_held_out_overlaps_with_nothing_that_is_trained_on() -> None:
    every = examples(0, 0, 10)
    long = Examples(  # each two samples long: neighbors overlap
        every.inputs, every.labels, {m: s + np.array([0, 0, 1]) for m, s in every.spans.items()}
    )
    rest, held_out = hold_out(long, 0.2)
    assert np.bincount(held_out.labels).tolist() == [2, 2, 2]
    assert np.bincount(rest.labels).tolist() == [7, 7, 7]  # and one of each is in neither
    assert count_overlaps(rest, held_out) == 0
    with pytest.raises(ValueError, match="every class has a single example"):
        hold_out(examples(0, 0, 1), 0.2)


@given(
    how=st.sampled_from(["iid", "dirichlet:0.5", "dirichlet:5"]),
    num_devices=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_example_is_dealt_once(how: str, num_devices: int, seed: int) -> None:
    natural = holdings()
    dealt = partition(natural, how, num_devices, np.random.default_rng(seed))
    assert len({h.name for h in dealt}) == len(dealt) == num_devices
    for side in ("train", "test"):
        before = identities([getattr(h, side) for h in natural])
        assert identities([getattr(h, side) for h in dealt]) == before
    assert min(len(h.train) for h in dealt) >= MIN_TRAIN
    assert min(len(h.test) for h in dealt) >= MIN_TEST


def test_iid_deals_alike_and_dirichlet_does_not() -> None:
    def spread(how: str) -> float:
        dealt = partition(holdings(), how, 4, np.random.default_rng(3))
        counts = np.array([np.bincount(h.train.labels, minlength=3) for h in dealt])
        tests = np.array([np.bincount(h.test.labels, minlength=3) for h in dealt])
        np.testing.assert_allclose(counts / counts.sum(0), tests / tests.sum(0), atol=0.05)
        return float((counts / counts.sum(0)).std())

    assert spread("iid") == 0
    assert spread("dirichlet:0.5") > 0.1


def test_partitions_that_cannot_be() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="there are 8 natural devices, found 9 asked for"):
        partition(holdings(), "natural", 9, rng)
    with pytest.raises(ValueError, match="gives each of 30 devices 16 training"):
        partition(holdings(), "iid", 30, rng)
    for text in ("dirichlet", "dirichlet:0", "dirichlet:x", "dirichlet:inf", "Natural", ""):
        with pytest.raises(ValueError, match="expected natural, iid or dirichlet:ALPHA"):
            parse_partition(text)


@given(fraction=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_a_fraction_keeps_every_class(fraction: float, seed: int) -> None:
    every = examples(0, 0, 10)
    kept = keep_fraction(every, fraction, np.random.default_rng(seed))
    assert np.bincount(kept.labels).tolist() == [max(round(10 * fraction), 1)] * 3
    assert set(identities([kept])) <= set(identities([every]))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_a_fraction_is_one(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected in"):
        keep_fraction(examples(0, 0, 2), fraction, np.random.default_rng(0))
