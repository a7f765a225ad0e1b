"""Rules that are chosen by name, with their parameters, as in ``trimmed-mean:0.1``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def parse_choice(kind: str, text: str, known: Mapping[str, Callable[..., T]]) -> T:
    """What ``known[name]`` makes of the parameters in ``name:parameter:parameter``.

    Args:
        kind: What is chosen, for the messages.
        known: By name: a function of ints and floats, which checks their ranges.

    Raises:
        ValueError: The name or the number of parameters is not known, or a parameter is not one.
    """
    name, *values = text.split(":")
    if name not in known:
        forms = ", ".join(form_of(one, function) for one, function in known.items())
        raise ValueError(f"{kind} {text!r} is not known; choose of {forms}")
    function = known[name]
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    try:
        if len(values) > len(parameters):
            raise ValueError(f"found {len(values)} parameters, expected {len(parameters)} at most")
        if len(values) < sum(one.default is one.empty for one in parameters):
            raise ValueError("a parameter is missing")
        return function(
            *(_number(one, value) for one, value in zip(parameters, values, strict=False))
        )
    except ValueError as error:
        form = form_of(name, function)
        raise ValueError(f"{kind} {text!r}: {error}; it is written {form}") from error


def form_of(name: str, function: Callable[..., object]) -> str:
    """How a choice is written: ``name:parameter[:parameter with a default]``."""
    text, brackets = name, 0
    for parameter in inspect.signature(function).parameters.values():
        brackets += parameter.default is not parameter.empty
        text += "[" * (parameter.default is not parameter.empty) + f":{parameter.name}"
    return text + "]" * brackets


def _number(parameter: inspect.Parameter, value: str) -> float:
    try:
        number: float = parameter.annotation(value)  # int or float
    except ValueError:
        expected = "an integer" if parameter.annotation is int else "a number"
        raise ValueError(f"{parameter.name} {value!r} is not {expected}") from None
    return number
