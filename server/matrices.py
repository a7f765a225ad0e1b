"""The matrices in a block's flat vector."""

from __future__ import annotations

from typing import NamedTuple

from petalfl.model import Block
from petalfl.vectors import Vector

MAX_ROWS = 2048  # of a matrix that is higher than wide: rows × rows float64 are 32 MiB


class Matrix(NamedTuple):
    """A trainable tensor of two dimensions, such as a projector's weight."""

    name: str
    start: int  # in the block's vector
    shape: tuple[int, int]

    @property
    def is_turned(self) -> bool:
        """Whether it is taken transposed: it is high, and a basis of its rows would be large."""
        return self.shape[0] > max(self.shape[1], MAX_ROWS)

    @property
    def size(self) -> int:
        """The number of its values."""
        return self.shape[0] * self.shape[1]

    @property
    def num_rows(self) -> int:
        """Of `view`."""
        return self.shape[1] if self.is_turned else self.shape[0]

    @property
    def num_columns(self) -> int:
        """Of `view`."""
        return self.shape[0] if self.is_turned else self.shape[1]

    def view(self, vector: Vector) -> Vector:
        """The matrix in a block's vector, turned where it `is_turned`; writing to it writes it."""
        return self.of(vector[self.start : self.start + self.size])

    def of(self, values: Vector) -> Vector:
        """The same of its own values ``(size,)``."""
        matrix = values.reshape(self.shape)
        return matrix.T if self.is_turned else matrix


def matrices(block: Block) -> list[Matrix]:
    """The block's trainable matrices, without empty ones."""
    found, start = [], 0
    for tensor in block.parameters:
        if len(tensor.shape) == 2 and tensor.size:
            found.append(Matrix(tensor.name, start, (tensor.shape[0], tensor.shape[1])))
        start += tensor.size
    return found
