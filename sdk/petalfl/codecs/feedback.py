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
    codec: Codec, vector: Vector, residual: Vector, rng: np.random.Generator
) -> tuple[bytes, Vector]:
    """The payload of vector + residual, and the new residual.

    Over any number of calls, what was decoded and the last residual add up to the vectors and
    the first residual.

    Raises:
        ValueError: The codec cannot encode the sum.
    """
    total = vector + residual
    payload = codec.encode(total, rng)
    return payload, total - codec.decode(payload, total.size)
