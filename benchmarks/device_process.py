"""One device as a process of its own, which `benchmarks.bench_device` looks at from outside.

`python -m benchmarks.device_process URL TOKEN NAME FOLDER` trains on ``FOLDER/NAME.npz``, which
holds an array for each modality and ``labels``, and keeps its store in ``FOLDER/NAME``. It prints
``round N`` before each training and ``done``, and then stays until its input ends, so that its
peak can be read.

Without arguments it prints as JSON what is installed. It imports no more than a device has.
"""

from __future__ import annotations

import json
import platform
import re
import sys
from pathlib import Path

import numpy as np

import petalfl
from petalfl import EdgeClient, RoundInfo

DEPENDENCIES = ("numpy", "msgpack", "paho-mqtt")


def main(url: str, token: str, name: str, folder: Path) -> None:
    """Takes part until the federation's last round."""
    with np.load(folder / f"{name}.npz") as file:
        data = dict(file)
    labels = data.pop("labels")
    with EdgeClient(
        url, token=token, data=data, labels=labels, store=folder / name, device=name,
        on_round=_note_round,
    ) as client:  # fmt: skip
        client.run()
        print("done", flush=True)
        sys.stdin.read()


def _note_round(info: RoundInfo) -> None:
    print("round", info.round_num, flush=True)


def describe() -> dict[str, object]:
    """The runtime, and the bytes of what is installed for petalfl, compiled Python not counted."""
    from petalfl.runtime import find_runtime

    runtime = find_runtime()
    for_petalfl, for_runtime = (_installed(names) for names in (DEPENDENCIES, (runtime.package,)))
    sources = Path(petalfl.__path__[0]).rglob("*.py")
    return {
        "runtime": str(runtime),
        "python": platform.python_version(),
        "petalfl_bytes": sum(path.stat().st_size for path in sources),
        "dependencies_bytes": sum(for_petalfl.values()),
        "runtime_bytes": for_runtime[runtime.package],
        "more_bytes": sum(
            size
            for name, size in for_runtime.items()
            if name not in for_petalfl and name != runtime.package
        ),
    }


def _installed(names: tuple[str, ...]) -> dict[str, int]:
    """The bytes of these distributions and of all that they require."""
    from importlib.metadata import PackageNotFoundError, distribution

    sizes: dict[str, int] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # required on another platform
        paths = [Path(str(file.locate())) for file in found.files or () if file.suffix != ".pyc"]
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file())
        required = [r for r in found.requires or () if "extra ==" not in r]
        matches = [re.match(r"[\w.-]+", requirement) for requirement in required]
        waiting += [match[0] for match in matches if match and match[0] not in sizes]
    return sizes


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # onnxruntime imports it if it can
    if sys.argv[1:]:
        main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        print(json.dumps(describe()))
