"""onnxruntime-training's own way: one composed training graph, `Module` and `Optimizer`.

The optimizer is its AdamW: it has no SGD with momentum. Gradients are not checked here.
"""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
from onnxruntime.training.api import CheckpointState, Module, Optimizer

from benchmarks.contenders.case import LEARNING_RATE, SEED, AfterStep, Case


def train(case: Case, after_step: AfterStep) -> None:
    """Trains for ever.

    Raises:
        FloatingPointError: The loss is no longer finite.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    state = CheckpointState.load_checkpoint(case.composed / "checkpoint")
    # Without its eval model, which no step uses: one with batch norm is refused when loaded.
    module = Module(case.composed / "training_model.onnx", state, session_options=options)
    optimizer = Optimizer(case.composed / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(LEARNING_RATE)
    inputs, labels = case.load()
    (label,) = labels.values()
    arrays = [inputs.get(name, label) for name in module.input_names()]
    rng = np.random.default_rng(SEED)
    while True:
        order = rng.permutation(case.batch_size)
        loss = float(module(*(array[order] for array in arrays)))
        optimizer.step()
        module.lazy_reset_grad()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        after_step()
