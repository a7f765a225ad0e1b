"""A projector between a frozen vision encoder and a frozen language model, as in Fed-CMP.

Only the projector trains and is shared: it maps the image's features to what the language model
takes for words. The frozen parts stand for pre-trained ones; these are small and random.

Source: Fed-CMP, arXiv:2603.26786 (the setting); LLaVA-1.5, arXiv:2310.03744 (the projector).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..model import BlockModel


class VisionEncoder(nn.Module):
    """A small vision transformer: ``(b, 3, side, side)`` to patch features ``(b, n, d)``."""

    def __init__(self, d: int = 64, side: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, d))
        self.layers = _transformer(d)

    def forward(self, image: Tensor) -> Tensor:
        """Encodes a batch of images."""
        x = self.patches(image).flatten(2).transpose(1, 2)  # (b, n, d)
        features: Tensor = self.layers(x + self.positions)
        return features


class Projector(nn.Sequential):
    """Two layers on each patch: ``(b, n, d_vision)`` to ``(b, n, d)``."""

    def __init__(self, d_vision: int = 64, d: int = 96) -> None:
        super().__init__(nn.Linear(d_vision, d), nn.GELU(), nn.Linear(d, d))


class LanguageModel(nn.Module):
    """Answers a prompt of image and words with one word: logits ``(b, vocabulary)``.

    A prefix language model: as only the answer is predicted, the prompt attends to itself in
    both directions.
    """

    def __init__(self, vocabulary: int = 256, d: int = 96, max_length: int = 64) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, d))
        self.layers = _transformer(d)
        self.out = nn.Linear(d, vocabulary)

    def forward(self, embeddings: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """``embeddings`` are ``(b, n, d)`` each; what is not ``present`` is attended to by none."""
        x = torch.cat(list(embeddings.values()), dim=1)  # (b, length, d)
        x = x + self.positions[: x.shape[1]]
        is_absent = torch.cat(
            [
                (present[:, i : i + 1] < 0.5).expand(-1, z.shape[1])
                for i, z in enumerate(embeddings.values())
            ],
            dim=1,
        )  # (b, length)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=is_absent)
        logits: Tensor = self.out(x[:, -1])
        return logits


def _transformer(d: int, depth: int = 2) -> nn.Sequential:
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                d, nhead=4, dim_feedforward=4 * d, activation="gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        )
    )  # fmt: skip


def projector(seed: int = 0) -> BlockModel:
    """Images 32 × 32, prompts of 12 tokens, answers among 256."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BlockModel(
            name="projector",
            encoders={
                "image": {"vision": VisionEncoder(64), "projector": Projector(64, 96)},
                "tokens": {"embedding": nn.Embedding(256, 96)},
            },
            head=LanguageModel(256, 96),
            examples={
                "image": torch.randn(2, 3, 32, 32),
                "tokens": torch.randint(256, (2, 12)),
            },
            frozen_blocks=("vision-image", "embedding-tokens", "head"),
            private_blocks=(),
            num_values={"tokens": 256},
        )
