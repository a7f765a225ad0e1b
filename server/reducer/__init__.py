"""The reducer: the one heavy computation of the server, on whatever the machine has for it."""

from .backend import Backend, active, choose, use

__all__ = ["Backend", "active", "choose", "use"]
