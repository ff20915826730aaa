"""Pages of the documentation that tests write are what they would write."""

from __future__ import annotations

import recipes
import zoo


def test_page_of_models() -> None:
    assert len(zoo.ZOO) == len(zoo.ENTRIES) >= 25
    assert zoo.PAGE.read_text() == zoo.table(), "run: python tests/support/zoo.py"


def test_page_of_recipes() -> None:
    assert len(recipes.RECIPES) >= 25
    assert recipes.PAGE.read_text() == recipes.table(), "run: python tests/support/recipes.py"
