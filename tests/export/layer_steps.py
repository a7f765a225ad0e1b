"""Writes a case of `tests.export.layers` for `tests.engine_steps`, which needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from export.optimizers import build_optimizers
from tests.engine_steps import NUM_STEPS
from tests.export.layer_law import Exported, arrays, evaluation_outputs, vector_of
from tests.export.layers import TRACED_LENGTH, Case


def write_layer(case: Case, exported: Exported, folder: Path) -> None:
    """Its graphs, the optimizer's, a batch, a target and the masks of every step."""
    module, inputs = case.module(), case.inputs(TRACED_LENGTH)
    masks = [exported.masks(inputs) for _ in range(NUM_STEPS)]
    targets = {n: torch.randn_like(z) for n, z in evaluation_outputs(module, inputs).items()}
    graphs = exported.graphs
    for name, graph in {
        "forward": graphs.training_forward or graphs.eval_model,
        "backward": graphs.training_backward,
        "evaluation": graphs.eval_model,
        "sgd": build_optimizers()["sgd"],
    }.items():
        assert graph is not None
        (folder / f"{name}.onnx").write_bytes(graph)
    values: dict[str, Any] = {
        "parameters": vector_of(module),
        "num_parameters": np.array(sum(p.numel() for p in module.parameters())),
        **{f"input.{name}": x for name, x in arrays(inputs).items()},
        **{f"target.{name}": x for name, x in arrays(targets).items()},
        **{
            f"mask.{i}": torch.stack(drawn).numpy()
            for i, drawn in enumerate(zip(*masks, strict=True))
        },
    }
    np.savez(folder / "arrays.npz", **values)
