"""Every message that docs/faq.md quotes is still in the source, word for word."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "faq.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, flags=re.MULTILINE)


def messages_of(path: Path) -> set[str]:
    """The file's literals, with `…` for what an f-string or the log puts in."""
    return {
        re.sub(r"%[sd]", "…", _text(node))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.JoinedStr, ast.Constant))
    }


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


@pytest.fixture(scope="module")
def messages() -> set[str]:
    folders = [REPOSITORY / name for name in ("sdk", "server", "export")]
    return {m for folder in folders for path in folder.rglob("*.py") for m in messages_of(path)}


def test_there_are_many() -> None:
    assert len(QUOTED) == len(set(QUOTED)) >= 40
    tables = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(QUOTED) == len(tables)


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_message_is_in_the_source(quoted: str, messages: set[str]) -> None:
    assert any(quoted in message for message in messages)


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings}
    for path, _, anchor in (t.partition("#") for t in re.findall(r"\]\(([^)]+)\)", PAGE)):
        if path:
            assert (REPOSITORY / "docs" / path).exists(), path
        else:
            assert anchor in anchors, anchor
