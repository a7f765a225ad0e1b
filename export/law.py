"""The one-step law: a chained step on the artifacts equals PyTorch's on the whole model.

Every export proves it on random batches before the folder moves into place, for all modalities
together and for each alone.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from petalfl.errors import ModelError
from petalfl.model import ModelManifest
from petalfl.training import Masks, draw_masks

from .model import BlockModel

TOLERANCE = 1e-5  # largest error of a gradient, relative to its largest entry


class Batch(NamedTuple):
    """A random batch of some modalities, with the dropout masks of the blocks that it runs."""

    inputs: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    masks: Masks


def check_one_step(model: BlockModel, folder: Path) -> None:
    """Compares the gradients of every block with PyTorch's.

    Raises:
        ModelError: One differs by more than `TOLERANCE`, or the runtime crashes on a block.
    """
    manifest = ModelManifest.load(folder)
    subsets = dict.fromkeys([tuple(model.encoders), *((name,) for name in model.encoders)])
    rng = np.random.default_rng(0)
    batches = [draw_batch(model, manifest, subset, rng) for subset in subsets]
    for subset, errors in zip(subsets, one_step_errors(model, folder, batches), strict=True):
        for name, error in errors.items():
            if not error <= TOLERANCE:
                raise ModelError(
                    f"{name}: the exported gradient differs from PyTorch's by {error:.1e} "
                    f"(limit {TOLERANCE:g}) with {' + '.join(subset)}; this layer cannot be "
                    "exported exactly"
                )


def draw_batch(
    model: BlockModel, manifest: ModelManifest, modalities: tuple[str, ...],
    rng: np.random.Generator,
) -> Batch:  # fmt: skip
    """Normal inputs of the examples' shapes, random labels and masks."""
    shapes = {m: tuple(model.examples[m].shape) for m in modalities}
    length = next(iter(shapes.values()))[0]
    inputs = {m: rng.standard_normal(shape, dtype=np.float32) for m, shape in shapes.items()}
    labels = rng.integers(0, manifest.num_classes, length)
    return Batch(inputs, labels, draw_masks(manifest.blocks_for(modalities), length, rng))


def one_step_errors(
    model: BlockModel, folder: Path, batches: list[Batch]
) -> Iterator[dict[str, float]]:
    """Per batch, the relative error of the loss and of each parameter's gradient.

    Relative to the largest entry of PyTorch's gradient of that parameter, or to 1e-3 of the
    block's largest one where that is more: a bias before a softmax has a gradient of rounding
    noise alone.

    Raises:
        ModelError: The runtime crashes on a block.
    """
    found = _runtime_gradients(folder, batches)
    for number, batch in enumerate(batches):
        loss, expected = _torch_gradients(model, batch)
        errors = {"loss": abs(float(found[f"{number}|loss"]) - loss) / abs(loss)}
        for block, by_parameter in expected.items():
            vector = found[f"{number}|{block}"]
            noise = 1e-3 * max(float(g.abs().max()) for g in by_parameter.values())
            start = 0
            for name, gradient in by_parameter.items():
                part = vector[start : start + gradient.numel()]
                start += gradient.numel()
                error = float(np.abs(part - gradient.numpy().ravel()).max())
                errors[f"{block}.{name}"] = error / max(float(gradient.abs().max()), noise)
        yield errors


def _runtime_gradients(folder: Path, batches: list[Batch]) -> dict[str, NDArray[np.float32]]:
    with tempfile.TemporaryDirectory() as work:
        given, result = Path(work, "batches.npz"), Path(work, "gradients.npz")
        np.savez(given, **dict(_flat(batches)))  # type: ignore[arg-type]
        script = Path(__file__).with_name("_chained_step.py")
        done = subprocess.run(
            [sys.executable, script, folder, given, result], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise ModelError(_complaint(done))
        with np.load(result) as file:
            return {key: file[key] for key in file.files}


def _flat(batches: list[Batch]) -> Iterator[tuple[str, NDArray[np.float32] | NDArray[np.int64]]]:
    for number, batch in enumerate(batches):
        yield f"{number}|labels", batch.labels
        for name, x in batch.inputs.items():
            yield f"{number}|inputs|{name}", x
        for block, masks in batch.masks.items():
            for name, mask in masks.items():
                yield f"{number}|masks|{block}|{name}", mask


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    block = (done.stdout.split() or ["?"])[-1]
    if done.returncode < 0:
        return (
            f"block {block}: onnxruntime-training crashes on it "
            f"({signal.Signals(-done.returncode).name}); one of its layers has no working gradient "
            "there: try another in its place"
        )
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"block {block}: onnxruntime-training cannot run it: {reason}"


def _torch_gradients(model: BlockModel, batch: Batch) -> tuple[float, dict[str, dict[str, Tensor]]]:
    held = {name: module for name, module in model.blocks() if name in batch.masks}
    was_training = model.training
    model.train().zero_grad()
    with _forced_dropout(held, batch.masks):
        logits = model({name: torch.from_numpy(x) for name, x in batch.inputs.items()})
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        block: {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in module.named_parameters()
        }
        for block, module in held.items()
    }
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
