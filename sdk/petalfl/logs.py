"""Logs that somebody else cannot fill."""

from __future__ import annotations

import logging
from collections import Counter


class RareLog:
    """Logs the first, second, fourth, eighth … warning of a kind.

    Args:
        log: Where.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._counts: Counter[str] = Counter()

    def warning(self, message: str, *arguments: object) -> None:
        """As `logging.Logger.warning`; warnings of one format are of one kind."""
        self._counts[message] += 1
        if (count := self._counts[message]) & (count - 1) == 0:
            self._log.warning(message, *arguments)
