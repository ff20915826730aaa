"""One pool of worker processes for the whole run, and a marker for the tests that need processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from lightning_ulysses.testing.processes import ProcessPool

# The same examples in every run, whatever an earlier one has left in .hypothesis; a busy machine may take its time.
# Others are tried with --hypothesis-profile=default.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what asks for the pool, itself or by another fixture. What starts processes by itself says so."""
    for item in items:
        if isinstance(item, pytest.Function) and "pool" in item.fixturenames:
            item.add_marker(pytest.mark.processes)


# What most runs need; importing it takes longer than they do.
PRELOAD = ("deepspeed", "lightning_ulysses.testing", "pytest", "transformers.models.llama.modeling_llama")


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Four processes, started once."""
    with ProcessPool(4, timeout=120, preload=PRELOAD, own_hashes=True) as processes:
        yield processes
