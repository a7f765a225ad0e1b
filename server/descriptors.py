"""File descriptors: as many as the system allows, and some that stay free for connections."""

from __future__ import annotations

import errno
import logging
import mmap
import resource
import sys
from pathlib import Path

log = logging.getLogger("petalfl.server")

RESERVE = 128  # that no mapped file takes: connections, SQLite and the next version want theirs
ENOUGH = 1 << 16  # where the system would allow any number


def raise_limit() -> int:
    """Lets this process, and those it starts, open as many files as it may; how many.

    The usual limit of 1,024 is one that a process may raise: devices of the embedded broker have
    a connection each, and updates that wait for their block's step have mapped files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        log.info("up to %d files and connections may be open, instead of %d", most, soft)
        return most
    return soft


def map_to_read(descriptor: int) -> mmap.mmap:
    """The whole file, mapped for reading; ``descriptor`` may be closed then.

    Before Python 3.13, a map has a descriptor of its own for as long as it is in use.

    Raises:
        OSError: It cannot be mapped, or fewer than `RESERVE` descriptors would be left.
    """
    if sys.version_info >= (3, 13):
        return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ, trackfd=False)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and (num_used := num_open()) >= limit - RESERVE:
        why = f"{num_used} of {limit} file descriptors are in use, {RESERVE} are for connections"
        raise OSError(errno.EMFILE, why)
    return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)


def num_open() -> int:
    """Of this process, with one that this takes."""
    return sum(1 for _ in Path("/dev/fd").iterdir())
