"""`EdgeClient`: a device's part in a federation, in ten lines of an app."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from petalfl import topics, wire
from petalfl.backoff import delays
from petalfl.codecs import KINDS
from petalfl.data import Labels, check_inputs, check_labels
from petalfl.downlink import Downlink, Session
from petalfl.errors import DataError, PetalError, StoreError, TransportError, WireError
from petalfl.examples import ExampleStore
from petalfl.http import NotThereError
from petalfl.inbox import Inbox
from petalfl.local_model import LocalModel
from petalfl.model import MANIFEST_NAME, Block, ModelManifest
from petalfl.mqtt import Endpoint, MqttTransport
from petalfl.pacing import Pacing, Stopped
from petalfl.runtime import EngineName, find_runtime
from petalfl.store import DeviceStore, Outgoing, Residual, Shared, State
from petalfl.training import TrainingResult, train
from petalfl.transport import Transport
from petalfl.updates import make_update
from petalfl.uplink import Uplink
from petalfl.vectors import Vector, from_bytes, to_bytes

log = logging.getLogger("petalfl.client")
T = TypeVar("T")
Data: TypeAlias = Mapping[str, ArrayLike] | ExampleStore
BACKOFF_S = (0.5, 30.0)
GOODBYE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class RoundInfo:
    """A round is about to be trained; ``num_rounds`` is 0 where no end is planned."""

    round_num: int
    num_rounds: int


@dataclass(frozen=True, slots=True)
class RoundMetrics:
    """What the training of a round came to.

    Attributes:
        loss: Mean over the round's steps.
        num_examples: Of the device's data; its weight in the mean.
        num_steps: Batches trained on.
        seconds: From the first batch to the last, pauses included.
    """

    round_num: int
    loss: float
    num_examples: int
    num_steps: int
    seconds: float


class _LocalData(NamedTuple):
    """Checked: inputs by modality and labels by task, all of one length."""

    inputs: dict[str, NDArray[Any]]
    labels: dict[str, NDArray[Any]]


class EdgeClient:
    """Trains a device's blocks on its own data and shares what may be shared.

    Args:
        url: The server, ``http(s)://host:port``.
        token: The join token that the server prints; needed until the device is enrolled.
        data: By modality: float32, or integers of an int64 modality, ``(n, *shape)``. Which
            modalities are here decides which blocks the device holds. Or an `ExampleStore` that
            grows, of which every round trains on what has labels then; it stays the app's to close.
        labels: As in `petalfl.data.check_labels`: an array, or arrays by task. A head whose task
            has no labels here is neither held nor trained. An `ExampleStore` has its own.
        store: A folder of this client's own; keeps credential, private blocks and outbox.
        device: A name of 1 to 64 lower-case letters, digits and dashes; the default is random.
        federation: Its name on the server.
        on_round: Called, on the training thread, when a round's blocks are in place and before
            they are trained: the moment to evaluate.
        on_progress: Called, on the training thread, with the batches done and their total.
        on_metrics: Called, on the training thread, when a round has been trained.
        on_error: Called with what goes wrong: what the client survives, such as a server that is
            away for a while, and what ends `run`, which raises it as well.
        should_train: Asked, on the training thread, before and between batches. While it says
            False, training rests where it is, and it is asked again every few seconds: is the
            device charging, idle, cool?
        num_threads: Of each ONNX Runtime session.
        engine: ``auto`` trains on the ONNX Runtime that is installed; ``ort-training`` or ``ort``
            insist on that line of packages.
        key: 32 bytes that encrypt the store, see docs/device_store.md.
        executor: Runs training and downloads; the default is asyncio's.

    Raises:
        StoreError: The store is open in another client, or damaged.
        ValueError: ``url`` or ``device`` is malformed.

    Example:
        >>> client = EdgeClient(url, token=token, data=data, labels=labels, store=path)
        >>> client.run()                                    # doctest: +SKIP
        >>> client.predict({"acc": window})                 # doctest: +SKIP
    """

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        data: Data | None = None,
        labels: Labels | None = None,
        store: str | os.PathLike[str],
        device: str = "",
        federation: str = "default",
        on_round: Callable[[RoundInfo], None] = lambda info: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_metrics: Callable[[RoundMetrics], None] = lambda metrics: None,
        on_error: Callable[[PetalError], None] = lambda error: None,
        should_train: Callable[[], bool] = lambda: True,
        num_threads: int = 1,
        engine: EngineName = "auto",
        key: bytes | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._token = token
        self._federation = federation
        self._device = device or f"device-{secrets.token_hex(4)}"
        topics.status(federation, self._device)  # refuses malformed names here and now
        self._data, self._labels = data, labels
        self._local = _LocalData({}, {})
        self._data_lock = threading.Lock()
        self._on_round, self._on_progress = on_round, on_progress
        self._on_metrics, self._on_error = on_metrics, on_error
        self._num_threads, self._engine, self._executor = num_threads, engine, executor
        self._store = DeviceStore(Path(store), key)
        try:
            self._downlink = Downlink(url, federation, self._store)
            self._identity = self._store.read_identity()
            self._state = self._store.read_state()
        except (StoreError, ValueError):
            self._store.close()
            raise
        self._model: LocalModel | None = None
        self._model_lock = threading.Lock()
        self._pointers: dict[str, wire.BlockVersion] = {}  # of the shared blocks that are here
        self._pacing = Pacing(should_train)  # of the training thread
        self._thread: threading.Thread | None = None
        self._has_begun = threading.Event()
        self._announce_again: Callable[[], None] = lambda: None  # on the event loop
        self._stopped: asyncio.Event | None = None  # for the event loop
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def device(self) -> str:
        """The name under which the server knows this device."""
        return self._identity.device if self._identity else self._device

    def run(self) -> None:
        """Takes part until the federation's last round or `stop`; blocks. See `arun`."""
        asyncio.run(self.arun())

    async def arun(self) -> None:
        """Takes part until the federation's last round or `stop`.

        Enrolls first if need be. Broken connections are mended; what was trained and has no
        receipt yet is sent again, also after a restart.

        Raises:
            PetalError: There is no ONNX Runtime to train on, enrollment is refused, the data does
                not fit the model, the server cannot be reached at the start, or training failed.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._pacing.begin()
        self._has_begun.set()
        try:
            session = await self._call(self._prepare)
            self._local = self._checked(self._data, self._labels)
            await self._take_part(session)
        except PetalError as error:
            self._on_error(error)
            raise
        finally:
            self._loop = None

    def start(self) -> None:
        """`run` on a thread of its own, until `stop`; what ends it is told to ``on_error``.

        Raises:
            RuntimeError: It is running already.
        """
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError("the client is running already; stop it first")
        self._has_begun.clear()
        self._thread = threading.Thread(target=self._run_aside, name="petalfl", daemon=True)
        self._thread.start()
        self._has_begun.wait()  # a `stop` from here on counts

    def _run_aside(self) -> None:
        try:
            self.run()
        except Exception as error:  # a thread has nobody to raise it to
            log.error("%s takes no part any longer: %s", self.device, error,
                      exc_info=not isinstance(error, PetalError))  # fmt: skip
            if not isinstance(error, PetalError):
                self._on_error(PetalError(f"{type(error).__name__}: {error}"))
        finally:
            self._has_begun.set()  # also where there was no loop to begin with

    def pause(self) -> None:
        """Lets training rest, within a batch, until `resume`; from any thread.

        The connection stays, and a round goes on where it was. The server waits for it until
        its deadline.
        """
        self._pacing.pause()

    def resume(self) -> None:
        """Ends a pause."""
        self._pacing.resume()

    @property
    def is_paused(self) -> bool:
        """Between `pause` and `resume`."""
        return self._pacing.is_paused

    def set_data(self, data: Data, labels: Labels | None = None) -> None:
        """Trains on other data from the next round on; from any thread.

        Modalities may come and go between rounds: without those of a watch that was taken off, the
        device goes on with the blocks of the others. A round under way that asked for more does
        not count.

        Args:
            data: As in the constructor; of a client that runs, of modalities that it began with.
            labels: As in the constructor.

        Raises:
            DataError: The data does not fit the model, or has modalities or tasks whose blocks the
                running client does not hold. Nothing changes.
        """
        if (loop := self._loop) is not None:
            local = self._checked(data, labels)
            model = self._current_model()
            lacking = {b.name for b in model.manifest.blocks_for(*local)} - {
                b.name for b in model.held
            }
            if lacking:
                raise DataError(
                    f"this device does not hold {', '.join(sorted(lacking))}; stop the client, "
                    f"set the data and run it again"
                )
            with self._data_lock:
                self._local = local
                self._data, self._labels = data, labels
            with contextlib.suppress(RuntimeError):  # it has ended in this very moment
                loop.call_soon_threadsafe(self._announce_again)
        else:
            self._data, self._labels = data, labels

    def stop(self) -> None:
        """Makes `run` return within a batch; from any thread.

        A round that is being trained is given up and trained again next time; an update on its
        way stays in the outbox. A pause ends with it. `close` waits until it is so.
        """
        self._pacing.stop()
        if (loop := self._loop) is not None and self._stopped is not None:
            with contextlib.suppress(RuntimeError):  # it has ended in this very moment
                loop.call_soon_threadsafe(self._stopped.set)

    def close(self) -> None:
        """Ends what `start` began, and gives the store back to other clients."""
        if self._thread is not None:
            self.stop()
            self._thread.join()
        self._store.close()

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def predict(self, inputs: Mapping[str, ArrayLike]) -> Any:
        """The personalized model's predictions, of a classifier the classes; works offline.

        Args:
            inputs: Any subset of the device's modalities, as in `LocalModel.predict_proba`.

        Returns:
            An array ``(n, …)``, or arrays by task; `LocalModel.predict` says which.

        Raises:
            DataError: The inputs do not fit the model.
            StoreError: The device has not got the model yet.
        """
        return self._current_model().predict(inputs)

    def predict_proba(self, inputs: Mapping[str, ArrayLike]) -> Any:
        """Probabilities, as `LocalModel.predict_proba` has them; otherwise as `predict`."""
        return self._current_model().predict_proba(inputs)

    def evaluate(self, inputs: Mapping[str, ArrayLike], labels: Labels) -> dict[str, Any]:
        """The personalized model's metrics, as in `LocalModel.evaluate`; errors as `predict`."""
        return self._current_model().evaluate(inputs, labels)

    # Getting ready: enrollment, the manifest, the artifacts of the blocks held.

    def _prepare(self) -> Session:
        log.info("%s trains on %s", self._device, find_runtime(self._engine))  # before it enrolls
        data = self._data or {}
        modalities = sorted(data.modalities if isinstance(data, ExampleStore) else data)
        if self._identity is None:
            self._identity = self._downlink.enroll(self._token, self._device, modalities)
        self._downlink.log_in(self._identity)
        tasks = sorted(self._labels) if isinstance(self._labels, Mapping) else None
        self._downlink.fetch_model(modalities, tasks, self._identity.private_blocks)
        self._model = None
        self._current_model()
        return self._downlink.get_session()

    def _checked(self, data: Data | None, labels: Labels | None) -> _LocalData:
        model = self._current_model()
        manifest = model.manifest
        if isinstance(data, ExampleStore):
            if labels is not None:
                raise DataError("the example store has its own labels: give none beside it")
            held = {manifest.modality_of(b) for b in model.held if b.kind == "encoder"}
            names = held & set(data.modalities)  # what comes to the store later waits for a restart
            data, labels, _ = data.snapshot(names or None)
        inputs = check_inputs(manifest, data or {})
        length = len(next(iter(inputs.values())))
        labels = labels if labels is not None else np.empty(0)
        return _LocalData(inputs, check_labels(manifest, labels, length))

    def _current_model(self) -> LocalModel:
        with self._model_lock:
            if self._model is None:
                self._model = self._load_model()
            return self._model

    def _load_model(self) -> LocalModel:
        manifest_bytes = self._store.read_file(MANIFEST_NAME)
        if manifest_bytes is None or self._identity is None:
            raise StoreError(f"the store {self._store.folder} has no model yet: call run() first")
        manifest = ModelManifest.from_json(manifest_bytes)
        held = tuple(
            b for b in manifest.blocks if self._store.read_file(b.artifacts.eval_model.path)
        )
        model = LocalModel.open(
            manifest, self._store.artifacts, held, self._num_threads, self._engine
        )
        shared = self._store.read_shared()
        self._pointers = {
            name: wire.BlockVersion(version, hashlib.sha256(shared.vectors[name]).hexdigest())
            for name, version in shared.versions.items()
            if name in shared.vectors
        }
        parameters = {}
        for block in held:
            data = None if block.is_frozen else self._trained(block, shared)
            if data is None and not self._is_shared(block):
                data = self._store.read_file(block.artifacts.parameters.path)
            if data is not None:
                parameters[block.name] = _stored_vector(block, data)
        return model.with_parameters(parameters)

    def _trained(self, block: Block, shared: Shared) -> bytes | None:
        vectors = shared.vectors if self._is_shared(block) else self._state.private
        return vectors.get(block.name)

    # Taking part: tasks come down, updates go up.

    async def _take_part(self, session: Session) -> None:
        inbox = Inbox()

        def announce() -> None:
            _in_background(self._announce(transport))

        transport = await self._connect(session, announce)
        uplink = Uplink(transport, self._federation, self.device)
        handler = functools.partial(_receive, inbox, uplink)
        try:
            await transport.subscribe(topics.all_down(self._federation, self.device), handler)
            self._announce_again = announce
            await self._announce(transport)
            worker = asyncio.create_task(self._work(inbox, uplink, announce))
            await self._until_stopped(worker)
        finally:  # however it ends: no later round waits for this device
            self._announce_again = lambda: None
            with contextlib.suppress(TransportError, asyncio.TimeoutError):
                await asyncio.wait_for(self._say_goodbye(transport), GOODBYE_TIMEOUT_S)
            await transport.close()

    async def _connect(self, session: Session, on_connect: Callable[[], None]) -> Transport:
        assert self._identity is not None
        # The same after a restart, so that it ends a connection before; a guess would end this one.
        secret = hashlib.sha256(self._identity.password.encode()).hexdigest()[:16]
        transport = MqttTransport(
            Endpoint(session.mqtt_host, session.mqtt_port, session.mqtt_is_tls),
            login=(self._identity.device, self._identity.password),
            client_id=f"{self._federation}-{self.device}-{secret}",
            will=(
                topics.status(self._federation, self.device),
                wire.encode(wire.Status(is_online=False)),
            ),
            on_connect=on_connect,
        )
        await transport.connect()
        return transport

    async def _announce(self, transport: Transport) -> None:
        """Says that the device is here and can take a task, at the start and after a break."""
        online = wire.encode(wire.Status(is_online=True))
        held = self._local
        ready = wire.encode(
            wire.Ready(tuple(sorted(held.inputs)), tuple(sorted(held.labels)), KINDS)
        )
        topic = topics.status(self._federation, self.device)
        await transport.publish(topic, online, retain=True)
        await transport.publish(topics.request(self._federation, self.device), ready, retain=True)

    async def _say_goodbye(self, transport: Transport) -> None:
        offline = wire.encode(wire.Status(is_online=False))
        topic = topics.status(self._federation, self.device)
        await transport.publish(topic, offline, retain=True)

    async def _until_stopped(self, worker: asyncio.Task[None]) -> None:
        assert self._stopped is not None
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait((worker, stopped), return_when=asyncio.FIRST_COMPLETED)
            if worker.done() and not self._stopped.is_set():
                with contextlib.suppress(Stopped):  # it may know before the loop does
                    worker.result()
        finally:
            self._pacing.stop()  # training gives way within a batch
            stopped.cancel()
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError, PetalError, Stopped):
                await worker

    async def _work(self, inbox: Inbox, uplink: Uplink, announce: Callable[[], None]) -> None:
        doubted = 0  # a round long trained, of which the server was asked whether it means it
        while True:
            task = await inbox.get()
            self._check_blocks(task)
            if isinstance(task, wire.Finish):
                if await self._fetch_patiently(task, inbox, announce):
                    await self._keep_outbox(())  # nothing counts any longer
                    return
                continue
            if task.round_num > self._state.round_num or task.round_num == doubted:
                doubted = 0
                if not await self._fetch_patiently(task, inbox, announce):
                    continue
                await self._call(self._train_round, task)
            elif task.round_num < self._state.round_num or not self._state.outbox:
                # A replay; or the server has gone back to a backup, and then it says it again.
                log.warning("ignored a task of round %d, long trained", task.round_num)
                doubted = task.round_num
                announce()
                continue
            await inbox.unless_over(task.round_num, self._deliver_outbox(uplink))

    def _check_blocks(self, task: wire.Task | wire.Finish) -> None:
        model = self._current_model()
        shareable = {b.name for b in model.held if self._is_shared(b)}
        uploads = task.uploads or () if isinstance(task, wire.Task) else ()
        if unknown := sorted(set(uploads) - task.blocks.keys()):
            raise WireError(f"the server asks for block {unknown[0]} without saying its version")
        if foreign := sorted(task.blocks.keys() - shareable):
            raise WireError(
                f"the server asks for block {foreign[0]}, which this device does not share; "
                f"it shares {sorted(shareable)}"
            )

    async def _fetch_patiently(
        self, task: wire.Task | wire.Finish, inbox: Inbox, announce: Callable[[], None]
    ) -> bool:
        """Whether the blocks are here; if not, the server has said something else meanwhile."""
        for delay_s in delays(*BACKOFF_S):
            try:
                await self._call(self._fetch_blocks, task.blocks)
                break
            except NotThereError as error:  # the server has gone on, or back
                log.warning("no blocks (%s): asking for another task", error)
                announce()
            except TransportError as error:  # the server may be on its way back
                self._report(TransportError(f"no blocks yet ({error}): trying again"))
            if await inbox.has_other_than(task, delay_s):
                return False
        return True

    def _fetch_blocks(self, wanted: Mapping[str, wire.BlockVersion]) -> None:
        """Downloads the shared blocks whose version is not here, and keeps them.

        Of two versions with one number, the server's backup has been restored in between.
        """
        model = self._current_model()
        fetched = {
            name: self._downlink.fetch_block(model.manifest.block(name), pointer)
            for name, pointer in wanted.items()
            if self._pointers.get(name) != pointer
        }
        base = self._store.read_shared()
        stored = {n: _stored_vector(model.manifest.block(n), v) for n, v in base.vectors.items()}
        self._replace_parameters(stored | fetched)
        self._pointers |= {name: wanted[name] for name in fetched}
        if fetched:
            vectors = base.vectors | {name: to_bytes(vector) for name, vector in fetched.items()}
            versions = {name: pointer.version for name, pointer in self._pointers.items()}
            self._store.write_shared(Shared(versions, vectors))

    def _train_round(self, task: wire.Task) -> None:
        """Trains one round and writes private blocks and outbox in one atomic step."""
        self._pacing.wait()
        self._on_round(RoundInfo(task.round_num, task.num_rounds))
        if isinstance(data := self._data, ExampleStore):
            local = self._checked(data, None)
            with self._data_lock:
                if self._data is data:  # or `set_data` has come meanwhile
                    self._local = local
        model, (inputs, labels) = self._current_model(), self._local
        held = model.manifest.blocks_for(inputs, labels)
        before = {block.name: model.parameters[block.name] for block in held}
        rng = np.random.default_rng([task.seed, task.round_num, _number(self.device)])
        started_s = time.monotonic()
        result = train(
            model.engine, model.manifest, before, inputs, labels, task.hyperparameters, rng,
            shared=task.blocks, on_batch=self._on_batch,
        )  # fmt: skip
        seconds = time.monotonic() - started_s
        uploads = task.blocks if task.uploads is None else task.uploads
        outbox, residuals = [], dict(self._state.residuals)
        for block in held:
            if block.name in uploads:
                update, left = self._make_update(block, task, result, before[block.name], rng)
                outbox.append(update)
                residuals.pop(block.name, None)
                residuals |= {} if left is None else {block.name: left}
        report = wire.Report(
            secrets.token_bytes(16), task.round_num, result.num_examples, result.loss
        )
        outbox.append(Outgoing(wire.encode(report), b""))
        private = {
            block.name: to_bytes(result.parameters[block.name])
            for block in held
            if not (block.is_frozen or self._is_shared(block))
        }
        private = self._state.private | private
        self._state = State(task.round_num, private, tuple(outbox), residuals)
        self._store.write_state(self._state)
        self._replace_parameters(result.parameters)
        self._on_metrics(
            RoundMetrics(
                task.round_num, result.loss, result.num_examples, len(result.losses), seconds
            )
        )

    def _make_update(
        self,
        block: Block,
        task: wire.Task,
        result: TrainingResult,
        before: Vector,
        rng: np.random.Generator,
    ) -> tuple[Outgoing, Residual | None]:
        """The one place where a block becomes something to send; refuses all but shared ones."""
        if not self._is_shared(block):
            raise ValueError(f"block {block.name} is not shared: it cannot become an update")
        delta = result.parameters[block.name] - before
        kept = self._state.residuals.get(block.name)
        return make_update(block, task, result.num_examples, delta, kept, rng)

    async def _deliver_outbox(self, uplink: Uplink) -> None:
        for outgoing in self._state.outbox:
            receipt = await uplink.deliver(outgoing)
            if receipt.status == "rejected":
                self._report(WireError(f"the server rejected an update: {receipt.reason}"))
            rest = tuple(o for o in self._state.outbox if o != outgoing)
            self._state = replace(self._state, outbox=rest)
        await self._keep_outbox(())

    async def _keep_outbox(self, outbox: tuple[Outgoing, ...]) -> None:
        self._state = replace(self._state, outbox=outbox)
        await self._call(self._store.write_state, self._state)

    def _replace_parameters(self, parameters: Mapping[str, Vector]) -> None:
        model = self._current_model()
        with self._model_lock:
            self._model = model.with_parameters(parameters)

    def _is_shared(self, block: Block) -> bool:
        if self._identity is None or block.is_frozen:
            return False
        return block.name not in self._identity.private_blocks

    def _report(self, error: PetalError) -> None:
        """Something went wrong that the client survives."""
        log.warning("%s", error)
        self._on_error(error)

    def _on_batch(self, done: int, total: int) -> None:
        self._on_progress(done, total)
        self._pacing.wait()

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs on a thread; when cancelled, lets the thread end before it gives way."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            with contextlib.suppress(PetalError, Stopped):
                await future
            raise


def _receive(inbox: Inbox, uplink: Uplink, topic: str, payload: bytes) -> None:
    try:
        message = wire.decode(payload)
    except WireError as error:
        log.warning("ignored a malformed message on %s: %s", topic, error)
        return
    if isinstance(message, wire.Receipt):
        uplink.receive(message)
    elif isinstance(message, (wire.Task, wire.Finish)):
        inbox.put(message)


def _in_background(work: Awaitable[None]) -> None:
    task = asyncio.ensure_future(work)
    task.add_done_callback(_log_failure)


def _log_failure(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("%s", error)


def _stored_vector(block: Block, data: bytes) -> Vector:
    try:
        return from_bytes(data, block.size)
    except ValueError as error:
        raise StoreError(
            f"the stored parameters of block {block.name} do not fit the model: {error}"
        ) from error


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
