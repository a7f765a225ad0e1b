"""petalfl: block-wise multimodal federated learning for edge devices."""

from typing import TYPE_CHECKING, Any

from petalfl.errors import (
    DataError,
    EnrollError,
    ModelError,
    PetalError,
    StoreError,
    TransportError,
    WireError,
)

if TYPE_CHECKING:
    from petalfl.budgets import Budgets
    from petalfl.client import EdgeClient, RoundInfo, RoundMetrics
    from petalfl.examples import ExampleStore
    from petalfl.tls import Tls
else:

    def __getattr__(name: str) -> Any:
        """Loads the client when it is first asked for: numpy and asyncio come with it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from petalfl import client

        globals()[name] = value = getattr(client, name)
        return value


__all__ = [
    "Budgets",
    "DataError",
    "EdgeClient",
    "EnrollError",
    "ExampleStore",
    "ModelError",
    "PetalError",
    "RoundInfo",
    "RoundMetrics",
    "StoreError",
    "Tls",
    "TransportError",
    "WireError",
]
