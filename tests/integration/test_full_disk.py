"""The disk of a device or of the server is full amid a round, and has room again."""

from __future__ import annotations

import resource
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.faulty_device import faulty_device, read_to_the_end, read_until
from tests.integration.harness import SCHEME, assert_counted_once, running_server

ALONE = (*SCHEME, "--min-devices", "1", "--epochs", "1")
DISK_BYTES = 16 << 20
FILE_BYTES = 64 << 10  # of the longest file that can still be written


def limit_files(pid: int, num_bytes: int) -> None:
    """What another process can write: as on a full disk, `write` fails half way."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


class Disk(NamedTuple):
    """A way to fill the disk of a process, and to make room again."""

    within: tuple[str, ...]
    fill: Callable[[int], None]
    free: Callable[[int], None]
    complaint: str


def limited(folder: Path) -> Disk:
    """Nothing but a limit: wherever tests run."""
    return Disk(
        (),
        lambda pid: limit_files(pid, FILE_BYTES),
        lambda pid: limit_files(pid, resource.RLIM_INFINITY),
        "File too large",
    )


def tiny(folder: Path) -> Disk:
    """A file system of its own, which nobody else sees, but through its process."""

    def filler(pid: int) -> Path:
        return Path(f"/proc/{pid}/root{folder}/filler")

    def fill(pid: int) -> None:
        with pytest.raises(OSError, match="No space left"), filler(pid).open("wb") as file:
            while True:
                file.write(bytes(1 << 12))
                file.flush()

    mount = f"mount -t tmpfs -o size={DISK_BYTES} none {shlex.quote(str(folder))}"
    within = (
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'{mount} && exec "$@"',
        "-",
    )
    if subprocess.run([*within, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of his own")
    return Disk(within, fill, lambda pid: filler(pid).unlink(), "No space left on device")


@pytest.mark.parametrize("make_disk", [limited, tiny])
def test_the_disk_of_a_device(
    watch_artifacts: Path, tmp_path: Path, make_disk: Callable[[Path], Disk]
) -> None:
    """A round is trained once, and waits in memory for room; the state before it stays."""
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = make_disk(folder)
    arguments = (*ALONE, "--rounds", "3")
    filled = tmp_path / "filled"
    held: dict[str, Any] = {"hold_at": "round 2", "until": str(filled), "within": disk.within}
    with (
        running_server(watch_artifacts, tmp_path / "server", *arguments) as server,
        faulty_device(server.url, server.token, folder / "store", **held) as process,
    ):
        state = Path(f"/proc/{process.pid}/root{folder}/store/state.msgpack")
        read_until(process, "wait")
        disk.fill(process.pid)
        before = state.read_bytes()
        filled.touch()
        for _ in range(3):
            error = read_until(process, "error")
            assert error.startswith("error StoreError: cannot write")
            assert disk.complaint in error
        assert state.read_bytes() == before
        assert server.get("status")["round_num"] == 2
        disk.free(process.pid)
        said = read_to_the_end(process)
        assert [line for line in said if line.startswith("round")] == ["round 3"]
        assert_counted_once(server, num_rounds=3, num_devices=1)


def test_the_disk_of_the_server(watch_artifacts: Path, tmp_path: Path) -> None:
    """What it cannot keep it does not accept; the device sends it again when there is room."""
    arguments = (*ALONE, "--rounds", "2")
    filled = tmp_path / "filled"
    held: dict[str, Any] = {"hold_at": "round 1", "until": str(filled)}
    with (
        running_server(watch_artifacts, tmp_path / "server", *arguments) as server,
        faulty_device(server.url, server.token, tmp_path / "store", **held) as process,
    ):
        read_until(process, "wait")
        limit_files(server.pid, FILE_BYTES)
        filled.touch()
        while "cannot keep what acc-only sent" not in server.log:
            read_until(process, "upload")  # without a receipt, there are more and more
        assert server.get("status")["updates_accepted"] == 0
        limit_files(server.pid, resource.RLIM_INFINITY)
        read_to_the_end(process)
        assert_counted_once(server, num_rounds=2, num_devices=1)
