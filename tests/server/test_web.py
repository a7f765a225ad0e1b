from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sqlite3
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web, web_request
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from petalfl.errors import PetalError
from petalfl.mqtt import Endpoint
from petalfl.store import Identity
from petalfl.vectors import to_bytes
from server import ranges, service
from server.broker import BrokerError
from server.catalog import File
from server.web import MAX_REQUEST_BYTES, WebApp, build_app
from tests.server.builders import (
    ENROLLED,
    FED,
    INITIAL,
    SIZES,
    Door,
    FakeBroker,
    FakeJudge,
    Run,
    Site,
    settle,
)

TOKEN = "the-join-token"
ROOT = f"/v1/{FED}"
HELD_BY_WATCH = ("encoder-acc", "fusion", "head")
Headers = dict[str, str]
OPERATOR: Headers = {"Authorization": f"Bearer {TOKEN}"}


def basic(raw: bytes) -> str:
    return "Basic " + base64.b64encode(raw).decode()


def login(device: str, password: str | None = None) -> Headers:
    known = f"password of {device}" if password is None else password
    return {"Authorization": basic(f"{device}:{known}".encode())}


@dataclass
class Served:
    """A federation behind HTTP, and a client of it."""

    client: TestClient[web.Request, web.Application]
    app: web.Application
    run: Run
    site: Site
    broker: FakeBroker
    door: Door

    async def get(self, path: str, headers: Headers | None = None) -> tuple[int, bytes]:
        url = URL(path, encoded=True)  # as it is: nothing is normalized on its way
        async with self.client.get(url, headers=headers, allow_redirects=False) as response:
            return response.status, await response.read()

    async def json(self, path: str, headers: Headers) -> Any:
        status, body = await self.get(path, headers)
        assert status == 200, body
        return json.loads(body)

    async def enroll(self, body: object, headers: Headers = OPERATOR) -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = f"{ROOT}/enroll"
        async with self.client.post(path, data=data, headers=headers) as response:
            return response.status, await response.read()

    async def metrics(self) -> dict[tuple[str, str], float]:
        """Values by sample name and the value of its label, or its federation where it has none."""
        status, body = await self.get("/metrics", OPERATOR)
        assert status == 200
        return {
            (sample.name, next(v for k, v in by_own_label(sample.labels))): sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        }


def by_own_label(labels: dict[str, str]) -> list[tuple[str, str]]:
    """All metrics have a federation; it comes last here."""
    return sorted(labels.items(), key=lambda pair: pair[0] == "federation")


@asynccontextmanager
async def serve(folder: Path, **changes: Any) -> AsyncIterator[Served]:
    site, broker = Site(folder), FakeBroker()
    with site.run(**changes) as run:
        door = Door(site.manifest, FakeJudge())
        web_app = WebApp(run.federation, run.state, broker, door.gateway, TOKEN, "admin's token")
        app = build_app([web_app])
        async with TestClient(TestServer(app)) as client:
            yield Served(client, app, run, site, broker, await door.open())


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(tmp_path) as one:
        yield one


# Who may ask

STRANGERS: dict[str, Headers] = {
    "nobody": {},
    "empty": {"Authorization": ""},
    "wrong token": {"Authorization": f"Bearer {TOKEN}x"},
    "part of the token": {"Authorization": f"Bearer {TOKEN[:-1]}"},
    "no token": {"Authorization": "Bearer "},
    "token of another kind": {"Authorization": f"Token {TOKEN}"},
    "wrong password": login("watch", "password of phone"),
    "empty password": login("watch", ""),
    "unknown device": login("nobody"),
    "no base64": {"Authorization": "Basic !!!"},
    "no UTF-8": {"Authorization": basic(b"\xff\xfe:\xff")},
    "no colon": {"Authorization": basic(b"watch")},
    "token as password": login("watch", TOKEN),
}
PARTS = {"path": "head/parameters.bin", "block": "head", "version": "1"}
FOR_OPERATORS = ("/metrics", f"{ROOT}/enroll", f"{ROOT}/status", f"{ROOT}/rounds",
                 f"{ROOT}/devices")  # fmt: skip
FOR_DEVICES = (f"{ROOT}/session", f"{ROOT}/artifacts/head/parameters.bin")
BY_POST = (f"{ROOT}/modalities",)  # for devices
FOR_ADMINS = (f"{ROOT}/revoke",)
ADMIN: Headers = {"Authorization": "Bearer admin's token"}
FOR_BOTH = (f"{ROOT}/manifest", f"{ROOT}/blocks", f"{ROOT}/blocks/head/1")


def routes(app: web.Application) -> list[tuple[str, str]]:
    """Method and a path of every route but ``/healthz``."""
    found = []
    for route in app.router.routes():
        info = route.resource.get_info() if route.resource else {}
        path = info.get("path") or info["formatter"].format(**PARTS)
        if path != "/healthz" and route.method != "HEAD":
            found.append((route.method, path))
    return found


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_strangers_are_turned_away_everywhere(served: Served, stranger: str) -> None:
    everything = routes(served.app)
    assert {path for _, path in everything} == {
        *FOR_OPERATORS, *FOR_DEVICES, *BY_POST, *FOR_BOTH, *FOR_ADMINS
    }  # fmt: skip
    for method, path in everything:
        body = {"device": "new", "modalities": ["acc"]}
        async with served.client.request(
            method, path, headers=STRANGERS[stranger], json=body
        ) as response:
            assert response.status == 401, (method, path)
            assert TOKEN not in await response.text()
    assert "new" not in served.run.state.devices() and served.broker.granted == {}


async def test_operators_and_devices_have_their_own_paths(served: Served) -> None:
    for path in FOR_DEVICES:
        assert (await served.get(path, OPERATOR))[0] == 401
        assert (await served.get(path, login("both")))[0] == 200
    for path in FOR_OPERATORS:
        if not path.endswith("enroll"):
            assert (await served.get(path, login("both")))[0] == 401
            assert (await served.get(path, OPERATOR))[0] == 200
    for path in FOR_BOTH:
        as_operator = await served.get(path, OPERATOR)
        assert as_operator[0] == 200
        assert as_operator == await served.get(path, login("both"))
    assert (await served.enroll({"device": "new", "modalities": ["acc"]}, login("both")))[0] == 401


async def test_modalities_that_come_later(served: Served) -> None:
    """Those that the device has had are kept: it may hold their blocks still."""
    path = f"{ROOT}/modalities"
    modalities = served.run.state.modalities
    assert modalities("watch") == ["acc"]
    for more, known in ((["gyro"], ["acc", "gyro"]), (["acc"], ["acc", "gyro"])):
        answer = await served.client.post(path, headers=login("watch"), json={"modalities": more})
        assert (answer.status, await answer.json()) == (200, {"modalities": known})
        assert modalities("watch") == known
    for body, message in (
        ({"modalities": ["eeg"]}, "found modality 'eeg'"),
        ({"modalities": []}, "modalities"),
        ({"device": "both", "modalities": ["acc"]}, "device"),
        ([], "modalities"),
    ):
        answer = await served.client.post(path, headers=login("watch"), json=body)
        assert answer.status == 400
        assert message in await answer.text()
    assert modalities("watch") == ["acc", "gyro"]


async def test_health_is_open_to_all(served: Served) -> None:
    assert await served.get("/healthz") == (200, b'{"status": "ok"}')


ODD_BYTES = {"token": "Bearer \udcff\udcfe", "login": "Basic \udcff\udcfe", "umlaut": "Basic ü"}


@pytest.mark.parametrize("case", ODD_BYTES)
async def test_odd_bytes_in_a_credential_are_turned_away(served: Served, case: str) -> None:
    path = FOR_OPERATORS[0] if case == "token" else FOR_DEVICES[0]
    assert (await raw_request(served, path, ODD_BYTES[case]))[0] == 401


async def raw_request(served: Served, path: str, authorization: str) -> tuple[int, bytes]:
    """Over a plain socket: no client library would send such a header."""
    assert served.client.port is not None
    reader, writer = await asyncio.open_connection(served.client.host, served.client.port)
    value = authorization.encode("utf-8", "surrogateescape")
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: ".encode()
    writer.write(head + value + b"\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), answer


async def test_a_plain_request_over_a_socket_is_answered(served: Served) -> None:
    good = login("watch")["Authorization"]
    assert (await raw_request(served, FOR_DEVICES[0], good))[0] == 200


# Revocation


async def revoke(served: Served, body: object, headers: Headers = ADMIN) -> tuple[int, str]:
    async with served.client.post(f"{ROOT}/revoke", headers=headers, json=body) as response:
        return response.status, await response.text()


async def test_a_revoked_device_is_nobody(served: Served) -> None:
    """At once, over HTTP and at the broker; its name is free again."""
    served.broker.granted["watch"] = "password of watch"
    assert await revoke(served, {"device": "watch"}) == (200, '{"device": "watch"}')
    for path in FOR_DEVICES:
        status, text = await served.get(path, login("watch"))
        assert status == 401 and b"its credential was revoked" in text
    assert "watch" not in served.broker.granted
    assert "watch" not in await served.json(f"{ROOT}/devices", OPERATOR)
    assert (await served.get(FOR_DEVICES[0], login("phone")))[0] == 200
    assert await revoke(served, {"device": "watch"}) == (
        404, f"device watch is not enrolled in {FED}"
    )  # fmt: skip
    assert (await served.enroll({"device": "watch", "modalities": ["acc"]}))[0] == 200


async def test_a_revoked_password_never_comes_back(tmp_path: Path) -> None:
    """Not with the key that it came with, either: who has that enrolls anew."""
    seen: set[str] = set()
    for _ in range(2):
        async with serve(tmp_path) as served:
            for _ in range(2):
                status, body = await served.enroll(CAR, with_key(KEY))
                password = json.loads(body)["password"]
                assert (status, password in seen) == (200, False)
                assert await served.enroll(CAR, with_key(KEY)) == (200, body)
                for old in seen:
                    assert (await served.get(FOR_DEVICES[0], login("car-7", old)))[0] == 401
                seen.add(password)
                assert (await revoke(served, {"device": "car-7"}))[0] == 200


async def test_only_an_admin_revokes(served: Served) -> None:
    """Who has the join token has it from an app, perhaps."""
    for headers in (OPERATOR, login("watch"), login("phone")):
        status, text = await revoke(served, {"device": "watch"}, headers)
        assert (status, text) == (401, "only on the server's own machine")
    assert "watch" in served.run.state.devices()
    bad: list[object] = [{}, {"device": "../x"}, {"device": "watch", "why": "x"}, []]
    for body in bad:
        assert (await revoke(served, body))[0] == 400


async def test_a_revocation_that_the_broker_refused_changes_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(device: str) -> None:
        raise BrokerError("no broker answers")

    with monkeypatch.context() as patch:
        patch.setattr(served.broker, "revoke", fail)
        assert await revoke(served, {"device": "watch"}) == (503, "no broker answers")
        assert (await served.get(FOR_DEVICES[0], login("watch")))[0] == 200
    assert (await revoke(served, {"device": "watch"}))[0] == 200


# Enrollment


async def test_enrollment_gives_a_login_for_http_and_broker(served: Served) -> None:
    status, body = await served.enroll({"device": "car-7", "modalities": ["gyro", "acc", "acc"]})
    assert status == 200
    identity = json.loads(body)
    password = identity.pop("password")
    assert identity == {"federation": FED, "device": "car-7", "private_blocks": []}
    assert Identity(FED, "car-7", password, ()).password and len(password) >= 43  # 256 bits
    assert served.broker.granted == {"car-7": password}
    assert served.run.state.devices()["car-7"] == ["acc", "gyro"]
    session = await served.json(f"{ROOT}/session", login("car-7", password))
    assert session == {"mqtt_host": "127.0.0.1", "mqtt_port": 1883, "mqtt_is_tls": False}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("petal.example:8443", "petal.example"),
        ("petal.example", "petal.example"),
        ("[::1]:1", "::1"),
    ],
)
async def test_a_broker_with_the_servers_certificate(
    served: Served, host: str, expected: str
) -> None:
    """It is where the server is, under the name by which the device knows it."""
    _, body = await served.enroll({"device": "car-7", "modalities": ["gyro"]})
    headers = {**login("car-7", json.loads(body)["password"]), "Host": host}
    served.broker.endpoint = Endpoint("127.0.0.1", 8883, is_tls=True)
    session = await served.json(f"{ROOT}/session", headers)
    assert session == {"mqtt_host": expected, "mqtt_port": 8883, "mqtt_is_tls": True}


async def test_a_host_that_is_none(served: Served) -> None:
    _, body = await served.enroll({"device": "car-7", "modalities": ["gyro"]})
    headers = {**login("car-7", json.loads(body)["password"]), "Host": "[::1"}
    status, text = await served.get(f"{ROOT}/session", headers)
    assert (status, text) == (400, b"the request's Host is '[::1'")


async def test_every_device_has_its_own_password(served: Served) -> None:
    for name in ("one", "two"):
        await served.enroll({"device": name, "modalities": ["acc"]})
    assert len(set(served.broker.granted.values())) == 2


async def test_enrollment_tells_which_blocks_are_private(tmp_path: Path) -> None:
    async with serve(tmp_path, private_blocks=("fusion", "head")) as served:
        _, body = await served.enroll({"device": "new", "modalities": ["acc"]})
        assert json.loads(body)["private_blocks"] == ["fusion", "head"]


async def test_enrollment_tells_which_tensors_are_private(tmp_path: Path) -> None:
    async with serve(tmp_path, private_tensors=("head/fc.bias",)) as served:
        _, body = await served.enroll({"device": "new", "modalities": ["acc"]})
        assert json.loads(body)["private_tensors"] == ["head/fc.bias"]


async def test_a_taken_name_is_refused_and_keeps_its_login(served: Served) -> None:
    status, body = await served.enroll({"device": "watch", "modalities": ["gyro"]})
    assert (status, served.broker.granted) == (409, {})
    assert b"device watch is enrolled already" in body
    assert served.run.state.devices()["watch"] == ["acc"]
    assert (await served.get(f"{ROOT}/session", login("watch")))[0] == 200


KEY = "k" * 22
CAR = {"device": "car-7", "modalities": ["acc"]}


def with_key(key: str) -> Headers:
    return {**OPERATOR, "Idempotency-Key": key}


async def test_an_enrollment_whose_answer_was_lost_comes_again(tmp_path: Path) -> None:
    """With the device's own key, also after a restart; the password is nobody else's."""
    async with serve(tmp_path) as served:
        status, body = await served.enroll(CAR, with_key(KEY))
        password = json.loads(body)["password"]
        assert status == 200 and len(password) >= 43
        assert await served.enroll(CAR, with_key(KEY)) == (200, body)
        _, other = await served.enroll({**CAR, "device": "car-8"}, with_key(KEY))
        assert json.loads(other)["password"] != password
    async with serve(tmp_path) as served:
        assert await served.enroll(CAR, with_key(KEY)) == (200, body)
        assert served.broker.granted == {"car-7": password}
        assert (await served.get(f"{ROOT}/session", login("car-7", password)))[0] == 200
        for headers in (OPERATOR, with_key(KEY + "k"), with_key("K" * 22)):
            assert (await served.enroll(CAR, headers))[0] == 409
        assert (await served.get(f"{ROOT}/session", login("car-7", password)))[0] == 200


async def test_another_federation_has_other_passwords(tmp_path: Path) -> None:
    found = set()
    for name in ("one", "two"):
        async with serve(tmp_path / name) as served:
            _, body = await served.enroll(CAR, with_key(KEY))
            found.add(json.loads(body)["password"])
    assert len(found) == 2


async def test_an_enrollment_that_the_broker_refused_is_tried_again(served: Served) -> None:
    served.broker.error = BrokerError("no broker answers")
    assert (await served.enroll(CAR, with_key(KEY)))[0] == 503
    served.broker.error = None
    status, body = await served.enroll(CAR, with_key(KEY))
    assert status == 200
    served.broker.error = BrokerError("no broker answers")
    assert (await served.enroll(CAR, with_key(KEY)))[0] == 503
    assert (await served.get(f"{ROOT}/session", login("car-7", json.loads(body)["password"])))[
        0
    ] == 200, "it has been enrolled before"


async def test_a_device_that_was_cut_off_gets_no_login_again(tmp_path: Path) -> None:
    """Not by enrolling once more, nor with a restart; an operator lets it in again."""
    async with serve(tmp_path) as served:
        _, body = await served.enroll(CAR, with_key(KEY))
        old = json.loads(body)["password"]
        assert (await served.get(FOR_DEVICES[0], login("car-7", old)))[0] == 200
        service._cut_off(served.broker, served.run.state, "car-7")
        await settle()
        assert served.broker.granted == {}
        await assert_cut_off(served, old)
    async with serve(tmp_path) as served:
        await assert_cut_off(served, old)
        assert (await revoke(served, {"device": "car-7"}))[0] == 200
        status, body = await served.enroll(CAR, with_key(KEY))
        new = json.loads(body)["password"]
        assert (status, served.broker.granted) == (200, {"car-7": new})
        assert (await served.get(FOR_DEVICES[0], login("car-7", new)))[0] == 200
        assert (await served.get(FOR_DEVICES[0], login("car-7", old)))[0] == 401


async def assert_cut_off(served: Served, password: str) -> None:
    refusals = [await served.enroll(CAR, with_key(KEY))]
    refusals += [await served.get(path, login("car-7", password)) for path in FOR_DEVICES]
    for status, text in refusals:
        assert status == 403 and b"device car-7 was cut off" in text
    assert served.broker.granted == {}
    assert (await served.enroll(CAR))[0] == 409, "whoever else asks learns nothing more"
    assert (await served.get(FOR_DEVICES[0], login("car-7", "x")))[0] == 401


async def test_a_device_is_cut_off_at_the_broker_where_the_disk_refuses_the_note(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: str) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    await served.enroll(CAR)
    monkeypatch.setattr(served.run.state, "cut_off", fail)
    service._cut_off(served.broker, served.run.state, "car-7")
    await settle()
    assert served.broker.granted == {}
    assert "cannot note that device car-7 is cut off: database or disk is full" in caplog.text


@pytest.mark.parametrize("key", ["short", "k" * 129, "k" * 21 + ":", "k" * 21 + "ä"])
async def test_a_bad_key_is_refused(served: Served, key: str) -> None:
    status, body = await served.enroll(CAR, with_key(key))
    assert status == 400 and b"expected 22 to 128" in body
    assert "car-7" not in served.run.state.devices()


GOOD = {"device": "new", "modalities": ["acc"]}
BAD_ENROLLMENTS: dict[str, tuple[object, int]] = {
    "upper case": ({**GOOD, "device": "New"}, 400),
    "a path": ({**GOOD, "device": "../new"}, 400),
    "a wildcard": ({**GOOD, "device": "+"}, 400),
    "a topic": ({**GOOD, "device": "a/b"}, 400),
    "a dollar name": ({**GOOD, "device": "$server"}, 400),
    "a line break": ({**GOOD, "device": "new\n"}, 400),
    "an empty name": ({**GOOD, "device": ""}, 400),
    "a long name": ({**GOOD, "device": "a" * 65}, 400),
    "a number": ({**GOOD, "device": 7}, 400),
    "an unknown modality": ({**GOOD, "modalities": ["acc", "sonar"]}, 400),
    "no modality": ({**GOOD, "modalities": []}, 400),
    "a text of modalities": ({**GOOD, "modalities": "acc"}, 400),
    "too many modalities": ({**GOOD, "modalities": ["acc"] * 65}, 400),
    "a missing field": ({"device": "new"}, 400),
    "an unknown field": ({**GOOD, "admin": True}, 400),
    "a list": ([GOOD], 400),
    "null": (None, 400),
    "no JSON": (b"device=new", 400),
    "nothing": (b"", 400),
    "no UTF-8": (b'{"device": "\xff"}', 400),
    "too large": ({**GOOD, "padding": "x" * MAX_REQUEST_BYTES}, 413),
}


@pytest.mark.parametrize("case", BAD_ENROLLMENTS)
async def test_a_bad_enrollment_is_refused(served: Served, case: str) -> None:
    body, expected = BAD_ENROLLMENTS[case]
    before = served.run.state.devices()
    status, text = await served.enroll(body)
    assert status == expected
    assert 0 < len(text) < 300 and b"Traceback" not in text
    assert served.run.state.devices() == before and served.broker.granted == {}


async def test_deeply_nested_json_is_refused(served: Served) -> None:
    assert (await served.enroll(b"[" * 60_000))[0] == 400


async def test_a_device_that_the_broker_refuses_is_not_enrolled(served: Served) -> None:
    served.broker.error = BrokerError("the broker has gone")
    assert await served.enroll(GOOD) == (503, b"the broker has gone")
    assert "new" not in served.run.state.devices()
    served.broker.error = None
    assert (await served.enroll(GOOD))[0] == 200  # the name is free still


# Artifacts


async def test_the_manifest_is_served_as_it_is(served: Served) -> None:
    status, body = await served.get(f"{ROOT}/manifest", login("watch"))
    assert (status, body) == (200, (served.site.artifacts / "manifest.json").read_bytes())


@pytest.mark.parametrize("file", ["training_backward.onnx", "eval_model.onnx", "parameters.bin"])
async def test_a_device_gets_the_artifacts_of_its_own_blocks_alone(
    served: Served, file: str
) -> None:
    for block in SIZES:
        status, body = await served.get(f"{ROOT}/artifacts/{block}/{file}", login("watch"))
        if block in HELD_BY_WATCH:
            assert (status, body) == (200, (served.site.artifacts / block / file).read_bytes())
        else:
            assert status == 403 and b"does not hold block encoder-gyro" in body


async def test_a_head_has_no_forward_graph_to_get(served: Served) -> None:
    path = f"{ROOT}/artifacts/head/training_forward.onnx"
    assert await served.get(path, login("watch")) == (404, b"no such artifact in the manifest")


@pytest.mark.parametrize("device", ENROLLED)
async def test_every_device_gets_the_optimizers(served: Served, device: str) -> None:
    for name in ("sgd", "adamw"):
        path = f"{ROOT}/artifacts/optimizers/{name}.onnx"
        assert await served.get(path, login(device)) == (200, name.encode())
        assert (await served.get(path, OPERATOR))[0] == 401


TRICKS = (
    "../data/state.sqlite",
    "head/../../data/state.sqlite",
    "%2e%2e/data/state.sqlite",
    "head/%2e%2e/%2e%2e/data/state.sqlite",
    "head%2f..%2f..%2fdata%2fstate.sqlite",
    "..%2fdata%2fstate.sqlite",
    "%252e%252e/data/state.sqlite",
    "head/..%5c..%5cdata",
    "head//parameters.bin",
    "head/parameters.bin/",
    "head/parameters.bin%00",
    "HEAD/parameters.bin",
    "manifest.json",
    "secret.txt",
    "head/secret.txt",
    "head",
    "/etc/passwd",
    "%2fetc%2fpasswd",
)


@pytest.mark.parametrize("trick", TRICKS)
async def test_nothing_but_the_manifests_files_is_served(served: Served, trick: str) -> None:
    for folder in (served.site.artifacts, served.site.artifacts / "head"):
        (folder / "secret.txt").write_text("a file that the manifest does not name")
    status, body = await served.get(f"{ROOT}/artifacts/{trick}", login("both"))
    assert status == 404
    assert b"SQLite" not in body and b"a file" not in body and b"root:" not in body


async def test_an_own_and_a_foreign_block_differ_by_one_dot_dot(served: Served) -> None:
    path = f"{ROOT}/artifacts/head/../encoder-gyro/parameters.bin"
    status, body = await served.get(path, login("watch"))
    assert status in (403, 404) and to_bytes(INITIAL["encoder-gyro"]) not in body


# Block versions


async def test_a_block_is_its_vector_and_counted_as_traffic(served: Served) -> None:
    status, body = await served.get(f"{ROOT}/blocks/head/1", login("watch"))
    assert (status, body) == (200, INITIAL["head"].astype("<f4").tobytes())
    await served.get(f"{ROOT}/blocks/head/1", login("phone"))
    await served.get(f"{ROOT}/blocks/head/1", login("phone"))
    await served.get(f"{ROOT}/blocks/fusion/1", login("phone"))
    devices = await served.json(f"{ROOT}/devices", OPERATOR)
    assert {name: one["blocks"] for name, one in devices.items()} == {
        "both": {},
        "watch": {"head": {"bytes_up": 0, "bytes_down": 32}},
        "phone": {
            "head": {"bytes_up": 0, "bytes_down": 64},
            "fusion": {"bytes_up": 0, "bytes_down": 16},
        },
    }


async def test_a_device_gets_the_versions_of_its_own_blocks_alone(served: Served) -> None:
    for device, foreign in (("watch", "encoder-gyro"), ("phone", "encoder-acc"), ("both", "")):
        for block in SIZES:
            status, _ = await served.get(f"{ROOT}/blocks/{block}/1", login(device))
            assert status == (403 if block == foreign else 200), (device, block)
    devices = await served.json(f"{ROOT}/devices", OPERATOR)
    assert "encoder-gyro" not in devices["watch"]["blocks"]


async def test_old_and_new_versions_are_served_and_no_others(served: Served) -> None:
    served.run.ready("watch")
    await served.run.finish_round(1, 2.0)
    for version, expected in ((1, INITIAL["head"]), (2, INITIAL["head"] + 2)):
        status, body = await served.get(f"{ROOT}/blocks/head/{version}", login("watch"))
        assert (status, body) == (200, to_bytes(expected))
        digest = hashlib.sha256(body).hexdigest()
        assert version == 1 or served.run.task("watch", 2).blocks["head"].sha256 == digest
    for none in ("0", "3", "999999999999999", "9" * 40, "-1", "1.0", "x", "1/", "%31%00"):
        assert (await served.get(f"{ROOT}/blocks/head/{none}", login("watch")))[0] == 404
    versions = await served.json(f"{ROOT}/blocks", login("watch"))
    assert {name: versions[name] for name in HELD_BY_WATCH} == dict.fromkeys(HELD_BY_WATCH, 2)


async def test_a_private_block_is_never_served(tmp_path: Path) -> None:
    async with serve(tmp_path, private_blocks=("head",)) as served:
        assert (await served.get(f"{ROOT}/blocks/head/1", login("watch")))[0] == 404
        assert "head" not in await served.json(f"{ROOT}/blocks", login("watch"))


async def test_a_block_that_is_none_is_not_found(served: Served) -> None:
    for block in ("no-such-block", "..", "%2e%2e"):
        status, _ = await served.get(f"{ROOT}/blocks/{block}/1", login("watch"))
        assert status in (403, 404)


async def test_a_damaged_old_version_is_an_error_and_no_body(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.run.ready("watch")
    await served.run.finish_round(1)
    path = served.site.data_dir / "blocks" / "head" / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    status, body = await served.get(f"{ROOT}/blocks/head/1", login("watch"))
    assert status == 503 and b"is damaged" in body
    assert "is damaged" in caplog.text


async def test_another_federation_is_not_found(served: Served) -> None:
    assert (await served.get("/v1/other/status", OPERATOR))[0] == 404


# Ranges and entity tags

BODY = to_bytes(INITIAL["head"])  # 32 bytes
ETAG = f'"{hashlib.sha256(BODY).hexdigest()}"'
WHOLE = (200, BODY, None)
RANGES: dict[str, tuple[Headers, tuple[int, bytes, str | None]]] = {
    "no range": ({}, WHOLE),
    "from a byte on": ({"Range": "bytes=5-"}, (206, BODY[5:], "bytes 5-31/32")),
    "from the first on": ({"Range": "bytes=0-"}, WHOLE),
    "some bytes": ({"Range": "bytes=5-6"}, (206, BODY[5:7], "bytes 5-6/32")),
    "beyond the end": ({"Range": "bytes=30-99"}, (206, BODY[30:], "bytes 30-31/32")),
    "the last bytes": ({"Range": "bytes=-3"}, (206, BODY[-3:], "bytes 29-31/32")),
    "the last no bytes": ({"Range": "bytes=-0"}, (416, b"", "bytes */32")),
    "the last no bytes, if it is another": ({"Range": "bytes=-0", "If-Range": '"other"'}, WHOLE),
    "at the end": ({"Range": "bytes=32-"}, (416, b"", "bytes */32")),
    "far out": ({"Range": "bytes=" + "9" * 30 + "-"}, (416, b"", "bytes */32")),
    "two ranges": ({"Range": "bytes=0-1,4-5"}, WHOLE),
    "backwards": ({"Range": "bytes=6-5"}, WHOLE),
    "another unit": ({"Range": "floats=1-2"}, WHOLE),
    "nonsense": ({"Range": "bytes=a-b"}, WHOLE),
    "too many digits": ({"Range": "bytes=" + "9" * 5000 + "-"}, WHOLE),
    "if it is this": ({"Range": "bytes=5-", "If-Range": ETAG}, (206, BODY[5:], "bytes 5-31/32")),
    "if it is another": ({"Range": "bytes=5-", "If-Range": '"other"'}, WHOLE),
    "if it is this, weakly": ({"Range": "bytes=5-", "If-Range": f"W/{ETAG}"}, WHOLE),
    "if it is of a date": ({"Range": "bytes=5-", "If-Range": "Sat, 21 Nov 2026 00:00:00 GMT"},
                           WHOLE),
    "known": ({"If-None-Match": ETAG}, (304, b"", None)),
    "one of those known": ({"If-None-Match": f'"x", {ETAG}'}, (304, b"", None)),
    "any known": ({"If-None-Match": "*"}, (304, b"", None)),
    "another known": ({"If-None-Match": '"x"'}, WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("case", RANGES)
async def test_ranges_and_entity_tags(served: Served, case: str) -> None:
    headers, (status, expected, content_range) = RANGES[case]
    for path in (f"{ROOT}/blocks/head/1", f"{ROOT}/artifacts/head/parameters.bin"):
        async with served.client.get(path, headers=login("watch") | headers) as response:
            body = await response.read()
            assert (response.status, response.headers.get("Content-Range")) == (
                status,
                content_range,
            )
            assert body == expected or status == 416
            assert response.headers["ETag"] == ETAG
    devices = await served.json(f"{ROOT}/devices", OPERATOR)
    counted = {} if status in (304, 416) else {"head": {"bytes_up": 0, "bytes_down": len(expected)}}
    assert devices["watch"]["blocks"] == counted


async def test_a_head_request_has_the_length_and_no_body(served: Served) -> None:
    for path in (f"{ROOT}/blocks/head/1", f"{ROOT}/artifacts/head/parameters.bin"):
        headers = login("watch") | {"Range": "bytes=5-"}
        async with served.client.head(path, headers=headers) as response:
            assert (response.status, response.headers["Content-Length"]) == (200, "32")
            assert (response.headers["ETag"], await response.read()) == (ETAG, b"")
    assert (await served.json(f"{ROOT}/devices", OPERATOR))["watch"]["blocks"] == {}


async def test_the_manifests_tag_is_its_digest(served: Served) -> None:
    """Of the manifest that the server goes by, whatever lies in its folder meanwhile."""
    path = served.site.artifacts / "manifest.json"
    manifest = path.read_bytes()
    etag = f'"{hashlib.sha256(manifest).hexdigest()}"'
    path.write_bytes(b"{}")
    async with served.client.get(f"{ROOT}/manifest", headers=login("watch")) as response:
        assert (await response.read(), response.headers["ETag"]) == (manifest, etag)
    known = login("watch") | {"If-None-Match": etag}
    assert await served.get(f"{ROOT}/manifest", known) == (304, b"")


async def test_a_file_that_became_shorter_is_an_error(served: Served) -> None:
    path = served.site.artifacts / "head" / "parameters.bin"
    path.write_bytes(BODY[:-1])
    status, body = await served.get(f"{ROOT}/artifacts/head/parameters.bin", login("watch"))
    assert status == 503 and b"is shorter than the manifest says" in body
    path.unlink()
    status, body = await served.get(f"{ROOT}/artifacts/head/parameters.bin", login("watch"))
    assert status == 503 and b"cannot read" in body


async def test_a_file_that_becomes_shorter_on_its_way_is_cut_off(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than filled with something else: the client sees that it is not whole."""
    monkeypatch.setattr(ranges, "PIECE_BYTES", 10)
    read = File.read

    def shrinking(self: File, start: int, end: int) -> bytes | memoryview:
        if start >= 20:
            raise PetalError("shorter")
        return read(self, start, end)

    with monkeypatch.context() as patch, pytest.raises(aiohttp.ClientPayloadError):
        patch.setattr(File, "read", shrinking)
        await served.get(f"{ROOT}/artifacts/head/parameters.bin", login("watch"))
    assert (await served.get(f"{ROOT}/manifest", OPERATOR))[0] == 200


# For operators


async def test_the_status_follows_the_rounds(tmp_path: Path) -> None:
    async with serve(tmp_path, num_rounds=1, private_blocks=("head",), min_devices=2) as served:
        status = await served.json(f"{ROOT}/status", OPERATOR)
        assert status.pop("uptime_s") >= 0
        expected = {
            "federation": FED,
            "model": "tiny",
            "round_num": 0,
            "num_rounds": 1,
            "is_round_open": False,
            "is_finished": False,
            "cohort_size": 0,
            "num_reports": 0,
            "devices_enrolled": 3,
            "devices_ready": 0,
            "shared_blocks": {"encoder-acc": 1, "encoder-gyro": 1, "fusion": 1},
            "private_blocks": ["head"],
            "private_tensors": [],
            "frozen_blocks": [],
            "mode": "sync",
            "updates_accepted": 0,
            "updates_dropped": 0,
            "updates_refused": {},
            "bytes_up": 0,
            "bytes_down": 0,
        }
        assert status == expected
        for device in ("watch", "phone"):
            served.run.ready(device)
        await served.run.finish_round(1, 1.0, "watch")
        status = await served.json(f"{ROOT}/status", OPERATOR)
        del status["uptime_s"]
        assert status == {
            **expected,
            "round_num": 1,
            "is_round_open": True,
            "cohort_size": 2,
            "num_reports": 1,
            "devices_ready": 2,
            "updates_accepted": 2,
        }
        await served.run.finish_round(1, 1.0, "phone")
        status = await served.json(f"{ROOT}/status", OPERATOR)
        assert (status["is_finished"], status["is_round_open"]) == (True, False)
        assert status["shared_blocks"] == {"encoder-acc": 2, "encoder-gyro": 2, "fusion": 2}


async def test_rounds_and_devices(served: Served) -> None:
    assert await served.json(f"{ROOT}/rounds", OPERATOR) == []
    served.run.ready("watch")
    served.run.federation.on_bytes_up("watch", "head", 123)
    await served.run.finish_round(1)
    [closed] = await served.json(f"{ROOT}/rounds", OPERATOR)
    assert closed.keys() == {
        "round_num", "cohort_size", "num_reports", "num_late", "duration_s", "loss", "blocks"
    }  # fmt: skip
    assert (closed["round_num"], closed["cohort_size"], closed["loss"]) == (1, 1, 0.5)
    assert closed["blocks"]["head"] == {
        "version": 2, "num_asked": 1, "holders": ["watch"], "num_examples": 1, "num_dropped": 0,
        "outliers": [], "bytes_up": 123, "bytes_down": 0,
    }  # fmt: skip
    await served.run.finish_round(2)
    assert [r["round_num"] for r in await served.json(f"{ROOT}/rounds", OPERATOR)] == [1, 2]
    later = await served.json(f"{ROOT}/rounds?since=1", OPERATOR)
    assert [r["round_num"] for r in later] == [2]
    assert (await served.get(f"{ROOT}/rounds?since=-1", OPERATOR))[0] == 400
    devices = await served.json(f"{ROOT}/devices", OPERATOR)
    assert devices == {
        "both": {"modalities": ["acc", "gyro"], "is_ready": False, "blocks": {}},
        "phone": {"modalities": ["gyro"], "is_ready": False, "blocks": {}},
        "watch": {
            "modalities": ["acc"],
            "is_ready": True,
            "blocks": {"head": {"bytes_up": 123, "bytes_down": 0}},
        },
    }


async def test_metrics_are_what_happened(served: Served) -> None:
    assert (await served.metrics())["petalfl_round", FED] == 0
    served.run.ready("watch")
    served.run.federation.on_bytes_up("watch", "head", 123)
    served.run.federation.on_bytes_down("watch", "fusion", 45)
    await served.run.finish_round(1)
    await served.door.request(b"garbage")
    await served.door.request(b"more garbage")
    assert await served.metrics() == {
        ("petalfl_block_version", "encoder-acc"): 2,
        ("petalfl_block_version", "encoder-gyro"): 1,
        ("petalfl_block_version", "fusion"): 2,
        ("petalfl_block_version", "head"): 2,
        ("petalfl_refused_messages_total", "malformed"): 2,
        ("petalfl_updates_accepted_total", FED): 3,
        ("petalfl_block_bytes_total", "up"): 123,
        ("petalfl_block_bytes_total", "down"): 45,
        ("petalfl_round", FED): 2,
        ("petalfl_devices_ready", FED): 1,
        ("petalfl_devices_at_work", FED): 1,
        ("petalfl_devices_enrolled", FED): 3,
        ("petalfl_updates_dropped_total", FED): 0,
        ("petalfl_reducer_info", "numpy"): 1,
        **{("petalfl_block_buffered", block): 0 for block in SIZES},
        **{("petalfl_block_holders", block): int(block != "encoder-gyro") for block in SIZES},
    }


async def test_the_open_rounds_traffic_is_in_status_and_metrics(served: Served) -> None:
    await served.get(f"{ROOT}/blocks/head/1", login("watch"))
    assert (await served.json(f"{ROOT}/status", OPERATOR))["bytes_down"] == 32
    assert (await served.metrics())["petalfl_block_bytes_total", "down"] == 32


async def test_aiohttp_warns_of_nothing(served: Served) -> None:
    getattr(web_request.BaseRequest, "_seen_str_keys", set()).clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await served.json(f"{ROOT}/session", login("watch"))
    assert [str(one.message) for one in caught] == []
