"""Reading back what has happened, for status pages."""

from __future__ import annotations

import json
import sqlite3
import statistics
from collections import Counter, defaultdict
from typing import Any

OUTLIER_RATIO = 3.0  # an update so many times as long as the block's median update stands out


class History:
    """Queries on the server's database; changes nothing."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def rounds(self, since: int = 0) -> list[dict[str, Any]]:
        """Every closed round after ``since``, with what each block got in it.

        Of a block: its ``version`` afterwards; its ``holders`` whose updates went into a version,
        with their ``num_examples`` in all; the ``outliers`` among the devices that sent;
        ``num_asked``, the tasks that asked for it; ``num_dropped``, its updates that went into no
        version, being too few; bytes.
        """
        rows = self._db.execute(
            "SELECT round_num, opened_at_s, closed_at_s, loss, num_late FROM rounds "
            "WHERE closed_at_s IS NOT NULL AND round_num > ? ORDER BY round_num",
            (since,),
        ).fetchall()
        cohort_sizes = self._by_round(
            "SELECT opened_in, COUNT(DISTINCT device) FROM tasks WHERE opened_in > ? "
            "GROUP BY opened_in",
            since,
        )
        num_reports = self._by_round(
            "SELECT arrived_in, COUNT(*) FROM reports WHERE arrived_in > ? GROUP BY arrived_in",
            since,
        )
        blocks = self._blocks([round_num for round_num, *_ in rows], since)
        return [
            {
                "round_num": round_num,
                "cohort_size": sum(n for (n,) in cohort_sizes[round_num]),
                "num_reports": sum(n for (n,) in num_reports[round_num]),
                "num_late": num_late,
                "duration_s": closed - opened,
                "loss": loss,
                "blocks": blocks[round_num],
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

    def _by_round(self, query: str, since: int) -> dict[int, list[Any]]:
        """The rows of a query by their first column, a round: one query does for all rounds."""
        found = defaultdict[int, list[Any]](list)
        for round_num, *row in self._db.execute(query, (since,)):
            found[round_num].append(row)
        return found

    def _blocks(self, round_nums: list[int], since: int) -> dict[int, dict[str, Any]]:
        """By round and block, the blocks that had a version by then."""
        steps = self._db.execute(
            "SELECT round_num, block, MAX(version) FROM versions GROUP BY round_num, block "
            "ORDER BY round_num DESC"
        ).fetchall()
        tasks = self._by_round(
            "SELECT opened_in, blocks, COUNT(*) FROM tasks WHERE opened_in > ? "
            "GROUP BY opened_in, blocks",
            since,
        )
        updates = self._by_round(
            "SELECT closed_in, block, device, num_examples, version, norm FROM updates "
            "WHERE closed_in > ? ORDER BY device",
            since,
        )
        traffic = self._by_round(
            "SELECT round_num, block, SUM(bytes_up), SUM(bytes_down) FROM traffic "
            "WHERE round_num > ? GROUP BY round_num, block",
            since,
        )
        found, versions = dict[int, dict[str, Any]](), dict[str, int]()
        for round_num in round_nums:
            while steps and steps[-1][0] <= round_num:
                _, block, version = steps.pop()
                versions[block] = max(version, versions.get(block, 0))
            asked = Counter[str]()
            for names, num_tasks in tasks[round_num]:
                asked.update(dict.fromkeys(json.loads(names), num_tasks))
            num_bytes = {block: (up, down) for block, up, down in traffic[round_num]}
            found[round_num] = {}
            for block in sorted(versions):
                up, down = num_bytes.get(block, (0, 0))
                found[round_num][block] = {
                    "version": versions[block],
                    "num_asked": asked[block],
                    **_contributed([row for name, *row in updates[round_num] if name == block]),
                    "bytes_up": up,
                    "bytes_down": down,
                }
        return found


def _contributed(updates: list[Any]) -> dict[str, Any]:
    """Of a block's updates in a round: device, num_examples, version (0: dropped) and norm."""
    return {
        "holders": sorted({device for device, _, version, _ in updates if version}),
        "num_examples": sum(n for _, n, version, _ in updates if version),
        "num_dropped": sum(not version for _, _, version, _ in updates),
        "outliers": _outliers([(device, norm) for device, *_, norm in updates]),
    }


def _outliers(norms: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """The updates that are much longer than the median one."""
    median = statistics.median(norm for _, norm in norms) if norms else 0.0
    return [
        {"device": device, "norm": norm, "median_norm": median}
        for device, norm in norms
        if norm > OUTLIER_RATIO * median
    ]
