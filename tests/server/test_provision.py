"""`python -m server enroll` with a federation behind HTTP; tests/integration has processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from petalfl.provisioning import read_identity_file
from server import __main__ as cli
from tests.server.builders import FED
from tests.server.test_web import TOKEN, Served, serve


class Operator:
    """Somebody at a shell."""

    def __init__(self, served: Served, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.served, self.out, self.folder = served, folder / "new.json", folder
        self.url = str(served.client.make_url("")).rstrip("/")
        self._capsys = capsys

    def write_runtime(self) -> None:
        """As a server does that runs on this machine."""
        runtime = {
            "url": self.url, "token": "x", "tokens": {FED: TOKEN, "other": "y"}, "pid": 1,
            "admin_token": "admin's token",
        }  # fmt: skip
        (self.folder / "server.json").write_text(json.dumps(runtime))

    async def revoke(self, device: str, *more: str) -> tuple[int, str]:
        """The exit code, and what it prints or why it does not."""
        words = ["revoke", device, "--data-dir", str(self.folder), *more]
        code = await asyncio.to_thread(cli.main, words)
        said = self._capsys.readouterr()
        return code, said.out + said.err

    async def enroll(self, device: str = "new", *more: str, modalities: str = "acc") -> str:
        """What it prints, or why it does not."""
        places = more or ("--url", self.url, "--token", TOKEN, "--federation", FED)
        words = ["enroll", device, "--modalities", modalities, "--out", str(self.out), *places]
        code = await asyncio.to_thread(cli.main, words)
        said = self._capsys.readouterr()
        if code == 0:
            return said.out
        assert (code, said.out) == (2, "")
        assert said.err.startswith("error: ") and len(said.err.splitlines()) == 1
        return said.err

    @property
    def enrolled(self) -> set[str]:
        return set(self.served.run.state.devices())


@pytest.fixture
async def operator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncIterator[Operator]:
    async with serve(tmp_path, private_blocks=("head",)) as served:
        yield Operator(served, tmp_path, capsys)


async def test_the_file_is_the_devices_identity(operator: Operator) -> None:
    said = await operator.enroll(modalities="gyro,acc")
    assert said.splitlines() == [
        f"new is enrolled in '{FED}'; its app says",
        f"  EdgeClient('mqtt://127.0.0.1:1883', identity='{operator.out}', …)",
    ]
    identity = read_identity_file(operator.out)
    assert (identity.federation, identity.device) == (FED, "new")
    assert identity.private_blocks == ("head",)
    assert operator.served.broker.granted == {"new": identity.password}
    assert operator.served.run.state.devices()["new"] == ["acc", "gyro"]
    assert identity.password not in said


async def test_the_server_on_this_machine_is_found(operator: Operator, tmp_path: Path) -> None:
    operator.write_runtime()
    here = ("--data-dir", str(tmp_path))
    assert "found federation 'third', it serves fed, other" in await operator.enroll(
        "new", *here, "--federation", "third"
    )
    assert "new is enrolled" in await operator.enroll("new", *here)


async def test_no_server_runs(operator: Operator, tmp_path: Path) -> None:
    said = await operator.enroll("new", "--data-dir", str(tmp_path / "none"))
    assert f"no server runs on {tmp_path / 'none'}: start one, or give" in said


async def test_a_file_that_is_there_is_kept_and_nobody_enrolled(operator: Operator) -> None:
    operator.out.write_text("precious")
    assert "new.json is there already; an identity is of one device" in await operator.enroll()
    assert operator.out.read_text() == "precious"
    assert "new" not in operator.enrolled


async def test_a_name_that_is_taken(operator: Operator) -> None:
    assert "409 device watch is enrolled already" in await operator.enroll("watch")
    assert not operator.out.exists()


@pytest.mark.parametrize(
    ("device", "modalities", "complaint"),
    [("../x", "acc", "400"), ("new", "sonar", "400"), ("new", "", "400")],
)
async def test_what_is_no_device(
    operator: Operator, device: str, modalities: str, complaint: str
) -> None:
    before = operator.enrolled
    assert complaint in await operator.enroll(device, modalities=modalities)
    assert operator.enrolled == before and not operator.out.exists()


async def test_a_wrong_token(operator: Operator) -> None:
    said = await operator.enroll("new", "--url", operator.url, "--federation", FED)
    assert "401 wrong or no token" in said


async def test_no_http_there(operator: Operator) -> None:
    said = await operator.enroll("new", "--url", "http://127.0.0.1:9", "--token", TOKEN)
    assert "no petalfl server answers at http://127.0.0.1:9" in said


async def test_a_file_that_cannot_be_written_takes_no_name(
    operator: Operator, tmp_path: Path
) -> None:
    operator.out = tmp_path / "missing" / "new.json"
    assert f"cannot write {operator.out}" in await operator.enroll()
    assert "new" not in operator.enrolled


async def test_a_device_is_revoked(operator: Operator) -> None:
    operator.write_runtime()
    said = f"watch is revoked in '{FED}'; its name is free again\n"
    assert await operator.revoke("watch") == (0, said)
    assert "watch" not in operator.enrolled
    again = (2, f"error: device watch is not enrolled in '{FED}'\n")
    assert await operator.revoke("watch") == again


async def test_what_cannot_be_revoked(operator: Operator) -> None:
    code, said = await operator.revoke("watch")
    assert code == 2 and f"no server runs on {operator.folder}" in said
    operator.write_runtime()
    code, said = await operator.revoke("watch", "--federation", "third")
    assert code == 2 and "found federation 'third', it serves fed, other" in said
    code, said = await operator.revoke("../x")
    assert code == 2 and "400" in said
    assert "watch" in operator.enrolled
