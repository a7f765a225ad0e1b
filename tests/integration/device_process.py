"""The accelerometer's device as a process of its own, to be killed where a test wants it.

Prints ``round N`` before each training and ``here`` at the point where it is to hang.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from petalfl import EdgeClient, RoundInfo, wire
from petalfl.mqtt import MqttTransport
from petalfl.store import Outgoing
from petalfl.uplink import Uplink
from tests.integration.harness import three_devices


def main(url: str, token: str, store: str, point: str) -> None:
    device = three_devices()[0]
    hang_at(point)
    client = EdgeClient(
        url,
        token=token,
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


def hang_in_training(done: int, total: int) -> None:
    print("here", flush=True)
    time.sleep(0.3)


def hang_at(point: str) -> None:
    """Points: the message type and number at which it hangs, or ``noted``: the last receipt."""
    kind, _, number = point.partition(" ")
    publish, deliver = MqttTransport.publish, Uplink.deliver
    seen = 0

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

    async def deliver_until(self: Uplink, outgoing: Outgoing) -> wire.Receipt:
        receipt = await deliver(self, outgoing)
        if kind == "noted" and not outgoing.payload:
            print("here", flush=True)
            time.sleep(3600)  # the whole loop: the next task would end the delivery
        return receipt

    MqttTransport.publish = publish_until  # type: ignore[method-assign]
    Uplink.deliver = deliver_until  # type: ignore[method-assign]


if __name__ == "__main__":
    main(*sys.argv[1:])
