"""Random configurations: each is exact, or refused by name."""

from __future__ import annotations

import pytest
from configurations import draw, outcome
from nightly import mostly, sampled

from lightning_ulysses.testing.processes import ProcessPool

# More from the command line, see `configurations`.
SEEDS = range(10)
# With few targets in their first micro-batch, or first batches of several lengths at stage 3.
EXACT = (118, 165, 167, 191, 217)


def test_seeds_differ() -> None:
    drawn = [draw(seed) for seed in range(200)]
    assert len(set(drawn)) == 200 and drawn[7] == draw(7)
    assert {each.stage for each in drawn[:10]} == {1, 2, 3} and {each.packed for each in drawn[:10]} == {True, False}


@pytest.mark.parametrize("seed", sampled(SEEDS, 3))
def test_random_configuration(pool: ProcessPool, seed: int) -> None:
    found = outcome(pool, draw(seed))
    assert found == "exact" or found.startswith("refused: Got "), found


@pytest.mark.parametrize("seed", mostly(EXACT, (167, 191, 217)))
def test_few_targets(pool: ProcessPool, seed: int) -> None:
    assert outcome(pool, draw(seed)) == "exact"
