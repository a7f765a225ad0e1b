"""Writes the artifacts folder: every block's graphs, its initial values, and the manifest."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import onnxruntime
import torch
from torch import Tensor

from petalfl.engine import OrtEngine
from petalfl.errors import ModelError
from petalfl.model import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    STATE_NAME,
    Artifact,
    Artifacts,
    Block,
    Modality,
    ModelManifest,
    Task,
)
from petalfl.model import Tensor as TensorType
from petalfl.reference import REFERENCE_NAME, take_reference
from petalfl.runtime import find_runtime

from .block import BlockSpec
from .graph import BATCH_SIZE, BlockGraphs, build_graphs, input_names
from .law import check_one_step
from .model import BlockModel
from .optimizers import build_optimizers
from .parity import check_elsewhere
from .program import Size, Value
from .state import save_state

Format = Literal["onnx", "ort"]


def export_model(
    model: BlockModel,
    out: Path,
    progress: Callable[[str], None] = lambda step: None,
    *,
    file_format: Format = "onnx",
    source: str = "",
    check_with: Sequence[Path] = (),
) -> ModelManifest:
    """Exports every block, checks the one-step law, and moves the folder into place.

    The graphs are the same for every ONNX Runtime. The law is proven on the one that is installed
    here, and some local steps are noted (`petalfl.reference`), for others to be compared with.

    Args:
        model: Its current parameters become the initial values.
        out: Made anew; an artifacts folder that is already there is replaced as a whole.
        progress: Told each block's name before its turn.
        file_format: "ort" is ONNX Runtime's own, smaller one, for builds that read nothing else.
        source: ``MODULE:FACTORY`` of the model, noted in the manifest.
        check_with: Interpreters of other environments, whose runtimes take those steps, too.

    Raises:
        ModelError: A block cannot be exported exactly, another runtime computes something else,
            or ``out`` holds something else.
    """
    out = out.resolve()
    if foreign := foreign_file(out):
        raise ModelError(
            f"{out} holds something that is no artifacts folder ({foreign}); choose another place"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise ModelError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        manifest = _Writer(model, work, file_format).write(progress, source)
        progress("one-step law")
        check_one_step(model, work)
        progress("reference steps")
        engine = OrtEngine(work)
        reference = take_reference(engine, manifest, work, str(find_runtime()))
        (work / REFERENCE_NAME).write_bytes(reference.to_json())
        for python in check_with:
            progress(f"reference steps with {python}")
            check_elsewhere(python, work)
        move_into_place(work, out)
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


_FILES = re.compile(
    r"manifest\.json|reference\.json|state\.pt|optimizers/\w+\.(onnx|ort)|[a-z0-9-]+/(parameters\.bin|"
    r"(eval_model|training_\w+)\.(onnx|ort))"
)


def foreign_file(out: Path) -> str:
    """A file there that no export has made, if any: a folder with one is not replaced."""
    if out.is_file():
        return "a file"
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir())
    foreign = [path for path in files if not _FILES.fullmatch(path)]
    if foreign or not files or _is_artifacts(out):
        return min(foreign, default="")
    return files[0]


def _is_artifacts(folder: Path) -> bool:
    """Whether a manifest of ours, of whatever version, is there: others have a manifest, too."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format_version", "modalities"} <= manifest.keys()


def move_into_place(work: Path, out: Path) -> None:
    """Puts ``work`` in the place of ``out``, which goes only when that has succeeded."""
    work.chmod(0o755)
    aside = work.with_name(f"{work.name}-old")
    if out.exists():
        out.rename(aside)
    try:
        work.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


class _Writer:
    """Exports the blocks of one model in topological order."""

    def __init__(self, model: BlockModel, folder: Path, file_format: Format) -> None:
        self._model = model
        self._folder = folder
        self._format = file_format
        self._axes: dict[str, tuple[int, int]] = {}
        self._values: dict[str, Value] = {}  # of every tensor between blocks, by name
        self._trained: set[str] = set()  # blocks that train, or come after one that does
        for modality, example in model.examples.items():
            self._values[modality] = self._input(modality, example)

    def write(self, progress: Callable[[str], None], source: str) -> ModelManifest:
        blocks = []
        for spec in self._model.blocks():
            progress(spec.name)
            blocks.append(self._write_block(spec))
        (self._folder / "optimizers").mkdir()
        optimizers = {
            name: self._put_graph(f"optimizers/{name}", data)
            for name, data in build_optimizers().items()
        }
        manifest = ModelManifest(
            format_version=FORMAT_VERSION,
            name=self._model.name,
            modalities={m: self._modality(m) for m in self._model.examples},
            blocks=tuple(blocks),
            missing=self._model.missing,
            optimizers=optimizers,
            private_blocks=self._model.private_blocks,
            source=source,
            state=self._put(STATE_NAME, save_state(self._model)),
        )
        data = manifest.to_json()
        (self._folder / MANIFEST_NAME).write_bytes(data)
        return ModelManifest.from_json(data)

    def _input(self, modality: str, example: Tensor) -> Value:
        shape: list[int | Size] = [BATCH_SIZE, *example.shape[1:]]
        for axis, (low, high) in self._model.dynamic_axes.get(modality, {}).items():
            name = f"{modality}.{axis}"
            self._axes[name] = low, high
            shape[axis] = Size(((1, (name,)),))
        return Value(tuple(shape), example.dtype)

    def _modality(self, name: str) -> Modality:
        value = self._values[name]
        return Modality(
            _open_shape(value),
            "float32" if value.dtype == torch.float32 else "int64",
            self._model.num_values.get(name),
            tuple(
                tuple(ends) for _, ends in sorted(self._model.dynamic_axes.get(name, {}).items())
            ),
        )

    def _write_block(self, spec: BlockSpec) -> Block:
        examples = self._model.examples | self._model.example_values
        names = input_names(spec, examples)
        behind = [n for name in spec.inputs if name in self._trained for n in names[name]]
        graphs = build_graphs(
            spec,
            self._values,
            examples,
            num_modalities=len(self._model.examples),
            differentiate_by=behind,
            axes=self._axes,
        )
        self._values |= graphs.outputs
        if behind or not spec.is_frozen:
            self._trained.add(spec.name)
        return Block(
            name=spec.name,
            kind=spec.kind,
            inputs=spec.inputs,
            outputs=tuple(TensorType(n, _open_shape(v)) for n, v in graphs.outputs.items()),
            size=graphs.vector.size,
            num_trainable=0 if spec.is_frozen else sum(p.size for p in graphs.parameters),
            parameters=graphs.parameters,
            statistics=graphs.statistics,
            dropouts=graphs.dropouts,
            task=spec.task and Task(*spec.task),  # type: ignore[arg-type]  # of its own literals
            is_frozen=spec.is_frozen,
            state_prefix=spec.state_prefix,
            min_batch=graphs.min_batch,
            num_flops=graphs.num_flops,
            activation_bytes=graphs.activation_bytes,
            artifacts=self._put_block(spec.name, graphs),
        )

    def _put_block(self, name: str, graphs: BlockGraphs) -> Artifacts:
        (self._folder / name).mkdir()
        forward, backward = graphs.training_forward, graphs.training_backward
        vector = graphs.vector.astype("<f4").tobytes()
        return Artifacts(
            eval_model=self._put_graph(f"{name}/eval_model", graphs.eval_model),
            training_forward=self._put_optional(f"{name}/training_forward", forward),
            training_backward=self._put_optional(f"{name}/training_backward", backward),
            parameters=self._put(f"{name}/parameters.bin", vector),
        )

    def _put_optional(self, path: str, data: bytes | None) -> Artifact | None:
        return None if data is None else self._put_graph(path, data)

    def _put_graph(self, path: str, data: bytes) -> Artifact:
        if self._format == "ort":
            data = _to_ort_format(data)
        return self._put(f"{path}.{self._format}", data)

    def _put(self, path: str, data: bytes) -> Artifact:
        (self._folder / path).write_bytes(data)
        return Artifact(path, hashlib.sha256(data).hexdigest(), len(data))


def _open_shape(value: Value) -> tuple[int | None, ...]:
    return tuple(d if isinstance(d, int) else None for d in value.shape[1:])


def _to_ort_format(data: bytes) -> bytes:
    """The graph as ONNX Runtime saves it, without what only its own CPU could run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.ort"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return path.read_bytes()
