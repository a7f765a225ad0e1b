from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.models.har import AttentionFusion, MlpHead, SensorEncoder, watch
from petalfl.model import ModelManifest


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_parameter_counts_are_the_papers() -> None:
    """BLOSSOM's KU-HAR model, d = 128, two modalities of six channels in all, eight classes."""
    encoder = size(SensorEncoder(3, d=128))
    fusion = size(AttentionFusion(("acc", "gyro"), d=128, out=256))
    head = size(MlpHead(256, 8))
    assert (encoder, fusion, head) == (150_976, 66_562, 16_968)
    assert 2 * encoder + fusion + head == 385_482


def test_the_smaller_encoder_is_the_papers() -> None:
    """PTB-XL's: 89,632 parameters for d = 64 and six channels."""
    assert size(SensorEncoder(6, d=64)) == 89_632


def test_the_manifest_counts_them(watch_artifacts: Path) -> None:
    blocks = ModelManifest.load(watch_artifacts).blocks
    head = 256 * 64 + 64 + 64 * 7 + 7  # seven classes
    assert [b.size for b in blocks] == [150_976, 150_976, 66_562, head]


def test_the_seed_makes_the_model() -> None:
    state = torch.get_rng_state()
    one, same, other = watch(seed=1), watch(seed=1), watch(seed=2)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone
    weights = [model.head.get_parameter("0.weight") for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


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
    alone = model.head(model.fusion.get_submodule(f"projections.{other}")(z))
    torch.testing.assert_close(logits, alone)


def test_an_example_does_not_depend_on_its_batch() -> None:
    model = watch().eval()
    inputs = {"acc": torch.randn(3, 3, 100), "gyro": torch.randn(3, 3, 100)}
    one = model({name: x[:1] for name, x in inputs.items()})
    torch.testing.assert_close(model(inputs)[:1], one, rtol=1e-5, atol=1e-6)
