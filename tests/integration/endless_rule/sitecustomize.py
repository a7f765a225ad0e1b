"""Aggregations that never end, of servers that find this on PYTHONPATH and that variable.

On a thread of a pool, which Python waits for at its end, as those of the robust rules are.
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if sys.orig_argv[1:3] == ["-m", "server"] and "PETALFL_TEST_RULE" in os.environ:
    from server.buffers import Buffer

    def never(self: Buffer) -> None:
        Path(os.environ["PETALFL_TEST_RULE"]).touch()
        while True:
            time.sleep(0.01)

    def result(self: Buffer) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(never, self).result()

    Buffer.result = result  # type: ignore[method-assign,assignment]
