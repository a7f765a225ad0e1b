"""Whole rounds of local training on exported artifacts, judged by PyTorch's own training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from petalfl.engine import OrtEngine
from petalfl.local_data import ArrayData
from petalfl.model import ModelManifest, read_artifact
from petalfl.training import Hyperparameters, train
from petalfl.vectors import from_bytes

torch = pytest.importorskip("torch", reason="without torch: PyTorch is the judge")

NUM_EXAMPLES = 13  # batches of 6, 6 and 1, which the fusion's batch norm cannot train on
TASKS = ("kind", "tags", "pace")
PRIVATE = {"fusion", "head-kind"}  # in fedalt; the fusion has running statistics
Phases: TypeAlias = list[tuple[str, ...]]  # in each, the prefixes of the tensors that train
PLAIN = {"learning_rate": 0.05, "batch_size": 6, "epochs": 3, "weight_decay": 0.0}
CASES: dict[str, tuple[dict[str, Any], Any, float, float]] = {
    "sgd": (
        {"momentum": 0.9, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01), 0.0, 0.0,
    ),
    "nesterov": (
        {"momentum": 0.5, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5, nesterov=True), 0.0, 0.0,
    ),
    "adamw, clipped": (
        {"optimizer": "adamw", "weight_decay": 0.1, "max_grad_norm": 0.3, "epsilon": 1e-3},
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, eps=1e-3), 0.3, 0.0,
    ),
    "proximal": (
        {"momentum": 0.0, "proximal_mu": 2.0}, lambda p: torch.optim.SGD(p, lr=0.05), 0.0, 2.0
    ),
}  # fmt: skip


def draw(modalities: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(3)
    inputs = {
        "motion": rng.standard_normal((NUM_EXAMPLES, 5), dtype=np.float32),
        "text": rng.integers(0, 11, (NUM_EXAMPLES, 4)),
    }
    labels = {
        "kind": rng.integers(0, 3, NUM_EXAMPLES),
        "tags": rng.integers(0, 2, (NUM_EXAMPLES, 4)).astype(np.float32),
        "pace": rng.standard_normal((NUM_EXAMPLES, 2), dtype=np.float32),
    }
    return {name: inputs[name] for name in modalities}, labels


def train_with_torch(
    modalities: tuple[str, ...], build: Any, max_norm: float, mu: float, phases: Phases
) -> tuple[dict[str, Any], float]:
    """The state dict and the mean loss after the same batches in the same order.

    Args:
        mu: Of the last phase.
    """
    from tests.petalfl.torch_models import several

    nn = torch.nn
    model = several().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs, labels = ({k: torch.from_numpy(v) for k, v in d.items()} for d in draw(modalities))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rng, losses = np.random.default_rng(0), []
    for prefixes in phases:
        for name, p in trainable.items():
            p.requires_grad_(name.startswith(prefixes))
        held = [p for p in trainable.values() if p.requires_grad]
        start = [p.detach().clone() for p in held]
        frozen = {n: b.clone() for n, b in model.named_buffers() if not n.startswith(prefixes)}
        optimizer = build(held)
        orders = [rng.permutation(NUM_EXAMPLES) for _ in range(3)]
        for batch in [order[part] for order in orders for part in (slice(6), slice(6, 12))]:
            outputs = model({name: x[batch] for name, x in inputs.items()})
            loss = (
                nn.functional.cross_entropy(outputs["kind"], labels["kind"][batch])
                + 0.5 * nn.functional.binary_cross_entropy_with_logits(
                    outputs["tags"], labels["tags"][batch])
                + nn.functional.mse_loss(outputs["pace"], labels["pace"][batch])
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            if max_norm:
                nn.utils.clip_grad_norm_(held, max_norm)
            for p, anchor in zip(held, start, strict=True):
                if p.grad is not None and prefixes == phases[-1]:
                    p.grad += mu * (p.detach() - anchor)
            optimizer.step()
            model.load_state_dict(frozen, strict=False)
            losses.append(loss.item())
    return model.state_dict(), float(np.mean(losses))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["fedsim", "fedalt"])
@pytest.mark.parametrize("modalities", [("text",), ("motion", "text")])
def test_a_round_is_pytorch_s(
    several_artifacts: Path, modalities: tuple[str, ...], method: str, case: str
) -> None:
    """Parameters and running statistics, block by block, under the state dict's own names."""
    changes, build, max_norm, mu = CASES[case]
    manifest = ModelManifest.load(several_artifacts)
    data = manifest.to_json().replace(b'"rate": 0.25', b'"rate": 0.0')
    manifest = ModelManifest.from_json(data)
    vectors = {
        b.name: from_bytes(read_artifact(several_artifacts, b.artifacts.parameters), b.size)
        for b in manifest.blocks
    }
    prefixes = {b.name: b.state_prefix for b in manifest.blocks}
    shared = set(prefixes) - (PRIVATE if method == "fedalt" else set())
    parts = (set(prefixes) - shared, shared)
    phases = [tuple(prefixes[name] for name in sorted(part)) for part in parts if part]
    found = train(
        OrtEngine(several_artifacts), manifest, vectors, ArrayData(*draw(modalities)),
        Hyperparameters(**{**PLAIN, **changes, "method": method}), np.random.default_rng(0),
        shared=shared,
    )  # fmt: skip
    expected, loss = train_with_torch(modalities, build, max_norm, mu, phases)
    assert found.loss == pytest.approx(loss, rel=1e-4)
    for block in manifest.blocks_for(modalities):
        ends = np.cumsum([tensor.size for tensor in block.tensors])
        pieces = np.split(found.parameters[block.name], ends)
        for tensor, part in zip(block.tensors, pieces, strict=False):
            judge = expected[block.state_prefix + tensor.name].numpy()
            np.testing.assert_allclose(
                part.reshape(tensor.shape), judge, rtol=1e-3, atol=2e-5,
                err_msg=f"{block.name} {tensor.name}",
            )  # fmt: skip
