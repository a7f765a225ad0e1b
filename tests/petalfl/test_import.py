"""What `import petalfl` costs the app around it: nothing heavy before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import petalfl

HEAVY = ("onnxruntime", "torch", "aiohttp", "scipy")

SCRIPT = """
import json, sys
exec(sys.argv[1])
print(json.dumps([name for name in json.loads(sys.argv[2]) if name in sys.modules]))
"""


def loaded_by(statement: str, *names: str) -> set[str]:
    """Which of these modules a fresh interpreter has after it."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, statement, json.dumps(names)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(json.loads(result.stdout))


def test_the_package_alone() -> None:
    found = loaded_by("import petalfl; petalfl.PetalError", "petalfl", "numpy", "asyncio", *HEAVY)
    assert found == {"petalfl"}


@pytest.mark.parametrize(
    "statement", ["from petalfl import EdgeClient", "import petalfl; petalfl.RoundInfo"]
)
def test_the_client(statement: str) -> None:
    found = loaded_by(statement, "petalfl.client", "numpy", "asyncio", *HEAVY)
    assert found == {"petalfl.client", "numpy", "asyncio"}


def test_it_is_seen_what_is_loaded() -> None:
    """Or the tests above could not fail."""
    assert loaded_by("import onnxruntime", "onnxruntime", "petalfl") == {"onnxruntime"}


def test_every_public_name_is_there() -> None:
    script = "from petalfl import *; import petalfl; assert set(petalfl.__all__) <= set(globals())"
    assert loaded_by(script, "petalfl.client") == {"petalfl.client"}
    assert all(getattr(petalfl, name).__module__.startswith("petalfl.") for name in petalfl.__all__)


def test_no_other_name_is_there() -> None:
    with pytest.raises(AttributeError, match="module 'petalfl' has no attribute 'EdgeServer'"):
        petalfl.EdgeServer  # type: ignore[attr-defined]  # noqa: B018
