"""Error feedback: what a codec leaves out of one vector goes into the next.

Source:
    Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy et al. 2019,
    arXiv:1901.09847.
"""

from __future__ import annotations

import numpy as np

from petalfl.vectors import Vector

from .codec import Codec


def encode_with_feedback(
    codec: Codec, vector: Vector, residual: Vector | None, rng: np.random.Generator
) -> tuple[bytes, Vector | None]:
    """The payload of vector + residual, and the new residual; None: of a codec without one.

    Over any number of calls, what was decoded and the last residual add up to the vectors and
    the first residual.

    Raises:
        ValueError: The codec cannot encode the sum.
    """
    total = vector if residual is None else vector + residual
    payload = codec.encode(total, rng)
    left = total - codec.decode(payload, total.size) if codec.has_residual else None
    return payload, left
