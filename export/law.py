"""The one-step law: a chained step on the artifacts equals PyTorch's on the whole model.

Every export proves it on its example batch before the folder moves into place, for all
modalities together and for each alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from petalfl.engine import OrtTrainingEngine
from petalfl.errors import ModelError
from petalfl.model import ModelManifest, read_artifact
from petalfl.training import Masks, draw_masks, step_gradients

from .model import BlockModel

TOLERANCE = 1e-5  # largest error of a gradient, relative to its largest entry


def check_one_step(model: BlockModel, folder: Path) -> None:
    """Compares the gradients of every block with PyTorch's.

    Raises:
        ModelError: One differs by more than `TOLERANCE`; names block, parameter and error.
    """
    subsets = [tuple(model.encoders), *((name,) for name in model.encoders)]
    for modalities in dict.fromkeys(subsets):
        for name, error in one_step_errors(model, folder, modalities, seed=0).items():
            if not error <= TOLERANCE:
                raise ModelError(
                    f"{name}: the exported gradient differs from PyTorch's by {error:.1e} "
                    f"(limit {TOLERANCE:g}) with {' + '.join(modalities)}; this layer cannot be "
                    "exported exactly"
                )


def one_step_errors(
    model: BlockModel, folder: Path, modalities: tuple[str, ...], seed: int
) -> dict[str, float]:
    """The relative error of the loss and of each parameter's gradient, on one random batch.

    Relative to the largest entry of PyTorch's gradient of that parameter, or to 1e-3 of the
    block's largest one where that is more: a bias before a softmax has a gradient of rounding
    noise alone.
    """
    rng = np.random.default_rng(seed)
    manifest = ModelManifest.load(folder)
    held = manifest.blocks_for(modalities)
    inputs = {m: model.examples[m].numpy() for m in modalities}
    length = len(next(iter(inputs.values())))
    inputs = {m: rng.standard_normal(x.shape, dtype=np.float32) for m, x in inputs.items()}
    labels = rng.integers(0, manifest.num_classes, length)
    masks = draw_masks(held, length, rng)
    parameters = {
        b.name: np.frombuffer(read_artifact(folder, b.artifacts.parameters), "<f4") for b in held
    }
    engine = OrtTrainingEngine(folder)
    loss, found = step_gradients(engine, manifest, parameters, inputs, labels, masks)
    expected_loss, expected = _torch_gradients(model, inputs, labels, masks)
    errors = {"loss": abs(loss - expected_loss) / abs(expected_loss)}
    for block in held:
        scale = max(float(g.abs().max()) for g in expected[block.name].values()) * 1e-3
        start = 0
        for name, gradient in expected[block.name].items():
            part = found[block.name][start : start + gradient.numel()]
            start += gradient.numel()
            error = float(np.abs(part - gradient.numpy().ravel()).max())
            errors[f"{block.name}.{name}"] = error / max(float(gradient.abs().max()), scale)
    return errors


def _torch_gradients(
    model: BlockModel, inputs: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64],
    masks: Masks,
) -> tuple[float, dict[str, dict[str, Tensor]]]:  # fmt: skip
    held = {name: module for name, module in model.blocks() if name in masks}
    was_training = model.training
    model.train().zero_grad()
    with _forced_dropout(held, masks):
        logits = model({name: torch.from_numpy(x) for name, x in inputs.items()})
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        block: {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for n, p in module.named_parameters()}
        for block, module in held.items()
    }  # fmt: skip
    model.zero_grad()
    model.train(was_training)
    return loss.item(), gradients


@contextlib.contextmanager
def _forced_dropout(held: Mapping[str, nn.Module], masks: Masks) -> Iterator[None]:
    """PyTorch's own dropout layers use the given masks instead of drawing theirs."""
    hooks = [
        module.get_submodule(name.removeprefix("mask.")).register_forward_hook(
            lambda layer, args, output, mask=mask: args[0] * torch.from_numpy(mask)
        )
        for block, module in held.items()
        for name, mask in masks[block].items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
