"""A whole device as a process, of any environment that has petalfl: no torch, no server.

Prints as a line of JSON its runtime and its accuracy on the test windows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from petalfl import EdgeClient
from petalfl.runtime import find_runtime


def main(url: str, token: str, name: str, folder: Path) -> None:
    """``folder/{name}.npz`` holds ``train.…`` and ``test.…`` by modality, and their labels."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # ONNX Runtime would import it, in 2 s
    with np.load(folder / f"{name}.npz") as file:
        arrays = dict(file)
    data, test_data = (
        {key.removeprefix(part): x for key, x in arrays.items() if key.startswith(part)}
        for part in ("train.", "test.")
    )
    client = EdgeClient(
        url, token=token, data=data, labels=arrays["labels"], store=folder / name, device=name
    )
    client.run()
    right = client.predict(test_data) == arrays["test_labels"]
    print(json.dumps({"engine": find_runtime().engine, "accuracy": float(np.mean(right))}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
