"""docs/messages.json: the golden messages for clients in other languages.

`python -m tests.contract.messages` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack

from tests.contract.test_golden import GOLDEN

PAGE = Path(__file__).parents[2] / "docs" / "messages.json"


def written() -> list[dict[str, Any]]:
    """Each message's bytes as hex, and the map that they hold; bin as ``{"bin": hex}``."""
    return [
        {"name": name, "hex": bytes.fromhex(text).hex(), "fields": _shown(bytes.fromhex(text))}
        for name, (_, text) in GOLDEN.items()
    ]


def _shown(message: bytes) -> Any:
    fields = msgpack.unpackb(message)
    return {
        key: {"bin": value.hex()} if isinstance(value, bytes) else value
        for key, value in fields.items()
    }


if __name__ == "__main__":
    PAGE.write_text(json.dumps(written(), indent=1) + "\n")
