"""One block of a model, and the trees of tensors that pass between blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, nn

from petalfl.errors import ModelError

Value: TypeAlias = Any  # a float32 tensor (b, ...), or a tuple, list or dict of values


class TaskSpec(NamedTuple):
    """What a head is trained for; ``weight`` counts when there are several heads."""

    loss: str
    weight: float = 1.0
    class_names: tuple[str, ...] = ()
    personalizes: str | None = None  # the task of the head that a personal one stands beside


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One block: its module, and how it is called.

    Attributes:
        inputs: A modality (first stage of an encoder) or blocks before it.
        modalities: Of a fusion, or of a head over several encoders: the keys of the dict that
            the module is called with, in the order of ``inputs``. Else empty.
        takes_present: Whether ``present`` ``(b, M)`` is the module's second argument.
        is_frozen: It never trains and stays in evaluation mode.
        state_prefix: PyTorch's state_dict key is this and the parameter's name.
        task: Heads only, and all heads.
    """

    name: str
    kind: Literal["encoder", "fusion", "head"]
    module: nn.Module
    inputs: tuple[str, ...]
    modalities: tuple[str, ...]
    takes_present: bool
    is_frozen: bool
    state_prefix: str
    task: TaskSpec | None

    def __call__(self, values: Mapping[str, Value], present: Tensor | None = None) -> Value:
        """Calls the module on what the blocks before it returned.

        Args:
            values: By the names in ``inputs``; others are ignored.
            present: float32 ``(b, M)``, 1 for the modalities there; needed if `takes_present`.
        """
        inputs = [values[name] for name in self.inputs]
        if not self.modalities:
            return self.module(*inputs)
        embeddings = dict(zip(self.modalities, inputs, strict=True))
        return self.module(embeddings, present) if self.takes_present else self.module(embeddings)


def flatten(name: str, value: Value) -> dict[str, Tensor]:
    """A value's tensors by name, depth first: ``name``, or ``name.0``, or ``name.key``.

    Raises:
        ModelError: It holds something that is no tensor, tuple, list or dict, or no tensor.
    """
    if isinstance(value, Tensor):
        return {name: value}
    tensors: dict[str, Tensor] = {}
    for path, item in _items(name, value):
        tensors |= flatten(path, item)
    if not tensors:
        raise _refusal(name, f"an empty {type(value).__name__}", "tensors")
    return tensors


def unflatten(like: Value, tensors: Iterable[Tensor]) -> Value:
    """The inverse of `flatten`: a value built as ``like`` is, of other tensors."""
    return _rebuild(like, iter(tensors))


def _items(name: str, value: Value) -> Iterator[tuple[str, Value]]:
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield f"{name}.{i}", item
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not key or "." in key:
                raise _refusal(name, f"a dict with the key {key!r}", "a string without a dot")
            yield f"{name}.{key}", item
    else:
        raise _refusal(name, type(value).__name__, "a tensor, or a tuple or dict of tensors")


def _refusal(path: str, found: str, expected: str) -> ModelError:
    block, _, rest = path.partition(".")
    where = f"output {rest}" if rest else "its output"
    return ModelError(f"block {block}: {where} is {found}, expected {expected}")


def _rebuild(like: Value, tensors: Iterator[Tensor]) -> Value:
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, dict):
        rebuilt = copy.copy(like)  # keeps a subclass, such as the outputs of `transformers`
        for key, item in like.items():
            rebuilt[key] = _rebuild(item, tensors)
        return rebuilt
    items = [_rebuild(item, tensors) for item in like]
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
