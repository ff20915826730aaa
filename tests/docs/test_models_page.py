"""Pages of the documentation that tests write are what they would write."""

from __future__ import annotations

import importlib
import re

import errors_page
import plans_page
import pytest
import recipes
import zoo
from documents import ROOT, TEXTS

from lightning_ulysses import UlyssesError


def test_page_of_models() -> None:
    assert len(zoo.ZOO) == len(zoo.ENTRIES) >= 25
    assert zoo.PAGE.read_text() == zoo.table(), "run: python tests/support/zoo.py"


def test_page_of_recipes() -> None:
    assert len(recipes.RECIPES) >= 25
    assert recipes.PAGE.read_text() == recipes.table(), "run: python tests/support/recipes.py"


@pytest.mark.nightly
def test_page_of_plans() -> None:
    text, pictures = plans_page.written()
    assert plans_page.PAGE.read_text() == text, "run: python tests/support/plans_page.py"
    for name, picture in pictures.items():
        assert (ROOT / "docs/img" / name).read_text() == picture


def test_page_of_errors() -> None:
    assert errors_page.PAGE.read_text() == errors_page.page(), "run: python tests/support/errors_page.py"
    assert len(errors_page.messages()) > 200


def test_the_page_of_errors_has_all_classes() -> None:
    for file, _ in errors_page.trees():
        importlib.import_module(
            ".".join(["lightning_ulysses", *file.removesuffix(".py").split("/")]).removesuffix(".__init__")
        )

    def below(kind: type[UlyssesError]) -> set[str]:
        return {kind.__name__}.union(*(below(each) for each in kind.__subclasses__()))

    own = {name for name in below(UlyssesError) if name in errors_page.classes()}
    assert own == set(errors_page.classes()) and {"UlyssesError", "UlyssesValueError"} <= own


def test_messages_are_read_from_the_source() -> None:
    """With what depends on the run left out, and both sides of a condition."""
    source = """
def f(x):
    what = "a" if x else "b"
    raise UlyssesError(f"{x} in {what}", what + " thing", "do it")
"""
    tree = errors_page.ast.parse(source)
    ((call, names),) = [each for each in errors_page._calls(tree, {}) if len(each[0].args) == 3]
    texts = [errors_page._text(part, names) for part in call.args]
    assert texts == ["… in …", "a / b thing", "do it"]


def test_counts_in_the_readme_are_those_of_the_pages() -> None:
    """Rows of models and of recipes."""
    table = TEXTS["docs/models.md"].partition("## transformers")[2].partition("\n## ")[0]
    # The same model with other settings counts once.
    results = dict(re.findall(r"^\| (\w+)[^|]* \| (exact|refused) ", table, re.MULTILINE))
    exact = list(results.values()).count("exact")
    assert f"{exact} of {len(results)} tested transformers" in TEXTS["README.md"]
    # Wherever its lines end.
    assert f"{exact} of the {len(results)} [tested models]" in " ".join(TEXTS["docs/support.md"].split())
    for page in ("docs/splitting.md", "docs/exact.md"):
        assert f"{len(recipes.RECIPES)} ways to train" in TEXTS[page]
