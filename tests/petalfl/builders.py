"""Manifests without files, and an engine in NumPy that runs their blocks in closed form."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from petalfl.engine import Arrays, Forward, Gradients
from petalfl.model import (
    Artifact,
    Artifacts,
    Block,
    Dropout,
    Modality,
    ModelManifest,
    Parameter,
    Task,
    Tensor,
)
from petalfl.vectors import Vector


def artifact(path: str, num_bytes: int = 100) -> Artifact:
    return Artifact(path, hashlib.sha256(path.encode()).hexdigest(), num_bytes)


def make_block(
    name: str,
    inputs: tuple[str, ...],
    widths: dict[str, int] | int,
    in_width: int,
    *,
    reached: bool = True,
    statistics: int = 0,
    dropout: float | None = None,
    **changes: Any,
) -> Block:
    """A linear block ``(b, in_width)`` to outputs of the given widths, as `NumpyEngine` runs it.

    Args:
        widths: Of the one output, or by output's key.
        reached: Whether gradients reach it.
        statistics: How many floats of them.
        dropout: The rate of a mask on its outputs.
    """
    by_name = {name: widths} if isinstance(widths, int) else {
        f"{name}.{key}": width for key, width in widths.items()
    }  # fmt: skip
    width = sum(by_name.values())
    num_parameters = (in_width + 1) * width
    is_frozen = changes.get("is_frozen", False)
    kind = name if name == "fusion" else "head" if name.startswith("head") else "encoder"
    fields: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "inputs": inputs,
        "outputs": tuple(Tensor(key, (size,)) for key, size in by_name.items()),
        "size": num_parameters + statistics,
        "num_trainable": 0 if is_frozen else num_parameters,
        "parameters": (Parameter("weight", (in_width, width)), Parameter("bias", (width,))),
        "statistics": (Parameter("running_mean", (statistics,)),) if statistics else (),
        "dropouts": () if dropout is None else (Dropout("mask.0", (width,), dropout),),
        "task": Task("mse") if kind == "head" else None,
        "is_frozen": is_frozen,
        "state_prefix": f"{name}.",
        "min_batch": 1,
        "num_flops": 2 * num_parameters,
        "activation_bytes": 4 * width,
        "artifacts": Artifacts(
            artifact(f"{name}/eval_model.onnx"),
            None if kind == "head" or is_frozen else artifact(f"{name}/training_forward.onnx"),
            artifact(f"{name}/training_backward.onnx") if reached else None,
            artifact(f"{name}/parameters.bin", 4 * (num_parameters + statistics)),
        ),
    }
    return Block(**{**fields, **changes})


def make_manifest(
    modalities: Mapping[str, int | Modality], *blocks: Block, **changes: Any
) -> ModelManifest:
    """A number is a modality's width; the manifest is read back, and so a valid one."""
    fields: dict[str, Any] = {
        "format_version": 2,
        "name": "made",
        "modalities": {
            name: Modality((given,)) if isinstance(given, int) else given
            for name, given in modalities.items()
        },
        "blocks": blocks,
        "missing": "mask",
        "optimizers": {name: artifact(f"optimizers/{name}.onnx") for name in ("sgd", "adamw")},
    }
    return ModelManifest.from_json(ModelManifest(**{**fields, **changes}).to_json())


def rich_manifest(**changes: Any) -> ModelManifest:
    """Everything at once: a chain behind a frozen stage, a fusion with statistics, two heads."""
    return make_manifest(
        {"a": 2, "b": 3},
        make_block("backbone-a", ("a",), {"x": 2, "y": 1}, 2, is_frozen=True, reached=False),
        make_block("projector-a", ("backbone-a",), 2, 3, min_batch=2),
        make_block("encoder-b", ("b",), {"0": 2, "1": 1}, 3, dropout=0.5),
        make_block("fusion", ("projector-a", "encoder-b"), 3, 5, statistics=3),
        make_block("head-p", ("fusion",), 2, 3, task=Task("mse", 0.5), statistics=2),
        make_block("head-q", ("fusion",), 3, 3, task=Task("cross_entropy"), dropout=0.25),
        **changes,
    )


def fusionless_manifest() -> ModelManifest:
    """One encoder a modality, zeros for the missing, and a frozen head among two over both."""
    return make_manifest(
        {"a": 2, "b": 3},
        make_block("encoder-a", ("a",), 2, 2),
        make_block("encoder-b", ("b",), 2, 3),
        make_block("head-p", ("encoder-a", "encoder-b"), 1, 4, is_frozen=True),
        make_block("head-q", ("encoder-b", "encoder-a"), 2, 4, task=Task("bce_with_logits")),
        missing="zero",
    )


def draw_vectors(manifest: ModelManifest, seed: int = 0) -> dict[str, Vector]:
    rng = np.random.default_rng(seed)
    return {b.name: rng.standard_normal(b.size, dtype=np.float32) for b in manifest.blocks}


class NumpyEngine:
    """Linear blocks: y = (x W + b) · mask, of all input tensors side by side.

    Of a block with ``present``, the inputs of an absent modality are dropped. In training, the
    running statistics s become 0.9 s + 0.1 mean(x W + b); in inference, y is x W + b + s. All
    is computed in float64, so that differences of losses are exact enough to be derivatives.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Arrays]] = []
        self.vectors: list[tuple[str, Vector]] = []

    @property
    def names(self) -> list[tuple[str, str]]:
        return [(method, name) for method, name, _ in self.calls]

    def fed(self, method: str, name: str) -> list[Arrays]:
        """What a block was fed, call by call."""
        return [feeds for m, n, feeds in self.calls if (m, n) == (method, name)]

    def evaluate(self, block: Block, vector: Vector, inputs: Arrays) -> dict[str, Any]:
        self.calls.append(("evaluate", block.name, dict(inputs)))
        z = self._z(block, vector, inputs)
        return self._split(block, z + vector[self._end(block) :] if block.statistics else z)

    def forward(self, block: Block, vector: Vector, inputs: Arrays) -> Forward:
        assert block.kind != "head"
        if block.is_frozen:
            return Forward(self.evaluate(block, vector, inputs), None, {})
        self.calls.append(("forward", block.name, dict(inputs)))
        z = self._z(block, vector, inputs)
        saved = {"saved.0": self._x(block, inputs)}
        outputs = self._split(block, z * inputs.get("mask.0", np.float64(1)))
        return Forward(outputs, self._statistics(block, vector, z), saved)

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        assert block.artifacts.training_backward is not None
        self.calls.append(("backward", block.name, dict(feeds)))
        x = self._x(block, feeds)
        w, _ = self._split_vector(block, vector)
        loss, statistics = None, None
        if block.task is None:
            assert block.is_frozen or (feeds["saved.0"] == x).all()
            dy = np.concatenate([feeds[f"d_{tensor.name}"] for tensor in block.outputs], axis=1)
        else:
            z = self._z(block, vector, feeds)
            statistics = None if block.is_frozen else self._statistics(block, vector, z)
            mask = feeds.get("mask.0", np.float64(1))
            loss, dy = loss_of(block.task.loss, z * mask, feeds["labels"])
        dz = dy * feeds.get("mask.0", np.float64(1))
        gradient = np.concatenate([(x.T @ dz).ravel(), dz.sum(axis=0)])
        return Gradients(
            None if block.is_frozen else gradient,
            self._input_gradients(block, feeds, dz @ w.T),
            loss,
            statistics,
        )

    def step(self, optimizer: Artifact, feeds: Arrays) -> dict[str, Any]:
        self.calls.append(("step", optimizer.path, dict(feeds)))
        f = {name: np.asarray(value, np.float64) for name, value in feeds.items()}
        w = f["parameters"]
        g = f["gradient_scale"] * f["gradient"] + f["proximal"] * (w - f["anchor"])
        if optimizer.path == "optimizers/sgd.onnx":
            g = g + f["weight_decay"] * w
            v = f["momentum"] * f["velocity"] + g
            moved = w - f["learning_rate"] * (g + f["momentum"] * v if f["nesterov"] else v)
            new = {"new_parameters": moved, "new_velocity": v}
        else:
            m = f["beta1"] * f["first_moment"] + (1 - f["beta1"]) * g
            v = f["beta2"] * f["second_moment"] + (1 - f["beta2"]) * g**2
            m_hat, v_hat = m / (1 - f["beta1"] ** f["step"]), v / (1 - f["beta2"] ** f["step"])
            decayed = w * (1 - f["learning_rate"] * f["weight_decay"])
            moved = decayed - f["learning_rate"] * m_hat / (np.sqrt(v_hat) + f["epsilon"])
            new = {"new_parameters": moved, "new_first_moment": m, "new_second_moment": v}
        return {name: value.astype(np.float32) for name, value in new.items()}

    def _end(self, block: Block) -> int:
        return sum(p.size for p in block.parameters)

    def _split_vector(self, block: Block, vector: Vector) -> tuple[NDArray[Any], NDArray[Any]]:
        weight, _ = block.parameters
        assert vector.shape == (block.size,)
        w = vector[: weight.size].astype(np.float64).reshape(weight.shape)
        return w, vector[weight.size : self._end(block)].astype(np.float64)

    def _names(self, block: Block, feeds: Arrays) -> list[str]:
        """The input tensors, in the order of the block's inputs."""
        return [
            name
            for source in block.inputs
            for name in feeds
            if name == source or name.startswith(f"{source}.")
        ]

    def _x(self, block: Block, feeds: Arrays) -> NDArray[np.float64]:
        parts = []
        for name in self._names(block, feeds):
            part = feeds[name].astype(np.float64)
            if "present" in feeds:
                column = block.inputs.index(name.partition(".")[0])
                part = part * feeds["present"][:, column : column + 1]
            parts.append(part)
        return np.concatenate(parts, axis=1)

    def _z(self, block: Block, vector: Vector, feeds: Arrays) -> NDArray[np.float64]:
        w, b = self._split_vector(block, vector)
        z: NDArray[np.float64] = self._x(block, feeds) @ w + b
        return z

    def _split(self, block: Block, y: NDArray[Any]) -> dict[str, Any]:
        ends = np.cumsum([tensor.shape[0] for tensor in block.outputs])[:-1]
        parts = np.split(y, ends, axis=1)
        return {tensor.name: part for tensor, part in zip(block.outputs, parts, strict=True)}

    def _statistics(self, block: Block, vector: Vector, z: NDArray[Any]) -> Vector | None:
        if not block.statistics:
            return None
        moved: Vector = 0.9 * vector[self._end(block) :] + 0.1 * z.mean(axis=0)
        return moved.astype(np.float32)

    def _input_gradients(self, block: Block, feeds: Arrays, dx: NDArray[Any]) -> dict[str, Any]:
        names = [name for name in self._names(block, feeds) if name not in ("a", "b")]
        if not names:
            return {}
        ends = np.cumsum([feeds[name].shape[1] for name in names])[:-1]
        gradients = dict(zip(names, np.split(dx, ends, axis=1), strict=True))
        if "present" in feeds:
            for name in gradients:
                column = block.inputs.index(name.partition(".")[0])
                gradients[name] = gradients[name] * feeds["present"][:, column : column + 1]
        return {name: g for name, g in gradients.items() if not name.startswith("backbone-")}


def loss_of(loss: str, y: NDArray[Any], labels: NDArray[Any]) -> tuple[float, NDArray[Any]]:
    """The mean loss and its gradient by ``y``."""
    if loss == "mse":
        return float(np.mean((y - labels) ** 2)), 2 * (y - labels) / y.size
    if loss == "l1":
        return float(np.mean(np.abs(y - labels))), np.sign(y - labels) / y.size
    if loss == "bce_with_logits":
        losses = np.maximum(y, 0) - y * labels + np.log1p(np.exp(-np.abs(y)))
        return float(losses.mean()), (1 / (1 + np.exp(-y)) - labels) / y.size
    exponentials = np.exp(y - y.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    hits = probabilities[np.arange(len(y)), labels]
    one_hot = np.eye(y.shape[1])[labels]
    return float(-np.log(hits).mean()), (probabilities - one_hot) / len(y)
