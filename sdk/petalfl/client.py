"""`EdgeClient`: a device's part in a federation, in ten lines of an app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from petalfl import topics
from petalfl.app_data import Data
from petalfl.backoff import delays
from petalfl.budgets import Budgets
from petalfl.callbacks import Callbacks, RoundInfo, RoundMetrics
from petalfl.data import Labels
from petalfl.downlink import Downlink
from petalfl.errors import PetalError, StoreError, TransportError
from petalfl.examples import ExampleStore
from petalfl.metering import ByteMeter
from petalfl.pacing import POLL_S, Pacing, Stopped
from petalfl.participation import Participation
from petalfl.provisioning import take_identity
from petalfl.runtime import EngineName, find_runtime
from petalfl.source import NotThereError
from petalfl.store import DeviceStore
from petalfl.threads import Threads
from petalfl.tls import Tls
from petalfl.trainer import Trainer
from petalfl.ways import Session

log = logging.getLogger("petalfl.client")
BACKOFF_S = (0.5, 30.0)  # of a server that cannot be reached at the start
T = TypeVar("T")
METER_NAME = "traffic.json"  # in the store, of a client whose bytes are limited

__all__ = ["Budgets", "EdgeClient", "ExampleStore", "RoundInfo", "RoundMetrics", "Tls"]


class EdgeClient:
    """Trains a device's blocks on its own data and shares what may be shared.

    Args:
        url: The server, ``http(s)://host:port``; or its broker, ``mqtt(s)://host:port``, where the
            device has no HTTP.
        token: The join token that the server prints; needed until the device is enrolled.
        data: By modality: float32, or integers of an int64 modality, ``(n, *shape)``. Which
            modalities are here decides which blocks the device holds. Or an `ExampleStore` that
            grows, of which every round trains on what has labels then; it stays the app's to close.
            Or any sequence of ``(inputs by modality, labels)``, one example each, which is read
            batch by batch and so may be larger than memory: `petalfl.local_data.SequenceData`.
        labels: As in `petalfl.data.check_labels`: an array, or arrays by task. A head whose task
            has no labels here is neither held nor trained. Stores and sequences have their own.
        store: A folder of this client's own; keeps credential, private blocks and outbox.
        device: A name of 1 to 64 lower-case letters, digits and dashes; the default is random.
        federation: Its name on the server.
        identity: A file that ``python -m server enroll`` wrote, instead of a token: it says what
            device this is, and in which federation.
        on_round: Called, on the training thread, when a round's blocks are in place and before
            they are trained: the moment to evaluate. As well before fine-tuning, which a server
            may ask for after the last round.
        on_progress: Called, on the training thread, with the batches done and their total.
        on_metrics: Called, on the training thread, when a round has been trained, or the model has
            been fine-tuned.
        on_error: Called with what goes wrong: what the client survives, such as a server that is
            away for a while, and what ends `run`, which raises it as well.
        should_train: Asked, on the training thread, before and between batches. While it says
            False, training rests where it is, and it is asked again every few seconds: is the
            device charging, idle, cool?
        budgets: What it may take: a round of time and memory, a day of bytes.
        num_threads: Of each ONNX Runtime session.
        engine: ``auto`` trains on the ONNX Runtime that is installed; ``ort-training`` or ``ort``
            insist on that line of packages.
        key: 32 bytes that encrypt the store, see docs/device_store.md.
        tls: Whom to trust at an ``https`` URL and a broker with TLS, and the device's own
            certificate, see docs/tls.md; the default is to trust the system's authorities.
        executor: Runs training and downloads; the default is asyncio's.

    Raises:
        StoreError: The store is open in another client, damaged, or another device's than
            ``identity`` says.
        ValueError: ``url`` or ``device`` is malformed, or ``identity`` is no such file.

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
        identity: str | os.PathLike[str] | None = None,
        on_round: Callable[[RoundInfo], None] = lambda info: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_metrics: Callable[[RoundMetrics], None] = lambda metrics: None,
        on_error: Callable[[PetalError], None] = lambda error: None,
        should_train: Callable[[], bool] = lambda: True,
        budgets: Budgets | None = None,
        num_threads: int = 1,
        engine: EngineName = "auto",
        key: bytes | None = None,
        tls: Tls | None = None,
        executor: Executor | None = None,
    ) -> None:
        self._token = token
        self._device = device or f"device-{secrets.token_hex(4)}"
        topics.status(federation, self._device)  # refuses malformed names here and now
        self._engine = engine
        self._callbacks = Callbacks(on_round, on_progress, on_metrics, on_error)
        self._pacing = Pacing(should_train)
        self._threads = Threads(executor)
        self._store = DeviceStore(Path(store), key)
        try:
            if identity is not None:
                federation = take_identity(self._store, Path(identity)).federation
            self._meter = self._make_meter(budgets)
            self._downlink = Downlink(
                url, federation, self._store, tls, self._pacing.check,
                self._meter.count if self._meter else lambda num_bytes: None,
            )  # fmt: skip
            self._trainer = Trainer(
                self._store, self._callbacks, self._pacing, budgets or Budgets(), num_threads,
                engine,
            )  # fmt: skip
        except (StoreError, ValueError):
            self._store.close()
            raise
        self._trainer.data.hold(data, labels)
        self._thread: threading.Thread | None = None
        self._has_begun, self._has_ended = threading.Event(), threading.Event()
        self._lifecycle = threading.RLock()  # a signal's handler may `stop` amid any line of it
        self._is_closing = self._is_stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = 0
        self._participation: Participation | None = None

    def _make_meter(self, budgets: Budgets | None) -> ByteMeter | None:
        if budgets is None or budgets.bytes_per_day is None:
            return None
        return ByteMeter(budgets.bytes_per_day, self._store.folder / METER_NAME)

    @property
    def device(self) -> str:
        """The name under which the server knows this device."""
        identity = self._trainer.identity
        return identity.device if identity else self._device

    def run(self) -> None:
        """Takes part until the federation's last round or `stop`; blocks. See `arun`."""
        asyncio.run(self.arun())

    async def arun(self) -> None:
        """Takes part until the federation's last round or `stop`.

        Enrolls first if need be, and with an `ExampleStore` waits until an example has labels.
        Fine-tunes after the last round, where the server asks for it.
        Broken connections are mended; what was trained and has no receipt yet is sent again, also
        after a restart. A server that cannot be reached is tried again with back-off, which
        ``on_error`` is told, but for a device that has not enrolled.

        Raises:
            PetalError: There is no ONNX Runtime to train on, enrollment is refused or nobody
                answers it, the data does not fit the model, or training failed.
        """
        self._begin()
        is_known = self._trainer.identity is not None  # to the server, and it to us
        try:
            await self._until_examples()
            for delay_s in delays(*BACKOFF_S):
                try:
                    await self._take_part()
                    break
                except TransportError as error:
                    if self._is_stopped or isinstance(error, NotThereError) or not is_known:
                        raise
                    again = TransportError(f"no part in the federation yet ({error}): trying again")
                    self._callbacks.survived(again)
                await self._rest(delay_s)
        except Stopped:
            log.info("%s was stopped before it took part", self.device)
        except PetalError as error:
            self._callbacks.told(error)
            raise
        finally:
            self._end()

    async def _until_examples(self) -> None:
        """An example store may have none with labels yet: without, there is nothing to train."""
        if self._trainer.data.lacks_examples:
            log.info("%s waits for examples with labels", self.device)
        while self._trainer.data.lacks_examples:
            await self._call(self._pacing.rest, POLL_S)

    async def _take_part(self) -> None:
        session = await self._call(self._enter)
        assert self._trainer.identity is not None
        self._participation = Participation(
            self._trainer.identity, self._trainer, self._downlink, self._callbacks,
            self._pacing, self._threads, self._meter,
        )  # fmt: skip
        if not self._pacing.is_stopping:  # or it was stopped before there was a part to stop
            await self._participation.run(session, self._get_ready)

    async def _rest(self, delay_s: float) -> None:
        self._pacing.begin()  # what has ended a participation has stopped it
        if self._is_stopped:
            self._pacing.stop()
        await self._call(self._pacing.rest, delay_s)

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        """On a thread, which gives way where this is cancelled: then the run ends."""
        return await self._threads.call(function, *arguments, on_cancel=self._pacing.stop)

    def _begin(self) -> None:
        with self._lifecycle:
            if self._loop is not None or self._is_closing:
                raise RuntimeError(f"the client is {'running already' if self._loop else 'closed'}")
            self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
            self._has_ended.clear()
            self._is_stopped = False
            self._pacing.begin()
        self._has_begun.set()

    def _end(self) -> None:
        with self._lifecycle:
            self._loop, self._loop_thread, self._participation = None, 0, None
            if self._is_closing:
                self._store.close()
        self._has_ended.set()

    def start(self) -> None:
        """`run` on a thread of its own, until `stop`; what ends it is told to ``on_error``.

        See also `is_running` and `wait`.

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
                self._callbacks.told(PetalError(f"{type(error).__name__}: {error}"))
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
        device goes on with the blocks of the others. A round under way ends with the data that it
        began with.

        Args:
            data: As in the constructor; of a client that runs, of modalities that it began with.
            labels: As in the constructor.

        Raises:
            DataError: The data does not fit the model, or has modalities or tasks whose blocks the
                running client does not hold. Nothing changes.
        """
        if self._loop is None:
            self._trainer.data.hold(data, labels)
        else:
            self._trainer.replace_data(data, labels)
            self._tell(Participation.announce_changes)

    def stop(self) -> None:
        """Makes `run` return within a batch; from any thread.

        A round that is being trained is given up and trained again next time, as is fine-tuning;
        an update on its way stays in the outbox. A pause ends with it. `close` waits for it.
        """
        with self._lifecycle:  # after a beginning, which forgets it, or before
            self._is_stopped = True
            self._pacing.stop()
        self._tell(Participation.stop)

    def _tell(self, message: Callable[[Participation], None]) -> None:
        """Has the event loop tell the running participation, if there is one."""
        if (loop := self._loop) is not None:
            with contextlib.suppress(RuntimeError):  # it has ended in this very moment
                loop.call_soon_threadsafe(self._pass_on, message)

    def _pass_on(self, message: Callable[[Participation], None]) -> None:
        if self._participation is not None:
            message(self._participation)

    @property
    def is_running(self) -> bool:
        """From the beginning of `run`, `start` or `arun` to its end, whatever that was."""
        return self._loop is not None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the client runs no longer: after the last round, an error or `stop`.

        Args:
            timeout_s: At most so long; None: without end.

        Returns:
            Whether it has ended.

        Raises:
            RuntimeError: It is called from a callback, or on the event loop of `arun`: from within
                the run that it would wait for.
        """
        if self._is_inside():
            raise RuntimeError("a run cannot wait for its own end: wait elsewhere")
        if self._thread is not None and self._thread.is_alive():  # it tells of errors at its end
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return not self.is_running or self._has_ended.wait(timeout_s)

    def _is_inside(self) -> bool:
        """Whether this is called, however deep, by the client's own run."""
        is_own_thread = threading.current_thread() is self._thread
        is_on_loop = threading.get_ident() == self._loop_thread
        return is_own_thread or is_on_loop or self._threads.is_own()

    def close(self) -> None:
        """Stops the client, and gives the store back to other clients.

        Waits until `run` has ended; from a callback, or on the event loop of `arun`, it cannot:
        there the store is given back when that ends.
        """
        with self._lifecycle:
            self._is_closing = True
            is_running = self._loop is not None
            if not is_running:
                self._store.close()
        self.stop()
        if is_running and not self._is_inside():
            self.wait()

    def __enter__(self) -> EdgeClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def predict(self, inputs: Mapping[str, ArrayLike]) -> Any:
        """The personalized model's predictions, of a classifier the classes; works offline.

        After the last round it is the fine-tuned one, if the server has asked for that.

        Args:
            inputs: Any subset of the device's modalities, as in `LocalModel.predict_proba`.

        Returns:
            An array ``(n, …)``, or arrays by task; `LocalModel.predict` says which.

        Raises:
            DataError: The inputs do not fit the model.
            StoreError: The device has not got the model yet.
        """
        return self._trainer.own_model.predict(inputs)

    def predict_proba(self, inputs: Mapping[str, ArrayLike]) -> Any:
        """Probabilities, as `LocalModel.predict_proba` has them; otherwise as `predict`."""
        return self._trainer.own_model.predict_proba(inputs)

    def evaluate(self, inputs: Mapping[str, ArrayLike], labels: Labels) -> dict[str, Any]:
        """The personalized model's metrics, as in `LocalModel.evaluate`; errors as `predict`."""
        return self._trainer.own_model.evaluate(inputs, labels)

    # Getting ready: enrollment, then the manifest and the artifacts of the blocks held.

    def _enter(self) -> Session:
        log.info("%s trains on %s", self._device, find_runtime(self._engine))  # before it enrolls
        trainer, modalities = self._trainer, self._trainer.data.modalities
        if trainer.identity is None:
            self._store.check_room()  # a device enrolls once
            trainer.identity = self._downlink.enroll(self._token, self._device, modalities)
        self._downlink.log_in(trainer.identity)
        if modalities:
            self._downlink.add_modalities(modalities)
        return self._downlink.get_session()

    def _get_ready(self) -> None:
        trainer, data = self._trainer, self._trainer.data
        assert trainer.identity is not None
        self._downlink.fetch_model(data.modalities, data.tasks, trainer.identity.shares)
        trainer.reload_model()
        trainer.check_data()
