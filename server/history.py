"""Reading back what has happened, for status pages."""

from __future__ import annotations

import json
import sqlite3
import statistics
from typing import Any

OUTLIER_RATIO = 3.0  # an update so many times as long as the block's median update stands out


class History:
    """Queries on the server's database; changes nothing."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def rounds(self) -> list[dict[str, Any]]:
        """Every closed round, with what each block got in it.

        Of a block: its ``version`` afterwards; its ``holders`` whose updates went into a version,
        with their ``num_examples`` in all; the ``outliers`` among the devices that sent;
        ``num_asked``, the tasks that asked for it; ``num_dropped``, its updates that went into no
        version, being too few; bytes.
        """
        rows = self._db.execute(
            "SELECT round_num, opened_at_s, closed_at_s, loss, num_late FROM rounds "
            "WHERE closed_at_s IS NOT NULL ORDER BY round_num"
        ).fetchall()
        return [
            {
                "round_num": round_num,
                "cohort_size": self._one(
                    "COUNT(DISTINCT device) FROM tasks", "opened_in", round_num
                ),
                "num_reports": self._one("COUNT(*) FROM reports", "arrived_in", round_num),
                "num_late": num_late,
                "duration_s": closed - opened,
                "loss": loss,
                "blocks": self._blocks_of(round_num),
            }
            for round_num, opened, closed, loss, num_late in rows
        ]

    def device_traffic(self) -> dict[str, dict[str, dict[str, int]]]:
        """By device and block: bytes_up and bytes_down in all; enrolled devices have an entry."""
        names = self._db.execute("SELECT name FROM devices ORDER BY name")
        result: dict[str, dict[str, dict[str, int]]] = {name: {} for (name,) in names}
        rows = self._db.execute(
            "SELECT device, block, SUM(bytes_up), SUM(bytes_down) FROM traffic "
            "GROUP BY device, block ORDER BY device, block"
        )
        for device, block, up, down in rows:
            result.setdefault(device, {})[block] = {"bytes_up": up, "bytes_down": down}
        return result

    def totals(self) -> dict[str, int]:
        """Accepted updates, those of them dropped, and bytes of block payloads, over all rounds."""
        accepted, dropped = self._db.execute(
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE version = 0) FROM updates"
        ).fetchone()
        query = "SELECT COALESCE(SUM(bytes_up), 0), COALESCE(SUM(bytes_down), 0) FROM traffic"
        up, down = self._db.execute(query).fetchone()
        return {
            "updates_accepted": accepted,
            "updates_dropped": dropped,
            "bytes_up": up,
            "bytes_down": down,
        }

    def _one(self, what: str, column: str, round_num: int) -> int:
        query = f"SELECT {what} WHERE {column} = ?"
        return int(self._db.execute(query, (round_num,)).fetchone()[0])

    def _blocks_of(self, round_num: int) -> dict[str, dict[str, Any]]:
        asked: dict[str, int] = {}
        tasks = self._db.execute("SELECT blocks FROM tasks WHERE opened_in = ?", (round_num,))
        for (blocks,) in tasks:
            for block in json.loads(blocks):
                asked[block] = asked.get(block, 0) + 1
        versions = self._db.execute(
            "SELECT block, MAX(version) FROM versions WHERE round_num <= ? GROUP BY block",
            (round_num,),
        )
        return {
            block: {
                "version": version,
                "num_asked": asked.get(block, 0),
                **self._block_of(round_num, block),
            }
            for block, version in versions.fetchall()
        }

    def _block_of(self, round_num: int, block: str) -> dict[str, Any]:
        updates = self._db.execute(
            "SELECT device, num_examples, version, norm FROM updates "
            "WHERE closed_in = ? AND block = ? "
            "ORDER BY device",
            (round_num, block),
        ).fetchall()
        up, down = self._db.execute(
            "SELECT COALESCE(SUM(bytes_up), 0), COALESCE(SUM(bytes_down), 0) FROM traffic "
            "WHERE round_num = ? AND block = ?",
            (round_num, block),
        ).fetchone()
        return {
            "holders": sorted({device for device, _, version, _ in updates if version}),
            "num_examples": sum(n for _, n, version, _ in updates if version),
            "num_dropped": sum(not version for *_, version, _ in updates),
            "outliers": _outliers([(device, norm) for device, *_, norm in updates]),
            "bytes_up": up,
            "bytes_down": down,
        }


def _outliers(norms: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """The updates that are much longer than the median one."""
    median = statistics.median(norm for _, norm in norms) if norms else 0.0
    return [
        {"device": device, "norm": norm, "median_norm": median}
        for device, norm in norms
        if norm > OUTLIER_RATIO * median
    ]
