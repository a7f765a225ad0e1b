"""When a device may train: what the app, its user and its battery have to say about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

POLL_S = 5.0  # how often `should_train` is asked while it says no


class Stopped(Exception):  # noqa: N818 - no error: it ends training between two batches
    """Training was told to end."""


class Pacing:
    """Asked before and between batches; told from any thread.

    Args:
        should_train: False while the device should rest, for instance on battery.
    """

    def __init__(self, should_train: Callable[[], bool] = lambda: True) -> None:
        self._should_train = should_train
        self._changed = threading.Condition()
        self._is_stopping = self._is_paused = False
        self.rested_s = 0.0  # in `wait`, so far

    @property
    def is_paused(self) -> bool:
        """Between `pause` and `resume`."""
        return self._is_paused

    @property
    def is_stopping(self) -> bool:
        """Since `stop`."""
        return self._is_stopping

    def begin(self) -> None:
        """Forgets an earlier `stop`."""
        self._is_stopping = False

    def stop(self) -> None:
        """`wait` raises from now on, also where it is waiting; ends a pause."""
        with self._changed:
            self._is_stopping, self._is_paused = True, False
            self._changed.notify_all()

    def pause(self) -> None:
        """`wait` waits from now on."""
        self._is_paused = True

    def resume(self) -> None:
        """Ends a pause."""
        with self._changed:
            self._is_paused = False
            self._changed.notify_all()

    def check(self) -> None:
        """Lets work that a pause does not concern go on; raises as `wait`."""
        if self._is_stopping:
            raise Stopped

    def wait(self) -> None:
        """Returns as soon as training may go on.

        Raises:
            Stopped: It is to end.
        """
        while True:
            with self._changed:
                self._wait_for(lambda: self._is_stopping or not self._is_paused)
                if self._is_stopping:
                    raise Stopped
            if self._should_train():  # the app's own code: without the lock
                return
            with self._changed:
                self._wait_for(lambda: self._is_stopping or self._is_paused, POLL_S)

    def _wait_for(self, is_so: Callable[[], bool], timeout_s: float | None = None) -> None:
        if not is_so():
            begun_s = time.monotonic()
            self._changed.wait_for(is_so, timeout_s)
            self.rested_s += time.monotonic() - begun_s

    def rest(self, seconds: float) -> None:
        """Returns after so long.

        Raises:
            Stopped: It is to end.
        """
        with self._changed:
            if self._changed.wait_for(lambda: self._is_stopping, seconds):
                raise Stopped
