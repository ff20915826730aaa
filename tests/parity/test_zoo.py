"""Every architecture is exact or refused, as docs/models.md says."""

from __future__ import annotations

import pytest
from guests import GUESTS, Guest
from nightly import sampled
from pairs import PAIRS
from sights import SIGHTS
from zoo import ZOO, compared, run_guest, run_one

from lightning_ulysses.testing.processes import ProcessPool


@pytest.mark.parametrize("name", sampled(ZOO, 3, (name for name in ZOO if not ZOO[name].exact)))
def test_one_step(pool: ProcessPool, name: str) -> None:
    result, message = run_one(pool, name)
    assert result == ("exact" if ZOO[name].exact else "refused"), message
    if not ZOO[name].exact:
        assert ZOO[name].why in message


@pytest.mark.parametrize(
    "guest", sampled(GUESTS, 2), ids=lambda guest: f"{guest.name}, {'planned' if guest.plan else 'plain'}"
)
def test_one_step_of_others(pool: ProcessPool, guest: Guest) -> None:
    result, message = run_guest(pool, guest)
    assert result == ("exact" if guest.exact else "refused"), message
    if not guest.exact:
        assert guest.why in message


@pytest.mark.parametrize(
    "guest",
    sampled([*PAIRS, *SIGHTS], 10, (guest for guest in PAIRS if not guest.exact)),
    ids=lambda guest: guest.name,
)
def test_one_step_of_pairs(pool: ProcessPool, guest: Guest) -> None:
    result, message = run_guest(pool, guest)
    assert result == ("exact" if guest.exact else "refused"), message
    if not guest.exact:
        assert guest.why in message


PLANNED = [guest for guest in GUESTS if guest.plan]


@pytest.mark.parametrize("guest", sampled(PLANNED, 2), ids=lambda guest: guest.name)
def test_plans_are_found(pool: ProcessPool, guest: Guest) -> None:
    """By default these models are split as their plans say, or otherwise as exactly."""
    result, message = compared(pool, guest.make, guest.batches, guest.count, {})
    assert result == "exact", message
