"""`Federation` after a restart: rounds go on, and the wrong folder is refused."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from petalfl.errors import ModelError
from petalfl.model import ModelManifest
from server.config import ConfigError
from server.federation import Federation
from tests.server.builders import (
    INITIAL,
    SIZES,
    Run,
    Site,
    make_config,
    make_id,
    make_report,
    make_update,
    settle,
)
from tests.server.federations import EVERYBODY, HELD, Clock, cohort

# A restart


Event = tuple[str, str, str]  # round, device, block or report
TWO_ROUNDS = [
    (n, device, what)
    for n in ("1", "2")
    for device, held in HELD.items()
    for what in (*sorted(held), "report")
]


def act(run: Run, event: Event) -> str:
    """A device does its part, always the same."""
    round_num, device, what = int(event[0]), event[1], event[2]
    if what == "report":
        return run.federation.on_report(device, make_report(device, round_num=round_num)).status
    seed = list(b"".join(part.encode() for part in event))
    delta = np.random.default_rng(seed).normal(size=SIZES[what])
    update = make_update(
        device, what, delta, num_examples=len(device), round_num=round_num, base_version=round_num
    )
    return run.federation.on_update(update).status


async def play(site: Site, restarts: set[int]) -> dict[str, bytes]:
    """Two rounds with a restart after each of those events; the block files at the end."""
    with ExitStack() as stack:

        def start() -> Run:
            return stack.enter_context(
                site.run(
                    ready=EVERYBODY, min_devices=3, num_rounds=2, server_optimizer="momentum:0.9"
                )
            )

        run = start()
        for number, event in enumerate(TWO_ROUNDS, start=1):
            assert act(run, event) == "accepted", event
            if number in restarts:
                stack.close()
                run = start()
            await settle()
        assert run.federation.finished.is_set()
    root = site.data_dir / "blocks"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "restarts", [{1}, {6}, {12}, {13}, {14}, {20}, {25}, set(range(1, 26))], ids=str
)
async def test_a_restart_in_mid_round_changes_no_block(tmp_path: Path, restarts: set[int]) -> None:
    undisturbed = await play(Site(tmp_path / "undisturbed"), set())
    assert {f"{block}/{version}.safetensors" for block in SIZES for version in (1, 2, 3)} == set(
        undisturbed
    )
    assert await play(Site(tmp_path / "restarted"), restarts) == undisturbed


async def test_a_restarted_round_knows_what_it_has(site: Site) -> None:
    update = make_update("watch", "head", 2.0)
    with site.run(ready=["watch", "phone"], min_devices=2) as run:
        run.federation.on_update(update)
        run.federation.on_report("watch", make_report("watch"))
    with site.run(min_devices=1) as run:
        assert cohort(run).keys() == {"watch", "phone"}
        assert run.federation.round is not None and run.federation.round.has("watch", update)
        assert run.federation.on_update(update).status == "accepted"
        assert run.state.history.totals()["updates_accepted"] == 1
        second = replace(update, update_id=make_id("second"))
        assert "has sent another update" in run.federation.on_update(second).reason
        run.ready("watch")  # has reported: nothing to do for it
        run.ready("phone")
        assert run.sender.tasks(1).keys() == {"phone"}


async def test_a_round_that_was_complete_at_the_restart_closes(site: Site) -> None:
    with site.run(ready=["watch"], num_rounds=1) as run:
        for block in HELD["watch"]:
            run.federation.on_update(make_update("watch", block, 1.0))
        run.federation.on_report("watch", make_report("watch"))
        assert run.federation.round_num == 1  # the server ends before the loop turns
    with site.run(num_rounds=1) as run:
        await settle()
        assert run.federation.finished.is_set()
        assert run.federation.shared.versions["head"] == 2


async def test_a_restarted_round_has_a_deadline(site: Site, clock: Clock) -> None:
    with site.run(ready=["watch"]):
        pass
    with site.run(num_rounds=1) as run:
        assert not run.federation.finished.is_set()
        await clock.advance(61)
        assert run.federation.finished.is_set()


async def test_momentum_survives_a_restart(site: Site) -> None:
    for round_num in (1, 2):
        with site.run(
            ready=["watch"], server_optimizer="momentum:0.5", num_rounds=round_num
        ) as run:
            await run.finish_round(round_num, 4.0)
    with site.run(num_rounds=2) as run:
        # v: 4, then 0.5 · 4 + 4 = 6
        np.testing.assert_array_equal(run.block("head"), (INITIAL["head"] + 4) + 6)


async def test_a_stop_keeps_the_round_open(site: Site, clock: Clock) -> None:
    with site.run(ready=["watch"]) as run:
        pass
    await clock.advance(100)  # its own clock has stopped
    with site.state() as state:
        unclosed = state.unclosed_round()
        assert unclosed is not None and unclosed.round_num == 1
    assert run.federation.round_num == 1


async def test_versions_are_published_at_every_start(site: Site) -> None:
    with site.run(ready=["watch"]) as run:
        assert dict(run.sender.versions).keys() == SIZES.keys()
        await run.finish_round(1)
    with site.run() as run:
        assert {block: pointer.version for block, pointer in run.sender.versions} == {
            **dict.fromkeys(HELD["watch"], 2),
            "encoder-gyro": 1,
        }


# The wrong folder


async def open_federation(site: Site, manifest: ModelManifest, private: tuple[str, ...]) -> None:
    config = make_config(site.artifacts, site.data_dir, private_blocks=private)
    with site.state() as state:
        Federation(config, manifest, state).close()


async def test_a_data_folder_of_another_model_is_refused(site: Site) -> None:
    with site.run():
        pass
    blocks = list(site.manifest.blocks)
    renamed = replace(blocks[-1].parameters[0], name="fc.other")
    blocks[-1] = replace(blocks[-1], parameters=(renamed, *blocks[-1].parameters[1:]))
    other = replace(site.manifest, blocks=tuple(blocks))
    with pytest.raises(ConfigError, match=r"was made for another model layout .*--data-dir"):
        await open_federation(site, other, ())


@pytest.mark.parametrize("private", [("head",), ("fusion", "head")])
async def test_a_data_folder_of_another_scheme_is_refused(
    site: Site, private: tuple[str, ...]
) -> None:
    with site.run():
        pass
    with pytest.raises(ConfigError, match="was made for another private blocks"):
        await open_federation(site, site.manifest, private)


async def test_the_order_of_private_blocks_makes_no_other_scheme(site: Site) -> None:
    await open_federation(site, site.manifest, ("fusion", "head"))
    await open_federation(site, site.manifest, ("head", "fusion"))


async def test_swapped_initial_parameters_are_refused(site: Site) -> None:
    (site.artifacts / "head" / "parameters.bin").write_bytes(bytes(4 * SIZES["head"]))
    with pytest.raises(ModelError, match=r"head/parameters\.bin is damaged or was swapped"):
        await open_federation(site, site.manifest, ())


async def test_private_blocks_leave_no_version_on_the_server(site: Site) -> None:
    with site.run(private_blocks=("head",)):
        names = {path.name for path in (site.data_dir / "blocks").iterdir()}
        assert names == SIZES.keys() - {"head"}
