"""MQTT topics of a federation. Names are checked, so no topic can climb or hold a wildcard."""

from __future__ import annotations

import re

from petalfl.schema import NAME_REGEX


def block_meta(federation: str, block: str) -> str:
    """Retained: the newest `BlockVersion` of a shared block."""
    return f"fl/v1/{_checked(federation)}/blocks/{_checked(block)}/meta"


def block_up(federation: str, block: str, device: str) -> str:
    """A device's updates of one block."""
    return f"fl/v1/{_checked(federation)}/blocks/{_checked(block)}/up/{_checked(device)}"


def tasks(federation: str, device: str) -> str:
    """The server's `Task` and `Finish` to one device."""
    return f"fl/v1/{_checked(federation)}/down/{_checked(device)}/task"


def acks(federation: str, device: str) -> str:
    """The server's receipts to one device."""
    return f"fl/v1/{_checked(federation)}/down/{_checked(device)}/ack"


def files(federation: str, device: str) -> str:
    """The server's `Part`s and `Declined` to one device that fetches files over MQTT."""
    return f"fl/v1/{_checked(federation)}/down/{_checked(device)}/file"


def all_down(federation: str, device: str) -> str:
    """Filter: what a device subscribes to."""
    return f"fl/v1/{_checked(federation)}/down/{_checked(device)}/+"


def request(federation: str, device: str) -> str:
    """A device's `Ready`, retained for a restarted server, `Report`, `Excuse` and `Fetch`."""
    return f"fl/v1/{_checked(federation)}/req/{_checked(device)}"


def status(federation: str, device: str) -> str:
    """Retained: a device's birth, or its last will."""
    return f"fl/v1/{_checked(federation)}/dev/{_checked(device)}/status"


def from_devices(federation: str) -> tuple[str, str, str]:
    """Filters: what the server subscribes to, in this order.

    Status comes first: after a restart of the server, a retained `Ready` counts only when its
    device is not known to be offline.
    """
    root = f"fl/v1/{_checked(federation)}"
    return f"{root}/dev/+/status", f"{root}/req/+", f"{root}/blocks/+/up/+"


def _checked(name: str) -> str:
    if not re.fullmatch(NAME_REGEX, name):
        raise ValueError(f"{name[:70]!r} is no name: expected 1 to 64 of a-z, 0-9 and '-'")
    return name
