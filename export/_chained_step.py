"""Chained steps in a process of their own, so that a kernel that crashes is a refusal.

Run as a script by `law`: ARTIFACTS BATCHES.npz GRADIENTS.npz. Prints each block before it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petalfl.engine import Arrays, Gradients, OrtTrainingEngine
from petalfl.model import Block, ModelManifest, read_artifact
from petalfl.training import predict_logits, step_gradients
from petalfl.vectors import Vector, from_bytes


class _AnnouncingEngine(OrtTrainingEngine):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.outputs: dict[str, NDArray[np.float32]] = {}  # of each block's last forward pass

    def forward(self, block: Block, parameters: Vector, inputs: Arrays) -> NDArray[np.float32]:
        print(block.name, flush=True)
        self.outputs[block.name] = super().forward(block, parameters, inputs)
        return self.outputs[block.name]

    def backward(self, block: Block, parameters: Vector, inputs: Arrays) -> Gradients:
        print(block.name, flush=True)
        return super().backward(block, parameters, inputs)


def main(folder: Path, batches: Path, gradients: Path) -> None:
    """Writes, per batch ``i``, ``i|loss``, ``i|<block>`` (its gradient) and ``i|<block>|output``.

    Loss and gradients are of a training step, outputs of an evaluation pass.
    """
    manifest = ModelManifest.load(folder)
    engine = _AnnouncingEngine(folder)
    results: dict[str, Any] = {}
    for number, batch in _read(batches).items():
        held = manifest.blocks_for(batch["inputs"])
        parameters = {
            b.name: from_bytes(read_artifact(folder, b.artifacts.parameters), b.size) for b in held
        }
        loss, by_block = step_gradients(
            engine, manifest, parameters, batch["inputs"], batch["labels"], batch["masks"]
        )
        results[f"{number}|loss"] = np.float64(loss)
        results |= {f"{number}|{name}": vector for name, vector in by_block.items()}
        predict_logits(engine, manifest, parameters, batch["inputs"])
        results |= {f"{number}|{b.name}|output": engine.outputs[b.name] for b in held}
    np.savez(gradients, **results)


def _read(path: Path) -> dict[str, Any]:
    batches: dict[str, Any] = {}
    with np.load(path) as file:
        for key in file.files:
            number, kind, *names = key.split("|")
            batch = batches.setdefault(number, {"inputs": {}, "masks": {}})
            if kind == "labels":
                batch["labels"] = file[key]
            elif kind == "inputs":
                batch["inputs"][names[0]] = file[key]
            else:
                batch["masks"].setdefault(names[0], {})[names[1]] = file[key]
    return batches


if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # onnxruntime would import it: 2 s
    main(*map(Path, sys.argv[1:]))
