"""The one error tree of petalfl.

    PetalError
    ├── ModelError        a manifest or artifact that cannot be used
    ├── DataError         arrays of the wrong shape, dtype or values
    ├── WireError         bytes that are no valid message
    ├── EnrollError       the server refused this device
    ├── StoreError        the device store is locked, foreign or damaged
    └── TransportError    a broker or server that cannot be reached

Programmer errors are `ValueError`. Every message says what was found and what was expected.
"""

from __future__ import annotations


class PetalError(Exception):
    """Anything that petalfl raises on purpose about its surroundings."""


class ModelError(PetalError):
    """A manifest or an artifact that cannot be used as it is."""


class DataError(PetalError):
    """Arrays whose shape, dtype or values do not fit the model."""


class WireError(PetalError):
    """Bytes from the network that are no valid message."""


class EnrollError(PetalError):
    """The server refused to enroll or to recognize this device."""


class StoreError(PetalError):
    """The device store is locked by another process, foreign or damaged."""


class TransportError(PetalError):
    """A broker or an HTTP server that cannot be reached or hung up."""


def printable(text: str) -> str:
    """What somebody else has said, in one line and without control characters: fit for a log."""
    return "".join(c if c.isprintable() else " " for c in text).strip()
