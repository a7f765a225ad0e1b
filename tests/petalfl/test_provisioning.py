from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from petalfl import EdgeClient
from petalfl.errors import EnrollError, StoreError
from petalfl.provisioning import read_identity_file, take_identity, write_identity_file
from petalfl.store import DeviceStore, Identity
from petalfl.ways import Session, parse_mqtt_url

IDENTITY = Identity("fed", "watch-7", "p" * 43, ("head",))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DeviceStore]:
    opened = DeviceStore(tmp_path / "store")
    yield opened
    opened.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "watch-7.json"
    write_identity_file(path, IDENTITY)
    return path


def test_a_file_holds_an_identity_for_its_owner_alone(path: Path) -> None:
    assert read_identity_file(path) == IDENTITY
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_is_never_replaced(path: Path) -> None:
    """It may be all that is left of another device's password."""
    with pytest.raises(ValueError, match=r"cannot write .*watch-7\.json: File exists"):
        write_identity_file(path, IDENTITY)


def test_a_new_store_takes_the_identity(store: DeviceStore, path: Path) -> None:
    assert take_identity(store, path) == IDENTITY
    assert store.read_identity() == IDENTITY
    assert take_identity(store, path) == IDENTITY


def test_a_new_password_replaces_the_old_one(store: DeviceStore, path: Path) -> None:
    store.write_identity(Identity("fed", "watch-7", "old" * 9, ("head",)))
    take_identity(store, path)
    assert store.read_identity() == IDENTITY


@pytest.mark.parametrize(("federation", "device"), [("fed", "other"), ("other", "watch-7")])
def test_another_devices_store_is_refused(
    store: DeviceStore, path: Path, federation: str, device: str
) -> None:
    theirs = Identity(federation, device, "q" * 43, ())
    store.write_identity(theirs)
    with pytest.raises(StoreError, match=rf"is that of {device} of {federation}, .* is of watch-7"):
        take_identity(store, path)
    assert store.read_identity() == theirs


NO_IDENTITIES = {
    "empty": "",
    "no JSON": "password",
    "a list": "[]",
    "deep": "[" * 60_000,
    "a field is missing": '{"device": "d"}',
    "a field too many": json.dumps({**json.loads('{"federation": "f", "device": "d"}'),
                                    "password": "p" * 20, "private_blocks": [], "x": 1}),
    "a path as name": json.dumps({"federation": "f", "device": "../d", "password": "p" * 20,
                                  "private_blocks": []}),
    "too long": " " * 100_000 + "{}",
}  # fmt: skip


@pytest.mark.parametrize("case", NO_IDENTITIES)
def test_files_that_are_none(store: DeviceStore, tmp_path: Path, case: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(NO_IDENTITIES[case])
    with pytest.raises(ValueError, match=rf"no identity in {path}, .* server enroll writes") as e:
        take_identity(store, path)
    assert len(str(e.value)) < 400
    assert store.read_identity() is None


def test_no_file(store: DeviceStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no identity in .*: No such file"):
        take_identity(store, tmp_path / "none.json")


# The URL of a broker

URLS = {
    "mqtt://broker": Session("broker", 1883, False),
    "mqtts://broker": Session("broker", 8883, True),
    "mqtt://10.0.0.7:99/": Session("10.0.0.7", 99, False),
    "mqtts://[::1]:8884": Session("::1", 8884, True),
}


@pytest.mark.parametrize("url", URLS)
def test_broker_urls(url: str) -> None:
    assert parse_mqtt_url(url) == URLS[url]


@pytest.mark.parametrize(
    "url",
    ["mqtt:", "mqtt://", "mqtt://:1883", "mqtt:broker", "mqtt://broker:0", "mqtt://broker:x",
     "mqtt://broker:99999", "mqtt://broker/topic", "mqtt://broker?x=1", "mqtt://d:secret@broker"],
)  # fmt: skip
def test_malformed_broker_urls(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected mqtt\(s\)://host:port") as caught:
        EdgeClient(url, store=tmp_path)
    assert "secret" not in str(caught.value)
    DeviceStore(tmp_path).close()  # nobody holds it


def test_a_device_without_http_cannot_enroll_itself(tmp_path: Path) -> None:
    with (
        EdgeClient("mqtt://127.0.0.1:9", token="t", store=tmp_path) as client,
        pytest.raises(EnrollError, match=r"give identity=FILE, which .* server enroll DEVICE"),
    ):
        client.run()


def test_the_identity_says_who_the_client_is(path: Path, tmp_path: Path) -> None:
    with EdgeClient("mqtt://127.0.0.1:9", identity=path, store=tmp_path / "s") as client:
        assert client.device == "watch-7"
