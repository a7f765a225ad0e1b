"""What a device must never load, because the SDK is embedded in other people's apps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FORBIDDEN = ("torch", "onnx", "aiohttp", "amqtt", "server", "export", "examples")

SCRIPT = """
import importlib, json, pkgutil, sys
forbidden = json.loads(sys.argv[1])
loaded = {}
def load(name):
    importlib.import_module(name)
    loaded[name] = [f for f in forbidden if f in sys.modules]
load("petalfl")
import petalfl
for module in pkgutil.walk_packages(petalfl.__path__, "petalfl."):
    load(module.name)
print(json.dumps(loaded))
"""


def test_petalfl_loads_nothing_that_a_device_lacks() -> None:
    root = Path(__file__).parents[2]  # where server and export could be found
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(FORBIDDEN)],
        cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = json.loads(result.stdout)
    sources = root / "sdk"
    files = [path.relative_to(sources).with_suffix("") for path in sources.glob("petalfl/**/*.py")]
    assert loaded.keys() == {".".join(file.parts).removesuffix(".__init__") for file in files}
    assert loaded == {name: [] for name in loaded}
