"""Every name and path in the documents exists, and what they list is complete."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
from documents import DOCUMENTS, ROOT, TEXTS

# May be named without their folder.
FILES = [file for folder in ("tests", "examples", "configs") for file in (ROOT / folder).rglob("*.[py]*")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_and_paths_exist(document: str) -> None:
    text = TEXTS[document]
    folders = (ROOT, ROOT / "lightning_ulysses", ROOT / "lightning_ulysses" / "attention")
    for path in re.findall(r"`([\w./-]+\.(?:py|md|toml|yaml))`", text):
        is_below = "/" not in path and any(path == file.name for file in FILES)
        assert is_below or any((folder / path).is_file() for folder in folders), path
    for name in re.findall(r"\blightning_ulysses(?:\.\w+)+", text):
        *parents, last = name.split(".")
        found: Any = importlib.import_module(parents[0])
        for parent in parents[1:]:
            found = importlib.import_module(f"{found.__name__}.{parent}")
        assert hasattr(found, last) or importlib.import_module(name), name
    tests = "\n".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def test_the_table_of_modules_is_complete() -> None:
    """Every folder and every module beside the folders has a row, and nothing else has one."""
    table = TEXTS["CONTRIBUTING.md"].partition("| Folder or module |")[2].partition("\n\n")[0]
    rows = {
        name for cell in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE) for name in re.findall(r"`([\w/.]+)`", cell)
    }
    package = ROOT / "lightning_ulysses"
    folders = {f"{folder.parent.name}/" for folder in package.glob("*/__init__.py")}
    modules = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    assert rows == folders | modules, "say in CONTRIBUTING.md what each of them does"
    # The strategies of the Trainer and of Fabric, and what both stand on.
    assert len(modules) <= 10


def test_registered_names_are_those_in_the_documents() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    sentence = re.search(r"Registered names:(.*?)\.", TEXTS["docs/index.md"], re.DOTALL)
    assert sentence is not None
    written = [name.removeprefix("ulysses_deepspeed") for name in re.findall(r"`(\w+)`", sentence[1])]
    registered = [name for name in StrategyRegistry if name.startswith("ulysses_deepspeed")]
    assert sorted(f"ulysses_deepspeed{suffix}" for suffix in written) == sorted(registered)
