"""A device without its network: its store, its model, its data, and the rounds it trains."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from petalfl import wire
from petalfl.adoption import adopt
from petalfl.app_data import AppData, Data, only_asked
from petalfl.backoff import delays
from petalfl.budgets import Budgets, fit_memory
from petalfl.callbacks import Callbacks, RoundInfo, RoundMetrics
from petalfl.codecs import KINDS, parse_codec
from petalfl.control_variates import correction, own_control, with_sum
from petalfl.data import Labels
from petalfl.errors import DataError, PetalError, StoreError, WireError
from petalfl.fine_tuning import OwnModel, origin_of
from petalfl.local_data import ExampleError, LocalData
from petalfl.local_model import LocalModel
from petalfl.model import MANIFEST_NAME, Artifact, Block, ModelManifest
from petalfl.pacing import Pacing
from petalfl.payloads import max_payload_bytes
from petalfl.private_tensors import check_tensors, put_back, withhold
from petalfl.runtime import EngineName
from petalfl.store import DeviceStore, Outgoing, Shared, State
from petalfl.trained_round import TrainedRound
from petalfl.training import Hyperparameters, TrainingResult, train
from petalfl.vectors import Vector, from_bytes, to_bytes

BACKOFF_S = (0.5, 30.0)  # between writes to a disk that is full


class Trainer:
    """What a device is, whether or not it is connected. Its methods block: call them on a thread.

    Args:
        store: Open; it stays its owner's to close.
        pacing: Asked before and between batches.
        budgets: Of time and memory.
        num_threads: Of each ONNX Runtime session.

    Attributes:
        identity: None before the first enrollment.
        state: As the store has it.
        data: What the app has given to train on.

    Raises:
        StoreError: The store is damaged.
    """

    def __init__(
        self,
        store: DeviceStore,
        callbacks: Callbacks,
        pacing: Pacing,
        budgets: Budgets,
        num_threads: int,
        engine: EngineName,
    ) -> None:
        self.identity = store.read_identity()
        self.state = store.read_state()
        self.data = AppData()
        self._store = store
        self._callbacks, self._pacing, self._budgets = callbacks, pacing, budgets
        self._num_threads, self._engine = num_threads, engine
        self._model: LocalModel | None = None
        self._model_lock = threading.Lock()
        self._moved: PetalError | None = None  # to tell the app of
        self._sums: dict[str, Vector] = {}  # of their control variates, if there are any
        self._own = OwnModel(store, callbacks)

    # The data

    @property
    def ready(self) -> wire.Ready:
        """What the server is told that this device can train."""
        local = self.data.local
        return wire.Ready(tuple(sorted(local.modalities)), tuple(sorted(local.tasks)), KINDS)

    def check_data(self) -> None:
        """Makes the app's data the one to train on; errors as `AppData.check`."""
        self.data.check(self.model)

    def replace_data(self, data: Data, labels: Labels | None) -> None:
        """Takes other data from the next round on; errors as `EdgeClient.set_data`."""
        if self.has_model:
            self.data.replace(self.model, data, labels)
        else:  # on its way, and then the data is checked
            self.data.hold(data, labels)

    # The model

    @property
    def has_model(self) -> bool:
        """Whether the device has got one yet."""
        return self._model is not None or self._store.read_file(MANIFEST_NAME) is not None

    @property
    def model(self) -> LocalModel:
        """The newest; it stays as it is whatever happens here.

        Raises:
            StoreError: There is none yet, or it is damaged.
        """
        with self._model_lock:
            if self._model is None:
                self._model = self._load_model()
            model, moved, self._moved = self._model, self._moved, None
        if moved is not None:
            self._callbacks.survived(moved)  # which may ask for the model: without the lock
        return model

    @property
    def own_model(self) -> LocalModel:
        """To predict with: `model`, or what fine-tuning has made of it; errors as `model`."""
        return self.model.with_parameters(self._own.vectors)

    def reload_model(self) -> None:
        """Takes the artifacts that are in the store now; errors as `model`."""
        self._model = None
        _ = self.model

    def is_shared(self, block: Block) -> bool:
        """Whether the block's deltas may leave this device."""
        return self.identity is not None and self.identity.shares(block)

    def check_blocks(self, task: wire.Task | wire.Finish) -> None:
        """Refuses what the server may not ask for.

        Raises:
            WireError: It asks for a block that this device does not share.
        """
        shareable = {b.name for b in self.model.held if self.is_shared(b)}
        uploads = task.uploads or () if isinstance(task, wire.Task) else ()
        if unknown := sorted(set(uploads) - task.blocks.keys()):
            raise WireError(f"the server asks for block {unknown[0]} without saying its version")
        if task.num_holders is not None and task.num_holders.keys() != task.blocks.keys():
            raise WireError(
                "the server speaks of control variates of other blocks than it asks for"
            )
        if foreign := sorted(task.blocks.keys() - shareable):
            raise WireError(
                f"the server asks for block {foreign[0]}, which this device does not share; "
                f"it shares {sorted(shareable)}"
            )

    def travelling(self, name: str, task: wire.Task | wire.Finish) -> Block:
        """A block as it comes and goes: with control variates, where there are some."""
        block = self.model.manifest.block(name)
        return block if task.num_holders is None else with_sum(block)

    def pointers(self) -> dict[str, wire.BlockVersion]:
        """The versions that are on disk, whatever was written there or could not be."""
        shared = self._store.read_shared()
        return {
            name: wire.BlockVersion(version, hashlib.sha256(shared.vectors[name]).hexdigest())
            for name, version in shared.versions.items()
            if name in shared.vectors
        }

    def lacking(self, task: wire.Task | wire.Finish) -> dict[str, wire.BlockVersion]:
        """The versions that are not here.

        Of two with one number, the server's backup has been restored in between.
        """
        pointers = self.pointers()
        return {
            name: to
            for name, to in task.blocks.items()
            if pointers.get(name) != to
            or (task.num_holders is not None and not self._sums[name].size)
        }

    def num_bytes(self, task: wire.Task | wire.Finish) -> int:
        """The most that downloads and updates of a task come to."""
        down = sum(4 * self.travelling(name, task).size for name in self.lacking(task))
        if isinstance(task, wire.Finish):
            return down
        codec = parse_codec(task.codec or "f32")
        uploads = task.blocks if task.uploads is None else task.uploads
        return down + sum(max_payload_bytes(codec, self.travelling(n, task)) for n in uploads)

    def outdate(self, task: wire.Task | wire.Finish) -> None:
        """Drops a fine-tuned model that is not the task's: its blocks are about to come."""
        self._own.drop_unless(origin_of(task))

    def keep_blocks(
        self, pointers: Mapping[str, wire.BlockVersion], vectors: Mapping[str, Vector]
    ) -> None:
        """Goes on from downloaded versions, and from those of all other shared blocks.

        Args:
            vectors: Of `travelling` blocks.
        """
        block = self.model.manifest.block
        base = self._store.read_shared()
        stored = {name: _stored_vector(block(name), data) for name, data in base.vectors.items()}
        newest = {**stored, **vectors}
        self._replace_parameters({n: self._received(block(n), v) for n, v in newest.items()})
        if vectors:
            kept = base.vectors | {name: to_bytes(vector) for name, vector in vectors.items()}
            versions = base.versions | {name: to.version for name, to in pointers.items()}
            try:
                self._store.write_shared(Shared(versions, kept))
            except StoreError as error:  # they can be downloaded again
                self._callbacks.survived(error)

    def _replace_parameters(self, parameters: Mapping[str, Vector]) -> None:
        model = self.model
        with self._model_lock:
            self._model = model.with_parameters(parameters)

    def _load_model(self) -> LocalModel:
        manifest_bytes = self._store.read_file(MANIFEST_NAME)
        if manifest_bytes is None or self.identity is None:
            raise StoreError(f"the store {self._store.folder} has no model yet: call run() first")
        manifest = ModelManifest.from_json(manifest_bytes)
        check_tensors(manifest, self.identity.private_tensors)
        self.state, moved = adopt(self._store, self.state, manifest)
        self._moved = moved or self._moved
        held = tuple(b for b in manifest.blocks if self._is_here(b.artifacts.eval_model))
        model = LocalModel.open(
            manifest, self._store.artifacts, held, self._num_threads, self._engine
        )
        shared = self._store.read_shared()
        parameters = {}
        for block in held:
            data = None if block.is_frozen else self._trained(block, shared)
            if data is None and not self.is_shared(block):
                data = self._store.read_file(block.artifacts.parameters.path)
            if data is not None:
                parameters[block.name] = self._received(block, _stored_vector(block, data))
        self._own.load(self.state, held)
        return model.with_parameters(parameters)

    def _is_here(self, artifact: Artifact) -> bool:
        """And not of another model, under the same path."""
        return self._store.file_sha256(artifact.path) == artifact.sha256

    def _trained(self, block: Block, shared: Shared) -> bytes | None:
        vectors = shared.vectors if self.is_shared(block) else self.state.private
        return vectors.get(block.name)

    def _received(self, block: Block, vector: Vector) -> Vector:
        """A block's vector with the device's own private tensors, without control variates."""
        vector, self._sums[block.name] = np.split(vector, [block.size])
        own = {n: from_bytes(v, len(v) // 4) for n, v in self.state.private_tensors.items()}
        return put_back(block, own, vector)

    def _corrections(self, task: wire.Task) -> dict[str, Vector]:
        """By block with control variates."""
        assert self.identity is not None
        found = {}
        for name, num_holders in (task.num_holders or {}).items():
            block = self.model.manifest.block(name)
            own = own_control(block, self.state.controls)
            towards = correction(self._sums[name], num_holders, own)
            found[name] = withhold(block, self.identity.private_tensors, towards)
        return found

    # Rounds

    def train_round(self, task: wire.Task) -> bool:
        """Trains one round and writes private blocks and outbox in one atomic step.

        Returns:
            False where there is nothing to train on this time; the app was told.

        Raises:
            DataError: Training diverged; nothing has changed.
            Stopped: It was told to end; nothing has changed.
        """
        self._pacing.wait()
        self._callbacks.on_round(RoundInfo(task.round_num, task.num_rounds))
        rng = self._generator(task.seed, task.round_num)
        before = self.model.parameters
        try:
            data, hyperparameters = self._prepare(task, task.hyperparameters)
        except (DataError, StoreError) as error:  # later examples may do
            return self._left_out(task, error)
        corrections, started_s = self._corrections(task), time.monotonic()
        try:
            result = self._train(task, data, hyperparameters, rng, corrections)
        except ExampleError as error:  # it may be mended
            return self._left_out(task, error)
        seconds = time.monotonic() - started_s
        trained = TrainedRound(self.identity, self.state, task, before, result)
        held = self.model.manifest.blocks_for(data.modalities, data.tasks)
        self._keep(trained.state_after(held, rng))
        self._replace_parameters(result.parameters)
        self._callbacks.on_metrics(_metrics(task.round_num, result, seconds))
        return True

    def fine_tune(self, finish: wire.Finish) -> None:
        """Makes `own_model` after the last round, where it is asked for and not there yet.

        Where that fails, the app is told and `model` stays in use.

        Raises:
            Stopped: It was told to end; nothing has changed.
        """
        hyperparameters, last = finish.hyperparameters, self.state.round_num
        if hyperparameters is None or self._own.vectors:
            return
        self._pacing.wait()
        self._callbacks.on_round(RoundInfo(last, last, is_fine_tuning=True))
        rng = self._generator(finish.seed or 0, 0)  # rounds count from 1
        try:
            data, hyperparameters = self._prepare(finish, hyperparameters)
            started_s = time.monotonic()
            result = self._train(finish, data, hyperparameters, rng)
        except PetalError as error:
            self._callbacks.survived(DataError(f"fine-tuning is left out: {error}"))
            return
        seconds = time.monotonic() - started_s
        block = self.model.manifest.block
        own = {n: v for n, v in result.parameters.items() if not block(n).is_frozen}
        self._own.keep(origin_of(finish), self.state, own)
        self._callbacks.on_metrics(_metrics(last, result, seconds, is_fine_tuning=True))

    def _generator(self, seed: int, round_num: int) -> np.random.Generator:
        assert self.identity is not None
        return np.random.default_rng([seed, round_num, _number(self.identity.device)])

    def _prepare(
        self, task: wire.Task | wire.Finish, hyperparameters: Hyperparameters
    ) -> tuple[LocalData, Hyperparameters]:
        """The data of now, and batches that there is memory for.

        Raises:
            DataError: There is no data, none that the task asks for, or too little memory.
            StoreError: The app's example store fails.
        """
        model, memory_bytes = self.model, self._budgets.memory_bytes
        shared = {block.name for block in model.manifest.blocks if self.is_shared(block)}
        data = only_asked(self.data.refresh(model), model.manifest, shared - task.blocks.keys())
        if memory_bytes is not None:
            held = model.manifest.blocks_for(data.modalities, data.tasks)
            hyperparameters = fit_memory(hyperparameters, held, memory_bytes)
        return data, hyperparameters

    def _train(
        self,
        task: wire.Task | wire.Finish,
        data: LocalData,
        hyperparameters: Hyperparameters,
        rng: np.random.Generator,
        corrections: Mapping[str, Vector] = MappingProxyType({}),
    ) -> TrainingResult:
        """What training makes of `model`; errors as `petalfl.training.train`."""
        model = self.model
        result = train(
            model.engine, model.manifest, model.parameters, data, hyperparameters, rng,
            shared=task.blocks, corrections=corrections, on_batch=self._on_batch,
            max_seconds=self._budgets.seconds,
            clock=lambda: time.monotonic() - self._pacing.rested_s,
        )  # fmt: skip
        if not result.num_examples:
            raise ExampleError(f"the {self._budgets.seconds:g} s of its budget were over too soon")
        return result

    def _left_out(self, task: wire.Task, error: PetalError) -> bool:
        self._callbacks.survived(DataError(f"round {task.round_num} is left out: {error}"))
        return False

    def _keep(self, state: State) -> None:
        """Writes the state; while the disk has no room for it, tries again, and nothing is sent."""
        for delay_s in delays(*BACKOFF_S):
            try:
                self._store.write_state(state)
                break
            except StoreError as error:
                self._callbacks.survived(error)
            self._pacing.rest(delay_s)
        self.state = state

    def _on_batch(self, done: int, total: int) -> None:
        self._callbacks.on_progress(done, total)
        self._pacing.wait()

    # The outbox

    def note_delivered(self, outgoing: Outgoing, *, is_accepted: bool) -> None:
        """Something has its receipt; on disk it stays until `keep_controls` or `empty_outbox`."""
        rest = tuple(other for other in self.state.outbox if other != outgoing)
        controls, message = self.state.controls, wire.decode(outgoing.message)
        if is_accepted and isinstance(message, wire.UpdateManifest):
            next_one = self.state.next_controls.get(message.block)
            controls = controls | ({} if next_one is None else {message.block: next_one})
        self.state = replace(self.state, outbox=rest, controls=controls)

    def keep_controls(self) -> None:
        """Writes that control variates have changed, which the server now counts on."""
        if self.state.next_controls:
            self._write()

    def empty_outbox(self) -> None:
        """Everything has its receipt, or counts no longer."""
        self.state = replace(self.state, outbox=(), next_controls={})
        self._write()

    def _write(self) -> None:
        try:
            self._store.write_state(self.state)
        except StoreError as error:  # what comes back with it at a restart counts only once
            self._callbacks.survived(error)


def _stored_vector(block: Block, data: bytes) -> Vector:
    try:
        has_sum = len(data) > 4 * block.size
        return from_bytes(data, (with_sum(block) if has_sum else block).size)
    except ValueError as error:
        raise StoreError(
            f"the stored parameters of block {block.name} do not fit the model: {error}"
        ) from error


def _metrics(
    round_num: int, result: TrainingResult, seconds: float, is_fine_tuning: bool = False
) -> RoundMetrics:
    return RoundMetrics(
        round_num, result.loss, result.num_examples, result.num_steps, seconds,
        result.is_complete, is_fine_tuning,
    )  # fmt: skip


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
