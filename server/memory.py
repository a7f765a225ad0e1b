"""What the allocator does with memory that is freed: keep it for the next update."""

from __future__ import annotations

import ctypes

KEPT_BYTES = 128 << 20
LARGEST_BYTES = 32 << 20  # the most that glibc accepts
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Lets arrays of up to 32 MiB reuse one another's pages; whether the C library is glibc.

    By default glibc gives the pages of every large array back to the kernel, which clears them
    again for the next: a sixth of the server's time under load.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all((mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES), mallopt(_M_MMAP_THRESHOLD, LARGEST_BYTES)))
