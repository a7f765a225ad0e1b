from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.android_sim.regimes import REGIMES, assign_modalities

ACC, GYRO, BOTH = ("acc",), ("gyro",), ("acc", "gyro")
SHARES: dict[str, dict[tuple[str, ...], float]] = {
    "complete": {BOTH: 1.0},
    "incomplete": {ACC: 0.3, GYRO: 0.3, BOTH: 0.4},
    "exclusive": {ACC: 0.5, GYRO: 0.5},
}
OF_TEN: dict[str, dict[tuple[str, ...], int]] = {
    "complete": {BOTH: 10},
    "incomplete": {ACC: 3, GYRO: 3, BOTH: 4},
    "exclusive": {ACC: 5, GYRO: 5},
}

any_regime = st.sampled_from(REGIMES)
any_seed = st.integers(0, 2**32)


def test_the_regimes() -> None:
    assert REGIMES == ("complete", "incomplete", "exclusive")


@given(st.integers(1, 20), any_regime, any_seed)
def test_multiples_of_ten_are_exact(tens: int, regime: str, seed: int) -> None:
    counts = Counter(assign_modalities(10 * tens, regime, seed))
    assert counts == {kind: tens * count for kind, count in OF_TEN[regime].items()}


@given(st.integers(1, 300), any_regime, any_seed)
def test_shares_are_kept_within_one_device(num_devices: int, regime: str, seed: int) -> None:
    counts = Counter(assign_modalities(num_devices, regime, seed))
    assert sum(counts.values()) == num_devices
    for kind in (ACC, GYRO, BOTH):
        assert abs(counts[kind] - num_devices * SHARES[regime].get(kind, 0.0)) < 1
    assert counts.keys() <= SHARES[regime].keys()


@given(st.integers(1, 100), any_regime, any_seed)
def test_the_seed_decides(num_devices: int, regime: str, seed: int) -> None:
    assert assign_modalities(num_devices, regime, seed) == assign_modalities(
        num_devices, regime, seed
    )


@pytest.mark.parametrize("regime", ["incomplete", "exclusive"])
def test_seeds_shuffle(regime: str) -> None:
    assert len({tuple(assign_modalities(20, regime, seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize(
    ("num_devices", "regime", "expected"),
    [
        (1, "incomplete", {BOTH: 1}),
        (2, "incomplete", {ACC: 1, BOTH: 1}),  # shares 0.6, 0.6, 0.8: ties go to the first
        (3, "incomplete", {ACC: 1, GYRO: 1, BOTH: 1}),
        (4, "incomplete", {ACC: 1, GYRO: 1, BOTH: 2}),
        (7, "exclusive", {ACC: 4, GYRO: 3}),
    ],
)
def test_largest_remainder(
    num_devices: int, regime: str, expected: dict[tuple[str, ...], int]
) -> None:
    assert Counter(assign_modalities(num_devices, regime, 0)) == expected


def test_other_modalities() -> None:
    assigned = assign_modalities(10, "incomplete", 3, modalities=("audio", "image"))
    assert Counter(assigned) == {("audio",): 3, ("image",): 3, ("audio", "image"): 4}


def test_unknown_regime() -> None:
    with pytest.raises(
        ValueError, match="regime is 'partial', expected one of complete, incomplete, exclusive"
    ):
        assign_modalities(10, "partial", 0)


@pytest.mark.parametrize("num_devices", [0, -3])
def test_no_devices(num_devices: int) -> None:
    with pytest.raises(ValueError, match=f"num_devices is {num_devices}, expected at least 1"):
        assign_modalities(num_devices, "complete", 0)
