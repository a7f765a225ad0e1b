"""`python -m benchmarks.contenders.compose MODULE:FACTORY DIR`: what `composed` trains.

The whole model through the TorchScript exporter and onnxruntime-training's `generate_artifacts`.
In a process of its own, for the C++ code may log much, or crash. Prints a JSON object: ``refused``,
why there is no training graph, and ``note``, why there is no evaluation graph, or null.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.training import artifacts

from benchmarks.contenders.pytorch import Whole, build
from benchmarks.contenders.worker import reason_of
from export.model import BlockModel

OPSET = 15  # later ones keep LayerNormalization whole, which has no gradient

_LOSSES = {
    "cross_entropy": artifacts.LossType.CrossEntropyLoss,
    "bce_with_logits": artifacts.LossType.BCEWithLogitsLoss,
    "mse": artifacts.LossType.MSELoss,
    "l1": artifacts.LossType.L1Loss,
}


def main(factory: str, folder: Path) -> dict[str, str | None]:
    """Writes the folder; what it returns is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        model = build(factory)
        _generate(model, _export(model, folder), folder)
    except Exception as error:  # PyTorch's, onnx's and onnxruntime's have nothing in common
        return {"refused": reason_of(error), "note": None}
    try:
        onnxruntime.InferenceSession(folder / "eval_model.onnx")
    except Exception as error:  # as above
        return {"refused": None, "note": f"evaluation graph refused: {reason_of(error)}"}
    return {"refused": None, "note": None}


def _export(model: BlockModel, folder: Path) -> onnx.ModelProto:
    torch.backends.mha.set_fastpath_enabled(False)  # its fused layers have no ONNX
    path, names = folder / "forward.onnx", [*model.examples]
    torch.onnx.export(
        Whole(model.train()),
        tuple(model.examples.values()),
        str(path),
        input_names=names,
        output_names=["output"],
        dynamic_axes={name: {0: "b"} for name in [*names, "output"]},
        opset_version=OPSET,
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # frozen blocks are in evaluation mode
    )
    return onnx.load(path)


def _generate(model: BlockModel, graph: onnx.ModelProto, folder: Path) -> None:
    if len(model.tasks) > 1:
        raise ValueError("generate_artifacts takes one loss, the model has several heads")
    (task,) = model.tasks.values()
    trained = {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    names = [tensor.name for tensor in graph.graph.initializer]
    artifacts.generate_artifacts(
        graph,
        requires_grad=[name for name in names if name in trained],
        frozen_params=[name for name in names if name not in trained],
        loss=_LOSSES[task.loss],
        optimizer=artifacts.OptimType.AdamW,
        artifact_directory=folder,
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
