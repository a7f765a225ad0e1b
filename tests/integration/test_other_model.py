"""The server's model is replaced by one of another layout, and comes back."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from pathlib import Path

import numpy as np

from petalfl import EdgeClient, ModelError, PetalError
from petalfl.model import ModelManifest
from petalfl.store import DeviceStore
from petalfl.vectors import Vector, from_bytes
from tests.integration.harness import Server, running_server

RNG = np.random.default_rng(1)
DATA = {"a": RNG.standard_normal((24, 5), dtype=np.float32)}
LABELS = np.arange(24) % 3
ROUNDS = ("--scheme", "phf", "--epochs", "1")


def take_along_devices(old: Path, new: Path) -> None:
    """What an operator does who keeps his devices: the server refuses the old folder itself."""
    with contextlib.closing(sqlite3.connect(new / "state.sqlite")) as db:
        db.execute("ATTACH ? AS old", (str(old / "state.sqlite"),))
        db.execute("INSERT INTO devices SELECT * FROM old.devices")
        db.commit()
    shutil.copytree(old / "broker", new / "broker", dirs_exist_ok=True)


def take_part(server: Server, store: Path) -> list[PetalError]:
    """One device, to the federation's end; what its app was told."""
    told: list[PetalError] = []
    with EdgeClient(
        server.url, token=server.token, data=DATA, labels=LABELS, store=store, device="d",
        on_error=told.append,
    ) as client:  # fmt: skip
        client.run()
        assert len(client.predict(DATA)) == 24
    return told


def private_blocks(artifacts: Path, store: Path) -> dict[str, Vector]:
    manifest = ModelManifest.load(artifacts)
    opened = DeviceStore(store)
    private = opened.read_state().private
    opened.close()
    return {name: from_bytes(data, manifest.block(name).size) for name, data in private.items()}


def test_another_model_and_back(
    small_artifacts: Path, wider_artifacts: Path, tmp_path: Path
) -> None:
    store, first, second = tmp_path / "store", tmp_path / "first", tmp_path / "second"
    with running_server(small_artifacts, first, *ROUNDS, "--rounds", "2") as server:
        assert take_part(server, store) == []
    trained = private_blocks(small_artifacts, store)
    assert trained.keys() == {"fusion", "head"}

    with running_server(wider_artifacts, second, *ROUNDS, "--rounds", "1"):
        pass
    take_along_devices(first, second)
    with running_server(wider_artifacts, second, *ROUNDS, "--rounds", "1") as server:
        [error] = take_part(server, store)
    assert isinstance(error, ModelError)
    assert "another layout" in str(error)
    assert "fusion, head" in str(error)
    [path] = (store / "aside").iterdir()
    assert str(path) in str(error)
    wider = private_blocks(wider_artifacts, store)
    assert wider["head"].size > trained["head"].size

    with running_server(small_artifacts, first, *ROUNDS, "--rounds", "2") as server:
        [error] = take_part(server, store)  # it is over: nothing is trained
    again = private_blocks(small_artifacts, store)
    assert again.keys() == trained.keys()
    for name, vector in trained.items():
        np.testing.assert_array_equal(again[name], vector)
    assert len(list((store / "aside").iterdir())) == 2
