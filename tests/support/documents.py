"""The documents and the fenced blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = tuple(f"docs/{path.relative_to(ROOT / 'docs')}" for path in sorted((ROOT / "docs").rglob("*.md")))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES)
LANGUAGES = ("python", "yaml", "sh", "text")


@dataclass(frozen=True)
class Block:
    """A fenced block; its name is the document, the heading above it, and a number within that section."""

    name: str
    language: str
    source: str


def blocks_of(name: str, text: str) -> list[Block]:
    """The blocks of a document, in their order."""
    found, heading, fence, lines, number = [], "", None, [], 0
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})\s*(.*)", line)
        if fence is None and mark:
            fence, language, lines = mark[1], mark[2].strip(), []
        elif fence is not None and line.strip() == fence:
            number += 1
            found.append(Block(f"{name} / {heading} / {number}", language, "\n".join(lines) + "\n"))
            fence = None
        elif fence is not None:
            lines.append(line)
        elif re.match(r"#+ ", line):
            heading, number = line.lstrip("# ").strip(), 0
    assert fence is None, f"{name}: the block that starts with {lines[:1]} has no end"
    return found


def without_blocks(text: str) -> str:
    """The text of a document between its fenced blocks."""
    lines, fence = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if fence is None and not mark:
            lines.append(line)
        elif fence is None and mark:
            fence = mark[1]
        elif line.strip() == fence:
            fence = None
    return "\n".join(lines) + "\n"


TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
BLOCKS = [block for name, text in TEXTS.items() for block in blocks_of(name, text)]


def of(language: str) -> list[Any]:
    """The blocks of a language, as parameters of a test."""
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.language == language]
