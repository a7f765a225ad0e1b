"""The PyTorch side of a model of blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from petalfl.errors import ModelError


class BlockModel(nn.Module):
    """Encoders by modality, a fusion block and a head, each a module of the user's own.

    Args:
        name: Lower case, digits and dashes; names the federation's model.
        encoders: By modality: ``(b, ...)`` to an embedding ``(b, d)``.
        fusion: Called with the embeddings by modality, zeros for the absent ones, and
            ``present`` ``(b, M)``: 1 for the modalities there, in the order of ``encoders``.
        head: The fused ``(b, D)`` to logits ``(b, num_classes)``.
        examples: By modality: one example batch, all of the same length.
        class_names: One per class.
        private_blocks: The default sharing policy: blocks that never leave a device.
    """

    def __init__(
        self,
        *,
        name: str,
        encoders: Mapping[str, nn.Module],
        fusion: nn.Module,
        head: nn.Module,
        examples: Mapping[str, Tensor],
        class_names: tuple[str, ...],
        private_blocks: tuple[str, ...] = ("fusion", "head"),
    ) -> None:
        super().__init__()
        if encoders.keys() != examples.keys():
            raise ModelError(
                f"encoders are given for {sorted(encoders)}, examples for {sorted(examples)}"
            )
        if len({len(batch) for batch in examples.values()}) != 1:
            raise ModelError("the example batches differ in length")
        self.name = name
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion
        self.head = head
        self.examples = dict(examples)
        self.class_names = class_names
        self.private_blocks = private_blocks
        self._widths = {
            name: _width(name, encoder, examples[name]) for name, encoder in encoders.items()
        }

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The whole model on any subset of its modalities: ``(b, num_classes)`` logits.

        An absent modality's encoder is not run. This is the reference that the exported
        blocks, chained, must equal.
        """
        embeddings = {name: self.encoders[name](x) for name, x in inputs.items()}
        some = next(iter(embeddings.values()))
        present = some.new_tensor([float(name in inputs) for name in self.encoders])
        for name in self.encoders.keys() - embeddings.keys():
            embeddings[name] = some.new_zeros(len(some), self._widths[name])
        logits: Tensor = self.head(self.fusion(embeddings, present.expand(len(some), -1)))
        return logits

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Block names and modules in topological order."""
        for modality, encoder in self.encoders.items():
            yield encoder_name(modality), encoder
        yield "fusion", self.fusion
        yield "head", self.head


def _width(modality: str, encoder: nn.Module, example: Tensor) -> int:
    """The embedding's length, found on a copy, so that the encoder's own state is as it was."""
    try:
        with torch.no_grad():
            embedding = copy.deepcopy(encoder).eval()(example)
    except Exception as error:  # whatever the user's own code raises
        raise ModelError(
            f"block {encoder_name(modality)}: its forward pass fails: {error!r}"[:500]
        ) from error
    if not isinstance(embedding, Tensor) or embedding.dim() != 2:
        found = tuple(embedding.shape) if isinstance(embedding, Tensor) else type(embedding)
        raise ModelError(
            f"block {encoder_name(modality)}: output of {found}, expected a tensor (batch, d)"
        )
    return embedding.shape[1]


def encoder_name(modality: str) -> str:
    """The block that encodes ``modality``."""
    return f"encoder-{modality}"
