"""A device in front of a hostile server: it refuses with a `PetalError`, and stays whole."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from petalfl import EdgeClient, PetalError, WireError, wire
from petalfl.data import check_inputs, check_labels
from petalfl.engine import OrtEngine
from petalfl.errors import ModelError
from petalfl.local_data import ArrayData
from petalfl.local_model import LocalModel
from petalfl.model import MANIFEST_NAME, ModelManifest
from petalfl.training import Hyperparameters, _Batches, train
from petalfl.vectors import from_bytes
from tests.petalfl.builders import make_block
from tests.petalfl.hostile_server import IDENTITY, HostileServer, hostile_server, publish

A = np.random.default_rng(1).standard_normal((24, 5), dtype=np.float32)
LABELS = np.arange(24) % 3
Lie = Callable[[HostileServer], None]


@pytest.fixture
def server(small_artifacts: Path) -> Iterator[HostileServer]:
    with hostile_server(small_artifacts) as server:
        yield server


@pytest.fixture(autouse=True)
def is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("client", "mqtt", "uplink", "participation"):
        monkeypatch.setattr(f"petalfl.{module}.BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr("petalfl.participation.GOODBYE_TIMEOUT_S", 30.0)  # all comes that is due
    monkeypatch.setattr("petalfl.training.memory_bytes", lambda: 8 << 30)


def meet(server: HostileServer, store: Path, num_told: int = 1) -> list[PetalError]:
    """A device's run, ended by an error or, of those it survives, by the last of so many.

    Returns:
        What the app was told.
    """
    told: list[PetalError] = []
    raised: list[BaseException] = []

    def on_error(error: PetalError) -> None:
        told.append(error)
        if len(told) >= num_told:
            client.stop()

    def run() -> None:
        try:
            client.run()
        except BaseException as error:
            raised.append(error)

    with EdgeClient(
        server.url, token="t", data={"a": A}, labels=LABELS, store=store, device="d",
        on_error=on_error,
    ) as client:  # fmt: skip
        running = threading.Thread(target=run)
        running.start()
        running.join(60)
        assert not running.is_alive()
    assert all(isinstance(error, PetalError) for error in raised), raised
    assert set(raised) <= set(told)
    return told


def test_an_honest_one(server: HostileServer, tmp_path: Path) -> None:
    assert meet(server, tmp_path) == []
    kinds = [type(message).__name__ for message in server.received]
    assert kinds == [
        "Status", "Ready", *["UpdateManifest", "Chunk", "Fin"] * 2, "Report", "Status",
    ]  # fmt: skip


# What ends a run


def identity(**changes: Any) -> Lie:
    return lambda s: s.replies.update(enroll=(200, json.dumps({**IDENTITY, **changes}).encode()))


def reply(path: str, body: bytes, status: int = 200) -> Lie:
    return lambda s: s.replies.update({path: (status, body)})


def session(**changes: Any) -> Lie:
    def lie(server: HostileServer) -> None:
        honest = json.loads(server.replies["session"][1])
        server.replies["session"] = (200, json.dumps({**honest, **changes}).encode())

    return lie


def manifest(change: Callable[[Any], Any]) -> Lie:
    def lie(server: HostileServer) -> None:
        plain = json.loads(server.replies["manifest"][1])
        change(plain)
        server.replies["manifest"] = (200, json.dumps(plain).encode())

    return lie


def artifact(path: str, data: bytes) -> Lie:
    """Another file, with its right digest in the manifest."""

    def change(plain: Any) -> None:
        files = [
            one
            for block in plain["blocks"]
            for one in block["artifacts"].values()
            if one and one["path"] == path
        ]
        files += [one for one in plain["optimizers"].values() if one["path"] == path]
        for one in files:
            one.update(sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))
        assert files

    def lie(server: HostileServer) -> None:
        manifest(change)(server)
        server.replies[f"artifacts/{path}"] = (200, data)

    return lie


def asks(**changes: Any) -> Lie:
    def lie(server: HostileServer) -> None:
        task = wire.encode(server.task(**changes))
        server.tell = lambda m: [task] if isinstance(m, wire.Ready) else []

    return lie


def climb(plain: Any) -> None:
    plain["blocks"][0]["artifacts"]["eval_model"]["path"] = "encoder-a/../../../evil"


def widen(plain: Any) -> None:
    for block in plain["blocks"][:-1]:
        block["outputs"][0]["shape"] = [16, 1 << 24]


def swap(plain: Any) -> None:
    """The optimizers' graphs in place of an encoder's."""
    graphs = plain["blocks"][0]["artifacts"]
    for name in ("eval_model", "training_forward", "training_backward"):
        sgd = plain["optimizers"]["sgd"]
        graphs[name] |= {"sha256": sgd["sha256"], "num_bytes": sgd["num_bytes"]}


def swapped(server: HostileServer) -> None:
    manifest(swap)(server)
    for name in ("eval_model", "training_forward", "training_backward"):
        path = f"artifacts/encoder-a/{name}.onnx"
        server.replies[path] = server.replies["artifacts/optimizers/sgd.onnx"]


FIRST = "encoder-a/eval_model.onnx"
BIG = 10 << 30
ENDS: dict[str, tuple[Lie, str]] = {
    "enrollment that is no JSON": (reply("enroll", b"\xff"), "no JSON"),
    "enrollment in a pit": (reply("enroll", b"[" * 500_000), "no JSON"),
    "enrollment of 2 MB": (reply("enroll", b" " * (2 << 20)), "sends more than"),
    "a name that climbs": (identity(device="../../d"), "does not match"),
    "a password of surrogates": (identity(password="\ud800" * 20), "does not match"),
    "a password of lines": (identity(password="secret\r\nX: y\r\n" * 3), "does not match"),
    "private blocks by the thousand": (identity(private_blocks=["b"] * 999), "outside"),
    "a complaint of many lines": (reply("enroll", b"a\n\x1b[2Jb" * 99, 403), "403 a  .2Jb"),
    "a broker without a name": (session(mqtt_host=""), "does not match"),
    "a broker of no name": (session(mqtt_host="a\0b"), "does not match"),
    "a broker of a long name": (session(mqtt_host="a" * 256), "no broker answers"),
    "a broker at port 0": (session(mqtt_port=0), "outside"),
    "a manifest that is no JSON": (reply("manifest", b"{"), "no JSON"),
    "a manifest in a pit": (reply("manifest", b'{"a":' * 500_000), "no JSON"),
    "a manifest of 5 MB": (reply("manifest", b" " * (5 << 20)), "sends more than"),
    "a manifest without our modality": (
        manifest(lambda p: p["modalities"].update(x=p["modalities"].pop("a"))), "modality a|takes"
    ),
    "a path that climbs": (manifest(climb), "leads out of"),
    "a file of 10 GB": (
        manifest(lambda p: p["optimizers"]["sgd"].update(num_bytes=BIG)), "outside"
    ),
    "files of 10 GB together": (
        manifest(lambda p: [
            g.update(num_bytes=2 << 30) for b in p["blocks"] for g in b["artifacts"].values()
            if g and g["path"].endswith(".onnx")
        ]),
        "the model's files have .* bytes",
    ),
    "a block of 10 GB": (manifest(lambda p: p["blocks"][0].update(size=BIG)), "outside"),
    "tensors of gigabytes": (manifest(widen), r"tensors of a batch of 16 take \d+ bytes"),
    "a file with another digest": (reply(f"artifacts/{FIRST}", b"x"), "sends 1 bytes|due"),
    "a file that is not there": (reply(f"artifacts/{FIRST}", b"", 404), "404"),
    "a file that is no graph": (artifact(FIRST, b"rubbish"), ""),
    "a graph of another block": (swapped, "ONNX Runtime|takes|gives"),
    "an optimizer that is none": (artifact("optimizers/sgd.onnx", b"\x08\x08"), "optimizers/sgd"),
    "a foreign block": (asks(blocks={"encoder-b": wire.BlockVersion(1, "0" * 64)}), "not share"),
    "a private block": (asks(blocks={"head": wire.BlockVersion(1, "0" * 64)}), "not share"),
    "uploads without a version": (asks(blocks={}, uploads=("fusion",)), "without saying"),
    "a rate that diverges": (
        asks(hyperparameters=Hyperparameters(1000.0, momentum=0.9999, epochs=50)), "diverged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_what_ends_a_run(case: str, server: HostileServer, tmp_path: Path) -> None:
    """With an error that says why; an honest server finds the device as it was."""
    lie, message = ENDS[case]
    honest, store = dict(server.replies), tmp_path / "outer" / "store"
    lie(server)
    told = meet(server, store)
    if case == "a file that is no graph":  # of inference alone, which training has no use for
        with EdgeClient(server.url, store=store) as client, pytest.raises(ModelError, match=FIRST):
            client.predict({"a": A})
    else:
        [error] = told
        text = str(error)
        assert len(text) < 700 and text.isprintable()
        assert re.search(message, text), text
    assert [path.name for path in tmp_path.iterdir()] == ["outer"]
    assert [path.name for path in (tmp_path / "outer").iterdir()] == ["store"]
    if told:
        server.replies, server.tell = honest, server.be_honest
        assert meet(server, store) == []


# What it survives


def raw_task(server: HostileServer, **hyperparameters: Any) -> bytes:
    fields = msgpack.unpackb(wire.encode(server.task()))
    fields["hyperparameters"] |= hyperparameters
    data: bytes = msgpack.packb(fields)
    return data


MALFORMED: dict[str, dict[str, Any]] = {
    "a negative rate": {"learning_rate": -0.1},
    "an infinite rate": {"learning_rate": float("inf")},
    "a rate of NaN": {"learning_rate": float("nan")},
    "batches of 2^40": {"batch_size": 1 << 40},
    "batches of none": {"batch_size": 0},
    "2^40 steps": {"max_steps": 1 << 40},
    "2^40 epochs": {"epochs": 1 << 40},
    "a million parts": {"accumulation": 1 << 20},
    "an unheard-of method": {"method": "exec"},
    "an unheard-of optimizer": {"optimizer": "../sgd"},
    "an unheard-of field": {"code": "x"},
}


def test_malformed_tasks_are_ignored(
    server: HostileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However many: neither memory nor log fill up."""
    tasks = [raw_task(server, **changes) for changes in MALFORMED.values()]
    for task in tasks:
        with pytest.raises(WireError):
            wire.decode(task)

    def tell(message: wire.Message) -> list[bytes]:
        return (tasks * 50 if isinstance(message, wire.Ready) else []) + server.be_honest(message)

    server.tell = tell
    assert meet(server, tmp_path) == []
    lines = [r for r in caplog.records if "malformed" in r.message]
    assert 5 < len(lines) < 12


def test_tasks_of_old_rounds_are_asked_about_now_and_then(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that floods the device is not flooded back."""
    monkeypatch.setattr("petalfl.participation.ANNOUNCE_PAUSE_S", 0.01)
    newest = wire.encode(server.task(round_num=3))
    honest = server.be_honest
    server.tell = lambda m: [newest] if isinstance(m, wire.Ready) else honest(m)
    assert meet(server, tmp_path) == []
    server.received.clear()
    old = [wire.encode(server.task(round_num=n)) for n in (2, 1)]

    def tell(message: wire.Message) -> list[bytes]:
        num_ready = sum(isinstance(m, wire.Ready) for m in server.received)
        if isinstance(message, wire.Ready):
            return old * 500 if num_ready < 4 else [wire.encode(wire.Finish({}))]
        return honest(message)[:1]

    server.tell = tell
    assert meet(server, tmp_path) == []
    assert sum(isinstance(m, wire.Ready) for m in server.received) < 50


def test_versions_that_lie(server: HostileServer, tmp_path: Path) -> None:
    """Tried again, until the server says something else; the app is told each time."""
    server.replies["blocks/fusion/1"] = (200, server.replies["blocks/fusion/1"][1][:-4] + b"\0" * 4)
    for error in meet(server, tmp_path, num_told=3):
        assert "no blocks yet (" in str(error)
        assert "wrong sha256" in str(error)


def test_a_packet_of_256_mb(
    server: HostileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The device leaves, and comes back."""
    giant = b"\x30\xff\xff\xff\x7f" + bytes(32 << 20)  # the first of so many
    has_sent = False

    def tell(message: wire.Message) -> list[bytes]:
        nonlocal has_sent
        if has_sent or not isinstance(message, wire.Ready):
            return server.be_honest(message)
        has_sent = True
        return [giant]

    server.tell, server.wrap = tell, lambda topic, m: m if m is giant else publish(topic, m)
    assert meet(server, tmp_path) == []
    assert "sends a packet of 268435455 bytes, at most 16777216 are read" in caplog.text


def test_many_epochs_of_small_batches_take_no_memory() -> None:
    block = make_block("encoder-a", ("a",), 1, 1)
    hyperparameters = Hyperparameters(0.1, batch_size=1, epochs=1000)
    tracemalloc.start()
    batches = _Batches(2000, (block,), hyperparameters, np.random.default_rng(0))
    assert len(batches) == 2_000_000
    assert next(iter(batches)).shape == (1,)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


# Manifests that are read, and are wrong all the same


SCALARS = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 24, 30, True, None, 0.5, "mse", "fusion"])
VALUES: st.SearchStrategy[Any] = st.one_of(
    SCALARS, st.lists(st.integers(1, 9), max_size=3), st.builds(dict)
)


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, (dict, list)):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [p for k, v in items for p in ((*before, k), *places(v, (*before, k)))]


def put(plain: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        plain = plain[key]
    plain[place[-1]] = value


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_changed_manifest_trains_or_is_refused(small_artifacts: Path, data: Any) -> None:
    """On the graphs and values of the honest one."""
    plain = json.loads((small_artifacts / MANIFEST_NAME).read_bytes())
    changed = copy.deepcopy(plain)
    shapes = [p for p in places(plain) if "outputs" in p or "modalities" in p or "dropouts" in p]
    for place in data.draw(st.lists(st.sampled_from(shapes or places(plain)), max_size=2)):
        value = data.draw(VALUES)
        try:
            put(changed, place, value)
        except (KeyError, TypeError, IndexError):  # of what the first change has removed
            return
    try:
        found = ModelManifest.from_json(json.dumps(changed).encode())
        parameters = {
            b.name: from_bytes((small_artifacts / b.artifacts.parameters.path).read_bytes(), b.size)
            for b in found.blocks
        }
        engine = OrtEngine(small_artifacts)
        model = LocalModel(found, engine, found.blocks, parameters)
        model.evaluate({"a": A}, LABELS)
        inputs = check_inputs(found, {"a": A})
        train(
            engine, found, parameters, ArrayData(inputs, check_labels(found, LABELS, len(A))),
            Hyperparameters(0.01, max_steps=1), np.random.default_rng(0),
        )  # fmt: skip
    except PetalError as error:
        assert str(error).isprintable() or "\n" not in str(error)
