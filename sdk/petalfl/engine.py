"""Runs blocks with ONNX Runtime: forward passes and vector-Jacobian products.

An engine is stateless: parameters go in as flat vectors, gradients come out as flat vectors. So
the sessions, the costly part, are shared by all clients of a process, and any number of threads
may call at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.errors import ModelError
from petalfl.model import Artifact, Block, read_artifact
from petalfl.vectors import Vector

Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class Gradients(NamedTuple):
    """A block's share of the backward pass.

    Attributes:
        parameters: ``(block.size,)``.
        inputs: The gradient by each input that is another block's output.
        loss: Mean over the batch; of a head only, else None.
    """

    parameters: Vector
    inputs: dict[str, NDArray[np.float32]]
    loss: float | None


class Engine(Protocol):
    """Executes the blocks of one model."""

    def forward(self, block: Block, parameters: Vector, inputs: Arrays) -> NDArray[np.float32]:
        """The block's output ``(b, *output_shape)``; masks, if any, are among the inputs."""
        ...

    def backward(self, block: Block, parameters: Vector, inputs: Arrays) -> Gradients:
        """The vector-Jacobian product; ``g`` or, for a head, ``labels`` is among the inputs."""
        ...


class OrtTrainingEngine:
    """onnxruntime-training: its gradient kernels run the training graphs.

    Args:
        folder: The artifacts; only those of the blocks that are used need be there.
        num_threads: Per session; 1 is right for many clients on few cores.
    """

    def __init__(self, folder: Path, num_threads: int = 1) -> None:
        self._folder = folder
        self._num_threads = num_threads
        self._loaded: dict[str, Any] = {}  # keeps the sessions of this engine alive

    def forward(self, block: Block, parameters: Vector, inputs: Arrays) -> NDArray[np.float32]:
        """See `Engine.forward`."""
        session = self._session(block.artifacts.eval_model)
        output: NDArray[np.float32] = session.run(None, {"parameters": parameters, **inputs})[0]
        return output

    def backward(self, block: Block, parameters: Vector, inputs: Arrays) -> Gradients:
        """See `Engine.backward`."""
        session = self._session(block.artifacts.training_model)
        names = [output.name for output in session.get_outputs()]
        values = session.run(names, {"parameters": parameters, **inputs})
        outputs = dict(zip(names, values, strict=True))
        loss = float(outputs.pop("loss")) if "loss" in outputs else None
        gradient = outputs.pop("gradient")
        return Gradients(gradient, {k.removeprefix("d_"): v for k, v in outputs.items()}, loss)

    def _session(self, artifact: Artifact) -> Any:
        if artifact.sha256 not in self._loaded:
            data = read_artifact(self._folder, artifact)
            self._loaded[artifact.sha256] = _open_session(artifact, data, self._num_threads)
        return self._loaded[artifact.sha256]


# Sessions by content: a thousand emulated devices of one model share a handful.
_sessions: weakref.WeakValueDictionary[tuple[str, int], Any] = weakref.WeakValueDictionary()
_sessions_lock = threading.Lock()


def _open_session(artifact: Artifact, data: bytes, num_threads: int) -> Any:
    ort = _import_runtime()
    with _sessions_lock:
        session = _sessions.get((artifact.sha256, num_threads))
        if session is None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = num_threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            try:
                session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # the extension has no common base for its errors
                reason = str(error).strip().splitlines()[0]
                raise ModelError(f"ONNX Runtime cannot load {artifact.path}: {reason}") from error
            _sessions[artifact.sha256, num_threads] = session
        return session


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            "onnxruntime-training is not installed; install it with: pip install petalfl[ort]"
        ) from error
    return onnxruntime
