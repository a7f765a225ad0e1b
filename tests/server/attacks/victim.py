"""A server with an open round in front of hostile devices, and what it must look like after."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petalfl import wire
from petalfl.transport import Handler
from server.gateway import Gateway
from tests.server.builders import FED, Run, Site, settle

MEMBER, STRANGER = "watch", "mallory"  # in the round; enrolled, but not asked
_TABLES = ("settings", "devices", "rounds", "tasks", "updates", "reports", "versions")


@dataclass
class Recorder:
    """A transport that remembers what goes out."""

    sent: list[tuple[str, wire.Message]] = field(default_factory=list)

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.sent.append((topic, wire.decode(payload)))

    async def subscribe(self, topic_filter: str, handler: Handler) -> None: ...

    async def close(self) -> None: ...


class Victim:
    """Messages go straight in, as if a broker had let them pass; nothing raised is only logged."""

    def __init__(self, run: Run, site: Site) -> None:
        self.run = run
        self.now_s = 0.0
        self.cut_off: list[str] = []
        self._folder = site.data_dir
        self._transport = Recorder()
        self.gateway = Gateway(
            self._transport, FED, site.manifest, run.federation,
            cut_off=self.cut_off.append, now_s=lambda: self.now_s,
        )  # fmt: skip

    def receive(self, topic: str, message: wire.Message | bytes, after_s: float = 1.0) -> None:
        """``after_s`` the message before; the default is slow enough for nobody to be throttled."""
        self.now_s += after_s
        data = message if isinstance(message, bytes) else wire.encode(message)
        self.gateway._receive(f"fl/v1/{FED}/{topic}", data)

    @property
    def num_refused(self) -> int:
        """Counted reasons, at the door and behind it."""
        return self.gateway.refused.total() + self.run.federation.refused.total()

    async def receipts(self) -> list[wire.Receipt]:
        """What went out to devices since the last call."""
        await settle()
        sent, self._transport.sent = self._transport.sent, []
        return [message for _, message in sent if isinstance(message, wire.Receipt)]

    def snapshot(self) -> Any:
        """All that must not change: the database but for traffic, files, round and roster."""
        database = self._folder / "state.sqlite"
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
            tables = {name: db.execute(f"SELECT * FROM {name}").fetchall() for name in _TABLES}
        files = {
            str(path): path.read_bytes()
            for path in self._folder.parent.rglob("*")
            if path.is_file() and not path.name.startswith("state.sqlite")
        }
        current = self.run.federation.round
        assert current is not None
        ready = self.run.federation.roster.ready.keys() - {STRANGER}  # who may say that it is
        return tables, files, current.round_num, dict(current.reports), ready


@contextmanager
def open_victim(folder: Path) -> Iterator[Victim]:
    """Three enrolled devices, of which two are in the open round."""
    site = Site(folder, enrolled={MEMBER: ["acc"], "phone": ["gyro"], STRANGER: ["acc", "gyro"]})
    with site.run(min_devices=2) as run:
        run.ready(MEMBER)
        run.ready("phone")
        yield Victim(run, site)
