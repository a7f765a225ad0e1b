from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import __main__ as cli
from server.config import PerBlock
from server.journal import Journal
from server.maintenance import (
    ATTEMPTS,
    MaintenanceError,
    _copy_version,
    backup,
    inspect,
    restore,
)
from server.state import NewVersion, ServerState
from server.versions import OLDEST, version_path
from tests.server.builders import BLOCKS, LAYOUT, SIZES, Site, make_block, make_update


@pytest.fixture
async def site(tmp_path: Path) -> Site:
    """Three closed rounds, and a fourth with two updates in the journal."""
    made = Site(tmp_path)
    with made.run(ready=["watch", "phone"], min_devices=2) as run:
        for round_num in (1, 2, 3):
            await run.finish_round(round_num, 0.5)
        for device in ("watch", "phone"):
            update = make_update(device, "head", 2.0, round_num=4, base_version=4)
            assert run.federation.on_update(update).status == "accepted"
    return made


def read_all(folder: Path) -> tuple[object, ...]:
    """What a server would find there."""
    state = ServerState(folder)
    try:
        waiting = [(u.update_id, u.delta.tobytes()) for u in state.unconsumed_updates(BLOCKS)]
        return state.history.rounds(), state.newest_versions(), state.devices(), waiting
    finally:
        state.close()


def run_cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


async def test_inspect_shows_what_is_there(site: Site) -> None:
    [found] = inspect(site.data_dir)
    assert (found.rounds_closed, found.is_round_open, found.devices) == (3, True, 3)
    assert found.versions == {name: {"newest": 4, "num_files": 4} for name in SIZES}
    assert found.journal == {"num_waiting": 2, "num_bytes": 64, "num_segments": 1}
    assert found.updates == 3 * 6 + 2
    assert found.damages == []


async def test_a_backup_is_a_data_folder_and_restores_to_one(site: Site, tmp_path: Path) -> None:
    backup(site.data_dir, tmp_path / "backup")
    restore(tmp_path / "backup", tmp_path / "restored")
    before = read_all(site.data_dir)
    assert len(before[3]) == 2  # type: ignore[arg-type]
    assert read_all(tmp_path / "restored") == before
    assert read_all(tmp_path / "backup") == before


async def test_a_server_goes_on_from_a_backup(site: Site, tmp_path: Path) -> None:
    backup(site.data_dir, tmp_path / "backup")
    site.data_dir = tmp_path / "backup"
    with site.run(min_devices=2) as run:
        assert run.federation.round_num == 4
        assert run.federation.round is not None
        assert len(run.federation.round.results(["head"])["head"].update_ids) == 2


async def test_backups_of_a_running_server_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rounds go on, and segments of the journal are written over again and again.

    They are fewer than the attempts to copy what does not change meanwhile.
    """
    monkeypatch.setattr("server.journal.SEGMENT_BYTES", 100)
    site = Site(tmp_path)
    may_begin = asyncio.Semaphore(0)
    num_rounds, num_meanwhile = 0, ATTEMPTS // 2

    async def serve() -> None:
        nonlocal num_rounds
        with site.run(ready=["watch", "phone"], min_devices=2) as run:
            while num_rounds < 8 * num_meanwhile:
                await may_begin.acquire()
                await run.finish_round(num_rounds + 1, 0.25)
                num_rounds += 1

    async def until_round(number: int) -> None:
        while num_rounds < number and not serving.done():
            await asyncio.sleep(0.01)

    serving = asyncio.create_task(serve())
    for number in range(8):
        for _ in range(num_meanwhile):
            may_begin.release()
        await until_round(number * num_meanwhile + 1)
        await asyncio.to_thread(backup, site.data_dir, tmp_path / f"backup-{number}")
        await asyncio.to_thread(inspect, site.data_dir)
        await until_round((number + 1) * num_meanwhile)
    await serving
    closed = []
    for number in range(8):
        [found] = inspect(tmp_path / f"backup-{number}")
        assert found.damages == []
        assert {of["newest"] for of in found.versions.values()} == {found.rounds_closed + 1}
        closed.append(found.rounds_closed)
    assert closed == sorted(closed) and closed[-1] > closed[0]


@pytest.mark.parametrize("num_steps", [1, ATTEMPTS])
def test_a_backup_has_the_newest_version_of_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """While a server that keeps one version of each steps, and the copy comes too late."""
    head, _ = make_block("head", *LAYOUT["head"])
    state = ServerState(tmp_path / "data")
    state.add_initial_version(head, np.zeros(8, np.float32))
    copied: list[int] = []

    def step_first(*of: Any) -> None:
        copied.append(of[3])
        if len(copied) <= num_steps:
            new = NewVersion(head, of[3] + 1, np.ones(8, np.float32), {})
            state.step(1, [state.write_version(new)], {}, None)
            state.prune_versions(1)
        _copy_version(*of)

    monkeypatch.setattr("server.maintenance._copy_version", step_first)
    try:
        if num_steps == ATTEMPTS:
            with pytest.raises(MaintenanceError, match="cannot back up"):
                backup(tmp_path / "data", tmp_path / "backup")
        else:
            backup(tmp_path / "data", tmp_path / "backup")
            [found] = inspect(tmp_path / "backup")
            assert found.versions == {"head": {"newest": 2, "num_files": 1}}
            assert found.damages == []
    finally:
        state.close()
    assert copied == list(range(1, num_steps + (num_steps < ATTEMPTS) + 1))


def test_a_block_without_a_version_is_damage(tmp_path: Path) -> None:
    head, _ = make_block("head", *LAYOUT["head"])
    state = ServerState(tmp_path / "data")
    state.add_initial_version(head, np.zeros(8, np.float32))
    state.replace_setting(OLDEST + "head", "2")
    state.close()
    assert inspect(tmp_path / "data")[0].damages == ["no version of the block head is kept"]


async def test_old_versions_make_way(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.run(ready=["watch", "phone"], min_devices=2, keep_versions=3) as run:
        for round_num in range(1, 8):
            await run.finish_round(round_num, 0.5)
        shared = run.federation.shared
        assert shared.versions == dict.fromkeys(SIZES, 8)
        kept = [v for v in range(10) if await shared.body("head", v) is not None]
        assert kept == [6, 7, 8]
    with site.run(keep_versions=3) as run:  # and after a restart
        assert await run.federation.shared.body("head", 5) is None
    assert {p.name for p in (site.data_dir / "blocks").glob("*/*")} == {
        "6.safetensors", "7.safetensors", "8.safetensors",
    }  # fmt: skip
    [found] = inspect(site.data_dir)
    assert found.damages == [] and found.versions["head"] == {"newest": 8, "num_files": 3}
    backup(site.data_dir, tmp_path / "backup")
    assert inspect(tmp_path / "backup")[0].damages == []


async def test_versions_that_updates_may_start_from_are_kept(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with site.run(
        ready=["watch"], mode="async", buffer_size=PerBlock(1), max_staleness=4, keep_versions=1
    ) as run:
        for round_num in range(1, 10):
            await run.finish_round(round_num, 0.5, "watch")
        shared = run.federation.shared
        assert shared.versions["head"] == 10
        kept = [v for v in range(11) if await shared.body("head", v) is not None]
        assert kept == [6, 7, 8, 9, 10]


def flip(path: Path, place: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a version": (lambda folder: flip(version_path(folder, "head", 2)), "2.safetensors is damaged"),
    "a version's header": (
        lambda folder: flip(version_path(folder, "head", 2), 3), "cannot read"),
    "a version's file": (
        lambda folder: version_path(folder, "fusion", 1).unlink(), "1.safetensors"),
    "the journal": (
        lambda folder: flip(next((folder / "journal").glob("*.deltas"))), "damaged at position"),
    "the journal's end": (
        lambda folder: next((folder / "journal").glob("*.deltas")).write_bytes(b""), "damaged at"),
    "the journal's file": (
        lambda folder: min((folder / "journal").glob("*.deltas")).unlink(), "has lost"),
    "the database": (
        lambda folder: (folder / "state.sqlite").write_bytes(b"SQLite format 3\0" + bytes(500)),
        "state.sqlite"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
async def test_damage_is_found_and_never_copied(
    site: Site, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    backup(site.data_dir, tmp_path / "backup")
    damage, message = DAMAGES[what]
    for folder in (site.data_dir, tmp_path / "backup"):
        damage(folder)
        code, printed, _ = run_cli(capsys, "inspect", "--data-dir", str(folder))
        assert code == 1
        assert "DAMAGED" in printed and message in printed
    with pytest.raises(MaintenanceError):
        backup(site.data_dir, tmp_path / "second")
    with pytest.raises(MaintenanceError, match="is damaged"):
        restore(tmp_path / "backup", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


async def test_nothing_is_written_over(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backup(site.data_dir, tmp_path / "backup")
    before = read_all(site.data_dir)
    data, kept = str(site.data_dir), str(tmp_path / "backup")
    for words in (["restore", kept, "--data-dir", data], ["backup", kept, "--data-dir", data]):
        code, printed, error = run_cli(capsys, *words)
        assert (code, printed) == (2, "")
        assert "is not empty" in error
    assert read_all(site.data_dir) == before


async def test_the_commands(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, kept, again = (str(p) for p in (site.data_dir, tmp_path / "b", tmp_path / "again"))
    assert run_cli(capsys, "backup", kept, "--data-dir", data)[0] == 0
    assert run_cli(capsys, "restore", kept, "--data-dir", again)[0] == 0
    code, printed, _ = run_cli(capsys, "inspect", "--data-dir", again, "--json")
    [found] = json.loads(printed)
    assert code == 0
    assert found["rounds_closed"] == 3 and found["damages"] == []
    code, printed, _ = run_cli(capsys, "inspect", "--data-dir", again)
    assert code == 0 and "every checksum is right" in printed
    code, _, error = run_cli(capsys, "inspect", "--data-dir", str(tmp_path / "nowhere"))
    assert code == 2 and "is no data folder" in error


async def test_the_commands_look_where_the_settings_say(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PETALFL_SERVER_DATA_DIR", str(site.data_dir))
    assert str(site.data_dir) in run_cli(capsys, "inspect")[1]
    nowhere = str(tmp_path / "nowhere")
    code, _, error = run_cli(capsys, "--data-dir", nowhere, "inspect")
    assert code == 2 and nowhere in error
    monkeypatch.delenv("PETALFL_SERVER_DATA_DIR")
    Path("server.toml").write_text(f"data_dir = '{site.data_dir}'")
    assert str(site.data_dir) in run_cli(capsys, "inspect")[1]


async def test_every_federation_is_backed_up_wherever_it_lies(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site.data_dir.rename(tmp_path / "cars")
    backup(tmp_path / "cars", tmp_path / "all" / "watches")
    file = "data_dir = '{}'\n[federation.watches]\n[federation.cars]\ndata_dir = '{}'"
    Path("server.toml").write_text(file.format("all", "cars"))
    assert run_cli(capsys, "backup", "kept")[0] == 0
    assert [Path(f.folder).name for f in inspect(Path("kept"))] == ["cars", "watches"]
    Path("server.toml").write_text(file.format("again", "again-cars"))
    assert run_cli(capsys, "restore", "kept")[0] == 0
    assert read_all(Path("again-cars")) == read_all(Path("again/watches")) == read_all(Path("cars"))
    code, _, error = run_cli(capsys, "restore", "kept")
    assert code == 2 and "is not empty" in error


async def test_a_torn_tail_of_the_journal_is_no_damage(site: Site) -> None:
    """A crash between the segment and its rows: nobody was promised those bytes."""
    [segment] = (site.data_dir / "journal").glob("*.deltas")
    with segment.open("ab") as file:
        file.write(np.ones(5, np.float32).tobytes()[:-3])
    assert inspect(site.data_dir)[0].damages == []
    with site.state() as state:
        assert isinstance(state._journal, Journal)
        state.journal_update(make_update("both", "head", 3.0, round_num=4))
        assert len(list(state.unconsumed_updates(BLOCKS))) == 3
    assert inspect(site.data_dir)[0].damages == []
