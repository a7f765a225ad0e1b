"""A device in another language: examples/node_client next to devices in Python."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from numpy.typing import NDArray

from petalfl.data import check_inputs, check_labels
from petalfl.engine import OrtEngine
from petalfl.local_data import ArrayData
from petalfl.model import ModelManifest
from petalfl.schema import plain
from petalfl.store import Outgoing
from petalfl.tls import Tls
from petalfl.trained_round import TrainedRound
from petalfl.training import Hyperparameters, train
from petalfl.vectors import Vector, from_bytes, to_bytes
from petalfl.wire import UpdateManifest, decode
from tests.certificates import Authority
from tests.integration.harness import (
    ROOT,
    SCHEME,
    Device,
    Server,
    running_server,
    take_part,
    three_devices,
)

CLIENT = ROOT / "examples" / "node_client"
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not on PATH"),
    pytest.mark.skipif(
        not (CLIENT / "node_modules").is_dir(),
        reason="examples/node_client/node_modules is missing; make it there with: "
        "npm ci --ignore-scripts",
    ),
]

SEED = 7
HYPERPARAMETERS = Hyperparameters(learning_rate=0.05, batch_size=4, epochs=3)  # as in SCHEME
SHARED = ("encoder-acc", "encoder-gyro")
NODE_DEVICE = "both"
Labels = NDArray[Any] | Mapping[str, NDArray[Any]]


# The mathematics: one round in Node, and the same round in Python


@dataclass(frozen=True, slots=True)
class Round:
    """What check.mjs made of a round, and what it drew for that."""

    parameters: dict[str, Vector]
    loss: float
    orders: list[list[int]]
    masks: list[bytes]


class Replay(np.random.Generator):
    """Hands out the draws of a `Round` instead of its own."""

    def __init__(self, made: Round) -> None:
        super().__init__(np.random.PCG64(0))
        self._made = made
        self.orders, self.masks = list(made.orders), list(made.masks)

    def __deepcopy__(self, memo: object) -> Replay:
        other = Replay(self._made)
        other.orders, other.masks = list(self.orders), list(self.masks)
        return other

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.array(self.orders.pop(0))

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        mask = np.frombuffer(self.masks.pop(0), "<f4").reshape(size)
        return (mask > 0).astype(np.float32)  # 1: kept


def examples(inputs: Mapping[str, NDArray[Any]], labels: Labels) -> dict[str, Any]:
    by_task = {t: y.tolist() for t, y in labels.items()} if isinstance(labels, Mapping) else None
    lists = by_task if by_task is not None else np.asarray(labels).tolist()
    return {"inputs": {name: x.tolist() for name, x in inputs.items()}, "labels": lists}


def train_in_node(
    artifacts: Path,
    parameters: Mapping[str, Vector],
    inputs: Mapping[str, NDArray[Any]],
    labels: Labels,
    hyperparameters: Hyperparameters = HYPERPARAMETERS,
    *,
    round_num: int = 1,
    shared: tuple[str, ...] = SHARED,
) -> Round:
    case = {
        "artifacts": str(artifacts),
        "device": NODE_DEVICE,
        "examples": examples(inputs, labels),
        "hyperparameters": plain(hyperparameters),
        "parameters": {name: to_bytes(vector) for name, vector in parameters.items()},
        "round_num": round_num,
        "seed": SEED,
        "shared": list(shared),
    }
    command = [str(NODE), str(CLIENT / "check.mjs")]
    ran = subprocess.run(command, input=msgpack.packb(case), capture_output=True, timeout=120)
    assert ran.returncode == 0, ran.stderr.decode()
    made = msgpack.unpackb(ran.stdout, max_bin_len=1 << 28)
    vectors = {name: np.frombuffer(data, "<f4") for name, data in made.pop("parameters").items()}
    return Round(vectors, **made)


def initial(artifacts: Path) -> dict[str, Vector]:
    blocks = ModelManifest.load(artifacts).blocks
    return {b.name: np.fromfile(artifacts / b.artifacts.parameters.path, "<f4") for b in blocks}


def assert_same_round(
    artifacts: Path,
    inputs: Mapping[str, NDArray[Any]],
    labels: Labels,
    hyperparameters: Hyperparameters = HYPERPARAMETERS,
    shared: tuple[str, ...] = SHARED,
) -> None:
    """The same start, batches and masks give the same blocks, losses and statistics."""
    before = initial(artifacts)
    made = train_in_node(artifacts, before, inputs, labels, hyperparameters, shared=shared)
    assert_pythons(artifacts, before, made, inputs, labels, hyperparameters, shared)


def assert_pythons(
    artifacts: Path,
    before: Mapping[str, Vector],
    made: Round,
    inputs: Mapping[str, NDArray[Any]],
    labels: Labels,
    hyperparameters: Hyperparameters,
    shared: tuple[str, ...],
) -> None:
    manifest, draws = ModelManifest.load(artifacts), Replay(made)
    arrays = check_inputs(manifest, inputs)
    truths = check_labels(manifest, labels, len(next(iter(arrays.values()))))
    engine = OrtEngine(artifacts)
    expected = train(
        engine, manifest, before, ArrayData(arrays, truths), hyperparameters, draws, shared=shared
    )
    assert (draws.orders, draws.masks) == ([], [])
    assert made.loss == pytest.approx(expected.loss, rel=1e-5)
    assert made.parameters.keys() == expected.parameters.keys()
    for name, vector in expected.parameters.items():
        moved = vector - before[name]
        is_frozen = manifest.block(name).is_frozen
        assert is_frozen or np.abs(moved).max() > 1e-3
        found = made.parameters[name] - before[name]
        np.testing.assert_allclose(found, moved, rtol=1e-4, atol=1e-5)


def test_a_round_on_recordings_is_pythons(watch_artifacts: Path) -> None:
    device = three_devices()[2]
    assert_same_round(watch_artifacts, device.data, device.labels)


@pytest.mark.parametrize("modalities", [("a",), ("b",), ("a", "b")])
def test_a_round_without_a_modality_is_pythons(
    small_artifacts: Path, modalities: tuple[str, ...]
) -> None:
    rng = np.random.default_rng(1)
    inputs = {"a": rng.normal(size=(21, 5)), "b": rng.normal(size=(21, 2, 8))}
    labels = rng.integers(0, 3, 21)
    assert_same_round(small_artifacts, {m: inputs[m] for m in modalities}, labels)


def test_a_round_with_a_personal_head_is_pythons(personal_artifacts: Path) -> None:
    rng = np.random.default_rng(4)
    inputs = {"a": rng.normal(size=(21, 5)), "b": rng.normal(size=(21, 2, 8))}
    shared = ("encoder-a", "encoder-b", "fusion", "head")
    assert_same_round(personal_artifacts, inputs, rng.integers(0, 3, 21), shared=shared)


def test_every_hyperparameter_counts(small_artifacts: Path) -> None:
    rng = np.random.default_rng(3)
    inputs = {"a": rng.normal(size=(21, 5)), "b": rng.normal(size=(21, 2, 8))}
    chosen = Hyperparameters(
        0.01, optimizer="adamw", batch_size=8, epochs=2, max_grad_norm=0.5, proximal_mu=0.1,
        max_steps=4,
    )  # fmt: skip
    shared = ("encoder-a", "encoder-b")
    for method in ("fedsim", "fedalt"):
        chosen = replace(chosen, method=method)
        assert_same_round(small_artifacts, inputs, rng.integers(0, 3, 21), chosen, shared)


def test_a_hyperparameter_that_it_does_not_know_is_refused(small_artifacts: Path) -> None:
    foreign: Any = {**plain(HYPERPARAMETERS), "warmup": 1}
    inputs = {"a": np.zeros((4, 5))}
    with pytest.raises(AssertionError, match="the server asks for warmup, which this client does"):
        train_in_node(small_artifacts, initial(small_artifacts), inputs, np.arange(4) % 3, foreign)


@pytest.mark.parametrize("tasks", [("kind",), ("kind", "tags", "pace")])
def test_a_round_of_several_tasks_is_pythons(
    several_artifacts: Path, tasks: tuple[str, ...]
) -> None:
    """A frozen stage, running statistics, integers of any length, three losses."""
    rng = np.random.default_rng(2)
    labels: dict[str, NDArray[Any]] = {
        "kind": rng.integers(0, 3, 20),
        "tags": rng.integers(0, 2, (20, 4)).astype(np.float32),
        "pace": rng.normal(size=(20, 2)).astype(np.float32),
    }
    inputs = {"motion": rng.normal(size=(20, 5)), "text": rng.integers(0, 11, (20, 6))}
    chosen = Hyperparameters(0.05, nesterov=True, weight_decay=0.01, batch_size=6, epochs=2)
    for method in ("fedsim", "fedalt"):
        chosen = replace(chosen, method=method)
        assert_same_round(several_artifacts, inputs, {t: labels[t] for t in tasks}, chosen)


# The protocol: a federation over the embedded broker


def start(server: Server, device: Device, folder: Path, token: str = "") -> subprocess.Popen[bytes]:
    data = folder / f"{device.name}.json"
    data.write_text(json.dumps(examples(device.data, device.labels)))
    command = [
        str(NODE), str(CLIENT / "client.mjs"), "--url", server.url,
        "--token", token or server.token, "--data", str(data),
        "--store", str(folder / device.name), "--device", device.name,
    ]  # fmt: skip
    trusted = {"NODE_EXTRA_CA_CERTS": str(server.tls.ca)} if server.tls else {}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | trusted
    )


def end(process: subprocess.Popen[bytes], timeout_s: float = 120) -> tuple[int, str, str]:
    """Waits for its end; exit code and what it printed."""
    try:
        out, errors = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return process.returncode, out.decode(), errors.decode()


@dataclass(frozen=True, slots=True)
class Federation:
    """What three rounds leave."""

    server: Server
    status: dict[str, Any]
    deltas: dict[bytes, Vector]  # of the Python devices, by update_id
    sizes: dict[str, int]
    private: dict[str, Vector]  # of the Node device
    output: tuple[int, str, str]


@pytest.fixture(scope="module")
def federation(
    watch_artifacts: Path, tmp_path_factory: pytest.TempPathFactory, authority: Authority
) -> Iterator[Federation]:
    """Over TLS."""
    issued = authority.issue("server-of-node")
    tls = ("--tls-cert", str(issued.certificate), "--tls-key", str(issued.key))
    folder = tmp_path_factory.mktemp("node")
    deltas: dict[bytes, Vector] = {}
    make_update = TrainedRound.make_update

    def spy(self: TrainedRound, *arguments: Any) -> tuple[Outgoing, Any]:
        outgoing, residual = make_update(self, *arguments)
        message = decode(outgoing.message)
        assert isinstance(message, UpdateManifest)
        deltas[message.update_id] = from_bytes(outgoing.payload, message.num_bytes // 4)
        return outgoing, residual

    *others, member = three_devices()
    assert member.name == NODE_DEVICE
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(TrainedRound, "make_update", spy)
        server = stack.enter_context(
            running_server(
                watch_artifacts, folder / "server", "--rounds", "3", *SCHEME, *tls,
                tls=Tls(authority.ca),
            )
        )  # fmt: skip
        node = start(server, member, folder)
        try:
            clients = [stack.enter_context(other.client(server, folder)) for other in others]
            asyncio.run(take_part(clients))
        finally:
            output = end(node)
        status = server.get("status")
    state = msgpack.unpackb((folder / member.name / "state.msgpack").read_bytes())
    assert (state["round_num"], state["outbox"]) == (3, [])
    private = {name: np.frombuffer(data, "<f4") for name, data in state["private"].items()}
    sizes = {d.name: len(d.labels) for d in (*others, member)}
    yield Federation(server, status, deltas, sizes, private, output)


def test_the_node_device_takes_part_to_the_end(federation: Federation) -> None:
    code, out, errors = federation.output
    assert (code, errors) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["round 1", "round 2", "round 3"]
    assert federation.status["is_finished"]
    assert federation.status["shared_blocks"] == dict.fromkeys(SHARED, 4)
    assert federation.status["updates_accepted"] == 3 * 4
    rows = federation.server.query(
        "SELECT round_num, block, num_examples, base_version FROM updates "
        "WHERE device = ? ORDER BY round_num, block",
        NODE_DEVICE,
    )
    size = federation.sizes[NODE_DEVICE]
    assert rows == [(r, block, size, r) for r in (1, 2, 3) for block in SHARED]


def test_its_deltas_are_in_the_mean(federation: Federation, watch_artifacts: Path) -> None:
    """Trains Node's rounds again from the server's versions: what Python sent makes up the rest."""
    member, server = three_devices()[2], federation.server
    parameters = initial(watch_artifacts)
    for round_num in (1, 2, 3):
        before = {block: server.block(block, round_num) for block in SHARED}
        parameters |= before
        made = train_in_node(
            watch_artifacts, parameters, member.data, member.labels, round_num=round_num
        )
        for block in SHARED:
            rows = server.query(
                "SELECT update_id, device FROM updates WHERE round_num = ? AND block = ?",
                round_num,
                block,
            )
            assert NODE_DEVICE in {device for _, device in rows}
            own = made.parameters[block] - before[block]
            deltas = [own if d == NODE_DEVICE else federation.deltas[i] for i, d in rows]
            weights = [federation.sizes[device] for _, device in rows]
            mean = np.average(np.array(deltas, np.float64), axis=0, weights=weights)
            assert np.abs(own).max() > 1e-3
            after = server.block(block, round_num + 1)
            np.testing.assert_allclose(after, before[block] + mean, rtol=1e-6, atol=1e-7)
        parameters |= made.parameters
    assert federation.private.keys() == {"fusion", "head"}
    for block, vector in federation.private.items():  # they went on from round to round
        np.testing.assert_array_equal(vector, parameters[block])


async def test_a_killed_device_goes_on(watch_artifacts: Path, tmp_path: Path) -> None:
    rounds = 6
    *others, member = three_devices()
    arguments = ("--rounds", str(rounds), *SCHEME)
    with running_server(watch_artifacts, tmp_path / "server", *arguments) as server:
        node = start(server, member, tmp_path)
        clients = [other.client(server, tmp_path) for other in others]
        taking_part = asyncio.create_task(take_part(clients))
        try:
            for round_num in (2, 4):
                await server.until(lambda s, r=round_num: s["round_num"] >= r, f"round {round_num}")
                node.send_signal(signal.SIGKILL)
                await asyncio.to_thread(end, node)
                node = start(server, member, tmp_path)
            await taking_part
        finally:
            code, _, errors = await asyncio.to_thread(end, node)
            for client in clients:
                client.close()
        assert (code, errors) == (0, "")
        assert server.get("status")["updates_accepted"] == rounds * 4


def test_it_fine_tunes_as_python_does(watch_artifacts: Path, tmp_path: Path) -> None:
    member, fine = three_devices()[2], replace(HYPERPARAMETERS, learning_rate=0.025, epochs=3)
    words = (
        *SCHEME, "--min-devices", "1", "--rounds", "1", "--proximal-mu", "0.1",
        "--finish-epochs", "3", "--finish-rate", "0.5",
    )  # fmt: skip
    path = tmp_path / member.name / "fine-tuned.msgpack"
    with running_server(watch_artifacts, tmp_path / "server", *words) as server:
        code, out, errors = end(start(server, member, tmp_path))
        assert (code, errors) == (0, "")
        assert [line.split(":")[0] for line in out.splitlines()] == ["round 1", "fine-tuning"]
        assert server.get("status")["updates_accepted"] == 2
        shared = {block: server.block(block, 2) for block in SHARED}
        kept = path.read_bytes()
        assert end(start(server, member, tmp_path)) == (0, "", ""), "it is made already"
        assert path.read_bytes() == kept
    state = msgpack.unpackb((path.parent / "state.msgpack").read_bytes())
    private = {name: np.frombuffer(data, "<f4") for name, data in state["private"].items()}
    before = shared | private
    made = train_in_node(watch_artifacts, before, member.data, member.labels, fine, round_num=0)
    assert_pythons(watch_artifacts, before, made, member.data, member.labels, fine, SHARED)
    vectors = msgpack.unpackb(kept)["vectors"]
    assert vectors.keys() == made.parameters.keys()
    for name, vector in made.parameters.items():
        np.testing.assert_array_equal(np.frombuffer(vectors[name], "<f4"), vector)


RESETS = """
import net from "node:net";
const write = net.Socket.prototype.write;
net.Socket.prototype.write = function (data, ...rest) {
  const isDisconnect = data[0] === 0xe0 && data.length === 1; // its length follows alone
  if (!isDisconnect) return write.call(this, data, ...rest);
  this.destroy(Object.assign(new Error("read ECONNRESET"), { code: "ECONNRESET" }));
  return false;
};
"""


def test_a_broker_that_hangs_up_after_the_goodbye_is_no_trouble(
    watch_artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of DISCONNECT, the reset that a broker makes that closes first."""
    (tmp_path / "resets.mjs").write_text(RESETS)
    monkeypatch.setenv("NODE_OPTIONS", f"--import={(tmp_path / 'resets.mjs').as_uri()}")
    alone = ("--scheme", "phf", "--rounds", "1", "--min-devices", "1")
    with running_server(watch_artifacts, tmp_path / "server", *alone) as server:
        code, out, errors = end(start(server, three_devices()[2], tmp_path))
    assert (code, errors) == (0, "")
    assert out.startswith("round 1:")


def test_what_goes_wrong_is_one_line(watch_artifacts: Path, tmp_path: Path) -> None:
    member = three_devices()[2]
    with running_server(watch_artifacts, tmp_path / "server", *SCHEME) as server:
        code, out, errors = end(start(server, member, tmp_path, token="wrong"))
        assert (code, out) == (1, "")
        assert errors == "enroll: 401 wrong or no token; the server printed it at start\n"
        unfit = Device("unfit", {"acc": member.data["acc"][:, :2]}, member.labels)
        code, out, errors = end(start(server, unfit, tmp_path))
        assert (code, out, errors) == (1, "", "acc: (40,2,100) is not (n, 3,100)\n")
    code, out, errors = end(start(server, member, tmp_path))
    assert (code, out) == (1, "")
    assert errors.count("\n") == 1
    assert "ECONNREFUSED" in errors


def test_a_budget_and_a_pace_of_its_own(watch_artifacts: Path, tmp_path: Path) -> None:
    """An asynchronous federation of one, whose every task has room for one of two blocks."""
    member = three_devices()[2]
    manifest = ModelManifest.load(watch_artifacts)
    budget = 4 * max(manifest.block(block).size for block in SHARED)
    arguments = ("--scheme", "phf", "--rounds", "3", "--mode", "async", "--buffer-size", "1",
                 "--max-upload-bytes", str(budget))  # fmt: skip
    with running_server(watch_artifacts, tmp_path / "server", *arguments) as server:
        code, out, errors = end(start(server, member, tmp_path))
        assert code == 0
        # The update that makes the last step ends it all; the report behind it comes too late.
        assert errors in ("", "rejected: no round is open\n")
        sent = server.query("SELECT round_num, block, base_version FROM updates ORDER BY round_num")
        assert [round_num for round_num, _, _ in sent] == list(range(1, len(sent) + 1))
        assert {block for _, block, _ in sent} == set(SHARED)
        assert len(out.splitlines()) == len(sent)
        versions = server.get("status")["shared_blocks"]
        assert sum(versions.values()) - len(SHARED) == len(sent)
        assert max(versions.values()) == 4


def test_a_device_that_knows_no_codec_among_others_that_do(
    watch_artifacts: Path, tmp_path: Path
) -> None:
    *others, member = three_devices()
    arguments = ("--rounds", "1", "--codec", "topk-int8:0.05", *SCHEME)
    with running_server(watch_artifacts, tmp_path / "server", *arguments) as server:
        node = start(server, member, tmp_path)
        try:
            with ExitStack() as stack:
                clients = [stack.enter_context(other.client(server, tmp_path)) for other in others]
                asyncio.run(take_part(clients))
        finally:
            code, _, errors = end(node)
        assert (code, errors) == (0, "")
        traffic = server.get("devices")
    sent = {device: traffic[device]["blocks"] for device in traffic}
    assert server.query("SELECT COUNT(*) FROM updates") == [(4,)]
    for other, block in zip(others, ("encoder-acc", "encoder-gyro"), strict=True):
        bytes_up = sent[other.name][block]["bytes_up"]
        assert 0 < 40 * bytes_up < sent[NODE_DEVICE][block]["bytes_up"]
