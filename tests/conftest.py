"""One pool of worker processes for the whole run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_ulysses.testing.processes import ProcessPool


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Four processes, started once."""
    with ProcessPool(4, timeout=120) as processes:
        yield processes
