"""Every architecture is exact or refused, as docs/models.md says."""

from __future__ import annotations

import pytest
from zoo import ENTRIES, PAGE, ZOO, run_one, table

from lightning_ulysses.processes import ProcessPool


@pytest.mark.parametrize("name", ZOO)
def test_one_step(pool: ProcessPool, name: str) -> None:
    result, message = run_one(pool, name)
    assert result == ("exact" if ZOO[name].exact else "refused"), message
    if not ZOO[name].exact:
        assert ZOO[name].why in message


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == table(), "run: python tests/zoo.py"
    assert len(ZOO) == len(ENTRIES) >= 25
