from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.model import BlockModel
from export.models import avmnist, har, projector, ptbxl, text_audio
from export.models.har import AttentionFusion, MlpHead, SensorEncoder, watch
from petalfl.model import ModelManifest

MODELS: dict[str, Callable[[int], BlockModel]] = {
    "watch": har.watch,
    "ecg": ptbxl.ecg,
    "digits": avmnist.digits,
    "emotion": text_audio.emotion,
    "projector": projector.projector,
}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def sizes(model: BlockModel) -> list[int]:
    return [size(block.module) for block in model.blocks()]


def test_the_parameter_counts_are_the_papers() -> None:
    """BLOSSOM's KU-HAR model, d = 128, two modalities of six channels in all, eight classes."""
    encoder = size(SensorEncoder(3, d=128))
    fusion = size(AttentionFusion(("acc", "gyro"), d=128, out=256))
    head = size(MlpHead(256, 8))
    assert (encoder, fusion, head) == (150_976, 66_562, 16_968)
    assert 2 * encoder + fusion + head == 385_482


def test_the_ecg_model_is_the_papers() -> None:
    assert sizes(ptbxl.ecg()) == [89_632, 89_632, 16_898, 8_581]
    assert size(ptbxl.ecg()) == 204_743


def test_the_other_models_by_hand() -> None:
    convolutions = sum(9 * c * d + d + 2 * d for c, d in [(1, 8), (8, 16), (16, 32)])
    assert sizes(avmnist.digits()) == [
        convolutions + 288 * 32 + 32,
        convolutions + 9 * 32 * 64 + 3 * 64 + 64 * 256 + 256,
        (32 + 256) * 2 + 2 + (32 + 256) * 128 + 2 * 128,
        128 * 256 + 3 * 256 + 256 * 128 + 3 * 128 + 128 * 10 + 10,
    ]
    text = 3 * 64 * (512 + 64 + 2)
    speech = 89_632 + (80 - 6) * 32 * 5  # the ECG's with 80 channels for 6
    assert sizes(text_audio.emotion()) == [text, speech, 16_898, 128 * 64 + 64 + 64 * 4 + 4]


def test_the_manifest_counts_them(watch_artifacts: Path) -> None:
    blocks = ModelManifest.load(watch_artifacts).blocks
    head = 256 * 64 + 64 + 64 * 7 + 7  # seven classes
    assert [b.size for b in blocks] == [150_976, 150_976, 66_562, head]


def test_only_the_projector_trains() -> None:
    model = projector.projector()
    assert [b.name for b in model.blocks() if not b.is_frozen] == ["projector-image"]
    assert size(model.blocks()[1].module) == 64 * 96 + 96 + 96 * 96 + 96
    assert model.private_blocks == ()
    answers = torch.tensor([3, 200])
    torch.autograd.backward(model.loss(model(model.examples), answers))
    for block in model.blocks():
        for parameter in block.module.parameters():
            assert (parameter.grad is None) == block.is_frozen
            assert block.is_frozen or parameter.grad.abs().max() > 0  # type: ignore[union-attr]


def test_the_language_model_does_not_attend_to_what_is_absent() -> None:
    head = projector.projector().eval().head
    image, tokens = torch.randn(2, 16, 96), torch.randn(2, 12, 96)
    there = torch.tensor([[0.0, 1.0]] * 2)
    one = head({"image": image, "tokens": tokens}, there)
    other = head({"image": image + 1, "tokens": tokens}, there)
    torch.testing.assert_close(one, other)
    both = head({"image": image, "tokens": tokens}, torch.ones(2, 2))
    assert not torch.allclose(one, both)


@pytest.mark.parametrize("name", MODELS)
def test_any_subset_of_the_modalities(name: str) -> None:
    model = MODELS[name](0)
    outputs = model(model.examples)
    assert outputs.shape[0] == 2
    for modality, x in model.examples.items():
        alone = model({modality: torch.cat([x, x])})
        assert alone.shape == (4, *outputs.shape[1:])
        assert alone.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_makes_the_model(name: str) -> None:
    make = MODELS[name]
    state = torch.get_rng_state()
    one, same, other = (make(seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        is_constant = torch.equal(a, a.flatten()[0].expand_as(a))  # a normalization's
        assert is_constant or not torch.equal(a, c)
    for modality, x in one.examples.items():
        assert torch.equal(x, same.examples[modality])


def test_the_watch_model_is_what_it_was() -> None:
    """Earlier runs started from these values."""
    model = har.watch()
    total = sum(p.double().abs().sum().item() for p in model.parameters())
    assert total == pytest.approx(15_481.600124, rel=1e-9)


def test_attention_by_hand() -> None:
    """Scores of log 3 and 0 weigh the modalities 3 : 1."""
    fusion = AttentionFusion(("a", "b"), d=1, out=1)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.zero_()
        fusion.attention.bias.copy_(torch.tensor([math.log(3), 0.0]))
        fusion.projections["a"].get_parameter("weight").fill_(2.0)
        fusion.projections["b"].get_parameter("bias").fill_(10.0)
    z = {"a": torch.tensor([[1.0]]), "b": torch.tensor([[5.0]])}
    for present, expected in [
        ([1.0, 1.0], 0.75 * 2 + 0.25 * 10),
        ([1.0, 0.0], 2.0),
        ([0.0, 1.0], 10.0),
    ]:
        fused = fusion(z, torch.tensor([present]))
        assert fused.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("absent", ["acc", "gyro"])
def test_an_absent_modality_is_never_encoded(absent: str) -> None:
    model = watch().eval()
    other = "gyro" if absent == "acc" else "acc"

    def refuse(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise AssertionError(f"the encoder of {absent} ran")

    model.encoders[absent].register_forward_pre_hook(refuse)
    x = torch.randn(4, 3, 100)
    logits = model({other: x})
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()
    # A fused vector is that of the modality alone: its own projection, unweighted.
    z = model.encoders[other](x)
    alone = model.head(model.get_submodule(f"fusion.projections.{other}")(z))
    torch.testing.assert_close(logits, alone)


def test_an_example_does_not_depend_on_its_batch() -> None:
    model = watch().eval()
    inputs = {"acc": torch.randn(3, 3, 100), "gyro": torch.randn(3, 3, 100)}
    one = model({name: x[:1] for name, x in inputs.items()})
    torch.testing.assert_close(model(inputs)[:1], one, rtol=1e-5, atol=1e-6)
