"""One chained step on the artifacts = one step of PyTorch on the whole model.

The PyTorch side is written anew here (tests/export/tiny.py), not taken from `export.law`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import BlockModel, export_model, law
from export.models.har import watch
from petalfl.engine import Arrays, Gradients, OrtTrainingEngine
from petalfl.errors import ModelError
from petalfl.model import Block, ModelManifest
from petalfl.training import Hyperparameters, Masks, predict_logits, step_gradients, train
from tests.export.tiny import Lambda, SumFusion, blocks_of, largest_error, tiny, torch_step

TOLERANCE = 1e-5
SUBSETS = [("acc", "gyro"), ("acc",), ("gyro",)]

Inputs = dict[str, NDArray[np.float32]]
Parameters = dict[str, NDArray[np.float32]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring on models this small."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def manifest(watch_artifacts: Path) -> ModelManifest:
    return ModelManifest.load(watch_artifacts)


@pytest.fixture(scope="module")
def engine(watch_artifacts: Path) -> OrtTrainingEngine:
    return OrtTrainingEngine(watch_artifacts)


def flat(model: BlockModel) -> Parameters:
    """The parameters of every block as the flat vectors that the manifest lays out."""
    blocks = blocks_of(model, list(model.encoders))
    return {
        name: np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
        for name, module in blocks.items()
    }


def draw(
    manifest: ModelManifest, modalities: tuple[str, ...], length: int, seed: int
) -> tuple[Inputs, NDArray[np.int64], dict[str, dict[str, NDArray[np.float32]]]]:
    """Random inputs, labels and masks, the masks by their definition."""
    rng = np.random.default_rng(seed)
    inputs = {
        m: rng.standard_normal((length, *manifest.modalities[m].shape), dtype=np.float32)
        for m in modalities
    }
    labels = rng.integers(0, manifest.num_classes, length)
    masks = {
        block.name: {
            d.name: ((rng.random((length, *d.shape)) > d.rate) / (1 - d.rate)).astype(np.float32)
            for d in block.dropouts
        }
        for block in manifest.blocks
        if block.kind != "encoder" or block.inputs[0] in modalities
    }
    return inputs, labels, masks


@contextlib.contextmanager
def forced_dropout(masks: Masks) -> Iterator[None]:
    """PyTorch's dropout multiplies by the given masks, in call order, and uses them all."""
    queue = [torch.from_numpy(m) for by_name in masks.values() for m in by_name.values()]

    def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        if p == 0:
            return x
        mask = queue.pop(0)
        return x.mul_(mask) if inplace else x * mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "dropout", dropout)
        yield
    assert not queue


@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("modalities", SUBSETS)
def test_one_step(
    modalities: tuple[str, ...],
    length: int,
    manifest: ModelManifest,
    engine: OrtTrainingEngine,
) -> None:
    model = watch(seed=3)
    inputs, labels, masks = draw(manifest, modalities, length, seed=length)
    with forced_dropout(masks):
        step = torch_step(model, inputs, labels)
    assert {name for name, m in masks.items() if m} == {*step.gradients} - {"fusion"}
    loss, found = step_gradients(engine, manifest, flat(model), inputs, labels, masks)
    assert largest_error(step, loss, found) <= TOLERANCE


def test_the_masks_matter(manifest: ModelManifest, engine: OrtTrainingEngine) -> None:
    parameters = flat(watch(seed=3))
    inputs, labels, masks = draw(manifest, ("acc",), 5, seed=0)
    _, _, others = draw(manifest, ("acc",), 5, seed=1)
    for block in ("encoder-acc", "head"):
        mixed = masks | {block: others[block]}
        one, _ = step_gradients(engine, manifest, parameters, inputs, labels, masks)
        two, _ = step_gradients(engine, manifest, parameters, inputs, labels, mixed)
        assert abs(one - two) > 1e-4


def test_an_absent_modality_has_no_part(manifest: ModelManifest, engine: OrtTrainingEngine) -> None:
    """Its projection and its columns of the attention get a gradient of exactly zero."""
    model = watch(seed=3)
    inputs, labels, masks = draw(manifest, ("acc",), 5, seed=0)
    _, found = step_gradients(engine, manifest, flat(model), inputs, labels, masks)
    assert found.keys() == {"encoder-acc", "fusion", "head"}
    sizes = np.cumsum([p.numel() for p in model.fusion.parameters()])
    names = [name for name, _ in model.fusion.named_parameters()]
    by_name = dict(zip(names, np.split(found["fusion"], sizes), strict=False))
    assert not by_name["projections.gyro.weight"].any()
    assert not by_name["attention.weight"].reshape(2, 256)[:, 128:].any()
    assert by_name["projections.acc.weight"].any()


@pytest.mark.parametrize("modalities", SUBSETS)
def test_five_sgd_steps(
    modalities: tuple[str, ...],
    manifest: ModelManifest,
    watch_artifacts: Path,
) -> None:
    batches: list[tuple[Inputs, NDArray[np.int64], dict[str, dict[str, Any]]]] = []

    class Recorder(OrtTrainingEngine):
        """Notes what each batch was trained on: the backward pass begins with the head."""

        def backward(self, block: Block, parameters: Any, inputs: Arrays) -> Gradients:
            if block.kind == "head":
                batches.append(({}, np.asarray(inputs["labels"]), {}))
            if block.kind == "encoder":
                batches[-1][0][block.inputs[0]] = inputs[block.inputs[0]]
            masks = {d.name: inputs[d.name] for d in block.dropouts}
            batches[-1][2][block.name] = masks
            return super().backward(block, parameters, inputs)

    model = watch(seed=3)
    inputs, labels, _ = draw(manifest, modalities, 72, seed=1)
    before = {name: vector.copy() for name, vector in flat(model).items()}
    hyperparameters = Hyperparameters(0.05, momentum=0.9, weight_decay=1e-5, batch_size=16)
    result = train(
        Recorder(watch_artifacts), manifest, flat(model), inputs, labels, hyperparameters,
        np.random.default_rng(0),
    )  # fmt: skip
    assert [len(batch) for _, batch, _ in batches] == [16, 16, 16, 16, 8]

    held = blocks_of(model, modalities)
    optimizer = torch.optim.SGD(
        [p for module in held.values() for p in module.parameters()],
        lr=0.05, momentum=0.9, weight_decay=1e-5,
    )  # fmt: skip
    losses = []
    for batch_inputs, batch_labels, masks in batches:
        by_modality = {m: batch_inputs[m] for m in modalities}
        with forced_dropout({name: masks[name] for name in held}):
            losses.append(torch_step(model, by_modality, batch_labels).loss)
        optimizer.step()
    after = flat(model)
    assert result.parameters.keys() == held.keys()
    for name, vector in result.parameters.items():
        assert np.abs(vector - after[name]).max() <= TOLERANCE * np.abs(after[name]).max()
        moved = np.abs(after[name] - before[name]).max()
        assert moved > 1e-3
        assert np.abs(vector - after[name]).max() <= 1e-3 * moved
    assert result.loss == pytest.approx(np.mean(losses), rel=TOLERANCE)
    assert result.num_examples == 72


def test_gradients_by_the_inputs(manifest: ModelManifest, engine: OrtTrainingEngine) -> None:
    model = watch(seed=3).train()
    rng = np.random.default_rng(0)
    z = {m: rng.standard_normal((5, 128), dtype=np.float32) for m in ("acc", "gyro")}
    leaves = {m: torch.from_numpy(x).requires_grad_() for m, x in z.items()}
    g = rng.standard_normal((5, 256), dtype=np.float32)
    fused = model.fusion(leaves, torch.ones(5, 2))
    torch.autograd.backward(fused, torch.from_numpy(g))
    fusion = {"encoder-acc": z["acc"], "encoder-gyro": z["gyro"],
              "present": np.ones((5, 2), np.float32), "g": g}  # fmt: skip
    back = engine.backward(manifest.block("fusion"), flat(model)["fusion"], fusion)
    assert back.loss is None
    assert back.inputs.keys() == {"encoder-acc", "encoder-gyro"}
    for m, leaf in leaves.items():
        assert leaf.grad is not None
        np.testing.assert_allclose(back.inputs[f"encoder-{m}"], leaf.grad, rtol=0, atol=1e-6)

    x = rng.standard_normal((5, 256), dtype=np.float32)
    leaf = torch.from_numpy(x).requires_grad_()
    labels = rng.integers(0, 7, 5)
    model.head.eval()  # without its dropout: a mask of ones
    loss = nn.functional.cross_entropy(model.head(leaf), torch.from_numpy(labels))
    torch.autograd.backward(loss)
    assert leaf.grad is not None
    ones = np.ones((5, 64), np.float32)
    back = engine.backward(
        manifest.block("head"), flat(model)["head"],
        {"fusion": x, "labels": labels, manifest.block("head").dropouts[0].name: ones},
    )  # fmt: skip
    assert back.loss == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(back.inputs["fusion"], leaf.grad, rtol=0, atol=1e-7)

    encoder = manifest.block("encoder-acc")
    inputs, _, masks = draw(manifest, ("acc",), 2, seed=0)
    feed = {**inputs, **masks["encoder-acc"], "g": np.ones((2, 128), np.float32)}
    assert engine.backward(encoder, flat(model)["encoder-acc"], feed).inputs == {}


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("modalities", SUBSETS)
def test_predictions_are_the_eval_forward_pass(
    modalities: tuple[str, ...], length: int, manifest: ModelManifest, engine: OrtTrainingEngine
) -> None:
    model = watch(seed=3).eval()
    inputs, _, _ = draw(manifest, modalities, length, seed=2)
    with torch.no_grad():
        expected = model({m: torch.from_numpy(x) for m, x in inputs.items()}).numpy()
    found = predict_logits(engine, manifest, flat(model), inputs)
    assert found.shape == (length, 7)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def attend(layer: Any, x: Tensor) -> Tensor:
    sequence = x.transpose(1, 2)  # (b, t, 4)
    return cast(Tensor, layer.attention(sequence, sequence, sequence)[0].mean(1))


def recur(layer: Any, x: Tensor) -> Tensor:
    return cast(Tensor, layer.cell(x.transpose(1, 2))[0].mean(1))


def tied() -> nn.Module:
    square = nn.Linear(4, 4)
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 4), nn.Tanh(), square, nn.Tanh(), square)


def perceptron(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 8), activation, nn.Linear(8, 4))


def conv(*layers: nn.Module, width: int = 32) -> nn.Module:
    """A convolution of the (3, 8) example, ``layers``, and a linear map of ``width`` to 4."""
    return nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), *layers, nn.Flatten(), nn.Linear(width, 4))


# Encoders of (b, 3, 8) that export exactly, and must go on to do so.
EXACT: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: perceptron(nn.ReLU()),
    "gelu": lambda: perceptron(nn.GELU()),
    "gelu-tanh": lambda: perceptron(nn.GELU("tanh")),
    "silu": lambda: perceptron(nn.SiLU()),
    "tanh": lambda: perceptron(nn.Tanh()),
    "sigmoid": lambda: perceptron(nn.Sigmoid()),
    "leaky-relu": lambda: perceptron(nn.LeakyReLU()),
    "relu-inplace": lambda: perceptron(nn.ReLU(inplace=True)),
    "softmax": lambda: perceptron(nn.Softmax(dim=1)),
    "max-pool": lambda: conv(nn.MaxPool1d(3, stride=2, padding=1), width=16),
    "adaptive-avg-pool": lambda: conv(nn.AdaptiveAvgPool1d(1), width=4),
    "conv2d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d((1, 2)),
        nn.Flatten(), nn.Linear(24, 4),
    ),
    "residual": lambda: Lambda(
        lambda m, x: m.out((x + m.conv(x)).flatten(1)),
        conv=nn.Conv1d(3, 3, 3, padding=1), out=nn.Linear(24, 4),
    ),
    "gru": lambda: Lambda(recur, cell=nn.GRU(3, 4, batch_first=True)),
    "lstm": lambda: Lambda(recur, cell=nn.LSTM(3, 4, batch_first=True)),
    "gru-two-layers": lambda: Lambda(recur, cell=nn.GRU(3, 4, num_layers=2, batch_first=True)),
    "lstm-last-state": lambda: Lambda(
        lambda m, x: m.cell(x.transpose(1, 2))[1][0][-1], cell=nn.LSTM(3, 4, batch_first=True)
    ),
    "attention": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 1),
        Lambda(attend, attention=nn.MultiheadAttention(4, 2, dropout=0.0, batch_first=True)),
    ),
    "weight-norm": lambda: nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(24, 4))
    ),
    "tied-weights": tied,
    "two-dropouts": lambda: nn.Sequential(
        nn.Dropout(0.3), nn.Flatten(), nn.Linear(24, 4), nn.Dropout(0.5)
    ),
}  # fmt: skip

# Encoders that may be refused, by name, but never exported wrong.
EXACT_OR_REFUSED: dict[str, Callable[[], nn.Module]] = {
    "layer-norm": lambda: nn.Sequential(nn.LayerNorm(8), nn.Flatten(), nn.Linear(24, 4)),
    "group-norm": lambda: conv(nn.GroupNorm(2, 4)),
    "rms-norm": lambda: nn.Sequential(nn.RMSNorm(8), nn.Flatten(), nn.Linear(24, 4)),
    "transformer": lambda: nn.Sequential(
        nn.Conv1d(3, 4, 1),
        Lambda(
            lambda m, x: m.layer(x.transpose(1, 2)).mean(1),
            layer=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        ),
    ),
    "dropout-of-zero": lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 4), nn.Dropout(0.0)),
    "dropout-in-place": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(24, 4), nn.Dropout(0.3, inplace=True)
    ),
    "dropout1d": lambda: conv(nn.Dropout1d(0.3)),
    "alpha-dropout": lambda: perceptron(nn.AlphaDropout(0.3)),
    "rrelu": lambda: perceptron(nn.RReLU()),
    "elu": lambda: perceptron(nn.ELU()),
    "softplus": lambda: perceptron(nn.Softplus()),
    "bidirectional-gru": lambda: Lambda(
        recur, cell=nn.GRU(3, 2, batch_first=True, bidirectional=True)
    ),
    "rnn": lambda: Lambda(recur, cell=nn.RNN(3, 4, batch_first=True)),
    "instance-norm": lambda: conv(nn.InstanceNorm1d(4)),
    "spectral-norm": lambda: nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(24, 4))
    ),
    "transposed-conv": lambda: conv(nn.ConvTranspose1d(4, 4, 3, padding=1)),
    # ONNX Runtime's gradient of an asymmetric padding is wrong; only the law tells.
    "same-padding": lambda: conv(nn.Conv1d(4, 4, 4, padding="same")),
    "detached": lambda: Lambda(
        lambda m, x: m.two(m.one(x.flatten(1)).detach() * x.flatten(1)),
        one=nn.Linear(24, 24), two=nn.Linear(24, 4),
    ),
    "frozen": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(24, 4).requires_grad_(False), nn.Linear(4, 4)
    ),
    "counting": lambda: Counting(),
    "noise": lambda: Lambda(
        lambda m, x: m.out(x.flatten(1)) + torch.randn(4), out=nn.Linear(24, 4)
    ),
}  # fmt: skip

# Exported without a word, and wrong: on other batch sizes, or in evaluation.
WRONG: dict[str, Callable[[], nn.Module]] = {
    "length-in-python": lambda: Lambda(
        lambda m, x: m.out(x.flatten(1)) / len(x), out=nn.Linear(24, 4)
    ),
    "length-of-the-example": lambda: Lambda(
        lambda m, x: m.out(x.reshape(2, -1)), out=nn.Linear(24, 4)
    ),
    "other-in-evaluation": lambda: Lambda(
        lambda m, x: m.out(x.flatten(1)) * (2 if m.training else 1), out=nn.Linear(24, 4)
    ),
}


class Counting(nn.Module):
    """Its output depends on how often it ran: state that no artifact holds."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(24, 4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs: Tensor
        self.runs += 1
        return cast(Tensor, self.out(x.flatten(1)) * self.runs)


def check_law(model: BlockModel, folder: Path, modalities: tuple[str, ...]) -> None:
    """Compares a training step and a prediction on batches of other lengths than the example."""
    manifest = ModelManifest.load(folder)
    engine, parameters = OrtTrainingEngine(folder), flat(model)
    for length in (1, 5):
        inputs, labels, masks = draw(manifest, modalities, length, seed=length)
        with forced_dropout(masks):
            step = torch_step(model, inputs, labels)
        loss, found = step_gradients(engine, manifest, parameters, inputs, labels, masks)
        assert largest_error(step, loss, found) <= TOLERANCE
        with torch.no_grad():
            logits = model.eval()({m: torch.from_numpy(x) for m, x in inputs.items()}).numpy()
        predicted = predict_logits(engine, manifest, parameters, inputs)
        np.testing.assert_allclose(predicted, logits, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> tuple[BlockModel, Path]:
    """All the exact layers, each the encoder of a modality: exported in one go, to save time."""
    torch.manual_seed(0)
    model = tiny(
        nn.Identity(),
        encoders={name: build() for name, build in EXACT.items()},
        fusion=SumFusion(dict.fromkeys(EXACT, 4)),
        examples={name: torch.randn(2, 3, 8) for name in EXACT},
    )
    out = tmp_path_factory.mktemp("garden") / "out"
    export_model(model, out)
    return model, out


@pytest.mark.parametrize("layer", EXACT)
def test_layers_that_export_exactly(layer: str, garden: tuple[BlockModel, Path]) -> None:
    check_law(*garden, (layer,))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("layer", EXACT_OR_REFUSED)
def test_layers_that_are_exact_or_refused(layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny(EXACT_OR_REFUSED[layer]())
    try:
        export_model(model, tmp_path / "out")
        check_law(model, tmp_path / "out", ("a", "b"))
    except ModelError as error:
        assert "encoder-a" in str(error) or str(error).startswith("loss: ")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", WRONG)
def test_layers_that_would_be_wrong_elsewhere_are_refused(layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="encoder-a"):
        export_model(tiny(WRONG[layer]()), tmp_path / "out")


def test_a_branch_on_values_is_refused(tmp_path: Path) -> None:
    """It is right on some batches: an error of 0.8 is no rounding, however rare."""
    torch.manual_seed(0)
    branching = Lambda(
        lambda m, x: m.out(x.flatten(1)) * (1 if x.sum() > 0 else 2), out=nn.Linear(24, 4)
    )
    with pytest.raises(ModelError, match="encoder-a"):
        export_model(tiny(branching), tmp_path / "out")


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions_are_refused(
    groups: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name: they are right on some lengths of batch and wrong on others, past any check."""
    monkeypatch.setattr("export.artifacts.check_one_step", lambda model, folder: None)
    with pytest.raises(ModelError, match=r"block encoder-a: .*group"):
        export_model(tiny(conv(nn.Conv1d(4, 4, 3, groups=groups, padding=1))), tmp_path / "out")


def test_encoders_of_different_widths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(24, 6))
    model = tiny(wide, fusion=SumFusion({"a": 6, "b": 4}))
    export_model(model, tmp_path / "out")
    for modalities in [("a", "b"), ("a",), ("b",)]:
        check_law(model, tmp_path / "out", modalities)


AVERAGE_POOL = """
from pathlib import Path
from torch import nn
from petalfl.errors import ModelError
from tests.export.tiny import tiny
from export import export_model
model = tiny(nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.AvgPool1d(2), nn.Flatten(),
                           nn.Linear(16, 4)))
try:
    export_model(model, Path("out"))
except ModelError as error:
    print(error)
"""


def test_average_pooling_does_not_kill_the_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", AVERAGE_POOL], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_a_wrong_gradient_is_refused_by_block_and_parameter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, "0|head", slice(-1, None))  # its vector is weight (3, 4), then bias (3,)
    model = tiny(nn.Sequential(nn.Flatten(), nn.Linear(24, 4)))
    with pytest.raises(ModelError, match=r"^head\.bias: the exported block differs.* a \+ b"):
        export_model(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_gradient_that_is_wrong_for_one_modality_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each modality is checked alone, too: batch 0 has both, 1 has a, 2 has b."""
    corrupt(monkeypatch, "2|encoder-b", slice(None))
    model = tiny(nn.Sequential(nn.Flatten(), nn.Linear(24, 4)))
    with pytest.raises(ModelError, match=r"^encoder-b\.weight: .* with b;"):
        export_model(model, tmp_path / "out")


def test_an_output_that_is_wrong_in_evaluation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt(monkeypatch, "1|fusion|output", slice(None))
    model = tiny(nn.Sequential(nn.Flatten(), nn.Linear(24, 4)))
    with pytest.raises(ModelError, match=r"^fusion in evaluation: .* with a;"):
        export_model(model, tmp_path / "out")


def corrupt(monkeypatch: pytest.MonkeyPatch, key: str, place: slice) -> None:
    """Makes the runtime's result under ``key`` wrong by a thousandth."""
    run = law._runtime_step

    def corrupted(folder: Path, batches: list[law.Batch]) -> Any:
        found = run(folder, batches)
        found[key][place] *= 1.001
        return found

    monkeypatch.setattr(law, "_runtime_step", corrupted)
