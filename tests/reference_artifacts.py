"""The artifacts that tests share, exported once; where torch is absent, they come ready made.

    python -m tests.reference_artifacts FOLDER MODEL…

writes them for the tests of an environment without torch (`make test-stock`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

MODELS = {
    "watch": "export.models.har:watch",
    "small": "tests.export.tiny:small",
    "wider": "tests.export.tiny:wider",
    "personal": "tests.export.tiny:personal",
    "several": "tests.petalfl.torch_models:several",
}


def export_to(folder: Path, name: str) -> Path:
    """Exports one of `MODELS` into a folder of its name."""
    from export import export_model

    module, _, build = MODELS[name].partition(":")
    export_model(getattr(import_module(module), build)(), folder / name)
    return folder / name


if __name__ == "__main__":
    for chosen in sys.argv[2:]:
        export_to(Path(sys.argv[1]), chosen)
