"""A model of tiny blocks, and doubles of what surrounds the parts of the server."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl import topics, wire
from petalfl.model import (
    Artifact,
    Artifacts,
    Block,
    Modality,
    ModelManifest,
    Parameter,
    Task,
    Tensor,
)
from petalfl.mqtt import Endpoint as BrokerEndpoint
from petalfl.payloads import plain_delta
from petalfl.training import Hyperparameters
from petalfl.transport import Handler, MemoryBroker, MemoryTransport
from petalfl.vectors import Vector, from_bytes, to_bytes
from server.config import Config
from server.federation import Federation
from server.gateway import Gateway
from server.state import ServerState

FED = "fed"
ENROLLED = {"both": ["acc", "gyro"], "watch": ["acc"], "phone": ["gyro"]}
NOW_S = 1_700_000_000.0

# By block: the further arguments of `make_block`.
Layout = dict[str, tuple[Any, ...]]
LAYOUT: Layout = {
    "encoder-acc": ("encoder", ("acc",), {"conv.weight": (2, 2), "conv.bias": (2,)}),
    "encoder-gyro": ("encoder", ("gyro",), {"conv.weight": (3,)}),
    "fusion": ("fusion", ("encoder-acc", "encoder-gyro"), {"mix.weight": (2, 2)}),
    "head": ("head", ("fusion",), {"fc.weight": (2, 3), "fc.bias": (2,)}),
}
SIZES = {"encoder-acc": 6, "encoder-gyro": 3, "fusion": 4, "head": 8}
INITIAL: dict[str, NDArray[np.float32]] = {
    name: np.linspace(-1, 1, size, dtype=np.float32) for name, size in SIZES.items()
}


def make_block(
    name: str,
    kind: Any,
    inputs: tuple[str, ...],
    shapes: dict[str, tuple[int, ...]],
    statistics: dict[str, tuple[int, ...]] | None = None,
    is_frozen: bool = False,
) -> tuple[Block, dict[str, bytes]]:
    """A block and its files by path; the graphs in them are none."""
    parameters = tuple(Parameter(key, shape) for key, shape in shapes.items())
    tail = tuple(Parameter(key, shape) for key, shape in (statistics or {}).items())
    num_parameters = sum(p.size for p in parameters)
    size = num_parameters + sum(p.size for p in tail)
    vector = INITIAL.get(name, np.zeros(0, np.float32))
    if vector.size != size:
        vector = np.linspace(-1, 1, size, dtype=np.float32)
    files: dict[str, bytes] = {}

    def put(file: str, data: bytes) -> Artifact:
        files[f"{name}/{file}"] = data
        return Artifact(f"{name}/{file}", hashlib.sha256(data).hexdigest(), len(data))

    def graph(file: str, is_there: bool) -> Artifact | None:
        return put(f"{file}.onnx", f"{file} {name}".encode()) if is_there else None

    block = Block(
        name=name,
        kind=kind,
        inputs=inputs,
        outputs=(Tensor(name, (2,)),),
        size=size,
        num_trainable=0 if is_frozen else num_parameters,
        parameters=parameters,
        statistics=tail,
        dropouts=(),
        task=Task("cross_entropy") if kind == "head" else None,
        is_frozen=is_frozen,
        state_prefix=f"{name}.",
        min_batch=1,
        num_flops=0,
        activation_bytes=0,
        artifacts=Artifacts(
            eval_model=put("eval_model.onnx", f"eval {name}".encode()),
            training_forward=graph("training_forward", kind != "head" and not is_frozen),
            training_backward=graph("training_backward", kind != "encoder" or not is_frozen),
            parameters=put("parameters.bin", to_bytes(vector)),
        ),
    )
    return block, files


BLOCKS = {name: make_block(name, *rest)[0] for name, rest in LAYOUT.items()}


def write_artifacts(folder: Path, layout: Layout | None = None, **changes: Any) -> ModelManifest:
    """Writes the tiny model to ``folder``; ``changes`` replace fields of its manifest."""
    made = [make_block(name, *rest) for name, rest in (layout or LAYOUT).items()]
    files = {path: data for _, files in made for path, data in files.items()}
    files |= {f"optimizers/{name}.onnx": name.encode() for name in ("sgd", "adamw")}
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    manifest = replace(make_manifest(*(block for block, _ in made)), **changes)
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return ModelManifest.load(folder)


def make_manifest(*blocks: Block) -> ModelManifest:
    modalities = {"acc": Modality((4, 2)), "gyro": Modality((4, 2))}
    optimizers = {
        name: Artifact(
            f"optimizers/{name}.onnx", hashlib.sha256(name.encode()).hexdigest(), len(name)
        )
        for name in ("sgd", "adamw")
    }
    return ModelManifest(2, "tiny", modalities, blocks, "mask", optimizers)


def with_personal_head(manifest: ModelManifest) -> ModelManifest:
    """The same with one beside its head."""
    head = manifest.block("head")
    assert head.task is not None
    twin = replace(head, name="head-personal", task=replace(head.task, personalizes="head"))
    return replace(manifest, blocks=(*manifest.blocks, twin))


def make_config(artifacts: Path, data_dir: Path, **changes: Any) -> Config:
    plain = Config(
        artifacts=artifacts,
        data_dir=data_dir,
        federation=FED,
        private_blocks=(),
        num_rounds=0,
        min_devices=1,
        deadline_s=60.0,
        hyperparameters=Hyperparameters(0.1),
        schedule="constant",
        seed=7,
    )
    return replace(plain, **changes)


def make_id(*parts: object) -> bytes:
    """An update_id that names what it is made of."""
    return hashlib.sha256(repr(parts).encode()).digest()[:16]


def make_update(
    device: str,
    block: str,
    delta: ArrayLike,
    *,
    num_examples: int = 1,
    round_num: int = 1,
    base_version: int = 1,
    update_id: bytes | None = None,
) -> wire.BlockUpdate:
    vector = np.broadcast_to(np.asarray(delta, np.float32), SIZES[block])
    known = update_id or make_id(device, block, round_num)
    return with_digest(
        known, device, block, round_num, base_version, num_examples,
        plain_delta(np.ascontiguousarray(vector)),
    )  # fmt: skip


def with_digest(*fields: Any) -> wire.BlockUpdate:
    """An update of those fields and the digest of its payload, which is the last of them."""
    complete = (*fields, hashlib.sha256(fields[-1].payload).hexdigest())
    return wire.BlockUpdate(*complete)


def make_report(
    device: str, *, round_num: int = 1, num_examples: int = 1, loss: float = 0.5
) -> wire.Report:
    return wire.Report(make_id(device, "report", round_num), round_num, num_examples, loss)


def announce(update: wire.BlockUpdate) -> tuple[wire.UpdateManifest, bytes]:
    """The manifest and payload that a device sends for this update."""
    payload = to_bytes(update.delta)
    manifest = wire.UpdateManifest(
        update_id=update.update_id,
        block=update.block,
        round_num=update.round_num,
        base_version=update.base_version,
        num_examples=update.num_examples,
        codec="f32",
        num_bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
    )
    return manifest, payload


def messages_of(update: wire.BlockUpdate) -> list[wire.Message]:
    """What a device sends for this update, in its order."""
    manifest, payload = announce(update)
    chunks = wire.split_chunks(update.update_id, payload)
    return [manifest, *chunks, wire.Fin(update.update_id)]


def average(updates: Sequence[wire.BlockUpdate]) -> Vector:
    """numpy's own weighted mean of the deltas."""
    deltas = np.stack([update.delta.astype(np.float64) for update in updates])
    weights = [update.num_examples for update in updates]
    return np.average(deltas, axis=0, weights=weights).astype(np.float32)


async def settle() -> None:
    """Lets the event loop run whatever is due now, and steps of blocks come to their end."""
    while True:
        for _ in range(12):
            await asyncio.sleep(0)
        steps = [task for task in asyncio.all_tasks() if task.get_name() == "step"]
        if not steps:
            return
        await asyncio.wait(steps)


@dataclass
class FakeSender:
    """A gateway's outward side that only remembers."""

    sent: list[tuple[str, wire.Task | wire.Finish]] = field(default_factory=list)
    versions: list[tuple[str, wire.BlockVersion]] = field(default_factory=list)

    def send_task(self, device: str, message: wire.Task | wire.Finish) -> None:
        self.sent.append((device, message))

    def publish_version(self, block: str, version: wire.BlockVersion) -> None:
        self.versions.append((block, version))

    def tasks(self, round_num: int) -> dict[str, wire.Task]:
        return {
            device: message
            for device, message in self.sent
            if isinstance(message, wire.Task) and message.round_num == round_num
        }

    def finishes(self) -> dict[str, wire.Finish]:
        return {d: message for d, message in self.sent if isinstance(message, wire.Finish)}


@dataclass
class FakeJudge:
    """Accepts every update and report, and remembers what it was told."""

    updates: list[wire.BlockUpdate] = field(default_factory=list)
    reports: list[tuple[str, wire.Report]] = field(default_factory=list)
    excuses: list[tuple[str, wire.Excuse]] = field(default_factory=list)
    ready: list[tuple[str, wire.Ready]] = field(default_factory=list)
    offline: list[str] = field(default_factory=list)
    bytes_up: list[tuple[str, str, int]] = field(default_factory=list)
    verdict: str = ""  # a reason to reject updates
    num_commits: int = 0

    def on_ready(self, device: str, ready: wire.Ready) -> None:
        self.ready.append((device, ready))

    def on_offline(self, device: str) -> None:
        self.offline.append(device)

    def on_manifest(self, device: str, manifest: wire.UpdateManifest) -> wire.Receipt | None:
        return None

    def on_question(self, device: str, update_id: bytes) -> wire.Receipt | None:
        return None

    def on_update(self, update: wire.BlockUpdate) -> wire.Receipt:
        if self.verdict:
            return wire.Receipt(update.update_id, "rejected", self.verdict)
        self.updates.append(update)
        return wire.Receipt(update.update_id, "accepted")

    def on_report(self, device: str, report: wire.Report) -> wire.Receipt:
        self.reports.append((device, report))
        return wire.Receipt(report.update_id, "accepted")

    def on_excuse(self, device: str, excuse: wire.Excuse) -> None:
        self.excuses.append((device, excuse))

    async def commit(self) -> None:
        self.num_commits += 1

    def on_bytes_up(self, device: str, block: str, num_bytes: int) -> None:
        self.bytes_up.append((device, block, num_bytes))


class WatchedTransport(MemoryTransport):
    """A transport that remembers what its handlers raise, which `dispatch` only logs."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        broker._transports.append(self)
        self.raised: list[Exception] = []

    async def subscribe(self, topic_filter: str, handler: Handler) -> None:
        def watched(topic: str, payload: bytes) -> None:
            try:
                handler(topic, payload)
            except Exception as error:
                self.raised.append(error)

        await super().subscribe(topic_filter, watched)


class Door:
    """An open gateway on a memory broker, with a device in front of it."""

    def __init__(self, manifest: ModelManifest, judge: Any, device: str = "watch") -> None:
        self.broker = MemoryBroker()
        self.transport = WatchedTransport(self.broker)
        self.gateway = Gateway(self.transport, FED, manifest, judge)
        self.device = device
        self.client = self.broker.connect()
        self.received: list[wire.Message] = []

    async def open(self) -> Door:
        await self.gateway.open()
        down = topics.all_down(FED, self.device)
        await self.client.subscribe(down, lambda t, data: self.received.append(wire.decode(data)))
        return self

    async def send(self, block: str, *messages: wire.Message | bytes) -> None:
        """Sends on the topic of a block's updates, one after another."""
        for message in messages:
            await self.publish(topics.block_up(FED, block, self.device), message)

    async def request(self, message: wire.Message | bytes) -> None:
        await self.publish(topics.request(FED, self.device), message)

    async def publish(self, topic: str, message: wire.Message | bytes) -> None:
        data = message if isinstance(message, bytes) else wire.encode(message)
        await self.client.publish(topic, data)
        await settle()
        if self.gateway._committing is not None:
            await self.gateway._committing
            await settle()

    @property
    def receipts(self) -> list[wire.Receipt]:
        return [one for one in self.received if isinstance(one, wire.Receipt)]


@dataclass
class FakeBroker:
    """A `server.broker.Broker` without a broker."""

    endpoint: BrokerEndpoint = field(default_factory=lambda: BrokerEndpoint("127.0.0.1", 1883))
    server_login: tuple[str, str] = ("server", "secret")
    granted: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None

    async def start(self) -> None: ...

    async def grant(self, device: str, password: str, federation: str = "") -> None:
        if self.error is not None:
            raise self.error
        self.granted[device] = password

    async def revoke(self, device: str) -> None:
        self.granted.pop(device, None)

    def device_endpoint(self, host: str) -> BrokerEndpoint:
        return replace(self.endpoint, host=host) if self.endpoint.is_tls else self.endpoint

    async def renew_certificate(self) -> None: ...

    async def close(self) -> None: ...


class Site:
    """Artifacts and a data folder; federations come and go on them."""

    def __init__(
        self,
        folder: Path,
        *,
        enrolled: dict[str, list[str]] = ENROLLED,
        layout: Layout | None = None,
    ) -> None:
        self.artifacts, self.data_dir = folder / "artifacts", folder / "data"
        self.manifest = write_artifacts(self.artifacts, layout)
        with self.state() as state:
            for name, modalities in enrolled.items():
                state.add_device(name, f"password of {name}", modalities, NOW_S)

    @contextmanager
    def state(self) -> Iterator[ServerState]:
        state = ServerState(self.data_dir)
        try:
            yield state
        finally:
            state.close()

    @contextmanager
    def run(
        self,
        *,
        ready: Sequence[str] = (),
        now_s: Callable[[], float] = lambda: NOW_S,
        **changes: Any,
    ) -> Iterator[Run]:
        """A started federation; leaving it is a stop of the server."""
        config = make_config(self.artifacts, self.data_dir, **changes)
        with self.state() as state:
            federation = Federation(config, self.manifest, state, now_s)
            run = Run(federation, state, FakeSender())
            try:
                federation.start(run.sender)
                for device in ready:
                    run.ready(device)
                yield run
            finally:
                federation.close()


@dataclass
class Run:
    """A running federation, its state and what it sends."""

    federation: Federation
    state: ServerState
    sender: FakeSender

    def ready(self, device: str) -> None:
        self.federation.on_ready(device, wire.Ready(tuple(ENROLLED[device]), ("head",)))

    def task(self, device: str, round_num: int) -> wire.Task:
        return self.sender.tasks(round_num)[device]

    def block(self, name: str) -> Vector:
        """The newest version of a shared block, as it is served."""
        return from_bytes(self.federation.shared.newest(name).data, SIZES[name])

    async def finish_round(self, round_num: int, delta: float = 1.0, *devices: str) -> None:
        """Every device answers its task: all its blocks with ``delta``, then its report."""
        for device, task in self.sender.tasks(round_num).items():
            if devices and device not in devices:
                continue
            for block in task.blocks if task.uploads is None else task.uploads:
                base = task.blocks[block].version
                update = make_update(device, block, delta, round_num=round_num, base_version=base)
                assert self.federation.on_update(update).status == "accepted"
            report = make_report(device, round_num=round_num)
            assert self.federation.on_report(device, report).status == "accepted"
        await self.federation.commit()
        await settle()


def read_json(data: bytes | str) -> Any:
    return json.loads(data)
