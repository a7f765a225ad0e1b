"""`Downlink` against a server that breaks off, lies and is replaced; the real one is elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl import downlink
from petalfl.downlink import Downlink
from petalfl.errors import ModelError, StoreError, TransportError
from petalfl.model import Block
from petalfl.source import NotThereError
from petalfl.store import DeviceStore
from petalfl.vectors import to_bytes
from petalfl.wire import BlockVersion
from tests.petalfl.builders import make_block
from tests.petalfl.file_server import FileServer, file_server
from tests.server.builders import write_artifacts

BLOCK: Block = make_block("encoder-a", ("a",), 64, 999)  # 64,000 parameters: four pieces
VECTOR = np.random.default_rng(0).standard_normal(BLOCK.size, dtype=np.float32)
BODY = to_bytes(VECTOR)
POINTER = BlockVersion(3, hashlib.sha256(BODY).hexdigest())
PATH = "/v1/fed/blocks/encoder-a/3"
KEY = bytes(range(32))


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server(files={PATH: BODY}) as served:
        yield served


class Device:
    """A store and its downlink; `restart` is what a kill leaves."""

    def __init__(self, server: FileServer, folder: Path, key: bytes | None = None) -> None:
        self.server, self.folder, self.key = server, folder, key
        self.store = DeviceStore(folder, key)
        self.down = Downlink(server.url, "fed", self.store)

    def restart(self) -> None:
        self.store.close()
        self.__init__(self.server, self.folder, self.key)  # type: ignore[misc]

    def fetch(self) -> bytes:
        return to_bytes(self.down.fetch_block(BLOCK, POINTER))

    def left(self) -> list[Path]:
        return [path for path in (self.folder / "downloads").rglob("*") if path.is_file()]


@pytest.fixture
def device(server: FileServer, tmp_path: Path) -> Iterator[Device]:
    device = Device(server, tmp_path / "store")
    yield device
    device.store.close()


# Breaks


def test_a_whole_block(server: FileServer, device: Device) -> None:
    assert device.fetch() == BODY
    assert server.requests == [(PATH, None, None)]


def test_a_break_costs_what_was_lost_alone(server: FileServer, device: Device) -> None:
    """As long as each connection brings something, it goes on at once."""
    server.cuts = [100_000, 70_000]
    assert device.fetch() == BODY
    etag = f'"{POINTER.sha256}"'
    assert server.requests[1:] == [(PATH, "bytes=100000-", etag), (PATH, "bytes=170000-", etag)]
    assert server.sent[PATH] == len(BODY)


def test_a_line_that_brings_next_to_nothing_is_not_tried_without_end(
    server: FileServer, device: Device
) -> None:
    server.cuts = [100_000, 10, 10]
    with pytest.raises(TransportError, match=rf"{PATH}: the server hung up with \d+ bytes to go"):
        device.fetch()
    assert len(server.requests) == 2
    server.cuts = []
    assert device.fetch() == BODY
    assert server.sent[PATH] == len(BODY)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_restart_goes_on_where_it_stopped(
    server: FileServer, tmp_path: Path, key: bytes | None
) -> None:
    device = Device(server, tmp_path, key)
    for cut in (50_001, 7, 1, 0):
        server.cuts = [cut]
        with pytest.raises(TransportError):
            device.fetch()
        device.restart()
    assert device.fetch() == BODY
    assert server.sent[PATH] == len(BODY)
    device.store.close()


def test_what_is_whole_is_not_asked_for_again(server: FileServer, device: Device) -> None:
    """As after a kill before the shared blocks were written."""
    device.fetch()
    device.restart()
    server.files.clear()
    assert device.fetch() == BODY
    assert len(server.requests) == 1


def test_what_is_no_longer_wanted_goes(server: FileServer, device: Device) -> None:
    server.cuts = [10]
    with pytest.raises(TransportError):
        device.fetch()
    assert [path.name for path in device.left()] == [POINTER.sha256]
    device.down.drop_all_but([POINTER])
    assert len(device.left()) == 1
    device.down.drop_all_but([BlockVersion(4, "ab" * 32)])
    assert device.left() == []


def test_with_a_key_no_byte_of_a_block_lies_plain_on_disk(
    server: FileServer, tmp_path: Path
) -> None:
    plain = Device(server, tmp_path)
    server.cuts = [50_000]
    with pytest.raises(TransportError):
        plain.fetch()
    assert BODY[:64] in plain.left()[0].read_bytes()
    plain.store.close()
    device = Device(server, tmp_path, KEY)
    assert device.left() == []
    server.cuts = [50_000]
    with pytest.raises(TransportError):
        device.fetch()
    [path] = device.left()
    data = path.read_bytes()
    assert len(data) > 50_000
    assert not any(BODY[i : i + 8] in data for i in range(0, 50_000, 1000))
    assert device.fetch() == BODY
    device.store.close()


def test_a_download_gives_way_when_told(server: FileServer, device: Device) -> None:
    class StopError(Exception):
        pass

    def check() -> None:
        folder = device.store.folder / "downloads"
        if any(path.stat().st_size for path in folder.rglob("*") if path.is_file()):
            raise StopError

    device.down = Downlink(server.url, "fed", device.store, check=check)
    with pytest.raises(StopError):
        device.fetch()
    device.restart()
    assert device.fetch() == BODY
    assert server.requests[1][1] not in (None, "bytes=0-")


# Servers that lie

OTHER = BODY[:-1] + bytes([BODY[-1] ^ 1])


def test_a_wrong_digest_starts_over_once(server: FileServer, device: Device) -> None:
    server.files[PATH] = OTHER
    with pytest.raises(TransportError, match=r"blocks/encoder-a/3 comes with the wrong sha256"):
        device.fetch()
    assert [asked for _, asked, _ in server.requests] == [None, None]
    server.files[PATH] = BODY
    assert device.fetch() == BODY


def test_damage_on_disk_costs_one_download(server: FileServer, device: Device) -> None:
    server.cuts = [50_000]
    with pytest.raises(TransportError):
        device.fetch()
    path = device.left()[0]
    path.write_bytes(bytes(50_000))
    assert device.fetch() == BODY
    assert [asked for _, asked, _ in server.requests] == [None, "bytes=50000-", None]


def test_a_partial_that_is_too_long_is_cut(server: FileServer, device: Device) -> None:
    device.fetch()
    device.left()[0].write_bytes(BODY + b"more")
    assert device.fetch() == BODY


def test_another_file_in_between_is_known_by_its_etag(server: FileServer, device: Device) -> None:
    """If-Range: no download is made of two files. Then it starts over, as it has the wrong one."""
    answer, versions = server.answer, [BODY, OTHER, BODY]

    def change(handler: Any) -> None:
        server.files[PATH] = versions.pop(0)
        answer(handler)

    server.answer = change  # type: ignore[method-assign]
    server.cuts = [100_000]
    assert device.fetch() == BODY
    assert [asked for _, asked, _ in server.requests] == [None, "bytes=100000-", None]
    assert server.sent[PATH] == 100_000 + 2 * len(BODY)


def test_a_server_without_ranges(server: FileServer, device: Device) -> None:
    server.has_ranges = False
    server.cuts = [100_000]
    assert device.fetch() == BODY
    assert server.sent[PATH] == 100_000 + len(BODY)


LIES = {
    "another range": ({"Content-Range": "bytes 7-255999/256000"}, "due are bytes 100000-"),
    "another total": ({"Content-Range": "bytes 100000-255999/9"}, "due are bytes 100000-"),
    "no range": ({"Content-Range": ""}, "sends '', due are"),
    "a long range": ({"Content-Range": "x" * 60_000}, r"sends 'x{80}', due are"),
    "more bytes": ({"Content-Length": "156001"}, "sends 156001 bytes from 100000 on"),
    "a flood": ({"Content-Length": str(1 << 62)}, "due are 156000"),
}


@pytest.mark.parametrize("lie", LIES)
def test_another_part_than_was_asked_for(server: FileServer, device: Device, lie: str) -> None:
    server.cuts = [100_000, 0]
    with pytest.raises(TransportError):
        device.fetch()
    server.headers, message = LIES[lie]
    with pytest.raises(TransportError, match=message) as caught:
        device.fetch()
    assert len(str(caught.value)) < 300
    server.headers = {}
    assert device.fetch() == BODY
    assert server.sent[PATH] <= 2 * len(BODY)


@pytest.mark.parametrize("body", [BODY + b"x", BODY[:-1], b""], ids=["longer", "shorter", "empty"])
def test_a_file_of_another_length(server: FileServer, device: Device, body: bytes) -> None:
    server.files[PATH] = body
    with pytest.raises(TransportError, match=rf"sends {len(body)} bytes from 0 on, due are 256000"):
        device.fetch()
    assert all(path.stat().st_size == 0 for path in device.left())


def test_a_file_that_ends_before_what_is_here(server: FileServer, device: Device) -> None:
    server.cuts = [100_000, 0]
    with pytest.raises(TransportError):
        device.fetch()
    server.headers = {}
    server.status = 416
    with pytest.raises(TransportError, match="comes with the wrong sha256"):
        device.fetch()
    server.status = 0
    assert device.fetch() == BODY


def test_a_version_that_is_gone(server: FileServer, device: Device) -> None:
    server.files.clear()
    with pytest.raises(NotThereError):
        device.fetch()


def test_a_block_that_is_not_finite(server: FileServer, device: Device) -> None:
    body = to_bytes(np.full(BLOCK.size, np.nan, np.float32))
    server.files[PATH] = body
    pointer = BlockVersion(3, hashlib.sha256(body).hexdigest())
    with pytest.raises(TransportError, match="block encoder-a: a value is NaN"):
        device.down.fetch_block(BLOCK, pointer)


def test_a_full_disk(server: FileServer, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    (device.folder / "downloads").write_bytes(b"no folder")
    with pytest.raises(StoreError, match=rf"cannot write .*{POINTER.sha256}"):
        device.fetch()


# The model


@pytest.fixture
def model(server: FileServer, tmp_path: Path) -> Path:
    folder = tmp_path / "artifacts"
    write_artifacts(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            at = "manifest" if name == "manifest.json" else f"artifacts/{name}"
            server.files[f"/v1/fed/{at}"] = path.read_bytes()
    return folder


def fetch_model(device: Device) -> None:
    device.down.fetch_model(["acc"], None, lambda b: not b.is_frozen and b.name != "head")


def test_a_model_comes_once(server: FileServer, device: Device, model: Path) -> None:
    """At the next start the manifest is asked for, and is still the same."""
    fetch_model(device)
    names = {path.removeprefix("/v1/fed/") for path, _, _ in server.requests}
    assert "artifacts/head/parameters.bin" in names
    assert not names & {"artifacts/fusion/parameters.bin", "artifacts/encoder-gyro/eval_model.onnx"}
    for name in names - {"manifest"}:
        kept = device.store.read_file(name.removeprefix("artifacts/"))
        assert kept == server.files[f"/v1/fed/{name}"]
    assert device.left() == []
    server.requests.clear()
    before = server.sent.copy()
    device.restart()
    fetch_model(device)
    assert [path for path, _, _ in server.requests] == ["/v1/fed/manifest"]
    assert server.sent == before


def test_a_model_goes_on_where_it_stopped(server: FileServer, device: Device, model: Path) -> None:
    total = sum(map(len, server.files.values()))
    for _ in range(3):
        server.cuts = [1 << 20, 1 << 20, 2]
        with pytest.raises(TransportError, match="hung up"):
            fetch_model(device)
        device.restart()
    server.cuts = []
    fetch_model(device)
    assert sum(server.sent.values()) <= total + 3 * len(server.files["/v1/fed/manifest"])
    assert all(server.sent[path] <= len(data) for path, data in server.files.items()
               if "artifacts" in path)  # fmt: skip


def test_another_model_drops_what_came_of_the_one_before(
    server: FileServer, device: Device, model: Path
) -> None:
    path = "/v1/fed/artifacts/optimizers/sgd.onnx"
    server.cuts = [1 << 20, 1]
    with pytest.raises(TransportError):
        fetch_model(device)
    assert len(device.left()) == 1
    write_artifacts(model, name="another")
    server.files["/v1/fed/manifest"] = (model / "manifest.json").read_bytes()
    server.files.pop(path)
    device.store.write_file("optimizers/sgd.onnx", b"sgd")
    fetch_model(device)
    assert device.left() == []
    assert b"another" in (device.store.read_file("manifest.json") or b"")


def test_an_artifact_that_was_damaged_on_disk_comes_again(
    server: FileServer, device: Device, model: Path
) -> None:
    fetch_model(device)
    device.store.write_file("head/eval_model.onnx", b"rubbish")
    fetch_model(device)
    assert device.store.read_file("head/eval_model.onnx") == b"eval head"


def test_a_swapped_artifact_is_not_kept(server: FileServer, device: Device, model: Path) -> None:
    server.files["/v1/fed/artifacts/head/eval_model.onnx"] = b"evil head"
    with pytest.raises(TransportError, match=r"head/eval_model.onnx comes with the wrong sha256"):
        fetch_model(device)
    assert device.store.read_file("head/eval_model.onnx") is None
    assert device.store.read_file("manifest.json") is None


def test_a_model_that_is_too_large(
    server: FileServer, device: Device, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downlink, "MAX_MODEL_BYTES", 50)
    with pytest.raises(ModelError, match=r"the model's files have \d+ bytes, a device takes 50"):
        fetch_model(device)
    assert [path for path, _, _ in server.requests] == ["/v1/fed/manifest"]
    assert device.left() == []


def test_a_model_that_the_disk_has_no_room_for(
    server: FileServer, device: Device, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_usage(path: Path) -> Any:
        return type("Usage", (), {"free": 50})

    monkeypatch.setattr("petalfl.downlink.shutil.disk_usage", disk_usage)
    with pytest.raises(StoreError, match=r"have \d+ bytes to come, the disk has 50 free"):
        fetch_model(device)


def test_what_has_come_already_needs_no_room(
    server: FileServer, device: Device, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 0

    def disk_usage(path: Path) -> Any:
        return type("Usage", (), {"free": free})

    def num_missing() -> int:
        with pytest.raises(StoreError, match=r"have \d+ bytes to come, the disk has 0") as refusal:
            fetch_model(device)
        return int(str(refusal.value).split()[4])

    monkeypatch.setattr("petalfl.downlink.shutil.disk_usage", disk_usage)
    total, free = num_missing(), 1 << 20
    server.cuts = [1 << 20, 1 << 20, 1 << 20, 2]  # the manifest, two files, and 2 bytes
    with pytest.raises(TransportError, match="hung up"):
        fetch_model(device)
    device.restart()
    there, free = sum(path.stat().st_size for path in device.left()), 0
    assert there > 2
    free = num_missing()
    assert free == total - there
    fetch_model(device)
    assert device.left() == []


def test_the_model_before_is_whole_until_all_of_the_next_has_come(
    server: FileServer, device: Device, model: Path
) -> None:
    fetch_model(device)
    before = kept_by(device)
    changed = {}
    for path in before:
        if path.endswith("eval_model.onnx"):
            old, new = before[path], before[path].upper()
            manifest = server.files["/v1/fed/manifest"]
            manifest = manifest.replace(sha256(old), sha256(new))
            server.files |= {f"/v1/fed/artifacts/{path}": new, "/v1/fed/manifest": manifest}
            changed[path] = new
    assert len(changed) == 3
    server.cuts = [1 << 20, 1 << 20, 1 << 20, 0]  # the manifest and two of them come
    with pytest.raises(TransportError, match="hung up"):
        fetch_model(device)
    assert kept_by(device) == before
    device.restart()
    assert kept_by(device) == before
    fetch_model(device)
    assert kept_by(device) == before | changed | {"manifest.json": manifest}


def kept_by(device: Device) -> dict[str, bytes]:
    """Of the model's files, in place."""
    folder = device.store.artifacts
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def test_a_manifest_without_end(server: FileServer, device: Device, model: Path) -> None:
    server.files["/v1/fed/manifest"] = bytes((4 << 20) + 1)
    with pytest.raises(TransportError, match="manifest sends more than the 4194304 bytes due"):
        fetch_model(device)
