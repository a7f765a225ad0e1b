"""The data of an `EdgeClient`, which changes while it runs, with the real server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petalfl import (
    DataError,
    EdgeClient,
    ExampleStore,
    PetalError,
    RoundInfo,
    RoundMetrics,
    StoreError,
    wire,
)
from petalfl.downlink import Downlink
from petalfl.local_data import ArrayData
from petalfl.training import Hyperparameters
from tests.integration.harness import Server, running_server
from tests.petalfl.clients import (
    LABELS,
    A,
    B,
    Make,
    is_ready,
    running,
    until,
)


def test_data_set_during_a_snapshot_stays(
    busy: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []
    with ExampleStore(tmp_path / "examples") as examples:
        for a, label in zip(A[:10], LABELS[:10], strict=True):
            examples.append({"a": a}, int(label))
        snapshot, num_snapshots = ExampleStore.snapshot, 0

        def slow(self: ExampleStore, *names: Any, **more: Any) -> Any:
            nonlocal num_snapshots
            num_snapshots += 1
            result = snapshot(self, *names, **more)
            if num_snapshots == 2:  # the first is that of the start
                client.set_data({"a": A[:7]}, LABELS[:7])
            return result

        monkeypatch.setattr(ExampleStore, "snapshot", slow)
        client = make(
            busy, "d", data=examples, labels=None,
            on_metrics=lambda metrics: found.append(metrics.num_examples),
        )  # fmt: skip
        client.run()
    assert found == [7, 7, 7]


# Modalities come and go


def test_a_modality_that_goes_and_comes_back(
    small_artifacts: Path, make: Make, tmp_path: Path
) -> None:
    """A watch is taken off after the first round, and put on again after the second."""
    both = {"a": A, "b": B}
    steps = {1: {"a": A}, 2: both}
    held: list[tuple[str, ...]] = []

    def change(metrics: RoundMetrics) -> None:
        held.append(tuple(client._trainer.data.local.modalities))
        if metrics.round_num in steps:
            client.set_data(steps[metrics.round_num], LABELS)

    with running_server(small_artifacts, tmp_path / "server", "--rounds", "9") as server:
        client = make(server, "d", data=both, on_metrics=change)
        client.run()
        rows = server.query("SELECT round_num, block FROM updates ORDER BY 1, 2")
    assert held[:2] == [("a", "b"), ("a",)] and set(held[2:]) == {("a", "b")}
    of_round = {n: [block for round_num, block in rows if round_num == n] for n in range(1, 10)}
    assert of_round[1] == of_round[9] == ["encoder-a", "encoder-b"]
    assert of_round[2] == ["encoder-a"]


def test_data_that_does_not_fit_changes_nothing(idle: Server, make: Make) -> None:
    client = make(idle, "fits-not")
    with running(client):
        until(lambda: is_ready(idle, "fits-not"), "ready")
        with pytest.raises(DataError, match="does not hold encoder-b; stop the client"):
            client.set_data({"a": A, "b": B}, LABELS)
        with pytest.raises(DataError, match="modality a: found shape"):
            client.set_data({"a": B}, LABELS)
        assert client._trainer.data.local.modalities == ("a",)
    client.set_data({"a": A[:7]}, LABELS[:7])  # it is looked at when it runs
    with running(client):
        until(lambda: len(client._trainer.data.local) == 7, "its data")


# Examples that grow, a store that is encrypted


def test_every_round_trains_on_what_has_labels_then(
    busy: Server, make: Make, tmp_path: Path
) -> None:
    found: list[int] = []
    with ExampleStore(tmp_path / "examples") as examples:
        for a, label in zip(A[:10], LABELS[:10], strict=True):
            examples.append({"a": a}, int(label))
        late = examples.append({"a": A[10]})

        def grow(info: RoundInfo) -> None:
            if info.round_num == 2:
                examples.label(late, 1)
            elif info.round_num == 3:
                examples.append({"a": A[11], "b": B[11]}, 0)  # a sensor more than it holds
                examples.append({"a": A[12]})

        client = make(
            busy, "d", data=examples, labels=None, on_round=grow,
            on_metrics=lambda metrics: found.append(metrics.num_examples),
        )  # fmt: skip
        client.run()
    assert found == [10, 11, 12]
    counted = busy.query("SELECT num_examples FROM reports ORDER BY round_num")
    assert counted == [(10,), (11,), (12,)]


def test_a_round_without_examples_is_left_out_and_told(
    busy: Server, make: Make, tmp_path: Path
) -> None:
    errors: list[PetalError] = []
    clock_s = [1000.0]
    store = ExampleStore(tmp_path / "examples", max_age_s=100, now_s=lambda: clock_s[0])
    with store as examples:
        for a, label in zip(A[:10], LABELS[:10], strict=True):
            examples.append({"a": a}, int(label))

        def grow_old(info: RoundInfo) -> None:
            if info.round_num == 2:
                for _ in range(4):  # a jump of the clock counts by half of the age at most
                    clock_s[0] += 50
                    examples.expire()

        client = make(
            busy, "d", data=examples, labels=None, on_round=grow_old, on_error=errors.append
        )
        with running(client):
            until(lambda: bool(errors), "the error")
        assert client._trainer.state.round_num == 1
    assert str(errors[0]).startswith("round 2 is left out: no example has")


def test_examples_that_do_not_fit_are_left_out(
    busy: Server, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another shape, with a class that the model lacks, or of a modality without labels."""
    counted: list[int] = []
    with ExampleStore(tmp_path / "examples") as examples:
        for a, label in zip(A[:10], LABELS[:10], strict=True):
            examples.append({"a": a}, int(label))
        examples.append({"a": A[10]}, 7)
        examples.append({"b": B[0]})
        examples.append({"a": A[0, :2]}, 1)
        client = make(
            busy,
            "d",
            data=examples,
            labels=None,
            on_metrics=lambda metrics: counted.append(metrics.num_examples),
        )
        client.run()
    assert counted == [10, 10, 10]
    assert "left out 2 of 12 examples: modality a: found shape (1, 2)" in caplog.text


def test_examples_of_which_none_fits(idle: Server, make: Make, tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "examples") as examples:
        examples.append({"a": A[0]}, 7)
        with pytest.raises(DataError, match=r"no example .* does not fit: labels: found 7 to"):
            make(idle, "none-fits", data=examples, labels=None).run()


def test_a_sequence_is_read_batch_by_batch(busy: Server, make: Make) -> None:
    """Rounds as with arrays, until an example cannot be read: that costs a round."""
    errors: list[PetalError] = []
    is_broken = False

    class Recordings(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if is_broken and index == 5:
                raise OSError("the card is full of holes")
            return super().__getitem__(index)

    def spoil(info: RoundInfo) -> None:
        nonlocal is_broken
        is_broken = info.round_num == 3

    examples = Recordings([({"a": a}, int(label)) for a, label in zip(A, LABELS, strict=True)])
    client = make(busy, "d", data=examples, labels=None, on_round=spoil, on_error=errors.append)
    with running(client):
        until(lambda: bool(errors), "the error")
    assert client._trainer.state.round_num == 2
    assert busy.query("SELECT num_examples, COUNT(*) FROM reports GROUP BY 1") == [(24, 2)]
    assert re.fullmatch("round 3 is left out: number 5 .* full of holes", str(errors[0]))
    with pytest.raises(DataError, match="labels of their own: give none beside it"):
        make(busy, "two-labels", data=examples).run()


def test_labels_may_come_later(
    busy: Server, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there are any, the device does not even enroll."""
    monkeypatch.setattr("petalfl.client.POLL_S", 0.05)
    with ExampleStore(tmp_path / "examples") as examples:
        client = make(busy, "d", data=examples, labels=None)
        client.start()
        example = examples.append({"a": A[0]})
        until(lambda: client._loop is not None, "the start")
        assert client._trainer.identity is None
        examples.label(example, 1)
        until(lambda: client._trainer.state.round_num == 3, "the last round")
        client.close()
        waiting = make(busy, "other", data=ExampleStore(tmp_path / "empty"), labels=None)
        waiting.start()
        waiting.close()  # does not wait for examples


def test_an_example_store_that_will_not_do(idle: Server, make: Make, tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "examples") as examples:
        examples.append({"a": A[0]}, 1)
        with pytest.raises(DataError, match="has its own labels: give none beside it"):
            make(idle, "two-labels", data=examples).run()


def test_an_encrypted_store(busy: Server, make: Make) -> None:
    key = bytes(range(32))
    with make(busy, "d", key=key) as client:
        client.run()
        before = client.predict_proba({"a": A})
    with pytest.raises(StoreError):
        make(busy, "d")
    with pytest.raises(StoreError):
        make(busy, "d", key=bytes(32))
    np.testing.assert_array_equal(make(busy, "d", key=key).predict_proba({"a": A}), before)


def test_a_device_that_gets_a_modality(busy: Server, make: Make) -> None:
    """It enrolled without; the server learns of it when the client runs again."""
    client: EdgeClient = make(busy, "d", on_metrics=lambda metrics: client.stop())
    with client:
        client.run()
    with make(busy, "d", data={"a": A, "b": B}) as again:
        again.run()
    assert busy.get("devices")["d"]["modalities"] == ["a", "b"]
    rows = busy.query("SELECT DISTINCT block FROM updates ORDER BY 1")
    assert rows == [("encoder-a",), ("encoder-b",)]
    with make(busy, "d") as without:  # and one that goes is not forgotten
        without.run()
    assert busy.get("devices")["d"]["modalities"] == ["a", "b"]


def test_a_modality_that_a_task_knows_nothing_of(busy: Server, make: Make) -> None:
    """It came after the task was made: its blocks here may be of an old version."""
    client = make(busy, "d", data={"a": A, "b": B})
    client.run()
    trainer = client._trainer
    pointer = trainer.pointers()["encoder-a"]
    task = wire.Task(9, 0, Hyperparameters(0.1), 0, {"encoder-a": pointer})
    before = trainer.model.parameters["encoder-b"]
    client._pacing.begin()
    assert trainer.train_round(task)
    messages = [wire.decode(outgoing.message) for outgoing in trainer.state.outbox]
    assert [m.block for m in messages if isinstance(m, wire.UpdateManifest)] == ["encoder-a"]
    np.testing.assert_array_equal(trainer.model.parameters["encoder-b"], before)


def test_a_task_without_any_block_of_the_data(busy: Server, make: Make) -> None:
    errors: list[PetalError] = []
    client = make(busy, "d", on_error=errors.append)
    client.run()
    client._pacing.begin()
    task = wire.Task(9, 0, Hyperparameters(0.1), 0, {})
    assert not client._trainer.train_round(task)
    assert client._trainer.state.round_num == 3
    assert str(errors[-1]).startswith("round 9 is left out: the task lacks encoder-a")


def test_data_set_while_the_client_gets_ready_stays(
    busy: Server, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before there is a model to check it with, and while other data is checked."""
    counted: list[int] = []
    checked, fetch_model = ArrayData.checked, Downlink.fetch_model
    client: EdgeClient = make(
        busy, "d", on_metrics=lambda metrics: counted.append(metrics.num_examples)
    )

    def amid_the_download(self: Downlink, *arguments: Any) -> Any:
        client.set_data({"a": A[:20]}, LABELS[:20])
        return fetch_model(self, *arguments)

    def amid_the_check(manifest: Any, inputs: Any, labels: Any) -> Any:
        result = checked(manifest, inputs, labels)
        if len(inputs["a"]) == 20:
            client.set_data({"a": A[:9]}, LABELS[:9])
        return result

    monkeypatch.setattr(Downlink, "fetch_model", amid_the_download)
    monkeypatch.setattr(ArrayData, "checked", amid_the_check)
    client.run()
    assert counted == [9, 9, 9]


def test_an_example_store_that_the_app_has_closed(busy: Server, make: Make, tmp_path: Path) -> None:
    errors: list[PetalError] = []
    examples = ExampleStore(tmp_path / "examples")
    for a, label in zip(A[:10], LABELS[:10], strict=True):
        examples.append({"a": a}, int(label))
    client = make(
        busy, "d", data=examples, labels=None, on_error=errors.append,
        on_metrics=lambda metrics: examples.close(),
    )  # fmt: skip
    with running(client):
        until(lambda: bool(errors), "the error")
    assert str(errors[0]).startswith("round 2 is left out: cannot read the example store")
