"""The one-step law: a chained step on the artifacts equals PyTorch's on the whole model.

Every export proves it on random batches before the folder moves into place, for all modalities
together and for each alone.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from petalfl.errors import ModelError
from petalfl.model import ModelManifest
from petalfl.training import Masks, draw_masks

from .model import BlockModel

TOLERANCE = 1e-5  # largest error of a gradient, relative to its largest entry
COINCIDENCE = 1e-2  # a larger error is no rounding, nor a tie of a ReLU or maximum
NUM_TRIES = 3


class Batch(NamedTuple):
    """A random batch of some modalities, with the dropout masks of the blocks that it runs."""

    inputs: dict[str, NDArray[np.float32]]
    labels: NDArray[np.int64]
    masks: Masks


def check_one_step(model: BlockModel, folder: Path) -> None:
    """Compares training gradients and evaluation outputs of every block with PyTorch's.

    A sum that nearly cancels may miss the tolerance by float32 rounding alone, on a rare batch;
    a gradient that is wrong is wrong on all. So what misses it is tried on fresh batches, and
    refused when it misses it on every one of `NUM_TRIES`.

    Raises:
        ModelError: One differs by more than `TOLERANCE`, or the runtime crashes on a block.
    """
    suspects = _suspects(model, folder, seed=0)
    for seed in range(1, NUM_TRIES):
        if not max(suspects.values(), default=np.nan) <= COINCIDENCE:
            break  # nothing is wrong, or too much for chance
        again = _suspects(model, folder, seed)
        suspects = {key: again[key] for key in suspects if key in again}
    for (subset, name), error in suspects.items():
        raise ModelError(
            f"{name}: the exported block differs from PyTorch's by {error:.1e} "
            f"(limit {TOLERANCE:g}) with {' + '.join(subset)}; one of its layers cannot "
            "be exported exactly"
        )


def _suspects(
    model: BlockModel, folder: Path, seed: int
) -> dict[tuple[tuple[str, ...], str], float]:
    """What misses the tolerance: by modalities and name, its error."""
    manifest = ModelManifest.load(folder)
    subsets = dict.fromkeys([tuple(model.encoders), *((name,) for name in model.encoders)])
    rng = np.random.default_rng(seed)
    # Other lengths than the example's, so that a length taken from it does not go unnoticed.
    lengths = itertools.cycle((5, 1, 3))
    batches = [
        draw_batch(manifest, subset, length, rng)
        for subset, length in zip(subsets, lengths, strict=False)
    ]
    return {
        (subset, name): error
        for subset, errors in zip(subsets, one_step_errors(model, folder, batches), strict=True)
        for name, error in errors.items()
        if not error <= TOLERANCE
    }


def draw_batch(
    manifest: ModelManifest, modalities: tuple[str, ...], length: int, rng: np.random.Generator
) -> Batch:
    """Normal inputs, random labels and masks."""
    inputs = {
        m: rng.standard_normal((length, *manifest.modalities[m].shape), dtype=np.float32)
        for m in modalities
    }
    labels = rng.integers(0, manifest.num_classes, length)
    return Batch(inputs, labels, draw_masks(manifest.blocks_for(modalities), length, rng))


def one_step_errors(
    model: BlockModel, folder: Path, batches: list[Batch]
) -> Iterator[dict[str, float]]:
    """Per batch, the relative errors, in topological order of the blocks.

    ``<block> in evaluation`` is the output's error relative to its largest entry;
    ``<block>.<parameter>`` the gradient's, relative to its largest entry, or to 1e-3 of the
    block's largest one where that is more (a bias before a softmax has a gradient of rounding
    noise alone); ``loss`` comes last.

    Raises:
        ModelError: The runtime crashes on a block, or a forward pass fails in PyTorch.
    """
    found = _runtime_step(folder, batches)
    for number, batch in enumerate(batches):
        outputs = _torch_outputs(model, batch)
        loss, expected = _torch_gradients(model, batch)
        errors = {}
        for block, by_parameter in expected.items():
            errors[f"{block} in evaluation"] = _relative_error(
                found[f"{number}|{block}|output"], outputs[block]
            )
            noise = 1e-3 * max(float(g.abs().max()) for g in by_parameter.values())
            start = 0
            for name, gradient in by_parameter.items():
                part = found[f"{number}|{block}"][start : start + gradient.numel()]
                start += gradient.numel()
                errors[f"{block}.{name}"] = _relative_error(part, gradient, noise)
        errors["loss"] = abs(float(found[f"{number}|loss"]) - loss) / abs(loss)
        yield errors


def _relative_error(found: NDArray[np.float32], expected: Tensor, at_least: float = 0) -> float:
    scale = max(float(expected.abs().max()), at_least)
    error = float(np.abs(found - expected.numpy().reshape(found.shape)).max())
    return error / scale if scale else error


def _runtime_step(folder: Path, batches: list[Batch]) -> dict[str, NDArray[np.float32]]:
    with tempfile.TemporaryDirectory() as work:
        given, result = Path(work, "batches.npz"), Path(work, "result.npz")
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


def _torch_outputs(model: BlockModel, batch: Batch) -> dict[str, Tensor]:
    """Every block's output in evaluation mode."""
    outputs: dict[str, Tensor] = {}
    was_training = model.training
    hooks = [
        module.register_forward_hook(lambda m, a, output, name=name: outputs.update({name: output}))
        for name, module in model.blocks()
    ]
    try:
        with torch.no_grad():
            _forward(model.eval(), batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return outputs


def _torch_gradients(model: BlockModel, batch: Batch) -> tuple[float, dict[str, dict[str, Tensor]]]:
    held = {name: module for name, module in model.blocks() if name in batch.masks}
    was_training = model.training
    model.train().zero_grad()
    with _forced_dropout(held, batch.masks):
        logits = _forward(model, batch)
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
    if not loss.requires_grad:
        raise ModelError("the loss does not depend on any parameter")
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


def _forward(model: BlockModel, batch: Batch) -> Tensor:
    running = [""]
    hooks = [
        module.register_forward_pre_hook(lambda m, a, name=name: running.append(name))
        for name, module in model.blocks()
    ]
    try:
        logits: Tensor = model({name: torch.from_numpy(x) for name, x in batch.inputs.items()})
        return logits
    except Exception as error:  # whatever the user's own code raises
        raise ModelError(
            f"block {running[-1]}: its forward pass fails on a batch of {len(batch.labels)}: "
            f"{error!r}"[:500]
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _forced_dropout(held: Mapping[str, nn.Module], masks: Masks) -> Iterator[None]:
    """PyTorch's own dropout layers use the given masks instead of drawing theirs."""
    layers = {
        cast(nn.Dropout, module.get_submodule(name.removeprefix("mask."))): torch.from_numpy(mask)
        for block, module in held.items()
        for name, mask in masks[block].items()
    }
    was_inplace = [layer.inplace for layer in layers]
    hooks = [
        layer.register_forward_hook(lambda layer, args, output: args[0] * layers[layer])
        for layer in layers
    ]
    for layer in layers:
        layer.inplace = False  # its input is wanted as it was
    try:
        yield
    finally:
        for layer, inplace, hook in zip(layers, was_inplace, hooks, strict=True):
            layer.inplace = inplace
            hook.remove()
