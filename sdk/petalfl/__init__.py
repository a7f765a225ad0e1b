"""petalfl: block-wise multimodal federated learning for edge devices."""

from petalfl.client import EdgeClient, RoundInfo
from petalfl.errors import (
    DataError,
    EnrollError,
    ModelError,
    PetalError,
    StoreError,
    TransportError,
    WireError,
)

__all__ = [
    "DataError",
    "EdgeClient",
    "EnrollError",
    "ModelError",
    "PetalError",
    "RoundInfo",
    "StoreError",
    "TransportError",
    "WireError",
]
