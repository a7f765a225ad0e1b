"""Tensors of shared blocks that stay on the devices: which, and what the server does about them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from petalfl.private_tensors import tensors_of
from server.config import ConfigError
from server.federation import Federation
from server.private_tensors import MAX_PRIVATE_TENSORS, find_private_tensors
from tests.server.builders import (
    INITIAL,
    Layout,
    Site,
    make_block,
    make_config,
    make_report,
    make_update,
    settle,
)

NORMED: Layout = {
    "encoder-acc": (
        "encoder",
        ("acc",),
        {"conv.weight": (2, 2), "0.weight": (2,), "0.bias": (2,), "late.bias": (2,)},
        {"0.running_mean": (2,), "0.running_var": (2,)},
    ),
    "encoder-gyro": (
        "encoder",
        ("gyro",),
        {"weight": (2,), "conv.weight": (3,)},
        {"running_mean": (2,), "conv.old_running_mean": (3,)},
    ),
    "fusion": ("fusion", ("encoder-acc", "encoder-gyro"), {"mix.weight": (2, 2)}),
    "head": ("head", ("fusion",), {"fc.weight": (2, 3), "fc.bias": (2,)}),
}  # fmt: skip
BLOCKS = [make_block(name, *rest)[0] for name, rest in NORMED.items()]
OF_ACC = [f"encoder-acc/0.{end}" for end in ("weight", "bias", "running_mean", "running_var")]


def test_where_tensors_lie() -> None:
    assert tensors_of(BLOCKS[0]) == {
        "encoder-acc/conv.weight": slice(0, 4),
        "encoder-acc/0.weight": slice(4, 6),
        "encoder-acc/0.bias": slice(6, 8),
        "encoder-acc/late.bias": slice(8, 10),
        "encoder-acc/0.running_mean": slice(10, 12),
        "encoder-acc/0.running_var": slice(12, 14),
    }


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["batch-norm"], [*OF_ACC, "encoder-gyro/weight", "encoder-gyro/running_mean"]),
        (["*/fc.bias"], ["head/fc.bias"]),
        (["head/fc.bias", "encoder-*/0.*"], [*OF_ACC, "head/fc.bias"]),
        (["encoder-acc/?.weight"], ["encoder-acc/0.weight"]),
        (["*.bias", "head/*bias"], ["encoder-acc/0.bias", "encoder-acc/late.bias", "head/fc.bias"]),
        ([], []),
    ],
)
def test_what_patterns_name(patterns: list[str], found: list[str]) -> None:
    assert find_private_tensors(patterns, BLOCKS) == tuple(found)


@pytest.mark.parametrize(
    ("patterns", "reason"),
    [
        (["head/*", "*"], "all tensors of block encoder-acc would be private: name it among"),
        (["head/fc.*"], "all tensors of block head would be private"),
        (["*.bias", "tail/*"], "'tail/*' names no tensor of a shared block; there are encoder-acc"),
        (["0.weight"], "'0.weight' names no tensor"),  # of whole names
        (["HEAD/fc.bias"], "'HEAD/fc.bias' names no tensor"),
    ],
)
def test_what_is_refused(patterns: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        find_private_tensors(patterns, BLOCKS)


def test_a_model_without_running_statistics_has_no_batch_norms() -> None:
    with pytest.raises(ValueError, match="no shared block has a layer with running statistics"):
        find_private_tensors(["batch-norm"], BLOCKS[2:])


def test_so_many_names_do_not_go_into_an_enrollment() -> None:
    shapes = {f"a{i}": (1,) for i in range(MAX_PRIVATE_TENSORS + 1)}
    block, _ = make_block("head", "head", ("fusion",), {**shapes, "weight": (2,)})
    with pytest.raises(ValueError, match=r"4097 tensors, at most 4096 can be private"):
        find_private_tensors(["head/a*"], [block])


# A running federation; of the tiny model, fc.bias are the last two values of the head.

PRIVATE = ("head/fc.bias",)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum:0.9", "adam:0.1", "orthogonal:0.5"])
async def test_the_server_keeps_the_initial_values(tmp_path: Path, optimizer: str) -> None:
    """Also where a device sends something for them."""
    site = Site(tmp_path)
    with site.run(ready=["watch"], private_tensors=PRIVATE, server_optimizer=optimizer) as run:
        for round_num in (1, 2):
            await run.finish_round(round_num, 0.5)
        head = run.block("head")
        np.testing.assert_array_equal(head[6:], INITIAL["head"][6:])
        assert (np.abs(head[:6] - INITIAL["head"][:6]) > 0.01).all()
        assert run.federation.shared.versions["head"] == 3


async def test_other_tensors_are_averaged_as_ever(tmp_path: Path) -> None:
    deltas = {"watch": np.arange(8.0), "phone": np.ones(8)}
    found = []
    for private in ((), PRIVATE):
        site = Site(tmp_path / str(len(private)))
        with site.run(ready=["watch", "phone"], private_tensors=private, min_devices=2) as run:
            for device, delta in deltas.items():
                assert run.federation.on_update(make_update(device, "head", delta))
            for device in deltas:
                run.federation.on_report(device, make_report(device))
            await settle()
            found.append(run.block("head"))
    np.testing.assert_array_equal(found[0][:6], found[1][:6])
    assert (found[0][6:] != found[1][6:]).all()


async def test_a_data_folder_of_other_private_tensors_is_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.run():
        pass
    with (
        site.state() as state,
        pytest.raises(ConfigError, match=r"another private blocks .*fc\.bias"),
    ):
        config = make_config(site.artifacts, site.data_dir, private_tensors=PRIVATE)
        Federation(config, site.manifest, state)
