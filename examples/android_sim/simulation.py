"""Runs emulated devices, each the real `EdgeClient`, until the federation's last round."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from petalfl import EdgeClient, RoundInfo

from .data import DeviceData, Windows
from .history import RunFolder
from .server_process import ServerAddress


class Interrupted(Exception):  # noqa: N818 - the user's wish, no error
    """Ctrl-C; what was trained is kept."""


@dataclass(frozen=True, slots=True)
class Device:
    """An emulated device: a wrist's data, seen through the sensors that this device has."""

    data: DeviceData
    modalities: tuple[str, ...]

    @property
    def name(self) -> str:
        """As the server knows it."""
        return self.data.name

    def inputs(self, windows: Windows) -> dict[str, NDArray[np.float32]]:
        """The windows' inputs of this device's modalities."""
        return {name: windows.inputs[name] for name in self.modalities}


class Simulation:
    """Devices on one event loop; their training shares one pool of threads.

    Args:
        on_round: Told, on a training thread, each time a device is about to train or fine-tune.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        server: ServerAddress,
        folder: RunFolder,
        num_threads: int,
        on_round: Callable[[Device, RoundInfo], None],
    ) -> None:
        self._devices = devices
        self._folder = folder
        self._on_round = on_round
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="train")
        self._stack = contextlib.ExitStack()
        self._clients = {
            device.name: self._stack.enter_context(self._client(device, server))
            for device in devices
        }

    async def run(self) -> dict[str, dict[str, float]]:
        """The personalized models' metrics by device, after the last round and the fine-tuning.

        Raises:
            PetalError: What the first failing device raised.
            Interrupted: Ctrl-C.
        """
        loop = asyncio.get_running_loop()
        interrupted = asyncio.Event()
        for sign in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sign, interrupted.set)
        work = [asyncio.create_task(client.arun()) for client in self._clients.values()]
        waiter = asyncio.create_task(interrupted.wait())
        try:
            await _first_failure_or_all(work, waiter)
        finally:
            for client in self._clients.values():
                client.stop()
            waiter.cancel()
            results = await asyncio.gather(*work, return_exceptions=True)
        if interrupted.is_set():
            raise Interrupted
        if failure := next((r for r in results if isinstance(r, BaseException)), None):
            raise failure
        return {device.name: self._evaluate(device) for device in self._devices}

    def close(self) -> None:
        """Ends the threads and closes the stores."""
        self._pool.shutdown()
        self._stack.close()

    def _client(self, device: Device, server: ServerAddress) -> EdgeClient:
        def evaluate_and_tell(info: RoundInfo) -> None:
            trained = info.round_num if info.is_fine_tuning else info.round_num - 1
            self._folder.record(device.name, trained, self._evaluate(device))
            self._on_round(device, info)

        return EdgeClient(
            server.url,
            token=server.token,
            data=device.inputs(device.data.train),
            labels=device.data.train.labels,
            store=self._folder.path / "devices" / device.name,
            device=device.name,
            on_round=evaluate_and_tell,
            executor=self._pool,
        )

    def _evaluate(self, device: Device) -> dict[str, float]:
        test = device.data.test
        return self._clients[device.name].evaluate(device.inputs(test), test.labels)


def default_num_threads() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0))


async def _first_failure_or_all(
    work: Sequence[asyncio.Task[None]], waiter: asyncio.Task[bool]
) -> None:
    pending: set[asyncio.Task[None] | asyncio.Task[bool]] = {*work, waiter}
    while pending - {waiter} and not waiter.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if any(not t.cancelled() and t.exception() is not None for t in done):
            return
