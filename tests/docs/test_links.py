"""Links between the documents lead somewhere, and the site has all pages."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import DOCUMENTS, PAGES, ROOT, TEXTS, without_blocks

SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def anchors(text: str) -> list[str]:
    """What GitHub and Python-Markdown make of the headings: letters, digits and hyphens."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


def links(text: str) -> list[str]:
    """Targets of links, without those of other hosts."""
    targets = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", without_blocks(text)))
    return [target for target in targets if not re.match(r"\w+:", target)]


def broken(name: str, text: str, texts: dict[str, str]) -> list[str]:
    """The links of a document that lead nowhere, or out of the site."""
    found = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(name), path)) if path else name
        leaves = name.startswith("docs/") and not target.startswith("docs/")
        exists = target in texts or (ROOT / target).is_file()
        if leaves or not exists or (anchor and anchor not in anchors(texts.get(target, ""))):
            found.append(link)
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    assert broken(name, TEXTS[name], TEXTS) == []


def test_broken_links_are_found() -> None:
    text = "# A b\n[1](#a-b) [2](#b) [3](b.md#c) [4](b.md#d) [5](../README.md) [6](no.md) [7](https://a.b)\n```\n[8](no)\n```\n"
    texts = {"docs/a.md": text, "docs/b.md": "# `C`!\n"}
    assert broken("docs/a.md", text, texts) == ["#b", "b.md#d", "../README.md", "no.md"]
    assert anchors("# A\n## A\n") == ["a", "a-1"]


def entries(nav: Any) -> list[str]:
    """The files of the navigation."""
    if isinstance(nav, str):
        return [nav]
    return [file for part in (nav.values() if isinstance(nav, dict) else nav) for file in entries(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = entries(SITE["nav"])
    assert sorted(f"docs/{file}" for file in listed) == sorted(PAGES)


def test_pages_begin_with_their_title() -> None:
    for page in PAGES:
        assert (
            re.match(r"# \S", TEXTS[page]) and len(re.findall(r"^# ", without_blocks(TEXTS[page]), re.MULTILINE)) == 1
        )


def test_the_readme_is_short() -> None:
    """A page and a half; everything else has a page in docs/."""
    assert len(TEXTS["README.md"].splitlines()) <= 150
    rows = [line for line in without_blocks(TEXTS["README.md"]).splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in row.split("|")]
    assert len(rows) == 10 and max(len(cell.split()) for cell in cells) <= 12


def test_the_site_is_built_from_the_pages() -> None:
    assert Path(ROOT / SITE["docs_dir"]) == ROOT / "docs" and SITE["strict"] is True
