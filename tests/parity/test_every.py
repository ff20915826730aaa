"""Architectures of transformers, built tiny: one step is that of one process, as docs/architectures.md says."""

from __future__ import annotations

import json

import pytest
from every import LINES, PAGE, page, tried
from nightly import sampled
from tiny import architectures

from lightning_ulysses.testing.processes import ProcessPool

ROWS = [json.loads(line) for line in LINES.read_text().splitlines()]


@pytest.mark.parametrize("name", sampled([row["type"] for row in ROWS if row["result"] == "exact"], 40))
def test_one_step(pool: ProcessPool, name: str) -> None:
    row = tried(pool, name, *architectures()[name])
    assert row["result"] == "exact", row


def test_the_page_shows_the_lines() -> None:
    assert PAGE.read_text() == page(LINES)
