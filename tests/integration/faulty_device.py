"""The accelerometer's device as a process of its own, slowed down, that says what it is doing.

    python -m tests.integration.faulty_device '{"url": …, "token": …, "store": …}'

It prints a line for every step of its round: ``download``, ``training``, ``store``, ``upload`` and
``receipt``; ``round N``, and ``fine-tuning`` after the last; ``writing`` and ``kept`` with a digest
of the private blocks, around every write of them; ``error`` with what the app is told; and ``wait``
where it is held up.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import petalfl.participation
import petalfl.uplink
from petalfl import EdgeClient, ExampleStore, PetalError, RoundInfo, wire
from petalfl.downlink import Downlink
from petalfl.http import HttpClient
from petalfl.mqtt import MqttTransport
from petalfl.store import DeviceStore, State
from petalfl.uplink import Uplink
from petalfl.ways import Session
from tests.integration.harness import ROOT

HANG_S = 180.0
NUM_EXAMPLES = 24
BACKOFF_S = (0.05, 0.2)


@dataclass(frozen=True, slots=True)
class Setup:
    """What the process is told.

    Attributes:
        pause_s: How much longer each step takes.
        hold_at: Where it waits: before a message, ``Chunk 3`` for instance; by ``round 2``,
            between a round's blocks and its training; or, by ``training``, in the first batch of
            every round ...
        until: ... for this file to be there; of ``training`` for that and the round's number.
        kill_amid: A phase, how many steps of it, and after how many seconds more it is killed: by
            itself, as a test that reads what it says may be late by many steps.
        receipt_timeout_s: As `petalfl.uplink.RECEIPT_TIMEOUT_S`.
        examples: A folder of an `ExampleStore` to train on, filled if it is empty; "": of arrays.
        max_age_s: Of that store.
        is_quick: Whether it tries again sooner than by default.
        mqtt_port: Where it finds the broker; 0: where the server says.
    """

    url: str
    token: str
    store: str
    device: str = "acc-only"
    pause_s: float = 0.0
    hold_at: str = ""
    until: str = ""
    kill_amid: tuple[str, int, float] | None = None
    receipt_timeout_s: float = 1.0
    examples: str = ""
    max_age_s: float | None = None
    is_quick: bool = True
    mqtt_port: int = 0


@contextmanager
def faulty_device(
    url: str, token: str, store: Path, **more: Any
) -> Iterator[subprocess.Popen[str]]:
    """Starts the process; it is killed at the end, or when it hangs.

    Args:
        more: Fields of `Setup`, ``environment`` of the process, and a command ``within`` which it
            is run.
    """
    environment, within = {**os.environ, **more.pop("environment", {})}, more.pop("within", ())
    setup = json.dumps(asdict(Setup(url, token, str(store), **more)))
    command = [*within, sys.executable, "-m", "tests.integration.faulty_device", setup]
    with (
        store.with_suffix(".log").open("ab") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
        ) as process,
    ):
        watchdog = threading.Timer(HANG_S, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    """What it says, until its end."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line.strip()


def read_until(process: subprocess.Popen[str], start: str) -> str:
    """Waits for something that begins so, and returns it."""
    said = []
    for line in lines_of(process):
        said.append(line)
        if line.startswith(start):
            return line
    raise AssertionError(f"it never said {start!r}, but {said[-20:]}")


def read_to_the_end(process: subprocess.Popen[str]) -> list[str]:
    """All that is left to say of one that ends in peace."""
    said = [*lines_of(process)]
    assert process.wait() == 0, said[-20:]
    return said


def main(setup: Setup) -> None:
    """Takes part until the federation's end."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # ONNX Runtime would import it, in 2 s
    if setup.is_quick:
        be_quick(setup.receipt_timeout_s)
    tell_steps(setup.pause_s)
    if setup.hold_at:
        hold_up(setup.hold_at, Path(setup.until))
    if setup.kill_amid is not None:
        kill_amid(*setup.kill_amid)
    round_num = 0

    def begin(info: RoundInfo) -> None:
        nonlocal round_num
        round_num = info.round_num
        line = "fine-tuning" if info.is_fine_tuning else f"round {info.round_num}"
        say(line)
        if line == setup.hold_at:
            wait_for(Path(setup.until))

    def train(done: int, total: int) -> None:
        step("training", setup.pause_s)
        if done == 1 and setup.hold_at == "training":
            wait_for(Path(f"{setup.until}{round_num}"))

    if setup.mqtt_port:
        Downlink.get_session = lambda self: Session(  # type: ignore[method-assign]
            "127.0.0.1", setup.mqtt_port, mqtt_is_tls=False
        )
    rng = np.random.default_rng(7)
    data: Any = {"acc": rng.standard_normal((NUM_EXAMPLES, 3, 100), dtype=np.float32)}
    labels: Any = np.arange(NUM_EXAMPLES) % 7
    if setup.examples:
        examples = ExampleStore(setup.examples, max_age_s=setup.max_age_s)
        if not examples.num_labeled:
            for window, label in zip(data["acc"], labels, strict=True):
                examples.append({"acc": window}, int(label))
        data, labels = examples, None
    client = EdgeClient(
        setup.url,
        token=setup.token,
        data=data,
        labels=labels,
        store=setup.store,
        device=setup.device,
        on_round=begin,
        on_metrics=lambda metrics: say(f"examples {metrics.num_examples}"),
        on_progress=train,
        on_error=tell_error,
    )
    with client:
        client.run()


LISTENERS: list[Callable[[str], None]] = []  # to what it says, on the thread that does


def say(line: str) -> None:
    """In one piece, whatever thread it comes from."""
    os.write(1, f"{line}\n".encode())
    for listen in LISTENERS:
        listen(line)


def step(phase: str, pause_s: float) -> None:
    say(phase)
    time.sleep(pause_s)


def tell_error(error: PetalError) -> None:
    say(f"error {type(error).__name__}: {error}")


def digest(state: State) -> str:
    """Of the private blocks, bit for bit."""
    private = sorted(state.private.items())
    return hashlib.sha256(b"".join(name.encode() + data for name, data in private)).hexdigest()


def be_quick(receipt_timeout_s: float) -> None:
    """Asks again soon."""
    for name, module in list(sys.modules.items()):
        if name.startswith("petalfl.") and hasattr(module, "BACKOFF_S"):
            vars(module)["BACKOFF_S"] = BACKOFF_S
    petalfl.uplink.RECEIPT_TIMEOUT_S = receipt_timeout_s


def tell_steps(pause_s: float) -> None:
    """Says what is being done before it is, and makes it take longer."""

    def announced(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **more: Any) -> Any:
            step(phase, pause_s)
            return function(*arguments, **more)

        return call

    write_state, publish = DeviceStore.write_state, MqttTransport.publish

    def write(self: DeviceStore, state: State) -> None:
        say(f"writing {digest(state)}")
        write_state(self, state)
        say(f"kept {digest(state)}")

    async def publish_slowly(self: MqttTransport, *arguments: Any, **more: Any) -> None:
        if isinstance(wire.decode(arguments[1]), (wire.Ready, wire.Status)):
            await publish(self, *arguments, **more)
            return
        say("upload")
        await asyncio.sleep(pause_s)
        await publish(self, *arguments, **more)

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (HttpClient, "_open", announced("download", HttpClient._open)),
        (DeviceStore, "write_state", write),
        (os, "fsync", announced("store", os.fsync)),
        (os, "replace", announced("store", os.replace)),
        (MqttTransport, "publish", publish_slowly),
        (Uplink, "receive", announced("receipt", Uplink.receive)),
    ]
    for owner, name, function in patches:
        setattr(owner, name, function)


def kill_amid(phase: str, number: int, after_s: float) -> None:
    """Ends as by kill -9, so long after that many steps of a phase have begun."""

    def count(line: str) -> None:
        nonlocal number
        if line == phase:
            number -= 1
            if number == 0:
                threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    LISTENERS.append(count)


def wait_for(file: Path) -> None:
    say("wait")
    while not file.exists():
        time.sleep(0.01)


def hold_up(point: str, until: Path) -> None:
    """Waits before a message goes out, the first time, until a file is there."""
    kind, _, number = point.partition(" ")
    publish = MqttTransport.publish
    seen = 0

    async def publish_later(
        self: MqttTransport, topic: str, payload: bytes, *, retain: bool = False
    ) -> None:
        nonlocal seen
        if type(wire.decode(payload)).__name__ == kind:
            seen += 1
            if seen == int(number):
                await asyncio.to_thread(wait_for, until)
        await publish(self, topic, payload, retain=retain)

    MqttTransport.publish = publish_later  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Setup(**json.loads(sys.argv[1])))
