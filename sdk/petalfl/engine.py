"""Runs blocks with ONNX Runtime: forward passes, vector-Jacobian products, optimizer steps.

An engine is stateless: parameters go in as flat vectors, gradients come out as flat vectors. So
the sessions, the costly part, are shared by all clients of a process, and any number of threads
may call at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from petalfl.data import fits
from petalfl.errors import ModelError
from petalfl.graphs import check_graph
from petalfl.model import Artifact, Block, read_artifact
from petalfl.runtime import EngineName, Runtime, find_runtime
from petalfl.vectors import Vector

Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class Forward(NamedTuple):
    """A block's forward pass in training.

    Attributes:
        outputs: By tensor name: float32 ``(b, *shape)``.
        statistics: The running statistics after it ``(block.size - num_parameters,)``; None
            where the block has none, or keeps them because it is frozen.
        saved: What the backward pass takes over.
    """

    outputs: dict[str, NDArray[np.float32]]
    statistics: Vector | None
    saved: dict[str, NDArray[Any]]


class Gradients(NamedTuple):
    """A block's share of the backward pass.

    Attributes:
        parameters: ``(block.num_trainable,)``; None for a block that does not train.
        inputs: By input tensor, of those that something trainable lies behind.
        loss: Mean over the batch, of a head; else None.
        statistics: As in `Forward`, of a head, whose two passes are one; else None.
    """

    parameters: Vector | None
    inputs: dict[str, NDArray[np.float32]]
    loss: float | None = None
    statistics: Vector | None = None


class Engine(Protocol):
    """Executes the blocks of one model. What a graph has no use for may be fed all the same."""

    def evaluate(
        self, block: Block, vector: Vector, inputs: Arrays
    ) -> dict[str, NDArray[np.float32]]:
        """The block's outputs by tensor name, in inference: no dropout, running statistics."""
        ...

    def forward(self, block: Block, vector: Vector, inputs: Arrays) -> Forward:
        """The forward pass in training of a block that is no head; masks are among the inputs."""
        ...

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        """The vector-Jacobian product.

        Args:
            feeds: What `forward` was fed and saved, and ``d_<output>`` for each output; of a
                head, its inputs, masks and ``labels``.
        """
        ...

    def step(self, optimizer: Artifact, feeds: Arrays) -> dict[str, NDArray[np.float32]]:
        """Runs an optimizer's graph; see `petalfl.optimizers`."""
        ...


class OrtEngine:
    """ONNX Runtime, whichever is installed: the graphs are plain ONNX.

    Args:
        folder: The artifacts; only those of the blocks that are used need be there.
        num_threads: Per session; 1 is right for many clients on few cores.
        name: As in `petalfl.runtime.find_runtime`, which is asked when a graph is first run.
        is_foreign: They came over a network: every graph is looked through before it is loaded,
            and must be ONNX, not ONNX Runtime's own format.

    Every method raises `ModelError` where the runtime is not there or not the one named, and
    where a graph is missing, damaged, too new for the runtime, does not run, holds what
    `petalfl.graphs` refuses, or gives anything else than the manifest says.
    """

    def __init__(
        self,
        folder: Path,
        num_threads: int = 1,
        *,
        name: EngineName = "auto",
        is_foreign: bool = False,
    ) -> None:
        self._is_foreign = is_foreign
        self._folder = folder
        self._num_threads = num_threads
        self._name = name
        self._runtime: Runtime | None = None  # found when it is first needed
        self._loaded: dict[str, _Graph] = {}  # keeps the sessions of this engine alive

    def evaluate(
        self, block: Block, vector: Vector, inputs: Arrays
    ) -> dict[str, NDArray[np.float32]]:
        """See `Engine.evaluate`."""
        graph = self._graph(block.artifacts.eval_model)
        values = graph.run({"parameters": vector, **inputs})
        return graph.take_outputs(block, values, inputs)

    def forward(self, block: Block, vector: Vector, inputs: Arrays) -> Forward:
        """See `Engine.forward`."""
        if block.artifacts.training_forward is None:  # frozen
            return Forward(self.evaluate(block, vector, inputs), None, {})
        graph = self._graph(block.artifacts.training_forward)
        values = graph.run({"parameters": vector, **inputs})
        outputs = graph.take_outputs(block, values, inputs)
        return Forward(outputs, graph.take_statistics(block, values), values)

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        """See `Engine.backward`."""
        if block.artifacts.training_backward is None:
            raise ValueError(f"nothing at or before block {block.name} trains")
        graph = self._graph(block.artifacts.training_backward)
        values = graph.run({"parameters": vector, **feeds})
        loss = None if block.task is None else float(graph.take(values, "loss", ()))
        has_gradient = block.num_trainable or "gradient" in values
        shape = (block.num_trainable,)
        parameters = graph.take(values, "gradient", shape) if has_gradient else None
        statistics = graph.take_statistics(block, values)
        inputs = {
            name.removeprefix("d_"): graph.take(values, name, _shape_of(name, feeds))
            for name in [*values]
        }
        return Gradients(parameters, inputs, loss, statistics)

    def step(self, optimizer: Artifact, feeds: Arrays) -> dict[str, NDArray[np.float32]]:
        """See `Engine.step`."""
        graph = self._graph(optimizer)
        values, shape = graph.run(feeds), feeds["parameters"].shape
        return {name: graph.take(values, name, shape) for name in [*values]}

    def _graph(self, artifact: Artifact) -> _Graph:
        if artifact.sha256 not in self._loaded:
            self._runtime = runtime = self._runtime or find_runtime(self._name)
            data = read_artifact(self._folder, artifact)
            self._loaded[artifact.sha256] = _open_graph(
                artifact, data, self._num_threads, runtime, self._is_foreign
            )
        return self._loaded[artifact.sha256]


class _Graph:
    """A session, and what goes in and comes out of it."""

    def __init__(self, path: str, session: Any) -> None:
        self._path = path
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """All outputs, of those feeds that the graph takes."""
        if missing := [name for name in self._inputs if name not in feeds]:
            raise ModelError(f"{self._path} takes {missing[0]!r}, which nothing gives it")
        try:
            values = self._session.run(self._outputs, {name: feeds[name] for name in self._inputs})
        except Exception as error:  # the extension has no common base for its errors
            raise ModelError(f"ONNX Runtime fails on {self._path}: {_reason(error)}") from error
        return dict(zip(self._outputs, values, strict=True))

    def take_outputs(
        self, block: Block, values: dict[str, NDArray[Any]], inputs: Arrays
    ) -> dict[str, NDArray[np.float32]]:
        """Takes the block's outputs out of what a run gave, of as many examples as it was fed."""
        length = len(next(iter(inputs.values())))
        return {t.name: self.take(values, t.name, (length, *t.shape)) for t in block.outputs}

    def take_statistics(self, block: Block, values: dict[str, NDArray[Any]]) -> Vector | None:
        """Takes the new running statistics, if they are there."""
        size = sum(tensor.size for tensor in block.statistics)
        return self.take(values, "statistics", (size,)) if "statistics" in values else None

    def take(
        self, values: dict[str, NDArray[Any]], name: str, shape: tuple[int | None, ...]
    ) -> NDArray[np.float32]:
        """Takes an output that must be float32 of a shape, whose None stand for any length."""
        value = values.pop(name, None)
        if not isinstance(value, np.ndarray):
            found = "nothing"
        elif value.dtype == np.float32 and fits(value.shape, shape):
            return value
        else:
            found = f"{value.dtype} {value.shape}"
        raise ModelError(f"{self._path} gives {found} as {name!r}, expected float32 {shape}")


# Sessions by content: a thousand emulated devices of one model share a handful.
_graphs: weakref.WeakValueDictionary[tuple[str, int, bool], _Graph] = weakref.WeakValueDictionary()
_graphs_lock = threading.Lock()


def _open_graph(
    artifact: Artifact, data: bytes, num_threads: int, runtime: Runtime, is_foreign: bool
) -> _Graph:
    import onnxruntime as ort

    _share_arena()
    with _graphs_lock:
        graph = _graphs.get((artifact.sha256, num_threads, is_foreign))
        if graph is None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = num_threads
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            options.add_session_config_entry("session.use_env_allocators", "1")
            if is_foreign:
                options.add_session_config_entry("session.load_model_format", "ONNX")
                check_graph(artifact.path, data)
            try:
                session = ort.InferenceSession(
                    data,
                    options,
                    providers=["CPUExecutionProvider"],
                    disabled_optimizers=["ConstantFolding"],  # it heeds no limit of memory
                )
            except Exception as error:  # as above
                raise ModelError(_why_not_loaded(artifact.path, error, runtime)) from error
            graph = _graphs[artifact.sha256, num_threads, is_foreign] = _Graph(
                artifact.path, session
            )
        return graph


def _shape_of(gradient: str, feeds: Arrays) -> tuple[int, ...]:
    """Of the tensor that it is the gradient by."""
    tensor = feeds.get(gradient.removeprefix("d_"))
    return () if tensor is None else tensor.shape


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# What the runtime says of a graph that a newer one could load.
_TOO_NEW = (
    r"Unsupported model IR version: \d+, max supported IR version: \d+",
    r"Opset \d+ is under development",
    r"Current official support for domain \S+ is till opset \d+",
    r"No Op registered for \S+ with domain_version of \d+",
    r"Could not find an implementation for \S+",
    r"The ORT format model version \[\S+\] is not supported",
)


def _why_not_loaded(path: str, error: Exception, runtime: Runtime) -> str:
    found = [match[0] for pattern in _TOO_NEW if (match := re.search(pattern, str(error)))]
    if not found:
        return f"ONNX Runtime cannot load {path}: {_reason(error)}"
    return (
        f"{path} needs a newer ONNX Runtime than {runtime} ({'; '.join(found)}); install one with: "
        "pip install --upgrade onnxruntime, or export the model again with this petalfl"
    )


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _share_arena() -> None:
    """One memory arena for all sessions: each of its own would keep its own peak.

    A graph that wants more than half of the machine's memory fails, and not the app.
    """
    import onnxruntime

    device = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # The app around us may have registered one, which then serves as well.
    with contextlib.suppress(RuntimeError):
        onnxruntime.create_and_register_allocator(
            device, onnxruntime.OrtArenaCfg(memory_bytes() // 2, -1, -1, -1)
        )
