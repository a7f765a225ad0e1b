"""What the app gives to train on: checked against the model, and replaced at any moment."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from numpy.typing import ArrayLike

from petalfl.data import Labels
from petalfl.errors import DataError
from petalfl.examples import ExampleStore
from petalfl.local_data import ArrayData, Example, LocalData, SequenceData, read_example
from petalfl.local_model import LocalModel
from petalfl.model import ModelManifest

Data: TypeAlias = Mapping[str, ArrayLike] | ExampleStore | Sequence[Example]


class AppData:
    """Data and labels as `EdgeClient` takes them; from any thread.

    Attributes:
        local: What the next round trains on: empty before `check` or `replace`.
    """

    def __init__(self) -> None:
        self.local: LocalData = ArrayData({}, {})
        self._data: Data | None = None
        self._labels: Labels | None = None
        self._lock = threading.Lock()

    @property
    def modalities(self) -> list[str]:
        """Of the data, whether or not it has been checked."""
        data = self._data if self._data is not None else {}
        if isinstance(data, ExampleStore):
            return sorted(data.modalities)
        return sorted(data if isinstance(data, Mapping) else read_example(data, 0)[0])

    @property
    def lacks_examples(self) -> bool:
        """Whether there may be examples to train on only later."""
        return isinstance(self._data, ExampleStore) and not self._data.num_labeled

    @property
    def tasks(self) -> list[str] | None:
        """That there are labels of; None: of all, or one cannot know yet."""
        labels, data = self._labels, self._data
        if data is not None and not isinstance(data, (Mapping, ExampleStore)):
            labels = read_example(data, 0)[1]
        return sorted(labels) if isinstance(labels, Mapping) else None

    def hold(self, data: Data | None, labels: Labels | None) -> None:
        """Takes data that is checked once there is a model, by `check`."""
        with self._lock:
            self._data, self._labels = data, labels

    def check(self, model: LocalModel) -> None:
        """Makes what is held the data to train on.

        Raises:
            DataError: It does not fit the model.
        """
        while True:
            data, labels = self._data, self._labels
            local = _checked(model, data, labels)
            with self._lock:
                if self._data is data and self._labels is labels:  # or other data has come
                    self.local = local
                    return

    def replace(self, model: LocalModel, data: Data, labels: Labels | None) -> None:
        """Takes other data from the next round on; errors as `EdgeClient.set_data`."""
        local = _checked(model, data, labels)
        needed = model.manifest.blocks_for(local.modalities, local.tasks)
        if lacking := {b.name for b in needed} - {b.name for b in model.held}:
            raise DataError(
                f"this device does not hold {', '.join(sorted(lacking))}; stop the client, "
                f"set the data and run it again"
            )
        with self._lock:
            self.local = local
            self._data, self._labels = data, labels

    def refresh(self, model: LocalModel) -> LocalData:
        """What to train on now: of an example store, what has labels by now; errors as `check`."""
        if isinstance(data := self._data, ExampleStore):
            local = _checked(model, data, None)
            with self._lock:
                if self._data is data:  # or other data has come meanwhile
                    self.local = local
        return self.local


def only_asked(local: LocalData, manifest: ModelManifest, unasked: Collection[str]) -> LocalData:
    """Without what has come since a task was made: its shared blocks would be stale.

    Args:
        unasked: The shared blocks that the task does not name.

    Raises:
        DataError: There is nothing left to train on.
    """
    held = manifest.blocks_for(local.modalities, local.tasks)
    absent = [block for block in held if block.name in unasked]
    modalities = {manifest.modality_of(b) for b in absent if b.kind == "encoder"}
    tasks = {task for task, head in manifest.heads.items() if head in absent}
    kept = [name for name in local.modalities if name not in modalities]
    tasks_kept = [name for name in local.tasks if name not in tasks]
    is_fusion = any(block.kind == "fusion" for block in absent)
    if is_fusion or not kept or not tasks_kept:
        names = ", ".join(block.name for block in absent)
        raise DataError(f"the task lacks {names}, without which there is nothing to train")
    return local.only(kept, tasks_kept) if absent else local


def _checked(model: LocalModel, data: Data | None, labels: Labels | None) -> LocalData:
    manifest = model.manifest

    def fitting(inputs: Mapping[str, ArrayLike], labels: Labels | None) -> ArrayData:
        return ArrayData.checked(manifest, inputs, labels)

    if isinstance(data, ExampleStore):
        if labels is not None:
            raise DataError("the example store has its own labels: give none beside it")
        held = {manifest.modality_of(b) for b in model.held if b.kind == "encoder"}
        names = held & set(data.modalities)  # what comes to the store later waits for a restart
        data, labels, _ = data.snapshot(names or None, check=fitting)
    if data is None or isinstance(data, Mapping):
        return fitting(data or {}, labels)
    if labels is not None:
        raise DataError("the sequence's examples have labels of their own: give none beside it")
    return SequenceData(manifest, data)
