"""Two clients on one store, as processes: the second is refused, and harms nothing."""

from __future__ import annotations

from pathlib import Path

from tests.integration.faulty_device import faulty_device, read_to_the_end, read_until
from tests.integration.harness import SCHEME, assert_counted_once, running_server

ALONE = (*SCHEME, "--min-devices", "1", "--epochs", "1", "--rounds", "2")
REFUSAL = "StoreError: the device store {} is open already; give every client its own"


def test_the_second_is_refused(watch_artifacts: Path, tmp_path: Path) -> None:
    store, go_on = tmp_path / "store", tmp_path / "go on"
    with running_server(watch_artifacts, tmp_path / "server", *ALONE) as server:
        here = (server.url, server.token, store)
        with faulty_device(*here, hold_at="Chunk 3", until=str(go_on)) as first:
            read_until(first, "wait")
            for _ in range(2):
                with faulty_device(*here) as second:
                    assert second.wait() == 1
                    assert not second.stdout or second.stdout.read() == "", "it takes no part"
                log = store.with_suffix(".log").read_text()
                assert log.rstrip().endswith(REFUSAL.format(store))
            go_on.touch()
            said = read_to_the_end(first)
        assert "round 2" in said
        assert not [line for line in said if line.startswith("error")]
        assert_counted_once(server, num_rounds=2, num_devices=1)


def test_after_a_power_cut_the_store_is_free(watch_artifacts: Path, tmp_path: Path) -> None:
    with running_server(watch_artifacts, tmp_path / "server", *ALONE) as server:
        here = (server.url, server.token, tmp_path / "store")
        with faulty_device(*here, hold_at="Chunk 3", until=str(tmp_path / "never")) as first:
            read_until(first, "wait")
        with faulty_device(*here) as second:
            read_to_the_end(second)
        assert_counted_once(server, num_rounds=2, num_devices=1)
