"""A federation in one process: the SDK's devices and the server, joined in memory.

A device is the SDK's trainer with a store of its own, its updates go up by the SDK's uplink over a
`MemoryTransport`; the server is gateway and federation, with its journal. Left out are HTTP and
what a device does about broken connections: artifacts and block versions are handed over. Devices
train one after another on one thread; a study runs several processes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from petalfl import topics, wire
from petalfl.budgets import Budgets
from petalfl.callbacks import Callbacks, RoundInfo, RoundMetrics
from petalfl.data import check_labels
from petalfl.errors import PetalError
from petalfl.inbox import Inbox
from petalfl.local_data import ArrayData
from petalfl.local_model import LocalModel
from petalfl.model import MANIFEST_NAME, Block, ModelManifest, read_artifact
from petalfl.pacing import Pacing
from petalfl.store import DeviceStore, Identity
from petalfl.threads import Threads
from petalfl.trainer import Trainer
from petalfl.training import Hyperparameters, train
from petalfl.transport import MemoryBroker
from petalfl.uplink import Uplink
from petalfl.vectors import Vector, from_bytes
from server.config import Config
from server.federation import Federation
from server.gateway import Gateway
from server.state import ServerState

from .examples import Examples

FEDERATION = "study"
PASSWORD = "not-needed-in-one-process"  # nothing listens


def make_config(
    artifacts: Path, data_dir: Path, hyperparameters: Hyperparameters, **settings: Any
) -> Config:
    """The server's configuration of a synchronous federation that waits for every device."""
    plain = Config(
        artifacts=artifacts,
        data_dir=data_dir,
        federation=FEDERATION,
        private_blocks=(),
        num_rounds=1,
        min_devices=1,
        deadline_s=7 * 24 * 3600.0,
        hyperparameters=hyperparameters,
        schedule="constant",
        seed=0,
        keep_versions=1,
    )
    return replace(plain, **settings)


class Device:
    """A device's trainer on a store of its own, and what it is told.

    Args:
        folder: Of the store; new.
        train: Its examples; their modalities are the device's.
        on_round: Called when a round's blocks are in place and before they are trained.

    Attributes:
        trainer: The SDK's.
        train: Its examples.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        artifacts: Path,
        private_blocks: Sequence[str],
        train: Examples,
        on_round: Callable[[RoundInfo], None] = lambda info: None,
    ) -> None:
        self.name, self.train = name, train
        self.identity = Identity(FEDERATION, name, PASSWORD, tuple(private_blocks))
        self.before_round: Callable[[], None] = lambda: None
        self.after_round: Callable[[], None] = lambda: None

        def told(info: RoundInfo) -> None:
            on_round(info)
            self.before_round()

        def measured(metrics: RoundMetrics) -> None:
            self.after_round()

        self._store = DeviceStore(folder)
        self._store.write_identity(self.identity)
        self._write_model(artifacts)
        callbacks = Callbacks(told, lambda done, total: None, measured, self._failed)
        self._failure: PetalError | None = None
        self.trainer = Trainer(
            self._store, callbacks, Pacing(), Budgets(), num_threads=1, engine="auto"
        )
        self.trainer.data.hold(train.inputs, train.labels)
        self.trainer.check_data()

    def replace_data(self, examples: Examples) -> None:
        """Trains on these from the next round on."""
        self.trainer.replace_data(examples.inputs, examples.labels)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Of its data."""
        return tuple(self.train.inputs)

    @property
    def model(self) -> LocalModel:
        """The newest: shared blocks as downloaded, private ones as trained."""
        return self.trainer.model

    async def take_part(self, broker: MemoryBroker, server: Server, threads: Threads) -> None:
        """From the first round of a federation on this broker to the last.

        Raises:
            PetalError: Also of what an app's device would survive, such as a rejected update.
        """
        transport = broker.connect()
        uplink = Uplink(transport, FEDERATION, self.name)
        inbox = Inbox()

        def receive(topic: str, payload: bytes) -> None:
            message = wire.decode(payload)
            if isinstance(message, wire.Receipt):
                uplink.receive(message)
            elif isinstance(message, (wire.Task, wire.Finish)):
                inbox.put(message)

        await transport.subscribe(topics.all_down(FEDERATION, self.name), receive)
        ready = wire.encode(self.trainer.ready)
        await transport.publish(topics.request(FEDERATION, self.name), ready)
        while isinstance(message := await inbox.get(), wire.Task):
            await threads.call(self._train, message, server)
            for outgoing in self.trainer.state.outbox:
                receipt = await uplink.deliver(outgoing)
                if receipt.status != "accepted":
                    raise PetalError(f"{self.name}: the server rejects it: {receipt.reason}")
                self.trainer.note_delivered(outgoing, is_accepted=True)
                self.trainer.keep_controls()
            self.trainer.empty_outbox()
        await threads.call(self._fetch, message, server)
        await transport.close()

    def _train(self, task: wire.Task, server: Server) -> None:
        self.trainer.check_blocks(task)
        self._fetch(task, server)
        is_trained = self.trainer.train_round(task)
        if self._failure is not None or not is_trained:
            raise self._failure or PetalError(f"{self.name} has not trained")

    def _fetch(self, task: wire.Task | wire.Finish, server: Server) -> None:
        lacking = self.trainer.lacking(task)
        fetched = {name: server.fetch(self.name, name, to) for name, to in lacking.items()}
        self.trainer.keep_blocks(lacking, fetched)

    def keep(self, vectors: Mapping[str, Vector]) -> None:
        """Takes over shared blocks of a federation that it had no part in, as far as it has them.

        Private ones stay at their initial values.
        """
        held = {b.name for b in self.model.held if self.trainer.is_shared(b)}
        self.trainer.keep_blocks({}, {name: v for name, v in vectors.items() if name in held})

    def close(self) -> None:
        """Gives the store back."""
        self._store.close()

    def _failed(self, error: PetalError) -> None:
        self._failure = self._failure or error

    def _write_model(self, artifacts: Path) -> None:
        manifest = ModelManifest.load(artifacts)
        files = list(manifest.optimizers.values())
        for block in manifest.blocks_for(self.train.inputs):
            files += [*block.artifacts.graphs, block.artifacts.parameters]
        for artifact in files:
            self._store.write_file(artifact.path, read_artifact(artifacts, artifact))
        self._store.write_file(MANIFEST_NAME, (artifacts / MANIFEST_NAME).read_bytes())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a federation leaves.

    Attributes:
        shared: The newest version of every shared block.
        bytes_up: By device, of its updates, on the transport: payloads, headers and all.
        bytes_down: By device, of the block versions that it took.
    """

    shared: dict[str, Vector]
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]


def run_federation(config: Config, devices: Sequence[Device]) -> Outcome:
    """Runs a federation of these devices from its first round to its last.

    Raises:
        PetalError: Training failed, or the server refused something.
    """
    return asyncio.run(_run_federation(config, devices))


async def _run_federation(config: Config, devices: Sequence[Device]) -> Outcome:
    config = replace(config, min_devices=len(devices))
    manifest = ModelManifest.load(config.artifacts)
    with contextlib.ExitStack() as stack:
        state = ServerState(config.data_dir)
        stack.callback(state.close)
        for device in devices:
            state.add_device(device.name, PASSWORD, list(device.modalities), 0.0)
        federation = Federation(config, manifest, state)
        broker = MemoryBroker()
        served = federation.served
        gateway = Gateway(broker.connect(), config.federation, served, federation)
        await gateway.open()
        federation.start(gateway)
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="train"))
        try:
            server = Server(federation)
            await _all_or_first_failure(
                [device.take_part(broker, server, Threads(pool)) for device in devices]
            )
        finally:
            await gateway.close()
            federation.close()
        traffic = state.history.device_traffic()
        shared = {
            name: newest(federation, block)[: manifest.block(name).size]  # no control variates
            for name, block in federation.shared.blocks.items()
        }
        up, down = (
            {name: sum(b[way] for b in blocks.values()) for name, blocks in traffic.items()}
            for way in ("bytes_up", "bytes_down")
        )
        return Outcome(shared, up, down)


class Server:
    """Hands a federation's block versions to devices, from any thread.

    It reads what the event loop replaces as a whole, and only between rounds.
    """

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._loop = asyncio.get_running_loop()

    def fetch(self, device: str, name: str, pointer: wire.BlockVersion) -> Vector:
        """The newest version of a block, which must be this one."""
        shared = self._federation.shared
        if shared.pointers[name] != pointer:
            raise PetalError(f"block {name} is no longer at version {pointer.version}")
        vector = newest(self._federation, shared.blocks[name])
        self._loop.call_soon_threadsafe(self._federation.on_bytes_down, device, name, vector.nbytes)
        return vector


def train_alone(
    model: LocalModel,
    examples: Examples,
    hyperparameters: Hyperparameters,
    rng: np.random.Generator,
    shared: Collection[str] = (),
) -> LocalModel:
    """Trains a device's blocks on its own examples; nothing leaves it.

    Args:
        shared: The blocks that ``proximal_mu`` pulls back to where they are now.
    """
    labels = check_labels(model.manifest, examples.labels, len(examples))
    data = ArrayData(dict(examples.inputs), labels)
    result = train(
        model.engine, model.manifest, model.parameters, data, hyperparameters,
        rng, shared=shared,
    )  # fmt: skip
    return model.with_parameters(result.parameters)


def newest(federation: Federation, block: Block) -> Vector:
    """A shared block's newest version."""
    return from_bytes(federation.shared.newest(block.name).data, block.size)


async def _all_or_first_failure(runs: Sequence[Any]) -> None:
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
