from __future__ import annotations

from collections.abc import Callable

import pytest

from server.choices import form_of, parse_choice


def cut(share: float, num_parts: int = 2) -> tuple[float, int]:
    if not 0 <= share < 1:
        raise ValueError(f"expected share in [0, 1), found {share}")
    return share, num_parts


def keep() -> tuple[float, int]:
    return 0.0, 0


KNOWN: dict[str, Callable[..., tuple[float, int]]] = {"cut": cut, "keep": keep}
FORMS = "cut:share[:num_parts], keep"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("cut:0.5", (0.5, 2)), ("cut:0:3", (0.0, 3)), ("cut:1e-3:4", (0.001, 4)), ("keep", (0.0, 0))],
)
def test_parameters_follow_the_name(text: str, expected: tuple[float, int]) -> None:
    found = parse_choice("rule", text, KNOWN)
    assert found == expected and list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"rule '' is not known; choose of {FORMS}"),
        ("cutt:1", f"rule 'cutt:1' is not known; choose of {FORMS}"),
        ("cut", "rule 'cut': a parameter is missing; it is written cut:share[:num_parts]"),
        ("cut:", "rule 'cut:': share '' is not a number; it is written cut:share[:num_parts]"),
        ("cut:a", "rule 'cut:a': share 'a' is not a number"),
        ("cut:0.1:2.5", "rule 'cut:0.1:2.5': num_parts '2.5' is not an integer"),
        ("cut:0.1:2:3", "rule 'cut:0.1:2:3': found 3 parameters, expected 2 at most"),
        ("keep:1", "rule 'keep:1': found 1 parameters, expected 0 at most; it is written keep"),
        ("cut:1", "rule 'cut:1': expected share in [0, 1), found 1.0"),
    ],
)
def test_an_error_says_what_was_found_and_what_is_known(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse_choice("rule", text, KNOWN)
    assert str(raised.value).startswith(message)


def test_parameters_with_a_default_stand_in_brackets() -> None:
    assert form_of("cut", cut) == "cut:share[:num_parts]"
    assert form_of("keep", keep) == "keep"
