"""A model with more than parameters: frozen stages, running statistics, several tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from petalfl import wire
from petalfl.model import ModelManifest
from petalfl.payloads import plain_delta
from petalfl.vectors import Vector
from server.config import private_blocks
from server.service import _welcome
from tests.server.builders import (
    Door,
    FakeBroker,
    FakeJudge,
    Layout,
    Run,
    Site,
    announce,
    make_config,
    make_id,
    make_report,
    settle,
    with_digest,
)

LAYOUT: Layout = {
    "backbone-acc": ("encoder", ("acc",), {"w": (3,)}, None, True),
    "projector-acc": ("encoder", ("backbone-acc",), {"w": (2,)}),
    "encoder-gyro": ("encoder", ("gyro",), {"w": (3,)}, {"mean": (2,), "var": ()}),
    "fusion": ("fusion", ("projector-acc", "encoder-gyro"), {"w": (2,)}),
    "head-kind": ("head", ("fusion",), {"w": (2,)}),
    "head-pace": ("head", ("fusion",), {"w": (2,)}),
}
TRAINABLE = LAYOUT.keys() - {"backbone-acc"}
BOTH = ("acc", "gyro")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, layout=LAYOUT)


def block_update(
    manifest: ModelManifest, device: str, block: str, delta: float, round_num: int, version: int
) -> wire.BlockUpdate:
    vector = np.full(manifest.block(block).size, delta, np.float32)
    update_id = make_id(device, block, round_num)
    return with_digest(update_id, device, block, round_num, version, 1, plain_delta(vector))


async def finish_round(run: Run, round_num: int, delta: float) -> None:
    """Every device sends what its task names, and reports."""
    for device, task in run.sender.tasks(round_num).items():
        for name, pointer in task.blocks.items():
            update = block_update(
                run.federation.manifest, device, name, delta, round_num, pointer.version
            )
            assert run.federation.on_update(update).status == "accepted"
        run.federation.on_report(device, make_report(device, round_num=round_num))
    await settle()


def newest(run: Run, name: str) -> Vector:
    block, version = run.federation.shared.blocks[name], run.federation.shared.versions[name]
    return run.state.read_version(block, version)[0]


# Frozen blocks


async def test_frozen_blocks_are_neither_offered_nor_taken(site: Site) -> None:
    with site.run() as run:
        run.federation.on_ready("both", wire.Ready(BOTH, ("kind", "pace")))
        assert run.federation.shared.versions.keys() == TRAINABLE
        assert {name for name, _ in run.sender.versions} == TRAINABLE
        assert run.task("both", 1).blocks.keys() == TRAINABLE
        assert await run.federation.shared.body("backbone-acc", 1) is None
        update = block_update(site.manifest, "both", "backbone-acc", 1.0, 1, 1)
        refused = run.federation.on_update(update)
        assert refused.status == "rejected" and "was not asked for" in refused.reason
    assert {p.name for p in (site.data_dir / "blocks").iterdir()} == TRAINABLE


async def test_an_update_of_a_frozen_block_is_not_even_assembled(site: Site) -> None:
    judge = FakeJudge()
    door = await Door(site.manifest, judge).open()
    manifest, _ = announce(block_update(site.manifest, "watch", "backbone-acc", 1.0, 1, 1))
    await door.send("backbone-acc", manifest)
    assert door.gateway.refused == {"malformed": 1}
    assert len(door.gateway.transfers) == 0


@pytest.mark.parametrize(
    ("scheme", "private"),
    [
        ("fm", set()),
        ("ph", {"head-kind", "head-pace"}),
        ("phf", {"head-kind", "head-pace", "fusion"}),
        ("local", TRAINABLE),
    ],
)
def test_no_scheme_keeps_frozen_blocks(site: Site, scheme: str, private: set[str]) -> None:
    assert set(private_blocks(scheme, site.manifest)) == private


def test_the_manifest_s_default_may_name_frozen_blocks(tmp_path: Path) -> None:
    site = Site(tmp_path, layout=LAYOUT)
    data = site.manifest.to_json().replace(
        b'"private_blocks": []', b'"private_blocks": ["backbone-acc", "fusion"]'
    )
    assert private_blocks("", ModelManifest.from_json(data)) == ("fusion",)


def test_the_server_says_what_is_frozen(site: Site) -> None:
    config = make_config(site.artifacts, site.data_dir, private_blocks=("head-pace",))
    text = _welcome(site.manifest, config, FakeBroker(), "http://h:1", "token")
    assert "shared     projector-acc, encoder-gyro, fusion, head-kind\n" in text
    assert "private    head-pace\n  frozen     backbone-acc\n" in text


# Running statistics


async def test_statistics_get_the_plain_mean_and_parameters_the_momentum(site: Site) -> None:
    """v: 4, then 0.5 · 4 + 4 = 6; also over a restart between the rounds."""
    start = np.linspace(-1, 1, 6, dtype=np.float32)
    for round_num, moved in ((1, [4, 4, 4, 4, 4, 4]), (2, [10, 10, 10, 8, 8, 8])):
        with site.run(server_optimizer="momentum:0.5", num_rounds=round_num) as run:
            run.federation.on_ready("phone", wire.Ready(("gyro",), ("kind", "pace")))
            await finish_round(run, round_num, 4.0)
            np.testing.assert_allclose(newest(run, "encoder-gyro"), start + moved, rtol=1e-6)
    path = site.data_dir / "blocks" / "encoder-gyro"
    shapes = {name: t.shape for name, t in load_file(path / "3.safetensors").items()}
    assert shapes == {"w": (3,), "mean": (2,), "var": (), "optimizer.velocity": (3,)}


async def test_a_variance_does_not_overshoot(site: Site) -> None:
    """Momentum alone would carry it below what any device has seen."""
    with site.run(server_optimizer="momentum:0.9", num_rounds=5) as run:
        for round_num in range(1, 5):
            run.federation.on_ready("phone", wire.Ready(("gyro",), ("kind", "pace")))
            before = newest(run, "encoder-gyro")
            await finish_round(run, round_num, -0.1)
            moved = newest(run, "encoder-gyro") - before
            np.testing.assert_allclose(moved[3:], -0.1, rtol=1e-5)
    assert (moved[:3] < -0.3).all()


# Tasks


async def test_a_device_sends_the_heads_that_it_has_labels_for(site: Site) -> None:
    with site.run(min_devices=2, num_rounds=1) as run:
        run.federation.on_ready("watch", wire.Ready(("acc",), ("kind",)))
        run.federation.on_ready("phone", wire.Ready(("gyro",), ("pace", "kind")))
        assert run.task("watch", 1).blocks.keys() == {"projector-acc", "fusion", "head-kind"}
        assert run.task("phone", 1).blocks.keys() == {
            "encoder-gyro", "fusion", "head-kind", "head-pace"
        }  # fmt: skip
        foreign = block_update(site.manifest, "watch", "head-pace", 1.0, 1, 1)
        assert "was not asked for" in run.federation.on_update(foreign).reason
        await finish_round(run, 1, 1.0)
        assert run.federation.finished.is_set()
        [closed] = run.state.history.rounds()
        assert isinstance(closed["blocks"], dict)
        holders = {name: block["holders"] for name, block in closed["blocks"].items()}
        assert holders["head-kind"] == ["phone", "watch"]
        assert holders["head-pace"] == ["phone"]


@pytest.mark.parametrize("tasks", [("mood",), ("kind", "mood"), ("head-kind",)])
async def test_a_device_with_unknown_tasks_is_not_waited_for(
    site: Site, tasks: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with site.run() as run:
        run.federation.on_ready("both", wire.Ready(BOTH, tasks))
        assert run.federation.roster.ready == {} and run.sender.sent == []
    assert "cannot take part: found task" in caplog.text


async def test_a_device_that_comes_back_with_less_is_asked_for_less(site: Site) -> None:
    with site.run(num_rounds=2, min_devices=2) as run:
        for device in ("both", "watch"):
            modalities = BOTH if device == "both" else BOTH[:1]
            run.federation.on_ready(device, wire.Ready(modalities, ("kind", "pace")))
        run.sender.sent.clear()
        run.federation.on_ready("both", wire.Ready(BOTH, ("pace",)))
        task = run.task("both", 1)
        assert task.blocks.keys() == TRAINABLE - {"head-kind"}
        assert task.uploads is None
        run.federation.on_report("watch", make_report("watch"))
        await settle()
        assert run.federation.round_num == 1  # it is waited for
        run.federation.on_report("both", make_report("both"))
        await settle()
        assert run.task("both", 2).blocks.keys() == TRAINABLE - {"head-kind"}
