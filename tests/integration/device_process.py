"""The accelerometer's device as a process of its own, to be killed where a test wants it.

Prints ``round N`` before each training and ``here`` at the point where it is to hang.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

from petalfl import EdgeClient, RoundInfo, wire
from petalfl.mqtt import MqttTransport
from petalfl.partials import Partial
from petalfl.store import Outgoing
from petalfl.uplink import Uplink
from tests.integration.harness import three_devices


def main(url: str, token: str, store: str, point: str) -> None:
    """``token`` is the file of an identity where the URL is a broker's."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # ONNX Runtime would import it, in 2 s
    # Also where the tests run in the background of a shell, which has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    device = three_devices()[0]
    hang_at(point)
    who: dict[str, Any] = {"identity": token} if url.startswith("mqtt") else {"token": token}

    def hang_in_training(done: int, total: int) -> None:
        print("here", flush=True)
        while not client._pacing.is_stopping:
            time.sleep(0.01)

    client = EdgeClient(
        url,
        **who,
        data=device.data,
        labels=device.labels,
        store=Path(store),
        device=device.name,
        on_round=note_round,
        on_progress=hang_in_training if point == "training" else lambda done, total: None,
    )
    client.run()


def note_round(info: RoundInfo) -> None:
    print("round", info.round_num, flush=True)


def hang_at(point: str) -> None:
    """Points: the message type and number at which it hangs, ``noted``: the last receipt, or
    ``block`` and the number of bytes that have come of one. In `main`, ``training``: each batch,
    until the client is told to stop.
    """
    kind, _, number = point.partition(" ")
    publish, deliver, receive = MqttTransport.publish, Uplink.deliver, Uplink.receive
    write = Partial.write
    seen, last = 0, b""

    async def publish_until(
        self: MqttTransport, topic: str, payload: bytes, *, retain: bool = False
    ) -> None:
        nonlocal seen
        if type(wire.decode(payload)).__name__ == kind:
            seen += 1
            if seen == int(number):
                print("here", flush=True)
                await asyncio.sleep(3600)
        await publish(self, topic, payload, retain=retain)

    async def note_last(self: Uplink, outgoing: Outgoing, *more: Any) -> wire.Receipt:
        nonlocal last
        message = wire.decode(outgoing.message)
        last = message.update_id if isinstance(message, wire.Report) else last
        return await deliver(self, outgoing, *more)

    def receive_until(self: Uplink, receipt: wire.Receipt) -> None:
        if kind == "noted" and receipt.update_id == last:
            print("here", flush=True)
            time.sleep(3600)  # the whole loop: the next task, which comes with it, would go ahead
        receive(self, receipt)

    def write_until(self: Partial, offset: int, data: bytes) -> None:
        write(self, offset, data)
        if kind == "block" and "blocks" in self.path.parts and self.num_bytes >= int(number):
            print("here", flush=True)
            time.sleep(3600)

    Partial.write = write_until  # type: ignore[method-assign]
    MqttTransport.publish = publish_until  # type: ignore[method-assign]
    Uplink.deliver = note_last  # type: ignore[method-assign,assignment]
    Uplink.receive = receive_until  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:])
