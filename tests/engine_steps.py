"""20 local steps on the ONNX Runtime of this environment, and the losses that they give.

Imports neither torch nor onnx, so that an environment that has the stock runtime alone can:

    python -m tests.engine_steps

says in a line of JSON which runtime it is, then reads a folder from every line and answers with
the losses. A folder holds a model's artifacts, or a layer from `tests.export.layer_steps`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petalfl.engine import OrtEngine
from petalfl.model import Artifact, ModelManifest
from petalfl.reference import Reference, take_steps
from petalfl.runtime import find_runtime
from petalfl.vectors import Vector

NUM_STEPS = 20

Values = dict[str, NDArray[Any]]
Graph = Callable[[Values], Values]


def losses_of(folder: Path) -> list[float]:
    """Of a model or a layer."""
    return model_losses(folder) if (folder / "manifest.json").exists() else layer_losses(folder)


def model_losses(folder: Path) -> list[float]:
    """The steps that the export has taken, too."""
    engine, manifest = OrtEngine(folder), ModelManifest.load(folder)
    return list(take_steps(engine, manifest, folder, Reference.load(folder)).losses)


# A layer: its graphs and the optimizer's, and the mean square error to a fixed target


def layer_losses(folder: Path) -> list[float]:
    """The losses of 20 steps of SGD with momentum, and the loss in evaluation after them.

    Besides the parameters, the steps move what of the inputs is float32, so that the loss depends
    on every gradient.
    """
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    engine = OrtEngine(folder)
    forward, backward, evaluation, sgd = (
        open_graph(engine, folder / f"{name}.onnx")
        for name in ("forward", "backward", "evaluation", "sgd")
    )
    inputs, targets = part(arrays, "input."), part(arrays, "target.")
    masks = {name: x for name, x in arrays.items() if name.startswith("mask.")}
    vector, end = arrays["parameters"], int(arrays["num_parameters"])
    moved = [name for name, x in inputs.items() if x.dtype == np.float32]
    velocities = {name: np.zeros_like(inputs[name]).ravel() for name in moved}
    velocities["parameters"] = np.zeros(end, np.float32)
    losses = []
    for step in range(NUM_STEPS):
        feed = {"parameters": vector, **inputs} | {name: m[step] for name, m in masks.items()}
        done = forward(feed)
        loss, upstream = square_error(done, targets)
        losses.append(loss)
        back = backward(feed | done | upstream)
        for name in moved:
            new, velocities[name] = descend(
                sgd, inputs[name].ravel(), back[f"d_{name}"].ravel(), velocities[name]
            )
            inputs[name] = new.reshape(inputs[name].shape)
        if end:
            new, velocities["parameters"] = descend(
                sgd, vector[:end], back["gradient"], velocities["parameters"]
            )
            vector = np.concatenate([new, (done | back).get("statistics", vector[end:])])
    evaluated = evaluation({"parameters": vector, **inputs})
    return [*losses, square_error(evaluated, targets)[0]]


def part(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Values:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def square_error(outputs: Values, targets: Values) -> tuple[float, Values]:
    """The mean over all entries of all outputs, and its gradients."""
    errors = {name: outputs[name] - target for name, target in targets.items()}
    size = sum(error.size for error in errors.values())
    loss = sum(float(np.square(error, dtype=np.float64).sum()) for error in errors.values()) / size
    factor = np.float32(2 / size)
    return loss, {f"d_{name}": factor * error for name, error in errors.items()}


def descend(sgd: Graph, x: Vector, gradient: Vector, velocity: Vector) -> tuple[Vector, Vector]:
    scalars = {
        "learning_rate": 0.01, "momentum": 0.9, "nesterov": 0.0, "weight_decay": 1e-3,
        "gradient_scale": 1.0, "proximal": 0.0,
    }  # fmt: skip
    feed = {name: np.array(value, np.float32) for name, value in scalars.items()}
    done = sgd(feed | {"parameters": x, "gradient": gradient, "anchor": x, "velocity": velocity})
    return done["new_parameters"], done["new_velocity"]


def open_graph(engine: OrtEngine, path: Path) -> Graph:
    """A graph in a session of the engine."""
    data = path.read_bytes()
    artifact = Artifact(path.name, hashlib.sha256(data).hexdigest(), len(data))
    return engine._graph(artifact).run


def main() -> None:
    print(json.dumps(find_runtime()._asdict()), flush=True)
    for line in sys.stdin:
        print(json.dumps(losses_of(Path(line.strip()))), flush=True)


if __name__ == "__main__":
    main()
