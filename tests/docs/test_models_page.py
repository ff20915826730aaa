"""docs/models.md is what the tests of the architectures would write."""

from __future__ import annotations

from zoo import ENTRIES, PAGE, ZOO, table


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == table(), "run: python tests/support/zoo.py"
    assert len(ZOO) == len(ENTRIES) >= 25
