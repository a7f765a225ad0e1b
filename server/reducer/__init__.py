"""The reducer: the one heavy computation of the server, on whatever the machine has for it."""

from .backend import FORMS, Backend, active, choose, parse_reducer, use

__all__ = ["FORMS", "Backend", "active", "choose", "parse_reducer", "use"]
