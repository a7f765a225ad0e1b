"""Devices that may not send all they have trained."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from petalfl import EdgeClient
from petalfl.model import ModelManifest
from petalfl.vectors import to_bytes
from tests.integration.harness import running_server, take_part
from tests.integration.test_async import examples

ROUNDS = 8


def test_every_task_keeps_to_the_budget_and_every_block_moves(
    small_artifacts: Path, tmp_path: Path
) -> None:
    manifest = ModelManifest.load(small_artifacts)
    sizes = {block.name: 4 * block.size for block in manifest.blocks}
    budget = max(sizes.values())
    arguments = ("--scheme", "fm", "--rounds", str(ROUNDS), "--min-devices", "2",
                 "--max-upload-bytes", str(budget))  # fmt: skip
    with running_server(small_artifacts, tmp_path / "server", *arguments) as server:
        with ExitStack() as stack:
            clients = []
            for number, name in enumerate(("one", "two")):
                mine = examples(number, 24)
                client = EdgeClient(
                    server.url, token=server.token, data=mine.of("ab"), labels=mine.labels,
                    store=tmp_path / name, device=name,
                )  # fmt: skip
                clients.append(stack.enter_context(client))
            asyncio.run(take_part(clients))
            kept = {c.device: c._trainer.model.parameters for c in clients}
        sent = server.query("SELECT device, round_num, SUM(num_bytes) FROM updates GROUP BY 1, 2")
        assert len(sent) == 2 * ROUNDS
        assert all(0 < num_bytes <= budget for _, _, num_bytes in sent)
        versions = server.get("status")["shared_blocks"]
        assert all(version > 1 for version in versions.values()), versions
        # What was trained and not sent is gone: all have the server's newest versions.
        for name, version in versions.items():
            for parameters in kept.values():
                assert to_bytes(parameters[name]) == to_bytes(
                    np.asarray(server.block(name, version), np.float32)
                )
