"""A port of 127.0.0.1 at which nobody answers, and the threads that wait for one."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deaf:
    """Connects get through and hear nothing, or do not even get through."""

    accepts: bool
    listener: socket.socket

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody connects, or has connected."""
        if not self.accepts:
            return bool(threads_aside())
        return bool(select.select([self.listener], [], [], 0)[0])

    def wait_for_the_end(self) -> None:
        """Until whoever has connected hangs up."""
        connection, _ = self.listener.accept()
        with connection, contextlib.suppress(ConnectionResetError):
            connection.settimeout(30)
            while connection.recv(4096):
                pass


@contextlib.contextmanager
def deaf_listener(*, accepts: bool) -> Iterator[Deaf]:
    """At the end whoever waits there is refused."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(16 if accepts else 0)
        for _ in range(0 if accepts else 8):  # its queue is full: the kernel drops what comes
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield Deaf(accepts, listener)


def threads_aside() -> list[threading.Thread]:
    """Of `petalfl.threads.run_aside`."""
    return [thread for thread in threading.enumerate() if thread.name == "petalfl aside"]
