"""One chained step on the artifacts = one step of PyTorch on the whole model.

PyTorch's side is written anew in `tests.export.tiny`, not taken from `export.law`.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from export import BlockModel, export_model, law
from export.graph import BATCH_SIZE, build_graphs
from export.models.har import watch
from export.program import Value
from petalfl import steps
from petalfl.engine import Arrays, Forward, Gradients, OrtEngine
from petalfl.errors import ModelError
from petalfl.local_data import ArrayData
from petalfl.model import Block, ModelManifest, differentiated
from petalfl.steps import predict_outputs, step_gradients
from petalfl.training import Hyperparameters, train
from petalfl.vectors import Vector
from tests.export.tiny import (
    TOLERANCE,
    Batch,
    Lambda,
    SumFusion,
    draw,
    largest_error,
    law_errors,
    lone,
    small,
    step_errors,
    tiny,
    torch_outputs,
    torch_step,
    vectors_of,
)
from tests.petalfl.torch_models import several

SUBSETS = [("acc", "gyro"), ("acc",), ("gyro",)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring on models this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# --- the reference model ---


@pytest.fixture(scope="module")
def manifest(watch_artifacts: Path) -> ModelManifest:
    return ModelManifest.load(watch_artifacts)


@pytest.fixture(scope="module")
def engine(watch_artifacts: Path) -> OrtEngine:
    return OrtEngine(watch_artifacts)


@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("modalities", SUBSETS)
def test_one_step(
    modalities: tuple[str, ...], length: int, manifest: ModelManifest, engine: OrtEngine
) -> None:
    model = watch(seed=3)
    batch = draw(model, manifest, modalities, length, seed=length)
    expected = torch_step(model, batch)
    assert expected.gradients.keys() == {*(f"encoder-{m}" for m in modalities), "fusion", "head"}
    found = step_gradients(engine, manifest, vectors_of(model), *batch)
    assert max(step_errors(found, expected).values()) <= TOLERANCE


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("modalities", SUBSETS)
def test_predictions_are_the_eval_forward_pass(
    modalities: tuple[str, ...], length: int, manifest: ModelManifest, engine: OrtEngine
) -> None:
    model = watch(seed=3)
    inputs = draw(model, manifest, modalities, length, seed=2).inputs
    found = predict_outputs(engine, manifest, vectors_of(model), inputs)
    assert found.keys() == {"head"} and found["head"].shape == (length, 7)
    np.testing.assert_allclose(found["head"], torch_outputs(model, inputs)["head"], atol=1e-6)


def test_the_masks_matter(manifest: ModelManifest, engine: OrtEngine) -> None:
    model = watch(seed=3)
    batch, other = (draw(model, manifest, ("acc",), 5, seed) for seed in (0, 1))
    for block in ("encoder-acc", "head"):
        mixed = batch._replace(masks=batch.masks | {block: other.masks[block]})
        one, two = (
            step_gradients(engine, manifest, vectors_of(model), *b).loss for b in (batch, mixed)
        )
        assert abs(one - two) > 1e-4


def test_an_absent_modality_has_no_part(manifest: ModelManifest, engine: OrtEngine) -> None:
    """Its projection and its columns of the attention get a gradient of exactly zero."""
    model = watch(seed=3)
    batch = draw(model, manifest, ("acc",), 5, seed=0)
    found = step_gradients(engine, manifest, vectors_of(model), *batch).gradients
    assert found.keys() == {"encoder-acc", "fusion", "head"}
    parameters = manifest.block("fusion").parameters
    parts = np.split(found["fusion"], np.cumsum([p.size for p in parameters])[:-1])
    by_name = dict(zip((p.name for p in parameters), parts, strict=True))
    assert not by_name["projections.gyro.weight"].any()
    assert not by_name["attention.weight"].reshape(2, 256)[:, 128:].any()
    assert by_name["projections.acc.weight"].any()


class Recorder(OrtEngine):
    """Notes what each batch was trained on: the backward pass begins with the head."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.batches: list[Batch] = []

    def backward(self, block: Block, vector: Vector, feeds: Arrays) -> Gradients:
        if block.kind == "head":
            self.batches.append(Batch({}, {"head": feeds["labels"]}, {}))
        if block.kind == "encoder":
            self.batches[-1].inputs[block.inputs[0]] = feeds[block.inputs[0]]
        self.batches[-1].masks[block.name] = {d.name: feeds[d.name] for d in block.dropouts}
        return super().backward(block, vector, feeds)


def in_order(batch: Batch, modalities: tuple[str, ...]) -> Batch:
    """As PyTorch's dropouts act: the backward pass runs the other way round."""
    inputs = {name: batch.inputs[name] for name in modalities}
    return Batch(inputs, batch.labels, dict(reversed(batch.masks.items())))


TorchOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, tuple[Hyperparameters, TorchOptimizer]] = {
    "sgd": (
        Hyperparameters(0.05, momentum=0.9, weight_decay=1e-3, batch_size=4),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    ),
    "sgd-nesterov": (
        Hyperparameters(0.05, momentum=0.8, weight_decay=0.0, batch_size=4, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, nesterov=True),
    ),
    "adamw": (
        # An epsilon far above the rounding noise of a gradient: AdamW divides by their sum.
        Hyperparameters(
            0.01, weight_decay=0.1, batch_size=4, optimizer="adamw", beta1=0.8, epsilon=1e-2
        ),
        lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.999), eps=1e-2, weight_decay=0.1),
    ),
}


CLEAR = 1e-6  # results of different processors were seen to part below 3e-7


class Margin:
    """How near PyTorch's own forward passes came to another choice.

    Attributes:
        least: Between a maximum and what it was chosen from, or a value and a ReLU's zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self.least = math.inf
        for layer in model.modules():
            if isinstance(layer, nn.MaxPool1d):  # of what a ReLU puts out, two by two
                layer.register_forward_hook(self._pooled)
            elif isinstance(layer, nn.ReLU):
                layer.register_forward_hook(self._rectified)

    def _pooled(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pairs = inputs[0].detach().unfold(2, 2, 2)  # (b, channels, t / 2, 2)
        most, least = pairs.amax(dim=3), pairs.amin(dim=3)
        self._note(torch.minimum(most - least, most)[most > 0])  # all zero: there is no gradient

    def _rectified(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if inputs[0].ndim == 2:  # of what is pooled, the pooling says more
            self._note(inputs[0].detach().abs())

    def _note(self, margins: Tensor) -> None:
        self.least = min(self.least, float(margins.min()))


def compare_training(
    hyperparameters: Hyperparameters,
    make_optimizer: TorchOptimizer,
    modalities: tuple[str, ...],
    manifest: ModelManifest,
    folder: Path,
    *,
    num_examples: int = 18,
    shared: tuple[str, ...] = (),
    before_step: Callable[[BlockModel, Mapping[str, Tensor]], None] = lambda model, start: None,
) -> int:
    """Trains on the artifacts, then PyTorch on the same batches; gives the batches' number.

    On the first data whose every decision of a pooling or a ReLU is `CLEAR`: where two values are
    equal but for rounding, either gradient is right, and which comes out is the processor's choice.
    """
    for seed in range(1, 50):
        model = watch(seed=3)
        margin = Margin(model)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        before = {name: vector.copy() for name, vector in vectors_of(model).items()}
        data = draw(model, manifest, modalities, num_examples, seed=seed)
        recorder = Recorder(folder)
        result = train(
            recorder, manifest, vectors_of(model), ArrayData(data.inputs, data.labels),
            hyperparameters, np.random.default_rng(0), shared=shared,
        )  # fmt: skip
        optimizer = make_optimizer([p for b in model.blocks() for p in b.module.parameters()
                                    if b.name in result.parameters])  # fmt: skip
        losses = []
        for batch in recorder.batches:
            losses.append(torch_step(model, in_order(batch, modalities)).loss)
            before_step(model, start)
            optimizer.step()
        if margin.least > CLEAR:
            break
    else:
        raise AssertionError(f"no data of these seeds is clear: the last has {margin.least}")
    after = vectors_of(model)
    assert result.parameters.keys() == {*recorder.batches[0].masks}
    for name, vector in result.parameters.items():
        assert largest_error(vector, after[name]) <= TOLERANCE
        moved = np.abs(after[name] - before[name]).max()
        assert moved > 1e-3
        assert np.abs(vector - after[name]).max() <= 1e-3 * moved
    assert result.loss == pytest.approx(np.mean(losses), rel=TOLERANCE)
    assert result.num_examples == num_examples
    return len(recorder.batches)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("modalities", SUBSETS)
def test_five_steps(
    modalities: tuple[str, ...], optimizer: str, manifest: ModelManifest, watch_artifacts: Path
) -> None:
    assert compare_training(*OPTIMIZERS[optimizer], modalities, manifest, watch_artifacts) == 5


def test_clipping_is_clip_grad_norm(manifest: ModelManifest, watch_artifacts: Path) -> None:
    norms = []

    def clip(model: BlockModel, start: Mapping[str, Tensor]) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.2)))

    hyperparameters = Hyperparameters(
        0.5, momentum=0.9, weight_decay=0.0, batch_size=4, max_grad_norm=0.2
    )
    compare_training(
        hyperparameters, lambda p: torch.optim.SGD(p, 0.5, momentum=0.9), SUBSETS[0], manifest,
        watch_artifacts, before_step=clip,
    )  # fmt: skip
    assert max(norms) > 0.25, "nothing was clipped"


def test_fedprox_pulls_shared_blocks_to_the_start(
    manifest: ModelManifest, watch_artifacts: Path
) -> None:
    def pull(model: BlockModel, start: Mapping[str, Tensor]) -> None:
        for name, p in model.named_parameters():
            if name.startswith(("encoders.acc.", "head.")) and p.grad is not None:
                p.grad += p.detach() - start[name]

    hyperparameters = Hyperparameters(
        0.05, momentum=0.9, weight_decay=0.0, batch_size=4, proximal_mu=1.0
    )
    compare_training(
        hyperparameters, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), SUBSETS[0], manifest,
        watch_artifacts, shared=("encoder-acc", "head"), before_step=pull,
    )  # fmt: skip


def test_accumulated_parts_are_the_whole_batch(
    manifest: ModelManifest, watch_artifacts: Path
) -> None:
    model = watch(seed=3)
    data = draw(model, manifest, SUBSETS[0], 22, seed=4)
    whole, parts = (
        train(
            OrtEngine(watch_artifacts), manifest, vectors_of(model),
            ArrayData(data.inputs, data.labels),
            Hyperparameters(0.1, batch_size=11, accumulation=number), np.random.default_rng(5),
        )
        for number in (1, 4)
    )  # fmt: skip
    for name, vector in whole.parameters.items():
        assert largest_error(parts.parameters[name], vector) <= TOLERANCE
    assert parts.loss == pytest.approx(whole.loss, rel=TOLERANCE)


def test_gradients_by_the_inputs(manifest: ModelManifest, engine: OrtEngine) -> None:
    model = watch(seed=3).train()
    fusion, vectors = model.fusion, vectors_of(model)
    assert fusion is not None
    rng = np.random.default_rng(0)
    z = {f"encoder-{m}": rng.standard_normal((5, 128), dtype=np.float32) for m in SUBSETS[0]}
    leaves = {name: torch.from_numpy(x).requires_grad_() for name, x in z.items()}
    upstream = rng.standard_normal((5, 256), dtype=np.float32)
    fused = fusion(dict(zip(SUBSETS[0], leaves.values(), strict=True)), torch.ones(5, 2))
    torch.autograd.backward(fused, torch.from_numpy(upstream))
    feeds: Arrays = {**z, "present": np.ones((5, 2), np.float32)}
    saved = engine.forward(manifest.block("fusion"), vectors["fusion"], feeds).saved
    back = engine.backward(
        manifest.block("fusion"), vectors["fusion"], {**feeds, **saved, "d_fusion": upstream}
    )
    assert back.loss is None
    assert back.inputs.keys() == z.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        np.testing.assert_allclose(back.inputs[name], leaf.grad, rtol=0, atol=1e-6)

    x = rng.standard_normal((5, 256), dtype=np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    labels = rng.integers(0, 7, 5)
    head = copy.deepcopy(model.head).eval()  # without its dropout: a mask of ones
    loss = F.cross_entropy(head(leaf), torch.from_numpy(labels))
    torch.autograd.backward(loss)
    assert leaf.grad is not None
    masks = {"mask.0": np.ones((5, 64), np.float32)}
    back = engine.backward(
        manifest.block("head"), vectors["head"], {"fusion": x, "labels": labels, **masks}
    )
    assert back.loss == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(back.inputs["fusion"], leaf.grad, rtol=0, atol=1e-7)

    batch = draw(model, manifest, ("acc",), 2, seed=0)
    block, feeds = manifest.block("encoder-acc"), {**batch.inputs, **batch.masks["encoder-acc"]}
    saved = engine.forward(block, vectors["encoder-acc"], feeds).saved
    ones = {"d_encoder-acc": np.ones((2, 128), np.float32)}
    back = engine.backward(block, vectors["encoder-acc"], {**feeds, **saved, **ones})
    assert back.inputs == {}  # nothing before it trains


# --- models that are exported exactly ---


class Twice(torch.autograd.Function):
    """The identity with twice its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


twice = cast(Callable[[Tensor], Tensor], Twice.apply)


class Gated(nn.Module):
    """A part is computed without a gradient, one is detached, one layer acts twice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out, self.square = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 4)
        self.positions: Tensor
        self.register_buffer("positions", torch.arange(4.0))
        self.scale = torch.tensor(0.5)  # no buffer, but a constant all the same

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.gate(x).softmax(1)
        z = self.out(x) * gate + self.gate(x).detach() + self.gate(x)
        return cast(Tensor, self.square(self.square(z).tanh()) + self.positions * self.scale)


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.back = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.back.weight = self.embedding.weight
        self.out = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.out(self.back(self.embedding(x).mean(1)).tanh()))


class Concatenated(nn.Module):
    """A head of all modalities, with or without being told who is present."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, embeddings: Mapping[str, Tensor], *present: Tensor) -> Tensor:
        return cast(Tensor, self.out(torch.cat([embeddings["a"], embeddings["b"]], 1)))


class Residual(nn.Module):
    """As torchvision has it, in place."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True), nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide),
        )  # fmt: skip
        self.shortcut = nn.Sequential(
            nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        out += self.shortcut(x)
        return cast(Tensor, self.relu(out))


class Attending(nn.Module):
    """Attention over the modalities present; a learned token stands in for an absent one."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(2, 4))
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:
        z = torch.stack(list(embeddings.values()), 1)
        z = torch.where(present.unsqueeze(2) > 0.5, z, self.tokens)
        z, _ = self.attention(z, z, z, key_padding_mask=present == 0, need_weights=False)
        return cast(Tensor, (z * present.unsqueeze(2)).sum(1) / present.sum(1, keepdim=True))


class UNet(nn.Module):
    """Down, up, and the skip between."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.down(x).relu()
        deep = self.deep(F.max_pool2d(wide, 2)).relu()
        blown_up = F.interpolate(deep, scale_factor=2, mode="bilinear", align_corners=False)
        return cast(Tensor, self.out(torch.cat([wide, self.up(deep), blown_up], 1)).mean((2, 3)))


class Transformer(nn.Module):
    """A vision transformer's steps on a short sequence, with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 32, 8))
        self.into = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, 0.1, "gelu", batch_first=True, norm_first=True
        )
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(x.size(0), -1, -1), self.into(x)], 1)
        return cast(
            Tensor, self.out(self.layer(tokens + self.positions[:, : tokens.shape[1]])[:, 0])
        )


def counted_positions(m: Any, x: Tensor) -> Tensor:
    return cast(Tensor, (m.words(x) + m.places(torch.arange(x.shape[1]))).mean(1))


def flat_encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 4))


def convolution() -> nn.Module:
    return Lambda(lambda m, x: m.layer(x).relu().mean(2), layer=nn.Conv1d(2, 4, 3, padding=1))


def nested() -> BlockModel:
    """A dict and tuples between stages; one of the tensors is used by nobody."""
    parts = Lambda(
        lambda m, x: {"u": m.one(x), "v": (m.two(x), m.one(x) * 2, m.two(x).tanh())},
        one=nn.Linear(5, 4), two=nn.Linear(5, 4),
    )  # fmt: skip
    join = Lambda(lambda m, d: m.out(d["v"][0] + d["u"] * d["v"][2]), out=nn.Linear(4, 4))
    return lone({"parts": parts, "join": join}, torch.randn(2, 5))


def staged(*frozen: str) -> BlockModel:
    stages = {
        "one": nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), nn.Flatten()),
        "two": nn.Sequential(nn.Linear(24, 6), nn.Dropout(0.5), nn.Tanh()),
        "three": nn.Linear(6, 4),
    }
    return tiny(nn.Identity(), encoders={"a": stages, "b": nn.Linear(5, 4)}, frozen_blocks=frozen)


def several_heads() -> BlockModel:
    heads = {"k": nn.Linear(4, 3), "t": nn.Linear(4, 5), "m": nn.Conv1d(1, 2, 1),
             "l": nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))}  # fmt: skip
    heads["m"] = nn.Sequential(nn.Unflatten(1, (1, 4)), heads["m"])
    return tiny(
        flat_encoder(),
        head=heads,
        loss={"k": "cross_entropy", "t": "bce_with_logits", "m": "mse", "l": "l1"},
        loss_weights={"k": 0.3, "t": 2.0},
        class_names={},
    )


TOKENS = torch.tensor([[1, 2, 3, 0, 8, 0], [4, 5, 6, 7, 0, 8]])

EXACT: dict[str, Callable[[], BlockModel]] = {
    "two-modalities": lambda: tiny(flat_encoder()),
    "three-modalities": lambda: tiny(
        nn.Identity(),
        encoders={m: nn.Linear(5, 4) for m in "abc"},
        fusion=SumFusion(dict.fromkeys("abc", 4)),
        examples={m: torch.randn(2, 5) for m in "abc"},
    ),
    "embeddings-of-different-widths": lambda: tiny(
        nn.Sequential(nn.Flatten(), nn.Linear(24, 6)), fusion=SumFusion({"a": 6, "b": 4})
    ),
    "fusion-of-one": lambda: lone(nn.Linear(5, 4), torch.randn(2, 5), fusion=SumFusion({"a": 4})),
    "no-fusion": lambda: lone(nn.Linear(5, 4), torch.randn(2, 5)),
    "no-fusion-of-two": lambda: tiny(flat_encoder(), fusion=None, head=Concatenated()),
    "no-fusion-of-two-zero": lambda: tiny(
        flat_encoder(), fusion=None, head=Concatenated(), missing="zero"
    ),
    "zero-filled": lambda: tiny(
        flat_encoder(), missing="zero", fusion=Lambda(
            lambda m, e: m.out(e["a"] * 2 + e["b"]), out=nn.Linear(4, 4)
        ),
    ),
    "several-heads": several_heads,
    "bce": lambda: tiny(flat_encoder(), loss="bce_with_logits"),
    "nested-outputs": nested,
    "frozen-first": lambda: staged("one-a"),
    "frozen-middle": lambda: staged("two-a"),
    "frozen-encoders": lambda: staged("one-a", "two-a", "three-a", "encoder-b"),
    "frozen-fusion": lambda: staged("fusion"),
    "frozen-head": lambda: staged("head"),
    "no-parameters": lambda: lone(
        {"first": nn.Linear(5, 4), "act": nn.Tanh(), "last": nn.Linear(4, 4)}, torch.randn(2, 5)
    ),
    "no-parameters-first": lambda: lone(
        {"flat": nn.Flatten(), "last": nn.Linear(10, 4)}, torch.randn(2, 2, 5)
    ),
    "batch-norm": lambda: lone(
        nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), torch.randn(2, 5)
    ),
    "example-of-one": lambda: lone(nn.Linear(5, 4), torch.randn(1, 5)),
    "example-of-numbers": lambda: lone(
        Lambda(lambda m, x: m.out(x.unsqueeze(1)), out=nn.Linear(1, 4)), torch.randn(2)
    ),
    "tokens": lambda: lone(
        nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(18, 4)), TOKENS,
        num_values={"a": 9},
    ),
    "tied-weights": lambda: lone(Tied(), TOKENS, num_values={"a": 9}),
    "positions": lambda: lone(
        Lambda(counted_positions, words=nn.Embedding(9, 4), places=nn.Embedding(17, 4)),
        TOKENS, num_values={"a": 9}, dynamic_axes={"a": {1: (4, 17)}},
    ),
    "varying-length": lambda: lone(
        convolution(), torch.randn(2, 2, 7), dynamic_axes={"a": {2: (4, 17)}}
    ),
    "varying-image": lambda: lone(
        Lambda(lambda m, x: m.layer(x).relu().mean((2, 3)), layer=nn.Conv2d(2, 4, 3, padding=1)),
        torch.randn(2, 2, 7, 6), dynamic_axes={"a": {2: (4, 17), 3: (4, 17)}},
    ),
    "without-gradient": lambda: lone(Gated(), torch.randn(2, 5)),
    "own-gradient": lambda: lone(
        Lambda(lambda m, x: twice(m.out(x)), out=nn.Linear(5, 4)), torch.randn(2, 5)
    ),
    "straight-through": lambda: lone(
        Lambda(
            lambda m, x: m.out((z := m.into(x)) + (z.round() - z).detach()),
            into=nn.Linear(5, 4), out=nn.Linear(4, 4),
        ),
        torch.randn(2, 5),
    ),
    "other-in-evaluation": lambda: lone(
        Lambda(
            lambda m, x: m.out(x) * 2 if m.training else m.out(x).tanh(), out=nn.Linear(5, 4)
        ),
        torch.randn(2, 5),
    ),
    "batch-length-as-a-number": lambda: lone(
        Lambda(lambda m, x: m.out(x) - m.out(x).sum(0) / (2 * len(x) + 1), out=nn.Linear(5, 4)),
        torch.randn(2, 5),
    ),
    "reshaped-by-the-batch": lambda: lone(
        Lambda(
            lambda m, x: m.out(x.reshape(x.shape[0] * 2, 4)).reshape(x.size(0), -1),
            out=nn.Linear(4, 2),
        ),
        torch.randn(2, 8),
    ),
    "similarities-within-the-batch": lambda: lone(
        Lambda(
            lambda m, x: ((z := m.out(x)) @ z.t()).softmax(1) @ z, out=nn.Linear(5, 4)
        ),
        torch.randn(2, 5),
    ),
    "residual-network": lambda: lone(
        nn.Sequential(
            Residual(2, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
        ),
        torch.randn(2, 2, 9, 9),
    ),
    "u-net": lambda: lone(UNet(), torch.randn(2, 2, 8, 6)),
    "attention-over-the-present": lambda: tiny(flat_encoder(), fusion=Attending()),
    "varying-length-and-dropout": lambda: lone(
        Lambda(lambda m, x: m.out(m.drop(x).mean(1)), drop=nn.Dropout(0.5), out=nn.Linear(3, 4)),
        torch.randn(2, 7, 3), dynamic_axes={"a": {1: (4, 17)}},
    ),
    "transformer": lambda: lone(Transformer(), torch.randn(2, 6, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_exact(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EXACT[case]()
    manifest = export_model(model, tmp_path / "out")
    subsets = dict.fromkeys([tuple(manifest.modalities), *((m,) for m in manifest.modalities)])
    least = 12 if any(block.statistics for block in manifest.blocks) else 1
    for subset in subsets:
        for length in (1, 2, 7):
            if not differentiated(manifest.blocks_for(subset)):
                continue
            assert law_errors(model, tmp_path / "out", subset, max(least, length), length) == {}


def test_min_batch_is_that_of_pytorch(tmp_path: Path) -> None:
    manifest = export_model(EXACT["batch-norm"](), tmp_path / "out")
    assert [block.min_batch for block in manifest.blocks] == [2, 1]
    assert [s.name for s in manifest.blocks[0].statistics] == ["1.running_mean", "1.running_var"]


# --- models that are refused ---


class Counting(nn.Module):
    """Its output depends on how often it ran: state that no artifact holds."""

    def __init__(self, in_a_buffer: bool) -> None:
        super().__init__()
        self.out = nn.Linear(5, 4)
        self.num_runs = 0
        if in_a_buffer:
            del self.num_runs
            self.register_buffer("num_runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.num_runs += 1
        return cast(Tensor, self.out(x) * self.num_runs)


def of_linear(function: Callable[[Any, Tensor], Any]) -> Callable[[], BlockModel]:
    """The function's ``m.out`` is a Linear of 5 to 4; the input is ``(b, 5)``."""
    return lambda: lone(Lambda(function, out=nn.Linear(5, 4)), torch.randn(2, 5))


def written_in_part(m: Any, x: Tensor) -> Tensor:
    z = m.out(x).clone()
    z[:, 0] = 0
    return cast(Tensor, z.tanh())


def time_joined(embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:
    return torch.cat([embeddings["a"], embeddings["b"]], 2).mean(2)


REFUSED: dict[str, tuple[Callable[[], BlockModel], str]] = {
    "branch-on-values": (
        of_linear(lambda m, x: m.out(x) * (1 if x.sum() > 0 else 2)), "block encoder-a: "
    ),
    "item": (of_linear(lambda m, x: m.out(x) * x.max().item()), r"encoder-a: .*item\(\)"),
    "branch-on-the-batch-length": (
        lambda: tiny(
            Lambda(
                lambda m, x: m.out(x.flatten(1)) * (1 if len(x) > 2 else 2), out=nn.Linear(24, 4)
            )
        ),
        r"block encoder-a: its (output|gradient) .* differs from PyTorch's by",
    ),
    "written-for-two": (
        of_linear(lambda m, x: m.out(x.reshape(2, -1)[:, :5])), "block encoder-a: "
    ),
    "square-of-the-batch-length": (of_linear(lambda m, x: m.out(x) * len(x) ** 2), "encoder-a"),
    "root-of-the-batch-length": (
        of_linear(lambda m, x: m.out(x) * math.sqrt(len(x))), "block encoder-a: a number depends"
    ),
    "counter": (lambda: lone(Counting(False), torch.randn(2, 5)), "block encoder-a: "),
    "counter-in-a-buffer": (
        lambda: lone(Counting(True), torch.randn(2, 5)),
        "block encoder-a: buffer num_runs is written in the forward pass",
    ),
    "noise": (
        of_linear(lambda m, x: m.out(x) + torch.randn(4)),
        "block encoder-a: randn draws random numbers",
    ),
    "unused-parameter": (
        lambda: lone(
            Lambda(lambda m, x: m.out(x), out=nn.Linear(5, 4), rest=nn.Linear(3, 2)),
            torch.randn(2, 5),
        ),
        r"block encoder-a: parameter rest\.weight is not used in the forward pass",
    ),
    "dropout-in-evaluation": (
        of_linear(lambda m, x: F.dropout(m.out(x), 0.3)),
        "block encoder-a: dropout is active in evaluation, too",
    ),
    "written-in-part": (
        of_linear(written_in_part),
        "block encoder-a: a tensor is read after a part of it was written in place",
    ),
    "bool-index": (
        of_linear(lambda m, x: m.out(x) + x[x > 0].sum()), "block encoder-a: .*bool mask"
    ),
    "other-outputs-in-evaluation": (
        of_linear(lambda m, x: (m.out(x), x) if m.training else m.out(x)), "block encoder-a: "
    ),
    "no-such-operator": (
        of_linear(lambda m, x: m.out(x.sort(1)[0])), r"block encoder-a: .*aten\.sort"
    ),
    "varying-length-of-a-gru": (
        lambda: lone(
            Lambda(lambda m, x: m.cell(x)[1][0], cell=nn.GRU(2, 4, batch_first=True)),
            torch.randn(2, 8, 2), dynamic_axes={"a": {1: (4, 17)}},
        ),
        r"block encoder-a: .* depends on the length of a\.1",
    ),
    "varying-length-halved": (
        lambda: lone(
            Lambda(
                lambda m, x: m.layer(x).mean(2), layer=nn.Conv1d(2, 4, 3, stride=2, padding=1)
            ),
            torch.randn(2, 2, 8), dynamic_axes={"a": {2: (4, 17)}},
        ),
        "block encoder-a: ",
    ),
    "varying-length-flattened": (
        lambda: lone(
            nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), torch.randn(2, 2, 8),
            dynamic_axes={"a": {2: (4, 17)}},
        ),
        "block encoder-a: ",
    ),
    "varying-lengths-joined": (
        lambda: tiny(
            nn.Conv1d(2, 4, 3, padding=1),
            encoders={m: nn.Conv1d(2, 4, 3, padding=1) for m in "ab"},
            fusion=Lambda(lambda m, *args: m.out(time_joined(*args)), out=nn.Linear(4, 4)),
            examples={m: torch.randn(2, 2, 7) for m in "ab"},
            dynamic_axes={"a": {2: (4, 17)}, "b": {2: (4, 17)}},
        ),
        "block fusion: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        export_model(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what is exported, and wrong ---


class Stateful(nn.Module):
    """Adds what it gave for the batch before, if that was as long."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 4)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.out(x)
        result = z if self.last is None or len(self.last) != len(z) else z + self.last
        self.last = z.detach()
        return result


class Words(nn.Module):
    """Attention over the words (b, 6) that are not padding, which is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embedding(x).unsqueeze(1)
        mask = (x != 0)[:, None, None, :]
        return F.scaled_dot_product_attention(z, z, z, mask).squeeze(1).mean(1)


class Padded(Words):
    """The same with PyTorch's layers, which in evaluation put zeros where there is padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(self.embedding(x), src_key_padding_mask=x == 0)
        return cast(Tensor, z.mean(1))


def exact_or_refused(model: BlockModel, folder: Path, *batches: Tensor) -> None:
    """Predictions for these inputs are PyTorch's, if there is an export."""
    try:
        manifest = export_model(model, folder)
    except ModelError:
        return
    engine = OrtEngine(folder)
    for batch in batches:
        inputs = {"a": batch.numpy()}
        found = predict_outputs(engine, manifest, vectors_of(model), inputs)["head"]
        assert largest_error(found, torch_outputs(model, inputs)["head"]) <= TOLERANCE


def by_length(function: Callable[[int], float]) -> Callable[[], BlockModel]:
    """A factor that depends on the batch's length."""
    return of_linear(lambda m, x: m.out(x) * function(len(x)))


@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(lambda n: 2 if n == 1 else 1, id="one"),
        pytest.param(lambda n: 2 if n > 2 else 1, id="over-two"),
        pytest.param(lambda n: min(n, 4), id="at-most-four"),
        pytest.param(lambda n: 1 + n % 2, id="odd"),
        pytest.param(lambda n: n - n % 2 + 2, id="pairs"),
    ],
)
def test_a_branch_on_the_batch_length(factor: Callable[[int], float], tmp_path: Path) -> None:
    batches = [torch.randn(length, 5) for length in (1, 2, 3, 4, 8)]
    exact_or_refused(by_length(factor)(), tmp_path / "out", *batches)


def test_a_branch_on_the_batch_length_in_the_second_encoder(tmp_path: Path) -> None:
    branching = Lambda(lambda m, x: m.out(x) * (1 if len(x) > 2 else 2), out=nn.Linear(5, 4))
    model = tiny(nn.Identity(), encoders={"a": flat_encoder(), "b": branching})
    with pytest.raises(ModelError, match="encoder-b"):
        export_model(model, tmp_path / "out")


def test_a_branch_on_a_varying_length(tmp_path: Path) -> None:
    def odd_or_even(m: Any, x: Tensor) -> Tensor:
        return cast(Tensor, m.out(x).mean(1) * (1 + x.shape[1] % 2))

    model = lone(
        Lambda(odd_or_even, out=nn.Linear(4, 4)),
        torch.randn(2, 6, 4),
        dynamic_axes={"a": {1: (4, 17)}},
    )
    exact_or_refused(model, tmp_path / "out", *(torch.randn(2, t, 4) for t in range(1, 13)))


def test_state_in_an_attribute(tmp_path: Path) -> None:
    model = lone(Stateful(), torch.randn(2, 5))
    exact_or_refused(model, tmp_path / "out", torch.randn(2, 5))


def test_python_s_random_numbers(tmp_path: Path) -> None:
    """As layers are dropped in some transformers."""
    rare = of_linear(lambda m, x: m.out(x) * (2 if random.random() < 1e-9 else 1))
    with pytest.raises(ModelError, match="random"):
        export_model(rare(), tmp_path / "out")


def test_attention_to_nothing(tmp_path: Path) -> None:
    words = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]])
    model = lone(Words(), words[:1].clone(), num_values={"a": 50})
    exact_or_refused(model, tmp_path / "out", words)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_transformer_of_padded_words(tmp_path: Path) -> None:
    words = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]])
    model = lone(Padded(), words[:1].clone(), num_values={"a": 50})
    exact_or_refused(model, tmp_path / "out", words)


@pytest.mark.xfail(
    strict=True, reason="ONNX Runtime's Sigmoid is 0 below about -18; F.logsigmoid is exact"
)
def test_the_logarithm_of_a_sigmoid(tmp_path: Path) -> None:
    model = of_linear(lambda m, x: torch.sigmoid(m.out(x)).log())()
    exact_or_refused(model, tmp_path / "out", 60 * torch.randn(4, 5))


# --- what should be exported, and once was not ---


@pytest.mark.parametrize("name", ["t", "batch", "mm", "c0", "n1", "view", "mul", "relu"])
def test_modalities_of_any_name(name: str, tmp_path: Path) -> None:
    encoder = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4))
    model = tiny(
        encoder, encoders={name: encoder}, fusion=SumFusion({name: 4}),
        examples={name: torch.randn(2, 5)},
    )  # fmt: skip
    export_model(model, tmp_path / "out")
    assert law_errors(model, tmp_path / "out", [name], 3) == {}


def test_dropout_with_time_first(tmp_path: Path) -> None:
    def drop(m: Any, x: Tensor) -> Tensor:
        return cast(Tensor, m.out(m.dropout(x.transpose(0, 1)).mean(0)))

    model = lone(Lambda(drop, dropout=nn.Dropout(0.5), out=nn.Linear(4, 4)), torch.randn(2, 5, 4))
    export_model(model, tmp_path / "out")


def test_a_head_with_outputs_of_varying_length(tmp_path: Path) -> None:
    model = lone(
        nn.Conv1d(2, 4, 3, padding=1), torch.randn(2, 2, 7), head=nn.Conv1d(4, 1, 1), loss="mse",
        dynamic_axes={"a": {2: (4, 17)}},
    )  # fmt: skip
    export_model(model, tmp_path / "out")
    assert law_errors(model, tmp_path / "out", ["a"], 3) == {}


def test_a_mean_over_what_a_stage_before_made(tmp_path: Path) -> None:
    words = Lambda(lambda m, x: m.table(x), table=nn.Embedding(9, 6))
    pool = Lambda(lambda m, x: m.out(x.mean(1)), out=nn.Linear(6, 4))
    model = lone(
        {"words": words, "pool": pool},
        TOKENS,
        num_values={"a": 9},
        dynamic_axes={"a": {1: (4, 17)}},
    )
    export_model(model, tmp_path / "out")
    assert law_errors(model, tmp_path / "out", ["a"], 3) == {}


def test_a_mask_among_the_outputs(tmp_path: Path) -> None:
    """As a text encoder hands on which of its words are padding."""
    words = Lambda(
        lambda m, x: {"words": m.table(x), "mask": (x != 0).float()}, table=nn.Embedding(9, 6)
    )
    pool = Lambda(
        lambda m, d: m.out((d["words"] * d["mask"].unsqueeze(2)).mean(1)), out=nn.Linear(6, 4)
    )
    model = lone({"words": words, "pool": pool}, TOKENS, num_values={"a": 9})
    export_model(model, tmp_path / "out")
    assert law_errors(model, tmp_path / "out", ["a"], 3) == {}


def test_export_without_grad(tmp_path: Path) -> None:
    with torch.no_grad():
        export_model(lone(nn.Linear(5, 4), torch.randn(2, 5)), tmp_path / "out")


# --- the law fails ---


Corrupt = Callable[[pytest.MonkeyPatch], None]
WRONG = np.float32(1.001)


def wrong_gradient(block: str, part: slice) -> Corrupt:
    right = OrtEngine.backward

    def backward(self: Any, of: Block, vector: Vector, feeds: Arrays) -> Gradients:
        result = right(self, of, vector, feeds)
        if of.name == block and result.parameters is not None:
            result.parameters[part] *= WRONG
        return result

    return lambda patch: patch.setattr(OrtEngine, "backward", backward)


def wrong_input_gradient(block: str, name: str) -> Corrupt:
    right = OrtEngine.backward

    def backward(self: Any, of: Block, vector: Vector, feeds: Arrays) -> Gradients:
        result = right(self, of, vector, feeds)
        if of.name == block and name in result.inputs:
            result.inputs[name] *= WRONG
        return result

    return lambda patch: patch.setattr(OrtEngine, "backward", backward)


def wrong_loss(patch: pytest.MonkeyPatch) -> None:
    right = OrtEngine.backward

    def backward(self: Any, of: Block, vector: Vector, feeds: Arrays) -> Gradients:
        result = right(self, of, vector, feeds)
        return result._replace(loss=None if result.loss is None else result.loss * 1.001)

    patch.setattr(OrtEngine, "backward", backward)


def wrong_forward(block: str, what: str) -> Corrupt:
    right = OrtEngine.forward

    def forward(self: Any, of: Block, vector: Vector, inputs: Arrays) -> Forward:
        result = right(self, of, vector, inputs)
        if of.name != block:
            return result
        if what == "statistics":
            assert result.statistics is not None
            return result._replace(statistics=result.statistics * WRONG)
        return result._replace(outputs={name: x * WRONG for name, x in result.outputs.items()})

    return lambda patch: patch.setattr(OrtEngine, "forward", forward)


def wrong_evaluation(block: str) -> Corrupt:
    right = OrtEngine.evaluate

    def evaluate(self: Any, of: Block, vector: Vector, inputs: Arrays) -> dict[str, Any]:
        outputs = right(self, of, vector, inputs)
        return {name: x * (WRONG if of.name == block else 1) for name, x in outputs.items()}

    return lambda patch: patch.setattr(OrtEngine, "evaluate", evaluate)


def wrong_with(modalities: set[str], block: str) -> Corrupt:
    """Of one subset of modalities alone."""

    def step(engine: Any, manifest: Any, parameters: Any, inputs: Arrays, *rest: Any) -> steps.Step:
        result = step_gradients(engine, manifest, parameters, inputs, *rest)
        if set(inputs) == modalities:
            result.gradients[block] *= WRONG
        return result

    return lambda patch: patch.setattr(law, "step_gradients", step)


CORRUPT: dict[str, tuple[Corrupt, str]] = {
    "a-bias": (
        wrong_gradient("fusion", slice(-1, None)), "block fusion: its gradient of norm.bias"
    ),
    "a-weight": (
        wrong_gradient("projector-motion", slice(0, 1)),
        "block projector-motion: its gradient of 0.weight",
    ),
    "an-embedding": (
        wrong_gradient("encoder-text", slice(None)),
        "block encoder-text: its gradient of embedding.weight",
    ),
    "one-of-several-heads": (
        wrong_gradient("head-tags", slice(None)), "block head-tags: its gradient of weight"
    ),
    "handed-back": (
        wrong_input_gradient("fusion", "encoder-text"),
        "block encoder-text: its gradient of embedding.weight",
    ),
    "loss": (wrong_loss, "^loss differs"),
    "statistics": (
        wrong_forward("fusion", "statistics"), "block fusion: its running statistic norm.running_"
    ),
    "an-output-in-training": (
        wrong_forward("projector-motion", "outputs"),
        "block projector-motion: its output projector-motion in training",
    ),
    "an-output-of-a-frozen-block": (
        wrong_evaluation("backbone-motion"), "block backbone-motion: its output backbone-motion in "
    ),
    "an-output-in-evaluation": (
        wrong_evaluation("head-pace"), "block head-pace: its output head-pace in evaluation"
    ),
    "with-one-modality": (
        wrong_with({"text"}, "fusion"), "block fusion: its gradient of projection.weight"
    ),
    "with-both": (
        wrong_with({"motion", "text"}, "projector-motion"),
        "block projector-motion: its gradient of 0.weight",
    ),
}  # fmt: skip


def test_the_law_holds(several_artifacts: Path) -> None:
    law.check_one_step(several(), several_artifacts)


@pytest.mark.parametrize("case", CORRUPT)
def test_a_thousandth_is_refused(
    case: str, several_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt, message = CORRUPT[case]
    corrupt(monkeypatch)
    with pytest.raises(ModelError, match=message):
        law.check_one_step(several(), several_artifacts)


def test_nan_is_refused(several_artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.export.test_law.WRONG", np.float32("nan"))
    wrong_gradient("head-kind", slice(0, 1))(monkeypatch)
    with pytest.raises(ModelError, match=r"block head-kind: its gradient of weight .* nan"):
        law.check_one_step(several(), several_artifacts)


def test_an_export_that_breaks_the_law_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_gradient("head", slice(-1, None))(monkeypatch)
    with pytest.raises(ModelError, match=r"block head: its gradient of 3\.bias differs"):
        export_model(small(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("errors", "is_refused"),
    [
        ([1e-6], False),
        ([1e-4, 1e-6], False),  # a coincidence
        ([1e-4, 2e-5, 1e-6], False),
        ([1e-4, 2e-5, 3e-5], True),
        ([2e-2], True),  # too much for one
        ([1e-4, 2e-2], True),
        ([math.nan], True),
        ([math.inf], True),
    ],
)
def test_a_coincidence_is_tried_again(
    errors: list[float], is_refused: bool, several_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def worst(model: BlockModel, folder: Path, seed: int = 0) -> law.Errors:
        seeds.append(seed)
        found = {("head-kind", "gradient of bias"): errors[seed], ("", "loss"): 1e-7}
        return {key: law.Error(error) for key, error in found.items()}

    monkeypatch.setattr(law, "worst_errors", worst)
    if is_refused:
        with pytest.raises(ModelError, match="block head-kind: its gradient of bias differs"):
            law.check_one_step(several(), several_artifacts)
    else:
        law.check_one_step(several(), several_artifacts)
    assert seeds == list(range(len(errors)))


def test_all_modalities_and_each_alone_are_tried(
    several_artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def step(engine: Any, manifest: Any, parameters: Any, inputs: Arrays, *rest: Any) -> steps.Step:
        tried.append((tuple(inputs), len(next(iter(inputs.values())))))
        return step_gradients(engine, manifest, parameters, inputs, *rest)

    monkeypatch.setattr(law, "step_gradients", step)
    law.check_one_step(several(), several_artifacts)
    assert {subset for subset, _ in tried} == {("motion", "text"), ("motion",), ("text",)}
    assert all(length != len(several().examples["text"]) for _, length in tried)


TRUNCATED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "to-the-first": lambda m, x: m.out(x).tanh()[:, :10].mean(1),
    "to-the-last": lambda m, x: m.out(x).tanh()[:, -6:].mean(1),
    "by-the-length": lambda m, x: m.out(x).mean(1) * min(x.shape[1], 12),
}


@pytest.mark.parametrize("case", TRUNCATED)
def test_a_series_that_is_cut_off(case: str, tmp_path: Path) -> None:
    """The ends of the range are traced, the law looks between them."""
    encoder = Lambda(TRUNCATED[case], out=nn.Linear(3, 4))
    model = lone(encoder, torch.randn(2, 8, 3), dynamic_axes={"a": {1: (4, 20)}})
    exact_or_refused(model, tmp_path / "out", *(torch.randn(2, t, 3) for t in range(4, 21)))


@pytest.mark.parametrize("what", ["head", "encoder"])
def test_a_block_that_begins_in_place(what: str, tmp_path: Path) -> None:
    """Neither the block before it nor the user's example is written to."""
    example = torch.randn(2, 5)
    before = example.clone()
    if what == "head":
        head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
        model = lone(nn.Linear(5, 4), example, head=head)
    else:
        model = lone(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 4)), example)
    export_model(model, tmp_path / "out")
    assert law_errors(model, tmp_path / "out", ["a"], 3) == {}
    assert torch.equal(example, before)


def test_a_class_that_is_masked_out(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([0.0, 0.0, float("-inf")])

    model = lone(nn.Linear(5, 4), torch.randn(2, 5), head=Masked(4, 3))
    graphs = build_graphs(
        model.blocks()[-1], {"encoder-a": Value((BATCH_SIZE, 4), torch.float32)},
        {"encoder-a": torch.randn(2, 4)}, num_modalities=1, differentiate_by=["encoder-a"],
    )  # fmt: skip
    assert graphs.training_backward is not None
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 0])
    leaf = x.clone().requires_grad_()
    torch.autograd.backward(nn.functional.cross_entropy(model.head(leaf), labels))
    feeds = {"parameters": graphs.vector, "encoder-a": x.numpy(), "labels": labels.numpy()}
    found = ort.InferenceSession(graphs.training_backward).run(["d_encoder-a"], feeds)[0]
    assert leaf.grad is not None
    np.testing.assert_allclose(found, leaf.grad, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Dropout1d, (4,)), (nn.Dropout3d, (4, 2, 3))])
def test_channel_dropout_without_a_batch(
    layer: type[nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """PyTorch takes such an input for one example: whole rows are dropped."""
    stage = nn.Sequential(
        nn.Linear(5, math.prod(shape)), nn.Unflatten(1, shape), layer(0.5), nn.Flatten(),
        nn.Linear(math.prod(shape), 4),
    )  # fmt: skip
    manifest = export_model(lone(stage, torch.randn(2, 5)), tmp_path / "out")
    (dropout,) = manifest.block("encoder-a").dropouts
    assert set(dropout.shape) <= {1}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("layer", [nn.ELU(), nn.SELU(), nn.CELU(0.5)])
def test_exponential_units_near_zero(layer: nn.Module, scale: float, tmp_path: Path) -> None:
    model = lone(nn.Sequential(layer, nn.Linear(5, 4)), torch.randn(2, 5))
    exact_or_refused(model, tmp_path / "out", scale * torch.randn(6, 5))


def test_a_parameter_that_is_not_finite(tmp_path: Path) -> None:
    encoder = nn.Linear(5, 4)
    with torch.no_grad():
        encoder.bias[0] = math.nan
    with pytest.raises(ModelError, match="block encoder-a: parameter bias holds NaN"):
        export_model(lone(encoder, torch.randn(2, 5)), tmp_path / "out")


def test_a_mode_that_the_user_has_set_is_kept() -> None:
    encoder, head = nn.Linear(5, 4).eval(), nn.Linear(4, 3)
    BlockModel(name="m", encoders={"a": encoder}, head=head, examples={"a": torch.randn(2, 5)})
    assert not encoder.training
    assert head.training


@pytest.mark.parametrize(
    ("found", "precise", "is_kept"),
    [
        (3e-5, None, False),  # nothing to excuse it
        (3e-5, 2e-5, True),  # PyTorch is 2e-5 off itself, the artifact 1e-5 off that
        (2e-4, 2e-5, False),  # more than four times as much
        (3e-5, 2e-6, False),  # PyTorch is exact here
        (2e-3, 2e-3, False),  # PyTorch is too far off itself for anything to be proved
        (9e-6, 2e-3, True),
        (math.nan, 2e-5, False),
    ],
)
def test_pytorch_s_own_rounding_sets_the_limit(
    found: float, precise: float | None, is_kept: bool
) -> None:
    one = np.ones(1)
    reference = None if precise is None else one + precise
    assert law._error(one + found, one, reference, 1.0).is_kept is is_kept
