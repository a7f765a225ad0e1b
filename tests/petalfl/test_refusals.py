"""`EdgeClient` where it is refused, or refuses: tokens, data, names, stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl import (
    DataError,
    EdgeClient,
    EnrollError,
    PetalError,
    StoreError,
    TransportError,
)
from petalfl.downlink import Downlink
from petalfl.http import HttpClient
from petalfl.store import DeviceStore
from petalfl.ways import Session
from tests.integration.harness import Server
from tests.petalfl.clients import (
    LABELS,
    A,
    B,
    Make,
    run_and_stop,
)


def test_wrong_token(idle: Server, make: Make) -> None:
    client = make(idle, "wrong-token", token="guess")
    with pytest.raises(EnrollError, match="401 wrong or no token"):
        client.run()
    assert "wrong-token" not in idle.get("devices")


def test_the_right_token_after_the_wrong_one(idle: Server, make: Make, tmp_path: Path) -> None:
    client = make(idle, "second-try", token="guess")
    with pytest.raises(EnrollError):
        client.run()
    client.close()
    run_and_stop(make(idle, "second-try"))
    assert idle.get("devices")["second-try"]["modalities"] == ["a"]


def test_a_name_that_is_taken(idle: Server, make: Make, tmp_path: Path) -> None:
    run_and_stop(make(idle, "taken"))
    other = make(idle, "taken", store=tmp_path / "other")
    with pytest.raises(EnrollError, match="409 device taken is enrolled already"):
        other.run()


def test_a_store_that_is_open(idle: Server, make: Make) -> None:
    client = make(idle, "first")
    with pytest.raises(StoreError, match="is open already; give every client its own"):
        make(idle, "first")
    client.close()
    make(idle, "first")


def test_no_server(idle: Server, make: Make) -> None:
    client = make(idle, url="http://127.0.0.1:9")
    with pytest.raises(TransportError, match=r"no petalfl server answers at http://127.0.0.1:9"):
        client.run()


def test_no_broker(idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Downlink, "get_session", lambda self: Session("127.0.0.1", 9, False))
    with pytest.raises(TransportError, match=r"no broker answers at mqtt://127.0.0.1:9"):
        make(idle).run()


def test_another_federation(idle: Server, make: Make) -> None:
    with pytest.raises(TransportError, match="404"):
        make(idle, federation="other").run()


def test_an_enrollment_whose_answer_was_lost(
    idle: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device asks again after a restart, and gets what it would have had."""
    post, answers = HttpClient.post_json, []

    def lose(self: HttpClient, *of: Any) -> Any:
        answers.append(post(self, *of))
        raise TransportError("the line broke")

    with monkeypatch.context() as patch:
        patch.setattr(HttpClient, "post_json", lose)
        client = make(idle, "unlucky")
        with pytest.raises(TransportError, match="the line broke"):
            client.run()
        client.close()
    assert "unlucky" in idle.get("devices")
    assert (tmp_path / "unlucky" / "enrollment.json").stat().st_mode & 0o77 == 0
    again = make(idle, "unlucky")
    run_and_stop(again)
    assert again._trainer.identity is not None
    assert [answer["password"] for answer in answers] == [again._trainer.identity.password]
    assert not (tmp_path / "unlucky" / "enrollment.json").exists()


def test_a_credential_that_was_revoked(idle: Server, make: Make, tmp_path: Path) -> None:
    client = make(idle, "revoked")
    run_and_stop(client)
    client.close()
    store = DeviceStore(tmp_path / "revoked")
    identity = store.read_identity()
    assert identity is not None
    store.write_identity(type(identity)("default", "revoked", "x" * 43, identity.private_blocks))
    store.close()
    with pytest.raises(
        EnrollError, match=r"401 .*not enrolled here, or its credential was revoked"
    ):
        make(idle, "revoked").run()


def test_malformed_replies(idle: Server, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(HttpClient, "post_json", lambda self, *of: {"device": "../x"})
        with pytest.raises(TransportError, match="enrollment reply is malformed: Identity"):
            make(idle, "d1").run()
    monkeypatch.setattr(HttpClient, "get_json", lambda self, path: {"mqtt_port": 0})
    with pytest.raises(TransportError, match="session reply is malformed: Session"):
        make(idle, "d2").run()


BAD_DATA = {
    "shape": ({"data": {"a": A[:, :4]}}, r"modality a: found shape \(24, 4\), expected \(n, 5\)"),
    "NaN": ({"data": {"a": A * np.nan}}, "modality a: example 0 holds NaN"),
    "object": ({"data": {"a": A.astype(object)}}, "modality a: found object"),
    "lengths": ({"data": {"a": A, "b": B[:9]}}, r"found \{'a': 24, 'b': 9\}"),
    "fewer labels": ({"labels": LABELS[:9]}, r"labels: found int64 \(9,\)"),
    "a class too many": ({"labels": LABELS + 1}, "labels: found 1 to 3, expected 0 to 2"),
    "no labels": ({"labels": None}, r"labels: .* expected integers \(24,\)"),
    "by task": ({"labels": {"head": LABELS[:9]}}, r"labels of head: found int64 \(9,\)"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data(idle: Server, make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(idle, **changes).run()


def test_a_modality_that_the_model_lacks(idle: Server, make: Make) -> None:
    with pytest.raises(PetalError, match="found modality 'eeg', the model has a, b"):
        make(idle, data={"a": A, "eeg": A}).run()


@pytest.mark.parametrize(("labels", "found"), [({"mood": LABELS}, "task 'mood'"), ({}, "no task")])
def test_a_task_that_the_model_lacks(idle: Server, make: Make, labels: Any, found: str) -> None:
    with pytest.raises(PetalError, match=f"found {found}, the model has head"):
        make(idle, labels=labels).run()


@pytest.mark.parametrize("device", ["A", "a/b", "+", "#", "x" * 65, "-a", "a b", "é", ".."])
def test_malformed_device(idle: Server, tmp_path: Path, device: str) -> None:
    with pytest.raises(ValueError, match="is no name"):
        EdgeClient(idle.url, store=tmp_path, device=device)
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_url_leaves_the_store_free(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected http"):
        EdgeClient("ftp://h", store=tmp_path)
    DeviceStore(tmp_path).close()


def test_a_damaged_store_is_left_free(tmp_path: Path) -> None:
    (tmp_path / "state.msgpack").write_bytes(b"rubbish")
    for _ in range(2):
        with pytest.raises(StoreError, match="checksum"):
            EdgeClient("http://127.0.0.1:9", store=tmp_path)


def test_a_random_name_stays(idle: Server, make: Make) -> None:
    client = make(idle)
    run_and_stop(client)
    name = client.device
    client.close()
    assert make(idle).device == name
    assert name.startswith("device-")
    assert name in idle.get("devices")


def test_nothing_to_predict_with_yet(idle: Server, make: Make) -> None:
    with pytest.raises(StoreError, match=r"has no model yet: call run\(\) first"):
        make(idle).predict({"a": A})
