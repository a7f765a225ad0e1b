"""The models that the study trains, and their artifacts, which a folder keeps."""

from __future__ import annotations

import copy
import importlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from export import BlockModel, export_model
from export.models.avmnist import AudioEncoder, ImageEncoder, NormalizedHead
from export.models.har import AttentionFusion, MlpHead, SensorEncoder
from petalfl.model import ModelManifest

from . import avdigits as avdigits_data
from . import stress as stress_data
from .artifacts import find, with_values
from .datasets import find_dataset


def avdigits(seed: int = 0) -> BlockModel:
    """BLOSSOM's model for AV-MNIST, on images 8 × 8 and spectrograms 24 × 32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockModel(
            name="avdigits",
            encoders={"image": ImageEncoder(32, side=8), "audio": AudioEncoder(256)},
            fusion=AttentionFusion(("image", "audio"), d=(32, 256), out=128),
            head=NormalizedHead(128, 10),
            examples={"image": torch.randn(2, 1, 8, 8), "audio": torch.randn(2, 1, 24, 32)},
            class_names=avdigits_data.CLASS_NAMES,
        )


def stress(seed: int = 0) -> BlockModel:
    """BLOSSOM's sensor model, with embeddings of 64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockModel(
            name="stress",
            encoders={"pulse": SensorEncoder(1, d=64), "skin": SensorEncoder(2, d=64)},
            fusion=AttentionFusion(("pulse", "skin"), d=64, out=128),
            head=MlpHead(128, 2),
            examples={"pulse": torch.randn(2, 1, 480), "skin": torch.randn(2, 2, 120)},
            class_names=stress_data.CLASS_NAMES,
        )


class ZeroFilled(nn.Module):
    """An attention fusion that takes every modality for present: absent ones are zeros."""

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, embeddings: Mapping[str, Tensor]) -> Tensor:
        """Fuses; embeddings of absent modalities are zeros."""
        first = next(iter(embeddings.values()))
        fused: Tensor = self.fusion(embeddings, first.new_ones(first.shape[0], len(embeddings)))
        return fused


class Untrained(nn.Module):
    """An attention fusion that takes an absent modality for what its encoder first makes of zeros.

    Args:
        encoders: By modality, in the fusion's order; with their initial values.
        examples: By modality: ``(b, …)``.

    Source:
        BLOSSOM's released code, whose clients run the initial encoder on zeros in training. (In
        evaluation they run the global one; here the constant stays.)
    """

    def __init__(
        self, fusion: nn.Module, encoders: Mapping[str, nn.Module], examples: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.modalities = tuple(encoders)
        for name, encoder in encoders.items():
            fresh = copy.deepcopy(encoder).eval()
            with torch.no_grad():
                constant = fresh(torch.zeros_like(examples[name][:1]))  # (1, d)
            self.register_buffer(name, constant, persistent=False)

    def forward(self, embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """Fuses; ``present`` is ``(b, M)``, 1 where the modality is there, else 0."""
        filled = {
            name: torch.where(present[:, n : n + 1] > 0.5, embeddings[name], getattr(self, name))
            for n, name in enumerate(self.modalities)
        }
        fused: Tensor = self.fusion(filled, torch.ones_like(present))
        return fused


def build(dataset: str, missing: str, seed: int, has_personal_head: bool = False) -> BlockModel:
    """A data set's model; whatever the variant, a seed begins with the same values.

    Args:
        has_personal_head: With a personal head, the only private block.
    """
    about = find_dataset(dataset)
    module, _, factory = about.model.partition(":")
    model: BlockModel = getattr(importlib.import_module(module), factory)(seed)
    encoders, fusion = dict(model.encoders.items()), model.fusion
    assert fusion is not None
    if missing == "zero":
        fusion = ZeroFilled(fusion)
    elif missing == "untrained":
        fusion = Untrained(fusion, encoders, model.examples)
    variant = "" if missing == "mask" else f"-{missing}"
    return BlockModel(
        name=f"{model.name}{variant}{'-two' * has_personal_head}",
        encoders=encoders,
        fusion=fusion,
        head=model.head,
        examples=model.examples,
        class_names=about.class_names,
        personal_head=has_personal_head,
        missing="zero" if missing == "zero" else "mask",
    )


def prepare(
    dataset: str,
    missing: str,
    seed: int,
    cache: Path,
    has_personal_head: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> Path:
    """The artifacts of a data set's model with the initial values of a seed.

    The graphs are exported once and kept in ``cache``; other seeds only replace the values, but
    where initial values are in the graphs: of missing ``untrained``.
    """
    folder, is_there = find(cache, dataset, missing, seed, has_personal_head)
    if is_there:
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    if seed == 0 or missing == "untrained":
        progress(f"exporting the model of {dataset}, {missing}{', two heads' * has_personal_head}")
        export_model(build(dataset, missing, seed, has_personal_head), folder)
        return folder
    graphs = prepare(dataset, missing, 0, cache, has_personal_head, progress)
    state = build(dataset, missing, seed, has_personal_head).state_dict()
    vectors = {
        block.name: torch.cat(
            [state[block.state_prefix + tensor.name].flatten() for tensor in block.tensors]
        ).numpy()
        for block in ModelManifest.load(graphs).blocks
    }
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        with_values(graphs, vectors, Path(unfinished, "artifacts"))
        shutil.move(Path(unfinished, "artifacts"), folder)
    return folder
