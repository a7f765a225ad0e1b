"""The matrices in a block's flat vector."""

from __future__ import annotations

from typing import NamedTuple

from petalfl.model import Block
from petalfl.vectors import Vector


class Matrix(NamedTuple):
    """A trainable tensor of two dimensions, such as a projector's weight."""

    name: str
    start: int  # in the block's vector
    shape: tuple[int, int]

    @property
    def sides(self) -> tuple[int, int]:
        """The shorter and the longer side."""
        return min(self.shape), max(self.shape)

    def view(self, vector: Vector) -> Vector:
        """The matrix in a block's vector, with its shorter side first: a view, which writes it."""
        flat = vector[self.start : self.start + self.shape[0] * self.shape[1]]
        matrix = flat.reshape(self.shape)
        return matrix.T if self.shape[0] > self.shape[1] else matrix


def matrices(block: Block) -> list[Matrix]:
    """The block's trainable matrices, without empty ones."""
    found, start = [], 0
    for tensor in block.parameters:
        if len(tensor.shape) == 2 and tensor.size:
            found.append(Matrix(tensor.name, start, (tensor.shape[0], tensor.shape[1])))
        start += tensor.size
    return found
