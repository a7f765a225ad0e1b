"""Who may use which topics: the one place with the topic strings of the access rules.

A device is known by its MQTT username, never by its client id, which anybody may choose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LEVEL = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True, slots=True)
class Grants:
    """Topic filters that one login may publish to, and subscribe to or receive from."""

    publish: tuple[str, ...]
    receive: tuple[str, ...]


def device_grants(federation: str, device: str) -> Grants:
    """Return the grants of one device.

    Raises:
        ValueError: A name is no plain topic level, and could widen the grant.
    """
    fed, dev = f"fl/v1/{topic_level(federation)}", topic_level(device)
    return Grants(
        publish=(f"{fed}/blocks/+/up/{dev}", f"{fed}/req/{dev}", f"{fed}/dev/{dev}/status"),
        receive=(f"{fed}/down/{dev}/+", f"{fed}/blocks/+/meta"),
    )


def server_grants(*federations: str) -> Grants:
    """Return the grants of the server itself: all of its federations."""
    everything = tuple(f"fl/v1/{topic_level(federation)}/#" for federation in federations)
    return Grants(publish=everything, receive=everything)


def topic_level(name: str) -> str:
    """Return ``name`` unchanged if it is one plain topic level, else raise ValueError."""
    if not _LEVEL.fullmatch(name):
        raise ValueError(f"found the name {name!r}; expected 1-128 of A-Z a-z 0-9 . _ -")
    return name


def covers(granted: str, requested: str) -> bool:
    """Whether every topic that ``requested`` matches is matched by ``granted`` too.

    ``requested`` is a topic or a filter.

    >>> covers("down/a/+", "down/a/task"), covers("down/a/+", "down/a/+")
    (True, True)
    >>> covers("down/a/+", "down/a/#"), covers("down/a/+", "down/+/task")
    (False, False)
    """
    allowed, asked = granted.split("/"), requested.split("/")
    if allowed[-1] == "#":
        allowed = allowed[:-1]
        asked, tail = asked[: len(allowed)], asked[len(allowed) :]
        if not tail:  # MQTT: "a/#" matches "a" itself, which nobody here needs
            return False
    return len(allowed) == len(asked) and all(
        own == wanted or (own == "+" and wanted != "#")
        for own, wanted in zip(allowed, asked, strict=True)
    )
